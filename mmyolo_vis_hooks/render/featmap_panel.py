"""From the feature maps of one image to a finished picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..featmap import ReducedMaps, reduce_feature_map
from ..geometry import FrameTransform
from ..records import Activation, OverlayMap, VisSample
from .colorbar import ColorScale
from .heatmap import heat_levels, overlay_heatmap
from .montage import (
    MIN_CELL_SIZE,
    Cell,
    cell_size_hw,
    grid_columns,
    gutter_of,
    montage,
    resize_image,
    tile_block,
)
from .panel import MAX_OVERLAY_SIZE, NO_BREAK, Panel, cells_text

if TYPE_CHECKING:
    from ..options import FeatMapOptions

_TILE_GAP = 4
# More maps than these are half as large as the image with its boxes, which then is not
# smaller than this. A cell of a map has several pixels all the same.
_FEW_MAPS = 3
_MIN_PICTURE_SIZE = 768


@dataclass(frozen=True)
class FeatMapPanel(Panel):
    """Draws the image with its boxes and each layer's feature map in one panel.

    Each map is drawn at the resolution of its cell; the channels are those that
    MMEngine's ``draw_featmap`` chooses at the resolution of the image. Sizes are
    width by height, of images in pixels and of maps in cells. The colour bar of a row
    has the range of its map, or none where several maps have one each.
    """

    options: FeatMapOptions

    def __call__(self, sample: VisSample) -> np.ndarray:
        """Draw one image; nothing of the sample is modified.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB: first the image with its boxes,
            then one cell per activation, by rows.

        Raises:
            VisConfigError: If ``topk`` is -1 and a layer has neither 1 nor 3
                channels, or the picture would be too large to be opened.
            FeatureShapeError: If an activation is not ``(C, h, w)``.
        """
        count = len(sample.activations)
        picture_hw, map_hw = self._sizes(sample.image_rgb.shape[:2], count)
        picture_rgb = resize_image(sample.image_rgb, picture_hw)
        background = resize_image(sample.image_rgb, map_hw)
        frame = sample.frame.resized(map_hw)
        first, cells = self.overview(sample, picture_rgb), []
        for activation in sample.activations:
            reduced = self._reduced(activation, sample)
            picture = _overlay(reduced, background, frame, self.options)
            note = self._note(activation, reduced)
            cells.append(Cell(picture, activation.title, note, self._scale(reduced)))
        if picture_hw == map_hw or _has_tiles(self.options):
            return montage([first, *cells])
        columns = math.ceil(count / 2) if count <= 8 else grid_columns(count, map_hw)
        gutter = gutter_of(picture_hw)
        left = montage([first], gutter=gutter)
        right = montage(cells, columns, gutter=gutter)[:, gutter:]
        (height, width), (right_h, right_w) = left.shape[:2], right.shape[:2]
        size = max(height, right_h), width + right_w, 3
        panel = np.full(size, 255, dtype=np.uint8)
        panel[:height, :width] = left
        panel[:right_h, width:] = right
        return panel

    def overlay_maps(
        self, sample: VisSample, max_size: int = MAX_OVERLAY_SIZE
    ) -> tuple[OverlayMap, ...]:
        """The maps of the panel by themselves, one per activation and shown channel.

        Raises:
            VisConfigError, FeatureShapeError: As for a panel.
        """
        size_hw = cell_size_hw(sample.image_rgb.shape[:2], max_size)
        frame = sample.frame.resized(size_hw)
        maps = []
        for activation in sample.activations:
            reduced = self._reduced(activation, sample)
            note = self._note(activation, reduced)
            for number, tile in enumerate(reduced.resampled_tiles(frame)):
                title = activation.title
                if _has_tiles(self.options):
                    title += f" · channel {reduced.channels[number]}"
                maps.append(OverlayMap(title, note, heat_levels(tile)))
        return tuple(maps)

    def _sizes(
        self, image_hw: tuple[int, int], num_maps: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes of the first picture and of a heat map."""
        if not _has_tiles(self.options):
            least = MIN_CELL_SIZE if num_maps <= _FEW_MAPS else _MIN_PICTURE_SIZE
            picture_hw = cell_size_hw(image_hw, self.max_cell_size, least)
            if num_maps <= _FEW_MAPS:
                return picture_hw, picture_hw
            return picture_hw, cell_size_hw(image_hw, max(picture_hw) // 2)
        rows, columns = self.options.arrangement
        most = max(rows, columns)
        room = (self.max_cell_size - (most - 1) * _TILE_GAP) // most
        room = min(self.max_cell_size, max(MIN_CELL_SIZE, room))
        tile_hw = cell_size_hw(image_hw, room)
        # As large as fits beside a block of tiles.
        block_hw = (rows * tile_hw[0], columns * tile_hw[1])
        scale = min(block / size for block, size in zip(block_hw, image_hw))
        longest = round(scale * max(image_hw))
        return cell_size_hw(image_hw, self.max_cell_size, longest), tile_hw

    def _reduced(self, activation: Activation, sample: VisSample) -> ReducedMaps:
        wanted = self.options.channel_reduction, self.options.topk
        try:
            return reduce_feature_map(activation.feature_map, sample.frame, *wanted)
        except ValueError as error:
            # Both errors of the reduction derive from ValueError; only the layer's
            # name is missing in them.
            raise type(error)(f"layer {activation.title!r}: {error}") from error

    def _note(self, activation: Activation, reduced: ReducedMaps) -> str:
        if _has_tiles(self.options):
            shown = f"top {len(reduced.channels)} channels"
        elif self.options.channel_reduction == "select_max":
            shown = f"channel {reduced.channels[0]}"
        elif self.options.channel_reduction == "squeeze_mean":
            shown = "mean of channels"
        else:
            shown = "as a picture"
        count, *map_hw = activation.feature_map.shape
        size = f"{count} channel{'' if count == 1 else 's'} of {cells_text(map_hw)}"
        values = str(reduced.value_range).replace(" ", NO_BREAK)
        return f"{size} · {shown} · {values}"

    def _scale(self, reduced: ReducedMaps) -> ColorScale | None:
        varied = [r for r in reduced.value_ranges if r.low < r.high]
        if not varied:
            return None
        if len(reduced.maps) > 1:
            return ColorScale(self.options.colormap, None, None)
        return ColorScale(self.options.colormap, varied[0].low, varied[0].high)


def overlay_feature_map(
    feature_map: torch.Tensor,
    image_rgb: np.ndarray,
    options: FeatMapOptions,
    frame: FrameTransform | None = None,
) -> np.ndarray:
    """Lay a feature map over an image at the image's full resolution.

    Gives the picture of MMEngine's ``Visualizer.draw_featmap`` in a fraction of
    its time and memory: the channels are reduced first and upsampled afterwards.
    ``'select_max'`` and each tile of ``topk`` are identical; ``'squeeze_mean'``
    differs in a few pixels by a level of the colour map, which is at most 2 grey
    levels for JET and an ``alpha`` of 0.5. Departures: tiles are labelled with another
    font; a constant map is drawn in the first colour instead of showing its
    rounding errors; half precision, NaN and infinities can be drawn.

    Args:
        feature_map (Tensor): ``(C, h, w)``, any real dtype and device.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        options (FeatMapOptions): What is drawn and how.
        frame (FrameTransform, optional): How the image lies in the network's
            input. None: the map covers the image exactly.

    Returns:
        np.ndarray: As the image; with tiles ``(rows * H, columns * W, 3)``.
    """
    if frame is None:
        height, width = feature_map.shape[1:]
        frame = FrameTransform.stretch(image_rgb.shape[:2], (height, width))
    wanted = options.channel_reduction, options.topk
    reduced = reduce_feature_map(feature_map, frame, *wanted)
    return _overlay(reduced, image_rgb, frame, options, gap=0)


def _has_tiles(options: FeatMapOptions) -> bool:
    return options.channel_reduction is None and options.topk > 0


def _overlay(
    reduced: ReducedMaps,
    image_rgb: np.ndarray,
    frame: FrameTransform,
    options: FeatMapOptions,
    gap: int = _TILE_GAP,
) -> np.ndarray:
    """The only map on the image, or a block of tiles."""
    look: dict[str, Any] = dict(alpha=options.alpha, colormap=options.colormap)
    # The order of mean and upsampling changes the last bits of a mean; a channel
    # comes out the same.
    look["soft_steps"] = not reduced.channels
    tiles = [
        overlay_heatmap(tile, image_rgb, **look)
        for tile in reduced.resampled_tiles(frame)
    ]
    if not _has_tiles(options):
        return tiles[0]
    labels = [f"channel: {channel}" for channel in reduced.channels]
    return tile_block(tiles, labels, options.arrangement, gap)
