"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from logging import Logger
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..data.alignment import Placement, network_input
from ..data.pipeline import Loaded
from ..data.samples import detections_of
from ..errors import VisError
from ..network.state import frozen
from ..options import DiagnosisOptions
from ..publish.files import encode
from ..records import Detections
from ..render.boxes import class_name
from ..render.panel import joined
from .maps import ErrorMap, ErrorMapper, above
from .matching import DUPLICATE, FalseAlarm, GroundTruth, Matches, match
from .mechanisms import MissedObject, sentence, why_missed
from .opening import opened
from .picture import draw_diagnosis


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
    """

    class_name: str
    box_xyxy: np.ndarray
    mechanism: str
    why: str
    map: ErrorMap | None
    record: MissedObject

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
    """

    class_name: str
    score: float
    box_xyxy: np.ndarray
    kind: str
    why: str
    map: ErrorMap | None
    record: FalseAlarm

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

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have a map, each once."""
        maps = [missed.map for missed in self.missed]
        maps += [found.map for found in self.false_positives]
        return tuple(dict.fromkeys(found.layer for found in maps if found is not None))

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


class Diagnoser:
    """Says of images what a detector missed and invented.

    Args:
        detector (nn.Module): The detector, without wrappers.
        options (DiagnosisOptions): What counts, and how many errors get a map.
        class_names (Sequence[str]): Names of the classes.
        logger (Logger): Told what a user should know.
    """

    def __init__(
        self,
        detector: nn.Module,
        options: DiagnosisOptions,
        class_names: Sequence[str],
        logger: Logger,
    ) -> None:
        self._detector = detector
        self._options = options
        self._names = tuple(class_names)
        self._mapper = ErrorMapper(detector, logger) if options.topk else None

    def look(
        self,
        image_id: str,
        loaded: Loaded,
        placement: Placement,
        truth: GroundTruth,
        *,
        maps: bool = True,
    ) -> Diagnosis:
        """Run the detector on an image, and diagnose what it finds.

        Args:
            image_id (str): Name of the image.
            loaded (Loaded): The image.
            placement (Placement): Of the pipeline that evaluates, as
                :func:`own_placement` gives it.
            truth (GroundTruth): The objects of the image, in its own pixels.
            maps (bool): Make maps, as far as the options ask for them.
        """
        data = placement.pipeline.pack(loaded)
        inputs, metainfo = network_input(self._detector, data)
        final = self.predict(inputs, metainfo)
        return self.diagnose(
            image_id, loaded, placement, truth, final, inputs, metainfo, maps=maps
        )

    def diagnose(
        self,
        image_id: str,
        loaded: Loaded,
        placement: Placement,
        truth: GroundTruth,
        final: Detections,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        *,
        maps: bool = True,
    ) -> Diagnosis:
        """Match detections that are there already with the objects.

        Args:
            final (Detections): All that the detector found, in pixels of the image.
            inputs (Tensor): ``(1, 3, H, W)``, in which it found them.
            metainfo (Mapping): Of its data sample.

        The others are those of :meth:`look`.
        """
        with opened(self._detector) as was_closed:
            candidates = self.predict(inputs, metainfo) if was_closed else final
        notes = [] if was_closed else ["the candidates are the final detections"]
        found = judge(
            image_id,
            loaded.image_rgb,
            final,
            candidates,
            truth,
            self._options,
            self._names,
        )
        if maps and self._mapper is not None and not placement.proven:
            notes.append(f"no maps: {placement.reason}")
        elif maps and self._mapper is not None:
            _, kept = above(final, self._options.score_thr)
            wanted = self._explained(found, kept)
            try:
                of_detections, of_candidates = self._mapper.maps(
                    inputs, metainfo, loaded.image_rgb.shape[:2], *wanted
                )
            except VisError as error:  # what was missed is known all the same
                notes.append(f"no maps: {error}")
            else:
                found = _with_maps(found, kept, of_detections, of_candidates)
        return replace(found, note=joined(notes))

    def predict(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> Detections:
        """What the detector finds in an input, with its settings of the moment."""
        sample = DetDataSample(metainfo=dict(metainfo))
        with frozen(self._detector, parameters=False), torch.no_grad():
            (output,) = self._detector(inputs, [sample], mode="predict")
        return detections_of(output)

    def _explained(
        self, found: Diagnosis, kept: np.ndarray
    ) -> tuple[list[int], list[int]]:
        """Which final detections and which candidates get a map."""
        reached = [m.record.candidate for m in found.missed]
        candidates = [index for index in reached if index is not None]
        candidates.sort(key=lambda index: -found.candidates.scores[index])
        wrong = [int(kept[own.record.detection]) for own in found.false_positives]
        most = self._options.topk
        if most < 0:
            return wrong, candidates
        return wrong[: max(most - len(candidates), 0)], candidates[:most]


def judge(
    image_id: str,
    image_rgb: np.ndarray,
    final: Detections,
    candidates: Detections,
    truth: GroundTruth,
    options: DiagnosisOptions,
    class_names: Sequence[str] = (),
) -> Diagnosis:
    """Diagnose detections and candidates that are known, without a detector or maps.

    Args:
        image_id (str): Name of the image.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB.
        final (Detections): All that were found, in pixels of the image.
        candidates (Detections): Boxes of all classes before threshold and NMS.
        truth (GroundTruth): The objects.
        options (DiagnosisOptions): What counts.
        class_names (Sequence[str]): Names of the classes.
    """
    names = tuple(class_names)
    detections, _ = above(final, options.score_thr)
    matches = match(detections, truth, iou_thr=options.iou_thr)
    missed = [
        Missed(
            class_name(truth.labels[record.truth], names),
            truth.boxes_xyxy[record.truth],
            record.mechanism,
            sentence(record, detections, truth, names, options.score_thr),
            None,
            record,
        )
        for record in why_missed(
            matches,
            detections,
            candidates,
            truth,
            score_thr=options.score_thr,
            iou_thr=options.iou_thr,
        )
    ]
    false_positives = [
        FalsePositive(
            class_name(detections.labels[alarm.detection], names),
            float(detections.scores[alarm.detection]),
            detections.boxes_xyxy[alarm.detection],
            alarm.kind,
            why_false(alarm, matches, detections, truth, names),
            None,
            alarm,
        )
        for alarm in matches.false_alarms
    ]
    return Diagnosis(
        image_id,
        image_rgb,
        detections,
        truth,
        candidates,
        matches,
        tuple(missed),
        tuple(false_positives),
        names,
    )


def _with_maps(
    found: Diagnosis,
    kept: np.ndarray,
    of_detections: Mapping[int, ErrorMap],
    of_candidates: Mapping[int, ErrorMap],
) -> Diagnosis:
    """A diagnosis with maps, by final detection and by candidate."""
    missed = [
        replace(own, map=of_candidates.get(own.record.candidate))
        if own.record.candidate is not None
        else own
        for own in found.missed
    ]
    false_positives = [
        replace(own, map=of_detections.get(int(kept[own.record.detection])))
        for own in found.false_positives
    ]
    return replace(found, missed=tuple(missed), false_positives=tuple(false_positives))


def why_false(
    alarm: FalseAlarm,
    matches: Matches,
    detections: Detections,
    truth: GroundTruth,
    class_names: Sequence[str],
) -> str:
    """Which object a detection should have found, in one line."""
    if alarm.truth is None:
        return f"greatest IoU with any object {alarm.iou:.2f}"
    name = class_name(truth.labels[alarm.truth], class_names)
    if alarm.kind == DUPLICATE:
        (hit,) = (h for h in matches.hits if h.truth == alarm.truth)
        score = detections.scores[hit.detection]
        return f"this {name!r} was found with {score:.2f}, IoU {alarm.iou:.2f}"
    return f"IoU {alarm.iou:.2f} with {name!r}"
