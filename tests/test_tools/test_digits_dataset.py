"""The data set of digits: exact boxes and masks, the same for the same seed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

import digits_dataset
from digits_dataset import CLASSES, DigitsOptions, make_dataset, make_image

SMALL = DigitsOptions(num_train=6, num_val=4, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "digits", SMALL)


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_lie_on_changed_pixels_and_nowhere_else(split):
    for index in range(8):
        made = make_image(3, split, index)
        assert len(made.masks) == len(made.labels) >= 1
        assert made.masks.any(axis=(1, 2)).all()
        assert made.masks.sum(axis=0).max() == 1  # they do not overlap
        before = made.background_rgb.astype(int)
        changed = np.abs(made.image_rgb - before).max(axis=2)
        covered = made.masks.any(axis=0)
        # Half of the stroke's colour, at least: it shows on nearly every pixel.
        assert np.quantile(changed[covered], 0.05) > 20
        # Beyond the strokes' soft edges nothing changes.
        edge = cv2.dilate(covered.astype(np.uint8), np.ones((25, 25))) > 0
        assert changed[~edge].max() == 0
        assert changed[~covered].mean() < 0.1 * changed[covered].mean()


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_files_and_annotations_agree(root, split, count):
    coco = COCO(root / "annotations" / f"{split}.json")
    assert len(coco.imgs) == count
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for index, image in enumerate(coco.loadImgs(sorted(coco.imgs))):
        picture = cv2.imread(str(root / split / image["file_name"]))
        made = make_image(SMALL.seed, split, index)
        np.testing.assert_array_equal(picture[..., ::-1], made.image_rgb)
        assert made.masks.shape[1:] == (image["height"], image["width"])
        annotations = coco.imgToAnns[image["id"]]
        assert [a["category_id"] for a in annotations] == made.labels.tolist()
        for annotation, mask in zip(annotations, made.masks):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation["bbox"] == box


def test_equal_seeds_give_equal_files(root, tmp_path):
    def files(folder: Path) -> dict[str, bytes]:
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    again = make_dataset(tmp_path / "again", SMALL)
    assert files(again) == files(root)
    other = make_dataset(tmp_path / "other", DigitsOptions(6, 4, seed=4))
    assert files(other)["train/train_0000.png"] != files(root)["train/train_0000.png"]


def test_training_and_validation_show_different_digits(monkeypatch):
    images, labels = digits_dataset._digits()
    numbers = np.arange(len(labels))
    # In place of a label, the number of the digit.
    monkeypatch.setattr(digits_dataset, "_digits", lambda: (images, numbers))
    train, val = (
        {n for index in range(40) for n in make_image(3, split, index).labels}
        for split in ("train", "val")
    )
    assert len(train) > 50
    assert not train & val


def test_a_data_set_that_fits_is_kept_and_another_is_replaced(tmp_path):
    written = []
    root, fewer = tmp_path / "digits", DigitsOptions(2, 2, seed=3)
    for options, expected in ((SMALL, 10), (SMALL, 10), (fewer, 14)):
        make_dataset(root, options, on_image=lambda: written.append(1))
        assert len(written) == expected
    content = json.loads((root / "annotations" / "train.json").read_text())
    assert len(content["images"]) == 2
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
