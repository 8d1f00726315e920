"""Lays pictures with captions out in a grid; no cell is ever dropped.

All pictures are ``(H, W, 3)`` uint8, RGB, and stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ..errors import VisConfigError
from .colorbar import ColorScale, colorbar
from .text import draw_text, line_height, text_width, wrap_text

MIN_CELL_SIZE = 320
"""Longest side, in pixels, that a small image is enlarged to."""

# The largest picture that is made, and the longest side of a JPEG file.
_MAX_PIXELS = 2**28
_MAX_SIDE = 65_500
_BACKGROUND = 255  # a colour of three parts would be filled ten times slower
_EMPTY_TILE = (236, 238, 241)
_TITLE_COLOR = (28, 32, 38)
_NOTE_COLOR = (92, 100, 110)
MIN_COLUMN_WIDTH = 200
_GOOD_ASPECT = 1.8
_BAR_GAP = 8


@dataclass(frozen=True)
class Cell:
    """One picture of a grid.

    Attributes:
        image_rgb: The picture.
        title: First line of the caption, bold.
        note: Second line of the caption.
        scale: What the colours of its map mean, if it has one.
    """

    image_rgb: np.ndarray
    title: str = ""
    note: str = ""
    scale: ColorScale | None = None


def cell_size_hw(
    image_hw: tuple[int, int],
    max_cell_size: int = 1024,
    min_cell_size: int = MIN_CELL_SIZE,
) -> tuple[int, int]:
    """Size at which an image is drawn in a grid, with its proportions.

    A larger image is reduced to the one longest side, a smaller one enlarged to the
    other; the maximum wins.
    """
    long_side = max(image_hw)
    target = min(max(long_side, min_cell_size), max_cell_size)
    height, width = (max(1, round(n * target / long_side)) for n in image_hw)
    return height, width


def resize_image(image_rgb: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize an image without aliasing."""
    height, width = image_rgb.shape[:2]
    if (height, width) == tuple(size_hw):
        return image_rgb
    shrinks = size_hw[0] * size_hw[1] < height * width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image_rgb, size_hw[::-1], interpolation=interpolation)


def tile_block(
    tiles: Sequence[np.ndarray],
    labels: Sequence[str],
    arrangement: Sequence[int],
    gap: int,
) -> np.ndarray:
    """Put tiles of one size into rows, each with a label in its corner.

    Args:
        tiles (Sequence[np.ndarray]): The pictures.
        labels (Sequence[str]): One for each tile.
        arrangement (Sequence[int]): Rows and columns; places without a tile stay grey.
        gap (int): White pixels between tiles.

    Raises:
        VisConfigError: If nobody could open a block of this size.
    """
    rows, columns = arrangement
    height, width = tiles[0].shape[:2]
    block = _white(
        rows * height + (rows - 1) * gap,
        columns * width + (columns - 1) * gap,
        f"arrangement={tuple(arrangement)} of tiles of {width} x {height} pixels",
    )
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


def _white(height: int, width: int, what: str) -> np.ndarray:
    if height * width > _MAX_PIXELS or max(height, width) > _MAX_SIDE:
        raise VisConfigError(
            f"{what} would be a picture of {width} x {height} pixels; at most "
            f"{_MAX_PIXELS // 10**6} million pixels and {_MAX_SIDE} on a side are "
            "drawn: show fewer or smaller ones"
        )
    return np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)


def _draw_tile_label(tile: np.ndarray, label: str) -> None:
    """White on a dark chip that is kept inside the tile."""
    height, width = tile.shape[:2]
    size = int(np.clip(round(max(height, width) / 28), 10, 40))
    while size > 7 and text_width(label, size) > width - size:
        size -= 1
    pad = max(2, size // 3)
    chip = tile[: line_height(size), : text_width(label, size) + 2 * pad]
    chip //= 4
    draw_text(tile, label, (pad, 0), size=size, color=(255, 255, 255))


def gap_cost(count: int, columns: int) -> float:
    """How bad the gaps of a grid look, to be added to how wrong its proportions are."""
    rows = math.ceil(count / columns)
    alone = columns > 1 and rows > 1 and count % columns == 1
    return 4 * (rows * columns - count) / count + alone


def grid_columns(count: int, cell_hw: tuple[int, int]) -> int:
    """Columns for a number of cells of a size.

    Empty places weigh more than proportions, and no cell is alone in its row.
    """

    def cost(columns: int) -> float:
        aspect = columns * cell_hw[1] / (math.ceil(count / columns) * cell_hw[0])
        return abs(math.log(aspect / _GOOD_ASPECT)) + gap_cost(count, columns)

    return min(range(1, count + 1), key=cost)


def gutter_of(cell_hw: tuple[int, int]) -> int:
    """White pixels around cells of a size."""
    return int(np.clip(round(max(cell_hw) / 40), 8, 28))


def montage(
    cells: Sequence[Cell], columns: int | None = None, *, gutter: int | None = None
) -> np.ndarray:
    """Lay cells out by rows, captions above the pictures.

    A column is as wide as its widest cell, a row as high as its highest caption
    and its highest picture. A caption that is too wide for its column is wrapped.
    Each row whose cells have colour scales ends with one bar; if the scales have
    different ranges, its ends are called so.

    Args:
        cells (Sequence[Cell]): One or more; sizes may differ.
        columns (int, optional): Cells in a row. Defaults to None, what suits a
            screen.
        gutter (int, optional): White pixels around cells. Defaults to None, by the
            size of the cells.

    Raises:
        VisConfigError: If nobody could open a picture of this size.
    """
    heights = [cell.image_rgb.shape[0] for cell in cells]
    largest_hw = (max(heights), max(cell.image_rgb.shape[1] for cell in cells))
    columns = min(columns or grid_columns(len(cells), largest_hw), len(cells))
    gutter = gutter_of(largest_hw) if gutter is None else gutter
    widths = [
        max(MIN_COLUMN_WIDTH, *(c.image_rgb.shape[1] for c in cells[column::columns]))
        for column in range(columns)
    ]
    captions = _captions(cells, widths, largest_hw)
    rows = [
        slice(s, min(s + columns, len(cells))) for s in range(0, len(cells), columns)
    ]
    bars = [_bar_of(cells[row]) for row in rows]
    bar_room = max(0 if bar is None else bar.shape[1] + _BAR_GAP for bar in bars)
    tops, height = [], gutter
    for row in rows:
        tops.append(height + max(caption.shape[0] for caption in captions[row]))
        height = tops[-1] + max(heights[row]) + gutter
    width = sum(widths) + gutter * (columns + 1) + bar_room
    panel = _white(height, width, f"{len(cells)} pictures in {columns} columns")
    for row, top, bar in zip(rows, tops, bars):
        x = gutter
        for cell, caption, width in zip(cells[row], captions[row], widths):
            # Captions stand on their picture, however many lines the others have.
            _paste(panel, caption, (x, top - caption.shape[0]))
            _paste(panel, cell.image_rgb, (x, top))
            bar_x = x + cell.image_rgb.shape[1] + _BAR_GAP
            x += width + gutter
        if bar is not None:
            _paste(panel, bar, (bar_x, top))
    return panel


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures below each other, white beside those that are not as wide."""
    width = max(picture.shape[1] for picture in pictures)
    gaps = [((0, 0), (0, width - own.shape[1]), (0, 0)) for own in pictures]
    padded = [
        np.pad(own, gap, constant_values=_BACKGROUND)
        for own, gap in zip(pictures, gaps)
    ]
    return np.concatenate(padded)


def _paste(canvas: np.ndarray, picture: np.ndarray, xy: tuple[int, int]) -> None:
    x, y = xy
    canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture


def _bar_of(row: Sequence[Cell]) -> np.ndarray | None:
    """The one colour bar of a row, as high as its last picture."""
    scales = {cell.scale for cell in row if cell.scale is not None}
    if not scales:
        return None
    scale = scales.pop()
    if scales:
        scale = replace(scale, low=None, high=None)
    return colorbar(row[-1].image_rgb.shape[0], scale)


def _captions(
    cells: Sequence[Cell], widths: Sequence[int], largest_hw: tuple[int, int]
) -> list[np.ndarray]:
    """``(h, column width, 3)`` picture of each caption; ``h`` is 0 without text."""
    # Tall, narrow pictures leave little room for a line; a wide grid is seen from afar.
    by_cell = min(max(largest_hw), 2 * max(widths)) / 44
    by_grid = min(sum(widths) / 100, max(widths) / 22)
    size = int(np.clip(round(max(by_cell, by_grid)), 14, 24))
    in_column = [(cell, widths[i % len(widths)]) for i, cell in enumerate(cells)]
    titles = _common_size([(c.title, w) for c, w in in_column], size, True)
    notes = _common_size([(c.note, w) for c, w in in_column], round(size * 0.85), False)
    captions = []
    for cell, width in in_column:
        lines = [
            (line, titles, True, _TITLE_COLOR)
            for line in wrap_text(cell.title, width, titles, True)
        ]
        for line in wrap_text(cell.note, width, notes):
            lines.append((line, notes, False, _NOTE_COLOR))
        height = sum(line_height(size) for _, size, _, _ in lines)
        below = max(3, titles // 3) if lines else 0
        caption = np.full((height + below, width, 3), _BACKGROUND, dtype=np.uint8)
        y = 0
        for line, size, bold, color in lines:
            draw_text(caption, line, (0, y), size=size, color=color, bold=bold)
            y += line_height(size)
        captions.append(caption)
    return captions


def _common_size(texts: Sequence[tuple[str, int]], size: int, bold: bool) -> int:
    """A font size that puts texts on one line of their widths, or the wanted one."""
    for smaller in range(size, round(size * 0.9) - 1, -1):
        if all(text_width(text, smaller, bold) <= width for text, width in texts):
            return smaller
    return size
