"""References that try regions of the box, with its surroundings intact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import VisConfigError
from ..geometry import box_cells
from .metric import Subject


def greedy_cells(
    subject: Subject, size_hw: tuple[int, int], *, cells: int = 6, at_once: int = 3
) -> tuple[np.ndarray, int]:
    """Rank the cells of a grid on the box by trying each of those that are left.

    Some at a time are taken: those that with what is shown already make the detection
    score most, plus what it loses when they are hidden with the others. This is the
    idea of VPS (Chen 2025) and VX-CODE (2026), on cells instead of superpixels or
    patches.

    Args:
        subject (Subject): A detection that can be asked.
        size_hw (tuple[int, int]): Of the network's input.
        cells (int): So many in a row, and rows. Defaults to 6.
        at_once (int): So many are taken at a time. Defaults to 3.

    Returns:
        tuple: The map ``(H, W)``, in the box the number of cells for the first and 1
        for the last; and how many forwards were needed.
    """
    if at_once >= cells**2:
        raise VisConfigError(
            f"at_once={at_once} takes all of {cells}x{cells} cells unseen; use less"
        )
    score, grid = _ask(subject), box_cells(subject.box_xyxy, size_hw, cells)
    left = list(range(cells**2))
    order: list[int] = []
    num_forwards = 0
    while len(left) > at_once:
        with_each = np.stack([np.isin(grid, [*order, cell]) for cell in left])
        scores = score(np.concatenate([with_each | (grid < 0), ~with_each]), "blur")
        num_forwards += len(scores)
        gains = scores[: len(left)] - scores[len(left) :]
        best = np.argsort(-gains, kind="stable")[:at_once]
        order += [left[k] for k in best]
        left = [cell for cell in left if cell not in order]
    values = np.zeros(cells**2 + 1)  # the last is of what lies outside
    values[[*order, *left]] = np.arange(cells**2, 0, -1)
    return values[grid], num_forwards


def ridge_cells(
    subject: Subject, size_hw: tuple[int, int], *, cells: int = 7, num_masks: int = 64
) -> tuple[np.ndarray, int]:
    """What each cell of a grid on the box adds to the score, by ridge regression.

    Half of the cells, drawn at random, are shown at a time; the penalty is chosen by
    leaving one mask out. LIME (Ribeiro 2016) on the cells of a box.

    Args:
        subject, size_hw, cells: As of :func:`greedy_cells`; 7 cells by default.
        num_masks (int): So many forwards. Defaults to 64.

    Returns:
        tuple: The map ``(H, W)``, signed, 0 outside of the box; and the forwards.
    """
    from sklearn.linear_model import RidgeCV  # takes a second, and few ask for it

    score, grid = _ask(subject), box_cells(subject.box_xyxy, size_hw, cells)
    shown = np.random.default_rng(0).random((num_masks, cells**2)) < 0.5
    scores = score(np.take(np.c_[shown, np.ones(num_masks, bool)], grid, 1), "blur")
    fitted = RidgeCV(alphas=np.logspace(-1, 3, 9)).fit(shown.astype(float), scores)
    return np.append(fitted.coef_, 0.0)[grid], num_masks


def _ask(subject: Subject) -> Callable[[np.ndarray, str], np.ndarray]:
    if subject.score is None:
        raise ValueError("the subject cannot be asked")
    return subject.score
