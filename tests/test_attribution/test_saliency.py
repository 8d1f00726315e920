from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from mmyolo_vis_hooks.attribution.saliency import (
    FUSIONS,
    box_saliency,
    box_sigma,
    fuse_saliency,
    normalize_saliency,
    saliency_range,
)
from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.records import BoxExplanation, LayerMap

LETTERBOX = FrameTransform((40, 80), (64, 64), (0.8, 0.8), (0.0, 16.0))


def random_map(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def slowly(saliency: np.ndarray, frame: FrameTransform, sigma_px: float) -> np.ndarray:
    resampled = frame.resample(torch.from_numpy(saliency)[None])[0].numpy()
    return cv2.GaussianBlur(resampled, (0, 0), sigma_px) if sigma_px else resampled


def explanation(*maps: np.ndarray) -> BoxExplanation:
    return BoxExplanation(
        0,
        tuple(LayerMap(f"neck[{i}]", m) for i, m in enumerate(maps)),
        smooth=0.1,
    )


class TestSigma:
    @pytest.mark.parametrize(
        "box", [[5, 5, 5, 9], [9, 5, 5, 9], [0, 0, np.nan, 4], [0, 0, np.inf, 4]]
    )
    def test_no_area_is_no_smoothing(self, box):
        assert box_sigma(np.array(box, np.float32), 0.1) == 0


class TestFusion:
    ONE = np.array([[1.0, 2.0], [0.0, 4.0]], np.float32)
    OTHER = np.array([[0.5, 0.1], [0.2, 0.0]], np.float32)

    @pytest.mark.parametrize(
        ("fusion", "expected", "normalised"),
        [
            # 1/4 and 1/1, 2/4 and 0.1/0.5, 0 and 0.2/0.5, 1 and 0.
            ("max", [[1, 2], [0.2, 4]], [[1, 0.5], [0.4, 1]]),
            ("mean", [[0.75, 1.05], [0.1, 2]], [[0.625, 0.35], [0.2, 0.5]]),
            ("sum", [[1.5, 2.1], [0.2, 4]], [[1.25, 0.7], [0.4, 1]]),
            ("product", [[0.5, 0.2], [0, 0]], [[0.25, 0.1], [0, 0]]),
        ],
    )
    def test_by_hand(self, fusion, expected, normalised):
        for normalize, values in ((False, expected), (True, normalised)):
            fused = fuse_saliency([self.ONE, self.OTHER], fusion, normalize=normalize)
            np.testing.assert_allclose(fused, values, rtol=1e-6)

    @pytest.mark.parametrize("fusion", FUSIONS)
    def test_a_zero_map_stays_zero(self, fusion):
        zero = np.zeros((2, 2), np.float32)
        assert fuse_saliency([zero], fusion, normalize=True).max() == 0

    def test_the_product_of_small_gradients_is_not_lost(self):
        tiny = np.full((1, 2), 1e-30, np.float32)
        fused = fuse_saliency([tiny, tiny], "product", normalize=False)
        assert fused.max() == pytest.approx(1e-60, rel=1e-5)


class TestNormalize:
    def test_the_minimum_is_not_subtracted(self):
        result = normalize_saliency(np.array([[2.0, 4.0], [1.0, 3.0]], np.float32))
        assert result.tolist() == [[0.5, 1.0], [0.25, 0.75]]
        assert result.dtype == np.float32

    def test_only_the_inside_of_the_box_counts(self):
        saliency = np.arange(12, dtype=np.float32).reshape(3, 4)
        result = normalize_saliency(saliency, box_xyxy=np.array([1, 0, 3, 2]))
        np.testing.assert_allclose(
            result, [[0, 1 / 6, 2 / 6, 0], [0, 5 / 6, 1, 0], [0, 0, 0, 0]], rtol=1e-6
        )

    def test_a_pixel_is_inside_if_its_centre_is(self):
        ones = np.ones((4, 4), np.float32)
        result = normalize_saliency(ones, box_xyxy=np.array([0.6, 1.4, 2.6, 2.4]))
        assert np.argwhere(result).tolist() == [[1, 1], [1, 2]]

    @pytest.mark.parametrize(
        "box",
        [
            [-4, 0, -1, 3],
            [3, 0, 1, 3],
            [0, 0, np.nan, 3],
        ],
    )
    def test_no_pixel_in_the_box(self, box):
        saliency = np.ones((4, 4), np.float32)
        result = normalize_saliency(saliency, box_xyxy=np.array(box, np.float32))
        assert result.shape == (4, 4)
        assert (result == 0).all()


def test_range_counts_the_cells_on_the_image():
    saliency = np.full((8, 8), 0.5, np.float32)
    # Rows 0 and 1 are padding; the interpolation at the edge reaches into row 1.
    saliency[0] = 9.0
    saliency[4, 4] = 0.75
    saliency[7] = -1.0
    assert saliency_range(saliency, LETTERBOX) == (0.5, 0.75)


def test_range_counts_the_cells_between_the_pixels_of_a_small_image():
    saliency = np.zeros((80, 80), np.float32)
    saliency[11, 11] = 3  # pixels 0 and 1 lie between the cells 4 and 5, 14 and 15
    frame = FrameTransform.stretch((8, 8), (640, 640))
    assert saliency_range(saliency, frame) == (0, 3)


class TestBoxMap:
    BOX = np.array([30, 16, 80, 34], np.float32)

    def test_peak_and_scale(self):
        saliency = np.zeros((8, 8), np.float32)
        saliency[4, 5] = 3e-5
        result = box_saliency(explanation(saliency), LETTERBOX, self.BOX)
        assert result.dtype == np.float32
        assert result.max() == 1
        assert result.min() == 0
        row, column = np.unravel_index(result.argmax(), result.shape)
        assert abs(row + 0.5 - 25) <= 1
        assert abs(column + 0.5 - 55) <= 1
        # sigma = 0.1 * sqrt(50 * 18)
        blurred = slowly(saliency, LETTERBOX, 3.0)
        np.testing.assert_allclose(result, blurred / blurred.max(), atol=1e-5)

    @pytest.mark.parametrize("fusion", FUSIONS)
    @pytest.mark.parametrize("normalize", [True, False])
    def test_layers_are_fused_on_the_image(self, fusion, normalize):
        one, other = random_map(8, 8), 0.1 * random_map(4, 4, seed=1)
        result = box_saliency(
            explanation(one, other),
            LETTERBOX,
            self.BOX,
            fusion=fusion,
            normalize_layers=normalize,
        )
        expected = fuse_saliency(
            [slowly(one, LETTERBOX, 3.0), slowly(other, LETTERBOX, 3.0)],
            fusion,
            normalize=normalize,
        )
        np.testing.assert_allclose(result, expected / expected.max(), atol=1e-5)

    @pytest.mark.parametrize("maps", [(), (np.zeros((8, 8), np.float32),)])
    def test_no_influence(self, maps):
        result = box_saliency(explanation(*maps), LETTERBOX, self.BOX)
        assert result.shape == (40, 80)
        assert result.dtype == np.float32
        assert not result.any()
