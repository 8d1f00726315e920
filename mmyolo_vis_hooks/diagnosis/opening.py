"""Lets a detector tell its candidates: boxes before threshold, limits and NMS."""

from __future__ import annotations

from contextlib import AbstractContextManager

from mmengine.config import ConfigDict
from torch import nn

from ..network.settings import other_settings

FLOOR = 0.05
"""Candidates with a lower score count as none."""
MOST_CANDIDATES = 3000


def opened(
    detector: nn.Module, *, floor: float = FLOOR
) -> AbstractContextManager[bool]:
    """A block in which ``predict`` of a detector gives all its candidates.

    The threshold becomes ``floor``, NMS removes nothing, limits are raised, and a box
    may have several classes. It gives whether there was anything to open; if not, the
    candidates are the final detections.

    Args:
        detector (nn.Module): The detector, without wrappers.
        floor (float): Candidates have a higher score. Defaults to :data:`FLOOR`.
    """

    def widen(settings: ConfigDict) -> None:
        settings.score_thr = floor
        settings.nms = ConfigDict(type="nms", iou_threshold=1.0)
        wide = dict(max_per_img=MOST_CANDIDATES, nms_pre=10**5, multi_label=True)
        settings.update({k: v for k, v in wide.items() if k in settings})

    return other_settings(detector, widen)
