from __future__ import annotations

import cv2
import matplotlib
import numpy as np
import pytest

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.render.heatmap import (
    colormap_lut,
    diverge_heatmap,
    fade_heatmap,
)
from tests.test_render.pictures import photo, plain


def values(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


class TestColormap:
    @pytest.mark.parametrize("name", ["JET", "COLORMAP_JET", cv2.COLORMAP_JET])
    def test_opencv_names(self, name):
        lut = colormap_lut(name)
        # OpenCV's JET runs from dark blue to dark red; RGB, not BGR.
        assert lut[[0, 255], 0].tolist() == [[0, 0, 128], [128, 0, 0]]
        with pytest.raises(ValueError, match="read-only"):
            lut[0] = 0

    @pytest.mark.parametrize("name", ["magma_r", "Blues"])
    def test_matplotlib_names(self, name):
        expected = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
        assert np.array_equal(colormap_lut(name)[:, 0], expected)
        assert np.array_equal(colormap_lut(name.lower())[:, 0], expected)

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("jett", "'jet'"),
            ("virdis", "'viridis'"),
            (999, "999.*0 to"),
            (True, "True"),
        ],
    )
    def test_unknown(self, name, part):
        with pytest.raises(VisConfigError, match=f"colormap.*{part}"):
            colormap_lut(name)


def test_fading_by_hand():
    saliency = np.array([[0.0, 0.25, 0.6, 1.0]], np.float32)
    drawn = fade_heatmap(saliency, plain(1, 4, 100), alpha=0.5)[0]
    lut = colormap_lut("plasma")[:, 0].astype(float)
    assert drawn[0].tolist() == [100, 100, 100]
    for pixel, level, share in ((1, 64, 0.25), (2, 153, 0.5), (3, 255, 0.5)):
        expected = 100 + (lut[level] - 100) * share
        assert np.abs(drawn[pixel] - expected).max() <= 0.5


def test_without_heat_it_is_the_grey_image():
    grey = cv2.cvtColor(photo(5, 6), cv2.COLOR_RGB2GRAY)
    for saliency, alpha in ((np.zeros((5, 6)), 1.0), (np.ones((5, 6)), 0.0)):
        drawn = fade_heatmap(saliency.astype(np.float32), photo(5, 6), alpha=alpha)
        assert np.array_equal(drawn, np.dstack([grey] * 3))


class TestDiverging:
    def test_for_is_red_against_blue_and_nothing_white(self):
        signed = np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]], np.float32)
        given = signed.copy()
        white = np.full((1, 5, 3), 255, np.uint8)
        drawn = diverge_heatmap(signed, white, alpha=1).astype(int)[0]
        expected = [
            (0, 0, 255), (127, 127, 255), (255, 255, 255), (255, 127, 127), (255, 0, 0)
        ]  # fmt: skip
        assert np.abs(drawn - expected).max() <= 1
        assert np.array_equal(signed, given)
        # The image shows through as a grey one, alike everywhere.
        green = np.full((1, 5, 3), (0, 255, 0), np.uint8)  # luminance 150
        drawn = diverge_heatmap(signed, green, alpha=0.6).astype(int)[0]
        blend = 0.6 * np.array(expected) + 0.4 * 150
        assert np.abs(drawn - blend).max() <= 1

    def test_one_limit_makes_maps_comparable(self):
        weak, strong = np.float32([[1, 0]]), np.float32([[4, 0]])
        image = plain(1, 2, 90)
        assert np.array_equal(
            diverge_heatmap(weak, image), diverge_heatmap(strong, image)
        )
        assert not np.array_equal(
            diverge_heatmap(weak, image, limit=4), diverge_heatmap(strong, image)
        )
        assert np.array_equal(  # cut off, not wrapped
            diverge_heatmap(strong, image, limit=1), diverge_heatmap(weak, image)
        )

    def test_a_map_of_zeros_is_the_image_under_a_white_veil(self):
        image = photo(4, 6)
        drawn = diverge_heatmap(np.zeros((4, 6), np.float32), image, alpha=0.5)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(float)
        assert np.abs(drawn - (grey + 255) / 2).max() <= 1
