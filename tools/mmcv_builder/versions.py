"""Which mmcv the installed OpenMMLab packages accept."""

from __future__ import annotations

import importlib.util
import re

MMCV_VERSION = "2.0.1"  # what is built: MMYOLO and MMDetection 3 accept it
MINIMUM = (2, 0, 0, 4)  # 2.0.0rc4


def mismatch(version: str) -> str | None:
    """Say who does not accept a version of mmcv.

    Args:
        version (str): ``mmcv.__version__``.

    Returns:
        str | None: 'MMYOLO needs mmcv >= 2.0.0rc4, < 2.1.0', or None if it fits.
    """
    if importlib.util.find_spec("mmyolo") is not None:
        package, limit = "MMYOLO", (2, 1, 0, 0)
    else:
        package, limit = "MMDetection", (2, 2, 0, 0)
    if MINIMUM <= _numbers(version) < limit:
        return None
    upper = ".".join(str(n) for n in limit[:3])
    return f"{package} needs mmcv >= 2.0.0rc4, < {upper}"


def _numbers(version: str) -> tuple[int, int, int, int]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?", version)
    if match is None:
        return (0, 0, 0, 0)
    major, minor, patch, candidate = match.groups()
    # A release comes after all of its candidates.
    return (int(major), int(minor), int(patch), int(candidate or 1_000_000))
