"""What is beside its place must be noticed; what only looks different must not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmyolo_vis_hooks.data.pipeline import moves_pixels
from mmyolo_vis_hooks.data.proof import compare_places, compare_with_input
from mmyolo_vis_hooks.geometry import FrameTransform

HALF_A_CELL = 4
RNG = np.random.RandomState(0)


def clahe(image):
    lab = cv2.cvtColor(image, cv2.COLOR_BGR2LAB)
    lab[..., 0] = cv2.createCLAHE(40.0, (8, 8)).apply(lab[..., 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR)


def hue(image):
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(int)
    hsv[..., 0] = (hsv[..., 0] + 60) % 180
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)


def jpeg(image):
    return cv2.imdecode(
        cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 10])[1], 1
    )


def noise(image):
    return np.clip(image + RNG.randn(*image.shape) * 40, 0, 255).astype(np.uint8)


STAYING = {
    "nothing": lambda image: image,
    "clahe": clahe,
    "blur": lambda image: cv2.GaussianBlur(image, (0, 0), 3),
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY),
    "threshold": lambda image: np.where(image.mean(2) > 127, 255, 0).astype(np.uint8),
    "hue": hue,
    "jpeg": jpeg,
    "solarize": lambda image: np.where(image < 128, image, 255 - image),
    "noise": noise,
    "negative": lambda image: 255 - image,
    "16 bits": lambda image: image.astype(np.uint16) * 8,
    "normalised": lambda image: (image.astype(np.float32) - 120) / 58,
}


def scaled(factor):
    def apply(image):
        other = cv2.resize(image, None, fx=factor, fy=factor)
        out = np.full_like(image, 114)
        height, width = (min(a, b) for a, b in zip(out.shape[:2], other.shape[:2]))
        out[:height, :width] = other[:height, :width]
        return out

    return apply


MOVING = {
    "right": lambda image: np.roll(image, HALF_A_CELL, axis=1),
    "up": lambda image: np.roll(image, -HALF_A_CELL, axis=0),
    "far": lambda image: np.roll(image, (64, 31), axis=(0, 1)),
    "mirrored": lambda image: image[:, ::-1],
    "2 % smaller": scaled(0.98),
    "half": scaled(0.5),
}


def photos(shared_dir: Path, every: int) -> list[np.ndarray]:
    files = sorted((shared_dir / "data/coco128/train2017").glob("*.jpg"))[::every]
    return [cv2.imread(str(file)) for file in files]


def texture(size_hw=(240, 320)) -> np.ndarray:
    picture = np.random.RandomState(1).rand(*size_hw, 3).astype(np.float32)
    picture = cv2.GaussianBlur(picture, (0, 0), 2)
    return cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def letterboxed(image, change, size=416):
    """The input of YOLOX-nano, changed, and the true frame."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_hw = (round(height * scale), round(width * scale))
    small = np.ascontiguousarray(change(cv2.resize(image, new_hw[::-1])))
    small = small.reshape(*new_hw, -1)
    inputs = np.full((size, size, small.shape[2]), 114, small.dtype)
    inputs[: new_hw[0], : new_hw[1]] = small
    frame = FrameTransform(
        (height, width), (size, size), (new_hw[1] / width, new_hw[0] / height)
    )
    return torch.from_numpy(inputs.astype(np.float32)).permute(2, 0, 1), frame


def step_of(change):
    def step(results):
        return {**results, "img": np.ascontiguousarray(change(results["img"]))}

    return step


def like(dtype=np.uint8, channels=3, size_hw=(240, 320), high=255):
    image = np.random.RandomState(2).rand(*size_hw, *([channels] if channels else []))
    return dict(img=(image * high).astype(dtype), img_path="x.png")


@pytest.mark.parametrize("name", STAYING)
def test_what_only_looks_different(name):
    image = texture()
    found = compare_with_input(image, *letterboxed(image, STAYING[name]))
    assert found.num_tiles >= 9
    assert found.holds
    assert name == "16 bits" or not moves_pixels(step_of(STAYING[name]), like())


@pytest.mark.parametrize("change", MOVING.values(), ids=MOVING)
def test_what_has_moved(change):
    image = texture()
    found = compare_with_input(image, *letterboxed(image, change))
    assert found.is_clear
    assert not found.holds
    assert moves_pixels(step_of(change), like())


@pytest.mark.real_data
def test_photos(shared_dir):
    for number, image in enumerate(photos(shared_dir, 8)):
        for name in ("nothing", "noise", "jpeg") if number < 8 else ("nothing",):
            found = compare_with_input(image, *letterboxed(image, STAYING[name]))
            assert found.holds
            assert found.is_clear or name != "nothing"
        for name in ("right", "up", "2 % smaller") if number < 8 else ():
            changed = letterboxed(image, MOVING[name])
            assert not compare_with_input(image, *changed).holds


def test_an_offset_and_an_unequal_scale_are_followed():
    image = texture((200, 300))
    inputs = np.zeros((3, 320, 320), np.float32)
    inputs[:, 40:300, 10:310] = cv2.resize(image, (300, 260)).transpose(2, 0, 1)
    true = FrameTransform((200, 300), (320, 320), (1.0, 1.3), (10.0, 40.0))
    tensor = torch.from_numpy(inputs)
    assert compare_with_input(image, tensor, true).holds
    for scale, offset in (((1.0, 1.3), (0.0, 0.0)), ((1.0, 1.25), (10.0, 40.0))):
        wrong = FrameTransform((200, 300), (320, 320), scale, offset)
        assert not compare_with_input(image, tensor, wrong).holds


@pytest.mark.parametrize("size_hw", [(48, 60), (64, 64), (32, 320)])
def test_steps_are_tried_on_small_images_too(size_hw):
    for name in {*STAYING} - {"16 bits"}:
        assert not moves_pixels(step_of(STAYING[name]), like(size_hw=size_hw))
    for name in {*MOVING} - {"2 % smaller"}:
        assert moves_pixels(step_of(MOVING[name]), like(size_hw=size_hw))


def test_an_image_of_one_colour_stands_for_all_of_them():
    results = dict(img=np.full((240, 320, 3), 90, np.uint8))
    seen = []

    def solarize(image):
        seen.extend((image.min(), image.max()))
        return STAYING["solarize"](image)

    assert not moves_pixels(step_of(solarize), results)
    assert set(seen) == {0, 255}


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((200, 200), np.uint8),
        np.linspace(0, 255, 200)[None].repeat(200, 0),
        np.full((200, 200), np.nan),
        texture((40, 40)),
    ],
    ids=["black", "ramp", "nothing", "small"],
)
def test_without_texture_nothing_is_claimed(picture):
    found = compare_places(picture, picture[:, ::-1])
    assert not found.is_clear
    assert found.holds


def test_stripes_have_no_place_of_their_own():
    stripes = np.zeros((300, 300), np.uint8)
    stripes[::40] = 255
    found = compare_places(stripes, np.roll(stripes, 9, axis=0))
    assert found.holds
    assert not found.is_clear


@pytest.mark.parametrize(
    "results",
    [
        like(np.uint16, 3, high=2000),
        like(np.float32, 0, high=1),
        like(size_hw=(1200, 1600)),
    ],
    ids=["16 bits", "one channel", "large"],
)
def test_steps_are_tried_on_images_like_those_that_they_meet(results):
    seen = []

    def gain(results):
        seen.append((results["img"].shape, results["img"].dtype))
        return {**results, "img": results["img"] * 2}

    assert not moves_pixels(gain, results)
    assert set(seen) == {(results["img"].shape, results["img"].dtype)}
    assert moves_pixels(step_of(lambda image: np.roll(image, 9, axis=0)), results)


def test_steps_that_cannot_be_tried_or_move_only_sometimes():
    assert moves_pixels(lambda results: results["secret"], like())
    assert moves_pixels(step_of(lambda image: image[8:-8]), like())
    count = iter(range(9))
    assert moves_pixels(
        step_of(lambda image: np.roll(image, 9 * (next(count) % 2), axis=1)), like()
    )
    assert not moves_pixels(lambda results: dict(inputs=results["img"]), like())
