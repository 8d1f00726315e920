"""How well a map points at an object, and how alike two rankings are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import spearmanr

from ..errors import FeatureShapeError, VisError
from ..geometry import box_cells
from .metric import Subject, Values, register_metric


def pointing_hit(saliency: np.ndarray, region: np.ndarray) -> bool:
    """Whether the peak of a map lies in a region: the pointing game.

    Source: Zhang et al. 2018, "Top-down neural attention by excitation backprop".
    Departures: no margin of 15 pixels around the region, which would decide by itself
    for small objects. Where several pixels share the largest value, the one of them
    counts that is nearest to their common centre. A map that is the same everywhere
    has no peak and is a miss.

    Args:
        saliency (np.ndarray): ``(H, W)``, finite and not negative, in the frame of
            the region; a ``VisError`` otherwise.
        region (np.ndarray): ``(H, W)`` bool, or a box ``(4,)`` xyxy in pixels, which
            holds the pixels whose centres lie in it; a ``FeatureShapeError`` otherwise.
    """
    inside = _inside(saliency, region)
    if saliency.min() == saliency.max():
        return False
    peaks = np.argwhere(saliency == saliency.max())
    distances = np.square(peaks - peaks.mean(axis=0)).sum(axis=1)
    row, column = peaks[distances.argmin()]
    return bool(inside[row, column])


def energy_inside(saliency: np.ndarray, region: np.ndarray) -> float:
    """Share of a map that lies in a region: the energy-based pointing game.

    Source: Wang et al. 2020, "Score-CAM". It is 0 for a blank map. The map must not be
    normalised by subtracting its minimum.

    Args:
        saliency, region (np.ndarray): As for :func:`pointing_hit`.
    """
    inside = _inside(saliency, region)
    total = saliency.sum(dtype=np.float64)
    return float(saliency[inside].sum(dtype=np.float64) / total) if total else 0.0


@register_metric(
    "pointing", summary="whether the peak of the map lies in the object's box and mask"
)
def pointing(saliency: np.ndarray, subject: Subject) -> Values:
    return _in_regions("pointing", pointing_hit, saliency, subject)


@register_metric("energy", summary="share of the map in the object's box and mask")
def energy(saliency: np.ndarray, subject: Subject) -> Values:
    return _in_regions("energy", energy_inside, saliency, subject)


@register_metric(
    "sparsity", summary="Gini index of the map: 0 is even, 1 a single pixel"
)
def sparsity(saliency: np.ndarray, subject: Subject) -> Values:
    """Chalasani et al. 2020, "Concise explanations of neural networks"."""
    values = np.sort(saliency.clip(min=0), axis=None).astype(np.float64)
    total = values.sum()
    if not total:
        return {"sparsity": 0.0}
    ranks = np.arange(1, values.size + 1)
    weights = (values.size - ranks + 0.5) / values.size
    return {"sparsity": float(1 - 2 * (values / total * weights).sum())}


def _in_regions(
    name: str, measure: Callable, saliency: np.ndarray, subject: Subject
) -> Values:
    """Of the object where it is known, else of the box that was found."""
    box = subject.box_xyxy if subject.truth_xyxy is None else subject.truth_xyxy
    rectified = saliency.clip(min=0)
    values = {f"{name}_box": float(measure(rectified, box))}
    if subject.mask is not None:
        values[f"{name}_mask"] = float(measure(rectified, subject.mask))
    return values


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing the mean of their ranks.

    It is NaN if all values of one of them are equal, which ranks nothing.

    Args:
        a (np.ndarray): Any shape, at least two values, all finite.
        b (np.ndarray): As many values as ``a``, in the same order.
    """
    a, b = np.ravel(a), np.ravel(b)
    if a.size != b.size or a.size < 2:
        raise FeatureShapeError(
            f"{a.size} and {b.size} values cannot be compared by rank; pass as many "
            "of one as of the other, at least two"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise VisError("NaN and infinite values have no rank; leave them out")
    if a.min() == a.max() or b.min() == b.max():
        return float("nan")
    return float(spearmanr(a, b)[0])


def _inside(saliency: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The pixels of a region, ``(H, W)`` bool."""
    if saliency.ndim != 2 or saliency.size == 0:
        raise FeatureShapeError(
            f"saliency has the shape {saliency.shape}; pass a non-empty (H, W)"
        )
    if not np.isfinite(saliency).all() or saliency.min() < 0:
        raise VisError(
            "saliency has NaN, infinite or negative values; rectify the map first"
        )
    region = np.asarray(region)
    if region.shape == saliency.shape and region.dtype == bool:
        return region
    if region.shape != (4,) or region.dtype == bool:
        raise FeatureShapeError(
            f"region has the shape {region.shape} and is {region.dtype}; pass a bool "
            f"mask {saliency.shape} or a box (x1, y1, x2, y2)"
        )
    return box_region(region, saliency.shape)


def box_region(box_xyxy: np.ndarray, size_hw: Sequence[int]) -> np.ndarray:
    """The pixels whose centres lie in a box, ``(H, W)`` bool."""
    return box_cells(box_xyxy, size_hw, 1) == 0
