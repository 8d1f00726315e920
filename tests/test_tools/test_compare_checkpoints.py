"""``compare_checkpoints.py`` on a photo, with weights that see less."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import compare_checkpoints
from _errors import Errors
from tests.test_publish.pages import data_of
from tests.test_tools.helpers import NANO, WEIGHTS, photo_settings


@pytest.fixture
def blinder(tmp_path: Path) -> Path:
    """Weights with which every score is lower."""
    weights = torch.load(WEIGHTS, weights_only=True)
    for name, value in weights["state_dict"].items():
        if "conv_obj" in name and name.endswith("bias"):
            value -= 2
    torch.save(weights, tmp_path / "blinder.pth")
    return tmp_path / "blinder.pth"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Compares the weights with others on the photo; gives the folder."""
    out_dir = tmp_path / "comparison"

    def run(other: Path, *words: Any) -> Path:
        line = [NANO, WEIGHTS, other, "--out-dir", out_dir, "--device", "cpu", *words]
        words = "compare_checkpoints", *line, "--cfg-options", *photo_settings(tmp_path)
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        compare_checkpoints.run_tool(compare_checkpoints.main)
        return out_dir

    return run


def test_what_is_broken_and_what_is_mended(call, blinder, capsys, monkeypatch):
    out_dir = call(blinder, "--score-thr", 0.6)
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["objects"] == {"both": 1, "only A": 1, "only B": 0, "neither": 1}
    assert summary["false"] == {"both": 0, "only A": 1, "only B": 0}
    assert summary["a"]["ap"] > summary["b"]["ap"]
    kinds = {k: n for k, n in summary["kinds"].items() if any(n.values())}
    assert kinds == {
        "missed: below threshold": {"a": 0, "b": 1, "mended": 0, "new": 1},
        "missed: not seen": {"a": 1, "b": 1, "mended": 0, "new": 0},
        "false: both": {"a": 1, "b": 0, "mended": 1, "new": 0},
    }
    cat, table, spoon, cup = json.loads((out_dir / "changes.json").read_text())
    assert (cat["change"], cat["found_by"]) == ("right in both", "both")
    assert cat["a"]["score"] > cat["b"]["score"]
    assert (table["change"], table["found_by"]) == ("broken", "only A")
    assert table["a"]["score"] > 0.6 > table["b"]["score"]
    assert spoon["change"] == "wrong in both"
    assert (cup["change"], cup["b"]["kind"]) == ("mended", "nothing")
    rows = list(csv.reader((out_dir / "changes.csv").open()))
    found = ["broken", "only A", "found", "missed: below threshold"]
    assert [*found, "dining table", "large", "1"] in rows

    page = data_of(out_dir / "index.html")
    titles = {entry[4]: entry for entry in page["entries"]}
    assert set(titles) == {
        "cat: found → found",
        "dining table: found → below threshold",
        "spoon: not seen → not seen",
        "cup: false: both → nothing",
    }
    maps = titles["dining table: found → below threshold"][8]
    assert [title for _, title, *_ in maps] == ["Map of A", "Map of B", "B minus A"]
    of_a, of_b, apart = (
        cv2.imread(str(out_dir / "index_files" / f"1_cat.{own[0]}.jpg"), 0).astype(int)
        for own in maps
    )
    # One scale: the larger maximum is 1; zero is in the middle of the difference.
    tops = sorted((of_a.max() / 255, of_b.max() / 255))
    shares = sorted(float(own[2].split()[-1]) for own in maps[:2])
    np.testing.assert_allclose(tops, shares, atol=0.03)
    assert shares[0] < 0.95 < shares[1] == 1
    expected = 127.5 + (of_b - of_a) / 2
    assert np.abs(apart - expected).mean() < 2
    gone = titles["cup: false: both → nothing"][8]
    assert [part for part, *_ in gone] == ["3a", ""]
    assert "1 only by A" in capsys.readouterr().out

    before = (out_dir / "index.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Errors, "diagnose", None)  # nothing is looked at again
        call(blinder, "--score-thr", 0.6)
    assert (out_dir / "index.html").read_text() == before


def test_what_cannot_be_compared_ends_in_one_line(call, tmp_path, capsys):
    def error(*words: Any) -> str:
        with pytest.raises(SystemExit) as end:
            call(*words)
        assert end.value.code == 2
        return capsys.readouterr().err

    weights = torch.load(WEIGHTS, weights_only=True)
    names = weights["meta"]["dataset_meta"]["classes"]
    weights["meta"]["dataset_meta"]["classes"] = (*names[:-1], "comb")
    torch.save(weights, tmp_path / "other.pth")
    message = error(tmp_path / "other.pth")
    assert "class 79 is toothbrush of A and comb of B" in message
    assert "B: there is no checkpoint" in error(tmp_path / "none.pth")
    config = tmp_path / "other.py"
    cats = dict(dataset=dict(metainfo=dict(classes=["cat"])))
    config.write_text(f"_base_ = {str(NANO)!r}\nval_dataloader = {cats}\n")
    assert "other images or objects" in error(WEIGHTS, "--config-b", config)
