"""One rank of a distributed test run; started by ``torch.distributed.run``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from mmengine.dist import get_rank
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.publish.gather import RankSpool
from tests.test_hooks.helpers import box_spy, spy, vis_hooks
from tests.toy_boxes import box_config


@MODEL_WRAPPERS.register_module()
class CpuDataParallel(MMDistributedDataParallel):
    """MMEngine names a device, which torch refuses for a model on the CPU."""

    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, broadcast_buffers=False, **kwargs)


def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")


def damage(fault: str, runner: Runner, patch: pytest.MonkeyPatch) -> None:
    """Let something fail on one of the ranks."""
    rank = get_rank()
    keep = RankSpool._keep

    def keep_all_but_one(self, image_id, png):
        if image_id == "4_image":
            refuse()
        keep(self, image_id, png)

    def forget(self, *args):
        raise MemoryError("no memory for a picture")

    def die(self):
        assert len(self)
        os.kill(os.getpid(), signal.SIGKILL)

    if fault == "drawing" and rank == 1:
        for hook in vis_hooks(runner):
            hook.build_panel = lambda class_names, palette: refuse
    elif fault == "spool" and rank == 1:
        patch.setattr(RankSpool, "_keep", keep_all_but_one)
    elif fault == "reading" and rank == 1:
        patch.setattr(RankSpool, "_read", forget)
    elif fault == "arriving" and rank == 0:
        patch.setattr(RankSpool, "_keep", forget)
    elif fault == "killed" and rank == 1:
        patch.setattr(RankSpool, "gather", die)
    elif fault == "worst":
        draw = Diagnosis.draw

        def drawn(diagnosis):
            with open(Path(runner.work_dir) / f"drawn{rank}.txt", "a") as file:
                file.write(f"{diagnosis.image_id}\n")
            return draw(diagnosis)

        patch.setattr(Diagnosis, "draw", drawn)
    elif fault == "backend" and rank == 0:
        # That of a picture of the other rank, while that one waits.
        backend = runner.visualizer.get_backend("LocalVisBackend")
        add_image = backend.add_image
        backend.add_image = lambda name, *args: (
            refuse() if "2_image" in name else add_image(name, *args)
        )


def test(work_dir: Path, data_root: str, alignment: str, fault: str, on_error: str):
    """Test a toy with both hooks on five images."""
    options = dict(alignment=alignment, num_images=-1, on_error=on_error)
    options["table"] = fault == "table"
    hooks = [spy(**options), box_spy(**options)]
    if fault == "worst":
        worst = dict(select="worst", num_images=-1, score_thr=0.6, mechanisms="all")
        hooks = [dict(type="ErrorVisHook", on_error=on_error, **worst)]
    cfg = box_config(work_dir, hooks, data_root=Path(data_root), batch_size=1)
    cfg.test_dataloader.dataset.indices = 5
    cfg.test_evaluator = []
    if fault == "table":
        wandb = dict(type="WandbVisBackend", init_kwargs=dict(mode="offline"))
        cfg.visualizer.vis_backends = [wandb]
    cfg.launcher = "pytorch"
    cfg.log_level = "INFO"
    cfg.model_wrapper_cfg = dict(type="CpuDataParallel")
    runner = Runner.from_cfg(cfg)
    with pytest.MonkeyPatch.context() as patch:
        damage(fault, runner, patch)
        try:
            runner.test()
            runner.visualizer.close()
        except Exception as error:
            # Said by every rank: none may wait for one that is gone.
            ended = f"ended by {type(error).__name__}: {error}"
            (work_dir / f"rank{get_rank()}.txt").write_text(ended)


def main(work_dir: str, data_root: str, *scenarios: str) -> None:
    """Run scenarios, each ``alignment:fault:on_error``, in folders of these names."""
    torch.set_num_threads(1)
    # Before the Runner, whose own way demands a GPU.
    torch.distributed.init_process_group("gloo")
    for scenario in scenarios:
        test(Path(work_dir) / scenario, data_root, *scenario.split(":"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
