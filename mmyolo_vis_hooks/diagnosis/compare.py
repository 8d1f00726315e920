"""What changed from one checkpoint to another: the same objects under both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import name_of
from .cost import size_of
from .matching import GroundTruth, box_iou
from .report import FOUND, KINDS, ErrorRecord, ImageErrors, records_of, rounded
from .result import Diagnosis

NOTHING = "nothing"
MENDED, BROKEN = "mended", "broken"
WRONG_IN_BOTH, RIGHT_IN_BOTH = "wrong in both", "right in both"
CHANGES = (MENDED, BROKEN, WRONG_IN_BOTH, RIGHT_IN_BOTH)
FOUND_BY = ("both", "only A", "only B", "neither")


@dataclass(frozen=True)
class Side:
    """What one checkpoint made of an object, or of the place of a false positive.

    Attributes:
        kind: ``'found'``, one of :data:`~.report.KINDS`, or ``'nothing'`` where only
            the other checkpoint has a false positive.
        score: Of the detection, or of a missed object's best candidate; else 0.
        box_xyxy: Of that detection or candidate; None where there is none.
        detection: Index of the detection in its image; None where there is none.
        why: In one line.
        lost: Roughly what it costs, as of :class:`~.report.ErrorRecord`.
    """

    kind: str
    score: float = 0.0
    box_xyxy: tuple[float, ...] | None = None
    detection: int | None = None
    why: str = ""
    lost: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether it is no error."""
        return self.kind in (FOUND, NOTHING)


@dataclass(frozen=True)
class Change:
    """An object, or a false positive, under two checkpoints.

    Attributes:
        image: Name of the image.
        class_name: Of the object, or of the false positive.
        size: ``'small'``, ``'medium'`` or ``'large'``, as COCO has it.
        box_xyxy: Of the object, or of the false positive, in pixels of the image.
        truth: Index of the object in its image; None for a false positive.
        a: Under the first checkpoint.
        b: Under the second.
    """

    image: str
    class_name: str
    size: str
    box_xyxy: tuple[float, ...]
    truth: int | None
    a: Side
    b: Side

    @property
    def change(self) -> str:
        """One of :data:`CHANGES`."""
        if self.a.is_right == self.b.is_right:
            return RIGHT_IN_BOTH if self.a.is_right else WRONG_IN_BOTH
        return MENDED if self.b.is_right else BROKEN

    @property
    def found_by(self) -> str:
        """One of :data:`FOUND_BY`; '' for a false positive."""
        if self.truth is None:
            return ""
        found = self.a.kind == FOUND, self.b.kind == FOUND
        places = (True, True), (True, False), (False, True), (False, False)
        return FOUND_BY[places.index(found)]

    @property
    def gained(self) -> float:
        """Roughly what the second checkpoint loses less than the first."""
        return self.a.lost - self.b.lost


class _Seen:
    """An image under one checkpoint."""

    def __init__(self, diagnosis: Diagnosis, num_objects: Mapping[int, int]) -> None:
        self.found = diagnosis.detections
        self.objects: dict[int, Side] = {}
        # By their detections, the best scores first.
        self.false: dict[int, tuple[ErrorRecord, Side]] = {}
        for record, index, detection in records_of(diagnosis, num_objects):
            side = self._side(record, detection)
            if index is not None:
                self.objects[index] = side
            elif detection is not None:
                self.false[detection] = record, side

    def _side(self, record: ErrorRecord, detection: int | None) -> Side:
        box, why = dict(record.others).get("candidate"), record.why
        if detection is not None:
            box = record.box_xyxy
        if record.kind == FOUND:
            why = f"found with {self.found.scores[detection]:.2f}, {why}"
        return Side(record.full_kind, record.score, box, detection, why, record.lost)


def compare_image(
    errors_a: ImageErrors,
    errors_b: ImageErrors,
    truth: GroundTruth,
    class_names: Sequence[str],
    num_objects: Mapping[int, int],
    *,
    score_thr: float,
    iou_thr: float,
) -> list[Change]:
    """Set what two checkpoints made of an image side by side.

    Objects are the same by their index. Two false positives are the same if they are of
    one class and have an IoU of at least ``iou_thr``, the best scores first.

    Args:
        errors_a, errors_b (ImageErrors): Of the image.
        truth (GroundTruth): Its objects.
        class_names (Sequence[str]): Names of the classes.
        num_objects (Mapping[int, int]): How many objects that count a class has.
        score_thr, iou_thr (float): As of the diagnoses.
    """
    thresholds = {"score_thr": score_thr, "iou_thr": iou_thr}
    a, b = (
        _Seen(errors.diagnosis(truth, class_names, **thresholds), num_objects)
        for errors in (errors_a, errors_b)
    )
    changes = []
    for i in np.flatnonzero(~truth.ignored).tolist():
        name, box = name_of(int(truth.labels[i]), class_names), truth.boxes_xyxy[i]
        what = errors_a.image, name, size_of(box), rounded(box), i
        changes.append(Change(*what, a.objects[i], b.objects[i]))

    def change(record: ErrorRecord, side_a: Side, side_b: Side) -> Change:
        what = record.image, record.class_name, record.size, record.box_xyxy
        return Change(*what, None, side_a, side_b)

    partners = _pairs(a, b, iou_thr)
    nothing = Side(NOTHING)
    for index, (record, side) in a.false.items():
        other = b.false[partners[index]][1] if index in partners else nothing
        changes.append(change(record, side, other))
    for index, (record, side) in b.false.items():
        if index not in partners.values():
            changes.append(change(record, nothing, side))
    return changes


def _pairs(a: _Seen, b: _Seen, iou_thr: float) -> dict[int, int]:
    """The false positive of B that is the same as one of A, by their detections."""
    free, pairs = list(b.false), dict[int, int]()
    for index in a.false:
        iou = box_iou(a.found.boxes_xyxy[[index]], b.found.boxes_xyxy[free])[0]
        iou = np.where(b.found.labels[free] == a.found.labels[index], iou, 0.0)
        if iou.max(initial=0.0) >= iou_thr:
            pairs[index] = free.pop(int(iou.argmax()))
    return pairs


def summarize(changes: Iterable[Change]) -> dict[str, Any]:
    """Counts of changes.

    Returns:
        dict: ``objects`` by who found them; ``false`` positives of ``both``, ``only A``
        and ``only B``; and for each kind its number under ``a`` and ``b``, how many of
        A's are right in B (``mended``), and how many of B's were right in A (``new``).
    """
    objects, false = Counter[str](), Counter[str]()
    kinds = {kind: {"a": 0, "b": 0, MENDED: 0, "new": 0} for kind in KINDS}
    for own in changes:
        if own.truth is not None:
            objects[own.found_by] += 1
        else:
            only = {MENDED: "only A", BROKEN: "only B"}
            false[only.get(own.change, "both")] += 1
        if not own.a.is_right:
            kinds[own.a.kind]["a"] += 1
            kinds[own.a.kind][MENDED] += own.change == MENDED
        if not own.b.is_right:
            kinds[own.b.kind]["b"] += 1
            kinds[own.b.kind]["new"] += own.change == BROKEN
    return {
        "objects": {who: objects[who] for who in FOUND_BY},
        "false": {who: false[who] for who in FOUND_BY[:3]},
        "kinds": kinds,
    }
