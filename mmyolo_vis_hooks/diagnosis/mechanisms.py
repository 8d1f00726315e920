"""Why no detection found an object: what became of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..records import Detections
from ..render.boxes import class_name
from .matching import (
    BACKGROUND_IOU,
    BADLY_PLACED,
    CONFUSED,
    GroundTruth,
    Matches,
    box_iou,
)

BELOW_THRESHOLD, SUPPRESSED, NOT_SEEN = "below threshold", "suppressed", "not seen"
MECHANISMS = (BELOW_THRESHOLD, SUPPRESSED, CONFUSED, BADLY_PLACED, NOT_SEEN)


@dataclass(frozen=True)
class MissedObject:
    """An object that no detection found, and why.

    Attributes:
        truth: Index of the object.
        mechanism: One of :data:`MECHANISMS`: its best candidate lies ``below
            threshold``; one above it was ``suppressed`` by a better box or by the
            limit on their number; a detection calls it something else; one of its
            class lies too far off; or there was no candidate at all.
        score: Of the best candidate of its own class, 0 where there is none.
        iou: Of that candidate with the object.
        box_xyxy: ``(4,)`` of that candidate; None where there is none.
        candidate: Index of that candidate; None where there is none.
        other: The detection that suppressed it, is confused with it, or lies badly on
            it; None otherwise.
        other_iou: Of that detection: with the candidate where it suppressed it, with
            the object else.
    """

    truth: int
    mechanism: str
    score: float = 0.0
    iou: float = 0.0
    box_xyxy: np.ndarray | None = None
    candidate: int | None = None
    other: int | None = None
    other_iou: float = 0.0


def why_missed(
    matches: Matches,
    detections: Detections,
    candidates: Detections,
    truth: GroundTruth,
    *,
    score_thr: float,
    iou_thr: float = 0.5,
) -> list[MissedObject]:
    """Find for each missed object what became of its candidates.

    Args:
        matches (Matches): Of the detections and objects.
        detections (Detections): Final ones above the threshold.
        candidates (Detections): Boxes of all classes before threshold and NMS, of the
            detector as :func:`~.candidates.opened` has it.
        truth (GroundTruth): The objects.
        score_thr (float): The threshold.
        iou_thr (float): As of :func:`~.matching.match`.
    """
    if not matches.missed:
        return []
    missed = np.array(matches.missed)
    boxes, labels = truth.boxes_xyxy[missed], truth.labels[missed]
    near = box_iou(candidates.boxes_xyxy, boxes)
    fits = (near >= iou_thr) & (candidates.labels[:, None] == labels[None])
    high = candidates.scores > score_thr
    # A candidate that became a detection was given to another object.
    fits &= ~_are_final(candidates, detections)[:, None]

    def cause(index: int, best: int | None) -> tuple[str, int | None, float]:
        """Mechanism, the detection in the way, and its IoU."""
        if best is not None and high[best]:
            return SUPPRESSED, *winner(candidates, best, detections)
        iou, same = matches.iou[:, index], detections.labels == truth.labels[index]
        wrong = ~same & (iou >= iou_thr), CONFUSED
        off = same & (iou >= BACKGROUND_IOU), BADLY_PLACED
        for wanted, mechanism in (wrong, off):
            if wanted.any():
                other = int(np.where(wanted, iou, -1.0).argmax())
                return mechanism, other, float(iou[other])
        return NOT_SEEN if best is None else BELOW_THRESHOLD, None, 0.0

    found = []
    for column, index in enumerate(missed.tolist()):
        own = np.flatnonzero(fits[:, column])
        best = int(own[candidates.scores[own].argmax()]) if len(own) else None
        mechanism, other, overlap = cause(index, best)
        reached = MissedObject(index, mechanism, other=other, other_iou=overlap)
        if best is not None:
            reached = replace(
                reached,
                score=float(candidates.scores[best]),
                iou=float(near[best, column]),
                box_xyxy=candidates.boxes_xyxy[best],
                candidate=best,
            )
        found.append(reached)
    return found


def _are_final(candidates: Detections, detections: Detections) -> np.ndarray:
    """Which candidates are detections: of their class, at their place, to a pixel."""
    if not len(detections) or not len(candidates):
        return np.zeros(len(candidates), bool)
    apart = np.abs(candidates.boxes_xyxy[:, None] - detections.boxes_xyxy[None])
    alike = (apart.max(axis=2) < 0.5) & (
        candidates.labels[:, None] == detections.labels[None]
    )
    return alike.any(axis=1)


def winner(
    candidates: Detections, index: int, detections: Detections
) -> tuple[int | None, float]:
    """The detection with at least its score that lies most on a candidate, and its IoU.

    One of the candidate's class comes first; None and 0 where no detection does. One
    that hardly overlaps it has suppressed nothing.
    """
    [overlap] = box_iou(candidates.boxes_xyxy[[index]], detections.boxes_xyxy)
    rivals = (detections.scores >= candidates.scores[index]) & (
        overlap > BACKGROUND_IOU
    )
    same = detections.labels == candidates.labels[index]
    for wanted in (same & rivals, rivals):
        if wanted.any():
            best = int(np.where(wanted, overlap, 0).argmax())
            return best, float(overlap[best])
    return None, 0.0


def sentence(
    missed: MissedObject,
    detections: Detections,
    truth: GroundTruth,
    class_names: Sequence[str],
    score_thr: float,
    layer: str = "",
) -> str:
    """What was missing, in one line; with the layer of the best candidate, if known."""
    name = class_name(truth.labels[missed.truth], class_names)
    own = f"no candidate for {name!r}"
    reached, threshold = told_apart(missed.score, score_thr)
    if missed.candidate is not None:
        own = f"{reached} for {name!r}{f' at {layer}' if layer else ''}"
    if missed.mechanism == BELOW_THRESHOLD:
        return f"{own}, threshold {threshold}"
    if missed.other is None:
        return own if missed.mechanism == NOT_SEEN else f"{own}, beyond the limit"
    label, score = detections.labels[missed.other], detections.scores[missed.other]
    other = f"{class_name(label, class_names)!r} {score:.2f}"
    overlap = f"IoU {missed.other_iou:.2f}"
    if missed.mechanism == SUPPRESSED:
        return f"{own}, suppressed by {other}, {overlap}"
    if missed.mechanism == CONFUSED:
        return f"found as {other}, {overlap}; {own}"
    return f"{other} lies on it with {overlap} only; {own} in its place"


def told_apart(score: float, score_thr: float) -> tuple[str, str]:
    """A score and a threshold, of two digits, or of as many as they need to differ."""

    def texts(digits: int) -> tuple[str, str]:
        return f"{score:.{digits}f}", f"{score_thr:.{digits}f}"

    for digits in range(2, 6):
        own, other = texts(digits)
        if own != other and round(score_thr, digits) == score_thr:
            return own, other
    return texts(2)
