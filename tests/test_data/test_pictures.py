from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample

from mmyolo_vis_hooks.data.pictures import network_picture, picture_of
from mmyolo_vis_hooks.errors import VisConfigError

PICTURE = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_three_channels_of_8_bits_stay_as_they_are(dtype):
    found, note = picture_of(PICTURE[..., ::-1].astype(dtype))
    np.testing.assert_array_equal(found, PICTURE)
    assert found.dtype == np.uint8
    assert note == ""


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1)])
def test_one_channel_is_grey(shape):
    grey = PICTURE[..., 0].reshape(shape)
    found, note = picture_of(grey)
    np.testing.assert_array_equal(found, PICTURE[..., :1].repeat(3, axis=2))
    assert note == "one channel"


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_more_than_8_bits_are_stretched(dtype):
    ramp = np.arange(1000, 2001).reshape(1, -1, 1).repeat(3, axis=2).astype(dtype)
    ramp[0, 0] = 30_000  # a dead cell, which must not make all others black
    found, note = picture_of(ramp)
    assert note == "1011 to 1991 shown as black to white"
    # By hand: 1500 lies halfway between the percentiles.
    assert abs(int(found[0, 500, 0]) - 127) <= 1
    assert found[0, 5].tolist() == [0, 0, 0]
    assert found[0, 1000].tolist() == [255] * 3


def test_small_and_missing_numbers():
    image = np.linspace(0, 1, 300, dtype=np.float32).reshape(10, 30)
    image[0, :9] = np.nan
    image[1, :9] = np.inf
    found, note = picture_of(image)
    assert (found.min(), found.max()) == (0, 255)
    assert note.startswith("one channel, 0.0")
    nothing, _ = picture_of(np.full((4, 5), np.nan))
    assert nothing.shape == (4, 5, 3)
    assert not nothing.any()


def test_of_more_channels_the_first_three_or_those_that_are_named():
    stack = np.stack([np.full((4, 5), 10 * i, np.uint8) for i in range(5)], axis=2)
    found, note = picture_of(stack)
    assert found[0, 0].tolist() == [20, 10, 0]
    assert note == "channels 2, 1, 0 of 5 as red, green, blue"
    found, note = picture_of(stack, (4, 1, 3))
    assert found[0, 0].tolist() == [40, 10, 30]
    assert note == "channels 4, 1, 3 of 5 as red, green, blue"
    found, note = picture_of(stack[..., :2])
    assert found[0, 0].tolist() == [0, 0, 0]
    assert note == "channel 0 of 2"
    with pytest.raises(VisConfigError, match=r"image_channels=\[1, 2, 5\].*5 channels"):
        picture_of(stack, (1, 2, 5))


def test_bands_are_stretched_each_by_itself():
    ramp = np.arange(100, dtype=np.float32).reshape(10, 10) / 7
    stack = np.stack([ramp, ramp * 1000, ramp + 5000, ramp], axis=2)
    found, _ = picture_of(stack)
    np.testing.assert_allclose(found[..., 0], found[..., 2], atol=1)
    assert found[..., 1].max() == 255


def normalised(
    image: np.ndarray, **options
) -> tuple[torch.Tensor, DetDataPreprocessor]:
    preprocessor = DetDataPreprocessor(**options)
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    data = preprocessor(dict(inputs=[tensor], data_samples=[DetDataSample()]))
    return data["inputs"][0], preprocessor


@pytest.mark.parametrize(
    "options",
    [
        dict(mean=[60.0, 50.0, 40.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=True),
        dict(),
    ],
)
def test_the_networks_input_becomes_the_picture_again(options):
    found, note = network_picture(*normalised(PICTURE[..., ::-1], **options))
    np.testing.assert_array_equal(found, PICTURE)
    assert note == ""


def test_inputs_of_one_and_of_five_channels():
    grey = PICTURE[..., :1]
    found, note = network_picture(*normalised(grey, mean=[0.0], std=[255.0]))
    np.testing.assert_array_equal(found, grey.repeat(3, axis=2))
    assert note == "one channel"
    stack = np.concatenate([PICTURE, PICTURE[..., :2]], axis=2)
    inputs = normalised(stack, mean=[10.0], std=[3.0])
    found, note = network_picture(*inputs)
    np.testing.assert_array_equal(found, PICTURE[..., ::-1])
    found, _ = network_picture(*inputs, (4, 3, 0))
    np.testing.assert_array_equal(found, PICTURE[..., [1, 0, 0]])


def test_an_input_that_the_pipeline_normalised_is_not_black():
    inputs = torch.linspace(-2, 2, 3 * 4 * 5).reshape(3, 4, 5)
    found, note = network_picture(inputs, DetDataPreprocessor())
    assert (found.min(), found.max()) == (0, 255)
    assert "shown as black to white" in note
