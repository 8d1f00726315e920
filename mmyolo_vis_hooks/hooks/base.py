"""What all visualization hooks share: schedule, forward, errors, publishing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import BaseTTAModel
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn

from ..data.alignment import Placement, choose_alignment, network_input
from ..data.pipeline import ImagePipeline, Loaded, flatten_steps, prepare_data
from ..data.resize import network_divisor, network_stride
from ..data.samples import class_names_of, palette_of
from ..data.selector import ImageSelector, SelectedImage, leaf_datasets
from ..detector import unwrap_detector
from ..errors import ErrorPolicy, VisConfigError, VisError
from ..network.layer_path import resolve_layers
from ..network.recorder import LayerRecorder
from ..network.state import preserve_rng_state
from ..options import RunOptions
from ..publish.gather import RankSpool
from ..publish.publisher import Publisher
from ..publish.window import why_no_window
from ..records import VisImage
from ..samples import SampleMaker
from .loading import check_checkpoint_fits
from .loop_recording import LoopRecording, data_samples_of
from .loop_state import LoopState, Panel, layers_within, predicting_model


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
        self.run_options = run
        self.name = run.name or self.default_name
        self._loops: dict[str, LoopState] = {}

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
            resolve_layers(detector, self.options_for(detector).target_layers or ()),
            channels=self.options.image_channels,
        )

    def options_for(self, detector: nn.Module) -> Any:
        """The options, with the layers as seen from the part that predicts."""
        name, part = predicting_model(self._detector)
        paths = self.options.target_layers
        if detector is not part or not name or not paths:
            return self.options
        return replace(self.options, target_layers=layers_within(paths, name))

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

    def _prepare_loop(self, runner: Runner, mode: str, loop: BaseLoop) -> LoopState:
        dataset = loop.dataloader.dataset
        metainfo = getattr(dataset, "metainfo", None) or {}
        class_names = class_names_of(metainfo)
        state = LoopState(
            mode,
            loop,
            self._detector,
            ImageSelector(
                dataset, self.run_options.num_images, self.run_options.image_indices
            ),
            self.build_panel(class_names, palette_of(metainfo)),
            lambda model: self.build_sample_maker(runner, model, class_names),
            self.options.target_layers or (),
        )
        # What does not fit the detector fails here.
        if state.has_layers:
            maker = state.maker
        else:
            maker = SampleMaker(
                self._detector, resolve_layers(self._detector, state.layers)
            )
        for leaf in leaf_datasets(dataset):
            _check_packed_keys(leaf, self.options.alignment)
            images = [i for i in state.selector.images if i.dataset is leaf]
            if images:
                with preserve_rng_state():
                    self._place(runner, state, images, maker)
        if self.run_options.override_loop_pipeline:
            self._override(runner, state)
        if any(state.needs_record(image) for image in state.selector.images):
            state.recording = LoopRecording(
                loop,
                f"{mode}_step",
                lambda idx, data_batch: self._to_record(state, idx, data_batch),
            )
        return state

    def _place(
        self,
        runner: Runner,
        state: LoopState,
        images: Sequence[SelectedImage],
        maker: SampleMaker,
    ) -> None:
        """Find out on its first images how a data set is drawn, and try it."""
        leaf = images[0].dataset
        pipeline = ImagePipeline(leaf.pipeline, channels=self.options.image_channels)
        state.placements[id(leaf)] = Placement("network", pipeline, proven=False)
        _, model = predicting_model(self._detector)
        trial = None
        with self._trial(f"look at the first {state.mode} image", VisConfigError):
            loaded = _load_in_turn(images, pipeline)
            first = next(loaded)
            placement = choose_alignment(
                self.options.alignment,
                pipeline,
                chain([first], loaded),
                model,
                divisor=network_divisor(model),
                stride=network_stride(model, state.loop.dataloader.dataset),
            )
            if placement.reason:
                runner.logger.warning(
                    f"{self.name}: the {state.mode} data set {type(leaf).__name__} is "
                    "drawn on the network's own input, as alignment='network' does: "
                    f"{placement.reason}"
                )
            state.placements[id(leaf)] = placement
            trial = network_input(model, placement.pipeline.pack(first))
        if trial is not None:
            with self._trial("try an explanation before the run", VisError):
                maker.prepare(*trial)

    @contextlib.contextmanager
    def _trial(self, action: str, refusal: type[VisError]) -> Iterator[None]:
        """Let through what concerns the options; all else must not end the run."""
        try:
            yield
        except refusal:
            raise
        except Exception as error:
            if self.run_options.on_error == "raise":
                raise
            self._policy.record(action, error)

    def _override(self, runner: Runner, state: LoopState) -> None:
        if isinstance(runner.model, BaseTTAModel):
            raise VisConfigError(
                "override_loop_pipeline=True cannot work with test-time augmentation, "
                "which needs a pipeline of several views; leave it False"
            )
        for leaf in leaf_datasets(state.loop.dataloader.dataset):
            placement = state.placements.get(id(leaf))
            if placement is None:
                continue
            if placement.alignment != "resize":
                raise VisConfigError(
                    "override_loop_pipeline=True cannot work with this test pipeline: "
                    f"{placement.reason}; leave it False"
                )
            leaf.pipeline = placement.pipeline.compose()
            # Its batches are padded to one size.
            state.placements[id(leaf)] = replace(placement, alignment="letterbox")
        runner.logger.warning(
            f"{self.name}: override_loop_pipeline=True: the {state.mode} loop runs on "
            "the Resize-only pipeline, and its metrics are of that pipeline."
        )

    def _to_record(
        self, state: LoopState, idx: int, data_batch: Any
    ) -> tuple[LayerRecorder, list[int]] | None:
        """What records the loop's forward, and the batch positions that it keeps."""
        with self._policy.guard(f"find the images of a {state.mode} batch"):
            state.begin_batch(idx)
            wanted = state.wanted(data_samples_of(data_batch))
            positions = [n for n, image in wanted if state.needs_record(image)]
            if positions:
                return state.maker.recorder, positions
        return None

    # One validation or test run.

    def before_val_epoch(self, runner: Runner) -> None:
        """Decide whether this validation run is drawn."""
        self._start_run("val")

    def before_test_epoch(self, runner: Runner) -> None:
        """Decide whether this test run is drawn."""
        self._start_run("test")

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Note where the loop is: it may pass over the data more than once."""
        self._begin_batch("val", batch_idx)

    def before_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Note where the loop is: it may pass over the data more than once."""
        self._begin_batch("test", batch_idx)

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
        if state is not None:
            state.start_run(self.run_options.interval)

    def _begin_batch(self, mode: str, batch_idx: int) -> None:
        state = self._loops.get(mode)
        if state is not None:
            state.begin_batch(batch_idx)

    def _draw_batch(
        self, runner: Runner, mode: str, outputs: Sequence[Any] | None
    ) -> None:
        state = self._loops.get(mode)
        if state is None:
            return
        state.end_batch()
        if not state.drawing or not outputs or self._policy.ends_run:
            return
        wanted: list[tuple[int, SelectedImage]] = []
        with self._policy.guard(f"find the images of a {mode} batch"):
            wanted = state.wanted(outputs)
        for position, image in wanted:
            picture_id = state.picture_id(image)
            state.seen.update((image.image_id, picture_id))
            with self._policy.guard(f"draw {picture_id}"), preserve_rng_state():
                sample = state.make_sample(image, position, outputs[position])
                picture = VisImage(sample.image_id, state.panel(sample))
                if is_main_process():
                    self._publisher.publish(mode, picture, self._step(runner, state))
                else:
                    self._spool.add(picture)

    def _finish_run(self, runner: Runner, mode: str) -> None:
        state = self._loops.get(mode)
        if state is None or not state.drawing:
            return
        state.stop_recording()
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

    def _publish_gathered(self, state: LoopState, step: int) -> None:
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
    def _step(runner: Runner, state: LoopState) -> int:
        """Epoch or iteration of a training; elsewhere the number of the run, from 0.

        The private attribute is on purpose: ``runner.epoch`` would build the
        training loop and its data set in a pure validation.
        """
        loop = runner._train_loop
        if state.mode != "val" or not isinstance(loop, BaseLoop):
            return state.num_runs - 1
        return loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch


def _load_in_turn(
    images: Sequence[SelectedImage], pipeline: ImagePipeline
) -> Iterator[Loaded]:
    """Load images one after the other; the last error where none can be loaded."""
    error: Exception | None = None
    num_loaded = 0
    for image in images:
        try:
            yield prepare_data(image.dataset, image.index, pipeline.load)
            num_loaded += 1
        except VisConfigError:
            raise
        except VisError as failure:
            error = failure
    if error is not None and not num_loaded:
        raise error


def _check_packed_keys(dataset: Any, alignment: str | None) -> None:
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
    if alignment == "letterbox" and pads and "pad_param" not in keys:
        raise VisConfigError(
            f"{packing} do not hold 'pad_param', without which alignment='letterbox' "
            "cannot know where LetterResize put the image; add it"
        )
