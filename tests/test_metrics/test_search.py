"""References that try regions, on scores that are known."""

from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.metrics.metric import METRICS, Subject
from mmyolo_vis_hooks.metrics.pointing_game import box_region
from mmyolo_vis_hooks.metrics.search import greedy_cells, ridge_cells

SIZE = (40, 50)
BOX = np.array([10.0, 4.0, 34.0, 28.0])  # cells of 4x4 pixels


def test_cells_are_taken_by_what_they_are_worth():
    worth = np.zeros(SIZE)
    # Cells in the order of their worth, two of a row and one far off.
    places = [(4, 10), (4, 14), (24, 30), (12, 18), (16, 18)]
    for value, (y, x) in zip((8.0, 4.0, 2.0, 1.0, 0.5), places):
        worth[y : y + 4, x : x + 4] = value
    images = []

    def score(shown: np.ndarray, neutral: str) -> np.ndarray:
        assert neutral == "blur"
        assert shown[:, ~box_region(BOX, SIZE)].all()
        images.append(len(shown))
        return (shown * worth).sum((1, 2)) / worth.sum()

    subject = Subject(BOX, score=score)
    found, forwards = greedy_cells(subject, SIZE)
    assert forwards == sum(images) == 2 * sum(range(6, 37, 3))
    ranked = [found[y, x] for y, x in places]
    assert ranked == [36, 35, 34, 33, 32]
    assert (found[4:8, 10:14] == 36).all()
    assert set(found[box_region(BOX, SIZE)]) == set(range(1, 37))
    assert not found[~box_region(BOX, SIZE)].any()
    best = METRICS["inside"].function(found, subject)["inside"]
    assert best > 0.9


def test_a_coarse_search_takes_few_forwards():
    worth = np.zeros(SIZE)
    worth[16:22, 10:16] = 1  # the last row's first cell of 4 x 4
    subject = Subject(BOX, score=lambda shown, _: (shown * worth).sum((1, 2)))
    found, forwards = greedy_cells(subject, SIZE, cells=4, at_once=4)
    assert forwards == 2 * (16 + 12 + 8)
    assert np.argwhere(found == 16).tolist() == np.argwhere(worth).tolist()
    with pytest.raises(VisConfigError, match="at_once=4 takes all of 2x2 cells unseen"):
        greedy_cells(subject, SIZE, cells=2, at_once=4)


def test_a_regression_finds_what_each_cell_adds():
    worth = np.zeros(SIZE)
    places = [(4, 10), (13, 22), (24, 30)]  # one speaks against the box
    for value, (y, x) in zip((0.6, 0.3, -0.2), places):
        worth[y : y + 4, x : x + 4] = value / 16
    asked = []

    def score(shown: np.ndarray, neutral: str) -> np.ndarray:
        assert shown[:, ~box_region(BOX, SIZE)].all()
        asked.append(shown)
        return (shown * worth).sum((1, 2))

    subject = Subject(BOX, score=score)
    found, forwards = ridge_cells(subject, SIZE, cells=6, num_masks=200)
    assert forwards == len(asked[0]) == 200
    cell = (slice(4, 8), slice(10, 14))
    assert np.ptp(found[cell]) == 0
    assert found[cell][0, 0] == pytest.approx(0.6, abs=0.01)
    assert found[24, 30] == pytest.approx(-0.2, abs=0.01)
    assert found[12, 22] == pytest.approx(0.225, abs=0.01)  # three of its four rows
    assert not found[~box_region(BOX, SIZE)].any()
