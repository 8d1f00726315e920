"""Where the panels of boxes lie in a picture, and what part of the image they show."""

from __future__ import annotations

import math

import numpy as np

from .montage import MIN_COLUMN_WIDTH, gap_cost

# A panel of a box: twice the box, but not less than this share of the image.
_CONTEXT = 2.0
_MIN_WINDOW_SHARE = 0.18
_MAX_WINDOW_ASPECT = 2.0
_MIN_PANEL_WIDTH = 200
_MAX_COLUMNS = 8
# Of the whole picture; a guess at the height of a caption is good enough for it.
_GOOD_ASPECT = 1.4
_CAPTION_HEIGHT = 50


def panel_layout(
    count: int, picture_hw: tuple[int, int], gutter: int, max_cell_size: int
) -> tuple[int, tuple[int, int]]:
    """How many panels stand in a row below two large pictures, and their size.

    They fill the width of both pictures and suit a screen; a single one is as large as
    a picture.
    """
    picture_h, picture_w = picture_hw
    if count < 2:
        return 1, picture_hw
    aspect = _window_aspect(picture_hw)
    inner = max(picture_w, MIN_COLUMN_WIDTH) + gutter + picture_w
    layouts: list[tuple[float, int, tuple[int, int]]] = []
    for columns in range(2, min(count, _MAX_COLUMNS) + 1):
        width = (inner - (columns - 1) * gutter) // columns
        if width < _MIN_PANEL_WIDTH and layouts:
            break
        panel_w = max(1, min(width, max_cell_size, round(max_cell_size * aspect)))
        panel_h = max(1, round(panel_w / aspect))
        rows = math.ceil(count / columns)
        height = picture_h + rows * (panel_h + _CAPTION_HEIGHT)
        cost = abs(math.log(inner / height / _GOOD_ASPECT)) + gap_cost(count, columns)
        layouts.append((cost, columns, (panel_h, panel_w)))
    return min(layouts)[1:]


def panel_size_hw(
    window_hw: tuple[int, int], panel_hw: tuple[int, int]
) -> tuple[int, int]:
    """Size at which a part of the image is drawn: as large as there is room."""
    scale = min(room / size for room, size in zip(panel_hw, window_hw))
    height, width = (max(1, round(size * scale)) for size in window_hw)
    # Windows are whole pixels; panels that differ by one would look careless.
    if height > 0.98 * panel_hw[0] and width > 0.98 * panel_hw[1]:
        return panel_hw
    return height, width


def crop_window(
    box_xyxy: np.ndarray, image_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The part of an image that shows a box, ``(4,)``, with what is around it.

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
