"""Installing wheels into a scratch environment that borrows this one's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmcv_builder import install
from mmcv_builder.environment import Torch
from mmcv_builder.install import install_requirements, numpy_limit
from mmcv_builder.messages import BuildError
from mmcv_builder.versions import mismatch

from .fakes import write_wheel

ROOT = Path(__file__).resolve().parents[2] / "tools"
TORCH = Torch("2.9.0", None, None, False, (), True, 17)


class Scratch:
    """A virtual environment in which installing changes nothing else."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        subprocess.run(command, check=True)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python*")) / "site-packages"
        (self.site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, code: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [str(self.python), "-c", code], capture_output=True, text=True, env=env
        )

    def install(self, wheel: Path, log: Path) -> subprocess.CompletedProcess[str]:
        return self.run(
            "from pathlib import Path\n"
            "from mmcv_builder.install import install_wheel\n"
            f"install_wheel(Path({str(wheel)!r}), Path({str(log)!r}))\n"
        )

    def mmcv(self) -> str:
        code = "import mmcv; print(mmcv.__version__, hasattr(mmcv, 'LITE'))"
        return self.run(code).stdout.strip()


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path / "venv")


def test_wheel_replaces_mmcv_and_its_lite_twin(
    scratch: Scratch, tmp_path: Path
) -> None:
    log = tmp_path / "install.log"
    lite = {"mmcv/__init__.py": "__version__ = '2.2.0'\nLITE = 1\n", "mmcv/x.py": ""}
    first = scratch.install(write_wheel(tmp_path, "mmcv-lite", "2.2.0", lite), log)
    assert first.returncode == 0, first.stderr
    assert scratch.mmcv() == "2.2.0 True"
    full = {"mmcv/__init__.py": "__version__ = '2.0.2'\n"}
    wheel = write_wheel(tmp_path, "mmcv", "2.0.2", full)
    second = scratch.install(wheel, log)
    assert second.returncode == 0, second.stderr
    assert scratch.mmcv() == "2.0.2 False"
    assert not (scratch.site / "mmcv" / "x.py").exists()
    names = sorted(path.name for path in scratch.site.glob("mmcv*"))
    assert names == ["mmcv", "mmcv-2.0.2.dist-info"]


def test_a_failing_install_leaves_the_old_mmcv(
    scratch: Scratch, tmp_path: Path
) -> None:
    log = tmp_path / "install.log"
    old = {"mmcv/__init__.py": "__version__ = '2.0.0'\n"}
    scratch.install(write_wheel(tmp_path, "mmcv", "2.0.0", old), log)
    # A file cannot be made below a file: pip fails after it removed the old one.
    new = {"mmcv/__init__.py": "__version__ = '2.0.2'\n", "taken/x.py": ""}
    (scratch.site / "taken").write_text("in the way")
    done = scratch.install(write_wheel(tmp_path, "mmcv", "2.0.2", new), log)
    assert done.returncode != 0
    assert "pip could not install mmcv-2.0.2" in done.stderr
    assert f"Log: {log}" in done.stderr
    assert scratch.mmcv() == "2.0.0 False"


def test_nothing_is_installed_where_nothing_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "run_logged", lambda *_: pytest.fail("pip was run"))
    install_requirements(TORCH, tmp_path / "log", allowed=True)


def test_only_what_is_missing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"numpy": "numpy", "no_such_module": "no-such-name"}
    monkeypatch.setattr(install, "RUNTIME_MODULES", modules)
    with pytest.raises(BuildError, match=r"needs no-such-name.*pip .*no-such-name"):
        install_requirements(TORCH, tmp_path / "log", allowed=False)
    commands: list[list[str]] = []
    monkeypatch.setattr(install, "run_logged", lambda c, _: commands.append(list(c)))
    with pytest.raises(BuildError, match="needs no_such_module, which does not import"):
        install_requirements(TORCH, tmp_path / "log", allowed=True)
    [command] = commands
    wanted = command[command.index("install") + 1 :]
    assert wanted[0] == "no-such-name"
    assert wanted[1].startswith("numpy==")  # NumPy stays


def test_opencv_without_its_libraries_names_the_headless_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"libGL\.so\.1.*opencv-python-headless"):
        install_requirements(TORCH, tmp_path / "log", allowed=True)


def test_numpy_fits_the_torch() -> None:
    old = Torch("2.1.2+cu121", "12.1", None, False, (), True, 17)
    assert numpy_limit(old, ["numpy", "addict"]) == ["numpy<2"]
    assert numpy_limit(TORCH, ["numpy"]) == []
    [held] = numpy_limit(old, ["addict"])
    assert held.startswith("numpy==")


@pytest.mark.parametrize(
    ("version", "with_mmyolo", "without"),
    [
        ("2.0.0rc3", False, False),
        ("2.0.0rc4", True, True),
        ("2.0.0", True, True),
        ("2.0.1", True, True),
        ("2.0.1+cpu", True, True),
        ("2.1.0", False, True),
        ("2.2.0", False, False),
        ("1.7.2", False, False),
        ("unknown", False, False),
    ],
)
def test_accepted_versions(
    version: str, with_mmyolo: bool, without: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = mismatch(version)
    assert (said is None) == with_mmyolo
    if said is not None:
        assert said == "MMYOLO needs mmcv >= 2.0.0rc4, < 2.1.0"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    said = mismatch(version)
    assert (said is None) == without
    if said is not None:
        assert said == "MMDetection needs mmcv >= 2.0.0rc4, < 2.2.0"
