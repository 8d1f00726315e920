"""What a detector considered at a place, of any class, and why it became no box."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..options import DiagnosisOptions
from ..records import Detections
from ..render.boxes import class_name
from ..render.panel import joined
from .matching import box_iou
from .mechanisms import BELOW_THRESHOLD, SUPPRESSED, told_apart, winner
from .result import Diagnosis

DETECTED, BEYOND_LIMIT = "detected", "beyond the limit"
# Of one class and with this IoU, candidates tell the same.
_ALIKE = 0.7


@dataclass(frozen=True)
class Considered:
    """A candidate at a place, and what became of it.

    Attributes:
        candidate: Index of the candidate.
        fate: ``'detected'``, ``'below threshold'``, ``'suppressed'`` by a better one,
            or ``'beyond the limit'`` on their number.
        why: The same and how it lies on the objects, in one line.
        detection: The detection that it became, or that suppressed it; else None.
        alike: How many weaker candidates of its class lie where it does.
    """

    candidate: int
    fate: str
    why: str
    detection: int | None = None
    alike: int = 0


def considered_at(
    point_xy: tuple[float, float],
    diagnosis: Diagnosis,
    options: DiagnosisOptions,
    *,
    label: int | None = None,
    most: int = 8,
) -> list[Considered]:
    """The candidates whose boxes hold a place, the highest score first.

    Args:
        point_xy (tuple[float, float]): Pixels of the image.
        diagnosis (Diagnosis): Of the image.
        options (DiagnosisOptions): With which it was made.
        label (int, optional): Of this class only. Defaults to None: of any.
        most (int): At most so many. Those that lie where a better one of their class
            does (IoU of 0.7 or more) are only counted, but for detections.
    """
    candidates = diagnosis.candidates
    x, y = point_xy
    x1, y1, x2, y2 = candidates.boxes_xyxy.T
    here = (x1 <= x) & (x <= x2) & (y1 <= y) & (y <= y2)
    if label is not None:
        here &= candidates.labels == label
    became = detections_of_candidates(candidates, diagnosis.detections)
    order = np.flatnonzero(here)
    order = order[np.argsort(-candidates.scores[order], kind="stable")]
    alike: dict[int, int] = {}
    for index in order.tolist():
        better = [i for i in alike if candidates.labels[i] == candidates.labels[index]]
        boxes = candidates.boxes_xyxy
        iou = box_iou(boxes[index : index + 1], boxes[better])
        if became[index] < 0 and iou.size and iou.max() >= _ALIKE:
            alike[better[int(iou.argmax())]] += 1
        else:
            alike[index] = 0
    return [
        replace(considered(index, diagnosis, options), alike=count)
        for index, count in list(alike.items())[:most]
    ]


def considered(
    candidate: int, diagnosis: Diagnosis, options: DiagnosisOptions
) -> Considered:
    """What became of one candidate; the arguments are as above."""
    candidates, found = diagnosis.candidates, diagnosis.detections
    detection = int(detections_of_candidates(candidates, found)[candidate])
    if detection >= 0:
        why = _judgement(detection, diagnosis)
        return Considered(candidate, DETECTED, why, detection)
    on = _lies_on(candidate, diagnosis, options.iou_thr)
    if not (candidates.scores > options.score_thr)[candidate]:
        _, threshold = told_apart(candidates.scores[candidate], options.score_thr)
        why = joined([f"below the threshold of {threshold}", on])
        return Considered(candidate, BELOW_THRESHOLD, why)
    other, iou = winner(candidates, candidate, found)
    if other is None:
        return Considered(candidate, BEYOND_LIMIT, joined([BEYOND_LIMIT, on]))
    name = class_name(found.labels[other], diagnosis.class_names)
    why = f"suppressed by {name!r} {found.scores[other]:.2f}, IoU {iou:.2f}"
    return Considered(candidate, SUPPRESSED, joined([why, on]), other)


def detections_of_candidates(
    candidates: Detections, detections: Detections
) -> np.ndarray:
    """``(N,)`` int64: which detection each candidate became; -1 for none.

    A detection is the candidate of its class at its place, to a pixel, whose score is
    nearest to its own.
    """
    became = np.full(len(candidates), -1)
    for index in range(len(detections)):
        apart = np.abs(candidates.boxes_xyxy - detections.boxes_xyxy[index])
        fits = apart.max(axis=1, initial=0) < 0.5
        fits &= (candidates.labels == detections.labels[index]) & (became < 0)
        if fits.any():
            off = np.abs(candidates.scores - detections.scores[index])
            became[np.where(fits, off, np.inf).argmin()] = index
    return became


def _judgement(detection: int, diagnosis: Diagnosis) -> str:
    """What matching says of a detection."""
    for hit in diagnosis.matches.hits:
        if hit.detection == detection:
            return f"found, IoU {hit.iou:.2f}"
    for own in diagnosis.false_positives:
        if own.record.detection == detection:
            return f"false positive, {own.kind}: {own.why}"
    is_excused = detection in diagnosis.matches.excused
    return "on an ignored object" if is_excused else "a detection"


def _lies_on(index: int, diagnosis: Diagnosis, iou_thr: float) -> str:
    """How a candidate lies on the object of its class, or else on any."""
    candidates, truth = diagnosis.candidates, diagnosis.truth
    iou = box_iou(candidates.boxes_xyxy[index : index + 1], truth.boxes_xyxy)
    if not iou.size:
        return ""
    same = truth.labels == candidates.labels[index]
    for wanted, least in ((same, min(0.1, iou_thr)), (~same, iou_thr)):
        best = int(np.where(wanted, iou[0], 0).argmax())
        overlap = iou[0, best] * wanted[best]
        if overlap >= least:
            name = class_name(truth.labels[best], diagnosis.class_names)
            badly = "badly placed, " if overlap < iou_thr else ""
            return f"{badly}IoU {overlap:.2f} with the object {name!r}"
    return "on no object"
