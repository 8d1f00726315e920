"""Makes diagnoses of the images that a loop predicts."""

from __future__ import annotations

from collections.abc import Sequence
from logging import Logger
from typing import Any

from torch import nn

from ..data.alignment import Placement, network_input
from ..data.pipeline import Loaded
from ..data.samples import detections_of
from ..errors import VisError
from ..network.recorder import ForwardRecord
from ..options import DiagnosisOptions
from ..records import Detections
from ..samples import SampleMaker, recorded
from .diagnose import Diagnoser, Diagnosis
from .matching import GroundTruth


class DiagnosisMaker(SampleMaker):
    """Turns forwards of a loop into diagnoses of its own final detections.

    The arguments are those of :class:`~.diagnose.Diagnoser`.
    """

    def __init__(
        self,
        detector: nn.Module,
        options: DiagnosisOptions,
        class_names: Sequence[str],
        logger: Logger,
    ) -> None:
        super().__init__(detector, {}, channels=options.image_channels)
        self._diagnoser = Diagnoser(detector, options, class_names, logger)

    def look(
        self, image_id: str, loaded: Loaded, placement: Placement, final: Detections
    ) -> Diagnosis:
        """Diagnose what a loop found in an image, by a forward of its own."""
        data = placement.pipeline.pack(loaded)
        inputs, metainfo = network_input(self._detector, data)
        truth = GroundTruth.of(loaded.results["instances"])
        return self._diagnoser.diagnose(
            image_id, loaded, placement, truth, final, inputs, metainfo
        )

    def candidates(
        self, image_id: str, record: ForwardRecord, position: int, output: Any
    ) -> Detections:
        """Boxes of all classes, before threshold and NMS, of a recorded image."""
        _, inputs, metainfo = recorded(record, image_id, position)
        return self._diagnoser.candidates(detections_of(output), inputs, metainfo)[0]

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
        if loaded is None:
            raise VisError(f"the image {image_id} was not loaded")
        _, inputs, metainfo = recorded(record, image_id, position)
        truth = GroundTruth.of(loaded.results["instances"])
        final = detections_of(output)
        return self._diagnoser.diagnose(
            image_id, loaded, placement, truth, final, inputs, metainfo
        )
