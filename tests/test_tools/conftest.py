"""What tests of programs share: most run in this process, where one takes a second."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


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
