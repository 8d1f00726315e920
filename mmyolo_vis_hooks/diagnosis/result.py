"""What went wrong on one image: records that print, draw and save themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..checks import class_list
from ..data.detections import labels_of
from ..declare import one_of
from ..publish.files import encode, write_result
from ..records import Detections
from ..render.boxes import class_name
from .contrast import ClassContrast
from .energy import mean_by_class, shares_inside
from .maps import ErrorMap
from .matching import FALSE_KINDS, FalseAlarm, GroundTruth, Hit, Matches
from .mechanisms import MECHANISMS, MissedObject
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

    kind: ClassVar[str] = "hit"
    why: ClassVar[str] = ""
    contrast: ClassVar[None] = None

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

    @property
    def kind(self) -> str:
        """The mechanism, as false positives have their kind."""
        return self.mechanism

    @property
    def score(self) -> float:
        """Of its best candidate; 0 where there is none."""
        return self.record.score

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
    missed: tuple[Missed, ...] = ()
    false_positives: tuple[FalsePositive, ...] = ()
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

    def of_class(self, *names: str | int) -> Diagnosis:
        """The same with hits and errors of some classes only, by name or index.

        Raises:
            VisConfigError: If the data set has no such class.
        """
        labels = labels_of(class_list("of_class", names), self.class_names)
        wanted = {class_name(label, self.class_names) for label in labels}
        return self._kept(lambda own: own.class_name in wanted)

    def of_kind(self, *kinds: str) -> Diagnosis:
        """The same with errors of some kinds or mechanisms only, and no hits.

        Raises:
            VisConfigError: If there is no such kind.
        """
        known = dict.fromkeys((*MECHANISMS, *FALSE_KINDS))
        for kind in kinds:
            one_of("of_kind", kind, known)
        return self._kept(lambda own: own.kind in kinds)

    def _kept(self, keep: Callable[[Any], bool]) -> Diagnosis:
        return replace(
            self,
            found=tuple(filter(keep, self.found)),
            missed=tuple(filter(keep, self.missed)),
            false_positives=tuple(filter(keep, self.false_positives)),
        )

    def save(self, path: str | os.PathLike) -> list[Path]:
        """Write the picture, the maps and the records.

        Args:
            path: A folder gets all of them, named after the image. A name that ends in
                ``.npz``, ``.json`` or as pictures do gets that one. Files of these
                names are replaced.

        Returns:
            list[Path]: The files.
        """
        path = Path(path)
        files = [path]
        if path.is_dir() or not path.suffix:
            files = [path / f"{self.image_id}{s}" for s in (".jpg", ".npz", ".json")]
        for file in files:
            write_result(file, self.draw, self.arrays, self.to_records)
        return files

    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into the NPZ file: the maps of errors and hits that have one.

        Returns:
            dict: ``saliency`` ``(K, H, W)`` float32 and ``rows`` ``(K,)``, the numbers
            of their records in :meth:`to_records`; ``difference`` ``(D, H, W)`` float32
            and ``difference_rows`` ``(D,)`` of confused boxes, right minus given class
            in logits.
        """
        maps = {n: own.map for n, own in enumerate(self._all()) if own.map is not None}
        contrasts = {
            n: own.contrast.difference
            for n, own in enumerate(self._all())
            if own.contrast is not None
        }
        image_hw = self.image_rgb.shape[:2]
        saliency = [own.saliency for own in maps.values()]
        return {
            "saliency": np.array(saliency, np.float32).reshape(-1, *image_hw),
            "rows": np.array(list(maps), np.int64),
            "difference": np.array(list(contrasts.values()), np.float32).reshape(
                -1, *image_hw
            ),
            "difference_rows": np.array(list(contrasts), np.int64),
        }

    def to_records(self) -> list[dict[str, Any]]:
        """Missed objects, false positives and hits, as they go into the JSON file.

        Returns:
            list[dict]: ``image_id``, ``kind`` (``'hit'``, a mechanism or a kind),
            ``class_name``, ``box_xyxy`` in pixels, ``score`` (of a missed object's best
            candidate), ``why``, and ``layer`` and ``inside`` of its map.
        """
        return [
            {
                "image_id": self.image_id,
                "kind": own.kind,
                "class_name": own.class_name,
                "box_xyxy": [round(v, 2) for v in own.box_xyxy.tolist()],
                "score": round(own.score, 5),
                "why": own.why,
                "layer": own.map.layer if own.map else "",
                "inside": round(own.map.inside, 4) if own.map else None,
            }
            for own in self._all()
        ]

    def _all(self) -> tuple[Missed | FalsePositive | Found, ...]:
        return *self.missed, *self.false_positives, *self.found

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
