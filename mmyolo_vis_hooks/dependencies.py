"""Checks that mmcv is there, with ops that fit this torch, before they are needed.

mmcv cannot be a requirement that pip installs (its source builds without ops in
pip's isolation), so a user can get here with none, with mmcv-lite, or with an
mmcv that was compiled for another torch. Each of these otherwise ends in a
traceback from the middle of MMDetection.
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .errors import VisError

_TOOLS = Path(__file__).resolve().parents[1] / "tools"


class DependencyError(VisError, RuntimeError):
    """mmcv is missing or does not fit; the message ends with the command to run.

    It is no ImportError on purpose: MMEngine's ``custom_imports`` replaces those
    by 'Failed to import mmyolo_vis_hooks', and the command would be lost.
    """

    def __init__(self, problem: str) -> None:
        installed = importlib.util.find_spec("mmcv_builder") is not None
        builder = ["-m", "mmcv_builder"] if installed else [f"{_TOOLS}/build_mmcv.py"]
        command = shlex.join([sys.executable, *builder])
        super().__init__(
            f"{problem}. Build the right mmcv (it takes minutes, needs a C++ compiler, "
            f"and does nothing to an mmcv that works):\n\n    {command}\n"
        )


def require_mmcv() -> None:
    """Raise unless mmcv imports, is of an accepted version and has its ops.

    Imports mmcv (0.4 s, which MMDetection spends anyway) and loads its compiled
    module (0.01 s), but not ``mmcv.ops``.

    Raises:
        DependencyError: mmcv is missing, of a version that MMYOLO or MMDetection
            rejects, without compiled ops, or compiled for another torch.
    """
    try:
        mmcv = importlib.import_module("mmcv")
    except ModuleNotFoundError as error:
        if error.name == "mmcv":
            raise DependencyError("mmcv is not installed") from error
        raise DependencyError(f"mmcv does not import: {error}") from error
    except ImportError as error:
        raise DependencyError(f"mmcv does not import: {error}") from error
    version = getattr(mmcv, "__version__", "unknown")
    problem = _mismatch(version)
    if problem is not None:
        raise DependencyError(f"mmcv {version} is installed, but {problem}")
    torch = importlib.import_module("torch")  # the compiled module links to it
    try:
        importlib.import_module("mmcv._ext")
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"mmcv {version} has no compiled ops (mmcv-lite, or a build in pip's "
            "isolation)"
        ) from error
    except ImportError as error:
        raise DependencyError(
            f"mmcv {version} was not compiled for torch {torch.__version__} ({error})"
        ) from error


def _mismatch(version: str) -> str | None:
    """Who does not accept a version of mmcv, or None."""
    if importlib.util.find_spec("mmyolo") is not None:
        package, limit = "MMYOLO", "2.1.0"
    else:
        package, limit = "MMDetection", "2.2.0"
    try:
        fits = Version("2.0.0rc4") <= Version(version) < Version(limit)
    except InvalidVersion:
        fits = False
    return None if fits else f"{package} needs mmcv >= 2.0.0rc4, < {limit}"
