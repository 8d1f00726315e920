"""No test is left out but where it may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import pytest

@pytest.fixture
def data():
    pytest.skip("no images")

@pytest.mark.real_data
def test_real(data): ...

def test_other(data): ...
"""


@pytest.mark.parametrize(
    ("folder", "code", "summary"),
    [(".", 1, "1 skipped, 1 error"), ("none", 0, "2 skipped")],
)
def test_a_skip_fails_only_where_the_data_is(
    folder: str, code: int, summary: str, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = real_data: x\n")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / ".ci"),
        "MMVIS_SHARED": str(tmp_path / folder),
    }
    env.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "require_real_data"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout
    assert summary in done.stdout


def test_git_says_whether_files_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    assert conftest.has_changed(["a"])  # git cannot tell

    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True)

    def commit(name: str) -> None:
        (tmp_path / name).write_text("text")
        git("add", name)
        git("commit", "-q", "-m", name)

    git("init", "-q")
    commit("a")
    assert conftest.has_changed(["a"])  # no main to compare with
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert not conftest.has_changed(["a"])  # main itself
    commit("b")
    assert not conftest.has_changed(["a"])
    assert conftest.has_changed(["a", "b"])
    (tmp_path / "a").write_text("not committed yet")
    assert conftest.has_changed(["a"])
