"""What all visualization hooks share: schedule, forward, errors, publishing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn

from ..data.pipeline import (
    build_resize_only_pipeline,
    flatten_steps,
    network_divisor,
    network_stride,
)
from ..data.samples import class_names_of, palette_of
from ..data.selector import (
    ImageSelector,
    SelectedImage,
    leaf_datasets,
)
from ..errors import ErrorPolicy, VisConfigError, VisError
from ..network.layer_path import resolve_layers
from ..network.state import preserve_rng_state
from ..options import RunOptions
from ..publish.gather import RankSpool
from ..publish.publisher import Publisher
from ..publish.window import why_no_window
from ..records import VisImage, VisSample
from ..samples import SampleMaker
from .loading import check_checkpoint_fits
from .loop_recording import LoopRecording, data_samples_of

Panel = Callable[[Any], np.ndarray]


@dataclass
class _LoopState:
    """What a hook knows of one validation or test loop."""

    mode: str
    loop: BaseLoop
    selector: ImageSelector
    sample_maker: SampleMaker
    panel: Panel
    # Resize-only copies of the test pipelines, by the identity of their dataset.
    pipelines: dict[int, Callable] = field(default_factory=dict)
    recording: LoopRecording | None = None
    num_runs: int = 0
    drawing: bool = False
    seen: set[str] = field(default_factory=set)

    def wanted(self, data_samples: Sequence[Any]) -> list[tuple[int, SelectedImage]]:
        """Selected images of a batch that this run has not met yet."""
        wanted: dict[str, tuple[int, SelectedImage]] = {}
        for position, data_sample in enumerate(data_samples):
            image = self.selector.find(data_sample.metainfo)
            if image is not None and image.image_id not in self.seen:
                wanted.setdefault(image.image_id, (position, image))
        return list(wanted.values())


class BaseVisHook(Hook):
    """Draws pictures of chosen images in every validation or test run.

    A subclass says what is captured in :meth:`build_sample_maker` and how a picture
    is made of it in :meth:`build_panel`.

    Args:
        options (Options): What is drawn; has ``target_layers`` and ``alignment``.
        run (RunOptions): When, and where to.
    """

    priority = "NORMAL"
    default_name = "vis"

    def __init__(self, options: Any, run: RunOptions) -> None:
        if run.override_loop_pipeline and options.alignment not in (None, "resize"):
            raise VisConfigError(
                f"override_loop_pipeline=True cannot work with "
                f"alignment={options.alignment!r}, since the loop then runs on the "
                "Resize-only pipeline; leave alignment=None"
            )
        self.options = options
        self.alignment = options.alignment or "resize"
        self.run_options = run
        self.name = run.name or self.default_name
        self._loops: dict[str, _LoopState] = {}

    def build_sample_maker(
        self, runner: Runner, detector: nn.Module, class_names: Sequence[str]
    ) -> SampleMaker:
        """Give what turns an image into the sample that the panel takes.

        Args:
            runner (Runner): The runner.
            detector (nn.Module): The detector, without wrappers.
            class_names (Sequence[str]): Classes of the loop's dataset.

        Raises:
            VisError: If an option does not fit the detector.
        """
        return SampleMaker(
            detector,
            resolve_layers(detector, self.options.target_layers or ()),
            alignment=self.alignment,
        )

    def build_panel(
        self, class_names: Sequence[str], palette: Sequence[Any] | None
    ) -> Panel:
        """Give the function that turns a sample into a picture.

        Args:
            class_names (Sequence[str]): Classes of the loop's dataset.
            palette (Sequence, optional): Their RGB colours.
        """
        raise NotImplementedError

    # Preparation: before weights are loaded and data is read.

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to draw what a model of random weights sees.

        Raises:
            CheckpointError: If no weight of the checkpoint fits.
        """
        if self.run_options.draw:
            check_checkpoint_fits(runner, checkpoint)

    def before_run(self, runner: Runner) -> None:
        """Check what needs the model, the data and the pipeline, and prepare.

        Raises:
            VisConfigError: If an option does not fit them.
        """
        if not self.run_options.draw:
            return
        if not self._loops:
            self._set_up(runner)
        elif any(isinstance(hook, LoggerHook) for hook in runner.hooks):
            # At the end of the run before, it closed the visualizer's backends.
            self._publisher.reopen()
        self._detector = unwrap_detector(runner.model)
        # A loop that is not built yet is not the one that runs now.
        for mode, loop in (("val", runner._val_loop), ("test", runner._test_loop)):
            known = self._loops.get(mode)
            if isinstance(loop, BaseLoop) and (known is None or known.loop is not loop):
                self._loops[mode] = self._prepare_loop(runner, mode, loop)

    def _set_up(self, runner: Runner) -> None:
        """Prepare what all loops share."""
        problem = why_no_window() if self.run_options.show else None
        # A visualizer of the user's own may show pictures elsewhere.
        if problem and type(runner.visualizer).show is Visualizer.show:
            raise VisConfigError(
                f"show=True cannot work: {problem}; leave show=False to publish the "
                "pictures through the visualizer's backends"
            )
        self._take_name(runner)
        self._policy = ErrorPolicy(self.run_options.on_error, runner.logger, self.name)
        self._spool = RankSpool(runner.work_dir)
        self._publisher = Publisher(
            runner.visualizer,
            name=self.name,
            policy=self._policy,
            show=self.run_options.show,
            wait_time=self.run_options.wait_time,
        )
        if not self._publisher.has_destination:
            runner.logger.warning(
                f"{self.name}: the visualizer has no backend, so no picture will be "
                "kept. Set visualizer=dict(vis_backends=[dict(type='LocalVisBackend'"
                ")]); DetVisualizationHook(show=True) removes all backends."
            )

    def _take_name(self, runner: Runner) -> None:
        """Give two hooks of one name different tags."""
        earlier = runner.hooks[: runner.hooks.index(self)]
        taken = {
            h.name for h in earlier if isinstance(h, BaseVisHook) and h.run_options.draw
        }
        base, count = self.name, 1
        while self.name in taken:
            count += 1
            self.name = f"{base}_{count}"

    def _prepare_loop(self, runner: Runner, mode: str, loop: BaseLoop) -> _LoopState:
        dataset = loop.dataloader.dataset
        metainfo = getattr(dataset, "metainfo", None) or {}
        class_names = class_names_of(metainfo)
        state = _LoopState(
            mode,
            loop,
            ImageSelector(
                dataset, self.run_options.num_images, self.run_options.image_indices
            ),
            self.build_sample_maker(runner, self._detector, class_names),
            self.build_panel(class_names, palette_of(metainfo)),
        )
        for leaf in leaf_datasets(dataset):
            _check_packed_keys(leaf, self.alignment)
        if self.alignment == "resize":
            self._prepare_pipelines(runner, state, dataset)
        if self.alignment != "resize" or self.run_options.override_loop_pipeline:
            state.recording = LoopRecording(
                loop,
                f"{mode}_step",
                state.sample_maker.recorder,
                lambda data_batch: self._positions(state, data_batch),
            )
        return state

    def _prepare_pipelines(
        self, runner: Runner, state: _LoopState, dataset: Any
    ) -> None:
        if self.run_options.override_loop_pipeline and isinstance(
            runner.model, BaseTTAModel
        ):
            raise VisConfigError(
                "override_loop_pipeline=True cannot work with test-time augmentation, "
                "which needs a pipeline of several views; leave it False"
            )
        for leaf in leaf_datasets(dataset):
            pipeline = build_resize_only_pipeline(
                leaf.pipeline,
                divisor=network_divisor(self._detector),
                stride=network_stride(self._detector, dataset),
            )
            state.pipelines[id(leaf)] = pipeline
            if self.run_options.override_loop_pipeline:
                leaf.pipeline = pipeline
        if self.run_options.override_loop_pipeline:
            runner.logger.warning(
                f"{self.name}: override_loop_pipeline=True: the {state.mode} loop runs "
                "on the Resize-only pipeline, and its metrics are of that pipeline."
            )

    def _positions(self, state: _LoopState, data_batch: Any) -> list[int]:
        """Batch positions that the recording of the loop's forward keeps."""
        positions: list[int] = []
        if state.drawing:
            with self._policy.guard(f"find the images of a {state.mode} batch"):
                wanted = state.wanted(data_samples_of(data_batch))
                positions = [position for position, _ in wanted]
        return positions

    # One validation or test run.

    def before_val_epoch(self, runner: Runner) -> None:
        """Decide whether this validation run is drawn."""
        self._start_run("val")

    def before_test_epoch(self, runner: Runner) -> None:
        """Decide whether this test run is drawn."""
        self._start_run("test")

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Draw the selected images of this batch.

        In the iteration, because ``EMAHook`` puts the training weights back
        before ``after_val_epoch``.
        """
        self._draw_batch(runner, "val", outputs)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Draw the selected images of this batch."""
        self._draw_batch(runner, "test", outputs)

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Publish what the other ranks drew and complete the run."""
        self._finish_run(runner, "val")

    def after_test_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Publish what the other ranks drew and complete the run."""
        self._finish_run(runner, "test")

    def after_run(self, runner: Runner) -> None:
        """Say what was drawn and what failed."""
        if not self._loops:
            return
        count, self._publisher.num_published = self._publisher.num_published, 0
        if count:
            done = "shown" if self.run_options.show else "published"
            runner.logger.info(f"{self.name}: {count} picture(s) {done}")
        self._policy.report()

    def _start_run(self, mode: str) -> None:
        state = self._loops.get(mode)
        if state is None:
            return
        state.drawing = state.num_runs % self.run_options.interval == 0
        state.num_runs += 1
        state.seen.clear()

    def _draw_batch(
        self, runner: Runner, mode: str, outputs: Sequence[Any] | None
    ) -> None:
        state = self._loops.get(mode)
        if state is None or not state.drawing or not outputs:
            return
        if self._policy.ends_run:
            return
        wanted: list[tuple[int, SelectedImage]] = []
        with self._policy.guard(f"find the images of a {mode} batch"):
            wanted = state.wanted(outputs)
        for position, image in wanted:
            state.seen.add(image.image_id)
            with self._policy.guard(f"draw {image.image_id}"), preserve_rng_state():
                sample = self._make_sample(state, image, position, outputs[position])
                picture = VisImage(sample.image_id, state.panel(sample))
                if is_main_process():
                    self._publisher.publish(mode, picture, self._step(runner, state))
                else:
                    self._spool.add(picture)

    def _make_sample(
        self, state: _LoopState, image: SelectedImage, position: int, output: Any
    ) -> VisSample:
        if state.recording is None:
            pipeline = state.pipelines[id(image.dataset)]
            fp16 = bool(getattr(state.loop, "fp16", False))
            return state.sample_maker.run(image, pipeline, fp16=fp16)
        record = state.recording.record
        if record is None:
            raise VisError(
                f"the forward of {image.image_id} was not recorded; its data sample "
                "has other metainfo before the forward than after it"
            )
        return state.sample_maker.from_record(image, record, position, output)

    def _finish_run(self, runner: Runner, mode: str) -> None:
        state = self._loops.get(mode)
        if state is None or not state.drawing:
            return
        # Between the first and the last collective no rank may fail alone.
        met = set().union(*all_gather_object(state.seen))
        with self._policy.guard("gather the pictures of the other ranks"):
            self._spool.gather()
        if is_main_process():
            self._publish_gathered(state, self._step(runner, state))
            self._publisher.finish(commit=self._ends_row(runner, mode))
        state.drawing = False
        self._policy.share()
        missing = [i.image_id for i in state.selector.images if i.image_id not in met]
        if missing:
            runner.logger.warning(
                f"{self.name}: {len(missing)} selected image(s) never came through the "
                f"{mode} loop: {', '.join(missing[:5])}"
            )

    def _publish_gathered(self, state: _LoopState, step: int) -> None:
        with self._policy.guard("read the pictures of the other ranks"):
            for picture in self._spool.images():
                # Samplers repeat images so that all ranks have equally many.
                if picture.image_id not in state.seen:
                    state.seen.add(picture.image_id)
                    self._publisher.publish(state.mode, picture, step)
        self._spool.clear()

    def _ends_row(self, runner: Runner, mode: str) -> bool:
        """Whether nobody after this hook ends the run's row of history."""
        later = runner.hooks[runner.hooks.index(self) + 1 :]
        for hook in later:
            if isinstance(hook, BaseVisHook) and hook._draws_now(mode):
                return False
            # In a test, MMEngine's LoggerHook writes no scalars.
            if isinstance(hook, LoggerHook) and mode == "val":
                return False
        return True

    def _draws_now(self, mode: str) -> bool:
        state = self._loops.get(mode)
        return state is not None and state.drawing

    @staticmethod
    def _step(runner: Runner, state: _LoopState) -> int:
        """Epoch or iteration of a training; elsewhere the number of the run, from 0.

        The private attribute is on purpose: ``runner.epoch`` would build the
        training loop and its data set in a pure validation.
        """
        loop = runner._train_loop
        if state.mode != "val" or not isinstance(loop, BaseLoop):
            return state.num_runs - 1
        return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def unwrap_detector(model: nn.Module) -> nn.Module:
    """The detector inside distributed and test-time-augmentation wrappers."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model


def _check_packed_keys(dataset: Any, alignment: str) -> None:
    """Fail early if the batches will not say which image they hold, and where."""
    steps = flatten_steps(getattr(dataset, "pipeline", []))
    keys = getattr(steps[-1], "meta_keys", None) if steps else None
    if keys is None:
        return
    packing = f"meta_keys={tuple(keys)} of {type(steps[-1]).__name__}"
    if not {"img_id", "img_path"} & set(keys):
        raise VisConfigError(
            f"{packing} hold neither 'img_id' nor 'img_path', so no image can be found "
            "again; add both"
        )
    pads = any(type(step).__name__ == "LetterResize" for step in steps)
    if alignment != "resize" and pads and "pad_param" not in keys:
        raise VisConfigError(
            f"{packing} do not hold 'pad_param', without which alignment={alignment!r} "
            "cannot know where LetterResize put the image; add it"
        )
