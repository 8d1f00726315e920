"""Draws a diagnosis: hits, misses and false positives, and why each error is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ..records import Detections
from ..render.box_layout import crop_window
from ..render.boxes import Color, class_name, draw_detections, outline_boxes
from ..render.heatmap import fade_heatmap
from ..render.montage import Cell, cell_size_hw, gutter_of, montage, resize_image
from ..render.panel import joined, resized_boxes

if TYPE_CHECKING:
    from .diagnose import Diagnosis, FalsePositive, Missed
    from .maps import ErrorMap

# Colours that people tell apart whatever their sight.
_HIT, _MISSED, _FALSE = (44, 160, 80), (255, 176, 0), (220, 38, 127)
_CANDIDATE = (255, 255, 255)
ROLE_COLORS = dict(missed=_MISSED, found=_HIT, detection=_FALSE, candidate=_CANDIDATE)
"""Colours of boxes, by what :class:`~.report.ErrorRecord` says that they are."""
_LEAST_SIZE, _MOST_SIZE, _COLUMNS = 780, 1200, 3
_LINE_WIDTH = 3  # in a panel: a thinner line does not show its colour


def draw_diagnosis(diagnosis: Diagnosis, max_panels: int = 12) -> np.ndarray:
    """The image with all boxes, then a panel for each error.

    Found objects are green, missed ones amber with the reason, false positives magenta
    with their kind. A panel shows the part of the image around its error in the same
    colours, a missed object's best candidate in white, and the map where there is one.

    Args:
        diagnosis (Diagnosis): What is drawn.
        max_panels (int): At most so many panels, those with a map first.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB.
    """
    errors = [(own.map, partial(_missed, diagnosis, own)) for own in diagnosis.missed]
    errors += [
        (own.map, partial(_false, diagnosis, own)) for own in diagnosis.false_positives
    ]
    errors.sort(key=lambda error: error[0] is None)
    cells = [make() for _, make in errors[:max_panels]]
    first = _overview(diagnosis, len(errors), len(cells))
    if not cells:
        return montage([first])
    gutter = gutter_of(first.image_rgb.shape[:2])
    rows = [montage([first], gutter=gutter), montage(cells, _COLUMNS, gutter=gutter)]
    width = max(row.shape[1] for row in rows)
    gaps = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(r, g, constant_values=255) for r, g in zip(rows, gaps)]
    return np.concatenate(padded)


def _overview(diagnosis: Diagnosis, num_errors: int, num_panels: int) -> Cell:
    found, truth = diagnosis.detections, diagnosis.truth
    kinds = {f.record.detection: f.kind for f in diagnosis.false_positives}
    boxes: list[np.ndarray] = []
    names: list[str] = []
    tails: list[str] = []
    colors: list[Color] = []
    faint: list[int] = []
    for index, box in enumerate(found.boxes_xyxy):
        if index not in kinds:
            faint.append(len(boxes))
        boxes.append(box)
        names.append(class_name(int(found.labels[index]), diagnosis.class_names))
        tails.append(" ".join(["", f"{found.scores[index]:.2f}", kinds.get(index, "")]))
        colors.append(_FALSE if index in kinds else _HIT)
    for missed in diagnosis.missed:
        boxes.append(truth.boxes_xyxy[missed.record.truth])
        names.append(missed.class_name)
        tails.append(f" {missed.mechanism}")
        colors.append(_MISSED)
    image_hw = diagnosis.image_rgb.shape[:2]
    size_hw = _overview_hw(diagnosis)
    count = len(boxes)
    everything = Detections(
        resized_boxes(np.array(boxes, np.float32).reshape(-1, 4), image_hw, size_hw),
        np.linspace(0, 1, count, dtype=np.float32),  # the last are drawn last
        np.arange(count),
    )
    picture = draw_detections(
        resize_image(diagnosis.image_rgb, size_hw),
        everything,
        class_names=names,
        palette=colors,
        tails=[tail.rstrip() for tail in tails],
        faint=faint,
    )
    hits, wrong = len(diagnosis.matches.hits), len(kinds)
    notes = [
        f"{hits} found (green)",
        f"{len(diagnosis.missed)} missed (amber)",
        f"{wrong} false (magenta)",
        f"{num_panels} of these errors below" if num_panels < num_errors else "",
        diagnosis.note,
    ]
    return Cell(picture, diagnosis.image_id, joined(notes))


def _overview_hw(diagnosis: Diagnosis) -> tuple[int, int]:
    """Size of the picture of all boxes; labels need room."""
    return cell_size_hw(diagnosis.image_rgb.shape[:2], _MOST_SIZE, _LEAST_SIZE)


def _missed(diagnosis: Diagnosis, missed: Missed) -> Cell:
    record, boxes = missed.record, [(missed.box_xyxy, _MISSED)]
    if record.other is not None:
        boxes.append((diagnosis.detections.boxes_xyxy[record.other], _FALSE))
    if record.box_xyxy is not None:
        boxes.append((record.box_xyxy, _CANDIDATE))
    title = f"missed {missed.class_name} · {missed.mechanism}"
    return _panel(diagnosis, title, missed.why, missed.map, boxes)


def _false(diagnosis: Diagnosis, false: FalsePositive) -> Cell:
    boxes = [(false.box_xyxy, _FALSE)]
    truth = false.record.truth
    if truth is not None:
        is_missed = truth in diagnosis.matches.missed
        box = diagnosis.truth.boxes_xyxy[truth]
        boxes.append((box, _MISSED if is_missed else _HIT))
    title = f"false {false.class_name} {false.score:.2f} · {false.kind}"
    return _panel(diagnosis, title, false.why, false.map, boxes)


def _panel(
    diagnosis: Diagnosis,
    title: str,
    why: str,
    error_map: ErrorMap | None,
    boxes: Sequence[tuple[np.ndarray, Color]],
) -> Cell:
    image_rgb, image_hw = diagnosis.image_rgb, diagnosis.image_rgb.shape[:2]
    corners = np.stack([box for box, _ in boxes])
    around = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
    x1, y1, x2, y2 = crop_window(around, image_hw)
    crop = image_rgb[y1:y2, x1:x2]
    # Three panels are as wide as the overview, but for its gutters.
    longest = round(0.975 * _overview_hw(diagnosis)[1] / _COLUMNS)
    size_hw = cell_size_hw(crop.shape[:2], longest, longest)
    picture = np.array(resize_image(crop, size_hw))
    note = ""
    if error_map is not None:
        heat = cv2.resize(error_map.saliency[y1:y2, x1:x2], size_hw[::-1])
        picture = fade_heatmap(heat, picture)
        note = f"map at {error_map.layer}, {error_map.inside:.0%} of it inside"
    for box, color in reversed(boxes):  # the one that the panel is about on top
        shifted = box - np.array([x1, y1, x1, y1], np.float32)
        placed = resized_boxes(shifted[None], crop.shape[:2], size_hw)
        outline_boxes(picture, placed, color, _LINE_WIDTH)
    return Cell(picture, title, joined([why, note]))
