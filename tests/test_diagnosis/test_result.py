"""A diagnosis as a result: what it keeps of classes and kinds, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.diagnosis import picture
from mmyolo_vis_hooks.diagnosis.contrast import ClassContrast
from mmyolo_vis_hooks.diagnosis.maps import ErrorMap
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.errors import VisConfigError

from .test_diagnose import CLOSE, Scripted, look
from .test_matching import SQUARE

FAR = (60, 60, 90, 90)
MAP = np.eye(100, dtype=np.float32)


@pytest.fixture
def found() -> Diagnosis:
    """A dog that was found, a cat that is missed, a dog called a cat, and nothing."""
    rows = (SQUARE, 0.9, 0.0), (CLOSE, 0.0, 0.7), ((70, 5, 95, 30), 0.5, 0.0)
    diagnosis = look(Scripted(*rows), (SQUARE, 0), (FAR, 1))
    own = ErrorMap(MAP, "neck[0]", inside=0.25, near=0.5)
    apart = ClassContrast("cat", "dog", MAP, MAP, -2 * MAP, "neck[0]")
    confused, *others = diagnosis.false_positives
    object.__setattr__(confused, "map", own)
    object.__setattr__(confused, "contrast", apart)
    assert [other.kind for other in others] == ["background"]
    return diagnosis


def kinds(diagnosis: Diagnosis) -> list[str]:
    return [record["kind"] for record in diagnosis.to_records()]


def test_kept_by_class_and_by_kind(found):
    assert kinds(found) == ["not seen", "confused", "background", "hit"]
    assert kinds(found.of_class("dog")) == ["background", "hit"]
    assert kinds(found.of_class(1)) == ["not seen", "confused"]
    assert kinds(found.of_kind("confused", "not seen")) == ["not seen", "confused"]
    assert repr(found.of_kind("background")) == (
        "Diagnosis(image: 1 found, 0 missed, 1 false)"
    )
    # The image shows what is false of all kinds and classes.
    magenta = [
        (np.abs(own.draw().astype(int) - (220, 38, 127)) < 2).all(axis=2).sum()
        for own in (found.of_kind("duplicate"), found.of_kind("not seen"))
    ]
    assert min(magenta) > 1000
    with pytest.raises(VisConfigError, match="of_kind='lost' is unknown; use one"):
        found.of_kind("lost")
    with pytest.raises(VisConfigError, match=r"'cta' is no class.*did you mean 'cat'"):
        found.of_class("cta")


def test_a_picture_counts_what_it_shows_and_labels_the_best_first(monkeypatch):
    scored = zip((SQUARE, FAR, (50, 0, 80, 30)), (0.9, 0.8, 0.4))
    rows = [(box, score, 0.0) for box, score in scored]
    found = look(Scripted(*rows), (SQUARE, 0, "ignored"), ((0, 60, 30, 90), 1))
    portrait = replace(found, image_rgb=np.zeros((200, 100, 3), np.uint8))
    labels, cells = [], []
    monkeypatch.setattr(
        picture, "draw_boxes", lambda image, boxes: labels.extend(boxes) or image
    )
    monkeypatch.setattr(
        picture, "montage", lambda own, *_, **__: cells.extend(own) or own[0].image_rgb
    )
    portrait.draw()
    assert [label.name + label.tail for label in labels] == [
        "cat not seen",
        "dog 0.90",
        "dog 0.80 background",
        "dog 0.40 background",
    ]
    overview, *panels = cells
    assert overview.note == (
        "0 found (green) · 1 missed (amber) · 2 false (magenta) · 1 on ignored objects "
        "(green, too)"
    )
    third = overview.image_rgb.shape[1] / 3
    assert [panel.image_rgb.shape[1] for panel in panels] == pytest.approx(
        [third] * 3, rel=0.05
    )


def test_a_folder_gets_picture_arrays_and_records(found, tmp_path):
    files = found.save(tmp_path / "new")
    assert [file.name for file in files] == ["image.jpg", "image.npz", "image.json"]
    jpeg = cv2.imread(str(files[0]))[..., ::-1].astype(int)
    assert np.abs(jpeg - found.draw()).mean() < 5
    with np.load(files[1]) as arrays:
        assert arrays["rows"].tolist() == arrays["difference_rows"].tolist() == [1]
        assert np.array_equal(arrays["saliency"], MAP[None])
        assert np.array_equal(arrays["difference"], -2 * MAP[None])
    records: list[dict[str, Any]] = json.loads(files[2].read_text())
    assert records[1] == {
        "image_id": "image",
        "kind": "confused",
        "class_name": "cat",
        "box_xyxy": [10.0, 14.0, 50.0, 54.0],
        "score": 0.7,
        "why": "IoU 0.82 with 'dog'",
        "layer": "neck[0]",
        "inside": 0.25,
    }
    assert (records[0]["score"], records[0]["inside"]) == (0, None)


def test_a_name_gets_one_file(found, tmp_path):
    (file,) = found.of_kind("not seen").save(tmp_path / "own.npz")
    with np.load(file) as arrays:
        assert arrays["saliency"].shape == (0, 100, 100)
    with pytest.raises(VisConfigError, match=r"own\.txt.*use a folder, or a name"):
        found.save(tmp_path / "own.txt")
