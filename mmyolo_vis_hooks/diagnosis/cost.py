"""What each kind of error costs: counts, and the AP gained if a kind were mended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..records import Detections
from .matching import BADLY_PLACED, CONFUSED, FALSE_KINDS, GroundTruth, Matches
from .mechanisms import MECHANISMS, MissedObject

MISSED = "missed"
_RECALLS = np.linspace(0, 1, 101)


class _Entry(NamedTuple):
    """A detection that counts.

    ``mended_label`` is its class once its error is mended, and None if it is then gone.
    """

    score: float
    label: int
    correct: bool
    kind: str = ""
    mended_label: int | None = None


class ClassCost(NamedTuple):
    """What errors cost a class.

    Attributes:
        objects: How many there are.
        hits: How many were found.
        ap: At the IoU of the matches.
        dap: How much it would rise if a kind were mended, by kind.
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
    taken out of the objects.

    Args:
        mechanisms (bool): Whether ``update`` is told why objects were missed. Their
            counts are then given too. Defaults to False.
    """

    def __init__(self, *, mechanisms: bool = False) -> None:
        self._mechanisms = mechanisms
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.hits = self.num_images = 0
        self.false_alarms: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._entries: list[_Entry] = []
        self._objects: Counter[int] = Counter()
        self._hopeless: Counter[int] = Counter()

    def update(
        self,
        matches: Matches,
        detections: Detections,
        truth: GroundTruth,
        missed: Sequence[MissedObject] = (),
    ) -> None:
        """Count one image."""
        self.num_images += 1
        self.hits += len(matches.hits)
        self.false_alarms.update(alarm.kind for alarm in matches.false_alarms)
        if self._mechanisms:
            self.missed.update(own.mechanism for own in missed)
        self._objects.update(truth.labels[~truth.ignored].tolist())
        for hit in matches.hits:
            self._add(detections, hit.detection, correct=True)
        lost = set(matches.missed)
        best = _best_chances(matches, detections, lost)
        for alarm in matches.false_alarms:
            mended = None
            if alarm.truth is not None and best.get(alarm.truth) == alarm.detection:
                mended = int(truth.labels[alarm.truth])
            self._add(detections, alarm.detection, kind=alarm.kind, mended_label=mended)
        self._hopeless.update(truth.labels[sorted(lost - set(best))].tolist())

    def _add(self, detections: Detections, index: int, **what: object) -> None:
        score, label = float(detections.scores[index]), int(detections.labels[index])
        self._entries.append(_Entry(score, label, **{"correct": False, **what}))  # type: ignore[arg-type]

    def compute(self) -> dict[str, dict[str, float]]:
        """The counts, and AP at the IoU of the matches.

        Returns:
            dict: ``counts`` has ``hits``, ``missed``, ``false_alarms``; ``false`` and
            ``missed`` the counts by kind; ``ap`` the mean ``ap`` over the classes that
            have objects; ``dap`` how much it would rise, by kind.
        """
        ap, gains = _mean(self._aps("")), {}
        for kind in (*FALSE_KINDS, MISSED):
            gains[kind] = max(_mean(self._aps(kind)) - ap, 0.0)
        num_missed = sum(self._objects.values()) - self.hits
        return {
            "counts": {
                "hits": self.hits,
                "missed": num_missed,
                "false_alarms": sum(self.false_alarms.values()),
            },
            "false": {kind: self.false_alarms[kind] for kind in FALSE_KINDS},
            "missed": {kind: self.missed[kind] for kind in MECHANISMS}
            if self._mechanisms
            else {},
            "ap": {"ap": ap},
            "dap": gains,
        }

    def by_class(self) -> dict[int, ClassCost]:
        """The same for each class that has objects."""
        aps = self._aps("")
        mended = {kind: self._aps(kind) for kind in (*FALSE_KINDS, MISSED)}
        hits = Counter(entry.label for entry in self._entries if entry.correct)
        return {
            label: ClassCost(
                self._objects[label],
                hits[label],
                ap,
                {kind: max(own[label] - ap, 0.0) for kind, own in mended.items()},
            )
            for label, ap in aps.items()
        }

    def _aps(self, mended: str) -> dict[int, float]:
        """AP of each class, or what it were with one kind mended."""
        points: dict[int, list[tuple[float, bool]]] = {c: [] for c in self._objects}
        for entry in self._entries:
            label, correct = entry.label, entry.correct
            if mended and entry.kind == mended:
                if entry.mended_label is None:
                    continue
                label, correct = entry.mended_label, True
            if label in points:
                points[label].append((entry.score, correct))
        counts = self._objects.copy()
        if mended == MISSED:
            counts.subtract(self._hopeless)
        return {c: average_precision(points[c], counts[c]) for c in points}


def ap_lost(
    images: Sequence[tuple[Matches, Detections, GroundTruth, Any]],
) -> list[float]:
    """Roughly how much AP the errors of each image cost.

    A missed object costs its share of its class, a false positive the share of one
    object times its score.

    Args:
        images (Sequence): What :meth:`ErrorCost.update` takes, of all images.
    """
    objects: Counter[int] = Counter()
    for _, _, truth, _ in images:
        objects.update(truth.labels[~truth.ignored].tolist())
    lost = []
    for matches, found, truth, _ in images:
        missed = [1 / objects[int(truth.labels[index])] for index in matches.missed]
        false = [
            float(found.scores[alarm.detection])
            / max(1, objects[int(found.labels[alarm.detection])])
            for alarm in matches.false_alarms
        ]
        lost.append(sum(missed) + sum(false))
    return lost


def _mean(aps: dict[int, float]) -> float:
    return float(np.mean(list(aps.values()))) if aps else 0.0


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
        num_objects (int): How many objects there are; of none, AP is 1 where nothing
            was detected, else 0.
    """
    if not num_objects:
        return float(not points)
    if not points:
        return 0.0
    ordered = sorted(points, key=lambda point: -point[0])
    true = np.cumsum([correct for _, correct in ordered])
    precision = true / np.arange(1, len(ordered) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true / num_objects, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())
