"""Maps that look at no detector: what a method has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .faithfulness import random_field
from .metric import Subject
from .pointing_game import box_region

Baseline = Callable[[Subject, tuple[int, int]], np.ndarray | None]


def gaussian(subject: Subject, size_hw: tuple[int, int]) -> np.ndarray:
    """A Gaussian on the box that was found, sigmas a quarter of its sides."""
    x1, y1, x2, y2 = subject.box_xyxy
    along_y, along_x = (
        np.exp(-np.square((np.arange(n) + 0.5 - (a + b) / 2) / ((b - a) / 4)) / 2)
        for n, a, b in zip(size_hw, (y1, x1), (y2, x2))
    )
    return along_y[:, None] * along_x[None]


def uniform(subject: Subject, size_hw: Sequence[int]) -> np.ndarray:
    """1 in the box that was found, 0 elsewhere."""
    return box_region(subject.box_xyxy, size_hw).astype(np.float32)


def random(subject: Subject, size_hw: tuple[int, int]) -> np.ndarray:
    """Smooth random numbers."""
    return random_field(tuple(size_hw), seed=1)


def outline(subject: Subject, size_hw: tuple[int, int]) -> np.ndarray | None:
    """1 to 2 in the object's true outline, by the Gaussian; None if it is unknown."""
    if subject.mask is None:
        return None
    return subject.mask * (1 + gaussian(subject, size_hw))


BASELINES: dict[str, Baseline] = {
    "Gaussian": gaussian,
    "uniform box": uniform,
    "random": random,
    "true outline": outline,
}
