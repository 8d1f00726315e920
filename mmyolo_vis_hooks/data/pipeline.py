"""The Resize-only version of a test pipeline.

A test pipeline that keeps the aspect ratio pads the image, and its maps lie on
the padded image. Here every geometric step is replaced by one resize to a size
that the network takes without padding, so a map lies exactly on the image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import Resize
from mmengine.dataset import Compose
from torch import nn

from ..errors import UnsupportedPipelineError, VisError
from .selector import leaf_datasets

_RESIZING_STEPS = frozenset(
    {
        "Resize",
        "FixScaleResize",
        "FixShapeResize",
        "ResizeShortestEdge",
        "YOLOv5KeepRatioResize",
        "LetterResize",
    }
)
# Steps that only move or frame what the resizing steps have scaled.
_FRAMING_STEPS = frozenset({"Pad", "RandomFlip"})
_PHOTOMETRIC_STEPS = frozenset(
    {
        "LoadImageFromFile",
        "LoadImageFromNDArray",
        "LoadAnnotations",
        "LoadPanopticAnnotations",
        "LoadEmptyAnnotations",
        "LoadProposals",
        "LoadTextEmbed",
        "FilterAnnotations",
        "Normalize",
        "PhotoMetricDistortion",
        "YOLOv5HSVRandomAug",
        "YOLOXHSVRandomAug",
        "PackDetInputs",
        "ToTensor",
        "ImageToTensor",
    }
)
_DEFAULT_STRIDE = 32
_MAX_STRIDE = 64
_TRIED_SIZES = ((96, 128), (2100, 1700))


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
            if _name(part) in _RESIZING_STEPS
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
        shrinks = height * width < image_hw[0] * image_hw[1]
        resize = Resize(
            scale=(width, height),
            keep_ratio=False,
            # What MMYOLO's own resize does, so that the network sees alike pixels.
            interpolation="area" if shrinks else "bilinear",
        )
        return resize(results)

    def __repr__(self) -> str:
        replaced = ", ".join(map(_name, self._steps)) or "nothing"
        return (
            f"{type(self).__name__}(replaces {replaced}, divisor={self._divisor}, "
            f"stride={self._stride})"
        )


def build_resize_only_pipeline(
    pipeline: Callable, *, divisor: int, stride: int
) -> Compose:
    """Copy a test pipeline with its geometry reduced to one resize.

    Args:
        pipeline (Callable): ``Compose`` of built transforms; may hold nested
            ``Compose`` and one ``TestTimeAug``, whose first view is taken.
        divisor (int): ``pad_size_divisor`` of the data preprocessor.
        stride (int): Largest stride of the network.

    Returns:
        Compose: The other steps unchanged and in their order.

    Raises:
        UnsupportedPipelineError: If a step may move pixels in an unknown way.
    """
    steps = flatten_steps(pipeline)
    geometric = {id(step) for step in steps if _is_geometric(step)}
    resize = AlignedResize(
        [step for step in steps if id(step) in geometric], divisor, stride
    )
    first = next((i for i, step in enumerate(steps) if id(step) in geometric), None)
    if first is None:
        # No geometry of its own, so only padding is avoided: before the packing.
        first = len(steps) - 1
    kept = [
        [copy.deepcopy(step) for step in part if id(step) not in geometric]
        for part in (steps[:first], steps[first:])
    ]
    return Compose([*kept[0], resize, *kept[1]])


def network_divisor(detector: nn.Module) -> int:
    """``pad_size_divisor`` of a detector's data preprocessor; 1 if it has none."""
    preprocessor = getattr(detector, "data_preprocessor", None)
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


def moves_pixels(step: Callable) -> bool:
    """Whether a transform changes where things are, found out by trying.

    The step runs on smooth random images: a small and a large one, because a step
    that limits a size leaves smaller images alone. A step that only changes
    colours leaves the sizes and the places of the edges.

    Args:
        step (Callable): A built transform.

    Returns:
        bool: True also if the step cannot be tried.
    """
    return any(_moves_pixels_of(step, size_hw) for size_hw in _TRIED_SIZES)


def _moves_pixels_of(step: Callable, size_hw: tuple[int, int]) -> bool:
    rng = np.random.RandomState(0)
    # Blobs of a few pixels at irregular places, so that even a mirrored picture
    # has its edges elsewhere.
    noise = cv2.GaussianBlur(rng.rand(*size_hw, 3), (0, 0), sigmaX=1.5)
    span = noise.max() - noise.min()
    image = (40 + 175 * (noise - noise.min()) / span).astype(np.uint8)
    results = dict(
        img=image.copy(),
        img_shape=image.shape[:2],
        ori_shape=image.shape[:2],
        img_path=None,
        img_id=0,
    )
    try:
        after = np.asarray(step(results)["img"])
    except Exception:
        return True
    if after.shape[:2] != image.shape[:2]:
        return True
    edges = [_edges(picture) for picture in (image, after)]
    if edges[1].std() == 0:
        return True
    return bool(np.corrcoef(edges[0].ravel(), edges[1].ravel())[0, 1] < 0.7)


def _edges(image: np.ndarray) -> np.ndarray:
    grey = image.reshape(*image.shape[:2], -1).astype(np.float64)
    vertical, horizontal = np.gradient(grey, axis=(0, 1))
    return np.hypot(vertical, horizontal).sum(axis=-1)


def _is_geometric(step: Any) -> bool:
    name = _name(step)
    if isinstance(step, AlignedResize) or name in _RESIZING_STEPS | _FRAMING_STEPS:
        return True
    if name in _PHOTOMETRIC_STEPS or not moves_pixels(step):
        return False
    raise UnsupportedPipelineError(
        f"the test pipeline has a step {name!r} that may move pixels in a way this "
        "package does not know; use alignment='network' (the picture is the "
        "network's own input), or alignment='letterbox' if the step packs a right "
        "'scale_factor' and 'pad_param'"
    )


def _name(step: Any) -> str:
    return type(step).__name__


def flatten_steps(pipeline: Any) -> list[Any]:
    """Transforms of a pipeline in a row; of an augmented one those of the first view.

    Args:
        pipeline: ``Compose``, list, ``TestTimeAug`` or a transform.
    """
    if hasattr(pipeline, "subroutines"):  # TestTimeAug
        return flatten_steps(pipeline.subroutines[0])
    if isinstance(pipeline, (list, tuple)):
        return [step for part in pipeline for step in flatten_steps(part)]
    if _name(pipeline) == "Compose":
        return flatten_steps(list(pipeline.transforms))
    return [pipeline]


def _planned_size(
    step: Any, size: tuple[float, float]
) -> tuple[tuple[float, float], bool]:
    """Size after one step, and whether it keeps the image's proportions."""
    height, width = size
    name = _name(step)
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


def prepare_data(dataset: Any, index: int, pipeline: Callable) -> dict[str, Any]:
    """Load one image of a dataset through another pipeline.

    The dataset itself is not changed, and its workers see nothing of it.

    Args:
        dataset: A dataset below all wrappers.
        index (int): Index into it.
        pipeline (Callable): What to load the image through.

    Returns:
        dict: ``inputs`` and ``data_samples``.

    Raises:
        VisError: If the pipeline gives nothing for the image.
    """
    # Not copy.copy: BaseDataset's own copying leaves out the annotations.
    view = object.__new__(type(dataset))
    view.__dict__.update(vars(dataset))
    view.pipeline = pipeline
    data = view.prepare_data(index)
    if data is None:
        raise VisError(f"the test pipeline gave nothing for image index {index}")
    return data
