"""From the explained boxes of one image to a finished picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ..attribution.methods import caption_of
from ..attribution.saliency import box_saliency, saliency_range
from ..geometry import FrameTransform
from ..records import BoxExplanation, BoxSample, OverlayMap
from .box_layout import PanelLayout, crop_window
from .boxes import class_name, outline_boxes
from .colorbar import ColorScale
from .heatmap import fade_heatmap
from .montage import Cell, cell_size_hw, gutter_of, montage, resize_image
from .overview import (
    MAX_OVERLAY_SIZE,
    NO_BREAK,
    cells_text,
    count_boxes,
    joined,
    overview_cell,
    resized_boxes,
    resized_frame,
)

if TYPE_CHECKING:
    from ..options import BoxAMOptions

_UNIT = "share of the map's maximum"
_MIN_PICTURE_SIZE = 640
# Many boxes need room for their labels, and for their panels below.
_MANY_PANELS = 12
_MIN_PICTURE_SIZE_OF_MANY = 1024


@dataclass(frozen=True)
class BoxAMPanel:
    """Draws where the network looked for each of its boxes.

    First comes the image with its boxes, then the maps of all explained boxes in
    one, then a panel per box or class; a single panel takes the place of the joint
    map. Each box's map is divided by its maximum, and the colour bar of a row gives
    the share of it. The colours fade out on the grey image.

    A box whose class and score, as they are written, are those of another box has a
    number on its label and in the title of its panel: its place among the panels.
    Boxes that are not explained have thin lines and pale labels. Sizes are width by
    height, of images in pixels and of maps in cells.

    Args:
        options (BoxAMOptions): What is drawn and how.
        class_names (Sequence[str]): Names of the classes. Defaults to none.
        palette (Sequence, optional): RGB of the classes, as in a data set's
            ``dataset_meta``. Defaults to None, colours that are easy to tell
            apart.
        max_cell_size (int): Longest side of a picture in the panel, pixels; a
            small image is enlarged. Defaults to 1024.
    """

    options: BoxAMOptions
    class_names: Sequence[str] = ()
    palette: Sequence[Sequence[int]] | None = None
    max_cell_size: int = 1024

    @property
    def _caption(self) -> str:
        return caption_of(self.options.method, self.options.target)

    def __call__(self, sample: BoxSample) -> np.ndarray:
        """Draw one image.

        Args:
            sample (BoxSample): The image, its boxes and their maps; nothing of it
                is modified.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB. Without an explained box only the
            image, whose caption says so.
        """
        groups = self._groups(sample)
        num_panels = 0 if self.options.scope == "image" else len(groups)
        many = num_panels > _MANY_PANELS
        least = _MIN_PICTURE_SIZE_OF_MANY if many else _MIN_PICTURE_SIZE
        image_hw = sample.image_rgb.shape[:2]
        drawing = self._drawing(
            sample, cell_size_hw(image_hw, self.max_cell_size, least)
        )
        first = overview_cell(
            sample,
            drawing.picture_rgb,
            score_thr=self.options.score_thr,
            class_names=self.class_names,
            palette=self.palette,
            explained={e.index for e in sample.explanations},
            numbers=drawing.numbers,
        )
        if not groups:
            return montage([first])
        picture_hw = drawing.picture_rgb.shape[:2]
        gutter = gutter_of(picture_hw)
        layout = PanelLayout.of(num_panels, picture_hw, gutter, self.max_cell_size)
        joint_map = np.zeros(picture_hw, np.float32)
        num_silent = 0
        panels: list[Cell] = []
        for group in groups:
            group_map, silent = self._group_map(group, drawing)
            np.maximum(joint_map, group_map, out=joint_map)
            num_silent += silent
            if num_panels:
                panels.append(self._panel(group, group_map, silent, drawing, layout))
        if len(panels) == 1:
            return montage([first, *panels], (1, 2), gutter=gutter)
        second = self._joint_cell(joint_map, num_silent, drawing)
        above = montage([first, second], (1, 2), gutter=gutter)
        if not panels:
            return above
        rows = math.ceil(len(panels) / layout.columns)
        below = montage(panels, (rows, layout.columns), gutter=gutter)
        return _stacked(above, below)

    def overlay_maps(
        self, sample: BoxSample, max_size: int = MAX_OVERLAY_SIZE
    ) -> tuple[OverlayMap, ...]:
        """The maps by themselves: of all explained boxes, then of each box or class.

        Args:
            sample (BoxSample): As for a picture.
            max_size (int): Longest side of a map, pixels. Defaults to 480.
        """
        if not sample.explanations:
            return ()
        size_hw = cell_size_hw(sample.image_rgb.shape[:2], max_size)
        drawing = self._drawing(sample, size_hw)
        joint_map = np.zeros(size_hw, np.float32)
        maps: list[OverlayMap] = []
        for group in self._groups(sample):
            group_map, silent = self._group_map(group, drawing)
            np.maximum(joint_map, group_map, out=joint_map)
            if self.options.scope != "image":
                title, note = self._group_texts(group, silent, drawing)
                maps.append(OverlayMap(title, note, _levels(group_map), group[0].index))
        title = _explained(len(sample.explanations))
        return (OverlayMap(title, self._caption, _levels(joint_map)), *maps)

    def _groups(self, sample: BoxSample) -> list[list[BoxExplanation]]:
        """The explanations that share a panel, in the order of their best box.

        One at a time is turned into a map: a hundred maps at the size of the
        picture would take hundreds of megabytes.
        """
        if self.options.scope != "class":
            return [[explanation] for explanation in sample.explanations]
        by_class: dict[int, list[BoxExplanation]] = {}
        for explanation in sample.explanations:
            label = int(sample.detections.labels[explanation.index])
            by_class.setdefault(label, []).append(explanation)
        return list(by_class.values())

    def _drawing(self, sample: BoxSample, size_hw: tuple[int, int]) -> _Drawing:
        found, image_hw = sample.detections, sample.image_rgb.shape[:2]
        explained = [e.index for e in sample.explanations]
        written = [(int(c), f"{s:.2f}") for c, s in zip(found.labels, found.scores)]
        visible = {
            *explained,
            *np.flatnonzero(found.scores > self.options.score_thr).tolist(),
        }
        alike = Counter(written[index] for index in visible)
        numbers = {
            index: number
            for number, index in enumerate(explained, 1)
            if self.options.scope == "box" and alike[written[index]] > 1
        }
        return _Drawing(
            sample,
            resize_image(sample.image_rgb, size_hw),
            resized_frame(sample.frame, size_hw),
            resized_boxes(found.boxes_xyxy, image_hw, size_hw),
            numbers,
        )

    def _group_map(
        self, group: Sequence[BoxExplanation], drawing: _Drawing
    ) -> tuple[np.ndarray, int]:
        """The largest of some boxes' maps, and how many of these are zero."""
        group_map = np.zeros(drawing.picture_rgb.shape[:2], np.float32)
        silent = 0
        for explanation in group:
            box_map = box_saliency(
                explanation,
                drawing.frame,
                drawing.boxes_xyxy[explanation.index],
                smooth=self.options.sigma,
                fusion=self.options.fusion,
                normalize_layers=self.options.normalize_layers,
                norm_in_bbox=self.options.norm_in_bbox,
            )
            silent += not box_map.any()
            np.maximum(group_map, box_map, out=group_map)
        return group_map, silent

    def _joint_cell(
        self, joint_map: np.ndarray, num_silent: int, drawing: _Drawing
    ) -> Cell:
        explanations = drawing.sample.explanations
        overlay = self._overlay(joint_map, drawing.picture_rgb)
        outline_boxes(overlay, [drawing.boxes_xyxy[e.index] for e in explanations])
        count = len(explanations)
        whose = "the map" if count == 1 else "each box's map"
        how = (
            "inside its box divided by its maximum there"
            if self.options.norm_in_bbox
            else "divided by its maximum"
        )
        notes = [self._caption, f"{whose} {how}"]
        if count > 1:
            notes.append("the largest at each pixel")
        notes.append(_silence(num_silent, count))
        scale = (
            ColorScale(self.options.colormap, label=_UNIT)
            if num_silent < count
            else None
        )
        return Cell(overlay, _explained(count), joined(notes), scale)

    def _panel(
        self,
        group: Sequence[BoxExplanation],
        group_map: np.ndarray,
        num_silent: int,
        drawing: _Drawing,
        layout: PanelLayout,
    ) -> Cell:
        """Part of the image with the heat and the outlines of some boxes."""
        sample = drawing.sample
        image_hw = sample.image_rgb.shape[:2]
        boxes = [sample.detections.boxes_xyxy[e.index] for e in group]
        alone = layout.columns == 1
        window = (0, 0, image_hw[1], image_hw[0])
        if self.options.scope == "box":
            shown = drawing.with_heat(boxes[0], group_map) if alone else boxes[0]
            window = crop_window(shown, image_hw)
        x1, y1, x2, y2 = window
        size_hw = layout.picture_size_hw((y2 - y1, x2 - x1))
        crop = resize_image(sample.image_rgb[y1:y2, x1:x2], size_hw)
        overlay = self._overlay(drawing.map_in(group_map, window, size_hw), crop)
        window_hw = (y2 - y1, x2 - x1)
        outline_boxes(
            overlay,
            [resized_boxes(b - (x1, y1, x1, y1), window_hw, size_hw) for b in boxes],
        )
        scale = (
            ColorScale(self.options.colormap, label=_UNIT if alone else "")
            if num_silent < len(group)
            else None
        )
        return Cell(overlay, *self._group_texts(group, num_silent, drawing), scale)

    def _overlay(self, saliency: np.ndarray, image_rgb: np.ndarray) -> np.ndarray:
        return fade_heatmap(
            saliency,
            image_rgb,
            alpha=self.options.alpha,
            colormap=self.options.colormap,
        )

    def _group_texts(
        self, group: Sequence[BoxExplanation], num_silent: int, drawing: _Drawing
    ) -> tuple[str, str]:
        """Title and note of a box or class."""
        sample, first = drawing.sample, group[0]
        name = class_name(int(sample.detections.labels[first.index]), self.class_names)
        notes = [self._caption]
        if self.options.scope == "class":
            if len(group) > 1:
                notes.append("the largest of their maps at each pixel")
            notes.append(_silence(num_silent, len(group)))
            notes += sorted({e.warning for e in group})
            return f"{name} ({count_boxes(len(group))})", joined(notes)
        title = f"{name} {sample.detections.scores[first.index]:.2f}"
        if first.index in drawing.numbers:
            title += f" #{drawing.numbers[first.index]}"
        notes += self._layer_notes(first, sample.frame)
        notes.append(first.warning or (self._why_silent(first) if num_silent else ""))
        return title, joined(notes)

    def _layer_notes(
        self, explanation: BoxExplanation, frame: FrameTransform
    ) -> list[str]:
        """Layers with their sizes, and the range of the maps as they came."""
        if not explanation.maps:
            return []
        layers = ", ".join(
            f"{m.layer} {cells_text(m.saliency.shape)}" for m in explanation.maps
        )
        ranges = [saliency_range(m.saliency, frame) for m in explanation.maps]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        # What three digits of the high do not show is 0.
        low = 0.0 if low < 5e-4 * high else low
        shown = f"{low:.3g} to {high:.3g}".replace(" ", NO_BREAK)
        if len(ranges) == 1:
            return [layers, f"map{NO_BREAK}{shown}"]
        each = "normalised " if self.options.normalize_layers else ""
        return [f"{self.options.fusion} of {each}{layers}", f"maps{NO_BREAK}{shown}"]

    def _why_silent(self, explanation: BoxExplanation) -> str:
        """Why a map is zero everywhere, where whoever made it gave no reason."""
        if not any(m.saliency.any() for m in explanation.maps):
            return "no layer has any influence on this box"
        if self.options.norm_in_bbox:
            return "the map is zero inside the box"
        if self.options.fusion == "product" and len(explanation.maps) > 1:
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
        numbers: By the index of the detection, for those that need one.
    """

    sample: BoxSample
    picture_rgb: np.ndarray
    frame: FrameTransform
    boxes_xyxy: np.ndarray
    numbers: dict[int, int]

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

    def with_heat(self, box_xyxy: np.ndarray, saliency: np.ndarray) -> np.ndarray:
        """A box of the image, widened to hold what is strong in its map."""
        rows, columns = np.nonzero(saliency >= 0.5)
        if not len(rows):
            return box_xyxy
        heat = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        heat = resized_boxes(heat, saliency.shape, self.sample.image_rgb.shape)
        low, high = np.minimum(box_xyxy, heat), np.maximum(box_xyxy, heat)
        return np.array([low[0], low[1], high[2], high[3]])


def _stacked(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    width = max(above.shape[1], below.shape[1])
    stacked = np.full((above.shape[0] + below.shape[0], width, 3), 255, np.uint8)
    stacked[: above.shape[0], : above.shape[1]] = above
    stacked[above.shape[0] :, : below.shape[1]] = below
    return stacked


def _levels(saliency: np.ndarray) -> np.ndarray:
    return np.rint(saliency * 255).astype(np.uint8)


def _explained(count: int) -> str:
    return f"{count} explained {'box' if count == 1 else 'boxes'}"


def _silence(number: int, total: int) -> str:
    """How many of some boxes have a map that is zero everywhere."""
    if not number:
        return ""
    if total == 1:
        return "without influence"
    return f"{number} of {count_boxes(total)} without influence"
