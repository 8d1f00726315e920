"""``explain_errors.py`` on a data set of one photo, and on real ones."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset

import explain_errors
from _dataset import warn_of_classes
from mmyolo_vis_hooks.diagnosis.contrast import ClassContrast
from mmyolo_vis_hooks.diagnosis.matching import FalseAlarm, GroundTruth
from mmyolo_vis_hooks.diagnosis.report import ErrorReport, ImageErrors
from mmyolo_vis_hooks.diagnosis.result import FalsePositive
from tests.test_publish.pages import data_of
from tests.test_tools.helpers import CONFIG as COCO128
from tests.test_tools.helpers import NAMES, OBJECTS, PHOTO, WEIGHTS, photo_settings
from tests.test_tools.helpers import NANO as CONFIG


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the program on the photo; gives the folder of what it wrote."""
    out_dir = tmp_path / "errors"

    def run(*words: Any, weights: Path = WEIGHTS) -> Path:
        line = [CONFIG, weights, "--out-dir", out_dir, "--device", "cpu", *words]
        words = "explain_errors", *line, "--cfg-options", *photo_settings(tmp_path)
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        explain_errors.run_tool(explain_errors.main)
        return out_dir

    return run


def test_what_is_written_of_a_photo(call, capsys):
    out_dir = call("--score-thr", 0.75, "--fiftyone")
    summary = json.loads((out_dir / "summary.json").read_text())
    assert (summary["images"], summary["hits"]) == (1, 1)
    assert {k: n for k, n in summary["missed"].items() if n} == {
        "below threshold": 1,
        "not seen": 1,
    }
    assert {k: n for k, n in summary["false"].items() if n} == {"both": 1}
    assert summary["dap"]["missed"] == pytest.approx(2 / 3)

    table, spoon, cup = json.loads((out_dir / "errors.json").read_text())
    assert table["kind"] == "missed"
    assert table["mechanism"] == "below threshold"
    assert table["class"] == "dining table"
    assert table["score"] == pytest.approx(0.69, abs=0.01)
    assert table["box_xyxy"] == list(OBJECTS["dining table"])
    assert (spoon["mechanism"], spoon["size"]) == ("not seen", "large")
    assert (cup["kind"], cup["class"], cup["mechanism"]) == ("both", "cup", "")
    assert table["why"] == "0.69 for 'dining table', threshold 0.75"
    [(role, candidate)] = table["others"]
    assert role == "candidate"
    np.testing.assert_allclose(candidate, OBJECTS["dining table"], atol=40)

    rows = list(csv.reader((out_dir / "errors.csv").open()))
    assert ["missed", "not seen", "spoon", "large", "1", "1.0"] in rows
    first, *_, last = csv.DictReader((out_dir / "classes.csv").open())
    assert {first["class"], last["class"]} == {"dining table", "cat"}
    assert (last["objects"], last["hits"], last["ap"]) == ("1", "1", "1.0")
    assert (first["missed"], first["dap missed"], first["ap"]) == ("1", "1.0", "0.0")
    picture = cv2.imread(str(out_dir / "001_1_cat.jpg"))
    assert picture is not None
    assert picture.shape[1] > 1200
    detections = json.loads((out_dir / "detections.json").read_text())
    assert {own["category_id"] for own in detections} == {
        NAMES.index("cat"),
        NAMES.index("cup"),
    }
    assert {own["image_id"] for own in detections} == {1}
    kinds = [row["kind"] for row in csv.DictReader((out_dir / "boxes.csv").open())]
    missed = ["missed: below threshold", "missed: not seen"]
    assert kinds == ["found", *missed, "false: both"]
    [sample] = json.loads((out_dir / "fiftyone" / "samples.json").read_text())[
        "samples"
    ]
    assert Path(sample["filepath"]) == PHOTO
    heat = cv2.imread(str(out_dir / "fiftyone" / sample["error_map"]["map_path"]))
    assert heat.max() > 200
    page = data_of(out_dir / "index.html")
    assert [entry[4] for entry in page["entries"]] == [
        "dining table: below threshold",
        "spoon: not seen",
        "cup: both",
    ]
    assert page["images"] == [["1_cat", 1200, 400, "001_1_cat.jpg"]]
    [[part, _, note, _], [none, _, why, _], [other, *_]] = (
        entry[8][0] for entry in page["entries"]
    )
    assert (part, none, other) == ("0", "", "2")
    assert "% of it inside" in note
    assert "no candidate" in why
    for part in ("image", "0", "2"):
        assert (out_dir / "index_files" / f"1_cat.{part}.jpg").exists()
    printed = capsys.readouterr().out
    assert "1 images, 1 objects found" in printed
    assert "The 3 of 3 classes" in printed
    assert "loading annotations" not in printed


def test_maps_of_a_confused_box_are_those_of_both_classes():
    given, right = np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)
    contrast = ClassContrast("cat", "dog", given, right, -3 * given, "neck[1]")
    alarm, box = FalseAlarm(0, "confused", 0, 0.9), np.zeros(4, np.float32)
    own = FalsePositive("cat", 0.9, box, "confused", "", None, alarm, contrast)
    maps = list(explain_errors.maps_of(own, "7"))
    assert [(m.asset, m.title) for m, _ in maps] == [
        ("7r", "For dog"),
        ("7g", "For cat"),
        ("7d", "Their difference"),
    ]
    assert [page_map.signed for page_map, _ in maps] == [False, False, True]
    assert (maps[2][1] == -given).all()


def test_a_call_goes_on_where_it_was(call, monkeypatch, capsys):
    def interrupted(self, name, *, maps):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(explain_errors.Errors, "diagnose", interrupted)
        with pytest.raises(SystemExit, match="130"):
            call("--num-pictures", 0)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    out_dir = call("--num-pictures", 0)
    before = (out_dir / "errors.json").read_text()
    assert not list(out_dir.glob("*.jpg"))
    kept = out_dir / "images.jsonl"
    whole = kept.read_text()
    (out_dir / "errors.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(explain_errors.Errors, "diagnose", None)  # nothing is looked at
        call("--num-pictures", 0)
    diagnose = explain_errors.Errors.diagnose

    def without_maps(self, name, *, maps):
        return replace(diagnose(self, name, maps=False), note="no maps: of no layer")

    with monkeypatch.context() as patch:
        patch.setattr(explain_errors.Errors, "diagnose", without_maps)
        call("--num-pictures", 1)
    page = (out_dir / "index.html").read_text()
    assert "no maps: of no layer" in page
    with monkeypatch.context() as patch:
        patch.setattr(explain_errors.Errors, "diagnose", None)  # nor drawn
        call("--num-pictures", -1)
    assert (out_dir / "index.html").read_text() == page
    assert (out_dir / "errors.json").read_text() == before
    inner = whole.index("]", whole.index("\n")) + 1
    for end in (len(whole) * 2 // 3, inner):  # cut off in its only image
        kept.write_text(whole[:end])
        call("--num-pictures", 0)
        assert (out_dir / "errors.json").read_text() == before
        assert kept.read_text() == whole


def test_what_cannot_work_ends_in_one_line(call, capsys):
    def error(*words: Any) -> str:
        with pytest.raises(SystemExit) as end:
            call(*words)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "score_thr=2.0" in error("--score-thr", 2)
    assert "--num-pictures -2" in error("--num-pictures", -2)
    out_dir = call("--num-pictures", 0)
    assert "holds results of another call" in error("--score-thr", 0.5)
    summary = (out_dir / "summary.json").read_text()
    for notes in ("", "my notes", "[1, 2]\n", "\xff"):  # of the user's
        (out_dir / "images.jsonl").write_text(notes, "latin-1")
        assert "holds results of another call" in error("--num-pictures", 1)
        assert (out_dir / "summary.json").read_text() == summary
    (out_dir / "images.jsonl").unlink()
    assert "not of an earlier call" in error()


def test_classes_in_another_order_are_noticed(call, tmp_path, monkeypatch, caplog):
    """The file has the cat before the cup, and so it is numbered, whoever asks."""
    classes = "val_dataloader.dataset.metainfo.classes=cup,cat"
    settings = [*photo_settings(tmp_path), classes]
    monkeypatch.setattr(sys.modules[__name__], "photo_settings", lambda _: settings)
    call("--num-pictures", 0)
    [warning] = caplog.messages
    assert warning.startswith("label 0 is 'cat' in the data set and 'person' for the")


def test_a_data_set_of_another_format_is_taken_by_its_word(caplog):
    class Own(CocoDataset):
        def load_data_list(self) -> list[dict]:
            return [dict(img_id=1, img_path="a.jpg", instances=[])]

    own = Own(ann_file="objects.csv", metainfo=dict(classes=("cat", "dog")))
    warn_of_classes(own, ("cat", "dog"))
    warn_of_classes(own, ("cat", "cow"))
    [warning] = caplog.messages
    assert warning.startswith("label 1 is 'dog' in the data set and 'cow' for the")


def test_class_names_that_look_like_markup_are_printed_as_they_are(capsys):
    odd = "bolt[steel]", "[/red]", ":cat:"
    report = ErrorReport(odd, dict.fromkeys(range(3), 1), score_thr=0.3, iou_thr=0.5)
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9)]
    objects = GroundTruth.of(dict(boxes_xyxy=boxes, labels=range(3)))
    report.add(ImageErrors("a", (60, 60), (), ()), objects)
    explain_errors.print_report(report)
    printed = capsys.readouterr().out
    assert all(f"\n {name} " in printed for name in odd)


def test_other_weights_under_the_same_name_are_noticed(call, tmp_path, capsys):
    """A best.pth that was trained on since must not show the errors of the old one."""
    weights = torch.load(WEIGHTS, weights_only=True)
    path = tmp_path / "best.pth"
    torch.save(weights, path)
    call("--num-pictures", 0, weights=path)
    next(iter(weights["state_dict"].values())).mul_(1.1)
    torch.save(weights, path)
    with pytest.raises(SystemExit):
        call("--num-pictures", 0, weights=path)
    assert "with other weights" in capsys.readouterr().err


@pytest.mark.real_data
def test_the_errors_of_real_photos(shared_dir, tmp_path, monkeypatch):
    """Counts of a prototype of other code, but for four objects near a limit."""
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    config = COCO128
    words = [config, WEIGHTS, "--out-dir", tmp_path, "--num-pictures", 1]
    words += ["--device", "cpu", "--topk", 2]
    monkeypatch.setattr(sys, "argv", ["explain_errors", *map(str, words)])
    explain_errors.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["hits"] == 365
    missed = Counter(summary["missed"])
    assert sum(missed.values()) == 564
    prototype = dict(zip(sorted(missed), (68, 122, 16, 346, 12)))
    assert all(abs(missed[kind] - count) <= 4 for kind, count in prototype.items())
    # It counted 36 detections on crowds, too.
    assert sum(summary["false"].values()) == 190 - 36
    assert len(list(tmp_path.glob("001_*.jpg"))) == 1
