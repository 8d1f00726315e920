"""From a detector, an image and its objects to what went wrong, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from logging import Logger
from typing import Any

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
from ..samples import SampleMaker, recorded
from .candidates import opened
from .explainer import Explainer, noted
from .look import Look
from .matching import GroundTruth
from .result import Diagnosis


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
        return self._explainer.explain(found, look)

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
