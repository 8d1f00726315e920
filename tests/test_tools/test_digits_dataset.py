"""The data set of digits: exact boxes and masks, the same for the same seed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import digits_dataset
from digits_dataset import (
    CLASSES,
    DigitsOptions,
    boxes_of,
    make_dataset,
    make_image,
)

SMALL = DigitsOptions(num_train=6, num_val=4, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "digits", SMALL)


def annotations(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"{split}.json").read_text())


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_boxes_of_a_mask_by_hand():
    mask = np.zeros((1, 6, 8), dtype=bool)
    mask[0, 2, 1] = mask[0, 4, 5] = True
    assert boxes_of(mask).tolist() == [[1, 2, 5, 3]]


@pytest.mark.parametrize("index", range(8))
def test_masks_lie_on_changed_pixels_and_nowhere_else(index):
    made = make_image(SMALL, "train", index)
    changed = np.abs(made.image_rgb.astype(int) - made.background_rgb).max(axis=2)
    covered = made.masks.any(axis=0)
    # Half of the stroke's colour, at least: it shows on nearly every pixel.
    assert np.quantile(changed[covered], 0.05) > 20
    # Beyond the strokes' soft edges nothing changes.
    edge = cv2.dilate(covered.astype(np.uint8), np.ones((25, 25))) > 0
    assert changed[~edge].max() == 0
    # Outside of the masks a pixel is more background than digit.
    assert changed[~covered].mean() < 0.1 * changed[covered].mean()


@pytest.mark.parametrize("index", range(8))
def test_masks_do_not_overlap_and_are_not_empty(index):
    made = make_image(SMALL, "val", index)
    assert len(made.masks) == len(made.labels) >= 1
    assert made.masks.sum(axis=0).max() == 1
    assert made.masks.any(axis=(1, 2)).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_the_masks(root, split):
    content = annotations(root, split)
    sizes = {image["id"]: image for image in content["images"]}
    assert len(content["annotations"]) > len(content["images"])
    for annotation in content["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        image = sizes[annotation["image_id"]]
        assert mask.shape == (image["height"], image["width"])
        x, y, width, height = annotation["bbox"]
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum() == annotation["area"]
        for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert border.any()


def test_files_and_annotations_agree(root):
    for split, count in (("train", SMALL.num_train), ("val", SMALL.num_val)):
        coco = COCO(root / "annotations" / f"{split}.json")
        assert len(coco.imgs) == count
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        for index, image in enumerate(coco.loadImgs(sorted(coco.imgs))):
            picture = cv2.imread(str(root / split / image["file_name"]))
            made = make_image(SMALL, split, index)
            np.testing.assert_array_equal(picture[..., ::-1], made.image_rgb)
            labels = [a["category_id"] for a in coco.imgToAnns[image["id"]]]
            assert labels == made.labels.tolist()


def test_shapes_vary_so_that_letterboxing_happens():
    made = [make_image(SMALL, "train", i) for i in range(20)]
    ratios = np.array([m.image_rgb.shape[1] / m.image_rgb.shape[0] for m in made])
    assert ratios.min() < 0.8
    assert ratios.max() > 1.25
    sides = [max(box[2:]) for m in made for box in boxes_of(m.masks)]
    assert min(sides) < 32 < 64 < max(sides)


def test_equal_seeds_give_equal_files(root, tmp_path):
    again = make_dataset(tmp_path / "again", SMALL)
    assert files(again) == files(root)
    other = make_dataset(tmp_path / "other", DigitsOptions(6, 4, seed=4))
    assert files(other)["train/train_0000.png"] != files(root)["train/train_0000.png"]


def test_training_and_validation_show_different_digits(monkeypatch):
    seen: dict[str, set[int]] = {"train": set(), "val": set()}
    images, labels = digits_dataset._digits()
    numbers = np.arange(len(labels))
    # In place of a label, the number of the digit.
    monkeypatch.setattr(digits_dataset, "_digits", lambda: (images, numbers))
    for split, shown in seen.items():
        for index in range(40):
            shown.update(make_image(SMALL, split, index).labels.tolist())
    assert len(seen["train"]) > 50
    assert not seen["train"] & seen["val"]


def test_a_data_set_that_fits_is_kept_and_another_is_replaced(tmp_path):
    written = []
    root = tmp_path / "digits"
    for options, expected in (
        (SMALL, 10),
        (SMALL, 10),
        (DigitsOptions(2, 2, seed=3), 14),
    ):
        make_dataset(root, options, on_image=lambda: written.append(1))
        assert len(written) == expected
    assert len(annotations(root, "train")["images"]) == 2
    assert os.listdir(tmp_path) == ["digits"]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "digits", SMALL, on_image=interrupt)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_somebody_else_stays(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="choose another folder"):
        make_dataset(tmp_path / "digits", SMALL)
    assert (tmp_path / "digits" / "thesis.tex").read_text() == "years of work"
