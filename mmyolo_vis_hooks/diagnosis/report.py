"""The errors of many images: what is kept of each, what they add up to, tables."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..records import Detections
from .cost import ErrorCost
from .diagnose import Diagnosis
from .matching import FALSE_KINDS, GroundTruth, match
from .mechanisms import MECHANISMS, MissedObject

SIZES = ("small", "medium", "large")
_LIMITS = (32**2, 96**2)  # COCO's, in square pixels
MISSED = "missed"


@dataclass(frozen=True)
class ErrorRecord:
    """One error, as it is written to ``errors.json``.

    Attributes:
        image: Name of the image.
        kind: ``'missed'``, or TIDE's kind of a false positive.
        mechanism: Why an object was missed; '' of a false positive.
        class_name: Of the object, or of the detection.
        score: Of the detection, or of a missed object's best candidate, 0 for none.
        box_xyxy: Of the object, or of the detection, in pixels of the image.
        size: ``'small'``, ``'medium'`` or ``'large'``, as COCO has it.
        lost: Roughly what it costs: of a missed object the share of its class, of a
            false positive that times its score.
    """

    image: str
    kind: str
    mechanism: str
    class_name: str
    score: float
    box_xyxy: tuple[float, ...]
    size: str
    lost: float


@dataclass(frozen=True)
class ImageErrors:
    """What is kept of a diagnosis: enough to count it again without the detector."""

    image: str
    detections: tuple[tuple[float, ...], ...]
    missed: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> ImageErrors:
        found = diagnosis.detections
        rows = np.column_stack([found.boxes_xyxy, found.scores, found.labels])
        missed = []
        for own in diagnosis.missed:
            kept = asdict(own.record)
            kept.pop("box_xyxy")
            missed.append(kept)
        return cls(
            diagnosis.image_id,
            tuple(tuple(map(float, row)) for row in rows),
            tuple(missed),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> ImageErrors:
        known = json.loads(line)
        return cls(known["image"], tuple(known["detections"]), tuple(known["missed"]))


class ErrorReport:
    """Adds images up.

    Args:
        class_names (Sequence[str]): Names of the classes.
        num_objects (Mapping[int, int]): How many objects that count a class has.
        iou_thr (float): As of the diagnoses.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        num_objects: Mapping[int, int],
        *,
        iou_thr: float,
    ) -> None:
        self._names = class_names
        self._num_objects = num_objects
        self._iou_thr = iou_thr
        self.cost = ErrorCost(mechanisms=True)
        self.records: list[ErrorRecord] = []

    def add(self, errors: ImageErrors, truth: GroundTruth) -> None:
        """Count one image."""
        rows = np.array(errors.detections, np.float32).reshape(-1, 6)
        found = Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))
        matches = match(found, truth, iou_thr=self._iou_thr)
        missed = [MissedObject(**kept) for kept in errors.missed]
        self.cost.update(matches, found, truth, missed)
        for own in missed:
            label = int(truth.labels[own.truth])
            self._record(
                errors.image,
                MISSED,
                own.mechanism,
                label,
                own.score,
                truth.boxes_xyxy[own.truth],
                1.0,
            )
        for alarm in matches.false_alarms:
            index = alarm.detection
            score = float(found.scores[index])
            self._record(
                errors.image,
                alarm.kind,
                "",
                int(found.labels[index]),
                score,
                found.boxes_xyxy[index],
                score,
            )

    def _record(
        self,
        image: str,
        kind: str,
        mechanism: str,
        label: int,
        score: float,
        box_xyxy: np.ndarray,
        weight: float,
    ) -> None:
        width, height = box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]
        size = SIZES[int(np.searchsorted(_LIMITS, width * height, side="right"))]
        known = 0 <= label < len(self._names)
        name = self._names[label] if known else f"class {label}"
        lost = weight / max(1, self._num_objects.get(label, 0))
        box = tuple(round(float(v), 1) for v in box_xyxy)
        self.records.append(
            ErrorRecord(image, kind, mechanism, name, round(score, 4), box, size, lost)
        )

    def worst_images(self, count: int) -> list[str]:
        """Names of the images that lose most."""
        lost: Counter[str] = Counter()
        for record in self.records:
            lost[record.image] += record.lost  # type: ignore[assignment]
        return [name for name, _ in lost.most_common(count)]

    def summary(self) -> dict[str, Any]:
        """Counts under ``hits``, ``missed``, ``false``; AP, and what mending gains."""
        found = self.cost.compute()
        return {
            "images": self.cost.num_images,
            "hits": int(found["counts"]["hits"]),
            "missed": found["missed"],
            "false": found["false"],
            "ap": found["ap"]["ap"],
            "dap": found["dap"],
        }

    def errors_json(self) -> str:
        return json.dumps([asdict(record) for record in self.records], indent=1)

    def table(self) -> Iterator[tuple[str, str, list[int], float | None]]:
        """Group, kind, counts (all, small, medium, large) and the AP that it costs.

        Mechanisms share the AP of all missed objects, which the first row gives.
        """
        gains = self.cost.compute()["dap"]

        def counts(records: Iterable[ErrorRecord]) -> list[int]:
            sizes = Counter(record.size for record in records)
            return [sum(sizes.values()), *(sizes[size] for size in SIZES)]

        missed = [r for r in self.records if r.kind == MISSED]
        yield MISSED, "all", counts(missed), gains[MISSED]
        for mechanism in MECHANISMS:
            own = counts(r for r in missed if r.mechanism == mechanism)
            yield MISSED, mechanism, own, None
        for kind in FALSE_KINDS:
            own = counts(r for r in self.records if r.kind == kind)
            yield "false", kind, own, gains[kind]

    def csv(self) -> str:
        """Counts by kind, mechanism, class and size."""
        rows = Counter(
            (r.kind, r.mechanism, r.class_name, r.size) for r in self.records
        )
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["kind", "mechanism", "class", "size", "count"])
        writer.writerows([*key, count] for key, count in sorted(rows.items()))
        return text.getvalue()
