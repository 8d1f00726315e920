"""The errors of many images: what is kept of each, what they add up to, tables."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..records import Detections, name_of
from .cost import MISSED, MISSED_KINDS, SIZES, ErrorCost, share_lost, size_of
from .look import told
from .matching import FALSE_KINDS, GroundTruth, match
from .mechanisms import MECHANISMS, MissedObject
from .result import Diagnosis, FalsePositive, Found, Missed

FOUND = "found"
KINDS = (*MISSED_KINDS, *(f"false: {kind}" for kind in FALSE_KINDS))
"""Every kind of error, as it is written where missed and false stand side by side."""


@dataclass(frozen=True)
class ErrorRecord:
    """One error, as it is written to ``errors.json``, or one hit.

    Attributes:
        image: Name of the image.
        kind: ``'missed'``, TIDE's kind of a false positive, or ``'found'``.
        mechanism: Why an object was missed; '' of a false positive.
        class_name: Of the object, or of the detection.
        score: Of the detection, or of a missed object's best candidate, 0 for none.
        box_xyxy: Of the object, or of the detection, in pixels of the image.
        size: ``'small'``, ``'medium'`` or ``'large'``, as COCO has it.
        lost: Roughly what it costs: of a missed object the share of its class, of a
            false positive that times its score.
        why: What was missing, or which object it should have found, in one line.
        others: Boxes that belong to it, with what they are: a missed object's best
            ``'candidate'`` and the ``'detection'`` in its way, or the ``'found'`` or
            ``'missed'`` object that a false positive lies on or a hit found.
    """

    image: str
    kind: str
    mechanism: str
    class_name: str
    score: float
    box_xyxy: tuple[float, ...]
    size: str
    lost: float
    why: str
    others: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def full_kind(self) -> str:
        """One of :data:`KINDS`, or ``'found'``."""
        return FOUND if self.kind == FOUND else kind_of(self.mechanism, self.kind)


class Told(NamedTuple):
    """An error or a hit, and which object and detection of its image it is about.

    A missed object has no detection, a false positive no object.
    """

    record: ErrorRecord
    truth: int | None
    detection: int | None


@dataclass(frozen=True)
class ImageErrors:
    """What is kept of a diagnosis: enough to count it again without the detector."""

    image: str
    image_hw: tuple[int, int]
    detections: tuple[tuple[float, ...], ...]
    missed: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> ImageErrors:
        found = diagnosis.detections
        rows = np.column_stack([found.boxes_xyxy, found.scores, found.labels])
        missed = []
        for own in diagnosis.missed:
            kept = asdict(own.record)
            if own.record.box_xyxy is not None:
                kept["box_xyxy"] = own.record.box_xyxy.tolist()
            missed.append(kept)
        return cls(
            diagnosis.image_id,
            diagnosis.image_rgb.shape[:2],
            tuple(tuple(map(float, row)) for row in rows),
            tuple(missed),
        )

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> ImageErrors:
        """Of what ``asdict`` and JSON made of one."""
        found, missed = tuple(known["detections"]), tuple(known["missed"])
        return cls(known["image"], tuple(known["image_hw"]), found, missed)

    def diagnosis(
        self,
        truth: GroundTruth,
        class_names: Sequence[str],
        *,
        score_thr: float,
        iou_thr: float,
    ) -> Diagnosis:
        """The diagnosis again, without its pixels and candidates."""
        rows = np.array(self.detections, np.float32).reshape(-1, 6)
        found = Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))
        black = np.zeros((*self.image_hw, 3), np.uint8)
        matches = match(found, truth, iou_thr=iou_thr)
        known = self.image, black, found, truth, Detections(), matches
        missed = [MissedObject(**kept) for kept in self.missed]
        return told(
            Diagnosis(*known, class_names=tuple(class_names)), missed, score_thr
        )


def records_of(diagnosis: Diagnosis, num_objects: Mapping[int, int]) -> Iterator[Told]:
    """Missed objects, then false positives, then hits, as they are written.

    Args:
        diagnosis (Diagnosis): Of the image.
        num_objects (Mapping[int, int]): How many objects that count a class has.
    """
    found, truth = diagnosis.detections, diagnosis.truth
    boxes, lost = truth.boxes_xyxy, diagnosis.matches.missed

    def written(
        own: Missed | FalsePositive | Found,
        kinds: tuple[str, str],
        label: int,
        weight: float,
        others: Iterable[tuple[str, np.ndarray]],
    ) -> ErrorRecord:
        return ErrorRecord(
            diagnosis.image_id,
            *kinds,
            name_of(int(label), diagnosis.class_names),
            round(own.score, 4),
            rounded(own.box_xyxy),
            size_of(own.box_xyxy),
            share_lost(label, num_objects, weight),
            own.why or f"IoU {own.record.iou:.2f}",
            tuple((role, rounded(box)) for role, box in others),
        )

    for own in diagnosis.missed:
        record, index, others = own.record, own.record.truth, []
        if record.box_xyxy is not None:
            others.append(("candidate", record.box_xyxy))
        if record.other is not None:
            others.append(("detection", found.boxes_xyxy[record.other]))
        what = (MISSED, own.mechanism), truth.labels[index], 1.0, others
        yield Told(written(own, *what), index, None)
    for false in diagnosis.false_positives:
        index, on = false.record.detection, false.record.truth
        state = "missed" if on in lost else FOUND
        others = [] if on is None else [(state, boxes[on])]
        what = (false.kind, ""), found.labels[index], false.score, others
        yield Told(written(false, *what), None, index)
    for hit in diagnosis.found:
        index, on = hit.record.detection, hit.record.truth
        what = (FOUND, ""), found.labels[index], 0.0, [(FOUND, boxes[on])]
        yield Told(written(hit, *what), on, index)


class ErrorReport:
    """Adds images up.

    Args:
        class_names (Sequence[str]): Names of the classes.
        num_objects (Mapping[int, int]): How many objects that count a class has.
        score_thr, iou_thr (float): As of the diagnoses.

    Attributes:
        cost (ErrorCost): Counts, and what mending gains.
        records (list[ErrorRecord]): All errors: of each image missed objects first.
        hits (list[ErrorRecord]): Detections that found an object, and cost nothing.
        detections (list): Image, class, score and corners of each detection, those on
            ignored objects, too.
        sizes (dict): Height and width of the images.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        num_objects: Mapping[int, int],
        *,
        score_thr: float,
        iou_thr: float,
    ) -> None:
        self._names = class_names
        self._num_objects = num_objects
        self._thresholds = {"score_thr": score_thr, "iou_thr": iou_thr}
        self.cost = ErrorCost(mechanisms=True)
        self.records: list[ErrorRecord] = []
        self.hits: list[ErrorRecord] = []
        self.detections: list[tuple[str, str, float, tuple[float, ...]]] = []
        self.sizes: dict[str, tuple[int, int]] = {}

    def add(self, errors: ImageErrors, truth: GroundTruth) -> None:
        """Count one image."""
        self.sizes[errors.image] = errors.image_hw
        own = errors.diagnosis(truth, self._names, **self._thresholds)
        missed = [error.record for error in own.missed]
        self.cost.update(own.matches, own.detections, truth, missed)
        for *box, score, label in errors.detections:
            name = name_of(int(label), self._names)
            corners = tuple(round(v, 2) for v in box)  # a tenth moves AP
            self.detections.append((errors.image, name, round(score, 5), corners))
        for record, _, _ in records_of(own, self._num_objects):
            (self.hits if record.kind == FOUND else self.records).append(record)

    def worst_images(self, count: int) -> list[str]:
        """Names of the images that lose most; -1 for all that lose anything."""
        lost: Counter[str] = Counter()
        for record in self.records:
            lost[record.image] += record.lost  # type: ignore[assignment]
        return [name for name, _ in lost.most_common(None if count < 0 else count)]

    def summary(self) -> dict[str, Any]:
        """Counts under ``hits``, ``missed``, ``false``; AP, and what mending gains.

        ``by_size`` has objects, hits, ``ap`` and ``dap`` of each size.
        """
        found = self.cost.compute()
        return {
            "images": self.cost.num_images,
            "hits": int(found["counts"]["hits"]),
            "missed": found["missed"],
            "false": found["false"],
            "ap": found["ap"]["ap"],
            "dap": found["dap"],
            "by_size": {size: self.cost.total(size)._asdict() for size in SIZES},
        }

    def errors_json(self) -> str:
        """The errors as a list of records; ``class_name`` is called ``class`` there."""
        return json.dumps([as_written(record) for record in self.records], indent=1)

    def table(self) -> Iterator[tuple[str, str, list[int], list[float]]]:
        """Group, kind, counts, and the AP that mending gains.

        Counts and gains are of all, small, medium and large ones.
        """
        counts = Counter((r.full_kind, r.size) for r in self.records)
        counts += Counter((r.kind, r.size) for r in self.records if r.mechanism)
        gains = [self.cost.total(size).dap for size in ("", *SIZES)]
        rows = [(MISSED, "all", MISSED, MISSED)]
        rows += [(MISSED, m, *2 * (kind_of(m, ""),)) for m in MECHANISMS]
        rows += [("false", kind, kind_of("", kind), kind) for kind in FALSE_KINDS]
        for group, shown, counted, mended in rows:
            own = [counts[counted, size] for size in SIZES]
            yield group, shown, [sum(own), *own], [dap[mended] for dap in gains]

    def csv(self) -> str:
        """Counts by kind, mechanism, class and size, and what mending gains there."""
        rows = Counter(
            (r.kind, r.mechanism, r.class_name, r.size) for r in self.records
        )
        costs = {
            (name_of(label, self._names), size): cost
            for size in SIZES
            for label, cost in self.cost.by_class(size).items()
        }

        def gain(kind: str, mechanism: str, *group: str) -> float | str:
            if group not in costs:  # there are no such objects
                return ""
            dap = costs[group].dap
            return round(dap[kind_of(mechanism, "") if mechanism else kind], 4)

        header = ["kind", "mechanism", "class", "size", "count", "dap"]
        return csv_text(header, ([*k, n, gain(*k)] for k, n in sorted(rows.items())))

    def classes(self) -> list[dict[str, Any]]:
        """For each class that has objects, the one that loses most first.

        Returns:
            list[dict]: ``class``, ``objects``, ``hits``, ``ap``, and for ``missed`` and
            each kind of false positive its count, and under ``dap KIND`` its gain.
        """
        kinds = MISSED, *FALSE_KINDS
        counts = Counter((r.class_name, r.kind) for r in self.records)
        rows = []
        costs = self.cost.by_class()
        gains = {c: sum(cost.dap[k] for k in kinds) for c, cost in costs.items()}
        for label in sorted(costs, key=lambda c: (-gains[c], -costs[c].objects)):
            cost = costs[label]
            name = name_of(label, self._names)
            row = {"class": name, "objects": cost.objects, "hits": cost.hits}
            row["ap"] = round(cost.ap, 4)
            row |= {kind: counts[name, kind] for kind in kinds}
            row |= {f"dap {kind}": round(cost.dap[kind], 4) for kind in kinds}
            rows.append(row)
        return rows

    def classes_csv(self) -> str:
        """What :meth:`classes` gives."""
        rows = self.classes()
        return csv_text(list(rows[0]) if rows else [], (r.values() for r in rows))


def as_written(record: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: its ``class_name`` as ``class``."""
    fields = asdict(record)
    return {"class" if k == "class_name" else k: v for k, v in fields.items()}


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def kind_of(mechanism: str, kind: str) -> str:
    """The kind of :data:`KINDS` of an object's mechanism, or of a false positive."""
    return f"{MISSED}: {mechanism}" if mechanism else f"false: {kind}"


def rounded(box_xyxy: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    """A box as it is written: to a tenth of a pixel."""
    return tuple(round(float(v), 1) for v in box_xyxy)
