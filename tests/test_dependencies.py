"""The check of OpenMMLab, on every kind of mmcv that a user can have."""

from __future__ import annotations

import pkgutil
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from mmengine.utils.dl_utils import mmcv_full_available

from mmyolo_vis_hooks import dependencies
from mmyolo_vis_hooks.dependencies import (
    DependencyError,
    require_mmcv,
    require_openmmlab,
)

COMMAND = shlex.join([sys.executable, "-m", "mmcv_builder"])
VERSION = "__version__ = '2.0.1'\n"


class Without(MetaPathFinder):
    """Makes a package look as if it were not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder mmcv that is imported in place of the installed one."""
    for name in list(sys.modules):
        if name == "mmcv" or name.startswith("mmcv."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "mmcv"
    folder.mkdir()
    return folder


def complaint() -> str:
    """The message of the check; it always ends with the command."""
    with pytest.raises(DependencyError) as raised:
        require_mmcv()
    message = str(raised.value)
    assert message.endswith(f"\n\n    {COMMAND}\n")
    assert not isinstance(raised.value, ImportError)  # custom_imports hides those
    return message


def test_this_environment_passes() -> None:
    require_openmmlab()


def test_mmengine_finds_the_ops_without_what_python_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(pkgutil, "find_loader", raising=False)
    require_openmmlab()
    assert mmcv_full_available()
    assert pkgutil.find_loader("mmcv.no_such_module") is None


@pytest.fixture
def onedl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork's mmcv is installed, under its own distribution name."""
    info = tmp_path / "onedl_mmcv-2.3.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: onedl-mmcv\nVersion: 2.3.6\n")
    monkeypatch.syspath_prepend(tmp_path)


OLD = "__version__ = '0.7.1'"
OF_ANOTHER = "assert False, 'MMCV==2.3.6 is used but incompatible.'"


@pytest.mark.parametrize(
    ("fork", "name", "module", "says", "wanted"),
    [
        (False, "mmdet", None, "mmdet is not installed. Install it", "mmdet>=3.0.0,<4"),
        (
            *(False, "mmengine", OLD),
            "mmengine 0.7.1 is installed, but mmengine>=0.10.0,<1 is needed",
            "mmengine>=0.10.0,<1",
        ),
        (
            *(False, "mmdet", "import no_such_module"),
            "no_such_module is not installed, which mmdet needs",
            "no_such_module",
        ),
        (False, "mmdet", OF_ANOTHER, "MMCV==", ""),
        (True, "mmengine", None, "mmengine is not inst", "onedl-mmengine>=0.10.0,<1"),
        (True, "mmcv", None, "mmcv is not installed", "onedl-mmcv"),
        (True, "mmdet", None, "mmdet is not inst", "onedl-mmdetection>=3.0.0,<4"),
        (
            *(True, "mmdet", OF_ANOTHER),
            "MMCV==2.3.6 is used but incompatible. Install OneDL's",
            "onedl-mmdetection>=3.0.0,<4",
        ),
    ],
)
def test_what_else_is_needed(
    fork: bool,
    name: str,
    module: str | None,
    says: str,
    wanted: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fork:
        request.getfixturevalue("onedl")
    monkeypatch.delitem(sys.modules, name)
    if module is None:
        monkeypatch.setattr(sys, "meta_path", [Without(name), *sys.meta_path])
    else:
        (tmp_path / f"{name}.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError) as raised:
        require_openmmlab()
    message = str(raised.value)
    assert message.startswith(says)
    install = shlex.join([sys.executable, "-m", "pip", "install", wanted])
    assert message.endswith(f"\n\n    {install if wanted else COMMAND}\n")


OPS = "_ext.py"  # stands for the compiled module


@pytest.mark.parametrize(
    ("version", "code", "files", "says"),
    [
        ("2.0.1", "import no_such_module", [], "mmcv does not import: No module named"),
        ("2.0.1", "raise ImportError('libGL')", [], "mmcv does not import: libGL"),
        ("2.0.1", "", [], "mmcv 2.0.1 has no compiled ops (mmcv-lite"),
        ("2.0.0rc3", "", [OPS], "mmcv 2.0.0rc3 is installed, but MMYOLO needs mmcv >="),
        ("2.1.0", "", [OPS], "mmcv 2.1.0 is installed, but MMYOLO needs mmcv >= 2.0.0"),
        ("2.0.0rc4", "", [OPS], ""),
        ("2.0.1", "", [OPS], ""),
    ],
)
def test_kinds_of_mmcv(
    version: str, code: str, files: list[str], says: str, package: Path
) -> None:
    (package / "__init__.py").write_text(f"__version__ = {version!r}\n{code}\n")
    for name in files:
        (package / name).touch()
    if says:
        assert complaint().startswith(says)
    else:
        require_mmcv()


def test_no_mmcv(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Without("mmcv"), *sys.meta_path])
    assert complaint().startswith("mmcv is not installed. Build the right mmcv")


def test_ops_for_another_torch(package: Path) -> None:
    """A real shared library with a symbol that nobody has."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (package / "__init__.py").write_text(VERSION)
    source = package / "ext.cpp"
    source.write_text(
        "namespace c10 { int gone(); }\nint use() { return c10::gone(); }"
    )
    library = package / f"_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    message = complaint()
    assert message.startswith("mmcv 2.0.1 was not compiled for torch ")
    assert "undefined symbol: _ZN3c104goneEv" in message


def test_mmyolo_on_the_mmcv_of_the_fork(
    package: Path, onedl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "__init__.py").write_text("__version__ = '2.3.6'\n")
    (package / "_ext.py").touch()
    monkeypatch.delenv(dependencies.ANY_MMCV, raising=False)
    with pytest.raises(DependencyError, match="but MMYOLO needs mmcv >= ") as raised:
        require_mmcv()
    assert str(raised.value).endswith("\n\n    export MMVIS_ANY_MMCV=1\n")

    monkeypatch.setenv(dependencies.ANY_MMCV, "1")
    monkeypatch.delitem(sys.modules, "mmyolo", raising=False)
    require_openmmlab()
    assert sys.modules["mmyolo"].mmcv_version < (2, 1)  # what its check saw
    assert sys.modules["mmcv"].__version__ == "2.3.6"


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Each of these takes a good part of a second, and may never be needed."""
    heavy = ["pytorch_grad_cam", "matplotlib", "sklearn", "torchvision", "wandb"]
    heavy += ["mmdet.apis", "mmdet.datasets", "mmdet.models", "mmyolo", "tensorboard"]
    script = (
        "import sys, mmyolo_vis_hooks\n"
        f"print(*(name for name in {heavy} if name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True
    )
    assert (child.returncode, child.stdout.split()) == (0, []), child.stderr


def test_the_first_import_names_what_is_missing() -> None:
    """In a process of its own: here everything is imported already."""
    script = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, module, path=None, target=None):\n"
        "        if module.split('.')[0] == 'mmcv':\n"
        "            raise ModuleNotFoundError(module, name=module)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import mmyolo_vis_hooks\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "DependencyError: mmcv is not installed" in run.stderr
