"""The demo program, from its command line to its pictures, on a few images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from rich.progress import Progress

import demo
from tests.test_tools.helpers import TOOLS


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a demo of two epochs, as a user starts it."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(TOOLS / "demo.py"), "--work-dir", "out"]
    command += ["--epochs", "2", "--num-train", "16", "--num-val", "4"]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def results(ran: tuple[Path, str]) -> tuple[Any, dict, dict]:
    """What the demo checks its pictures with."""
    folder = ran[0] / "out"
    (train,) = folder.glob("train/*/vis_data")
    (test,) = folder.glob("test/*/vis_data")
    history = {epoch: {demo.METRIC: 0.0, "coco/bbox_mAP": 0.0} for epoch in (1, 2)}
    trained = {"vis_data": train, "history": history}
    return Config.fromfile(folder / "config.py"), trained, {"vis_data": test}


def test_it_says_what_came_out_and_where(ran):
    folder, output = ran
    assert "mAP50 0." in output
    for epoch in (1, 2):
        assert f"epoch  {epoch}   mAP50" in output
    # The log of the libraries is in the files.
    assert "mmengine - INFO" not in output
    assert "mmengine - INFO" in (folder / "out" / "demo.log").read_text()
    named = [Path(word) for word in output.split() if word.startswith("out/")]
    assert len(named) == 2 * 4 + 1 + 2 + 1
    assert all((folder / path).exists() for path in named)
    assert "tensorboard --logdir out/train/" in output


def test_every_image_is_laid_out_by_epoch(ran):
    sheets = sorted((ran[0] / "out").glob("train/*/*_by_epoch_*.png"))
    assert [sheet.stem for sheet in sheets] == [
        f"{name}_by_epoch_{i + 1}_val_{i:04d}"
        for name, count in (("boxam", 4), ("errors", 1), ("featmap", 4))
        for i in range(count)
    ]
    folder = next((ran[0] / "out").glob("train/*/vis_data/vis_image"))
    panels = sorted(folder.glob("*.boxam.*val_0000_*.png"))
    assert len(panels) == 2
    panel, sheet = cv2.imread(str(panels[0])), cv2.imread(str(sheets[0]))
    assert sheet.size > 2 * panel.size


def test_failures_while_drawing_end_the_demo(ran):
    hooks = demo.vis_hooks(results(ran)[0])
    assert [hook.on_error for hook in hooks.values()] == ["raise"] * 3


def test_missing_and_empty_pictures_are_noticed(ran):
    config, trained, tested = results(ran)
    with Progress(disable=True) as progress:
        assert len(demo.check_pictures(config, trained, tested, progress)) == 9

        *_, victim = sorted((trained["vis_data"] / "vis_image").glob("*.boxam.*.png"))
        content = victim.read_bytes()
        try:
            victim.unlink()
            with pytest.raises(demo.DemoError, match=r"7 boxam pictures .* not 4"):
                demo.check_pictures(config, trained, tested, progress)
            victim.write_bytes(content[: len(content) // 3])
            cv2.imwrite(str(victim), np.full((8, 8, 3), 200, np.uint8))
            with pytest.raises(demo.DemoError, match="shows nothing"):
                demo.check_pictures(config, trained, tested, progress)
        finally:
            victim.write_bytes(content)

        (events,) = trained["vis_data"].glob("events.out.tfevents*")
        hidden = events.rename(ran[0] / "hidden")
        try:
            with pytest.raises(demo.DemoError, match="TensorBoard has 0 pictures"):
                demo.check_pictures(config, trained, tested, progress)
        finally:
            hidden.rename(events)


def test_a_failing_test_program_ends_the_demo(tmp_path, monkeypatch):
    (tmp_path / "test.py").write_text("import sys; sys.exit('log\\nerror: no disk')")
    monkeypatch.setattr(demo, "TOOLS", tmp_path)
    with (
        Progress(disable=True) as progress,
        pytest.raises(demo.DemoError, match=r"test\.log: error: no disk$"),
    ):
        demo.test(tmp_path / "a.py", tmp_path / "a.pth", tmp_path, progress)


def test_a_bad_detector_ends_the_demo(monkeypatch, tmp_path, capsys):
    """The threshold holds for the full demo and not for a quick look."""
    score = {demo.METRIC: 0.5, "coco/bbox_mAP": 0.3}
    results = {
        "import_libraries": None,
        "check_device": None,
        "make_data": tmp_path,
        "make_config": Config(),
        "train": {"checkpoint": None, "vis_data": tmp_path, "history": {}},
        "test": {"metrics": score, "vis_data": tmp_path},
        "check_pictures": [],
    }
    for name, result in results.items():
        monkeypatch.setattr(demo, name, lambda *_, result=result: result)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--work-dir", str(tmp_path)])
    assert demo.main() == 1
    assert "mAP50 is 0.500" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--epochs", "2"])
    assert demo.main() == 0


def test_impossible_options_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs", "1"])
    with pytest.raises(SystemExit):
        demo.parse_args()
    assert "2 epochs" in capsys.readouterr().err
