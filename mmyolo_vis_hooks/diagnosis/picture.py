"""Draws a diagnosis: hits, misses and false positives, and why each error is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np

from ..render.box_layout import crop_window, panel_size_hw
from ..render.boxes import Color, LabeledBox, class_name, draw_boxes, outline_boxes
from ..render.colorbar import ColorScale
from ..render.heatmap import DIVERGING, diverge_heatmap, fade_heatmap
from ..render.montage import Cell, cell_size_hw, gutter_of, montage, resize_image, stack
from ..render.panel import joined, resized_boxes
from .mechanisms import SUPPRESSED

if TYPE_CHECKING:
    from .contrast import ClassContrast
    from .maps import ErrorMap
    from .result import Diagnosis, FalsePositive, Missed

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
    told = {id(false.contrast) for false in diagnosis.false_positives}
    errors = [
        (
            own.map or own.contrast,
            partial(_missed, diagnosis, own, id(own.contrast) in told),
        )
        for own in diagnosis.missed
    ]
    errors += [
        (own.map, partial(_false, diagnosis, own)) for own in diagnosis.false_positives
    ]
    errors.sort(key=lambda error: error[0] is None)
    groups: list[list[Cell]] = []
    room = max_panels
    for _, make in errors:
        if room <= 0:
            break
        group = make()
        if groups and len(group) > room:  # what belongs together is told as one
            break
        groups.append(group[:room])
        room -= len(groups[-1])
    first = _overview(diagnosis, len(errors), len(groups))
    if not groups:
        return montage([first])
    gutter = gutter_of(first.image_rgb.shape[:2])
    alone = [cell for group in groups if len(group) == 1 for cell in group]
    blocks = [alone, *(group for group in groups if len(group) > 1)]
    rows = [montage([first], gutter=gutter)]
    rows += [montage(cells, _COLUMNS, gutter=gutter) for cells in blocks if cells]
    return stack(rows)


def _overview(diagnosis: Diagnosis, num_errors: int, num_panels: int) -> Cell:
    size_hw = _overview_hw(diagnosis)
    boxes = resized_labels(boxes_of(diagnosis), diagnosis.image_rgb.shape[:2], size_hw)
    picture = draw_boxes(resize_image(diagnosis.image_rgb, size_hw), boxes)
    hits, wrong = len(diagnosis.matches.hits), len(diagnosis.matches.false_alarms)
    others = len(diagnosis.detections) - hits - wrong
    notes = [
        f"{hits} found (green)",
        f"{len(diagnosis.missed)} missed (amber)",
        f"{wrong} false (magenta)",
        f"{others} on ignored objects (green, too)" if others else "",
        f"{num_panels} of these errors below" if num_panels < num_errors else "",
        diagnosis.note,
    ]
    return Cell(picture, diagnosis.image_id, joined(notes))


def boxes_of(diagnosis: Diagnosis, right: Color = _HIT) -> list[LabeledBox]:
    """Missed objects, then detections by index; what is right is faint."""
    found = diagnosis.detections
    kinds = {alarm.detection: alarm.kind for alarm in diagnosis.matches.false_alarms}
    boxes = [
        LabeledBox(own.box_xyxy, own.class_name, f" {own.mechanism}", _MISSED)
        for own in diagnosis.missed
    ]
    for index, box in enumerate(found.boxes_xyxy):
        name = class_name(int(found.labels[index]), diagnosis.class_names)
        tail = f" {found.scores[index]:.2f} {kinds.get(index, '')}".rstrip()
        color, is_right = (_FALSE, False) if index in kinds else (right, True)
        boxes.append(LabeledBox(box, name, tail, color, is_right))
    return boxes


def resized_labels(
    boxes: Sequence[LabeledBox], image_hw: Sequence[int], new_hw: Sequence[int]
) -> list[LabeledBox]:
    """Boxes of an image on a resized copy."""
    corners = np.array([box.box_xyxy for box in boxes], np.float32).reshape(-1, 4)
    resized = resized_boxes(corners, image_hw, new_hw)
    return [replace(box, box_xyxy=xyxy) for box, xyxy in zip(boxes, resized)]


def _overview_hw(diagnosis: Diagnosis) -> tuple[int, int]:
    """Size of the picture of all boxes; labels need room."""
    return cell_size_hw(diagnosis.image_rgb.shape[:2], _MOST_SIZE, _LEAST_SIZE)


_Boxes = Sequence[tuple[np.ndarray, Color]]


def _missed(diagnosis: Diagnosis, missed: Missed, is_told: bool) -> list[Cell]:
    """A missed object, and beside it what took its place."""
    record, found = missed.record, diagnosis.detections
    boxes, other = [(missed.box_xyxy, _MISSED)], record.other
    color = _FALSE
    if other is not None:
        if any(hit.detection == other for hit in diagnosis.matches.hits):
            color = _HIT
        boxes.append((found.boxes_xyxy[other], color))
    title = f"missed {missed.class_name} · {missed.mechanism}"
    if missed.contrast is not None and not is_told:
        return _apart(diagnosis, title, missed.why, missed.contrast, boxes)
    winner = []
    if record.mechanism == SUPPRESSED and other is not None and missed.other_map:
        name = class_name(int(found.labels[other]), diagnosis.class_names)
        heading = f"suppressed by {name} {found.scores[other]:.2f}"
        note, shown = missed.other_map.note, [boxes[1], boxes[0]]
        heat = missed.other_map.saliency
        winner.append(_panel(diagnosis, heading, note, shown, heat))
    if record.box_xyxy is not None:
        boxes.append((record.box_xyxy, _CANDIDATE))
    return [_explained(diagnosis, title, missed.why, boxes, missed.map), *winner]


def _false(diagnosis: Diagnosis, false: FalsePositive) -> list[Cell]:
    """A false positive; of a confused one also what tells the classes apart."""
    boxes = [(false.box_xyxy, _FALSE)]
    truth = false.record.truth
    if truth is not None:
        is_missed = truth in diagnosis.matches.missed
        box = diagnosis.truth.boxes_xyxy[truth]
        boxes.append((box, _MISSED if is_missed else _HIT))
    title = f"false {false.class_name} {false.score:.2f} · {false.kind}"
    if false.contrast is not None:
        return _apart(diagnosis, title, false.why, false.contrast, boxes)
    return [_explained(diagnosis, title, false.why, boxes, false.map)]


def _explained(
    diagnosis: Diagnosis, title: str, why: str, boxes: _Boxes, own: ErrorMap | None
) -> Cell:
    if own is None:
        return _panel(diagnosis, title, why, boxes)
    return _panel(diagnosis, title, joined([why, own.note]), boxes, own.saliency)


def _apart(
    diagnosis: Diagnosis, title: str, why: str, own: ClassContrast, boxes: _Boxes
) -> list[Cell]:
    """What speaks for each of two classes, and their difference."""
    given, right = repr(own.given_name), repr(own.right_name)
    limit = float(np.abs(own.difference).max())
    difference = _panel(
        diagnosis,
        f"{right} minus {given}",
        f"their logits there: red speaks for {right}, blue for {given}",
        boxes,
        own.difference,
        limit=limit,
    )
    scale = ColorScale(DIVERGING, -limit, limit, "logits per cell")
    return [
        _panel(
            diagnosis,
            title,
            joined([why, f"what speaks for {given} at {own.layer}"]),
            boxes,
            own.given,
        ),
        _panel(
            diagnosis,
            f"{right} in its place",
            f"what speaks for {right} at {own.layer}, on the same scale",
            boxes,
            own.right,
        ),
        replace(difference, scale=scale),
    ]


def _panel(
    diagnosis: Diagnosis,
    title: str,
    note: str,
    boxes: _Boxes,
    heat: np.ndarray | None = None,
    *,
    limit: float | None = None,
) -> Cell:
    """Part of the image around boxes, with a map; with a limit one of any sign."""
    image_rgb, image_hw = diagnosis.image_rgb, diagnosis.image_rgb.shape[:2]
    corners = np.stack([box for box, _ in boxes])
    around = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
    x1, y1, x2, y2 = crop_window(around, image_hw)
    crop = image_rgb[y1:y2, x1:x2]
    # Three panels are as wide as the overview, but for its gutters.
    width = round(0.975 * _overview_hw(diagnosis)[1] / _COLUMNS)
    size_hw = panel_size_hw(crop.shape[:2], (2 * width, width))
    picture = np.array(resize_image(crop, size_hw))
    if heat is not None:
        heat = cv2.resize(heat[y1:y2, x1:x2], size_hw[::-1])
        if limit is None:
            picture = fade_heatmap(heat, picture)
        else:
            picture = diverge_heatmap(heat, picture, limit=limit)
    for box, color in reversed(boxes):  # the one that the panel is about on top
        shifted = box - np.array([x1, y1, x1, y1], np.float32)
        placed = resized_boxes(shifted[None], crop.shape[:2], size_hw)
        outline_boxes(picture, placed, color, _LINE_WIDTH)
    return Cell(picture, title, note)
