"""Runs of the toy detectors with hooks, and what they left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmyolo_vis_hooks import BoxAMVisHook, FeatMapVisHook
from mmyolo_vis_hooks.hooks.base import BaseVisHook
from tests.toy_boxes import box_config


class _KeepsSamples(BaseVisHook):
    """Keeps the samples it drew."""

    samples: list

    def build_panel(self, class_names, palette):
        explain = super().build_panel(class_names, palette)
        self.samples = []

        def explain_and_keep(sample):
            if sample.image_id != "trial":
                self.samples.append(sample)
            return explain(sample)

        return explain_and_keep


@HOOKS.register_module()
class SpyHook(_KeepsSamples, FeatMapVisHook):
    """A FeatMapVisHook that keeps the samples it drew."""


@HOOKS.register_module()
class BoxSpyHook(_KeepsSamples, BoxAMVisHook):
    """A BoxAMVisHook that keeps the samples it drew."""


def spy(**options: Any) -> dict:
    """Config of a hook that raises and keeps its samples."""
    return dict(
        dict(
            type="SpyHook",
            target_layers=["backbone", "neck"],
            on_error="raise",
            score_thr=0.0,
        ),
        **options,
    )


def box_spy(**options: Any) -> dict:
    """Config of a BoxAMVisHook that raises and keeps its samples."""
    return dict(dict(type="BoxSpyHook", on_error="raise", score_thr=0.2), **options)


def vis_hooks(runner: Runner) -> list[Any]:
    return [hook for hook in runner.hooks if isinstance(hook, BaseVisHook)]


def ran_test(work_dir: Path, toy_data: Path, hook: dict, **options: Any) -> Runner:
    """A runner of the toy detector that has tested with a hook."""
    torch.manual_seed(0)
    cfg = box_config(work_dir, [hook], data_root=toy_data, **options)
    runner = Runner.from_cfg(cfg)
    runner.test()
    return runner


def end_workers(runner: Runner) -> None:
    """Else the garbage collector waits five seconds for each."""
    for loop in (runner.train_loop, runner.val_loop):
        loop.dataloader._iterator._shutdown_workers()


def logged(runner: Runner, hook: str, mode: str = "test") -> dict[str, float]:
    """The scalars of a hook, by its name."""
    start = f"{mode}/{hook}/"
    return {
        name.removeprefix(start): value.current()
        for name, value in runner.message_hub.log_scalars.items()
        if name.startswith(start)
    }


def pictures(work_dir: Path) -> dict[str, Any]:
    """All pictures of a work dir by file name, decoded."""
    found = {}
    for path in sorted(Path(work_dir).rglob("vis_image/*.png")):
        image = cv2.imread(str(path))
        assert image is not None, f"{path} does not decode"
        assert image.std() > 1, f"{path} is blank"
        found[path.name] = image
    return found


def log_of(work_dir: Path) -> str:
    """Everything that the runs below a folder logged."""
    return "\n".join(path.read_text() for path in Path(work_dir).rglob("*.log"))
