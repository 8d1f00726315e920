"""Draws the bar that says which colour means which value."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .heatmap import colormap_lut
from .text import draw_text, line_height, text_width

_EDGE_COLOR = (92, 100, 110)
_TEXT_COLOR = (60, 66, 74)
_TICK = 4


@dataclass(frozen=True)
class ColorScale:
    """What the colours of a map mean.

    Attributes:
        colormap: See :func:`colormap_lut`.
        low: Value of the first colour; None with ``high`` where each of several maps
            has a range of its own.
        high: Value of the last colour.
        label: What the values are.
    """

    colormap: str | int = "plasma"
    low: float | None = 0.0
    high: float | None = 1.0
    label: str = ""


def colorbar(height: int, scale: ColorScale) -> np.ndarray:
    """Draw a vertical bar of a colour map with ticks at both ends and between.

    Ticks for which ``height`` has no room are left out, the middle one first. The
    label is written upwards beside them where the bar is long enough.

    Returns:
        np.ndarray: ``(height, w, 3)`` uint8, RGB, on white. The width does not
        depend on what fits.
    """
    size = int(np.clip(round(height / 26), 11, 15))
    bar_width = int(np.clip(round(height / 28), 7, 16))
    texts = ["max", "", "min"]
    if scale.low is not None and scale.high is not None:
        values = scale.high, (scale.low + scale.high) / 2, scale.low
        texts = [f"{value:.3g}" for value in values]
    text_x = bar_width + _TICK + max(2, size // 5)
    label_x = text_x + max(text_width(text, size) for text in texts)
    line = line_height(size)
    width = label_x + (line if scale.label else 0)
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)

    # The colour of a row is that of its centre.
    levels = np.floor((1 - (np.arange(height) + 0.5) / height) * 256).astype(int)
    canvas[:, :bar_width] = colormap_lut(scale.colormap)[levels]
    cv2.rectangle(canvas, (0, 0), (bar_width - 1, height - 1), _EDGE_COLOR, 1)

    room = height // line
    for place in (0, 1, 2) if room >= 3 else (0, 2) if room == 2 else ():
        if texts[place]:
            middle = round(place * (height - 1) / 2)
            canvas[middle, bar_width : bar_width + _TICK] = _EDGE_COLOR
            xy = text_x, int(np.clip(middle - line // 2, 0, height - line))
            draw_text(canvas, texts[place], xy, size=size, color=_TEXT_COLOR)
    free = height - text_width(scale.label, size)
    if scale.label and free >= 0:
        # A view of the strip that is turned by 90 degrees.
        strip, xy = np.rot90(canvas[:, label_x:], -1), (free // 2, 0)
        draw_text(strip, scale.label, xy, size=size, color=_TEXT_COLOR)
    return canvas
