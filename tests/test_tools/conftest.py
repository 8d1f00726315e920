"""What tests of programs share: most run in this process, where one takes a second."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_tools.helpers import NAMES, OBJECTS, ROOT


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a program as its script would; gives its status."""
    # Loggers of earlier tests write to a stdout that is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def call(tool: ModuleType, *args: Any) -> int:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, args)])
        runner = getattr(tool, "run_demo", None) or tool.run_tool
        try:
            runner(tool.main)
        except SystemExit as stopped:
            return 0 if stopped.code is None else int(stopped.code)
        return 0

    return call


@pytest.fixture
def mistake(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a program that refuses what it is given; gives the line that says why."""

    def call(tool: ModuleType, *args: Any, alone: bool = True) -> str:
        capsys.readouterr()
        assert run(tool, *args) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        assert not alone or len(lines) == 1, lines
        assert "error: " in lines[-1]
        return lines[-1]

    return call


@pytest.fixture
def photo_settings(tmp_path: Path) -> list[str]:
    """Settings of a config: a data set of the photo of the cat alone."""
    boxes = [
        dict(
            id=number,
            image_id=1,
            category_id=NAMES.index(name),
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0,
        )
        for number, (name, (x1, y1, x2, y2)) in enumerate(OBJECTS.items(), 1)
    ]
    content = dict(
        images=[dict(id=1, file_name="cat.jpg", width=1200, height=400)],
        annotations=boxes,
        categories=[dict(id=i, name=name) for i, name in enumerate(NAMES)],
    )
    (tmp_path / "objects.json").write_text(json.dumps(content))
    data = {
        "data_root": "",
        "ann_file": str(tmp_path / "objects.json"),
        "data_prefix.img": str(ROOT / "docs" / "images"),
    }
    return [f"val_dataloader.dataset.{name}={v}" for name, v in data.items()]
