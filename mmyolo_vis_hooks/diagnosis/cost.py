"""What each kind of error costs: counts, and the AP gained if a kind were mended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..records import Detections
from .matching import BADLY_PLACED, CONFUSED, FALSE_KINDS, GroundTruth, Matches
from .mechanisms import MECHANISMS, MissedObject

MISSED = "missed"
MISSED_KINDS = tuple(f"{MISSED}: {mechanism}" for mechanism in MECHANISMS)
_MENDED = (*FALSE_KINDS, MISSED, *MISSED_KINDS)
SIZES = ("small", "medium", "large")
_LIMITS = (32**2, 96**2)  # COCO's, in square pixels
_RECALLS = np.linspace(0, 1, 101)


class _Entry(NamedTuple):
    """A detection that counts.

    ``size`` is that of its object where it hit one. ``mended`` are class and size of
    the object that it hits once its error is mended, None if it is then gone.
    """

    score: float
    label: int
    size: str
    correct: bool
    kind: str = ""
    mended: tuple[int, str] | None = None


class Cost(NamedTuple):
    """What errors cost a class, or the objects of a size.

    Attributes:
        objects: How many there are.
        hits: How many were found.
        ap: At the IoU of the matches.
        dap: How much it would rise if a kind were mended, by kind: those of false
            positives, ``'missed'``, and :data:`MISSED_KINDS`.
    """

    objects: int
    hits: int
    ap: float
    dap: dict[str, float]


class ErrorCost:
    """Counts errors over images and says what each kind costs.

    Mending follows TIDE (Bolya 2020): the best of the detections that are confused with
    a missed object, or badly placed on it, becomes a hit, and the others go, as do
    duplicates and boxes on background; a missed object that no detection could hit is
    taken out of the objects, and a class of which nothing is left out of the mean.
    Where no class is left, mending gives what AP lacks of 1, not of 0 as in TIDE.

    Args:
        mechanisms (bool): Whether ``update`` is told why objects were missed. Their
            counts are then given too. Defaults to False.
    """

    def __init__(self, *, mechanisms: bool = False) -> None:
        self._mechanisms = mechanisms
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.num_images = 0
        self._missed: Counter[str] = Counter()
        self._entries: list[_Entry] = []
        # By class and size; those that no detection could hit also by the kind of miss.
        self._objects: Counter[tuple[int, str]] = Counter()
        self._hopeless: Counter[tuple[int, str, str]] = Counter()

    def update(
        self,
        matches: Matches,
        detections: Detections,
        truth: GroundTruth,
        missed: Sequence[MissedObject] = (),
    ) -> None:
        """Count one image."""
        self.num_images += 1
        self._missed.update(own.mechanism for own in missed)
        groups = [
            (int(label), size_of(box))
            for label, box in zip(truth.labels, truth.boxes_xyxy)
        ]
        self._objects.update(groups[i] for i in np.flatnonzero(~truth.ignored))
        lost = set(matches.missed)
        best = _best_chances(matches, detections, lost)
        became: dict[int, dict[str, Any]] = {}
        for hit in matches.hits:
            became[hit.detection] = dict(size=groups[hit.truth][1], correct=True)
        for alarm in matches.false_alarms:
            mended = None
            if alarm.truth is not None and best.get(alarm.truth) == alarm.detection:
                mended = groups[alarm.truth]
            became[alarm.detection] = dict(kind=alarm.kind, mended=mended)
        for index in sorted(became):  # AP depends on the order of equal scores
            self._add(detections, index, **became[index])
        kinds = {own.truth: f"{MISSED}: {own.mechanism}" for own in missed}
        hopeless = lost - best.keys()
        self._hopeless.update((*groups[i], kinds.get(i, "")) for i in hopeless)

    def _add(self, detections: Detections, index: int, **what: Any) -> None:
        score, label = float(detections.scores[index]), int(detections.labels[index])
        given = {"size": size_of(detections.boxes_xyxy[index]), "correct": False}
        self._entries.append(_Entry(score, label, **{**given, **what}))

    def compute(self) -> dict[str, dict[str, float]]:
        """The counts, and AP at the IoU of the matches.

        Returns:
            dict: ``counts`` has ``hits``, ``missed``, ``false_alarms``; ``false`` and
            ``missed`` the counts by kind; ``ap`` the mean ``ap`` over the classes that
            have objects; ``dap`` how much it would rise, by kind.
        """
        own = self.total()
        false = Counter(entry.kind for entry in self._entries if not entry.correct)
        mechanisms = MECHANISMS if self._mechanisms else ()
        return {
            "counts": {
                "hits": own.hits,
                "missed": own.objects - own.hits,
                "false_alarms": false.total(),
            },
            "false": {kind: false[kind] for kind in FALSE_KINDS},
            "missed": {kind: self._missed[kind] for kind in mechanisms},
            "ap": {"ap": own.ap},
            "dap": {kind: own.dap[kind] for kind in (*FALSE_KINDS, MISSED)},
        }

    def by_class(self, size: str = "") -> dict[int, Cost]:
        """The same for each class that has objects, or has some of one size.

        Of one size, objects of others, and what was found of them, do not count, nor do
        false positives whose own boxes are of another: so does COCO's evaluation.
        """
        aps, objects = self._aps("", size), self._objects_of(size)
        mended = {kind: self._aps(kind, size) for kind in _MENDED}
        hits = self._hits_of(size)
        # A class of which nothing is left has lost all that it lacked.
        return {
            label: Cost(
                objects[label],
                hits[label],
                ap,
                {k: max(own.get(label, 1.0) - ap, 0.0) for k, own in mended.items()},
            )
            for label, ap in aps.items()
        }

    def total(self, size: str = "") -> Cost:
        """The same over all classes that have objects, or have some of one size."""
        ap, objects = _mean(self._aps("", size)), self._objects_of(size).total()
        # Where no class is left, all that was lacking is.
        best = float(objects > 0)
        mended = {kind: _mean(self._aps(kind, size), best) for kind in _MENDED}
        return Cost(
            objects,
            self._hits_of(size).total(),
            ap,
            {kind: max(own - ap, 0.0) for kind, own in mended.items()},
        )

    def _objects_of(self, size: str) -> Counter[int]:
        counts: Counter[int] = Counter()
        for (label, own), count in self._objects.items():
            counts[label] += count if size in ("", own) else 0
        return +counts

    def _hits_of(self, size: str) -> Counter[int]:
        hits = (own for own in self._entries if own.correct)
        return Counter(own.label for own in hits if size in ("", own.size))

    def _aps(self, mended: str, size: str = "") -> dict[int, float]:
        """AP of each class that has objects, or what it were with one kind mended."""
        counts = self._objects_of(size)
        points: dict[int, list[tuple[float, bool]]] = {label: [] for label in counts}
        for entry in self._entries:
            label, own, correct = entry.label, entry.size, entry.correct
            if mended and entry.kind == mended:
                if entry.mended is None:
                    continue
                (label, own), correct = entry.mended, True
            if label in points and size in ("", own):
                points[label].append((entry.score, correct))
        for (label, own, kind), count in self._hopeless.items():
            if mended and mended in (MISSED, kind) and size in ("", own):
                counts[label] -= count
        return {
            label: average_precision(points[label], count)
            for label, count in counts.items()
            if count or points[label]
        }


def size_of(box_xyxy: np.ndarray) -> str:
    """``'small'``, ``'medium'`` or ``'large'``, as COCO has it, by the box's area."""
    width, height = box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]
    return SIZES[int(np.searchsorted(_LIMITS, width * height, side="right"))]


def ap_lost(
    images: Sequence[tuple[Matches, Detections, GroundTruth, Any]],
) -> list[float]:
    """Roughly how much AP the errors of each image cost, by :func:`share_lost`.

    Args:
        images (Sequence): What :meth:`ErrorCost.update` takes, of all images.
    """
    objects: Counter[int] = Counter()
    for _, _, truth, _ in images:
        objects.update(truth.labels[~truth.ignored].tolist())
    lost = []
    for matches, found, truth, _ in images:
        missed = [share_lost(truth.labels[i], objects) for i in matches.missed]
        false = [
            share_lost(found.labels[i], objects, found.scores[i])
            for i in (alarm.detection for alarm in matches.false_alarms)
        ]
        lost.append(sum(missed) + sum(false))
    return lost


def share_lost(label: int, num_objects: Mapping[int, int], score: float = 1.0) -> float:
    """Roughly how much AP an error costs: one object's share of its class.

    Args:
        label (int): Of the missed object, or of the false positive.
        num_objects (Mapping[int, int]): How many objects that count a class has.
        score (float): Of a false positive, which costs that times its score. Defaults
            to 1.
    """
    return float(score) / max(1, num_objects.get(int(label), 0))


def _mean(aps: dict[int, float], of_none: float = 0.0) -> float:
    return float(np.mean(list(aps.values()))) if aps else of_none


def _best_chances(
    matches: Matches, detections: Detections, lost: set[int]
) -> dict[int, int]:
    """For each missed object the best detection that could have hit it."""
    best: dict[int, int] = {}
    for alarm in matches.false_alarms:
        if alarm.kind in (CONFUSED, BADLY_PLACED) and alarm.truth in lost:
            rival = best.get(alarm.truth)
            scores = detections.scores
            if rival is None or scores[alarm.detection] > scores[rival]:
                best[alarm.truth] = alarm.detection
    return best


def average_precision(points: Sequence[tuple[float, bool]], num_objects: int) -> float:
    """AP of one class at 101 recalls, as COCO computes it.

    Args:
        points (Sequence): Score of each detection, and whether it is a hit.
        num_objects (int): How many objects there are; of none, AP is 0.
    """
    if not num_objects or not points:
        return 0.0
    ordered = sorted(points, key=lambda point: -point[0])
    true = np.cumsum([correct for _, correct in ordered])
    precision = true / np.arange(1, len(ordered) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true / num_objects, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())
