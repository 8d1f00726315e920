"""Other test settings of a detector for a while: thresholds, limits, NMS."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.config import ConfigDict
from torch import nn


@contextlib.contextmanager
def other_settings(
    detector: nn.Module, change: Callable[[ConfigDict], None]
) -> Iterator[bool]:
    """A block in which a detector predicts with changed copies of its test settings.

    Settings of region proposals stay as they are, and so do those of heads of queries,
    which have neither a threshold nor NMS.

    Args:
        detector (nn.Module): The detector, without wrappers.
        change (Callable): Changes settings with a threshold or NMS in place.

    Yields:
        bool: Whether there were any.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    found = False
    try:
        for path, module in detector.named_modules():
            settings = vars(module).get("test_cfg")
            if isinstance(settings, Mapping) and "rpn_head" not in path.split("."):
                own = ConfigDict(copy.deepcopy(dict(settings)))
                found |= _change_all(own, change)
                replaced.append((module, settings))
                module.test_cfg = own
        yield found
    finally:
        for module, settings in replaced:
            module.test_cfg = settings


def _change_all(settings: ConfigDict, change: Callable[[ConfigDict], None]) -> bool:
    found = "score_thr" in settings or "nms" in settings
    for name, part in settings.items():
        if isinstance(part, ConfigDict) and name not in ("rpn", "nms"):
            found |= _change_all(part, change)
    if "score_thr" in settings or "nms" in settings:
        change(settings)
    return found
