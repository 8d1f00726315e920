"""A pytest plugin: with the real data there, no test on it may be skipped."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest


def real_data_is_here() -> bool:
    default = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("MMVIS_SHARED", default)).is_dir()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    marked = item.get_closest_marker("real_data") is not None
    if marked and report.skipped and real_data_is_here():
        report.outcome = "failed"
        report.longrepr = f"skipped, although the real data is here: {report.longrepr}"
