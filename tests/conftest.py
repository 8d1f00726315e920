"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.toy import write_dataset

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
BUILDER_TESTS = ("test_mmcv_builder.py", "test_setup_env.py")
BUILDER = [f"tests/test_tools/{name}" for name in BUILDER_TESTS]
BUILDER += ["tools/mmcv_builder.py", "tools/setup_env.py", "requirements", "Makefile"]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make the builder's tests nightly while it is as it was: they start processes."""
    if not has_changed(BUILDER):
        for item in items:
            if item.path.name in BUILDER_TESTS:
                item.add_marker("nightly")


def has_changed(paths: list[str]) -> bool:
    """Whether files differ from main; True where git cannot tell."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    if shutil.which("git") is None:
        return True
    base = git("merge-base", "HEAD", "origin/main").stdout.strip()
    return git("diff", "--quiet", base, "--", *paths).returncode != 0


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real images and weights beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MMVIS_SHARED", default))
    if not (folder / "data" / "coco128").is_dir():
        pytest.skip(f"real images not found; set MMVIS_SHARED (tried {folder.name}/)")
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of bright squares with COCO annotations; nobody writes to it."""
    root = tmp_path_factory.mktemp("toy_data")
    write_dataset(root)
    return root


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged about checkpoints."""
    found: list[str] = []
    monkeypatch.setattr(
        "mmyolo_vis_hooks.checkpoint.print_log", lambda text, **_: found.append(text)
    )
    return found
