"""Whether the detection lives on the pixels that a map marks.

*Insertion* shows the pixels of a neutral image one after the other, those that the map
ranks first before the others; *deletion* takes them away from the image in the same
order (Petsiuk et al. 2018, "RISE"). Each gives the area under the curve of the score,
as a share of the score on the whole image, over the share of the pixels; the first
should be large, the second small. Over the image most of what they measure is the order
of the surroundings, so the field's protocol has a sister here that leaves these as they
are and replaces pixels of the box alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import nn

from ..attribution.blackbox import final_scores
from ..attribution.evidence import baseline_of
from ..attribution.library import imputed
from ..geometry import FrameTransform
from ..network.graph import network_boxes
from .metric import Subject, Values, register_metric
from .pointing_game import box_region

_BLUR_SIGMA = 20.0  # pixels of the network's input
_FIELD_SIGMA = 5.0
_TWELFTHS, _QUADRATIC = np.linspace(0, 1, 13), np.linspace(0, 1, 17) ** 2

Score = Callable[[torch.Tensor], torch.Tensor]
"""From images ``(n, C, H, W)`` to the scores of K boxes on them, ``(n, K)``."""

SHARES = {
    "inside": _TWELFTHS,
    "inside_black": _TWELFTHS,
    "inside_road": _TWELFTHS,
    "image": _QUADRATIC,
    "image_black": _QUADRATIC,
    "vps": np.linspace(0, 1, 50),
}
"""How many of the pixels are replaced at each step of a curve, by metric."""


def subjects_of(
    detector: nn.Module,
    inputs: torch.Tensor,
    metainfo: Mapping[str, Any],
    predictions: InstanceData,
    chosen: Sequence[int],
    *,
    score: Score | None = None,
    batch_size: int = 8,
) -> list[Subject]:
    """The subjects of some detections of an image, without its objects.

    Args:
        detector (nn.Module): In eval mode; nothing else of it may change meanwhile.
        inputs (Tensor): ``(1, C, H, W)``, what the network saw.
        metainfo (Mapping): Of the image's data sample, with ``batch_input_shape``.
        predictions (InstanceData): Its detections, in the original frame.
        chosen (Sequence[int]): Which of them.
        score (Score, optional): What scores them. Defaults to None: the greatest
            product of IoU and score among the final detections of the class.
        batch_size (int): How many images run at once. Defaults to 8.
    """
    if not chosen:
        return []
    score = score or final_scores(detector, predictions, list(chosen), metainfo)
    image = _ChangedImage(detector, inputs, score, batch_size)
    frame = FrameTransform.from_metainfo(metainfo)
    boxes = network_boxes(predictions, frame)[list(chosen)]
    return [
        Subject(box, score=functools.partial(image.scores_of, number))
        for number, box in enumerate(boxes)
    ]


class _ChangedImage:
    """An image of which parts are replaced, and what its boxes score then."""

    def __init__(
        self,
        detector: nn.Module,
        inputs: torch.Tensor,
        score: Score,
        batch_size: int,
    ) -> None:
        self._preprocessor = getattr(detector, "data_preprocessor", None)
        self._inputs = inputs.detach()
        self._score = score
        self._batch_size = batch_size
        self._neutral: dict[str, torch.Tensor] = {}

    @functools.cached_property
    def _whole(self) -> torch.Tensor:
        with torch.no_grad():
            return self._score(self._inputs)[0].double()

    def scores_of(self, number: int, shown: np.ndarray, neutral: str) -> np.ndarray:
        found = []
        for start in range(0, len(shown), self._batch_size):
            part = shown[start : start + self._batch_size]
            with torch.no_grad():
                images = self._replaced(part, neutral)
                found.append(self._score(images)[:, number].double())
        return (torch.cat(found) / self._whole[number]).cpu().numpy()

    def _replaced(self, shown: np.ndarray, neutral: str) -> torch.Tensor:
        """Images of which some pixels ``(n, H, W)`` are shown."""
        if neutral == "road":
            return torch.stack([imputed(self._inputs[0], own) for own in shown])
        if neutral not in self._neutral:
            self._neutral[neutral] = self._without_content(neutral)
        keep = torch.from_numpy(shown[:, None]).to(self._inputs.device)
        return torch.where(keep, self._inputs, self._neutral[neutral])

    def _without_content(self, kind: str) -> torch.Tensor:
        if kind == "blur":
            return blurred(self._inputs)
        return baseline_of(kind, self._inputs, self._preprocessor)


def blurred(inputs: torch.Tensor) -> torch.Tensor:
    """``(1, C, H, W)`` smoothed by a Gaussian with a sigma of 20 pixels."""
    image = inputs[0].float().permute(1, 2, 0).cpu().numpy()
    smooth = cv2.GaussianBlur(image, (0, 0), _BLUR_SIGMA).reshape(image.shape)
    return torch.from_numpy(smooth).permute(2, 0, 1)[None].to(inputs)


def ranks_of(saliency: np.ndarray, box_xyxy: np.ndarray) -> np.ndarray:
    """In which order a map marks the pixels, ``(H, W)`` int64: 0 is the first.

    Pixels of one value are taken by their distance from the box, those in it in the
    order of a smooth random field, the same in every run: the order of the zeros of a
    map would decide most of a curve.
    """
    x1, y1, x2, y2 = box_xyxy
    ys, xs = (np.arange(size) + 0.5 for size in saliency.shape)
    off_y = np.maximum(np.maximum(y1 - ys, ys - y2), 0)
    off_x = np.maximum(np.maximum(x1 - xs, xs - x2), 0)
    distance = np.hypot(off_y[:, None], off_x[None])
    field = random_field(saliency.shape)
    order = np.lexsort((field.ravel(), distance.ravel(), -saliency.ravel()))
    ranks = np.empty(saliency.size, np.int64)
    ranks[order] = np.arange(saliency.size)
    return ranks.reshape(saliency.shape)


@functools.lru_cache(maxsize=8)
def random_field(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Smooth random numbers ``(H, W)`` float32, 0 to 1."""
    noise = np.random.default_rng(seed).random(size_hw, np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), _FIELD_SIGMA)
    return (field - field.min()) / max(float(np.ptp(field)), 1e-12)


def curves_of(
    ranks: np.ndarray,
    region: np.ndarray,
    shares: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores while a region is shown and hidden, two curves ``(n,)``.

    Args:
        ranks (np.ndarray): ``(H, W)``, as of :func:`ranks_of`.
        region (np.ndarray): ``(H, W)`` bool, the pixels that are replaced.
        shares (np.ndarray): ``(n,)`` from 0 to 1: how many of them, at each step.
        score (Callable): From shown pixels ``(m, H, W)`` bool to scores ``(m,)``, 1 for
            the whole image.
    """
    own = np.empty(int(region.sum()), np.int64)
    own[ranks[region].argsort()] = np.arange(len(own))
    counts = np.rint(shares * len(own)).astype(np.int64)
    shown = np.ones((2 * len(counts) - 3, *ranks.shape), bool)
    # Nothing shown is all deleted; nothing deleted is the image itself.
    shown[: len(counts) - 1, region] = own < counts[:-1, None]
    shown[len(counts) - 1 :, region] = own >= counts[1:-1, None]
    found = score(shown)
    inserted, left = found[: len(counts) - 1], found[len(counts) - 1 :]
    return np.append(inserted, 1.0), np.concatenate([[1.0], left, inserted[:1]])


def area_under(curve: np.ndarray, shares: np.ndarray) -> float:
    """The area under a curve over shares that grow from 0 to 1."""
    return float(((curve[1:] + curve[:-1]) / 2 * np.diff(shares)).sum())


def _measured(
    name: str, neutral: str, saliency: np.ndarray, subject: Subject, region: np.ndarray
) -> Values:
    ask, shares = subject.score, SHARES[name]
    if ask is None or region.sum() < len(shares):
        return {}
    ranks = ranks_of(saliency, subject.box_xyxy)
    inserted, deleted = curves_of(ranks, region, shares, lambda s: ask(s, neutral))
    if not np.isfinite([inserted, deleted]).all():  # asked anew, the image has no score
        return {}
    insertion, deletion = area_under(inserted, shares), area_under(deleted, shares)
    return {
        name: insertion - deletion,
        f"{name}_ins": insertion,
        f"{name}_del": deletion,
        f"{name}_ins_curve": inserted,
        f"{name}_del_curve": deleted,
    }


def _register(
    name: str, neutral: str, summary: str, region_of: Callable = box_region
) -> None:
    """Make a metric of what replaces pixels, and of the region that they are of."""

    def measure(saliency: np.ndarray, subject: Subject) -> Values:
        region = region_of(subject.box_xyxy, saliency.shape)
        return _measured(name, neutral, saliency, subject, region)

    register_metric(name, summary=summary, asks=True)(measure)


def _everywhere(box_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    return np.ones(size_hw, bool)


_register(
    "inside",
    "blur",
    "insertion minus deletion of the pixels of the box, whose surroundings stay, in 12 "
    "equal steps; the others are blurred",
)
_register("inside_black", "black", "the same with black pixels for the others")
_register(
    "inside_road",
    "road",
    "the same with the others filled in from their neighbours (ROAD), which takes long",
)
_register(
    "image",
    "blur",
    "insertion minus deletion over the whole image, in 16 steps that grow "
    "quadratically; the others are blurred",
    _everywhere,
)
_register(
    "image_black", "black", "the same with black pixels for the others", _everywhere
)
# Chen et al. 2025, "Interpreting Object-level Foundation Models via Visual Precision
# Search".
_register(
    "vps",
    "black",
    "insertion minus deletion over the whole image as VPS has it: 49 equal steps, "
    "black pixels",
    _everywhere,
)
