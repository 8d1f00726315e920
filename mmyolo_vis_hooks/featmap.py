"""Reduces the feature map of a layer to the few maps that are drawn.

MMEngine's ``Visualizer.draw_featmap`` upsamples all channels to the image's size
and reduces them there. Both steps are linear, so the order can be turned round:
here the channels are reduced on the layer's own grid, and only what is left is
upsampled, by :meth:`FrameTransform.resample`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .errors import FeatureShapeError, VisConfigError
from .geometry import FrameTransform

CHANNEL_REDUCTIONS = ("squeeze_mean", "select_max")

# Weighing the channels needs a temporary of their size in float32.
_MAX_CELLS_AT_ONCE = 2**20


@dataclass(frozen=True)
class ValueRange:
    """The values of a map in the cells that lie on the image.

    Attributes:
        low: Smallest finite value; NaN if there is none.
        high: Largest finite value; NaN if there is none.
        num_non_finite: How many values are NaN or infinite.
    """

    low: float
    high: float
    num_non_finite: int = 0

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"no finite value ({self.num_non_finite} NaN or inf)"
        if self.low == self.high:
            text = f"constant {self.low:.3g}"
        else:
            text = f"values {self.low:.3g} to {self.high:.3g}"
        if self.num_non_finite:
            text += f" ({self.num_non_finite} NaN or inf)"
        return text

    @classmethod
    def union(cls, ranges: Sequence[ValueRange]) -> ValueRange:
        """The range that spans all the given ones."""
        finite = [r for r in ranges if not np.isnan(r.low)]
        return cls(
            min((r.low for r in finite), default=float("nan")),
            max((r.high for r in finite), default=float("nan")),
            sum(r.num_non_finite for r in ranges),
        )


@dataclass(frozen=True)
class ReducedMaps:
    """What is left of a feature map once its channels are reduced.

    Attributes:
        maps: ``(K, h, w)`` float32 or float64 on the CPU, all finite: NaN and
            infinities are replaced by the smallest finite value.
        channels: Index of each map in the layer's output, the most active one
            first; empty for the mean of all channels.
        value_ranges: Range of each tile before the replacement.
        is_image: The maps are the channels of one picture and make one tile;
            otherwise each map is a tile.
        num_channels: C of the layer's output.
    """

    maps: torch.Tensor
    channels: tuple[int, ...]
    value_ranges: tuple[ValueRange, ...]
    is_image: bool
    num_channels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of the layer's output."""
        return (self.num_channels, self.maps.shape[1], self.maps.shape[2])

    @property
    def value_range(self) -> ValueRange:
        """Range over all tiles."""
        return ValueRange.union(self.value_ranges)

    def resampled_tiles(self, frame: FrameTransform) -> list[np.ndarray]:
        """Upsample what is drawn.

        Args:
            frame (FrameTransform): The image at the resolution of the drawing.

        Returns:
            list[np.ndarray]: Per tile ``(H, W)``, or ``(3, H, W)`` for a picture
            of three channels.
        """
        images = frame.resample(self.maps).numpy()
        tiles = [images] if self.is_image else list(images)
        for tile, value_range in zip(tiles, self.value_ranges):
            # Interpolation leaves rounding errors in a constant map, and the
            # stretch to 0..255 would make a full-contrast pattern of them.
            if not value_range.low < value_range.high:
                tile[:] = 0.0
        return [
            tile[0] if tile.shape[0] == 1 and tile.ndim == 3 else tile for tile in tiles
        ]


def validate_reduction_options(
    channel_reduction: Any, topk: Any, arrangement: Any
) -> None:
    """Check option values that need no feature map to be judged.

    Args:
        channel_reduction (str, optional): ``'squeeze_mean'``, ``'select_max'``
            or None.
        topk (int): Number of channels to show; -1 means that the map is a
            picture of 1 or 3 channels.
        arrangement (Sequence[int]): Rows and columns of the ``topk`` tiles.

    Raises:
        VisConfigError: If a value can never work.
    """
    if channel_reduction is not None and channel_reduction not in CHANNEL_REDUCTIONS:
        raise VisConfigError(
            f"channel_reduction={channel_reduction!r} is unknown; "
            + _reduction_hint(channel_reduction)
        )
    if (
        isinstance(topk, bool)
        or not isinstance(topk, Integral)
        or (topk < 1 and topk != -1)
    ):
        raise VisConfigError(
            f"topk={topk!r} cannot work; set the number of channels to show, or -1 "
            "to draw a map of 1 or 3 channels as a picture"
        )
    if (
        isinstance(arrangement, str)
        or not isinstance(arrangement, Sequence)
        or len(arrangement) != 2
        or not all(
            isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0
            for n in arrangement
        )
    ):
        raise VisConfigError(
            f"arrangement={arrangement!r} is not a pair of positive integers; set "
            "(rows, columns) such as (2, 2)"
        )
    rows, columns = arrangement
    if channel_reduction is None and topk > rows * columns:
        raise VisConfigError(
            f"topk={topk} tiles do not fit arrangement={tuple(arrangement)}, which "
            f"has {rows * columns} places; set a larger arrangement such as "
            f"({rows}, {-(-topk // rows)}), or topk={rows * columns}"
        )


def _reduction_hint(value: Any) -> str:
    text = str(value).lower()
    if text in ("none", "null", ""):
        return "write None without quotation marks"
    near = difflib.get_close_matches(text, CHANNEL_REDUCTIONS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return hint + "Choose 'squeeze_mean', 'select_max' or None (shows topk channels)"


@torch.no_grad()
def reduce_feature_map(
    feature_map: torch.Tensor,
    frame: FrameTransform,
    *,
    channel_reduction: str | None = "select_max",
    topk: int = 4,
    arrangement: Sequence[int] = (2, 2),
) -> ReducedMaps:
    """Reduce the channels of a feature map on its own grid.

    The chosen channels are those that ``draw_featmap`` chooses after upsampling
    to the image. There a channel is scored by the sum of its pixels, which is
    ``w_h^T f w_w`` with the column sums of the two interpolation matrices; a cell
    that lies in the padding has the weight zero. Two departures: half precision
    is summed in single precision, and cells off the image do not count.

    As in ``torch.topk``, a channel whose sum is NaN or +inf is ranked first, so a
    broken channel is seen.

    Args:
        feature_map (Tensor): ``(C, h, w)``, any real dtype and device. It is not
            modified.
        frame (FrameTransform): The image at the resolution for which channels
            are chosen, within the network's input.
        channel_reduction (str, optional): ``'squeeze_mean'`` averages the
            channels, ``'select_max'`` takes the most active one, None takes
            ``topk`` channels. Defaults to ``'select_max'``.
        topk (int): Number of channels, at most C are taken; zero or less takes a
            map of 1 or 3 channels as a picture. Only used without
            ``channel_reduction``. Defaults to 4.
        arrangement (Sequence[int]): Rows and columns of the tiles, checked
            against ``topk``. Defaults to (2, 2).

    Returns:
        ReducedMaps: Maps on the CPU; nothing larger is copied from the device.

    Raises:
        VisConfigError: If an option is wrong, or ``topk`` is not positive and the
            map has neither 1 nor 3 channels.
        FeatureShapeError: If the map is not a non-empty real ``(C, h, w)``.

    Examples:
        >>> feature_map = torch.zeros(8, 20, 20)
        >>> feature_map[5, 10, 10] = 1
        >>> frame = FrameTransform.stretch((480, 640), (20, 20))
        >>> reduce_feature_map(feature_map, frame).channels
        (5,)
    """
    validate_reduction_options(channel_reduction, topk, arrangement)
    feature_map = _checked(feature_map)
    num_channels = feature_map.shape[0]
    rows, columns = (
        axis.cell_weights(size)
        for axis, size in zip(
            frame.axis_samplings((feature_map.shape[1], feature_map.shape[2])),
            feature_map.shape[1:],
        )
    )
    is_image = channel_reduction is None and topk <= 0
    channels: tuple[int, ...]
    if is_image:
        if num_channels not in (1, 3):
            raise VisConfigError(
                f"topk={topk} draws a map as a picture, which needs 1 or 3 channels, "
                f"but this one has {num_channels}; set channel_reduction to "
                "'squeeze_mean' or 'select_max', or topk to the number of channels "
                "to show"
            )
        channels = tuple(range(num_channels))
        maps = feature_map
    elif channel_reduction == "squeeze_mean":
        channels = ()
        maps = feature_map.mean(dim=0, keepdim=True, dtype=_float(feature_map.dtype))
    else:
        count = 1 if channel_reduction == "select_max" else min(topk, num_channels)
        scores = _channel_scores(feature_map, rows, columns)
        # The order of ties in torch.topk depends on the device: MMEngine's is
        # the CPU's.
        indices = torch.topk(scores.float().cpu(), count).indices
        channels = tuple(indices.tolist())
        maps = feature_map[indices.to(feature_map.device)]
    maps = maps.to("cpu", _float(maps.dtype))
    return _finite(maps, rows > 0, columns > 0, channels, is_image, num_channels)


def _checked(feature_map: torch.Tensor) -> torch.Tensor:
    if not isinstance(feature_map, torch.Tensor):
        raise FeatureShapeError(
            f"feature_map is a {type(feature_map).__name__}; pass a tensor (C, h, w)"
        )
    if feature_map.ndim != 3 or feature_map.numel() == 0:
        raise FeatureShapeError(
            f"feature_map has the shape {tuple(feature_map.shape)}; only a non-empty "
            "(C, h, w) can be drawn"
        )
    if feature_map.is_complex():
        raise FeatureShapeError(
            f"feature_map is {feature_map.dtype}; only real values can be drawn"
        )
    return feature_map.detach()


def _float(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _channel_scores(
    feature_map: torch.Tensor, rows: np.ndarray, columns: np.ndarray
) -> torch.Tensor:
    """Sum of each channel's pixels after upsampling, ``(C,)``.

    Products and sums instead of a matrix product: autocast and TF32 would round
    that to half precision.
    """
    device, dtype = feature_map.device, _float(feature_map.dtype)
    # 0 * inf is NaN: a cell without weight must be left out, not weighed.
    for dim, weights in ((1, rows), (2, columns)):
        if not weights.all():
            index = torch.from_numpy(np.flatnonzero(weights)).to(device)
            feature_map = feature_map.index_select(dim, index)
    cell_weights = torch.from_numpy(np.outer(rows[rows > 0], columns[columns > 0]))
    cell_weights = cell_weights.to(device, dtype)
    step = max(1, _MAX_CELLS_AT_ONCE // cell_weights.numel())
    return torch.cat(
        [
            _weighted_sums(chunk.to(dtype), cell_weights)
            for chunk in feature_map.split(step)
        ]
    )


def _weighted_sums(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if maps.device.type == "cpu":
        # NumPy needs no second thread for this; torch would wait for its threads,
        # ten times longer than for the sums where data loaders keep cores busy.
        products = maps.numpy() * weights.numpy()
        return torch.from_numpy(products.sum(axis=(1, 2), dtype=np.float64))
    # Apple's GPUs have no float64.
    wide = torch.float32 if maps.device.type == "mps" else torch.float64
    return (maps * weights).sum(dim=(1, 2), dtype=wide)


def _finite(
    maps: torch.Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    channels: tuple[int, ...],
    is_image: bool,
    num_channels: int,
) -> ReducedMaps:
    """Measure the cells on the image and replace what is not finite."""
    values = maps.numpy().copy()
    ranges = []
    for tile in [values] if is_image else list(values):
        on_image = tile[..., rows, :][..., columns]
        finite = on_image[np.isfinite(on_image)]
        low = float(finite.min()) if finite.size else float("nan")
        high = float(finite.max()) if finite.size else float("nan")
        ranges.append(ValueRange(low, high, int(on_image.size - finite.size)))
        tile[~np.isfinite(tile)] = low if finite.size else 0.0
    return ReducedMaps(
        torch.from_numpy(values), channels, tuple(ranges), is_image, num_channels
    )
