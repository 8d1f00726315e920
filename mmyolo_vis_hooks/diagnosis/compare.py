"""What changed from one checkpoint to another: the same objects under both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cost import share_lost, size_of
from .diagnose import why_false
from .matching import FalseAlarm, GroundTruth, box_iou, match
from .mechanisms import MissedObject, sentence
from .report import FOUND, KINDS, ImageErrors, kind_of, name_of, rounded

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

    def __init__(
        self,
        errors: ImageErrors,
        truth: GroundTruth,
        class_names: Sequence[str],
        num_objects: Mapping[int, int],
        thresholds: Mapping[str, float],
    ) -> None:
        self.found, self._truth, self._names = errors.found(), truth, class_names
        self._num_objects = num_objects
        self.matches = match(self.found, truth, iou_thr=thresholds["iou_thr"])
        missed = [MissedObject(**kept) for kept in errors.missed]
        self._missed = {own.truth: own for own in missed}
        self._hits = {hit.truth: hit for hit in self.matches.hits}
        self._score_thr = thresholds["score_thr"]

    def object(self, index: int) -> Side:
        hit = self._hits.get(index)
        if hit is not None:
            score = float(self.found.scores[hit.detection])
            box = rounded(self.found.boxes_xyxy[hit.detection])
            why = f"found with {score:.2f}, IoU {hit.iou:.2f}"
            return Side(FOUND, round(score, 4), box, hit.detection, why)
        own = self._missed[index]
        return Side(
            kind_of(own.mechanism, ""),
            round(own.score, 4),
            None if own.box_xyxy is None else rounded(own.box_xyxy),
            None,
            sentence(own, self.found, self._truth, self._names, self._score_thr),
            share_lost(self._truth.labels[index], self._num_objects),
        )

    def false(self, alarm: FalseAlarm) -> Side:
        index, found = alarm.detection, self.found
        score = float(found.scores[index])
        return Side(
            kind_of("", alarm.kind),
            round(score, 4),
            rounded(found.boxes_xyxy[index]),
            index,
            why_false(alarm, self.matches, found, self._truth, self._names),
            share_lost(found.labels[index], self._num_objects, score),
        )


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
        _Seen(errors, truth, class_names, num_objects, thresholds)
        for errors in (errors_a, errors_b)
    )

    def change(
        label: int, box_xyxy: np.ndarray, index: int | None, side_a: Side, side_b: Side
    ) -> Change:
        name, size = name_of(int(label), class_names), size_of(box_xyxy)
        box = rounded(box_xyxy)
        return Change(errors_a.image, name, size, box, index, side_a, side_b)

    changes = [
        change(truth.labels[i], truth.boxes_xyxy[i], i, a.object(i), b.object(i))
        for i in np.flatnonzero(~truth.ignored).tolist()
    ]
    partners = _pairs(a, b, iou_thr)
    for alarm in a.matches.false_alarms:
        label, box = (
            a.found.labels[alarm.detection],
            a.found.boxes_xyxy[alarm.detection],
        )
        partner = partners.get(alarm.detection)
        other = Side(NOTHING) if partner is None else b.false(partner)
        changes.append(change(label, box, None, a.false(alarm), other))
    paired = [partner.detection for partner in partners.values()]
    for alarm in b.matches.false_alarms:
        if alarm.detection not in paired:
            label = b.found.labels[alarm.detection]
            box = b.found.boxes_xyxy[alarm.detection]
            changes.append(change(label, box, None, Side(NOTHING), b.false(alarm)))
    return changes


def _pairs(a: _Seen, b: _Seen, iou_thr: float) -> dict[int, FalseAlarm]:
    """The false positive of B that is the same as one of A, by A's detection."""
    free = list(b.matches.false_alarms)
    pairs: dict[int, FalseAlarm] = {}
    for alarm in a.matches.false_alarms:  # the best score first
        index = alarm.detection
        others = [own.detection for own in free]
        iou = box_iou(a.found.boxes_xyxy[[index]], b.found.boxes_xyxy[others])[0]
        iou = np.where(b.found.labels[others] == a.found.labels[index], iou, 0.0)
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
