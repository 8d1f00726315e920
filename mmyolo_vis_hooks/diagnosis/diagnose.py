"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..data.alignment import network_input
from ..data.samples import detections_of
from ..network.state import frozen
from ..options import DiagnosisOptions
from ..publish.files import encode
from ..records import Detections
from ..render.boxes import class_name
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


def diagnose_image(
    detector: nn.Module,
    data: Mapping[str, Any],
    image_id: str,
    image_rgb: np.ndarray,
    truth: GroundTruth,
    class_names: Sequence[str],
    options: DiagnosisOptions,
    mapper: ErrorMapper | None = None,
) -> Diagnosis:
    """Run a detector twice, as its settings are and opened, and match.

    Args:
        detector (nn.Module): The detector, without wrappers.
        data (Mapping): The image as the test pipeline packs it.
        image_id (str): Its name.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB, the original frame.
        truth (GroundTruth): Its objects, in the same frame.
        class_names (Sequence[str]): Names of the classes.
        options (DiagnosisOptions): What counts, and how many errors get a map.
        mapper (ErrorMapper, optional): Makes the maps. Defaults to None: none.
    """
    inputs, metainfo = network_input(detector, data)
    final = predict(detector, inputs, metainfo)
    return diagnose_detections(
        detector,
        final,
        inputs,
        metainfo,
        image_id,
        image_rgb,
        truth,
        class_names,
        options,
        mapper,
    )


def predict(
    detector: nn.Module, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> Detections:
    """The detections of one image, in its original frame."""
    sample = DetDataSample(metainfo=dict(metainfo))
    with frozen(detector, parameters=False), torch.no_grad():
        (output,) = detector(inputs, [sample], mode="predict")
    return detections_of(output)


def diagnose_detections(
    detector: nn.Module,
    final: Detections,
    inputs: torch.Tensor,
    metainfo: Mapping[str, Any],
    image_id: str,
    image_rgb: np.ndarray,
    truth: GroundTruth,
    class_names: Sequence[str],
    options: DiagnosisOptions,
    mapper: ErrorMapper | None = None,
) -> Diagnosis:
    """Match final detections that are there already; see :func:`diagnose_image`.

    Args:
        final (Detections): All that the detector found, in the original frame.
        inputs (Tensor): ``(1, 3, H, W)``, in which it found them.
        metainfo (Mapping): Of its data sample.
    """
    with opened(detector) as was_closed:
        candidates = predict(detector, inputs, metainfo) if was_closed else final
    detections, kept = above(final, options.score_thr)
    matches = match(detections, truth, iou_thr=options.iou_thr)
    records = why_missed(
        matches,
        detections,
        candidates,
        truth,
        score_thr=options.score_thr,
        iou_thr=options.iou_thr,
    )
    alarms = matches.false_alarms
    of_detections: dict[int, ErrorMap] = {}
    of_candidates: dict[int, ErrorMap] = {}
    if mapper is not None and options.topk:
        reached = [r.candidate for r in records if r.candidate is not None]
        reached.sort(key=lambda index: -candidates.scores[index])
        wrong = [int(kept[alarm.detection]) for alarm in alarms]
        most = None if options.topk < 0 else options.topk
        left = None if most is None else max(most - len(reached), 0)
        of_detections, of_candidates = mapper.maps(
            inputs, metainfo, image_rgb.shape[:2], wrong[:left], reached[:most]
        )
    missed = tuple(
        Missed(
            class_name(truth.labels[record.truth], class_names),
            truth.boxes_xyxy[record.truth],
            record.mechanism,
            sentence(record, detections, truth, class_names, options.score_thr),
            of_candidates.get(-1 if record.candidate is None else record.candidate),
            record,
        )
        for record in records
    )
    false_positives = tuple(
        FalsePositive(
            class_name(detections.labels[alarm.detection], class_names),
            float(detections.scores[alarm.detection]),
            detections.boxes_xyxy[alarm.detection],
            alarm.kind,
            _why_false(alarm, matches, detections, truth, class_names),
            of_detections.get(int(kept[alarm.detection])),
            alarm,
        )
        for alarm in alarms
    )
    return Diagnosis(
        image_id,
        image_rgb,
        detections,
        truth,
        candidates,
        matches,
        missed,
        false_positives,
        tuple(class_names),
        "" if was_closed else "the candidates are the final detections",
    )


def _why_false(
    alarm: FalseAlarm,
    matches: Matches,
    detections: Detections,
    truth: GroundTruth,
    class_names: Sequence[str],
) -> str:
    if alarm.truth is None:
        return f"greatest IoU with any object {alarm.iou:.2f}"
    name = class_name(truth.labels[alarm.truth], class_names)
    if alarm.kind == DUPLICATE:
        (hit,) = (h for h in matches.hits if h.truth == alarm.truth)
        score = detections.scores[hit.detection]
        return f"this {name!r} was found with {score:.2f}, IoU {alarm.iou:.2f}"
    return f"IoU {alarm.iou:.2f} with {name!r}"
