"""``list_layers.py``, and the same table of ``--preview-model``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import pytest

import boxam_vis_demo
import list_layers
from tests.test_tools.helpers import CONFIG, write_small


def rows_of(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Of a printed tree: channels, height, width and stride of each layer's maps."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    pattern = re.compile(
        r"^\s*(?:(?P<path>[a-z_][\w.\[\]]*)\s+\w+)?"
        r"\s+(\d+) x (\d+) x (\d+)\s+(\d+)(?:\s|$)"
    )
    path = ""
    for line in text.splitlines():
        if match := pattern.match(line):
            path = match["path"] or path
            rows.setdefault(path, []).append(tuple(map(int, match.groups()[1:])))
    return rows


def pyramid(channels: Sequence[int], height: int, width: int) -> list[tuple[int, ...]]:
    """What layers with strides 8, 16 and 32 put out."""
    strides = (8, 16, 32)
    return [(c, height // s, width // s, s) for c, s in zip(channels, strides)]


@pytest.mark.real_data
def test_the_preview_needs_no_weights(run, shared_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = shared_dir / "data" / "dog.jpg"
    assert run(boxam_vis_demo, image, CONFIG, "none.pth", "--preview-model") == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert rows["neck.out_convs[2]"] == [(64, 10, 13, 32)]
    assert "network input 320 x 416" in text
    assert "--target-layers backbone" in text
    assert os.listdir() == []


def test_list_layers(run, capsys, tmp_path):
    def listed(*args: Any) -> dict[str, list[tuple[int, ...]]]:
        assert run(list_layers, CONFIG, *args) == 0
        return rows_of(capsys.readouterr().out)

    rows = listed()
    # 480 x 640 in 416 x 416, then to whole cells of 32 pixels.
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert "backbone.stage1[0].depthwise_conv" not in rows
    rows = listed("--size", "640", "480", "--depth", "1")
    assert rows["neck"] == pyramid((64, 64, 64), 416, 320)
    assert set(rows) == {"backbone", "neck", "bbox_head"}
    tall = tmp_path / "tall.png"
    write_small(tall, hw=(90, 30))
    option = "test_dataloader.dataset.pipeline.1.scale=(192, 192)"
    rows = listed(
        *("--img", tmp_path / "tall.png", "--cfg-options", option, "--depth", "4")
    )
    assert rows["backbone"] == pyramid((64, 128, 256), 192, 64)
    assert rows["backbone.stage1[0].depthwise_conv"] == [(16, 48, 16, 4)]


def test_mistakes_of_list_layers(run, mistake, capsys, monkeypatch, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    for words, part in (
        ("none.py", "no config file none.py"),
        (f"{CONFIG} --size 0 5", "--size"),
        (f"{CONFIG} --depth 0", "--depth 0"),
        ("nope::yolov8/a.py", "after '::' comes a path"),
        (f"{CONFIG} --cfg-options test_pipeline.99.scale=1", "does not fit the config"),
        (f"{CONFIG} --cfg-options model.type=Nope", "model='Nope' cannot be built"),
        (f"{CONFIG} --img {tmp_path}", "broken.mp4 is no video"),
    ):
        assert part in mistake(list_layers, *words.split())
    monkeypatch.setenv("MMYOLO_VIS_TRACEBACK", "1")
    assert run(list_layers, "none.py") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
