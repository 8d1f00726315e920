"""Pictures for tests of drawing, and what can be seen in them."""

from __future__ import annotations

import numpy as np


def photo(height: int, width: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(height: int, width: int, color) -> np.ndarray:
    return np.full((height, width, 3), color, dtype=np.uint8)


def pixels_of(image: np.ndarray, color) -> np.ndarray:
    return (image == color).all(axis=2)


def is_grey(image_rgb: np.ndarray) -> np.ndarray:
    return (image_rgb == image_rgb[..., :1]).all(axis=2)


def contains(panel: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture is somewhere on the panel, pixel by pixel."""
    height, width = picture.shape[:2]
    return any(
        np.array_equal(panel[y : y + height, x : x + width], picture)
        for y, x in np.argwhere(pixels_of(panel, picture[0, 0]))
    )
