"""What other programs read of the boxes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmyolo_vis_hooks.diagnosis.export import Export, ImageFile
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth
from mmyolo_vis_hooks.diagnosis.report import ErrorReport, ImageErrors

HIT, OBJECT, MISSED, FALSE = (
    (10, 20, 60, 80),
    (12, 20, 60, 80),
    (100, 100, 140, 150),
    (200, 10, 280, 90),
)
PACK = (300.0, 100.0, 390.0, 190.0)
WHY = "no candidate for 'dog'"


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """One image: a cat is found, a dog is not, and another cat is not there.

    A dog is found among a pack of dogs.
    """
    report = ErrorReport(["dog", "cat"], {0: 1, 1: 1}, score_thr=0.3, iou_thr=0.5)
    missed = {"truth": 1, "mechanism": "not seen"}
    rows = ((*map(float, HIT), 0.9, 1), (*map(float, FALSE), 0.5, 1), (*PACK, 0.4, 0))
    found = ImageErrors("7_a", (200, 400), rows, (missed,))
    truth = {"boxes_xyxy": [OBJECT, MISSED, PACK], "labels": [1, 0, 0]}
    truth["ignored"] = [False, False, True]
    report.add(found, GroundTruth.of(truth))
    images = {"7_a": ImageFile(7, str(tmp_path / "a.jpg"))}
    return Export(report, images, {"dog": 18, "cat": 17})


def test_coco_reads_what_is_written(export, tmp_path, capsys):
    (tmp_path / "all.json").write_text(export.coco())
    data = COCO(str(tmp_path / "all.json"))
    assert data.loadImgs([7])[0]["width"] == 400
    assert [own["name"] for own in data.loadCats([17, 18])] == ["cat", "dog"]
    boxes = data.loadAnns(data.getAnnIds(imgIds=[7]))
    assert {own["error"]: own["bbox"] for own in boxes} == {
        "found": [10, 20, 50, 60],
        "missed: not seen": [100, 100, 40, 50],
        "false: background": [200, 10, 80, 80],
    }
    assert {own["why"] for own in boxes} >= {WHY, "IoU 0.96"}
    [dog] = data.loadAnns(data.getAnnIds(catIds=[18]))
    assert (dog["score"], dog["area"]) == (0, 2000)

    results = data.loadRes(json.loads(export.coco_results()))
    found = results.loadAnns(results.getAnnIds())
    assert [(own["score"], own["category_id"]) for own in found] == [
        (0.9, 17),
        (0.5, 17),
        (0.4, 18),
    ]


def test_csv(export):
    rows = {row["kind"]: row for row in csv.DictReader(io.StringIO(export.csv()))}
    dog = rows["missed: not seen"]
    assert (dog["image"], dog["class"], dog["x2"], dog["why"]) == (
        "7_a",
        "dog",
        "140.0",
        WHY,
    )
    assert rows["found"]["score"] == "0.9"


def test_fiftyone_reads_what_is_written(export, tmp_path):
    """By its own importer where it is installed, else by the format it documents."""
    levels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    export.write_fiftyone(tmp_path, {"7_a": levels})
    assert "version" not in json.loads((tmp_path / "metadata.json").read_text())
    [sample] = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert sample["filepath"] == str((tmp_path / "a.jpg").resolve())
    truths, found = (
        sample[field]["detections"] for field in ("ground_truth", "predictions")
    )
    assert [(own["label"], own["tags"]) for own in truths] == [
        ("cat", ["found"]),
        ("dog", ["missed: not seen"]),
    ]
    assert [(own["confidence"], own["tags"]) for own in found] == [
        (0.9, ["found"]),
        (0.5, ["false: background"]),
    ]
    np.testing.assert_allclose(truths[0]["bounding_box"], (0.03, 0.1, 0.12, 0.3))
    path = tmp_path / sample["error_map"]["map_path"]
    assert (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) == levels).all()


def test_fiftyone_itself_reads_it(export, tmp_path):
    fiftyone = pytest.importorskip("fiftyone")
    from fiftyone.utils.data import LegacyFiftyOneDatasetImporter

    levels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    export.write_fiftyone(tmp_path, {"7_a": levels})
    # What FiftyOneDataset stands for where the metadata name no version; no database.
    with LegacyFiftyOneDatasetImporter(str(tmp_path)) as importer:
        [sample] = importer
    assert [own.label for own in sample.ground_truth.detections] == ["cat", "dog"]
    found = sample.predictions.detections[1]
    assert (found.confidence, found.tags) == (0.5, ["false: background"])
    assert isinstance(sample.error_map, fiftyone.Heatmap)
    assert Path(sample.error_map.map_path).is_file()
