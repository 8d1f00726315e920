"""Draws detections: boxes with class names and scores."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..records import Detections, name_of
from .text import draw_text, is_drawable, line_height, shorten_text, text_width

Color = tuple[int, int, int]

# Hues that people tell apart; more classes continue by the golden angle.
_FIRST_COLORS = tuple(map(bytes.fromhex, (
    "e63946", "2a9df4", "4caf50", "ffb703", "9b5de5", "00bbb6",
    "fb6f1c", "f15bb5", "94cb1c", "6366f1", "b0703c", "78909c",
)))  # fmt: skip
_GOLDEN_RATIO = 0.6180339887
# What all labels together may cover of the picture, and of a box.
_LABELS_SHARE = 0.2
_COVER_SHARE = 0.4
# The share of another box that is worth a place further down the list.
_RANK_COST = 0.02


def class_color(label: int, palette: Sequence[Sequence[int]] | None = None) -> Color:
    """RGB of a class, 0 to 255.

    A palette, as in a data set's ``dataset_meta``, starts over where it is too short;
    without one, colours are easy to tell apart.
    """
    if palette is None or len(palette) == 0:
        palette = _FIRST_COLORS
        if label >= len(palette):
            hue, lightness = (label * _GOLDEN_RATIO) % 1.0, (0.45, 0.6, 0.52)[label % 3]
            rgb = colorsys.hls_to_rgb(hue, lightness, 0.75)
            palette = [[round(v * 255) for v in rgb]]
    red, green, blue = palette[label % len(palette)]
    return int(red), int(green), int(blue)


def contrast_color(color: Color) -> Color:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (v / 255 for v in color)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Name of a class as it is drawn: its number where no font has the name."""
    name = str(name_of(label, class_names or ()))
    return name if is_drawable(name) else name_of(label, ())


@dataclass(frozen=True)
class LabeledBox:
    """A box that is to be drawn.

    Attributes:
        box_xyxy: ``(4,)``, pixels of the image.
        name: What its label begins with; shortened where there is no room.
        tail: What its label ends with.
        color: Of its lines and label.
        faint: Whether it has thin lines and a pale, small label, below the others.
    """

    box_xyxy: np.ndarray
    name: str
    tail: str
    color: Color
    faint: bool = False


@dataclass(frozen=True)
class _Box:
    """A box as it is drawn: first and last column and row, line and label."""

    corners: tuple[int, int, int, int]
    label: LabeledBox
    line_width: int
    font_size: int
    paper: Color


def draw_detections(
    image_rgb: np.ndarray,
    detections: Detections,
    shown: Iterable[int] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    numbers: Mapping[int, int] | None = None,
    faint: Collection[int] = (),
) -> np.ndarray:
    """Draw boxes with class names and scores, as :func:`draw_boxes` does.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        detections (Detections): In pixels of the image; the highest score is first.
        shown (Iterable[int], optional): Indices of those that are drawn; None for all.
        class_names, palette: See :func:`class_name` and :func:`class_color`.
        numbers (Mapping[int, int], optional): Number that the label of a detection
            ends with, by its index.
        faint (Collection[int]): Indices of detections that are drawn faintly.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB, a new array.
    """
    indices = range(len(detections)) if shown is None else shown
    numbers = numbers or {}
    boxes = []
    for i in sorted(indices, key=lambda i: -detections.scores[i]):
        label = int(detections.labels[i])
        tail = f" {float(detections.scores[i]):.2f}"
        tail += f" #{numbers[i]}" if i in numbers else ""
        name, color = class_name(label, class_names), class_color(label, palette)
        box = LabeledBox(detections.boxes_xyxy[i], name, tail, color, i in faint)
        boxes.append(box)
    return draw_boxes(image_rgb, boxes)


def draw_boxes(image_rgb: np.ndarray, boxes: Iterable[LabeledBox]) -> np.ndarray:
    """Draw boxes with labels.

    The label of a box stands on its top edge, or in a corner, under it or beside it.
    No label covers another one, and all of them together cover at most two fifths of
    a box and a fifth of the image: a label that finds no such place is left out.
    The first boxes choose first and are drawn last. Boxes are cut off at the image's
    edge; one that lies outside the image or is not finite is left out.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        boxes (Iterable[LabeledBox]): The most important ones first.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB, a new array.
    """
    image = np.array(image_rgb, order="C")
    image_hw = image.shape[:2]
    width = max(1, round(max(image_hw) / 280))
    size = int(np.clip(round(7 + max(image_hw) / 110), 10, 40))
    placed = []
    for own in sorted(boxes, key=lambda own: own.faint):
        corners = _pixels(own.box_xyxy, image_hw)
        if corners is None:
            continue
        look = width, size, own.color
        if own.faint:
            red, green, blue = ((value + 255) // 2 for value in own.color)
            look = max(1, width // 3), max(9, size * 3 // 4), (red, green, blue)
        placed.append(_Box(corners, own, *look))
    labels = _place_labels(placed, image_hw)
    for box in reversed(placed):
        x1, y1, x2, y2 = box.corners
        width, color = box.line_width, box.label.color
        # A thin line of the opposite brightness keeps a box visible on its own colour.
        if box.paper == color and min(x2 - x1, y2 - y1) > 4 * (width + 1):
            inner = range(width, width + max(1, width // 3))
            _draw_lines(image, box.corners, contrast_color(color), inner)
        _draw_lines(image, box.corners, color, range(width))
    for box, place, text in reversed(labels):
        x1, y1, x2, y2 = place
        image[y1:y2, x1:x2] = box.paper
        ink, x = contrast_color(box.paper), x1 + _padding(box.font_size)
        draw_text(image[:, :x2], text, (x, y1), size=box.font_size, color=ink)
    return image


def _pixels(
    box_xyxy: np.ndarray, image_hw: tuple[int, ...]
) -> tuple[int, int, int, int] | None:
    """First and last column and row of a box, None if none is on the image."""
    corners = np.asarray(box_xyxy, float).reshape(2, 2)
    low, high, size = corners.min(axis=0), corners.max(axis=0), image_hw[::-1]
    if not (np.isfinite(corners).all() and (high > 0).all() and (low < size).all()):
        return None
    first = np.clip(np.rint(low), 0, np.array(size) - 1).astype(int)
    last = np.maximum(first, np.minimum(np.rint(high), size) - 1).astype(int)
    return (*first.tolist(), *last.tolist())


def _draw_lines(
    image: np.ndarray,
    corners: tuple[int, int, int, int],
    color: Color,
    steps: Iterable[int],
) -> None:
    """Lines that grow inwards, so that none is cut off at the image's edge."""
    x1, y1, x2, y2 = corners
    for step in steps:
        if x1 + step <= x2 - step and y1 + step <= y2 - step:
            first, last = (x1 + step, y1 + step), (x2 - step, y2 - step)
            cv2.rectangle(image, first, last, color, 1)


def outline_boxes(
    image_rgb: np.ndarray,
    boxes_xyxy: Iterable[np.ndarray],
    color: Color = (255, 255, 255),
    width: int | None = None,
) -> None:
    """Draw boxes, in place: white, which no colour map of heat is, edged in black.

    What is off the image or not finite is left out. Without ``width``, in pixels, lines
    are as thin as the image allows.
    """
    image_hw = image_rgb.shape[:2]
    width = width or max(1, round(max(image_hw) / 450))
    corners = [c for c in (_pixels(box, image_hw) for box in boxes_xyxy) if c]
    # All edges first: none may cross out the line of a neighbour.
    for line, steps in (((0, 0, 0), (-1, width)), (color, range(width))):
        for box in corners:
            _draw_lines(image_rgb, box, line, steps)


def _padding(font_size: int) -> int:
    return max(2, font_size // 5)


def _place_labels(
    boxes: Sequence[_Box], image_hw: tuple[int, ...]
) -> list[tuple[_Box, tuple[int, int, int, int], str]]:
    """Boxes with the rectangle (x1, y1, x2, y2) and text of their label, if any."""
    image_h, image_w = image_hw
    room = _LABELS_SHARE * image_h * image_w
    edges = np.array([box.corners for box in boxes]).reshape(-1, 4)
    edges[:, 2:] += 1
    covered, taken = np.zeros(len(boxes)), np.zeros((0, 4), int)
    labels = []
    for index, box in enumerate(boxes):
        height, padding = line_height(box.font_size), 2 * _padding(box.font_size)
        tail_w = text_width(box.label.tail, box.font_size)
        # Longer than its box, a name must not run through the whole image.
        box_w = box.corners[2] - box.corners[0]
        most = min(image_w, max(box_w, image_w // 2, 20 * box.font_size))
        name = shorten_text(box.label.name, most - padding - tail_w, box.font_size)
        text = (name + box.label.tail).strip()
        width = text_width(text, box.font_size) + padding
        if width * height > room:
            continue
        best, least = None, np.inf
        places = _candidates(box.corners, width, height, image_w)
        for rank, (x, y) in enumerate(places):
            place = (x, y, x + width, y + height)
            if x < 0 or y < 0 or place[2] > image_w or place[3] > image_h:
                continue
            shares = covered + _covered_shares(place, edges)
            if shares.max() > _COVER_SHARE or _covered_shares(place, taken).any():
                continue
            cost = np.delete(shares, index).max(initial=0.0) + _RANK_COST * rank
            if cost < least:
                best, least = place, cost
        if best is not None:
            labels.append((box, best, text))
            taken = np.vstack([taken, best])
            covered += _covered_shares(best, edges)
            room -= width * height
    return labels


def _candidates(
    corners: tuple[int, int, int, int], width: int, height: int, image_w: int
) -> list[tuple[int, int]]:
    """Where the top left corner of a label may be, the best place first."""
    x1, y1, x2, y2 = corners
    left, right = min(x1, image_w - width), max(0, x2 + 1 - width)
    above, top, bottom, below = y1 - height, y1, y2 + 1 - height, y2 + 1
    return [
        (left, above), (left, top), (right, above), (right, top),
        (left, below), (right, below), (left, bottom), (right, bottom),
        (x2 + 1, top), (x1 - width, top),
    ]  # fmt: skip


def _covered_shares(place: tuple[int, ...], rectangles: np.ndarray) -> np.ndarray:
    """Share of each rectangle that a place covers."""
    x1, y1, x2, y2 = place
    left, top, right, bottom = rectangles.T
    widths = np.clip(np.minimum(right, x2) - np.maximum(left, x1), 0, None)
    heights = np.clip(np.minimum(bottom, y2) - np.maximum(top, y1), 0, None)
    return widths * heights / ((right - left) * (bottom - top))
