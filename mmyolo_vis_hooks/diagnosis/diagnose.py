"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import nn

from ..data.samples import detections_of
from ..network.state import frozen
from ..records import Detections
from ..render.boxes import class_name
from .matching import DUPLICATE, FalseAlarm, GroundTruth, Matches, match
from .mechanisms import MissedObject, sentence, why_missed
from .opening import opened


@dataclass(frozen=True, eq=False)
class Missed:
    """An object that no detection found.

    Attributes:
        class_name: Of the object.
        box_xyxy: ``(4,)`` float32 of the object, pixels of the image.
        mechanism: ``'below threshold'``, ``'suppressed'``, ``'confused'``,
            ``'badly placed'`` or ``'not seen'``.
        why: What was missing, in one line.
        record: Candidate, scores and overlaps, with indices of the diagnosis.
    """

    class_name: str
    box_xyxy: np.ndarray
    mechanism: str
    why: str
    record: MissedObject

    def __repr__(self) -> str:
        return f"Missed({self.class_name}, {self.mechanism}: {self.why})"


@dataclass(frozen=True, eq=False)
class FalsePositive:
    """A detection that found no object.

    Attributes:
        class_name: Of the detection.
        score: Of the detection.
        box_xyxy: ``(4,)`` float32 of the detection, pixels of the image.
        kind: ``'confused'``, ``'badly placed'``, ``'both'``, ``'duplicate'`` or
            ``'background'``.
        why: Which object it should have found, in one line.
        record: Object and overlap, with indices of the diagnosis.
    """

    class_name: str
    score: float
    box_xyxy: np.ndarray
    kind: str
    why: str
    record: FalseAlarm

    def __repr__(self) -> str:
        found = f"{self.class_name} {self.score:.2f}"
        return f"FalsePositive({found}, {self.kind}: {self.why})"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a detector found in an image, what it missed and invented, and why.

    Attributes:
        image_id: Name of the image.
        image_rgb: ``(H, W, 3)`` uint8, RGB.
        detections: Final ones above the threshold.
        truth: The objects.
        candidates: Boxes of all classes before threshold and NMS.
        matches: Which detections hit which objects, by index.
        missed: Objects that no detection found.
        false_positives: Detections that found none.
        note: What could not be found out about this detector; '' for nothing.
    """

    image_id: str
    image_rgb: np.ndarray
    detections: Detections
    truth: GroundTruth
    candidates: Detections
    matches: Matches
    missed: tuple[Missed, ...]
    false_positives: tuple[FalsePositive, ...]
    note: str = ""

    def __repr__(self) -> str:
        return (
            f"Diagnosis({self.image_id}: {len(self.matches.hits)} found, "
            f"{len(self.missed)} missed, {len(self.false_positives)} false)"
        )


def diagnose_image(
    detector: nn.Module,
    data: Mapping[str, Any],
    image_id: str,
    image_rgb: np.ndarray,
    truth: GroundTruth,
    class_names: Sequence[str],
    *,
    score_thr: float,
    iou_thr: float,
) -> Diagnosis:
    """Run a detector twice, as its settings are and opened, and match.

    Args:
        detector (nn.Module): The detector, without wrappers.
        data (Mapping): The image as the test pipeline packs it.
        image_id (str): Its name.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB, the original frame.
        truth (GroundTruth): Its objects, in the same frame.
        class_names (Sequence[str]): Names of the classes.
        score_thr (float): Detections with a higher score count.
        iou_thr (float): A hit has at least this IoU.
    """
    batch = pseudo_collate([data])

    def found() -> Detections:
        (output,) = detector.test_step(batch)  # type: ignore[operator]
        return detections_of(output)

    with frozen(detector, parameters=False), torch.no_grad():
        final = found()
        with opened(detector) as was_closed:
            candidates = found() if was_closed else final
    keep = final.scores > score_thr
    detections = Detections(
        final.boxes_xyxy[keep], final.scores[keep], final.labels[keep]
    )
    matches = match(detections, truth, iou_thr=iou_thr)
    records = why_missed(
        matches, detections, candidates, truth, score_thr=score_thr, iou_thr=iou_thr
    )
    missed = tuple(
        Missed(
            class_name(truth.labels[record.truth], class_names),
            truth.boxes_xyxy[record.truth],
            record.mechanism,
            sentence(record, detections, truth, class_names, score_thr),
            record,
        )
        for record in records
    )
    false_positives = tuple(
        FalsePositive(
            class_name(detections.labels[alarm.detection], class_names),
            float(detections.scores[alarm.detection]),
            detections.boxes_xyxy[alarm.detection],
            alarm.kind,
            _why_false(alarm, matches, detections, truth, class_names),
            alarm,
        )
        for alarm in matches.false_alarms
    )
    return Diagnosis(
        image_id,
        image_rgb,
        detections,
        truth,
        candidates,
        matches,
        missed,
        false_positives,
        "" if was_closed else "the candidates are the final detections",
    )


def _why_false(
    alarm: FalseAlarm,
    matches: Matches,
    detections: Detections,
    truth: GroundTruth,
    class_names: Sequence[str],
) -> str:
    if alarm.truth is None:
        return f"greatest IoU with any object {alarm.iou:.2f}"
    name = class_name(truth.labels[alarm.truth], class_names)
    if alarm.kind == DUPLICATE:
        (hit,) = (h for h in matches.hits if h.truth == alarm.truth)
        score = detections.scores[hit.detection]
        return f"this {name!r} was found with {score:.2f}, IoU {alarm.iou:.2f}"
    return f"IoU {alarm.iou:.2f} with {name!r}"
