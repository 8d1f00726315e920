"""A wheel of the checkout works outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORT = """
import sys
from importlib import resources
import mmcv_builder, mmyolo_vis_hooks
from mmyolo_vis_hooks import BoxAMVisHook, FeatMapVisHook
for module in (mmcv_builder, mmyolo_vis_hooks):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
page = resources.files("mmyolo_vis_hooks.publish")
templates = "common_head.html", "index_template.html", "errors_template.html"
for name in (*templates, "common.css", "common.js"):
    assert len((page / name).read_text("utf-8")) > 400
print(mmyolo_vis_hooks.__version__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "target"
    ignore = shutil.ignore_patterns(".*", "work_dirs", "tests", "docs", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)  # a build leaves files behind
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_it_imports_from_another_folder(installed: Path) -> None:
    command = [sys.executable, "-c", IMPORT, str(installed)]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    version = subprocess.check_output(command, cwd="/", env=env, text=True).strip()
    assert (installed / f"mmyolo_vis_hooks-{version}.dist-info").is_dir()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_it_holds_every_module_and_nothing_else(installed: Path) -> None:
    packed = {path.relative_to(installed) for path in installed.glob("mm*/**/*.py")}
    here = {path.relative_to(ROOT) for path in ROOT.glob("mmyolo_vis_hooks/**/*.py")}
    assert packed == here
    top = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert top == {"mmyolo_vis_hooks", "mmcv_builder.py"}


def test_it_asks_for_nothing_of_openmmlab(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info/METADATA")
    message = Parser().parsestr(metadata.read_text("utf-8"))
    wanted = message.get_all("Requires-Dist", [])
    core = {line[:4] for line in wanted if "extra ==" not in line}
    extra = {line[:4] for line in wanted if 'extra == "openmmlab"' in line}
    assert "grad" in core
    assert not core & {"mmde", "mmen", "mmcv", "mmyo"}
    assert {"mmde", "mmen", "mmyo"} <= extra
    assert "mmcv" not in extra  # it is built
