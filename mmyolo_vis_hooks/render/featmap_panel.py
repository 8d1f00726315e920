"""From the feature maps of one image to a finished picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from ..errors import VisConfigError
from ..featmap import (
    ReducedMaps,
    reduce_feature_map,
    validate_reduction_options,
)
from ..geometry import FrameTransform
from ..records import Activation, Detections, OverlayMap, VisSample
from .boxes import draw_detections
from .heatmap import (
    heat_levels,
    overlay_heatmap,
    validate_overlay_options,
)
from .montage import (
    MIN_CELL_SIZE,
    Cell,
    cell_size_hw,
    montage,
    resize_image,
    tile_block,
)

_TILE_GAP = 4
MAX_OVERLAY_SIZE = 480
"""Longest side, in pixels, of a map that a page lays over an image."""


class FeatMapPanel:
    """Draws the image with its boxes and each layer's feature map in one panel.

    Each map is drawn at the resolution of its cell; the channels are those that
    MMEngine's ``draw_featmap`` chooses at the resolution of the image.

    Args:
        channel_reduction (str, optional): ``'squeeze_mean'`` shows the mean of a
            layer's channels, ``'select_max'`` the most active channel, None the
            ``topk`` most active ones. Defaults to ``'select_max'``.
        topk (int): Number of channels to show if ``channel_reduction`` is None;
            -1 takes a layer of 1 or 3 channels as a picture. Defaults to 4.
        arrangement (Sequence[int]): Rows and columns of the ``topk`` tiles.
            Defaults to (2, 2).
        alpha (float): Share of the heat map in the blend, 0 to 1. Defaults to 0.5.
        colormap (str | int): Name of an OpenCV or matplotlib colour map. Defaults
            to ``'jet'``.
        score_thr (float): Boxes with a higher score are drawn; 1 draws none.
            Defaults to 0.3.
        max_cell_size (int): Longest side of a picture in the panel, pixels; a
            small image is enlarged to 320. Defaults to 1024.
        class_names (Sequence[str], optional): Names of the classes. Defaults to
            None.
        palette (Sequence, optional): RGB of the classes, as in a data set's
            ``dataset_meta``. Defaults to None, colours that are easy to tell
            apart.

    Raises:
        VisConfigError: If a value can never work.
    """

    def __init__(
        self,
        *,
        channel_reduction: str | None = "select_max",
        topk: int = 4,
        arrangement: Sequence[int] = (2, 2),
        alpha: float = 0.5,
        colormap: str | int = "jet",
        score_thr: float = 0.3,
        max_cell_size: int = 1024,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        validate_reduction_options(channel_reduction, topk, arrangement)
        validate_overlay_options(alpha, colormap)
        validate_panel_options(score_thr, max_cell_size)
        self.channel_reduction = channel_reduction
        self.topk = topk
        self.arrangement = (int(arrangement[0]), int(arrangement[1]))
        self.alpha = float(alpha)
        self.colormap = colormap
        self.score_thr = float(score_thr)
        self.max_cell_size = int(max_cell_size)
        self.class_names = class_names
        self.palette = palette

    @property
    def _has_tiles(self) -> bool:
        return self.channel_reduction is None and self.topk > 0

    def __call__(self, sample: VisSample) -> np.ndarray:
        """Draw one image.

        Args:
            sample (VisSample): The image, its activations and detections; nothing
                of it is modified.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB: first the image with its boxes,
            then one cell per activation, by rows.

        Raises:
            VisConfigError: If ``topk`` is -1 and a layer has neither 1 nor 3
                channels.
            FeatureShapeError: If an activation is not ``(C, h, w)``.
        """
        image_hw = sample.image_rgb.shape[:2]
        picture_hw, map_hw = self._sizes(image_hw)
        picture = resize_image(sample.image_rgb, picture_hw)
        background = resize_image(sample.image_rgb, map_hw)
        map_frame = resized_frame(sample.frame, map_hw)
        cells = [self._image_cell(sample, picture)]
        for activation in sample.activations:
            cells.append(self._layer_cell(activation, sample, background, map_frame))
        return montage(cells)

    def overlay_maps(
        self, sample: VisSample, max_size: int = MAX_OVERLAY_SIZE
    ) -> tuple[OverlayMap, ...]:
        """The maps of the panel by themselves, one per activation and shown channel.

        Args:
            sample (VisSample): As for a panel.
            max_size (int): Longest side of a map, pixels. Defaults to 480.

        Raises:
            VisConfigError, FeatureShapeError: As for a panel.
        """
        size_hw = cell_size_hw(sample.image_rgb.shape[:2], max_size)
        frame = resized_frame(sample.frame, size_hw)
        maps = []
        for activation in sample.activations:
            reduced = self._reduced(activation, sample)
            note = self._note(reduced)
            for number, tile in enumerate(reduced.resampled_tiles(frame)):
                levels = heat_levels(tile)
                title = activation.title
                if self._has_tiles:
                    title += f" · channel {reduced.channels[number]}"
                maps.append(OverlayMap(title, note, levels))
        return tuple(maps)

    def _sizes(
        self, image_hw: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes of the first picture and of a heat map."""
        if not self._has_tiles:
            cell_hw = cell_size_hw(image_hw, self.max_cell_size)
            return cell_hw, cell_hw
        rows, columns = self.arrangement
        most = max(rows, columns)
        room = (self.max_cell_size - (most - 1) * _TILE_GAP) // most
        tile_hw = cell_size_hw(
            image_hw, min(self.max_cell_size, max(MIN_CELL_SIZE, room))
        )
        block = (rows * tile_hw[0], columns * tile_hw[1])
        scale = min(block[0] / image_hw[0], block[1] / image_hw[1])
        longest = round(scale * max(image_hw))
        picture_hw = cell_size_hw(image_hw, self.max_cell_size, min_cell_size=longest)
        return picture_hw, tile_hw

    def _image_cell(self, sample: VisSample, picture: np.ndarray) -> Cell:
        image_h, image_w = sample.image_rgb.shape[:2]
        kept = sample.detections.scores > self.score_thr
        scale = np.array(
            [picture.shape[1] / image_w, picture.shape[0] / image_h] * 2, np.float32
        )
        detections = Detections(
            sample.detections.boxes_xyxy[kept] * scale,
            sample.detections.scores[kept],
            sample.detections.labels[kept],
        )
        drawn = draw_detections(
            picture,
            detections,
            class_names=self.class_names,
            palette=self.palette,
        )
        note = f"{image_w} x {image_h} px"
        if sample.note:
            note += f" · {sample.note}"
        if self.score_thr < 1:
            count = len(detections)
            boxes = f"{count} box" if count == 1 else f"{count or 'no'} boxes"
            note += f" · {boxes} with score > {self.score_thr:g}"
        return Cell(drawn, sample.image_id, note)

    def _layer_cell(
        self,
        activation: Activation,
        sample: VisSample,
        background: np.ndarray,
        map_frame: FrameTransform,
    ) -> Cell:
        reduced = self._reduced(activation, sample)
        tiles = _overlay_tiles(
            reduced, background, map_frame, self.alpha, self.colormap
        )
        picture = (
            _labelled_block(tiles, reduced, self.arrangement, _TILE_GAP)
            if self._has_tiles
            else tiles[0]
        )
        return Cell(picture, activation.title, self._note(reduced))

    def _reduced(self, activation: Activation, sample: VisSample) -> ReducedMaps:
        try:
            return reduce_feature_map(
                activation.feature_map,
                sample.frame,
                channel_reduction=self.channel_reduction,
                topk=self.topk,
                arrangement=self.arrangement,
            )
        except ValueError as error:
            # Both errors of the reduction derive from ValueError; only the layer's
            # name is missing in them.
            raise type(error)(f"layer {activation.title!r}: {error}") from error

    def _note(self, reduced: ReducedMaps) -> str:
        if self._has_tiles:
            shown = f"top {len(reduced.channels)} channels"
        elif self.channel_reduction == "select_max":
            shown = f"channel {reduced.channels[0]}"
        elif self.channel_reduction == "squeeze_mean":
            shown = "mean of channels"
        else:
            shown = "as a picture"
        return f"{reduced.shape} · {shown} · {reduced.value_range}"


def validate_panel_options(score_thr: Any, max_cell_size: Any) -> None:
    """Check the options of a panel.

    Args:
        score_thr (float): Boxes with a higher score are drawn.
        max_cell_size (int): Longest side of a picture in the panel, pixels.

    Raises:
        VisConfigError: If a value can never work.
    """
    if (
        isinstance(score_thr, bool)
        or not isinstance(score_thr, Real)
        or not 0 <= float(score_thr) <= 1
    ):
        raise VisConfigError(
            f"score_thr={score_thr!r} is no score; set 0 to 1; 1 draws no box"
        )
    if (
        isinstance(max_cell_size, bool)
        or not isinstance(max_cell_size, Integral)
        or int(max_cell_size) < 64
    ):
        raise VisConfigError(
            f"max_cell_size={max_cell_size!r} is no number of pixels of 64 or more; "
            "set for example 1024"
        )


def overlay_feature_map(
    feature_map: torch.Tensor,
    image_rgb: np.ndarray,
    *,
    channel_reduction: str | None = "select_max",
    topk: int = 4,
    arrangement: Sequence[int] = (2, 2),
    alpha: float = 0.5,
    colormap: str | int = "jet",
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
        channel_reduction (str, optional): ``'squeeze_mean'``, ``'select_max'`` or
            None. Defaults to ``'select_max'``.
        topk (int): Number of channels to show if ``channel_reduction`` is None;
            -1 takes a map of 1 or 3 channels as a picture. Defaults to 4.
        arrangement (Sequence[int]): Rows and columns of the ``topk`` tiles.
            Defaults to (2, 2).
        alpha (float): Share of the heat map in the blend, 0 to 1. Defaults to 0.5.
        colormap (str | int): Name of an OpenCV or matplotlib colour map. Defaults
            to ``'jet'``.
        frame (FrameTransform, optional): How the image lies in the network's
            input. Defaults to None: the map covers the image exactly.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB; with ``topk`` tiles
        ``(rows * H, columns * W, 3)``.

    Raises:
        VisConfigError: If an option is wrong or does not suit the map.
        FeatureShapeError: If the map is not a non-empty ``(C, h, w)``.

    Examples:
        >>> feature_map = torch.rand(256, 20, 20)
        >>> image_rgb = np.zeros((480, 640, 3), dtype=np.uint8)
        >>> overlay_feature_map(feature_map, image_rgb).shape
        (480, 640, 3)
        >>> overlay_feature_map(
        ...     feature_map, image_rgb, channel_reduction=None, topk=3
        ... ).shape
        (960, 1280, 3)
    """
    validate_overlay_options(alpha, colormap)
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise VisConfigError(
            f"image_rgb has the shape {image_rgb.shape} and is {image_rgb.dtype}; pass "
            "(H, W, 3) uint8"
        )
    image_hw = image_rgb.shape[:2]
    if frame is None:
        map_hw = (feature_map.shape[-2], feature_map.shape[-1])
        frame = FrameTransform.stretch(image_hw, map_hw)
    elif frame.image_hw != image_hw:
        raise VisConfigError(
            f"frame.image_hw={frame.image_hw} is not the size {image_hw} of image_rgb; "
            "pass the frame of this very image"
        )
    reduced = reduce_feature_map(
        feature_map,
        frame,
        channel_reduction=channel_reduction,
        topk=topk,
        arrangement=arrangement,
    )
    tiles = _overlay_tiles(reduced, image_rgb, frame, alpha, colormap)
    if channel_reduction is None and topk > 0:
        rows, columns = arrangement
        return _labelled_block(tiles, reduced, (rows, columns), gap=0)
    return tiles[0]


def resized_frame(frame: FrameTransform, image_hw: tuple[int, int]) -> FrameTransform:
    """The frame of the same image after it was resized.

    Args:
        frame (FrameTransform): The frame of the image as it is.
        image_hw (tuple): Its new height and width, pixels.
    """
    scale_xy = (
        frame.scale_xy[0] * frame.image_hw[1] / image_hw[1],
        frame.scale_xy[1] * frame.image_hw[0] / image_hw[0],
    )
    return replace(frame, image_hw=image_hw, scale_xy=scale_xy)


def _overlay_tiles(
    reduced: ReducedMaps,
    image_rgb: np.ndarray,
    frame: FrameTransform,
    alpha: float,
    colormap: str | int,
) -> list[np.ndarray]:
    # The order of mean and upsampling changes the last bits of a mean; a channel
    # comes out the same.
    is_mean = not reduced.channels
    return [
        overlay_heatmap(
            tile, image_rgb, alpha=alpha, colormap=colormap, soft_steps=is_mean
        )
        for tile in reduced.resampled_tiles(frame)
    ]


def _labelled_block(
    tiles: Sequence[np.ndarray],
    reduced: ReducedMaps,
    arrangement: tuple[int, int],
    gap: int,
) -> np.ndarray:
    labels = [f"channel: {channel}" for channel in reduced.channels]
    return tile_block(tiles, labels, arrangement, gap)
