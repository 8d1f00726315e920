"""Mistakes at ``featmap_vis_demo.py`` and ``boxam_vis_demo.py``: each is one line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import _vis_demo
import boxam_vis_demo as boxam_tool
import featmap_vis_demo as featmap_tool
import list_layers as layers_tool
from mmyolo_vis_hooks.detector import build_detector
from tests.test_tools.helpers import CONFIG, write_small


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path_factory) -> Path:
    """Outside the current folder: a small image, and files that are no such thing."""
    folder = tmp_path_factory.mktemp("files")
    write_small(folder / "small.png")
    (folder / "fake.pth").write_bytes(b"no weights")  # as whoever reads it finds out
    (folder / "text.jpg").write_text("no image")
    (folder / "nothing").mkdir()
    (folder / "folder.jpg").mkdir()
    for name, text in CONFIGS.items():
        (folder / name).write_text(text + "\n")
    return folder


CONFIGS = {
    "broken.py": "a = = 1",
    "empty.py": "model = dict(type='YOLODetector')",
    "lazy.py": "from mmdet.models.gone import Nothing\nmodel = dict(type=Nothing)\n"
    "test_pipeline = [dict(type='LoadImageFromFile')]",
    "fails.py": "raise RuntimeError('two\\nlines')",
    "step.py": "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Nope')]\n"
    "model = dict(type='mmdet.FCOS')",
}


def test_mistakes_show_before_the_network_is_built(mistake, files, monkeypatch):
    def fail(*args: Any) -> None:
        pytest.fail("a detector was built")

    monkeypatch.setattr(_vis_demo, "build_detector", fail)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    small, fake = files / "small.png", files / "fake.pth"

    def fails(
        *words: Any,
        img: Any = small,
        config: Any = CONFIG,
        weights: Any = fake,
        tool: ModuleType = featmap_tool,
    ) -> str:
        return mistake(tool, img, config, weights, *words)

    assert "gone.jpg" in fails(img="gone.jpg")
    assert "text.jpg is no image" in fails(img=files / "text.jpg")
    assert "nothing holds no image" in fails(img=files / "nothing")
    assert "no config file gone.py" in fails(config="gone.py")
    assert "broken.py cannot be read" in fails(config=files / "broken.py")
    assert "yolov5/gone.py" in fails(config="mmyolo::yolov5/gone.py")
    assert "no test pipeline" in fails(config=files / "empty.py")
    assert "no checkpoint gone.pth" in fails(weights="gone.pth")
    assert "cuda:99" in fails("--device", "cuda:99")
    assert "--show opens windows, and this machine has no display" in fails("--show")
    assert "jett" in fails("--colormap", "jett")
    # Root may write anywhere, but not below a file.
    below = fake / "below"
    for option in (("--out-dir", below), ("--out-file", below / "x.jpg")):
        assert f"cannot write to the folder {below}" in fails(*option)
    assert "its suffix must say the format" in fails("--out-file", "picture.tmp")
    assert "is a folder" in fails("--out-file", files / "folder.jpg")
    channels = ("--channel-reduction", "None", "--topk", "5", "--arrangement", "2", "2")
    assert "topk=5" in fails(*channels)
    message = fails("--method", "ablationcamm", tool=boxam_tool)
    assert "did you mean 'ablationcam'" in message
    two = (featmap_tool, small, small, CONFIG, fake, "--out-file", "x.jpg")
    assert "there are 2" in mistake(*two)
    assert os.listdir() == []


def test_layers_are_looked_at_before_the_weights(mistake, files):
    args = (boxam_tool, files / "small.png", CONFIG, files / "fake.pth")
    message = mistake(*args, "--target-layers", "backbone.stage5")
    assert "'backbone.stage5' is not a layer" in message
    assert "near matches: backbone.stage4" in message
    assert "fake.pth" in mistake(*args)
    gone = "http://127.0.0.1:1/gone.pth"  # which nobody looks for on the disk
    message = mistake(*args[:-1], gone)
    assert gone in message
    assert "there is no checkpoint" not in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lazy.py", "gone"),
        ("fails.py", "two lines"),
        # The model comes first in one program, the pipeline in the other.
        ("step.py", "FCOS|Nope"),
    ],
)
def test_whatever_a_config_raises_is_one_line(mistake, files, name, reason):
    path = files / name
    args = (path,), (files / "small.png", path, files / "fake.pth")
    for tool, words in zip((layers_tool, boxam_tool), args):
        message = mistake(tool, *words)
        assert re.search(reason, message)
        assert any(word in message for word in (str(path), "model=", "test pipeline"))


def test_weights_of_another_architecture(mistake, files):
    weights = build_detector(CONFIG, "cpu").state_dict()
    other = files / "other.pth"
    torch.save({f"other.{key}": value for key, value in weights.items()}, other)
    message = mistake(featmap_tool, files / "small.png", CONFIG, other)
    assert f"{other} is of another architecture than the config: 0 of 538" in message
