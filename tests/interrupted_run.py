"""A training that is sent a signal while it draws; a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import cv2
import torch
from mmengine.runner import Runner

from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel
from tests.test_hooks.helpers import spy
from tests.toy import toy_config


def main(work_dir: str, data_root: str, name: str, where: str) -> None:
    """Train a toy; the signal comes with the second validation's second picture."""
    torch.set_num_threads(1)
    hook = spy(num_images=2, on_error="log")
    cfg = toy_config(Path(work_dir), [hook], data_root=Path(data_root))
    cfg.default_hooks.checkpoint.interval = 1
    draw, drawn = FeatMapPanel.__call__, []

    def interrupted_drawing(self, sample):
        drawn.append(sample)
        if len(drawn) == 1 + 2 + 2:  # the trial, and the first validation
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(60)
        return draw(self, sample)

    write = cv2.imwrite

    def interrupted_writing(file, image):
        done = write(file, image)
        if "6_image_2" in file:
            png = Path(file).read_bytes()
            Path(file).write_bytes(png[:100])
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.5)
            Path(file).write_bytes(png)
        return done

    if where == "drawing":
        FeatMapPanel.__call__ = interrupted_drawing
    else:
        cv2.imwrite = interrupted_writing
    Runner.from_cfg(cfg).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
