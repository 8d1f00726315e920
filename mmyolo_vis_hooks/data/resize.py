"""One resize to a size that the network takes without padding.

It stands for all geometric steps of a test pipeline, so that maps lie exactly on the
image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmcv.transforms import BaseTransform
from torch import nn

from .selector import leaf_datasets

# Those whose target size is known from their arguments.
RESIZING_STEPS = frozenset(
    {
        "Resize",
        "FixScaleResize",
        "FixShapeResize",
        "ResizeShortestEdge",
        "YOLOv5KeepRatioResize",
        "LetterResize",
    }
)
# Those that only move or frame what the resizing steps have scaled.
FRAMING_STEPS = frozenset({"Pad", "RandomFlip"})
_DEFAULT_STRIDE = 32
_MAX_STRIDE = 64


class AlignedResize(BaseTransform):
    """Stretch an image to the size at which the network needs no padding.

    A pipeline that keeps the aspect ratio, or pads, gives the size it would scale the
    image to, each side rounded to a multiple; one that only stretches gives its own
    target, in the image's orientation. Boxes and masks, where loaded before, follow.

    Args:
        steps (Sequence): The replaced transforms, in their order.
        divisor (int): Every size is a multiple of it.
        stride (int): Multiple for sizes that follow the image's proportions.
    """

    def __init__(self, steps: Sequence[Any], divisor: int, stride: int) -> None:
        # Of an aligned pipeline, which another hook has put into the loop, the steps
        # that it stands for.
        self._steps: list[Any] = [
            part
            for step in steps
            for part in (step._steps if isinstance(step, AlignedResize) else [step])
            if step_name(part) in RESIZING_STEPS | {"Pad"}
        ]
        self._divisor = divisor
        self._stride = stride

    def size_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the network's input for an image, pixels."""
        size: tuple[float, float] = image_hw
        final = False
        for step in self._steps:
            size, final = _planned_size(step, size)
        if not final:
            multiple = math.lcm(self._divisor, self._stride)
            height, width = (max(1, round(n / multiple)) * multiple for n in size)
        else:
            height, width = (
                math.ceil(round(n) / self._divisor) * self._divisor for n in size
            )
        return height, width

    def transform(self, results: dict) -> dict:
        """Resize ``results['img']`` and what belongs to it."""
        image_hw = results["img"].shape[:2]
        height, width = self.size_hw(image_hw)
        # What MMYOLO's own resize does, so that the network sees alike pixels; OpenCV
        # has it for at most four channels.
        by_area = height * width < image_hw[0] * image_hw[1] and (
            results["img"].ndim == 2 or results["img"].shape[2] <= 4
        )
        # It imports matplotlib; importing the package shall cost little.
        from mmdet.datasets.transforms import Resize

        resize = Resize(
            scale=(width, height),
            keep_ratio=False,
            interpolation="area" if by_area else "bilinear",
        )
        return resize(results)

    def __repr__(self) -> str:
        replaced = ", ".join(map(step_name, self._steps)) or "nothing"
        return (
            f"{type(self).__name__}(replaces {replaced}, divisor={self._divisor}, "
            f"stride={self._stride})"
        )


def network_divisor(detector: nn.Module) -> int:
    """``pad_size_divisor`` of a detector's data preprocessor; 1 if it has none."""
    preprocessor: Any = getattr(detector, "data_preprocessor", None)
    return int(getattr(preprocessor, "pad_size_divisor", 1) or 1)


def network_stride(detector: nn.Module, dataset: Any) -> int:
    """Multiple that the sides of an input should have: 32, or 64 for P6 networks."""
    strides = [_DEFAULT_STRIDE]
    for leaf in leaf_datasets(dataset):
        shapes = getattr(leaf, "batch_shapes_cfg", None) or {}  # of MMYOLO
        strides.append(int(shapes.get("size_divisor", _DEFAULT_STRIDE)))
    head_module = getattr(getattr(detector, "bbox_head", None), "head_module", None)
    strides += [int(s) for s in getattr(head_module, "featmap_strides", [])]
    return min(max(strides), _MAX_STRIDE)


def step_name(step: Any) -> str:
    """Name of a transform's class."""
    return type(step).__name__


def _planned_size(
    step: Any, size: tuple[float, float]
) -> tuple[tuple[float, float], bool]:
    """Size after one step, and whether the network takes images of that very size."""
    height, width = size
    name = step_name(step)
    if name == "Pad":
        return size, False
    if name == "ResizeShortestEdge":
        short = step.scale if isinstance(step.scale, int) else min(step.scale)
        ratio = short / min(size)
        if step.max_size is not None:
            ratio = min(ratio, step.max_size / max(size))
    elif name in ("LetterResize", "FixShapeResize"):
        if name == "LetterResize":
            target_wh = step.scale
            target_wh = (target_wh,) * 2 if isinstance(target_wh, int) else target_wh
            stretches = step.stretch_only
        else:
            target_wh, stretches = (step.width, step.height), not step.keep_ratio
        if stretches:
            return (float(target_wh[1]), float(target_wh[0])), True
        ratio = min(target_wh[1] / height, target_wh[0] / width)
        if name == "LetterResize" and not step.allow_scale_up:
            ratio = min(ratio, 1.0)
    elif step.scale is None:
        factor = step.scale_factor
        factor_wh = factor if isinstance(factor, tuple) else (factor, factor)
        stretches = factor_wh[0] != factor_wh[1]
        return (height * factor_wh[1], width * factor_wh[0]), stretches
    elif not step.keep_ratio:
        target_wh = step.scale
        target_wh = (target_wh,) * 2 if isinstance(target_wh, int) else target_wh
        target = (float(target_wh[1]), float(target_wh[0]))
        turned = (target[0] - target[1]) * (height - width) < 0
        return target[::-1] if turned else target, True
    elif isinstance(step.scale, (int, float)):
        ratio = step.scale
    else:
        ratio = min(max(step.scale) / max(size), min(step.scale) / min(size))
    return (height * ratio, width * ratio), False
