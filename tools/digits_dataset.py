"""A small detection data set of real handwritten digits on real photos.

Everything comes with scikit-learn: 1,797 digits of 8x8 grey values, enlarged smoothly,
coloured, and laid on crops of its two sample photos. The masks are exact, since we
place the strokes ourselves. Digits of the validation images are other people's than
those of the training images.

    python tools/digits_dataset.py work_dirs/demo/digits
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple(str(digit) for digit in range(10))
# Share of the stroke's colour from which a pixel belongs to the digit.
STROKE_THRESHOLD = 0.5

# The digits are ordered by writer: those from here on are the validation's.
_FIRST_VAL_DIGIT = 1400
# Smallest and largest: long side of an image, side of a digit's square; in pixels.
_LONG_SIDE, _DIGIT_SIZE = (176, 224), (24, 120)
_MAX_DIGITS = 6
_LAYOUT = 1  # part of the cache key: raise it when the pictures change


@dataclass(frozen=True)
class DigitsOptions:
    """What a data set is made of; equal options give equal files."""

    num_train: int = 600
    num_val: int = 80
    seed: int = 0


@dataclass(frozen=True)
class DigitsImage:
    """One image and what is on it.

    Attributes:
        image_rgb: ``(H, W, 3)`` uint8, RGB.
        background_rgb: The same without digits.
        masks: ``(N, H, W)`` bool, one per digit; they do not overlap.
        labels: ``(N,)`` int, the digits.
    """

    image_rgb: np.ndarray
    background_rgb: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


def make_image(seed: int, split: str, index: int) -> DigitsImage:
    """Compose one image; the same arguments give the same image.

    Args:
        seed: Of the data set.
        split: ``'train'`` or ``'val'``.
        index: Number of the image in its split.
    """
    rng = np.random.default_rng([seed, split == "val", index])
    background = _background(rng)
    image = background.astype(np.float32)
    taken = np.zeros(background.shape[:2], dtype=bool)
    masks, labels = [], []
    for _ in range(rng.integers(2, _MAX_DIGITS + 1)):
        digit, label = _digit(rng, split, min(taken.shape))
        place = _free_place(rng, taken, len(digit))
        if place is None:
            continue
        taken[place] = True
        mask = np.zeros_like(taken)
        mask[place] = digit >= STROKE_THRESHOLD
        color = _contrasting_color(rng, background[mask])
        image[place] += digit[..., None] * (color - image[place])
        masks.append(mask)
        labels.append(label)
    image_rgb = np.rint(image).astype(np.uint8)
    return DigitsImage(image_rgb, background, np.array(masks), np.array(labels))


def make_dataset(
    root: str | os.PathLike,
    options: DigitsOptions | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> Path:
    """Write the data set in COCO's format, unless it is there already.

    ``train/`` and ``val/`` hold PNG files, ``annotations/train.json`` and
    ``annotations/val.json`` boxes and masks (as RLE). The folder appears at once
    when it is complete; one that was made of other options is replaced.

    Args:
        root: Folder of the data set.
        options: What it is made of. Defaults to ``DigitsOptions()``.
        on_image: Called after each image that was written.

    Returns:
        Path: ``root``.
    """
    root = Path(root)
    options = options or DigitsOptions()
    key = {"layout": _LAYOUT, **asdict(options)}
    if _key_of(root) == key:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as made:
        new = Path(made) / "new"
        for split in ("train", "val"):
            _write_split(new, split, options, on_image)
        (new / "options.json").write_text(json.dumps(key))
        if root.exists():
            # What is not ours stays.
            if _key_of(root) is None:
                raise FileExistsError(
                    f"{root} exists and is no data set of digits; choose another folder"
                )
            shutil.move(root, Path(made) / "old")
        os.rename(new, root)
    return root


def _key_of(root: Path) -> Any:
    try:
        return json.loads((root / "options.json").read_text())
    except (OSError, ValueError):
        return None


def _write_split(
    root: Path, split: str, options: DigitsOptions, on_image: Callable[[], None]
) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(getattr(options, f"num_{split}")):
        made = make_image(options.seed, split, index)
        height, width = made.image_rgb.shape[:2]
        name = f"{split}_{index:04d}.png"
        path = str(root / split / name)
        if not cv2.imwrite(path, made.image_rgb[..., ::-1]):
            raise OSError(f"{path} could not be written; look at the free space")
        image = {"id": index + 1, "file_name": name, "height": height, "width": width}
        images.append(image)
        for mask, label in zip(made.masks, made.labels):
            code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(label),
                    "bbox": rle.toBbox(code).tolist(),
                    "area": int(rle.area(code)),
                    "segmentation": {**code, "counts": code["counts"].decode()},
                    "iscrowd": 0,
                }
            )
        on_image()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    bunch = load_digits()
    return bunch.images.astype(np.float32) / 16, bunch.target


@cache
def _photos() -> list[np.ndarray]:
    return load_sample_images().images


def _background(rng: np.random.Generator) -> np.ndarray:
    photo = _photos()[rng.integers(len(_photos()))]
    long = int(rng.integers(_LONG_SIDE[0], _LONG_SIDE[1] + 1))
    short = round(long * rng.uniform(0.6, 1))
    height, width = (long, short) if rng.random() < 0.5 else (short, long)
    zoom = rng.uniform(1, 0.999 * min(photo.shape[0] / height, photo.shape[1] / width))
    crop_h, crop_w = round(height * zoom), round(width * zoom)
    y = rng.integers(photo.shape[0] - crop_h + 1)
    x = rng.integers(photo.shape[1] - crop_w + 1)
    crop = photo[y : y + crop_h, x : x + crop_w]
    return cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)


def _digit(rng: np.random.Generator, split: str, room: int) -> tuple[np.ndarray, int]:
    """Coverage of a digit's square, ``(size, size)`` in [0, 1], and its label."""
    images, labels = _digits()
    in_val = split == "val"
    first, last = (_FIRST_VAL_DIGIT, len(labels)) if in_val else (0, _FIRST_VAL_DIGIT)
    index = rng.integers(first, last)
    # Uniform in the logarithm: as many from 20 to 40 as from 40 to 80.
    size = min(round(float(np.exp(rng.uniform(*np.log(_DIGIT_SIZE))))), room)
    # A pixel of 8x8 is a value at its centre; beyond the border is no ink.
    padded = np.pad(images[index], 1)
    enlarged = cv2.resize(padded, (size, size), interpolation=cv2.INTER_CUBIC)
    # Steeper than the interpolation, so that strokes have an edge.
    return np.clip((enlarged - 0.5) * 2.5 + 0.5, 0, 1), int(labels[index])


def _free_place(
    rng: np.random.Generator, taken: np.ndarray, size: int
) -> tuple[slice, slice] | None:
    height, width = taken.shape
    for _ in range(30):
        y = int(rng.integers(height - size + 1))
        x = int(rng.integers(width - size + 1))
        place = (slice(y, y + size), slice(x, x + size))
        if not taken[place].any():
            return place
    return None


def _contrasting_color(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """The one of some random colours that stands out from all the pixels."""
    colors = rng.integers(0, 256, size=(24, 3)).astype(np.float32)
    distances = np.abs(colors[:, None] - pixels[None].astype(np.float32)).max(axis=2)
    return colors[np.argmax(np.quantile(distances, 0.05, axis=1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", help="folder of the data set")
    for name, default in asdict(DigitsOptions()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"({default})")
    args = parser.parse_args()
    options = DigitsOptions(args.num_train, args.num_val, args.seed)
    print(make_dataset(args.root, options))


if __name__ == "__main__":
    main()
