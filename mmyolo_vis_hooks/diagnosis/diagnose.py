"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import Logger
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..data.alignment import Placement, network_input
from ..data.pipeline import Loaded
from ..data.samples import detections_of
from ..network.recorder import ForwardRecord
from ..network.state import frozen
from ..options import DiagnosisOptions
from ..records import Detections
from ..render.boxes import class_name
from ..samples import SampleMaker, recorded
from .candidates import Closing, opened
from .explainer import Explainer, noted
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


class Diagnoser(SampleMaker):
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
        super().__init__(detector, {})
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
        truth: GroundTruth | None,
        final: Detections | None = None,
    ) -> Look:
        """Run the detector on an image, closed and opened.

        Args:
            image_id (str): Name of the image.
            loaded (Loaded): The image.
            placement (Placement): Of the pipeline that evaluates, as
                :func:`own_placement` gives it.
            truth (GroundTruth, optional): The objects of the image, in its own pixels.
            final (Detections, optional): What it found closed, in pixels of the image,
                where that is known.
        """
        data = placement.pipeline.pack(loaded)
        inputs, metainfo = network_input(self._detector, data)
        return self._look(image_id, loaded, placement, truth, inputs, metainfo, final)

    def diagnose(self, look: Look, *, maps: bool = True) -> Diagnosis:
        """Diagnose an image, with maps as far as they are wanted and the options ask.

        Args:
            look (Look): Of :meth:`look`.
            maps (bool): Whether they are wanted.
        """
        found = look.diagnose(self._options)
        if look.candidates is look.final:
            found = noted(found, "the candidates are the final detections")
        if not maps or self._explainer is None:
            return found
        if look.no_maps:
            return noted(found, f"no maps: {look.no_maps}")
        return self._explainer.explain(found, look.inputs, look.metainfo)

    def from_record(
        self,
        image_id: str,
        loaded: Loaded | None,
        placement: Placement,
        record: ForwardRecord,
        position: int,
        output: Any,
    ) -> Diagnosis:
        """Diagnose one image of a recorded forward, of which the input is needed."""
        assert loaded is not None  # but for alignment='network', which is not offered
        _, inputs, metainfo = recorded(record, image_id, position)
        truth = GroundTruth.of(loaded.results["instances"])
        seen = image_id, loaded, placement, truth, inputs, metainfo
        return self.diagnose(self._look(*seen, detections_of(output)))

    def candidates(
        self, final: Detections, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Detections:
        """Boxes of all classes before threshold and NMS; else the final ones."""
        with opened(self._detector) as was_closed:
            return self._predict(inputs, metainfo) if was_closed else final

    def _look(
        self,
        image_id: str,
        loaded: Loaded,
        placement: Placement,
        truth: GroundTruth | None,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        final: Detections | None,
    ) -> Look:
        if final is None:
            final = self._predict(inputs, metainfo)
        return Look(
            image_id,
            loaded.image_rgb,
            final,
            self.candidates(final, inputs, metainfo),
            truth,
            self._names,
            "" if placement.proven else placement.reason,
            inputs,
            metainfo,
        )

    def _predict(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> Detections:
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
