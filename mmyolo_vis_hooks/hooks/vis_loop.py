"""What a hook knows of one validation or test loop, and makes of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.model import BaseTTAModel
from mmengine.runner import BaseLoop
from mmengine.runner.amp import autocast
from torch import nn

from ..data.alignment import PlacedImage, Placement
from ..data.selector import ImageSelector, SelectedImage, leaf_datasets
from ..errors import VisConfigError, VisError
from ..network.recorder import ForwardRecord
from ..samples import SampleMaker

Panel = Callable[[Any], np.ndarray]
_PARTS = ("teacher", "student")


@dataclass
class VisLoop:
    """One loop, from the choice of its images to their samples.

    A loop may pass over the data more than once in a run, each time with another
    model: MMDetection's ``TeacherStudentValLoop``. Each pass meets all images anew.

    Attributes:
        mode: ``'val'`` or ``'test'``.
        detector: The detector, without wrappers.
        options: What is drawn; ``target_layers`` as seen from the detector.
        class_names: Names of the data set's classes.
        build_maker: Gives the sample maker for a model that predicts, with the layers
            as seen from it.
        placements: How the images of each data set are drawn, by its identity.
        num_runs: How many runs there were, but for those of a training.
        step: Epoch or iteration of a training; elsewhere the number of the run.
        drawing: Whether the current run is drawn.
        seen: Names of the pictures and images that the current run has met.
        record_all: Whether the forward of every image is recorded, drawn or not.
        record: Of the forward of the current batch, where a placement needs it.
        batch: Index of the batch that came last in the current pass.
    """

    mode: str
    loop: BaseLoop
    detector: nn.Module
    selector: ImageSelector
    panel: Panel
    options: Any
    class_names: tuple[str, ...]
    build_maker: Callable[[nn.Module, Any], SampleMaker]
    placements: dict[int, Placement] = field(default_factory=dict)
    num_runs: int = 0
    step: int = -1
    drawing: bool = False
    seen: set[str] = field(default_factory=set)
    record_all: bool = False
    record: ForwardRecord | None = None
    batch: int = -1
    _makers: dict[str, SampleMaker] = field(default_factory=dict)
    _pass_number: int = 1
    _attached: ExitStack = field(default_factory=ExitStack)

    def run_resized(self) -> None:
        """Let the loop itself run on the Resize-only pipeline.

        Raises:
            VisConfigError: If it cannot.
        """
        if isinstance(self.loop.runner.model, BaseTTAModel):
            raise VisConfigError(
                "override_loop_pipeline=True cannot work with test-time augmentation, "
                "which needs a pipeline of several views; leave it False"
            )
        for leaf in leaf_datasets(self.loop.dataloader.dataset):
            placement = self.placements.get(id(leaf))
            if placement is None:
                continue
            if placement.alignment != "resize":
                raise VisConfigError(
                    "override_loop_pipeline=True cannot work with this test pipeline: "
                    f"{placement.reason}; leave it False"
                )
            leaf.pipeline = Compose(placement.pipeline.steps)
            # Its batches are padded to one size.
            self.placements[id(leaf)] = replace(placement, alignment="letterbox")

    def start_run(self, interval: int, number: int | None = None, at: int = 0) -> None:
        """Begin a run, of which every ``interval``-th is drawn.

        Args:
            number: Of the validation in its training; None outside of one, where runs
                are counted here.
            at: The training's epoch or iteration.
        """
        if number is None:
            number = self.num_runs
            at = max(at, number)
            self.num_runs += 1
        self.drawing = number % interval == 0
        # A validation after a training must not overwrite the training's last.
        self.step = max(at, self.step + 1)
        self.seen.clear()
        self._pass_number, self.batch = 1, -1

    def begin_batch(self, idx: int, data_batch: Any) -> None:
        """Begin an iteration; its forward is recorded where an image needs that."""
        self._attached.close()
        self.record = None
        self._pass_number += idx <= self.batch
        self.batch = idx
        if all(p.alignment == "resize" for p in self.placements.values()):
            return
        samples = data_batch["data_samples"]
        if samples and isinstance(samples[0], (list, tuple)):  # the first of some views
            samples = samples[0]
        keep = list(range(len(samples))) if self.record_all else []
        if self.drawing and not self.record_all:
            wanted = self.wanted(samples)
            keep = [number for number, image in wanted if self._needs_record(image)]
        if keep:
            self._record_next_step(keep)

    def _record_next_step(self, keep: Sequence[int]) -> None:
        model, name = self.loop.runner.model, f"{self.mode}_step"
        step, previous = getattr(model, name), vars(model).get(name)
        recorder = self.maker.recorder

        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Before the step, so that nothing stays attached whatever happens in it,
            # and other hooks may run the model after it.
            self._attached.close()
            with recorder.record(keep) as record:
                outputs = step(*args, **kwargs)
            self.record = record
            return outputs

        setattr(model, name, recorded)
        if previous is None:
            self._attached.callback(delattr, model, name)
        else:
            self._attached.callback(setattr, model, name, previous)

    @property
    def recorded(self) -> ForwardRecord:
        """The forward of the current batch; a ``VisError`` where nobody recorded it."""
        if self.record is None:
            raise VisError(
                f"the forward of the batch was not recorded: its data samples have "
                "other metainfo before the forward than after it, or the loop does not "
                f"call {self.mode}_step"
            )
        return self.record

    @property
    def layers(self) -> list[str]:
        """The layers that are asked for, as seen from the model that predicts now."""
        name, _ = predicting_model(self.detector)
        paths = list(self.options.target_layers or ())
        if not name:
            return paths
        (other,) = {*_PARTS} - {name}
        own = [path for path in paths if path.partition(".")[0] != other]
        return [path.removeprefix(f"{name}.") for path in own]

    @property
    def has_layers(self) -> bool:
        """Whether the model that predicts now has any of the layers."""
        return not self.options.target_layers or bool(self.layers)

    @property
    def maker(self) -> SampleMaker:
        """What makes the samples of the model that predicts now."""
        name, model = predicting_model(self.detector)
        key = name or str(self._pass_number)
        if key not in self._makers:
            options = self.options
            if options.target_layers:
                options = replace(options, target_layers=self.layers or None)
            self._makers[key] = self.build_maker(model, options)
        return self._makers[key]

    @property
    def pass_name(self) -> str:
        """Name of the pass over the data; empty in a loop that makes one."""
        name, _ = predicting_model(self.detector)
        if not name and self._pass_number > 1:
            name = f"pass{self._pass_number}"
        return name

    def picture_id(self, image: SelectedImage) -> str:
        """Name of an image's picture, another one in each pass."""
        name = self.pass_name
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

    def _needs_record(self, image: SelectedImage) -> bool:
        return self.placements[id(image.dataset)].alignment != "resize"

    def autocast(self) -> AbstractContextManager[None]:
        """A block that computes as the loop does."""
        return autocast(enabled=bool(getattr(self.loop, "fp16", False)))

    def placed(self, image: SelectedImage) -> PlacedImage:
        """Load an image, unless it is drawn on the network's own input."""
        placement, loaded = self.placements[id(image.dataset)], None
        if placement.alignment != "network":
            loaded = image.through(placement.pipeline.load)
        return PlacedImage(self.picture_id(image), loaded, placement)

    def make_sample(self, image: SelectedImage, position: int, output: Any) -> Any:
        """Make the sample of one image of the current batch.

        Raises:
            VisError: If the image cannot be loaded, or its forward was not recorded.
        """
        placed = self.placed(image)
        with self.autocast():  # what is asked again answers as it did
            if placed.placement.alignment == "resize":
                return self.maker.run(placed)
            return self.maker.from_record(placed, self.recorded, position, output)


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
