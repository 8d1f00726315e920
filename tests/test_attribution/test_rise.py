from __future__ import annotations

import numpy as np
import pytest
import torch

from mmyolo_vis_hooks.attribution.rise import (
    accumulate,
    detection_similarities,
    rise_masks,
)
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError
from mmyolo_vis_hooks.records import Detections


def all_masks(*args, **kwargs) -> torch.Tensor:
    return torch.cat(list(rise_masks(*args, **kwargs)))


class TestMasks:
    @pytest.mark.parametrize("image_hw", [(64, 96), (37, 53), (5, 200), (1, 1)])
    def test_shape_and_range(self, image_hw):
        batches = list(rise_masks(10, image_hw, batch_size=4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        for batch in batches:
            assert batch.shape[1:] == (1, *image_hw)
            assert batch.dtype == torch.float32
            assert batch.min() >= 0
            assert batch.max() <= 1

    @pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
    def test_every_pixel_is_shown_as_often_as_asked(self, keep):
        masks = all_masks(2000, (21, 34), cells=5, keep=keep)
        mean = masks.mean(dim=0)
        # Interpolation only lowers the standard deviation of a cell.
        assert (mean - keep).abs().max() < 5 * (keep * (1 - keep) / 2000) ** 0.5
        assert abs(mean.mean() - keep) < 0.01

    def test_masks_are_smooth_and_vary(self):
        masks = all_masks(20, (160, 160), cells=8)
        # A cell is 20 pixels wide.
        assert masks.diff(dim=-1).abs().max() <= 1 / 20 + 1e-6
        assert masks.diff(dim=-2).abs().max() <= 1 / 20 + 1e-6
        assert (masks == 0).any()
        assert (masks == 1).any()

    @pytest.mark.parametrize("axis", [2, 3])
    def test_the_grid_is_shifted(self, axis):
        # The slope changes at the centres of the cells: at 16 pixels of 160, were
        # they the same in all masks.
        masks = all_masks(100, (160, 160), cells=8)
        bends = masks.diff(dim=axis).diff(dim=axis).abs() > 1e-4
        assert bends.amax(dim=(0, 1, 5 - axis)).sum() > 140

    def test_one_seed_means_the_same_masks(self):
        first = all_masks(12, (33, 47), seed=3)
        assert torch.equal(first, all_masks(12, (33, 47), seed=3))
        assert not torch.equal(first, all_masks(12, (33, 47), seed=4))

    @pytest.mark.parametrize("batch_size", [1, 5, 100])
    def test_the_batch_size_does_not_matter(self, batch_size):
        masks = all_masks(12, (33, 47), seed=3, batch_size=batch_size)
        assert torch.equal(masks, all_masks(12, (33, 47), seed=3))

    def test_global_random_numbers_are_untouched(self):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
        all_masks(5, (33, 47))
        assert torch.equal(torch.get_rng_state(), torch_state)
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
        torch.manual_seed(1)
        first = all_masks(5, (33, 47))
        torch.manual_seed(2)
        assert torch.equal(first, all_masks(5, (33, 47)))

    def test_dtype(self):
        masks = all_masks(5, (33, 47), dtype=torch.float16)
        assert masks.dtype == torch.float16
        assert torch.equal(masks, all_masks(5, (33, 47)).half())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_masks": 0}, "num_masks=0"),
            ({"num_masks": True}, "num_masks=True"),
            ({"cells": 2.5}, "cells=2.5"),
            ({"batch_size": -1}, "batch_size=-1"),
            ({"keep": 0}, "keep=0"),
            ({"keep": 1.0}, "keep=1.0"),
            ({"keep": "half"}, "keep='half'"),
            ({"seed": -1}, "seed=-1"),
            ({"seed": None}, "seed=None"),
            ({"image_hw": (0, 5)}, r"image_hw=\(0, 5\)"),
            ({"image_hw": (5,)}, r"image_hw=\(5,\)"),
        ],
    )
    def test_wrong_options_are_refused_at_the_call(self, options, message):
        arguments = {"num_masks": 5, "image_hw": (8, 8), **options}
        with pytest.raises(VisConfigError, match=message):
            rise_masks(**arguments)


class TestSimilarities:
    found = Detections(
        boxes_xyxy=np.array(
            [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]],
            dtype=np.float32,
        ),
        scores=np.array([0.5, 0.9, 1.0, 0.8], dtype=np.float32),
        labels=np.array([1, 1, 2, 1]),
    )

    def test_by_hand(self):
        boxes = np.array(
            [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [50, 55, 60, 60]]
        )
        labels = np.array([1, 1, 3, 1])
        # 1 * 0.5 beats 0.5 * 0.9; 1 * 0.9; nothing of class 3; half of 0.8
        similarities = detection_similarities(boxes, labels, self.found)
        np.testing.assert_allclose(similarities, [0.5, 0.9, 0.0, 0.4], rtol=1e-5)
        assert similarities.dtype == np.float32

    def test_nothing_found(self):
        box = np.array([[0.0, 0, 10, 10]])
        assert detection_similarities(box, np.array([1]), Detections()).tolist() == [0]

    def test_nothing_asked(self):
        empty = detection_similarities(np.zeros((0, 4)), np.zeros(0), self.found)
        assert empty.shape == (0,)


class TestAccumulate:
    def test_by_hand(self):
        masks = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 1.0]]], [[[0.0, 1.0]]]])
        weights = np.array([[0.2, 1.0], [0.4, 0.0], [0.6, 0.0]])
        expected = [[[0.4 / 1.5, 1.0 / 1.5]], [[1.0 / 1.5, 0.0]]]
        whole = accumulate([(masks, weights)], keep=0.5)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, expected, rtol=1e-6)
        parts = accumulate(zip(masks.split(2), np.split(weights, [2])), keep=0.5)
        np.testing.assert_allclose(parts, expected, rtol=1e-6)

    def test_a_black_box_that_sees_a_square(self):
        square = (slice(40, 60), slice(70, 90))
        other = (slice(5, 25), slice(5, 25))

        def scores(masks):
            return np.stack(
                [masks[:, 0, rows, columns].mean(dim=(1, 2)).numpy()
                 for rows, columns in (square, other)],
                axis=1,
            )  # fmt: skip

        batches = rise_masks(600, (80, 100), cells=8, seed=1)
        maps = accumulate((masks, scores(masks)) for masks in batches)
        assert maps.shape == (2, 80, 100)
        for saliency, (rows, columns) in zip(maps, (square, other)):
            row, column = np.unravel_index(saliency.argmax(), saliency.shape)
            assert rows.start <= row < rows.stop
            assert columns.start <= column < columns.stop
            # What does not matter has the mean of the weights.
            outside = saliency.copy()
            outside[max(0, rows.start - 20) : rows.stop + 20] = np.nan
            assert np.nanmean(outside) == pytest.approx(0.5, abs=0.02)
            assert saliency[rows, columns].mean() > np.nanmean(outside) + 0.04

    def test_half_precision_and_autocast(self):
        generator = torch.Generator().manual_seed(0)
        masks = torch.rand(50, 1, 6, 7, generator=generator).half()
        weights = np.linspace(0, 1, 50)[:, None]
        expected = np.tensordot(weights.T, masks[:, 0].double().numpy(), 1) / 25
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = accumulate([(masks, weights)])
        np.testing.assert_allclose(maps, expected, rtol=1e-5)

    def test_only_one_batch_lives_at_a_time(self):
        # A batch is only made when the one before has been added.
        taken = []

        def batches():
            for masks in rise_masks(6, (8, 8), batch_size=2):
                taken.append(float(masks.sum()))
                yield masks, np.ones((2, 1))
                masks.zero_()

        maps = accumulate(batches())
        assert maps.sum() * 6 * 0.5 == pytest.approx(sum(taken), rel=1e-5)

    def test_what_is_refused(self):
        masks = torch.ones(2, 1, 4, 4)
        with pytest.raises(VisError, match="no mask"):
            accumulate([])
        with pytest.raises(VisError, match="NaN"):
            accumulate([(masks, np.array([[1.0], [np.nan]]))])
        for weights in (np.ones(2), np.ones((3, 1))):
            with pytest.raises(FeatureShapeError, match="one row per mask"):
                accumulate([(masks, weights)])
