"""What a detector saw in an image, and what is right and wrong in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..data.alignment import packed_frame
from ..geometry import FrameTransform
from ..options import DiagnosisOptions
from ..records import Detections
from ..render.boxes import class_name
from .candidates import Closing
from .matching import DUPLICATE, FalseAlarm, GroundTruth, Matches, match
from .mechanisms import MissedObject, sentence, why_missed
from .result import Diagnosis, FalsePositive, Found, Missed


@dataclass(frozen=True, eq=False)
class Look:
    """What a detector saw in an image, whatever the threshold and NMS are.

    Attributes:
        image_id: Name of the image.
        image_rgb: ``(H, W, 3)`` uint8, RGB.
        final: What the detector found with its own settings.
        candidates: Boxes of all classes before threshold and NMS; ``final`` itself
            where they cannot be had.
        truth: The objects; None where they are not known.
        class_names: Names of the classes.
        no_maps: Why there are no maps of this image; '' if there are.
        inputs: ``(1, 3, h, w)``, what the detector was given.
        metainfo: Of its data sample.
        closing: How the detector makes detections of candidates; None without NMS, and
            where only its own detections count.
    """

    image_id: str
    image_rgb: np.ndarray
    final: Detections
    candidates: Detections
    truth: GroundTruth | None
    class_names: tuple[str, ...]
    no_maps: str
    inputs: torch.Tensor = field(repr=False)
    metainfo: Mapping[str, Any] = field(repr=False)
    closing: Closing | None = None

    @property
    def frame(self) -> FrameTransform:
        """How the image lies in what the detector was given, as its pipeline says."""
        network_hw = self.metainfo["batch_input_shape"]
        return packed_frame(self.image_rgb.shape[:2], network_hw, self.metainfo)

    def diagnose(
        self, options: DiagnosisOptions, nms_iou_thr: float | None = None
    ) -> Diagnosis:
        """Diagnose the image; no forward is needed.

        With the detector's own NMS, and a threshold not below its own, these are its
        own detections; else they are made of the candidates, as NMS does it.

        Args:
            options (DiagnosisOptions): What counts.
            nms_iou_thr (float, optional): IoU threshold of NMS. Defaults to None: the
                detector's own. One without NMS has none.

        Returns:
            Diagnosis: Without maps; where the objects are not known, no detection is
            an error.
        """
        final, closing = self.final, self.closing
        if closing is not None:
            own = nms_iou_thr is None or abs(nms_iou_thr - closing.iou_thr) < 1e-6
            if not own or options.score_thr < closing.score_thr:
                _, final = closing.keep(self.candidates, iou_thr=nms_iou_thr)
        truth = GroundTruth.of([]) if self.truth is None else self.truth
        given = self.image_id, self.image_rgb, final, self.candidates, truth
        found = judge(*given, options, self.class_names)
        if self.truth is None:
            found = replace(found, matches=Matches(), false_positives=())
        return found


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
    detections = final.take(final.scores > options.score_thr)
    matches = match(detections, truth, iou_thr=options.iou_thr)
    missed = why_missed(
        matches,
        detections,
        candidates,
        truth,
        score_thr=options.score_thr,
        iou_thr=options.iou_thr,
    )
    return told(
        Diagnosis(
            image_id,
            image_rgb,
            detections,
            truth,
            candidates,
            matches,
            class_names=tuple(class_names),
        ),
        missed,
        options.score_thr,
    )


def told(
    diagnosis: Diagnosis, missed: Sequence[MissedObject], score_thr: float
) -> Diagnosis:
    """A diagnosis with its errors and hits in words.

    Args:
        diagnosis (Diagnosis): With everything else.
        missed (Sequence[MissedObject]): Why objects were missed.
        score_thr (float): The threshold.
    """
    detections, truth = diagnosis.detections, diagnosis.truth
    names, matches = diagnosis.class_names, diagnosis.matches

    def of_detection(index: int) -> tuple[str, float, np.ndarray]:
        name = class_name(detections.labels[index], names)
        return name, float(detections.scores[index]), detections.boxes_xyxy[index]

    return replace(
        diagnosis,
        missed=tuple(
            Missed(
                class_name(truth.labels[record.truth], names),
                truth.boxes_xyxy[record.truth],
                record.mechanism,
                sentence(record, detections, truth, names, score_thr),
                None,
                record,
            )
            for record in missed
        ),
        false_positives=tuple(
            FalsePositive(
                *of_detection(alarm.detection),
                alarm.kind,
                _why_false(alarm, matches, detections, truth, names),
                None,
                alarm,
            )
            for alarm in matches.false_alarms
        ),
        found=tuple(
            Found(*of_detection(hit.detection), None, hit) for hit in matches.hits
        ),
    )


def _why_false(
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
