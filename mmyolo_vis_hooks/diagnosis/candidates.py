"""Candidates of a detector, before threshold, limits and NMS, and what it keeps."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmcv.ops import batched_nms
from mmengine.config import ConfigDict
from torch import nn

from ..network.settings import other_settings
from ..records import Detections

FLOOR = 0.05
"""Candidates with a lower score count as none, where the threshold is no lower."""
LEAST_FLOOR = 0.001
"""Nor do any with a lower score than this: each cell of a head has some."""
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


@dataclass(frozen=True)
class Closing:
    """How a detector makes detections of its candidates.

    Attributes:
        nms: Settings of mmcv's ``batched_nms``.
        score_thr: Its own threshold.
        max_per_img: So many detections at most; None for any number.
        multi_label: Whether a box may have several classes.
    """

    nms: dict[str, Any]
    score_thr: float = 0.0
    max_per_img: int | None = None
    multi_label: bool = True

    @classmethod
    def of(cls, detector: nn.Module) -> Closing | None:
        """Read the test settings of a detector; None if it has no NMS.

        Args:
            detector (nn.Module): The detector, without wrappers.
        """
        found: list[ConfigDict] = []
        with other_settings(detector, lambda own: found.append(copy.deepcopy(own))):
            pass
        settings = [own for own in found if own.get("nms")]
        if not settings:
            return None
        own = settings[-1]
        # MMYOLO's YOLOX has a limit only in name: its head sets it anew each time.
        limit = None if own.get("yolox_style") else own.get("max_per_img")
        multi_label = bool(own.get("multi_label", True))
        return cls(dict(own.nms), own.get("score_thr") or 0.0, limit, multi_label)

    @property
    def iou_thr(self) -> float:
        """Boxes of a class with a greater IoU suppress each other."""
        return float(self.nms.get("iou_threshold", self.nms.get("iou_thr", 0.5)))

    def keep(
        self, candidates: Detections, *, iou_thr: float | None = None
    ) -> tuple[np.ndarray, Detections]:
        """The candidates that become detections.

        Args:
            candidates (Detections): As a detector gives them that is
                :func:`opened`.
            iou_thr (float, optional): Of NMS. Defaults to None: the detector's own.

        Returns:
            tuple: Indices of those that are kept, and what becomes of them, the highest
            score first; soft NMS lowers scores.
        """
        if not len(candidates):
            return np.zeros(0, np.int64), candidates
        given = np.arange(len(candidates))
        if not self.multi_label:
            given = _best_of_box(candidates)
        settings = {k: v for k, v in self.nms.items() if not k.startswith("iou_thr")}
        settings["iou_threshold"] = self.iou_thr if iou_thr is None else iou_thr
        boxes = torch.from_numpy(candidates.boxes_xyxy[given]).float()
        scores = torch.from_numpy(candidates.scores[given]).float()
        labels = torch.from_numpy(candidates.labels[given])
        rows, kept = batched_nms(boxes, scores, labels, settings)
        rows, kept = rows[: self.max_per_img], kept[: self.max_per_img]
        indices = given[kept.numpy()]
        found = Detections(
            candidates.boxes_xyxy[indices],
            rows[:, 4].numpy(),
            candidates.labels[indices],
        )
        return indices, found


def _best_of_box(candidates: Detections) -> np.ndarray:
    """Of each box, which has a score for several classes, the best one."""
    order = np.argsort(-candidates.scores, kind="stable")
    _, first = np.unique(candidates.boxes_xyxy[order], axis=0, return_index=True)
    return np.sort(order[first])
