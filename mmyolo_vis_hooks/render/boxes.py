"""Draws detections: boxes with class names and scores."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from ..records import Detections
from .text import (
    draw_text,
    is_drawable,
    line_height,
    shorten_text,
    text_width,
)

Color = tuple[int, int, int]

# Hues that people tell apart; more classes continue by the golden angle.
_FIRST_COLORS: tuple[Color, ...] = (
    (230, 57, 70),
    (42, 157, 244),
    (76, 175, 80),
    (255, 183, 3),
    (155, 93, 229),
    (0, 187, 182),
    (251, 111, 28),
    (241, 91, 181),
    (148, 203, 28),
    (99, 102, 241),
    (176, 112, 60),
    (120, 144, 156),
)
_GOLDEN_RATIO = 0.6180339887


def class_color(label: int, palette: Sequence[Sequence[int]] | None = None) -> Color:
    """Colour of a class.

    Args:
        label (int): Index of the class.
        palette (Sequence, optional): RGB of each class, as in a data set's
            ``dataset_meta['palette']``; starts over where it is too short.
            Defaults to None, colours that are easy to tell apart.

    Returns:
        tuple: RGB, 0 to 255.
    """
    if palette is not None and len(palette) > 0:
        red, green, blue = (int(v) for v in palette[label % len(palette)])
        return red, green, blue
    if 0 <= label < len(_FIRST_COLORS):
        return _FIRST_COLORS[label]
    hue = (label * _GOLDEN_RATIO) % 1.0
    lightness = (0.45, 0.6, 0.52)[label % 3]
    red_, green_, blue_ = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return round(red_ * 255), round(green_ * 255), round(blue_ * 255)


def contrast_color(color: Color) -> Color:
    """Black or white, whichever is easier to read on the colour."""
    red, green, blue = (v / 255 for v in color)
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)


def draw_detections(
    image_rgb: np.ndarray,
    detections: Detections,
    *,
    class_names: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    line_width: int | None = None,
    font_size: int | None = None,
) -> np.ndarray:
    """Draw boxes with class names and scores.

    The label of a box stands on its top edge, or under it or in its corner where
    it would leave the image or hide another label; higher scores choose first and
    are drawn last. Boxes are cut off at the image's edge; one that lies outside
    the image or is not finite is left out.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        detections (Detections): In pixels of the image.
        class_names (Sequence[str], optional): A label without a name is drawn as
            its number. Defaults to None.
        palette (Sequence, optional): RGB of each class. Defaults to None, colours
            that are easy to tell apart.
        line_width (int, optional): Pixels. Defaults to None, by the image's size.
        font_size (int, optional): Pixels. Defaults to None, by the image's size.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB, a new array.

    Examples:
        >>> image_rgb = np.zeros((240, 320, 3), dtype=np.uint8)
        >>> found = Detections(
        ...     boxes_xyxy=np.array([[40, 60, 200, 180]], dtype=np.float32),
        ...     scores=np.array([0.9], dtype=np.float32),
        ...     labels=np.array([0]),
        ... )
        >>> draw_detections(image_rgb, found, class_names=['dog']).shape
        (240, 320, 3)
    """
    image = np.array(image_rgb, order="C")
    height, width = image.shape[:2]
    long_side = max(height, width)
    thickness = line_width or max(1, round(long_side / 280))
    size = font_size or int(np.clip(round(7 + long_side / 110), 10, 40))

    order = np.argsort(-detections.scores, kind="stable")
    corners = [_pixels(detections.boxes_xyxy[i], width, height) for i in order]
    shown = [(int(i), box) for i, box in zip(order, corners) if box is not None]
    colors = [class_color(int(detections.labels[i]), palette) for i, _ in shown]
    labels = [
        _label_text(
            class_name(int(detections.labels[i]), class_names),
            float(detections.scores[i]),
            size,
            width,
        )
        for i, _ in shown
    ]
    places = _place_labels([box for _, box in shown], labels, size, (height, width))

    for (_, box), color in zip(reversed(shown), reversed(colors)):
        _draw_box(image, box, color, thickness)
    for place, text, color in zip(reversed(places), reversed(labels), reversed(colors)):
        x1, y1, x2, y2 = place
        image[y1:y2, x1:x2] = color
        draw_text(
            image,
            text,
            (x1 + _padding(size), y1),
            size=size,
            color=contrast_color(color),
            paper=color,
        )
    return image


def _pixels(
    box_xyxy: np.ndarray, width: int, height: int
) -> tuple[int, int, int, int] | None:
    """First and last column and row of a box, None if none is on the image."""
    if not np.isfinite(box_xyxy).all():
        return None
    x1, x2 = sorted((float(box_xyxy[0]), float(box_xyxy[2])))
    y1, y2 = sorted((float(box_xyxy[1]), float(box_xyxy[3])))
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return None
    left, top = max(0, round(x1)), max(0, round(y1))
    right, bottom = min(width, round(x2)) - 1, min(height, round(y2)) - 1
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(left, right), max(top, bottom)


def _draw_box(
    image: np.ndarray, box: tuple[int, int, int, int], color: Color, thickness: int
) -> None:
    """Lines that grow inwards, so that none is cut off at the image's edge."""
    x1, y1, x2, y2 = box
    # A thin line of the opposite brightness keeps the box visible on its own colour.
    if min(x2 - x1, y2 - y1) > 4 * (thickness + 1):
        edge = contrast_color(color)
        cv2.rectangle(
            image,
            (x1 + thickness, y1 + thickness),
            (x2 - thickness, y2 - thickness),
            edge,
            max(1, thickness // 3),
        )
    for step in range(thickness):
        if x1 + step > x2 - step or y1 + step > y2 - step:
            break
        cv2.rectangle(image, (x1 + step, y1 + step), (x2 - step, y2 - step), color, 1)


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Name of a class as it is drawn: its number where no font has the name.

    Args:
        label (int): Index of the class.
        class_names (Sequence[str], optional): The names.
    """
    if class_names is not None and 0 <= label < len(class_names):
        name = str(class_names[label])
        if is_drawable(name):
            return name
    return f"class {label}"


def _padding(size: int) -> int:
    return max(2, size // 5)


def _label_text(name: str, score: float, size: int, width: int) -> str:
    """Name and score, at most as wide as the image; the name is cut first."""
    room = width - 2 * _padding(size)
    number = f" {score:.2f}"
    text = name + number
    if text_width(text, size) <= room:
        return text
    name_room = room - text_width(number, size)
    return (shorten_text(name, name_room, size) + number).strip()


def _place_labels(
    boxes: Sequence[tuple[int, int, int, int]],
    labels: Sequence[str],
    size: int,
    image_hw: tuple[int, int],
) -> list[tuple[int, int, int, int]]:
    """Rectangles of the labels (x1, y1, x2, y2), all within the image."""
    image_height, image_width = image_hw
    places: list[tuple[int, int, int, int]] = []
    taken = np.zeros((len(boxes), 4))
    height = min(line_height(size), image_height)
    for index, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels)):
        width = min(text_width(label, size) + 2 * _padding(size), image_width)
        candidates = (
            (x1, y1 - height),
            (x1, y1),
            (x2 + 1 - width, y1 - height),
            (x1, y2 + 1),
            (x1, y2 + 1 - height),
            (x2 + 1 - width, y2 + 1),
        )
        best, least = None, np.inf
        for rank, (x, y) in enumerate(candidates):
            x = min(max(x, 0), image_width - width)
            inside_y = min(max(y, 0), image_height - height)
            place = (x, inside_y, x + width, inside_y + height)
            # A label that had to be pushed inside is no better than one that is.
            cost = _overlap(place, taken[:index]) + 1e-3 * rank + 0.01 * (y != inside_y)
            if cost < least:
                best, least = place, cost
            if least < 1e-3:
                break
        assert best is not None
        places.append(best)
        taken[index] = best
    return places


def _overlap(place: tuple[int, int, int, int], taken: np.ndarray) -> float:
    """Share of the place that the taken rectangles cover."""
    if len(taken) == 0:
        return 0.0
    x1, y1, x2, y2 = place
    widths = np.minimum(taken[:, 2], x2) - np.maximum(taken[:, 0], x1)
    heights = np.minimum(taken[:, 3], y2) - np.maximum(taken[:, 1], y1)
    covered = np.clip(widths, 0, None) * np.clip(heights, 0, None)
    return float(covered.sum()) / max(1, (x2 - x1) * (y2 - y1))
