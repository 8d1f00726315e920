"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch

from tests.toy import write_dataset

if TYPE_CHECKING:
    from tests.test_publish.browser import Browser

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore it, and the children
# that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
BUILDER_TESTS = ("test_mmcv_builder.py", "test_setup_env.py")
BUILDER = [f"tests/test_tools/{name}" for name in BUILDER_TESTS]
BUILDER += ["tools/mmcv_builder.py", "tools/setup_env.py", "requirements", "Makefile"]
EXPLORE = ["tests/test_tools/test_explore.py", "mmyolo_vis_hooks/diagnosis"]
EXPLORE += ["tools/explore.py", "tools/_explore.py", "tools/_explore_page.py"]
DEMO = ["tests/test_tools/test_demo.py", "configs/demo"]
DEMO += ["tools/demo.py", "tools/digits_dataset.py"]
# What starts processes, servers and browsers, and the files that it is of.
LONG = {BUILDER_TESTS: BUILDER, ("test_explore.py",): EXPLORE, ("test_demo.py",): DEMO}


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make long tests nightly while what they are of is as it was."""
    for names, paths in LONG.items():
        own = [item for item in items if item.path.name in names]
        if own and not has_changed(paths):
            for item in own:
                item.add_marker("nightly")


def pytest_collection_finish() -> None:
    """Keep what is imported from the garbage collector.

    MMEngine calls it for each data set: half a second for a million objects.
    """
    gc.freeze()


def has_changed(paths: list[str]) -> bool:
    """Whether files differ from main; True where git cannot tell."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    if shutil.which("git") is None:
        return True
    base = git("merge-base", "HEAD", "origin/main").stdout.strip()
    return git("diff", "--quiet", base, "--", *paths).returncode != 0


@pytest.fixture(scope="session", autouse=True)
def plain_configs() -> Iterator[None]:
    """Write configs as they are: to lay them out takes a third of making a Runner."""
    with mock.patch(
        "mmengine.config.config.FormatCode", lambda text, **_: (text, True)
    ):
        yield


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


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser without a window."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver in PATH")
    from tests.test_publish.browser import Browser  # Selenium takes its time

    opened = Browser(driver, binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged about checkpoints."""
    found: list[str] = []
    monkeypatch.setattr(
        "mmyolo_vis_hooks.checkpoint.print_log", lambda text, **_: found.append(text)
    )
    return found
