from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mmyolo_vis_hooks.data.decoded import array_bgr, as_decoded
from mmyolo_vis_hooks.errors import VisConfigError

RGB = np.random.RandomState(0).randint(2, 256, (6, 8, 3)).astype(np.uint8)
BGR = RGB[..., ::-1]
RGBA = np.dstack([RGB, np.full((6, 8), 128, np.uint8)])


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        RGB.astype(np.int64),
        RGB.astype(np.float16),
        RGB.astype(np.float64),
        RGB.astype(np.uint16),
        RGBA,
        RGB[::-1][::-1],
        torch.from_numpy(RGB),
        torch.from_numpy(RGB).to(torch.bfloat16).requires_grad_(),
        Image.fromarray(RGB),
        Image.fromarray(RGBA),
    ],
)
def test_colours_are_what_a_loader_of_colours_gives(image):
    given = as_decoded(image, "color", False)
    np.testing.assert_array_equal(given, BGR)
    assert given.dtype == np.uint8
    assert given.flags.c_contiguous


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "CMYK", "YCbCr"])
def test_modes_of_pillow_are_colours(mode):
    image = Image.fromarray(RGB).convert(mode)
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    np.testing.assert_array_equal(as_decoded(image, "color", False), expected)


def test_a_palette_is_looked_up_whatever_the_pipeline_is():
    image = Image.fromarray(RGB).convert("P")
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    np.testing.assert_array_equal(array_bgr(image), expected)
    np.testing.assert_array_equal(as_decoded(image, "unchanged", False), expected)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
def test_grey_has_the_channels_of_the_loader(shape):
    grey = RGB[..., 0].reshape(shape)
    in_colours = as_decoded(grey, "color", True)
    np.testing.assert_array_equal(in_colours, RGB[..., :1].repeat(3, axis=2))
    assert in_colours.dtype == np.float32
    np.testing.assert_array_equal(as_decoded(grey, "grayscale", False), RGB[..., 0])


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        (RGB / 255, "multiply it by 255"),
        (RGB.astype(np.uint16) * 257, "scale it to 0 to 255"),
        (RGB - 128.0, "scale it"),
        (np.full((4, 4, 3), np.nan), "scale it"),
        (RGB.transpose(2, 0, 1), "move the channels to the end"),
        (torch.from_numpy(RGB).permute(2, 0, 1), "move the channels"),
        (RGB > 100, "bool cannot work"),
        (RGB[:0], "cannot work"),
        (None, "cannot work"),
    ],
)
def test_what_no_file_would_give_is_refused(image, remedy):
    with pytest.raises(VisConfigError, match=remedy):
        as_decoded(image, "color", False)


def test_an_unchanged_image_keeps_its_bits_and_bands():
    bands = np.zeros((4, 5, 7), np.uint16) + 40_000
    np.testing.assert_array_equal(as_decoded(bands, "unchanged", False), bands)
    swapped = as_decoded(bands.astype(">u2"), "unchanged", False)
    np.testing.assert_array_equal(swapped, bands)
    assert swapped.dtype.isnative


def test_transparency_stays_with_a_loader_that_keeps_it(tmp_path):
    image = Image.fromarray(RGBA)
    image.save(tmp_path / "image.png")
    expected = cv2.imread(str(tmp_path / "image.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(as_decoded(image, "unchanged", False), expected)
    palette = Image.fromarray(RGB).convert("P")
    opaque = as_decoded(palette, "color", False)
    palette.info["transparency"] = 0
    np.testing.assert_array_equal(as_decoded(palette, "color", False), opaque)
    # Of an array nobody knows what a fourth channel is.
    np.testing.assert_array_equal(as_decoded(RGBA, "unchanged", False), RGBA)
