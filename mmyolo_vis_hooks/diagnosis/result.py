"""What went wrong on one image: records that print, draw and save themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..publish.files import encode
from ..records import Detections
from .contrast import ClassContrast
from .energy import mean_by_class, shares_inside
from .maps import ErrorMap
from .matching import FalseAlarm, GroundTruth, Hit, Matches
from .mechanisms import MissedObject
from .picture import draw_diagnosis


@dataclass(frozen=True, eq=False)
class Found:
    """A detection that found an object.

    Attributes:
        class_name: Of both.
        score: Of the detection.
        box_xyxy: ``(4,)`` float32 of the detection, pixels of the image.
        map: What made it; None of detections that were not to be explained.
        record: Object and overlap, with indices of the diagnosis.
    """

    class_name: str
    score: float
    box_xyxy: np.ndarray
    map: ErrorMap | None
    record: Hit

    def __repr__(self) -> str:
        return f"Found({self.class_name} {self.score:.2f}, IoU {self.record.iou:.2f})"


@dataclass(frozen=True, eq=False)
class Missed:
    """An object that no detection found.

    Attributes:
        class_name: Of the object.
        box_xyxy: ``(4,)`` float32 of the object, pixels of the image.
        mechanism: ``'below threshold'``, ``'suppressed'``, ``'confused'``,
            ``'badly placed'`` or ``'not seen'``.
        why: What was missing, in one line.
        map: What there was for its own class at its best candidate; None without a
            candidate, and of objects that were not to be explained.
        record: Candidate, scores and overlaps, with indices of the diagnosis.
        other_map: What made the detection that it was suppressed by, is confused with
            or that lies badly on it; None of one that was not to be explained.
        contrast: Of a confused one, what tells its class from that of the detection
            on it, where that is to be explained.
    """

    class_name: str
    box_xyxy: np.ndarray
    mechanism: str
    why: str
    map: ErrorMap | None
    record: MissedObject
    other_map: ErrorMap | None = None
    contrast: ClassContrast | None = None

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
        map: What made it; None of detections that were not to be explained.
        record: Object and overlap, with indices of the diagnosis.
        contrast: Of a confused one, what tells its class from that of the object,
            where that is to be explained.
    """

    class_name: str
    score: float
    box_xyxy: np.ndarray
    kind: str
    why: str
    map: ErrorMap | None
    record: FalseAlarm
    contrast: ClassContrast | None = None

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
        class_names: Names of the classes.
        note: What could not be found out about this detector; '' for nothing.
        found: Objects that a detection found, the highest score first.
    """

    image_id: str
    image_rgb: np.ndarray
    detections: Detections
    truth: GroundTruth
    candidates: Detections
    matches: Matches
    missed: tuple[Missed, ...]
    false_positives: tuple[FalsePositive, ...]
    class_names: tuple[str, ...] = ()
    note: str = ""
    found: tuple[Found, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have a map, each once."""
        maps = [missed.map for missed in self.missed]
        maps += [found.map for found in self.false_positives]
        return tuple(dict.fromkeys(found.layer for found in maps if found is not None))

    def energy_inside(self) -> dict[str, float]:
        """Share of the evidence that lies inside of the objects that were found.

        Returns:
            dict: By class, the mean over its explained hits: of the map, what lies in
            the object's mask where the ground truth has one, else in its box.
        """
        return mean_by_class(shares_inside(self))

    def draw(self, max_panels: int = 12) -> np.ndarray:
        """The image with hits, misses and false positives, and a panel per error.

        Args:
            max_panels (int): At most so many panels, those with a map first.

        Returns:
            np.ndarray: ``(H, W, 3)`` uint8, RGB.
        """
        return draw_diagnosis(self, max_panels)

    def _repr_jpeg_(self) -> bytes:
        return encode(".jpg", self.draw(), 90)

    def __repr__(self) -> str:
        return (
            f"Diagnosis({self.image_id}: {len(self.matches.hits)} found, "
            f"{len(self.missed)} missed, {len(self.false_positives)} false)"
        )
