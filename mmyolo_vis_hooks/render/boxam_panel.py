"""From the explained boxes of one image to a finished picture."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import cv2
import numpy as np

from ..attribution.saliency import FUSIONS, box_saliency, saliency_range
from ..errors import VisConfigError
from ..geometry import FrameTransform
from ..records import BoxExplanation, BoxSample, Detections, OverlayMap
from .boxes import class_name, draw_detections
from .colorbar import colorbar
from .featmap_panel import (
    MAX_OVERLAY_SIZE,
    resized_frame,
    validate_panel_options,
)
from .heatmap import colormap_lut, validate_overlay_options
from .montage import Cell, cell_size_hw, montage, resize_image

SCOPES = ("box", "class", "image")
"""What has a panel of its own below the image."""

_UNIT = "share of the map's maximum"
_MIN_PICTURE_SIZE = 640
# Many boxes need room for their labels, and for their panels below.
_MANY_PANELS = 12
_MIN_PICTURE_SIZE_OF_MANY = 1024
# A panel of a box: twice the box, but not less than this share of the image.
_CONTEXT = 2.0
_MIN_WINDOW_SHARE = 0.18
_MAX_WINDOW_ASPECT = 2.0
# Share of the maximum from which on the colours cover the image in full.
_FULL_SHARE_FROM = np.float32(0.5)
_BAR_GAP = 8
_MIN_PANEL_WIDTH = 240
_MAX_COLUMNS = 8
# Of the whole picture; a guess at the height of a caption is good enough for it.
_GOOD_ASPECT = 1.4
_CAPTION_HEIGHT = 50
_NO_BREAK = "\u00a0"


class BoxAMPanel:
    """Draws where the network looked for each of its boxes.

    First comes the image with its boxes, then the maps of all explained boxes in
    one, then a panel per box or class. Each box's map is divided by its maximum,
    and the colour bar gives the share of it. The colours lie on the grey image, so
    that none of the image's own colours is taken for heat. They have the share
    ``alpha`` of the blend from half of the maximum on, and below it fade out in
    proportion to the map: what has no influence is left as it is.

    Args:
        scope (str): ``'box'`` adds a panel per box, cut out around it; ``'class'``
            one per class, with the strongest of its boxes' maps at each pixel;
            ``'image'`` none. Defaults to ``'box'``.
        fusion (str): How the maps of several layers become one: ``'max'``,
            ``'mean'``, ``'sum'`` or ``'product'``. Defaults to ``'max'``.
        normalize_layers (bool): Divide the map of each layer by its maximum before
            the fusion. Defaults to True.
        smooth (float): Sigma of the Gaussian that smooths a map, in units of the
            box (the square root of its area), 0 to 1. Defaults to 0.1.
        norm_in_bbox (bool): Only show what lies inside the box, and divide by the
            maximum there. Defaults to False.
        alpha (float): Share of the heat map in the blend where the map is strong,
            0 to 1. Defaults to 0.6.
        colormap (str | int): Name of an OpenCV or matplotlib colour map. Defaults
            to ``'plasma'``, which people with any colour vision can read.
        score_thr (float): Boxes with a higher score are drawn on the first
            picture; 1 draws none. Defaults to 0.3.
        max_cell_size (int): Longest side of a picture in the panel, pixels; a
            small image is enlarged to 640. Defaults to 1024.
        caption (str): Method and target, such as ``'boxam · score'``, for the
            notes. Defaults to ''.
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
        scope: str = "box",
        fusion: str = "max",
        normalize_layers: bool = True,
        smooth: float = 0.1,
        norm_in_bbox: bool = False,
        alpha: float = 0.6,
        colormap: str | int = "plasma",
        score_thr: float = 0.3,
        max_cell_size: int = 1024,
        caption: str = "",
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        _check_choice("scope", scope, SCOPES)
        _check_choice("fusion", fusion, FUSIONS)
        _check_flag("normalize_layers", normalize_layers)
        _check_flag("norm_in_bbox", norm_in_bbox)
        _check_smooth(smooth)
        validate_overlay_options(alpha, colormap)
        validate_panel_options(score_thr, max_cell_size)
        if not isinstance(caption, str):
            raise VisConfigError(
                f"caption={caption!r} is no text; set for example 'boxam · score'"
            )
        self.scope = scope
        self.fusion = fusion
        self.normalize_layers = normalize_layers
        self.smooth = float(smooth)
        self.norm_in_bbox = norm_in_bbox
        self.alpha = float(alpha)
        self.colormap = colormap
        self.score_thr = float(score_thr)
        self.max_cell_size = int(max_cell_size)
        self.caption = caption
        self.class_names = class_names
        self.palette = palette

    def __call__(self, sample: BoxSample) -> np.ndarray:
        """Draw one image.

        Args:
            sample (BoxSample): The image, its boxes and their maps; nothing of it
                is modified.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB: the image with its boxes and the map
            of all of them above, the panels of the boxes or classes below. Without an
            explained box only the image, whose caption says so.
        """
        groups = self._groups(sample)
        num_panels = 0 if self.scope == "image" else len(groups)
        drawing = _Drawing.of(sample, self.max_cell_size, num_panels)
        first = self._image_cell(drawing)
        if not groups:
            return montage([first])
        picture_h, picture_w = drawing.picture_rgb.shape[:2]
        layout = _PanelLayout.of(num_panels, (picture_h, picture_w), self.max_cell_size)
        image_map = np.zeros((picture_h, picture_w), np.float32)
        panels: list[Cell] = []
        silent = 0
        for group in groups:
            group_map = np.zeros_like(image_map)
            silent_in_group = 0
            for explanation in group:
                box_map = self._box_map(explanation, drawing)
                silent_in_group += not box_map.any()
                np.maximum(group_map, box_map, out=group_map)
            np.maximum(image_map, group_map, out=image_map)
            silent += silent_in_group
            if self.scope == "box":
                panels.append(self._box_cell(group[0], group_map, drawing, layout))
            elif self.scope == "class":
                panels.append(
                    self._class_cell(group, group_map, silent_in_group, drawing, layout)
                )
        second = self._map_cell(image_map, silent, drawing)
        return layout.stack([first, second], panels)

    def overlay_maps(
        self, sample: BoxSample, max_size: int = MAX_OVERLAY_SIZE
    ) -> tuple[OverlayMap, ...]:
        """The maps by themselves: of all explained boxes, then of each box or class.

        Args:
            sample (BoxSample): As for a picture.
            max_size (int): Longest side of a map, pixels. Defaults to 480.
        """
        groups = self._groups(sample)
        if not groups:
            return ()
        drawing = _Drawing.of(sample, max_size, 0)
        image_map = np.zeros(drawing.picture_rgb.shape[:2], np.float32)
        maps: list[OverlayMap] = []
        for group in groups:
            group_map = np.zeros_like(image_map)
            for explanation in group:
                np.maximum(
                    group_map, self._box_map(explanation, drawing), out=group_map
                )
            np.maximum(image_map, group_map, out=image_map)
            if self.scope == "image":
                continue
            first = group[0]
            label = int(sample.detections.labels[first.index])
            name = class_name(label, self.class_names)
            notes = [self.caption]
            if self.scope == "class":
                title = f"{name} ({_count(len(group))})"
            else:
                title = f"{name} {float(sample.detections.scores[first.index]):.2f}"
                notes += self._layer_notes(first, sample.frame)
                if first.warning or not group_map.any():
                    notes.append(first.warning or self._why_silent(first))
            levels = np.rint(group_map * 255).astype(np.uint8)
            maps.append(OverlayMap(title, _joined(notes), levels, first.index))
        count = len(sample.explanations)
        title = f"{count} explained {'box' if count == 1 else 'boxes'}"
        joint = np.rint(image_map * 255).astype(np.uint8)
        return (OverlayMap(title, self.caption, joint), *maps)

    def _groups(self, sample: BoxSample) -> list[list[BoxExplanation]]:
        """The explanations that share a panel, in the order of their best box.

        One at a time is turned into a map: a hundred maps at the size of the
        picture would take hundreds of megabytes.
        """
        if self.scope != "class":
            return [[explanation] for explanation in sample.explanations]
        by_class: dict[int, list[BoxExplanation]] = {}
        for explanation in sample.explanations:
            label = int(sample.detections.labels[explanation.index])
            by_class.setdefault(label, []).append(explanation)
        return list(by_class.values())

    def _box_map(self, explanation: BoxExplanation, drawing: _Drawing) -> np.ndarray:
        return box_saliency(
            explanation,
            drawing.frame,
            drawing.boxes_xyxy[explanation.index],
            smooth=self.smooth,
            fusion=self.fusion,
            normalize_layers=self.normalize_layers,
            norm_in_bbox=self.norm_in_bbox,
        )

    def _image_cell(self, drawing: _Drawing) -> Cell:
        sample = drawing.sample
        kept = sample.detections.scores > self.score_thr
        detections = Detections(
            drawing.boxes_xyxy[kept],
            sample.detections.scores[kept],
            sample.detections.labels[kept],
        )
        drawn = draw_detections(
            drawing.picture_rgb,
            detections,
            class_names=self.class_names,
            palette=self.palette,
        )
        image_h, image_w = sample.image_rgb.shape[:2]
        notes = [f"{image_w} x {image_h} px"]
        if sample.note:
            notes.append(sample.note)
        if self.score_thr < 1:
            notes.append(f"{_count(len(detections))} with score > {self.score_thr:g}")
        explained = len(sample.explanations)
        if self.score_thr == 1:
            notes.append(f"{_count(explained)} explained")
        elif explained or len(detections):
            notes.append(f"{explained or 'none'} explained")
        return Cell(drawn, sample.image_id, " · ".join(notes))

    def _map_cell(
        self, image_map: np.ndarray, num_silent: int, drawing: _Drawing
    ) -> Cell:
        explanations = drawing.sample.explanations
        overlay = self._overlay(image_map, drawing.picture_rgb)
        _outline(overlay, [drawing.boxes_xyxy[e.index] for e in explanations])
        count = len(explanations)
        whose = "the map" if count == 1 else "each box's map"
        how = (
            "inside its box divided by its maximum there"
            if self.norm_in_bbox
            else "divided by its maximum"
        )
        notes = [self.caption, f"{whose} {how}"]
        if count > 1:
            notes.append("the largest at each pixel")
        if num_silent:
            notes.append(_silence(num_silent, count))
        title = f"{count} explained {'box' if count == 1 else 'boxes'}"
        has_heat = num_silent < count
        return Cell(self._with_bar(overlay, has_heat, _UNIT), title, _joined(notes))

    def _box_cell(
        self,
        explanation: BoxExplanation,
        box_map: np.ndarray,
        drawing: _Drawing,
        layout: _PanelLayout,
    ) -> Cell:
        sample = drawing.sample
        box_xyxy = sample.detections.boxes_xyxy[explanation.index]
        window = crop_window(box_xyxy, sample.image_rgb.shape[:2])
        panel = self._panel(box_map, window, [explanation], drawing, layout)
        label = int(sample.detections.labels[explanation.index])
        score = float(sample.detections.scores[explanation.index])
        notes = [self.caption, *self._layer_notes(explanation, sample.frame)]
        has_heat = bool(box_map.any())
        if explanation.warning or not has_heat:
            notes.append(explanation.warning or self._why_silent(explanation))
        return Cell(
            self._with_bar(panel, has_heat),
            f"{class_name(label, self.class_names)} {score:.2f}",
            _joined(notes),
        )

    def _class_cell(
        self,
        group: Sequence[BoxExplanation],
        class_map: np.ndarray,
        num_silent: int,
        drawing: _Drawing,
        layout: _PanelLayout,
    ) -> Cell:
        sample = drawing.sample
        image_h, image_w = sample.image_rgb.shape[:2]
        panel = self._panel(class_map, (0, 0, image_w, image_h), group, drawing, layout)
        count = len(group)
        notes = [self.caption]
        if count > 1:
            notes.append("the largest of their maps at each pixel")
        if num_silent:
            notes.append(_silence(num_silent, count))
        label = int(sample.detections.labels[group[0].index])
        return Cell(
            self._with_bar(panel, num_silent < count),
            f"{class_name(label, self.class_names)} ({_count(count)})",
            _joined(notes + sorted({e.warning for e in group if e.warning})),
        )

    def _panel(
        self,
        saliency: np.ndarray,
        window: tuple[int, int, int, int],
        explanations: Sequence[BoxExplanation],
        drawing: _Drawing,
        layout: _PanelLayout,
    ) -> np.ndarray:
        """Part of the image with its heat and the outlines of boxes."""
        x1, y1, x2, y2 = window
        size_hw = layout.picture_size_hw((y2 - y1, x2 - x1))
        crop = resize_image(drawing.sample.image_rgb[y1:y2, x1:x2], size_hw)
        scale = np.array([size_hw[1] / (x2 - x1), size_hw[0] / (y2 - y1)] * 2)
        overlay = self._overlay(drawing.map_in(saliency, window, size_hw), crop)
        boxes = [drawing.sample.detections.boxes_xyxy[e.index] for e in explanations]
        _outline(overlay, [(box - (x1, y1, x1, y1)) * scale for box in boxes])
        return overlay

    def _overlay(self, saliency: np.ndarray, image_rgb: np.ndarray) -> np.ndarray:
        """``(H, W, 3)`` uint8: the grey image, coloured where the map has heat."""
        grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY)
        levels = np.rint(saliency * 255).astype(np.uint8)
        heat_rgb = cv2.applyColorMap(levels, colormap_lut(self.colormap))
        share = np.minimum(saliency / _FULL_SHARE_FROM, 1) * np.float32(self.alpha)
        share = cv2.merge([share] * 3)
        base = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB).astype(np.float32)
        blended = base + (heat_rgb.astype(np.float32) - base) * share
        return cv2.convertScaleAbs(blended)

    def _with_bar(
        self, picture: np.ndarray, has_heat: bool, label: str = ""
    ) -> np.ndarray:
        bar = colorbar(picture.shape[0], colormap=self.colormap, label=label)
        gap = np.full((picture.shape[0], _BAR_GAP, 3), 255, np.uint8)
        if not has_heat:
            # There is nothing to read off; the room keeps panels in line.
            bar = np.full_like(bar, 255)
        return np.hstack([picture, gap, bar])

    def _layer_notes(
        self, explanation: BoxExplanation, frame: FrameTransform
    ) -> list[str]:
        """Layers with their shapes, and the range of the maps as they came."""
        if not explanation.maps:
            return []
        layers = ", ".join(
            f"{m.layer} {m.saliency.shape[1]}x{m.saliency.shape[0]}"
            for m in explanation.maps
        )
        ranges = [saliency_range(m.saliency, frame) for m in explanation.maps]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        shown = _range_text(low, high)
        if len(ranges) == 1:
            return [layers, f"map{_NO_BREAK}{shown}"]
        each = "normalised " if self.normalize_layers else ""
        return [f"{self.fusion} of {each}{layers}", f"maps{_NO_BREAK}{shown}"]

    def _why_silent(self, explanation: BoxExplanation) -> str:
        """Why a map is zero everywhere, where whoever made it gave no reason."""
        if not any(m.saliency.any() for m in explanation.maps):
            return "no layer has any influence on this box"
        if self.norm_in_bbox:
            return "the map is zero inside the box"
        if self.fusion == "product" and len(explanation.maps) > 1:
            return "the product of the layers is zero on the image"
        return "the map is zero on the image; its heat lies in the padding"


@dataclass(frozen=True)
class _Drawing:
    """A sample at the resolution of the drawing.

    Attributes:
        sample: As it was given.
        picture_rgb: The image at the size of the large pictures.
        frame: How a pixel of it lies in the network's input.
        boxes_xyxy: All boxes, pixels of the picture.
    """

    sample: BoxSample
    picture_rgb: np.ndarray
    frame: FrameTransform
    boxes_xyxy: np.ndarray

    @classmethod
    def of(cls, sample: BoxSample, max_cell_size: int, num_panels: int) -> _Drawing:
        image_h, image_w = sample.image_rgb.shape[:2]
        many = num_panels > _MANY_PANELS
        size_hw = cell_size_hw(
            (image_h, image_w),
            max_cell_size,
            _MIN_PICTURE_SIZE_OF_MANY if many else _MIN_PICTURE_SIZE,
        )
        scale = np.array([size_hw[1] / image_w, size_hw[0] / image_h] * 2, np.float32)
        return cls(
            sample,
            resize_image(sample.image_rgb, size_hw),
            resized_frame(sample.frame, size_hw),
            sample.detections.boxes_xyxy * scale,
        )

    def map_in(
        self,
        saliency: np.ndarray,
        window: tuple[int, int, int, int],
        size_hw: tuple[int, int],
    ) -> np.ndarray:
        """The part of a map, over the picture, that lies in a window of the image."""
        x1, y1, x2, y2 = window
        image_h, image_w = self.sample.image_rgb.shape[:2]
        picture_h, picture_w = saliency.shape
        to_picture = np.array([picture_w / image_w, picture_h / image_h])
        step = np.array([(x2 - x1) / size_hw[1], (y2 - y1) / size_hw[0]]) * to_picture
        # OpenCV counts from the centre of the first pixel.
        start = np.array([x1, y1]) * to_picture + 0.5 * step - 0.5
        return cv2.warpAffine(
            saliency,
            np.array([[step[0], 0, start[0]], [0, step[1], start[1]]]),
            (size_hw[1], size_hw[0]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )


@dataclass(frozen=True)
class _PanelLayout:
    """Where the panels go below the two large pictures.

    Attributes:
        columns: Panels in a row; 0 puts the only panel beside the large pictures.
        panel_hw: Room of a panel's picture, without its colour bar.
    """

    columns: int
    panel_hw: tuple[int, int]

    @classmethod
    def of(
        cls, count: int, picture_hw: tuple[int, int], max_cell_size: int
    ) -> _PanelLayout:
        """Columns that fill the width of the large pictures and suit a screen."""
        picture_h, picture_w = picture_hw
        if count < 2:
            return cls(0, picture_hw)
        aspect = _window_aspect(picture_hw)
        map_hw = (picture_h, picture_w + _bar_width(picture_h, _UNIT))
        above = montage([Cell(np.empty((*map_hw, 3), np.uint8))] * 2, (1, 2))
        gutter = _gutter(map_hw)
        # The picture has no bar.
        inner = above.shape[1] - 2 * gutter - (map_hw[1] - picture_w)
        layouts: list[tuple[float, int, _PanelLayout]] = []
        for columns in range(2, min(count, _MAX_COLUMNS) + 1):
            width = inner // columns
            width = (inner - (columns - 1) * _gutter((1, width))) // columns
            if width < _MIN_PANEL_WIDTH and layouts:
                break
            panel_w = width - _bar_width(round(width / aspect))
            panel_w = max(1, min(panel_w, max_cell_size, round(max_cell_size * aspect)))
            panel_h = max(1, round(panel_w / aspect))
            rows = math.ceil(count / columns)
            height = above.shape[0] + rows * (panel_h + _CAPTION_HEIGHT)
            cost = abs(math.log(inner / height / _GOOD_ASPECT))
            cost += (rows * columns - count) / count
            layouts.append((cost, columns, cls(columns, (panel_h, panel_w))))
        return min(layouts, key=lambda entry: entry[:2])[2]

    def picture_size_hw(self, window_hw: tuple[int, int]) -> tuple[int, int]:
        """Size at which a part of the image is drawn: as large as there is room."""
        scale = min(room / size for room, size in zip(self.panel_hw, window_hw))
        height, width = (max(1, round(size * scale)) for size in window_hw)
        # Windows are whole pixels; panels that differ by one would look careless.
        if height > 0.98 * self.panel_hw[0] and width > 0.98 * self.panel_hw[1]:
            return self.panel_hw
        return height, width

    def stack(self, above: Sequence[Cell], panels: Sequence[Cell]) -> np.ndarray:
        """The whole picture, ``(H, W, 3)`` uint8."""
        if not self.columns:
            cells = [*above, *panels]
            return montage(cells, (1, len(cells)))
        rows = math.ceil(len(panels) / self.columns)
        parts = (montage(above, (1, 2)), montage(panels, (rows, self.columns)))
        gutters = [_gutter(_largest_hw(cells)) for cells in (above, panels)]
        lefts = [max(gutters) - gutter for gutter in gutters]
        width = max(left + part.shape[1] for left, part in zip(lefts, parts))
        return np.vstack(
            [
                cv2.copyMakeBorder(
                    part,
                    0,
                    0,
                    left,
                    width - left - part.shape[1],
                    cv2.BORDER_CONSTANT,
                    value=(255, 255, 255),
                )
                for left, part in zip(lefts, parts)
            ]
        )


def crop_window(
    box_xyxy: np.ndarray, image_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The part of an image that shows a box with what is around it.

    Args:
        box_xyxy (np.ndarray): ``(4,)``, pixels of the image.
        image_hw (tuple): Height and width of the image, pixels.

    Returns:
        tuple[int, int, int, int]: x1, y1, x2, y2 within the image. All windows of
        an image have one aspect ratio, unless the image has no room for it.
    """
    height, width = image_hw
    if not np.isfinite(box_xyxy).all():
        return 0, 0, width, height
    x1, x2 = np.clip((box_xyxy[0], box_xyxy[2]), 0, width)
    y1, y2 = np.clip((box_xyxy[1], box_xyxy[3]), 0, height)
    least = _MIN_WINDOW_SHARE * max(image_hw)
    window_w = min(width, max(_CONTEXT * (x2 - x1), least))
    window_h = min(height, max(_CONTEXT * (y2 - y1), least))
    aspect = _window_aspect(image_hw)
    window_w = max(window_w, window_h * aspect)
    window_h = max(window_h, window_w / aspect)
    left, right = _span((x1 + x2) / 2, window_w, width)
    top, bottom = _span((y1 + y2) / 2, window_h, height)
    return left, top, right, bottom


def _span(centre: float, length: float, size: int) -> tuple[int, int]:
    """A stretch of whole pixels around a point, moved to lie within an axis."""
    pixels = int(np.clip(round(length), 1, size))
    start = int(np.clip(round(centre - pixels / 2), 0, size - pixels))
    return start, start + pixels


def _window_aspect(image_hw: tuple[int, int]) -> float:
    """Width by height of a panel: the image's, unless that is extreme."""
    aspect = image_hw[1] / image_hw[0]
    return float(np.clip(aspect, 1 / _MAX_WINDOW_ASPECT, _MAX_WINDOW_ASPECT))


def _outline(image_rgb: np.ndarray, boxes_xyxy: Sequence[np.ndarray]) -> None:
    """Draw boxes, in place: white, which no colour map of heat is, edged in black."""
    height, width = image_rgb.shape[:2]
    thickness = max(1, round(max(height, width) / 450))
    corners = []
    for box_xyxy in boxes_xyxy:
        if not np.isfinite(box_xyxy).all():
            continue
        x1, y1, x2, y2 = (round(float(v)) for v in box_xyxy)
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            continue
        x1, y1 = max(x1, 0), max(y1, 0)
        x2, y2 = max(x1, min(x2, width) - 1), max(y1, min(y2, height) - 1)
        corners.append((x1, y1, x2, y2))
    # All edges first: none may cross out the line of a neighbour.
    for color, steps in (((0, 0, 0), (-1, thickness)), ((255,) * 3, range(thickness))):
        for x1, y1, x2, y2 in corners:
            for step in steps:
                if x1 + step <= x2 - step and y1 + step <= y2 - step:
                    cv2.rectangle(
                        image_rgb,
                        (x1 + step, y1 + step),
                        (x2 - step, y2 - step),
                        color,
                        1,
                    )


def _bar_width(height: int, label: str = "") -> int:
    return _BAR_GAP + colorbar(max(1, height), label=label).shape[1]


def _largest_hw(cells: Sequence[Cell]) -> tuple[int, int]:
    return (
        max(cell.image_rgb.shape[0] for cell in cells),
        max(cell.image_rgb.shape[1] for cell in cells),
    )


def _gutter(cell_hw: tuple[int, int]) -> int:
    """White pixels that a montage leaves around cells of a size."""
    cell = Cell(np.empty((*cell_hw, 3), np.uint8))
    # One cell has two of them, two cells have three.
    one, two = montage([cell], (1, 1)), montage([cell, cell], (1, 2))
    return 2 * one.shape[1] - two.shape[1]


def _count(number: int) -> str:
    return f"{number} box" if number == 1 else f"{number or 'no'} boxes"


def _range_text(low: float, high: float) -> str:
    """Low and high on one line; what three digits of the high do not show is 0."""
    low = 0.0 if low < 5e-4 * high else low
    return f"{low:.3g} to {high:.3g}".replace(" ", _NO_BREAK)


def _silence(number: int, total: int) -> str:
    """How many of some boxes have a map that is zero everywhere."""
    if total == 1:
        return "without influence"
    return f"{number} of {_count(total)} without influence"


def _joined(notes: Sequence[str]) -> str:
    return " · ".join(note for note in notes if note)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise VisConfigError(
        f"{name}={value!r} is unknown; {hint}Set one of {', '.join(map(repr, choices))}"
    )


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise VisConfigError(f"{name}={value!r} is neither True nor False; set one")


def _check_smooth(value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not 0 <= float(value) <= 1
    ):
        raise VisConfigError(
            f"smooth={value!r} is no share of the box's size; set 0 (not smoothed) to "
            "1, for example 0.1"
        )
