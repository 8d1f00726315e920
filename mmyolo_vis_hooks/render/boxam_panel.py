"""From the explained boxes of one image to a finished picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from ..attribution.methods import caption_of
from ..attribution.saliency import box_saliency, saliency_range
from ..geometry import FrameTransform
from ..records import BoxExplanation, BoxSample, OverlayMap
from .box_layout import crop_window, panel_layout, panel_size_hw
from .boxes import class_name, outline_boxes
from .colorbar import ColorScale
from .heatmap import DIVERGING, diverge_heatmap, fade_heatmap
from .montage import Cell, cell_size_hw, gutter_of, montage, resize_image, stack
from .panel import (
    MAX_OVERLAY_SIZE,
    NO_BREAK,
    Panel,
    cells_text,
    count_boxes,
    joined,
    resized_boxes,
)
from .points import draw_points

if TYPE_CHECKING:
    from ..options import BoxAMOptions

_UNIT = "share of the map's maximum"
_SIGNS = "red for, blue against"
_RANKS = "red counts more than most of the box, blue less"
_MIN_PICTURE_SIZE = 640
# Many boxes need room for their labels, and for their panels below.
_MANY_PANELS = 12
_MIN_PICTURE_SIZE_OF_MANY = 1024


@dataclass(frozen=True)
class BoxAMPanel(Panel):
    """Draws where the network looked for each of its boxes.

    First comes the image with its boxes, then the maps of all explained boxes in
    one, then a panel per box or class; a single panel takes the place of the joint
    map. Each box's map is divided by its maximum, and the colour bar of a row gives
    the share of it. The colours fade out on the grey image; those of signed maps are
    blue for what speaks against a box, white for nothing, red for what speaks for it.

    A box whose class and score, as they are written, are those of another box has a
    number on its label and in the title of its panel: its place among the panels.
    Boxes that are not explained have thin lines and pale labels. Sizes are width by
    height, of images in pixels and of maps in cells.
    """

    options: BoxAMOptions

    def __call__(self, sample: BoxSample) -> np.ndarray:
        """Draw one image; nothing of the sample is modified.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB. Without an explained box only the
            image, whose caption says so.
        """
        groups = self._groups(sample)
        num_panels = 0 if self.options.scope == "image" else len(groups)
        many = num_panels > _MANY_PANELS
        least = _MIN_PICTURE_SIZE_OF_MANY if many else _MIN_PICTURE_SIZE
        size_hw = cell_size_hw(sample.image_rgb.shape[:2], self.max_cell_size, least)
        picture_rgb = resize_image(sample.image_rgb, size_hw)
        explained = [e.index for e in sample.explanations]
        numbers = self._numbers(sample)
        first = self.overview(sample, picture_rgb, explained, numbers)
        if not groups:
            return montage([first])
        gutter = gutter_of(size_hw)
        columns, panel_hw = panel_layout(
            num_panels, size_hw, gutter, self.max_cell_size
        )
        joint_map = np.zeros(size_hw, np.float32)
        num_silent = 0
        panels: list[Cell] = []
        for group, group_map, silent in self._group_maps(sample, size_hw):
            _keep_larger(joint_map, group_map)
            num_silent += silent
            if num_panels:
                picture = self._part(sample, group, group_map, panel_hw, columns == 1)
                texts = self._group_texts(sample, group, silent, numbers)
                scale = self._scale(silent < len(group), _UNIT if columns == 1 else "")
                panels.append(Cell(picture, *texts, scale))
        if len(panels) == 1:
            return montage([first, *panels], 2, gutter=gutter)
        second = self._joint_cell(sample, picture_rgb, joint_map, num_silent)
        rows = [montage([first, second], 2, gutter=gutter)]
        if panels:
            rows.append(montage(panels, columns, gutter=gutter))
        return stack(rows)

    def overlay_maps(self, sample: BoxSample) -> tuple[OverlayMap, ...]:
        """The maps by themselves: of all explained boxes, then of each box or class."""
        if not sample.explanations:
            return ()
        size_hw = cell_size_hw(sample.image_rgb.shape[:2], MAX_OVERLAY_SIZE)
        numbers = self._numbers(sample)
        joint_map = np.zeros(size_hw, np.float32)
        maps: list[OverlayMap] = []
        for group, group_map, silent in self._group_maps(sample, size_hw):
            _keep_larger(joint_map, group_map)
            if self.options.scope != "image":
                title, note = self._group_texts(sample, group, silent, numbers)
                levels = self._levels(group_map)
                maps.append(OverlayMap(title, note, levels, group[0].index))
        title = _explained(len(sample.explanations))
        return (OverlayMap(title, self._caption, self._levels(joint_map)), *maps)

    def _levels(self, saliency: np.ndarray) -> np.ndarray:
        shares = (1 + saliency) / 2 if self.options.is_signed else saliency
        return np.rint(shares * 255).astype(np.uint8)

    def box_map(
        self, explanation: BoxExplanation, frame: FrameTransform, box_xyxy: np.ndarray
    ) -> np.ndarray:
        """The map of one box as it is drawn; see :func:`box_saliency`."""
        return box_saliency(
            explanation,
            frame,
            box_xyxy,
            smooth=self.options.sigma,
            fusion=self.options.fusion,
            normalize_layers=self.options.normalize_layers,
            norm_in_bbox=self.options.norm_in_bbox,
        )

    @property
    def colormap(self) -> str | int:
        """That of the maps; one of its own where they are signed."""
        return DIVERGING if self.options.is_signed else self.options.colormap

    @property
    def fades(self) -> bool:
        """Whether weak heat is transparent; the white of signed maps is a colour."""
        return not self.options.is_signed

    @property
    def _caption(self) -> str:
        caption = caption_of(self.options.method, self.options.target)
        signs = _RANKS if self.options.cells else _SIGNS
        return joined([caption, signs if self.options.is_signed else ""])

    def _groups(self, sample: BoxSample) -> list[list[BoxExplanation]]:
        """The explanations that share a panel, in the order of their best box."""
        if self.options.scope != "class":
            return [[explanation] for explanation in sample.explanations]
        by_class: dict[int, list[BoxExplanation]] = {}
        for explanation in sample.explanations:
            label = int(sample.detections.labels[explanation.index])
            by_class.setdefault(label, []).append(explanation)
        return list(by_class.values())

    def _numbers(self, sample: BoxSample) -> dict[int, int]:
        """Places of the explained boxes that are written as another one is."""
        if self.options.scope != "box":
            return {}
        found, explained = sample.detections, [e.index for e in sample.explanations]
        written = [(int(c), f"{s:.2f}") for c, s in zip(found.labels, found.scores)]
        drawn = np.flatnonzero(found.scores > self.options.score_thr).tolist()
        alike = Counter(written[index] for index in {*explained, *drawn})
        places = enumerate(explained, 1)
        return {index: n for n, index in places if alike[written[index]] > 1}

    def _group_maps(
        self, sample: BoxSample, size_hw: tuple[int, int]
    ) -> Iterator[tuple[list[BoxExplanation], np.ndarray, int]]:
        """Each group, the largest of its boxes' maps, and how many of these are zero.

        One at a time: a hundred maps at the size of the picture would take hundreds
        of megabytes.
        """
        image_hw, found = sample.image_rgb.shape[:2], sample.detections
        frame = sample.frame.resized(size_hw)
        boxes_xyxy = resized_boxes(found.boxes_xyxy, image_hw, size_hw)
        for group in self._groups(sample):
            group_map = np.zeros(size_hw, np.float32)
            silent = 0
            for explanation in group:
                box_xyxy = boxes_xyxy[explanation.index]
                box_map = self.box_map(explanation, frame, box_xyxy)
                silent += not box_map.any()
                _keep_larger(group_map, box_map)
            yield group, group_map, silent

    def _joint_cell(
        self,
        sample: BoxSample,
        picture_rgb: np.ndarray,
        joint_map: np.ndarray,
        num_silent: int,
    ) -> Cell:
        boxes = sample.detections.boxes_xyxy[[e.index for e in sample.explanations]]
        image_hw, count = sample.image_rgb.shape[:2], len(boxes)
        boxes = resized_boxes(boxes, image_hw, picture_rgb.shape[:2])
        overlay = self._heat(joint_map, picture_rgb, boxes)
        whose = "the map" if count == 1 else "each box's map"
        how = "divided by its maximum"
        if self.options.norm_in_bbox:
            how = "inside its box divided by its maximum there"
        notes = [
            self._caption,
            f"{whose} {how}",
            "the largest at each pixel" if count > 1 else "",
            _silence(num_silent, count),
        ]
        scale = self._scale(num_silent < count, _UNIT)
        return Cell(overlay, _explained(count), joined(notes), scale)

    def _part(
        self,
        sample: BoxSample,
        group: Sequence[BoxExplanation],
        group_map: np.ndarray,
        panel_hw: tuple[int, int],
        alone: bool,
    ) -> np.ndarray:
        """Part of the image with the heat and the outlines of some boxes."""
        image_h, image_w = image_hw = sample.image_rgb.shape[:2]
        boxes = sample.detections.boxes_xyxy[[e.index for e in group]]
        x1, y1, x2, y2 = 0, 0, image_w, image_h
        if self.options.scope == "box":
            shown = _with_heat(boxes[0], group_map, image_hw) if alone else boxes[0]
            x1, y1, x2, y2 = crop_window(shown, image_hw)
        window_hw = y2 - y1, x2 - x1
        size_hw = panel_size_hw(window_hw, panel_hw)
        crop = resize_image(sample.image_rgb[y1:y2, x1:x2], size_hw)
        to_map = np.array([group_map.shape[1] / image_w, group_map.shape[0] / image_h])
        step = np.array([(x2 - x1) / size_hw[1], (y2 - y1) / size_hw[0]]) * to_map
        # OpenCV counts from the centre of the first pixel.
        start = np.array([x1, y1]) * to_map + 0.5 * step - 0.5
        heat = cv2.warpAffine(
            group_map,
            np.array([[step[0], 0, start[0]], [0, step[1], start[1]]]),
            size_hw[::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        boxes = resized_boxes(boxes - (x1, y1, x1, y1), window_hw, size_hw)
        picture = self._heat(heat, crop, boxes)
        for own in group:
            if own.points is not None:
                places = sample.frame.points_to_image(own.points[:, :2]) - (x1, y1)
                places = places * (size_hw[1] / window_hw[1], size_hw[0] / window_hw[0])
                draw_points(picture, np.column_stack([places, own.points[:, 2]]))
        return picture

    def _heat(
        self, saliency: np.ndarray, image_rgb: np.ndarray, boxes_xyxy: np.ndarray
    ) -> np.ndarray:
        """A map on the grey image, with outlines of boxes."""
        look: dict[str, Any] = dict(alpha=self.options.alpha, colormap=self.colormap)
        if self.options.is_signed:
            overlay = diverge_heatmap(saliency, image_rgb, limit=1, **look)
        else:
            overlay = fade_heatmap(saliency, image_rgb, **look)
        outline_boxes(overlay, boxes_xyxy)
        return overlay

    def _scale(self, has_heat: bool, label: str) -> ColorScale | None:
        low = -1.0 if self.options.is_signed else 0.0
        return ColorScale(self.colormap, low, label=label) if has_heat else None

    def _group_texts(
        self,
        sample: BoxSample,
        group: Sequence[BoxExplanation],
        num_silent: int,
        numbers: Mapping[int, int],
    ) -> tuple[str, str]:
        """Title and note of a box or class."""
        first = group[0]
        name = class_name(int(sample.detections.labels[first.index]), self.class_names)
        notes = [self._caption]
        if self.options.scope == "class":
            if len(group) > 1:
                notes.append("the largest of their maps at each pixel")
            notes.append(_silence(num_silent, len(group)))
            notes += sorted({e.warning for e in group})
            return f"{name} ({count_boxes(len(group))})", joined(notes)
        title = f"{name} {sample.detections.scores[first.index]:.2f}"
        if first.index in numbers:
            title += f" #{numbers[first.index]}"
        notes += self._layer_notes(sample, first)
        notes.append("" if first.points is None else "white: where its query sampled")
        notes.append(first.warning or (self._why_silent(first) if num_silent else ""))
        return title, joined(notes)

    def _layer_notes(self, sample: BoxSample, explanation: BoxExplanation) -> list[str]:
        """Layers with their sizes, and the range of the maps as they came."""
        maps = explanation.maps
        if not maps:
            return []
        layers = ", ".join(f"{m.layer} {cells_text(m.saliency.shape)}" for m in maps)
        lows, highs = zip(*(saliency_range(m.saliency, sample.frame) for m in maps))
        # What three digits of the high do not show is 0.
        low = 0.0 if abs(min(lows)) < 5e-4 * max(highs) else min(lows)
        shown = f"{low:.3g} to {max(highs):.3g}".replace(" ", NO_BREAK)
        if len(maps) == 1:
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


def _with_heat(
    box_xyxy: np.ndarray, saliency: np.ndarray, image_hw: tuple[int, int]
) -> np.ndarray:
    """A box of the image, widened to hold what is strong in its map."""
    rows, columns = np.nonzero(np.abs(saliency) >= 0.5)
    if not len(rows):
        return box_xyxy
    heat = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    heat = resized_boxes(heat, saliency.shape, image_hw)
    low, high = np.minimum(box_xyxy, heat), np.maximum(box_xyxy, heat)
    return np.array([low[0], low[1], high[2], high[3]])


def _keep_larger(joint: np.ndarray, other: np.ndarray) -> None:
    """Put into a map what is larger in size in another."""
    np.copyto(joint, other, where=np.abs(other) > np.abs(joint))


def _explained(count: int) -> str:
    return f"{count} explained {'box' if count == 1 else 'boxes'}"


def _silence(number: int, total: int) -> str:
    """How many of some boxes have a map that is zero everywhere."""
    if not number:
        return ""
    if total == 1:
        return "without influence"
    return f"{number} of {count_boxes(total)} without influence"
