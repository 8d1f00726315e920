"""Checks that OpenMMLab is there, with ops that fit this torch, before it is needed.

pip does not install it: an environment may have it under other distribution names, and
mmcv's source builds without ops in pip's isolation.
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

from packaging.version import InvalidVersion, Version

from .errors import VisError

_BUILDER = Path(__file__).resolve().parents[1] / "tools" / "mmcv_builder.py"


class DependencyError(VisError, RuntimeError):
    """A part of OpenMMLab is missing or does not fit; the message ends with a command.

    It is no ImportError on purpose: MMEngine's ``custom_imports`` replaces those
    by 'Failed to import mmyolo_vis_hooks', and the command would be lost.
    """

    def __init__(self, problem: str, remedy: str, *command: str) -> None:
        line = shlex.join([sys.executable, *command])
        super().__init__(f"{problem}. {remedy}:\n\n    {line}\n")


def require_openmmlab() -> None:
    """Import MMEngine, mmcv and MMDetection, whichever distributions brought them.

    Raises:
        DependencyError: One of them is missing, too old, too new, or broken.
    """
    _require("mmengine", "0.10.0", "1")
    require_mmcv()
    _require("mmdet", "3.0.0", "4")


def _require(name: str, at_least: str, below: str) -> None:
    wanted = f"{name}>={at_least},<{below}"
    command = ("-m", "pip", "install", wanted)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        if error.name != name:
            command = ("-m", "pip", "install", str(error.name))
            missing += f", which {name} needs"
        raise DependencyError(missing, "Install it", *command) from error
    except AssertionError as error:  # what MMDetection says of the mmcv it finds
        raise _mmcv_error(str(error).rstrip(".")) from error
    version = _version_of(module)
    if not _is_between(version, at_least, below):
        problem = f"{name} {version} is installed, but {wanted} is needed"
        raise DependencyError(problem, "Install that", *command)


def _mmcv_error(problem: str) -> DependencyError:
    installed = importlib.util.find_spec("mmcv_builder") is not None
    builder = ["-m", "mmcv_builder"] if installed else [str(_BUILDER)]
    remedy = (
        "Build the right mmcv (it takes minutes, needs a C++ compiler, and does nothing"
        " to an mmcv that works)"
    )
    return DependencyError(problem, remedy, *builder)


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
        problem = "is not installed" if missing else f"does not import: {error}"
        raise _mmcv_error(f"mmcv {problem}") from error
    version = _version_of(mmcv)
    # MMDetection says so itself, once it is imported.
    low, high = "2.0.0rc4", "2.1.0"
    with_mmyolo = importlib.util.find_spec("mmyolo") is not None
    if with_mmyolo and not _is_between(version, low, high):
        problem = (
            f"mmcv {version} is installed, but MMYOLO needs mmcv >= {low}, < {high}"
        )
        raise _mmcv_error(problem)
    torch = importlib.import_module("torch")  # the compiled module links to it
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        problem = f"was not compiled for torch {torch.__version__} ({error})"
        if isinstance(error, ModuleNotFoundError):
            problem = "has no compiled ops (mmcv-lite, or a build in pip's isolation)"
        raise _mmcv_error(f"mmcv {version} {problem}") from error


def _version_of(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "unknown"))


def _is_between(version: str, at_least: str, below: str) -> bool:
    try:
        return Version(at_least) <= Version(version) < Version(below)
    except InvalidVersion:
        return False
