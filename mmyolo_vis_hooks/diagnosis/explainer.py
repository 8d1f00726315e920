"""Adds to a diagnosis what speaks for each of its boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import Logger
from typing import Any

from torch import nn

from ..errors import VisError
from ..options import DiagnosisOptions
from ..render.panel import joined
from .contrast import ClassComparer, ClassContrast, Pair
from .look import Look
from .maps import ErrorMap, ErrorMapper
from .matching import CONFUSED
from .mechanisms import SUPPRESSED, sentence
from .result import Diagnosis, FalsePositive, Missed


class Explainer:
    """Explains errors, and the hits beside them.

    The arguments are those of :class:`~.diagnose.Diagnoser`. Of the options it reads
    ``topk``: at most so many errors of an image, missed objects first, and as many
    hits, the best first; -1 explains all.
    """

    def __init__(
        self,
        detector: nn.Module,
        options: DiagnosisOptions,
        class_names: Sequence[str],
        logger: Logger,
    ) -> None:
        self._most = None if options.topk < 0 else options.topk
        self._score_thr = options.score_thr
        self._mapper = ErrorMapper(detector, logger, class_names=class_names)
        self._comparer = ClassComparer(detector, class_names)

    def explain(self, diagnosis: Diagnosis, look: Look) -> Diagnosis:
        """Give a diagnosis with maps; what cannot be explained is said in its note.

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
            return noted(diagnosis, f"no maps: {error}")
        of_detections = {detections[k]: own for k, own in by_final.items()}
        of_candidates = {candidates[k]: own for k, own in by_candidate.items()}
        contrasts: Mapping[Any, ClassContrast] = {}
        if pairs:
            boxes = diagnosis.detections
            try:
                contrasts = self._comparer.contrasts(look, boxes, pairs)
            except VisError as error:
                diagnosis = noted(diagnosis, f"classes are not compared: {error}")
        return self._with_maps(diagnosis, of_detections, of_candidates, contrasts)

    def _wanted(self, diagnosis: Diagnosis) -> tuple[list[int], list[int], list[Pair]]:
        """Candidates and detections that get a map, and classes to compare."""
        most, scores = self._most, diagnosis.candidates.scores
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
                why = sentence(*known, self._score_thr, error_map.layer)
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


def noted(diagnosis: Diagnosis, note: str) -> Diagnosis:
    """The same with one more note."""
    return replace(diagnosis, note=joined([diagnosis.note, note]))
