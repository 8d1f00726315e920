"""Checks that OpenMMLab is there, with ops that fit this torch, before it is needed.

pip does not install it: an environment may have it under other distribution names, and
mmcv's source builds without ops in pip's isolation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import shlex
import sys
from importlib import metadata
from importlib.abc import Loader
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import InvalidVersion, Version

from .errors import VisError

ANY_MMCV = "MMVIS_ANY_MMCV"
_MMYOLO_TAKES = "2.0.0rc4", "2.1.0"  # what MMYOLO 0.6 asserts of mmcv at import
# Where one of these is installed, the others have to come from there, too.
_ONEDL = {
    "mmengine": "onedl-mmengine",
    "mmcv": "onedl-mmcv",
    "mmdet": "onedl-mmdetection",
}
_BUILDER = Path(__file__).resolve().parents[1] / "tools" / "mmcv_builder.py"


class DependencyError(VisError, RuntimeError):
    """A part of OpenMMLab is missing or does not fit; the message ends with a command.

    It is no ImportError on purpose: MMEngine's ``custom_imports`` replaces those
    by 'Failed to import mmyolo_vis_hooks', and the command would be lost.
    """

    def __init__(self, problem: str, remedy: str, *command: str) -> None:
        super().__init__(f"{problem}. {remedy}:\n\n    {shlex.join(command)}\n")


def require_openmmlab() -> None:
    """Import MMEngine, mmcv and MMDetection, whichever distributions brought them.

    If ``MMVIS_ANY_MMCV=1`` is in the environment, an installed MMYOLO that refuses this
    mmcv is taken past its check.

    Raises:
        DependencyError: One of them is missing, too old, too new, or broken.
    """
    if not hasattr(pkgutil, "find_loader"):
        # MMEngine 0.10 looks for mmcv's ops by it, and Python 3.14 dropped it.
        pkgutil.find_loader = _find_loader  # type: ignore[assignment]
    _require("mmengine", "0.10.0", "1")
    require_mmcv()
    _require("mmdet", "3.0.0", "4")
    if _mmyolo_refuses(sys.modules["mmcv"]):
        _import_mmyolo_past_its_check(sys.modules["mmcv"])


def _find_loader(name: str) -> Loader | None:
    spec = importlib.util.find_spec(name)
    return spec.loader if spec else None


def _require(name: str, at_least: str, below: str) -> None:
    versions = f">={at_least},<{below}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        problem, wanted = f"{error.name} is not installed", str(error.name)
        if error.name == name:
            wanted = _distribution(name) + versions
        else:
            problem += f", which {name} needs"
        raise _pip_error(problem, "Install it", wanted) from error
    except AssertionError as error:  # what MMDetection says of the mmcv it finds
        problem, distribution = str(error).rstrip("."), _distribution(name)
        if distribution == name:
            raise _mmcv_error(problem) from error
        raise _pip_error(problem, "Install OneDL's", distribution + versions) from error
    version = _version_of(module)
    if not _is_between(version, at_least, below):
        problem = f"{name} {version} is installed, but {name}{versions} is needed"
        raise _pip_error(problem, "Install that", _distribution(name) + versions)


def _distribution(name: str) -> str:
    """What brings a package: OneDL's, where another of them is, or one of its name."""
    for distribution in _ONEDL.values():
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(distribution)
            return _ONEDL[name]
    return name


def _pip_error(problem: str, remedy: str, wanted: str) -> DependencyError:
    command = [sys.executable, "-m", "pip", "install", wanted]
    return DependencyError(problem, remedy, *command)


def _mmcv_error(problem: str) -> DependencyError:
    installed = importlib.util.find_spec("mmcv_builder") is not None
    builder = ["-m", "mmcv_builder"] if installed else [str(_BUILDER)]
    remedy = (
        "Build the right mmcv (it takes minutes, needs a C++ compiler, and does nothing"
        " to an mmcv that works)"
    )
    return DependencyError(problem, remedy, sys.executable, *builder)


def require_mmcv() -> None:
    """Import mmcv and load its compiled module.

    Raises:
        DependencyError: mmcv is missing, of a version that an installed MMYOLO
            rejects, without compiled ops, or compiled for another torch.
    """
    try:
        mmcv = importlib.import_module("mmcv")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mmcv"
        problem = (
            "mmcv is not installed" if missing else f"mmcv does not import: {error}"
        )
        if missing and _distribution("mmcv") != "mmcv":
            raise _pip_error(problem, "Install it", _distribution("mmcv")) from error
        raise _mmcv_error(problem) from error
    version = _version_of(mmcv)
    # MMDetection says so itself, once it is imported.
    if _mmyolo_refuses(mmcv) and os.environ.get(ANY_MMCV) != "1":
        low, high = _MMYOLO_TAKES
        problem = (
            f"mmcv {version} is installed, but MMYOLO needs mmcv >= {low}, < {high}"
        )
        if _distribution("mmcv") != "mmcv":
            remedy = "Let MMYOLO run on OneDL's mmcv all the same, which was tried"
            raise DependencyError(problem, remedy, "export", f"{ANY_MMCV}=1")
        raise _mmcv_error(problem)
    torch = importlib.import_module("torch")  # the compiled module links to it
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        problem = f"was not compiled for torch {torch.__version__} ({error})"
        if isinstance(error, ModuleNotFoundError):
            problem = "has no compiled ops (mmcv-lite, or a build in pip's isolation)"
        raise _mmcv_error(f"mmcv {version} {problem}") from error


def _mmyolo_refuses(mmcv: ModuleType) -> bool:
    with_mmyolo = importlib.util.find_spec("mmyolo") is not None
    return with_mmyolo and not _is_between(_version_of(mmcv), *_MMYOLO_TAKES)


def _import_mmyolo_past_its_check(mmcv: Any) -> None:
    """Import MMYOLO while mmcv names a version that it takes.

    MMYOLO's ``__init__`` checks versions and does nothing else, and all that it imports
    is imported already: nobody but the check sees that version.
    """
    version = mmcv.__version__
    mmcv.__version__ = _MMYOLO_TAKES[0]
    try:
        importlib.import_module("mmyolo")
    finally:
        mmcv.__version__ = version


def _version_of(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "unknown"))


def _is_between(version: str, at_least: str, below: str) -> bool:
    try:
        return Version(at_least) <= Version(version) < Version(below)
    except InvalidVersion:
        return False
