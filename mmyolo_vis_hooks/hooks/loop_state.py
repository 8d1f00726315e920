"""What a hook knows of one validation or test loop, and makes of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.runner import BaseLoop
from torch import nn

from ..data.alignment import Placement
from ..data.pipeline import prepare_data
from ..data.selector import ImageSelector, SelectedImage
from ..errors import VisError
from ..samples import SampleMaker
from .loop_recording import LoopRecording

Panel = Callable[[Any], np.ndarray]
_PARTS = ("teacher", "student")


@dataclass
class LoopState:
    """One loop, from the choice of its images to their samples.

    A loop may pass over the data more than once in a run, each time with another
    model: MMDetection's ``TeacherStudentValLoop``. Each pass meets all images anew.

    Attributes:
        mode: ``'val'`` or ``'test'``.
        loop: The loop.
        detector: The detector, without wrappers.
        selector: Finds the selected images.
        panel: Draws a sample.
        build_maker: Gives the sample maker for a model that predicts.
        layers: Paths of the layers that are asked for, if any.
        placements: How the images of each data set are drawn, by its identity.
        recording: Of the loop's own forward, where a placement needs it.
        num_runs: How many runs there were.
        drawing: Whether the current run is drawn.
        seen: Names of the pictures and images that the current run has met.
    """

    mode: str
    loop: BaseLoop
    detector: nn.Module
    selector: ImageSelector
    panel: Panel
    build_maker: Callable[[nn.Module], SampleMaker]
    layers: Sequence[str] = ()
    placements: dict[int, Placement] = field(default_factory=dict)
    recording: LoopRecording | None = None
    num_runs: int = 0
    drawing: bool = False
    seen: set[str] = field(default_factory=set)
    _makers: dict[str, SampleMaker] = field(default_factory=dict)
    _pass_number: int = 1
    _batch: int = -1
    _in_batch: bool = False

    def start_run(self, interval: int) -> None:
        """Begin a run, of which every ``interval``-th is drawn."""
        self.drawing = self.num_runs % interval == 0
        self.num_runs += 1
        self.seen.clear()
        self._pass_number, self._batch, self._in_batch = 1, -1, False
        if self.recording is not None and self.drawing:
            self.recording.attach()

    def stop_recording(self) -> None:
        """Leave the loop as it was."""
        if self.recording is not None:
            self.recording.detach()

    def begin_batch(self, idx: int) -> None:
        """Note the number of an iteration; may be called twice for one."""
        if self._in_batch and idx == self._batch:
            return
        if idx <= self._batch:
            self._pass_number += 1
        self._batch, self._in_batch = idx, True

    def end_batch(self) -> None:
        """Note that an iteration is over."""
        self._in_batch = False

    @property
    def has_layers(self) -> bool:
        """Whether the model that predicts now has any of the layers."""
        name, _ = predicting_model(self.detector)
        return not self.layers or bool(layers_within(self.layers, name))

    @property
    def maker(self) -> SampleMaker:
        """What makes the samples of the model that predicts now."""
        name, model = predicting_model(self.detector)
        key = name or str(self._pass_number)
        if key not in self._makers:
            self._makers[key] = self.build_maker(model)
        return self._makers[key]

    def picture_id(self, image: SelectedImage) -> str:
        """Name of an image's picture, another one in each pass."""
        name, _ = predicting_model(self.detector)
        if not name and self._pass_number > 1:
            name = f"pass{self._pass_number}"
        return f"{image.image_id}_{name}" if name else image.image_id

    def wanted(self, data_samples: Sequence[Any]) -> list[tuple[int, SelectedImage]]:
        """Positions of the selected images in a batch that this pass has not met."""
        wanted: dict[str, tuple[int, SelectedImage]] = {}
        if not self.has_layers:
            return []
        for position, data_sample in enumerate(data_samples):
            image = self.selector.find(data_sample.metainfo)
            if image is not None and self.picture_id(image) not in self.seen:
                wanted.setdefault(image.image_id, (position, image))
        return list(wanted.values())

    def needs_record(self, image: SelectedImage) -> bool:
        """Whether an image is drawn of the loop's own forward."""
        return self.placements[id(image.dataset)].alignment != "resize"

    def make_sample(self, image: SelectedImage, position: int, output: Any) -> Any:
        """Make the sample of one image of the current batch.

        Raises:
            VisError: If the image cannot be loaded, or its forward was not recorded.
        """
        placement = self.placements[id(image.dataset)]
        picture_id = self.picture_id(image)
        loaded: Any = None
        if placement.alignment != "network":
            loaded = prepare_data(image.dataset, image.index, placement.pipeline.load)
        if not self.needs_record(image):
            fp16 = bool(getattr(self.loop, "fp16", False))
            return self.maker.run(picture_id, loaded, placement, fp16=fp16)
        record = None if self.recording is None else self.recording.record
        if record is None:
            raise VisError(
                f"the forward of {image.image_id} was not recorded; its data sample "
                "has other metainfo before the forward than after it"
            )
        return self.maker.from_record(
            picture_id, loaded, placement, record, position, output
        )


def layers_within(paths: Sequence[str], name: str) -> list[str]:
    """Of layer paths those that can be followed from a part of a detector.

    Args:
        paths (Sequence[str]): From the detector (``'teacher.neck'``) or a part.
        name (str): The part; empty for the detector itself.
    """
    if not name:
        return list(paths)
    (other,) = {*_PARTS} - {name}
    own = [path for path in paths if path.partition(".")[0] != other]
    return [path.removeprefix(f"{name}.") for path in own]


def predicting_model(detector: nn.Module) -> tuple[str, nn.Module]:
    """Which part of a detector predicts now, and its name; itself under no name.

    MMDetection's semi-supervised detectors hold a teacher and a student.
    """
    settings = getattr(detector, "semi_test_cfg", None)
    if not settings:
        return "", detector
    name = "teacher" if settings.get("predict_on") == "teacher" else "student"
    part = getattr(detector, name, None)
    return (name, part) if isinstance(part, nn.Module) else ("", detector)
