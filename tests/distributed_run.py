"""One rank of a distributed test run; started by ``torch.distributed.run``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

from tests.test_hooks.helpers import box_spy, spy, vis_hooks
from tests.toy_boxes import box_config


@MODEL_WRAPPERS.register_module()
class CpuDataParallel(MMDistributedDataParallel):
    """MMEngine names a device, which torch refuses for a model on the CPU."""

    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, broadcast_buffers=False, **kwargs)


def main(work_dir: str, data_root: str, alignment: str, failing_rank: str) -> None:
    """Test a toy with both hooks on five images; one rank may fail to draw."""
    torch.set_num_threads(1)
    # Before the Runner, whose own way demands a GPU.
    torch.distributed.init_process_group("gloo")
    options = dict(alignment=alignment, num_images=-1, on_error="log")
    hooks = [spy(**options), box_spy(**options)]
    cfg = box_config(Path(work_dir), hooks, data_root=Path(data_root), batch_size=1)
    cfg.test_dataloader.dataset.indices = 5
    cfg.test_evaluator = []
    cfg.launcher = "pytorch"
    cfg.model_wrapper_cfg = dict(type="CpuDataParallel")
    runner = Runner.from_cfg(cfg)
    if get_rank() == int(failing_rank):

        def fail(class_names, palette):
            raise_error = RuntimeError("this rank cannot draw")

            def explain(sample):
                raise raise_error

            return explain

        for hook in vis_hooks(runner):
            hook.build_panel = fail
    runner.test()


if __name__ == "__main__":
    main(*sys.argv[1:])
