"""Lets a detector tell its candidates: boxes before threshold, limits and NMS."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import ConfigDict
from torch import nn

FLOOR = 0.05
"""Candidates with a lower score count as none."""
MOST_CANDIDATES = 3000


@contextlib.contextmanager
def opened(detector: nn.Module, *, floor: float = FLOOR) -> Iterator[bool]:
    """A block in which ``predict`` of a detector gives all its candidates.

    Test settings are replaced wherever a module keeps them: the threshold becomes
    ``floor``, NMS removes nothing, limits are raised, and a box may have several
    classes. Proposals of two-stage detectors stay as they are. Afterwards every setting
    is the one that it was.

    Args:
        detector (nn.Module): The detector, without wrappers.
        floor (float): Candidates have a higher score. Defaults to :data:`FLOOR`.

    Yields:
        bool: Whether there was something to open; if not, the candidates are the
        final detections.
    """
    changed: list[tuple[nn.Module, Any]] = []
    was_closed = False
    try:
        for path, module in detector.named_modules():
            settings = vars(module).get("test_cfg")
            if not isinstance(settings, Mapping) or "rpn_head" in path.split("."):
                continue
            wide = ConfigDict(copy.deepcopy(dict(settings)))
            was_closed |= _widen(wide, floor)
            changed.append((module, settings))
            module.test_cfg = wide
        yield was_closed
    finally:
        for module, settings in changed:
            module.test_cfg = settings


def _widen(settings: Any, floor: float) -> bool:
    """Open settings in place; tell whether there was something to open.

    Heads of queries have neither threshold nor NMS: their limit stays, since it may
    not be greater than the number of queries.
    """
    found = False
    for name, part in settings.items():
        if isinstance(part, Mapping) and name != "rpn":
            found |= _widen(part, floor)
    if "score_thr" not in settings and "nms" not in settings:
        return found
    settings["score_thr"] = floor
    settings["nms"] = ConfigDict(type="nms", iou_threshold=1.0)
    if "max_per_img" in settings:
        settings["max_per_img"] = MOST_CANDIDATES
    if "nms_pre" in settings:
        settings["nms_pre"] = 10**5
    if "multi_label" in settings:
        settings["multi_label"] = True
    return True
