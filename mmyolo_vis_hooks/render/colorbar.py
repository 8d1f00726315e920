"""Draws the bar that says which colour means which value."""

from __future__ import annotations

import cv2
import numpy as np

from .heatmap import colormap_lut
from .text import draw_text, line_height, text_mask, text_width

_BACKGROUND = 255
_EDGE_COLOR = (92, 100, 110)
_TEXT_COLOR = (60, 66, 74)
_TICK = 4


def colorbar(
    height: int,
    *,
    colormap: str | int = "plasma",
    low: float = 0.0,
    high: float = 1.0,
    label: str = "",
    font_size: int | None = None,
    bar_width: int | None = None,
) -> np.ndarray:
    """Draw a vertical bar of a colour map with ticks at both ends and between.

    Args:
        height (int): Pixels. Where it is too small for three ticks, the middle one
            is left out; where it is too small for two, all are.
        colormap (str | int): See :func:`colormap_lut`. Defaults to ``'plasma'``.
        low (float): Value of the first colour, at the bottom. Defaults to 0.
        high (float): Value of the last colour, at the top. Defaults to 1.
        label (str): What the values are, written upwards beside the ticks where
            the bar is long enough. Defaults to ''.
        font_size (int, optional): Pixels. Defaults to None, by the height.
        bar_width (int, optional): Pixels. Defaults to None, by the height.

    Returns:
        np.ndarray: ``(height, w, 3)`` uint8, RGB, on white. The width does not
        depend on what fits.

    Raises:
        VisConfigError: If nobody knows the colour map.

    Examples:
        >>> colorbar(240, high=0.5).shape[0]
        240
    """
    lut = colormap_lut(colormap)[:, 0]
    size = font_size or int(np.clip(round(height / 26), 9, 15))
    bar_width = bar_width or int(np.clip(round(height / 28), 7, 16))
    values = (high, (low + high) / 2, low)
    texts = [f"{value:.3g}" for value in values]
    text_x = bar_width + _TICK + max(2, size // 5)
    label_x = text_x + max(text_width(text, size) for text in texts)
    width = label_x + (line_height(size) if label else 0)
    canvas = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)

    # The colour of a row is that of its centre.
    levels = np.floor((1 - (np.arange(height) + 0.5) / height) * 256).astype(int)
    canvas[:, :bar_width] = lut[levels][:, None]
    cv2.rectangle(canvas, (0, 0), (bar_width - 1, height - 1), _EDGE_COLOR, 1)

    line = line_height(size)
    room = height // line
    shown = {0, 1, 2} if room >= 3 else {0, 2} if room == 2 else set()
    for place in sorted(shown):
        middle = round(place * (height - 1) / 2)
        canvas[middle, bar_width : bar_width + _TICK] = _EDGE_COLOR
        y = int(np.clip(middle - line // 2, 0, height - line))
        draw_text(canvas, texts[place], (text_x, y), size=size, color=_TEXT_COLOR)
    if label and text_width(label, size) <= height:
        _draw_upwards(canvas[:, label_x:], label, size)
    return canvas


def _draw_upwards(canvas: np.ndarray, label: str, size: int) -> None:
    """Centre a line of text, turned by 90 degrees, in a strip."""
    ink = np.rot90(text_mask(label, size))[:, : canvas.shape[1]]
    top = (canvas.shape[0] - ink.shape[0]) // 2
    share = ink[..., None] / 255.0
    region = canvas[top : top + ink.shape[0], : ink.shape[1]]
    region[:] = np.rint(region * (1 - share) + np.asarray(_TEXT_COLOR) * share)
