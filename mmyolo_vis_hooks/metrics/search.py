"""The expensive reference: regions found by trying, as the search methods do."""

from __future__ import annotations

import numpy as np

from .metric import Subject
from .pointing_game import box_region

_CELLS, _AT_ONCE = 6, 3


def greedy_cells(subject: Subject, size_hw: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Rank the cells of a 6x6 grid on the box by trying each of those that are left.

    Three at a time are taken: those that with what is shown already make the detection
    score most, plus what it loses when they are hidden with the others. This is the
    idea of VPS (Chen 2025) and VX-CODE (2026), on cells instead of superpixels or
    patches, and with the surroundings of the box intact.

    Returns:
        tuple: The map ``(H, W)``, 1 to 36 in the box, 36 for the first; and how many
        forwards were needed.
    """
    if subject.score is None:
        raise ValueError("the subject cannot be asked")
    region = box_region(subject.box_xyxy, size_hw)
    x1, y1, x2, y2 = subject.box_xyxy
    rows, columns = (
        ((np.arange(n) + 0.5 - low) / max(high - low, 1e-6) * _CELLS)
        .astype(int)
        .clip(0, _CELLS - 1)
        for n, low, high in ((size_hw[0], y1, y2), (size_hw[1], x1, x2))
    )
    cells = np.where(region, rows[:, None] * _CELLS + columns[None], -1)
    left = list(range(_CELLS**2))
    order: list[int] = []
    num_forwards = 0
    while len(left) > _AT_ONCE:
        with_each = np.stack([np.isin(cells, [*order, cell]) for cell in left])
        scores = subject.score(
            np.concatenate([with_each | ~region, ~with_each]), "blur"
        )
        num_forwards += len(scores)
        gains = scores[: len(left)] - scores[len(left) :]
        best = np.argsort(-gains, kind="stable")[:_AT_ONCE]
        order += [left[k] for k in best]
        left = [cell for cell in left if cell not in order]
    values = np.zeros(_CELLS**2 + 1)  # the last is of what lies outside
    values[[*order, *left]] = np.arange(_CELLS**2, 0, -1)
    return values[cells], num_forwards
