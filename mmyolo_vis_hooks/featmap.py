"""Reduces the feature map of a layer to the few maps that are drawn.

MMEngine's ``Visualizer.draw_featmap`` upsamples all channels to the image's size and
reduces them there. Both steps are linear: here the channels are reduced on the layer's
own grid, and only what is left is upsampled, by :meth:`FrameTransform.resample`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .errors import FeatureShapeError, VisConfigError
from .geometry import FrameTransform

CHANNEL_REDUCTIONS = ("squeeze_mean", "select_max")


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
        broken = f" ({self.num_non_finite} NaN or inf)" if self.num_non_finite else ""
        if np.isnan(self.low):
            return f"no finite value{broken}"
        if self.low == self.high:
            return f"constant {self.low:.3g}{broken}"
        return f"values {self.low:.3g} to {self.high:.3g}{broken}"


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
    """

    maps: torch.Tensor
    channels: tuple[int, ...]
    value_ranges: tuple[ValueRange, ...]
    is_image: bool

    @property
    def value_range(self) -> ValueRange:
        """Range over all tiles."""
        finite = [r for r in self.value_ranges if not np.isnan(r.low)]
        return ValueRange(
            min((r.low for r in finite), default=np.nan),
            max((r.high for r in finite), default=np.nan),
            sum(r.num_non_finite for r in self.value_ranges),
        )

    def resampled_tiles(self, frame: FrameTransform) -> list[np.ndarray]:
        """Upsample to the image's frame at the resolution of the drawing.

        Returns:
            list[np.ndarray]: Per tile ``(H, W)``, or ``(3, H, W)`` for a picture
            of three channels.
        """
        images = frame.resample(self.maps).numpy()
        tiles = [images] if self.is_image and len(images) > 1 else list(images)
        for tile, value_range in zip(tiles, self.value_ranges):
            # Interpolation leaves rounding errors in a constant map, and the
            # stretch to 0..255 would make a full-contrast pattern of them.
            if not value_range.low < value_range.high:
                tile[:] = 0.0
        return tiles


@torch.no_grad()
def reduce_feature_map(
    feature_map: torch.Tensor,
    frame: FrameTransform,
    channel_reduction: str | None = "select_max",
    topk: int = 4,
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
            modified, and nothing larger than what is left is copied from its device.
        frame (FrameTransform): The image at the resolution for which channels
            are chosen, within the network's input.
        channel_reduction (str, optional): As the option of this name.
        topk (int): As the option of this name; at most C channels are taken.

    Raises:
        VisConfigError: If ``topk`` is -1 and the map has neither 1 nor 3 channels.
        FeatureShapeError: If the map is not a non-empty real ``(C, h, w)``.

    Examples:
        >>> feature_map = torch.zeros(8, 20, 20)
        >>> feature_map[5, 10, 10] = 1
        >>> frame = FrameTransform.stretch((480, 640), (20, 20))
        >>> reduce_feature_map(feature_map, frame).channels
        (5,)
    """
    if feature_map.ndim != 3 or not feature_map.numel() or feature_map.is_complex():
        raise FeatureShapeError(
            f"feature_map is {feature_map.dtype} of the shape "
            f"{tuple(feature_map.shape)}; only a non-empty, real (C, h, w) can be drawn"
        )
    num_channels, *map_hw = feature_map.shape
    samplings = frame.axis_samplings(tuple(map_hw))
    rows, columns = (s.cell_weights(n) for s, n in zip(samplings, map_hw))
    wide = torch.float64 if feature_map.dtype == torch.float64 else torch.float32
    is_image = channel_reduction is None and topk <= 0
    channels: tuple[int, ...] = ()
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
        maps = feature_map.mean(dim=0, keepdim=True, dtype=wide)
    else:
        count = 1 if channel_reduction == "select_max" else min(topk, num_channels)
        scores = _channel_scores(feature_map, rows, columns, wide)
        # The order of ties in torch.topk depends on the device: MMEngine's is
        # the CPU's.
        indices = torch.topk(scores.float().cpu(), count).indices
        channels = tuple(indices.tolist())
        maps = feature_map[indices.to(feature_map.device)]
    values = maps.detach().to("cpu", wide).numpy().copy()
    ranges = []
    for tile in [values] if is_image else list(values):
        on_image = tile[..., samplings[0].cells, samplings[1].cells]
        finite = on_image[np.isfinite(on_image)]
        low = float(finite.min()) if finite.size else np.nan
        high = float(finite.max()) if finite.size else np.nan
        ranges.append(ValueRange(low, high, int(on_image.size - finite.size)))
        tile[~np.isfinite(tile)] = low if finite.size else 0.0
    return ReducedMaps(torch.from_numpy(values), channels, tuple(ranges), is_image)


def _channel_scores(
    feature_map: torch.Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sum of each channel's pixels after upsampling, ``(C,)``."""
    device = feature_map.device
    # 0 * inf is NaN: a cell without weight must be left out, not weighed.
    for dim, axis in ((1, rows), (2, columns)):
        if not axis.all():
            index = torch.from_numpy(np.flatnonzero(axis)).to(device)
            feature_map = feature_map.index_select(dim, index)
    weights = torch.from_numpy(np.outer(rows[rows > 0], columns[columns > 0]))
    # No matrix product: autocast and TF32 would round that to half precision.
    products = feature_map.to(dtype) * weights.to(device, dtype)
    # Apple's GPUs have no float64.
    return products.sum(
        dim=(1, 2), dtype=dtype if device.type == "mps" else torch.float64
    )
