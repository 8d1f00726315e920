"""From the saliency maps of a box on the layers' grids to one map on the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from ..declare import one_of
from ..geometry import AxisSampling, FrameTransform
from ..records import BoxExplanation

FUSIONS = ("max", "mean", "sum", "product")
"""How the maps of several layers become one, element by element."""

# OpenCV's own cut-off for floating-point images: the kernel ends at 4 sigma.
_TRUNCATE = 4
# With the reflection at the edges, a wider Gaussian leaves a constant in any case
# (exp(-2 pi^2) of the longest wave is left), and its kernel only costs time.
_MAX_SIGMA_IN_SIZES = 2


def render_saliency(
    saliency: np.ndarray, frame: FrameTransform, *, sigma_px: float = 0.0
) -> np.ndarray:
    """Interpolate a map at the centres of the image's pixels and smooth it there.

    As ``cv2.GaussianBlur`` after :meth:`FrameTransform.resample`. Both are linear and
    work on each axis for itself, so only the two interpolation matrices are blurred.

    Args:
        saliency (np.ndarray): ``(h, w)``, any real dtype, cells over the network
            frame.
        frame (FrameTransform): The image at the resolution of the drawing.
        sigma_px (float): Standard deviation of the Gaussian, pixels of the image;
            0 smooths nothing. The image is continued by reflection. Defaults to 0.

    Returns:
        np.ndarray: ``(H, W)`` float32, over the image frame.
    """
    height, width = saliency.shape
    rows, columns = frame.axis_samplings((height, width))
    row_matrix = _blurred_interpolation(rows, height, sigma_px)
    column_matrix = _blurred_interpolation(columns, width, sigma_px)
    return row_matrix @ saliency.astype(np.float32) @ column_matrix.T


def _blurred_interpolation(
    sampling: AxisSampling, num_cells: int, sigma_px: float
) -> np.ndarray:
    """``(size, num_cells)`` float32: each cell's share of each blurred pixel."""
    size = len(sampling.lower)
    matrix = np.zeros((size, num_cells), dtype=np.float32)
    pixels = np.arange(size)
    matrix[pixels, sampling.lower] = 1.0 - sampling.upper_weight
    # At the edge both cells are the same one.
    matrix[pixels, sampling.upper] += sampling.upper_weight
    sigma = min(sigma_px, _MAX_SIGMA_IN_SIZES * size)
    if sigma <= 0:
        return matrix
    # The size that cv2.GaussianBlur takes by itself, for the one axis of pixels.
    kernel_size = int(np.rint(sigma * _TRUNCATE * 2 + 1)) | 1
    if kernel_size == 1:
        return matrix
    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(matrix, cv2.CV_32F, np.ones(1, np.float32), kernel)


def box_sigma(box_xyxy: np.ndarray, smooth: float) -> float:
    """Sigma in pixels of a smoothing in units of the box, the square root of its area.

    It is 0 for a box without area or with NaN.
    """
    x1, y1, x2, y2 = (float(v) for v in box_xyxy)
    area = (x2 - x1) * (y2 - y1)
    return smooth * float(np.sqrt(area)) if 0 < area < np.inf else 0.0


def fuse_saliency(
    maps: Sequence[np.ndarray], fusion: str, *, normalize: bool
) -> np.ndarray:
    """Make one map of several, element by element.

    Args:
        maps (Sequence[np.ndarray]): One or more of one shape, not negative.
        fusion (str): ``'max'``, ``'mean'``, ``'sum'`` or ``'product'``.
        normalize (bool): Divide each map by its maximum first; one that is zero
            everywhere stays as it is.

    Returns:
        np.ndarray: Same shape, float64: the product of gradients is easily below
        the smallest float32.
    """
    one_of("fusion", fusion, FUSIONS)
    stack = np.stack([np.asarray(values, dtype=np.float64) for values in maps])
    if normalize:
        stack = np.stack([normalize_saliency(values) for values in stack])
    return getattr(stack, "prod" if fusion == "product" else fusion)(axis=0)


def normalize_saliency(
    saliency: np.ndarray, *, box_xyxy: np.ndarray | None = None
) -> np.ndarray:
    """Divide a map by its maximum, a signed one by that of its sizes.

    The minimum is **not** subtracted: zero keeps its meaning, no influence, and a
    map that is the same everywhere becomes 1, not noise.

    Args:
        saliency (np.ndarray): ``(H, W)`` floating point.
        box_xyxy (np.ndarray, optional): ``(4,)``, pixels of the map. With it only
            the inside counts: it is divided by its own maximum, and everything
            outside becomes 0. A pixel is inside if its centre is.

    Returns:
        np.ndarray: Same shape and dtype, 0 to 1, or -1 to 1; zero where there is
        nothing to normalise, also for a box without area or outside the map.
    """
    result = np.zeros_like(saliency)
    part = (slice(None), slice(None))
    if box_xyxy is not None:
        part = _inside(box_xyxy, saliency.shape)
    values = saliency[part]
    peak = np.abs(values).max(initial=0)
    if peak > 0:
        np.divide(values, peak, out=result[part])
    return result


def _inside(box_xyxy: np.ndarray, map_hw: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns whose pixel centres lie in a box."""
    if not np.isfinite(box_xyxy).all():
        return slice(0, 0), slice(0, 0)
    height, width = map_hw
    begins = np.ceil(np.asarray(box_xyxy) - 0.5).clip(0, [width, height] * 2)
    left, top, right, bottom = begins.astype(int).tolist()
    return slice(top, bottom), slice(left, right)


def saliency_range(saliency: np.ndarray, frame: FrameTransform) -> tuple[float, float]:
    """Smallest and largest value of a map ``(h, w)`` in the cells on the image."""
    rows, columns = frame.axis_samplings(saliency.shape)
    on_image = saliency[rows.cells, columns.cells]
    return float(on_image.min()), float(on_image.max())


def box_saliency(
    explanation: BoxExplanation,
    frame: FrameTransform,
    box_xyxy: np.ndarray,
    *,
    norm_in_bbox: bool = False,
    **how: Any,
) -> np.ndarray:
    """The map of one box over the image: :func:`raw_saliency` divided by its maximum.

    A signed one is divided by the maximum of its sizes.

    Args:
        norm_in_bbox (bool): See ``box_xyxy`` of :func:`normalize_saliency`.
            Defaults to False.
        explanation, frame, box_xyxy, how: As of :func:`raw_saliency`.

    Returns:
        np.ndarray: ``(H, W)`` float32, 0 to 1, a signed one -1 to 1; all zero without
            any influence.
    """
    raw = raw_saliency(explanation, frame, box_xyxy, **how)
    normalized = normalize_saliency(raw, box_xyxy=box_xyxy if norm_in_bbox else None)
    return normalized.astype(np.float32, copy=False)


def raw_saliency(
    explanation: BoxExplanation,
    frame: FrameTransform,
    box_xyxy: np.ndarray,
    *,
    smooth: float | None = None,
    fusion: str = "sum",
    normalize_layers: bool = False,
) -> np.ndarray:
    """The map of one box over the image, in the unit of its layers' maps.

    Each layer's map is interpolated and smoothed, and the layers are fused.

    Args:
        explanation (BoxExplanation): Of the box.
        frame (FrameTransform): The image at the resolution of the drawing.
        box_xyxy (np.ndarray): ``(4,)``, pixels of that image.
        smooth (float, optional): Sigma of the Gaussian, in units of the box. None
            takes the method's own, as the explanation says. Defaults to None.
        fusion (str): See :func:`fuse_saliency`. Defaults to ``'sum'``.
        normalize_layers (bool): Divide each layer's map by its maximum before the
            fusion. Defaults to False.

    Returns:
        np.ndarray: ``(H, W)`` floating point.
    """
    if not explanation.maps:
        return np.zeros(frame.image_hw, dtype=np.float32)
    sigma_px = box_sigma(box_xyxy, explanation.smooth if smooth is None else smooth)
    maps = [
        render_saliency(layer.saliency, frame, sigma_px=sigma_px)
        for layer in explanation.maps
    ]
    if len(maps) == 1:
        return maps[0]
    return fuse_saliency(maps, fusion, normalize=normalize_layers)
