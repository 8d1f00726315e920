"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import Logger
from typing import Any

import torch
from torch import nn

from ..data.alignment import PlacedImage, network_input
from ..data.detections import detections_of
from ..errors import VisError
from ..network.graph import instances_of, prediction_of
from ..network.recorder import ForwardRecord
from ..network.state import frozen
from ..options import DiagnosisOptions
from ..records import Detections
from ..render.panel import joined
from ..samples import SampleMaker
from .candidates import FLOOR, LEAST_FLOOR, opened
from .contrast import ClassComparer, ClassContrast, Pair
from .look import Look
from .maps import ErrorMap, ErrorMapper
from .matching import CONFUSED, GroundTruth
from .mechanisms import SUPPRESSED, sentence
from .result import Diagnosis, FalsePositive, Missed


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
        super().__init__(detector, {}, logger=logger)
        self._options = options
        self._names = tuple(class_names)
        if options.topk:
            self._mapper = ErrorMapper(detector, logger, class_names=class_names)
            self._comparer = ClassComparer(detector, class_names)

    def look(
        self,
        image: PlacedImage,
        truth: GroundTruth | None,
        final: Detections | None = None,
    ) -> Look:
        """Run the detector on an image, closed and opened.

        Args:
            image (PlacedImage): Through the pipeline that evaluates, as
                :func:`own_placement` has it.
            truth (GroundTruth, optional): The objects of the image, in its own pixels.
            final (Detections, optional): What it found closed, in pixels of the image,
                where that is known.
        """
        inputs, metainfo = network_input(self._detector, image.packed())
        return self._look(image, truth, inputs, metainfo, final)

    def diagnose(self, look: Look, *, maps: bool = True) -> Diagnosis:
        """Diagnose an image, with maps as far as they are wanted and the options ask.

        Args:
            look (Look): Of :meth:`look`.
            maps (bool): Whether they are wanted.
        """
        found = look.diagnose(self._options)
        if look.candidates is look.final:
            found = _noted(found, "the candidates are the final detections")
        if not maps or not self._options.topk:
            return found
        if look.no_maps:
            return _noted(found, f"no maps: {look.no_maps}")
        return self.explain(found, look)

    def from_record(
        self, image: PlacedImage, record: ForwardRecord, position: int, output: Any
    ) -> Diagnosis:
        """Diagnose one image of a recorded forward, of which the input is needed."""
        assert image.loaded is not None
        truth = GroundTruth.of(image.loaded.results["instances"])
        given = record.given(position)
        found = detections_of(instances_of(output, self._detector))
        return self.diagnose(self._look(image, truth, *given, found))

    def candidates(
        self, final: Detections, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Detections:
        """Boxes of all classes before threshold and NMS; else the final ones."""
        floor = min(FLOOR, max(LEAST_FLOOR, self._options.score_thr))
        with opened(self._detector, floor=floor) as was_closed:
            found = self._predict(inputs, metainfo) if was_closed else final
        # Some heads compare before they multiply, by centerness or the like.
        return found.take(found.scores > floor) if was_closed else final

    def explain(self, diagnosis: Diagnosis, look: Look) -> Diagnosis:
        """Add what speaks for each box; what cannot be explained is said in a note.

        At most ``topk`` errors get a map, missed objects first, and as many hits, the
        best first.

        Args:
            diagnosis (Diagnosis): Without maps.
            look (Look): At the image.
        """
        candidates, detections, pairs = self._wanted(diagnosis)
        final = diagnosis.detections.take(detections)
        reached = diagnosis.candidates.take(candidates)
        try:
            by_final = self._mapper.maps(look, final)
            by_candidate = self._mapper.maps(look, reached, candidates=True)
        except VisError as error:  # what was missed is known all the same
            return _noted(diagnosis, f"no maps: {error}")
        of_detections = {detections[k]: own for k, own in by_final.items()}
        of_candidates = {candidates[k]: own for k, own in by_candidate.items()}
        contrasts: Mapping[Any, ClassContrast] = {}
        if pairs:
            boxes = diagnosis.detections
            try:
                contrasts = self._comparer.contrasts(look, boxes, pairs)
            except VisError as error:
                diagnosis = _noted(diagnosis, f"classes are not compared: {error}")
        return self._with_maps(diagnosis, of_detections, of_candidates, contrasts)

    def _look(
        self,
        image: PlacedImage,
        truth: GroundTruth | None,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        final: Detections | None,
    ) -> Look:
        if final is None:
            final = self._predict(inputs, metainfo)
        assert image.loaded is not None
        return Look(
            image.image_id,
            image.loaded.image_rgb,
            final,
            self.candidates(final, inputs, metainfo),
            truth,
            self._names,
            "" if image.placement.proven else image.placement.reason,
            inputs,
            metainfo,
        )

    def _predict(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> Detections:
        with frozen(self._detector), torch.no_grad():
            (output,) = prediction_of(self._detector, inputs, metainfo)()
        return detections_of(instances_of(output, self._detector))

    def _wanted(self, diagnosis: Diagnosis) -> tuple[list[int], list[int], list[Pair]]:
        """Candidates and detections that get a map, and classes to compare."""
        topk, scores = self._options.topk, diagnosis.candidates.scores
        most = None if topk < 0 else topk
        reached = [m.record for m in diagnosis.missed]
        candidates = [r.candidate for r in reached if r.candidate is not None]
        candidates = sorted(candidates, key=lambda index: -scores[index])[:most]
        wrong = [own.record.detection for own in diagnosis.false_positives]
        if most is not None:
            wrong = wrong[: most - len(candidates)]
        right = [own.record.detection for own in diagnosis.found][:most]
        winners = [
            record.other
            for record in reached
            if record.mechanism == SUPPRESSED and record.candidate in candidates
        ]
        detections = {i for i in (*wrong, *right, *winners) if i is not None}
        errors: list[Missed | FalsePositive] = [*diagnosis.missed]
        errors += diagnosis.false_positives
        pairs = dict.fromkeys(_pair_of(diagnosis, own) for own in errors)
        compared = [pair for pair in pairs if pair is not None][:most]
        return candidates, sorted(detections), compared

    def _with_maps(
        self,
        diagnosis: Diagnosis,
        of_detections: Mapping[Any, ErrorMap],
        of_candidates: Mapping[Any, ErrorMap],
        contrasts: Mapping[Any, ClassContrast],
    ) -> Diagnosis:
        """A diagnosis with maps, by its own detections, by candidate and by pair."""

        def missed(own: Missed) -> Missed:
            error_map, why = of_candidates.get(own.record.candidate), own.why
            if error_map is not None:
                found, truth = diagnosis.detections, diagnosis.truth
                known = own.record, found, truth, diagnosis.class_names
                why = sentence(*known, self._options.score_thr, error_map.layer)
            other_map = of_detections.get(own.record.other)
            apart = contrasts.get(_pair_of(diagnosis, own))
            return replace(
                own, map=error_map, why=why, other_map=other_map, contrast=apart
            )

        def false_positive(own: FalsePositive) -> FalsePositive:
            error_map, why = of_detections.get(own.record.detection), own.why
            if error_map is not None and error_map.is_shortcut:
                why += f"; a shortcut: {error_map.inside:.0%} of the map is inside"
            apart = contrasts.get(_pair_of(diagnosis, own))
            return replace(own, map=error_map, why=why, contrast=apart)

        return replace(
            diagnosis,
            found=tuple(
                replace(own, map=of_detections.get(own.record.detection))
                for own in diagnosis.found
            ),
            missed=tuple(map(missed, diagnosis.missed)),
            false_positives=tuple(map(false_positive, diagnosis.false_positives)),
        )


def _pair_of(diagnosis: Diagnosis, own: Missed | FalsePositive) -> Pair | None:
    """Of a confused error the detection, and the class that is right."""
    if own.kind != CONFUSED:
        return None
    detection = own.record.other if isinstance(own, Missed) else own.record.detection
    assert detection is not None
    assert own.record.truth is not None
    return detection, int(diagnosis.truth.labels[own.record.truth])


def _noted(diagnosis: Diagnosis, note: str) -> Diagnosis:
    return replace(diagnosis, note=joined([diagnosis.note, note]))
