"""Lays pictures with captions out in a grid; no cell is ever dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .text import (
    MIN_FONT_SIZE,
    draw_text,
    line_height,
    text_mask,
    text_width,
    wrap_text,
)

MIN_CELL_SIZE = 320
"""Longest side, in pixels, that a small image is enlarged to."""

_BACKGROUND = 255  # a colour of three parts would be filled ten times slower
_EMPTY_TILE = (236, 238, 241)
_TITLE_COLOR = (28, 32, 38)
_NOTE_COLOR = (92, 100, 110)
_MIN_COLUMN_WIDTH = 200
_GOOD_ASPECT = 1.8


@dataclass(frozen=True)
class Cell:
    """One picture of a grid.

    Attributes:
        image_rgb: ``(H, W, 3)`` uint8, RGB.
        title: First line of the caption, bold.
        note: Second line of the caption.
    """

    image_rgb: np.ndarray
    title: str = ""
    note: str = ""


def cell_size_hw(
    image_hw: tuple[int, int],
    max_cell_size: int = 1024,
    min_cell_size: int = MIN_CELL_SIZE,
) -> tuple[int, int]:
    """Size at which an image is drawn in a grid.

    Args:
        image_hw (tuple): Height and width of the image, pixels.
        max_cell_size (int): A larger image is reduced to this longest side.
            Defaults to 1024.
        min_cell_size (int): A smaller image is enlarged to this longest side,
            unless ``max_cell_size`` is less. Defaults to 320.

    Returns:
        tuple[int, int]: Height and width with the image's proportions.
    """
    long_side = max(image_hw)
    target = min(max(long_side, min_cell_size), max_cell_size)
    height, width = (max(1, round(n * target / long_side)) for n in image_hw)
    return height, width


def resize_image(image_rgb: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize an image without aliasing.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8.
        size_hw (tuple): New height and width, pixels.

    Returns:
        np.ndarray: ``size_hw + (3,)`` uint8; the same array if nothing changes.
    """
    height, width = image_rgb.shape[:2]
    if (height, width) == tuple(size_hw):
        return image_rgb
    shrinks = size_hw[0] * size_hw[1] < height * width
    return cv2.resize(
        image_rgb,
        (size_hw[1], size_hw[0]),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC,
    )


def tile_block(
    tiles: Sequence[np.ndarray],
    labels: Sequence[str],
    arrangement: tuple[int, int],
    gap: int = 4,
) -> np.ndarray:
    """Put tiles of one size into rows, each with a label in its corner.

    Args:
        tiles (Sequence[np.ndarray]): ``(H, W, 3)`` uint8, RGB, equal sizes. They
            are not modified.
        labels (Sequence[str]): One for each tile, '' for none.
        arrangement (tuple): Rows and columns; places without a tile stay grey.
        gap (int): White pixels between tiles. Defaults to 4.

    Returns:
        np.ndarray: ``(rows * H + gaps, columns * W + gaps, 3)`` uint8, RGB.

    Raises:
        ValueError: If the tiles do not fit.
    """
    rows, columns = arrangement
    if not 0 < len(tiles) <= rows * columns or len(labels) != len(tiles):
        raise ValueError(
            f"{len(tiles)} tiles with {len(labels)} labels do not fit {arrangement}"
        )
    height, width = tiles[0].shape[:2]
    shape = (
        rows * height + (rows - 1) * gap,
        columns * width + (columns - 1) * gap,
        3,
    )
    block = np.full(shape, 255, dtype=np.uint8)
    for place in range(rows * columns):
        y = place // columns * (height + gap)
        x = place % columns * (width + gap)
        region = block[y : y + height, x : x + width]
        if place < len(tiles):
            region[:] = tiles[place]
            _draw_tile_label(region, labels[place])
        else:
            region[:] = _EMPTY_TILE
    return block


def _draw_tile_label(tile: np.ndarray, label: str) -> None:
    """White on a dark chip that is kept inside the tile."""
    if not label:
        return
    height, width = tile.shape[:2]
    size = int(np.clip(round(max(height, width) / 28), 10, 40))
    while size > MIN_FONT_SIZE and text_width(label, size) > width - size:
        size -= 1
    pad = max(2, size // 3)
    x2 = min(width, text_width(label, size) + 2 * pad)
    y2 = min(height, line_height(size))
    chip = tile[:y2, :x2]
    chip[:] = (chip.astype(np.uint16) // 4).astype(np.uint8)
    draw_text(tile, label, (pad, 0), size=size, color=(255, 255, 255))


def grid_arrangement(count: int, cell_hw: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    """Rows and columns for a number of cells.

    Args:
        count (int): Number of cells, 1 or more.
        cell_hw (tuple): Height and width of the largest cell.

    Returns:
        tuple[int, int]: The smallest grids for all cells whose proportions suit a
        screen: ``(2, 3)`` for five square cells.
    """

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        aspect = columns * cell_hw[1] / (rows * cell_hw[0])
        empty = (rows * columns - count) / count
        return abs(math.log(aspect / _GOOD_ASPECT)) + empty

    columns = min(range(1, count + 1), key=cost)
    return math.ceil(count / columns), columns


def montage(
    cells: Sequence[Cell], arrangement: tuple[int, int] | None = None
) -> np.ndarray:
    """Lay cells out by rows, captions above the pictures.

    A column is as wide as its widest cell, a row as high as its highest caption
    and its highest picture. A caption that is too wide for its column is wrapped.

    Args:
        cells (Sequence[Cell]): One or more; sizes may differ. Their pictures are
            not modified.
        arrangement (tuple, optional): Rows and columns. Defaults to None, what
            suits a screen.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError: If there are no cells, or more than the arrangement holds.

    Examples:
        >>> picture = np.zeros((60, 80, 3), dtype=np.uint8)
        >>> montage([Cell(picture, f'layer {i}') for i in range(5)]).ndim
        3
    """
    if not cells:
        raise ValueError("a montage needs at least one cell")
    largest_hw = (
        max(cell.image_rgb.shape[0] for cell in cells),
        max(cell.image_rgb.shape[1] for cell in cells),
    )
    rows, columns = arrangement or grid_arrangement(len(cells), largest_hw)
    if len(cells) > rows * columns:
        raise ValueError(
            f"{len(cells)} cells do not fit {rows} rows of {columns} columns"
        )
    # Left-over columns of a short only row would be white.
    columns = min(columns, len(cells)) if rows == 1 else columns

    widths = [
        max(
            [_MIN_COLUMN_WIDTH]
            + [cell.image_rgb.shape[1] for cell in cells[column::columns]]
        )
        for column in range(columns)
    ]
    gutter = int(np.clip(round(max(largest_hw) / 40), 8, 28))
    # Tall, narrow pictures leave little room for a line.
    size = int(np.clip(round(min(max(largest_hw), 2 * max(widths)) / 44), 12, 24))
    in_column = [(cell, widths[i % columns]) for i, cell in enumerate(cells)]
    title_size = _common_size([(c.title, w) for c, w in in_column], size, True)
    note_size = _common_size(
        [(c.note, w) for c, w in in_column], round(size * 0.82), False
    )
    grid = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    captions = [
        [
            _caption(cell, width, title_size, note_size)
            for cell, width in zip(row, widths)
        ]
        for row in grid
    ]
    caption_heights = [max(c.shape[0] for c in row) for row in captions]
    image_heights = [max(cell.image_rgb.shape[0] for cell in row) for row in grid]

    height = sum(caption_heights) + sum(image_heights) + gutter * (len(grid) + 1)
    width = sum(widths) + gutter * (columns + 1)
    panel = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)
    y = gutter
    for row, row_captions, caption_height, image_height in zip(
        grid, captions, caption_heights, image_heights
    ):
        x = gutter
        for cell, caption, column_width in zip(row, row_captions, widths):
            # Captions stand on their picture, however many lines the others have.
            top = y + caption_height
            panel[top - caption.shape[0] : top, x : x + column_width] = caption
            image_h, image_w = cell.image_rgb.shape[:2]
            panel[top : top + image_h, x : x + image_w] = cell.image_rgb
            x += column_width + gutter
        y += caption_height + image_height + gutter
    return panel


def _caption(cell: Cell, width: int, title_size: int, note_size: int) -> np.ndarray:
    """``(h, width, 3)`` picture of a caption; ``h`` is 0 without text."""
    lines = [
        (line, size, bold, color)
        for text, size, bold, color in (
            (cell.title, title_size, True, _TITLE_COLOR),
            (cell.note, note_size, False, _NOTE_COLOR),
        )
        for line in wrap_text(text, width, size, bold)
    ]
    if not lines:
        return np.full((0, width, 3), 255, dtype=np.uint8)
    heights = [text_mask(line, s, bold).shape[0] for line, s, bold, _ in lines]
    below = max(3, title_size // 3)
    caption = np.full((sum(heights) + below, width, 3), _BACKGROUND, dtype=np.uint8)
    y = 0
    for (line, size, bold, color), height in zip(lines, heights):
        draw_text(caption, line, (0, y), size=size, color=color, bold=bold)
        y += height
    return caption


def _common_size(texts: Sequence[tuple[str, int]], size: int, bold: bool) -> int:
    """One font size for texts with their widths: a little smaller if that puts
    each on one line, otherwise the wanted size, to be wrapped."""
    for smaller in range(size, max(MIN_FONT_SIZE, round(size * 0.8)) - 1, -1):
        if all(text_width(text, smaller, bold) <= width for text, width in texts):
            return smaller
    return size
