"""One resize that stands for all geometric steps of a test pipeline.

A test pipeline that keeps the aspect ratio pads the image, and its maps lie on the
padded image. A size that the network takes without padding makes maps lie exactly on
the image.
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

    The size follows the geometric steps that this one replaces. A pipeline that
    keeps the aspect ratio gives the size it would scale the image to, each side
    rounded to a multiple; one that stretches gives its own target, in the
    image's orientation. Boxes and masks, where loaded before, follow.

    Args:
        steps (Sequence): The replaced transforms, in their order.
        divisor (int): ``pad_size_divisor`` of the data preprocessor; every size
            is a multiple of it.
        stride (int): Multiple for sizes that follow the image's proportions:
            the largest stride of the network.
    """

    def __init__(self, steps: Sequence[Any], divisor: int, stride: int) -> None:
        # Of an aligned pipeline, which another hook has put into the loop, the steps
        # that it stands for.
        self._steps: list[Any] = [
            part
            for step in steps
            for part in (step._steps if isinstance(step, AlignedResize) else [step])
            if step_name(part) in RESIZING_STEPS
        ]
        self._divisor = divisor
        self._stride = stride

    def size_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Size of the network's input for an image.

        Args:
            image_hw (tuple): Height and width of the image, pixels.

        Returns:
            tuple[int, int]: Height and width, pixels.
        """
        size: tuple[float, float] = image_hw
        keeps_ratio = True
        for step in self._steps:
            size, keeps_ratio = _planned_size(step, size)
        if keeps_ratio:
            multiple = math.lcm(self._divisor, self._stride)
            return _round_to(size[0], multiple), _round_to(size[1], multiple)
        return _ceil_to(size[0], self._divisor), _ceil_to(size[1], self._divisor)

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
    """Multiple that the sides of an input should have: 32, or 64 for P6 networks.

    Args:
        detector (nn.Module): The detector, without wrappers.
        dataset: Dataset of the loop; MMYOLO's batch shapes name the multiple.
    """
    strides = [_DEFAULT_STRIDE]
    for leaf in leaf_datasets(dataset):
        shapes = getattr(leaf, "batch_shapes_cfg", None)
        if shapes:
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
    """Size after one step, and whether it keeps the image's proportions."""
    height, width = size
    name = step_name(step)
    if name == "LetterResize":
        target = _oriented_as(step.scale, size, fixed=True)
        if step.stretch_only:
            return target, False
        ratio = min(target[0] / height, target[1] / width)
        ratio = ratio if step.allow_scale_up else min(ratio, 1.0)
        return (height * ratio, width * ratio), True
    if name == "ResizeShortestEdge":
        short = step.scale if isinstance(step.scale, int) else min(step.scale)
        ratio = short / min(size)
        if step.max_size is not None:
            ratio = min(ratio, step.max_size / max(size))
        return (height * ratio, width * ratio), True
    if name == "FixShapeResize":
        target = (float(step.height), float(step.width))
        if not step.keep_ratio:
            return target, False
        ratio = min(target[0] / height, target[1] / width)
        return (height * ratio, width * ratio), True
    if step.scale is None:
        factor = step.scale_factor
        factor_wh = factor if isinstance(factor, tuple) else (factor, factor)
        keeps = factor_wh[0] == factor_wh[1]
        return (height * factor_wh[1], width * factor_wh[0]), keeps
    if not step.keep_ratio:
        return _oriented_as(step.scale, size), False
    if isinstance(step.scale, (int, float)):
        return (height * step.scale, width * step.scale), True
    ratio = min(max(step.scale) / max(size), min(step.scale) / min(size))
    return (height * ratio, width * ratio), True


def _oriented_as(
    scale: int | tuple[int, int], size: tuple[float, float], fixed: bool = False
) -> tuple[float, float]:
    """A target ``(w, h)`` as (h, w), turned to the image's orientation."""
    target_wh = (scale, scale) if isinstance(scale, int) else tuple(scale)
    target = (float(target_wh[1]), float(target_wh[0]))
    turned = (target[0] - target[1]) * (size[0] - size[1]) < 0
    return target[::-1] if turned and not fixed else target


def _round_to(length: float, multiple: int) -> int:
    return max(1, round(length / multiple)) * multiple


def _ceil_to(length: float, multiple: int) -> int:
    return math.ceil(round(length) / multiple) * multiple
