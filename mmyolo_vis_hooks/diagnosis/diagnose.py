"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import Logger
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..data.alignment import Placement, network_input
from ..data.pipeline import Loaded
from ..data.samples import detections_of
from ..network.state import frozen
from ..options import DiagnosisOptions
from ..records import Detections
from ..render.boxes import class_name
from ..render.panel import joined
from .explainer import Explainer
from .matching import DUPLICATE, FalseAlarm, GroundTruth, Matches, match
from .mechanisms import sentence, why_missed
from .opening import opened
from .result import Diagnosis, FalsePositive, Found, Missed


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
        self._explainer = None
        if options.topk:
            self._explainer = Explainer(detector, options, class_names, logger)

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
        candidates, was_opened = self.candidates(final, inputs, metainfo)
        notes = [] if was_opened else ["the candidates are the final detections"]
        found = judge(
            image_id,
            loaded.image_rgb,
            final,
            candidates,
            truth,
            self._options,
            self._names,
        )
        found = replace(found, note=joined(notes))
        if not maps or self._explainer is None:
            return found
        if not placement.proven:
            reason = f"no maps: {placement.reason}"
            return replace(found, note=joined([*notes, reason]))
        return self._explainer.explain(found, inputs, metainfo)

    def candidates(
        self, final: Detections, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[Detections, bool]:
        """Boxes of all classes before threshold and NMS, and whether there are others
        than the final ones."""
        with opened(self._detector) as was_closed:
            return (self.predict(inputs, metainfo) if was_closed else final), was_closed

    def predict(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> Detections:
        """What the detector finds in an input, with its settings of the moment."""
        sample = DetDataSample(metainfo=dict(metainfo))
        with frozen(self._detector), torch.no_grad():
            (output,) = self._detector(inputs, [sample], mode="predict")
        return detections_of(output)


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
    detections = final.take(final.scores > options.score_thr)
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
    hits = [
        Found(
            class_name(detections.labels[hit.detection], names),
            float(detections.scores[hit.detection]),
            detections.boxes_xyxy[hit.detection],
            None,
            hit,
        )
        for hit in matches.hits
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
        found=tuple(hits),
    )


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
