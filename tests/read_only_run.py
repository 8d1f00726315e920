"""A test run whose work dir takes nothing new once built; a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from mmengine.runner import Runner

from tests.test_hooks.helpers import box_spy, spy
from tests.toy_boxes import box_config


def main(work_dir: str, data_root: str) -> None:
    torch.set_num_threads(1)
    hooks = [make(num_images=2, on_error="log") for make in (spy, box_spy)]
    cfg = box_config(Path(work_dir), hooks, data_root=Path(data_root))
    cfg.default_hooks.logger = None  # MMEngine's own ends the run there
    runner = Runner.from_cfg(cfg)
    for folder, _, _ in os.walk(work_dir):
        os.chmod(folder, 0o555)
    print(f"mAP {runner.test()['coco/bbox_mAP']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
