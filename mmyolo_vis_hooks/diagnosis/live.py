"""One image, asked again and again: its candidates are computed once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import Logger
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.alignment import Placement, network_input
from ..data.pipeline import Loaded
from ..errors import VisError
from ..options import BoxAMOptions, DiagnosisOptions
from ..records import Detections
from .closing import Closing
from .diagnose import Diagnoser, Diagnosis, judge
from .maps import ErrorMap, ErrorMapper
from .matching import GroundTruth, Matches
from .opening import opened


@dataclass(frozen=True, eq=False)
class Look:
    """What a detector saw in an image, whatever the threshold and NMS are.

    Attributes:
        image_id: Name of the image.
        image_rgb: ``(H, W, 3)`` uint8, RGB.
        final: What the detector found with its own settings.
        candidates: Boxes of all classes before threshold and NMS.
        truth: The objects; None where they are not known.
        closing: How the detector makes detections of candidates; None without NMS.
        class_names: Names of the classes.
        no_maps: Why there are no maps of this image; '' if there are.
        inputs: ``(1, 3, h, w)``, what the detector was given.
        metainfo: Of its data sample.
    """

    image_id: str
    image_rgb: np.ndarray
    final: Detections
    candidates: Detections
    truth: GroundTruth | None
    closing: Closing | None
    class_names: tuple[str, ...]
    no_maps: str
    inputs: torch.Tensor = field(repr=False)
    metainfo: Mapping[str, Any] = field(repr=False)

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


class LiveDetector:
    """Looks at images, and explains any candidate by any method.

    It may be asked by several threads: one is served at a time.

    Args:
        detector (nn.Module): The detector, without wrappers.
        class_names (Sequence[str]): Names of the classes.
        logger (Logger): Told what a user should know.
    """

    def __init__(
        self, detector: nn.Module, class_names: Sequence[str], logger: Logger
    ) -> None:
        self._detector = detector
        self._names = tuple(class_names)
        self._logger = logger
        self._closing = Closing.of(detector)
        self._diagnoser = Diagnoser(
            detector, DiagnosisOptions(topk=0), class_names, logger
        )
        self._mappers: dict[BoxAMOptions, ErrorMapper] = {}
        self._lock = threading.Lock()

    def look(
        self,
        image_id: str,
        loaded: Loaded,
        placement: Placement,
        truth: GroundTruth | None = None,
    ) -> Look:
        """Run the detector on an image, closed and opened.

        Arguments are those of :meth:`~.diagnose.Diagnoser.look`; ``truth`` is None
        where the objects are not known.
        """
        with self._lock:
            data = placement.pipeline.pack(loaded)
            inputs, metainfo = network_input(self._detector, data)
            final = candidates = self._diagnoser.predict(inputs, metainfo)
            with opened(self._detector) as was_closed:
                if was_closed:
                    candidates = self._diagnoser.predict(inputs, metainfo)
        return Look(
            image_id,
            loaded.image_rgb,
            final,
            candidates,
            truth,
            self._closing,
            self._names,
            "" if placement.proven else placement.reason,
            inputs,
            metainfo,
        )

    def explain(
        self, look: Look, candidate: int, options: BoxAMOptions
    ) -> ErrorMap | None:
        """Explain a candidate; None where nothing has any influence on it.

        Args:
            look (Look): Of :meth:`look`.
            candidate (int): Index of a candidate.
            options (BoxAMOptions): Method, target and layers.

        Raises:
            VisError: If it cannot be explained.
        """
        if look.no_maps:
            raise VisError(look.no_maps)
        with self._lock:
            if options not in self._mappers:
                self._mappers[options] = ErrorMapper(
                    self._detector, self._logger, options, self._names
                )
            _, maps = self._mappers[options].maps(
                look.inputs,
                look.metainfo,
                look.image_rgb.shape[:2],
                Detections(),
                look.candidates.take([candidate]),
            )
        return maps.get(0)
