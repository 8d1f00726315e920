from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.errors import FeatureShapeError, VisError
from mmyolo_vis_hooks.metrics.pointing_game import (
    energy_inside,
    pointing_hit,
    spearman,
)

SALIENCY = np.array([[0.0, 1.0, 2.0], [3.0, 10.0, 4.0]])


def mask_of(*places: tuple[int, int], shape=(2, 3)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for place in places:
        mask[place] = True
    return mask


class TestPointingHit:
    def test_mask(self):
        assert pointing_hit(SALIENCY, mask_of((1, 1), (0, 0)))
        assert not pointing_hit(SALIENCY, ~mask_of((1, 1)))
        assert not pointing_hit(SALIENCY, mask_of())

    @pytest.mark.parametrize(
        ("box", "hit"),
        [
            ((1, 1, 2, 2), True),
            # The centre of the pixel is (1.5, 1.5).
            ((1.4, 1.4, 1.6, 1.6), True),
            ((1.6, 0, 3, 2), False),
            ((0, 0, 1.5, 2), False),
            ((0, 0, 3, 1), False),
            ((-5, -5, 50, 50), True),
            ((40, 40, 50, 50), False),
        ],
    )
    def test_box(self, box, hit):
        assert pointing_hit(SALIENCY, np.array(box)) is hit

    def test_equal_peaks_point_at_the_one_nearest_to_their_centre(self):
        saliency = np.zeros((3, 9))
        saliency[1, [0, 3, 8]] = 1.0  # their centre is at 3.67
        assert pointing_hit(saliency, mask_of((1, 3), shape=(3, 9)))
        assert not pointing_hit(saliency, ~mask_of((1, 3), shape=(3, 9)))

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_map_without_a_peak_is_a_miss(self, value):
        assert not pointing_hit(np.full((3, 3), value), np.ones((3, 3), dtype=bool))


class TestEnergyInside:
    def test_by_hand(self):
        assert energy_inside(SALIENCY, mask_of((1, 1), (0, 2))) == 12 / 20
        assert energy_inside(SALIENCY, np.array([0, 1, 2, 2])) == 13 / 20
        assert energy_inside(SALIENCY, mask_of()) == 0.0
        assert energy_inside(SALIENCY, ~mask_of()) == 1.0

    def test_blank_map(self):
        assert energy_inside(np.zeros((2, 3)), ~mask_of()) == 0.0


class TestSpearman:
    def test_by_hand(self):
        assert spearman([1, 2, 3], [10, 20, 1000]) == pytest.approx(1.0)
        assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
        # 1 - 6 * (1 + 1) / (4 * 15)
        assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)

    def test_ties_share_their_rank(self):
        # The ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
        expected = 4.5 / np.sqrt(4.5 * 5)
        assert spearman([0, 1, 1, 2], [0, 1, 2, 3]) == pytest.approx(expected)

    @pytest.mark.filterwarnings("error")
    def test_equal_values_rank_nothing(self):
        assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
        assert np.isnan(spearman([1, 2, 3], [0, 0, 0]))

    def test_what_is_refused(self):
        with pytest.raises(FeatureShapeError, match="3 and 2 values"):
            spearman([1, 2, 3], [1, 2])
        with pytest.raises(FeatureShapeError, match="1 and 1 values"):
            spearman([1], [1])
        with pytest.raises(VisError, match="no rank"):
            spearman([1, np.nan], [1, 2])


class TestInputs:
    @pytest.mark.parametrize("metric", [pointing_hit, energy_inside])
    def test_maps(self, metric):
        for value in (np.nan, np.inf, -1.0):
            saliency = SALIENCY.copy()
            saliency[0, 0] = value
            with pytest.raises(VisError, match="rectify the map"):
                metric(saliency, mask_of())
        with pytest.raises(FeatureShapeError, match="saliency has the shape"):
            metric(SALIENCY[0], mask_of())

    @pytest.mark.parametrize("metric", [pointing_hit, energy_inside])
    @pytest.mark.parametrize(
        "region",
        [
            np.ones((2, 2), dtype=bool),
            np.ones((2, 3), dtype=np.uint8),
            np.ones(4, dtype=bool),
            np.ones(5),
        ],
    )
    def test_regions(self, metric, region):
        with pytest.raises(FeatureShapeError, match="region has the shape"):
            metric(SALIENCY, region)
