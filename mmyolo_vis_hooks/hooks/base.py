"""What all visualization hooks share: schedule, forward, errors, publishing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from logging import Logger
from typing import Any

import numpy as np
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn

from ..data.alignment import (
    PlacedImage,
    Placement,
    choose_alignment,
    first_loaded,
)
from ..data.pipeline import ImagePipeline, flatten_steps
from ..data.selector import ImageSelector, SelectedImage, leaf_datasets
from ..declare import Options, read_options
from ..detector import classes_and_palette, unwrap_detector
from ..errors import ErrorPolicy, VisConfigError, VisError
from ..network.layer_path import resolve_layers
from ..network.state import preserve_rng_state
from ..options import RunOptions
from ..publish.gather import RankSpool
from ..publish.publisher import Publisher
from ..publish.window import why_no_window
from ..publish.writer import Writer
from ..records import VisImage
from ..samples import SampleMaker, make_sample_maker
from .boxed import boxed_image
from .loading import check_checkpoint_fits
from .vis_loop import Panel, VisLoop, predicting_model


class BaseVisHook(Hook):
    """Draws pictures of chosen images in every validation or test run.

    A subclass names its options, and the panel that draws a sample with them.

    Args:
        **options: Those of ``options_kind`` and of :class:`RunOptions`.
    """

    priority = "NORMAL"
    default_name: str
    options_kind: type[Options]
    run_kind: type[RunOptions] = RunOptions
    panel_kind: Callable[..., Panel]

    def __init__(self, **options: Any) -> None:
        drawn, run = read_options(
            type(self).__name__, options, self.options_kind, self.run_kind
        )
        if run.override_loop_pipeline and drawn.alignment not in (None, "resize"):
            raise VisConfigError(
                f"override_loop_pipeline=True cannot work with "
                f"alignment={drawn.alignment!r}, since the loop then runs on the "
                "Resize-only pipeline; leave alignment=None"
            )
        self.options = drawn
        self.run_options = run
        self.name = run.name or self.default_name
        self._runner: Any = None
        self._loops: dict[str, VisLoop] = {}
        self._training = False
        # Of the current run, by the name of the pass and of the image.
        self._measured: dict[str, dict[str, Any]] = {}

    def build_panel(
        self, class_names: Sequence[str], palette: Sequence[Any] | None
    ) -> Panel:
        """Give the function that turns a sample into a picture."""
        return self.panel_kind(self.options, class_names, palette)

    def build_maker(
        self, model: nn.Module, options: Any, class_names: Sequence[str], logger: Logger
    ) -> SampleMaker:
        """Give what turns an image into the sample that the panel takes."""
        bar = is_main_process()
        return make_sample_maker(model, options, class_names, logger, show_progress=bar)

    # Preparation: before weights are loaded and data is read.

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to draw what a model of random weights sees."""
        if self.run_options.draw:
            check_checkpoint_fits(runner, checkpoint)

    def before_run(self, runner: Runner) -> None:
        """Check what needs the model, the data and the pipeline, and prepare.

        Raises:
            VisConfigError: If an option does not fit them.
        """
        if not self.run_options.draw:
            return
        self._training = False
        if self._runner is not runner:
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
        """Prepare what all loops of a Runner share."""
        self._loops = {}
        show = self.run_options.show
        problem = why_no_window() if show else None
        # A visualizer of the user's own may show pictures elsewhere.
        if problem and type(runner.visualizer).show is Visualizer.show:
            raise VisConfigError(
                f"show=True cannot work: {problem}; leave show=False to publish the "
                "pictures through the visualizer's backends"
            )
        earlier = runner.hooks[: runner.hooks.index(self)]
        loggers = [hook for hook in runner.hooks if isinstance(hook, LoggerHook)]
        if self._logs and loggers and all(hook in earlier for hook in loggers):
            raise VisConfigError(
                f"priority={self.priority!r} puts {type(self).__name__} behind "
                "LoggerHook, which would log none of its scalars; leave it out, or "
                "take a higher one than LoggerHook's, such as 'NORMAL'"
            )
        # Two hooks of one name get different tags.
        visual = [h for h in earlier if isinstance(h, BaseVisHook)]
        others = [hook for hook in visual if hook.run_options.draw]
        taken = {other.name for other in others}
        base, count = self.name, 1
        while self.name in taken:
            count += 1
            self.name = f"{base}_{count}"
        self._policy = ErrorPolicy(self.run_options.on_error, runner.logger, self.name)
        # One thread for all of them: their backends are the same.
        self._writer: Writer = others[0]._writer if others else Writer()
        self._spool = RankSpool(runner.work_dir)
        self._publisher = Publisher(
            runner.visualizer,
            name=self.name,
            policy=self._policy,
            writer=self._writer,
            show=show,
            wait_time=self.run_options.wait_time,
            table=self.run_options.table,
        )
        if self.run_options.table and not self._publisher.wants_boxes:
            raise VisConfigError(
                "table=True cannot work: none of the visualizer's backends makes "
                "tables; add dict(type='WandbVisBackend') to vis_backends, or leave "
                "it False"
            )
        if not self._publisher.has_destination:
            runner.logger.warning(
                f"{self.name}: the visualizer has no backend, so no picture will be "
                "kept. Set visualizer=dict(vis_backends=[dict(type='LocalVisBackend'"
                ")]); DetVisualizationHook(show=True) removes all backends."
            )
        # MMEngine's logger says the same of a second hook once.
        for notice in self._publisher.notices() if is_main_process() else ():
            runner.logger.warning(notice)
        self._runner = runner

    def _prepare_loop(self, runner: Runner, mode: str, loop: BaseLoop) -> VisLoop:
        dataset = dataset_of(loop)
        metainfo = getattr(dataset, "metainfo", None) or {}
        if isinstance(metainfo, list):
            runner.logger.warning(
                f"{self.name}: the data sets of the {mode} loop have different "
                "classes, so numbers stand for their names"
            )
            metainfo = {}
        names, palette = classes_and_palette(metainfo)
        state = VisLoop(
            mode,
            loop,
            self._detector,
            self._selector(dataset),
            self.build_panel(names, palette),
            self.options,
            tuple(map(str, names)),
            partial(self.build_maker, class_names=names, logger=runner.logger),
        )
        # What does not fit the detector fails here.
        maker = state.maker if state.has_layers else None
        if maker is None:
            resolve_layers(self._detector, self.options.target_layers)
        for leaf in leaf_datasets(dataset):
            _check_packed_keys(leaf, self.options.alignment)
            images = [i for i in state.selector.images if i.dataset is leaf]
            if images:
                with preserve_rng_state():
                    self._place(runner, state, images, maker)
        if self.run_options.override_loop_pipeline:
            state.run_resized()
            runner.logger.warning(
                f"{self.name}: override_loop_pipeline=True: the {mode} loop runs on "
                "the Resize-only pipeline, and its metrics are of that pipeline."
            )
        return state

    def _selector(self, dataset: Any) -> ImageSelector:
        """The images of a loop that are drawn."""
        run = self.run_options
        return ImageSelector(dataset, run.num_images, run.image_indices)

    def _place(
        self,
        runner: Runner,
        state: VisLoop,
        images: Sequence[SelectedImage],
        maker: SampleMaker | None,
    ) -> None:
        """Find out on its first images how a data set is drawn, and try it."""
        leaf = images[0].dataset
        pipeline = ImagePipeline(leaf.pipeline, channels=self.options.image_channels)
        state.placements[id(leaf)] = Placement("network", pipeline, proven=False)
        loads = [partial(image.through, pipeline.load) for image in images]
        _, model = predicting_model(self._detector)
        first = None
        look = f"look at the first {state.mode} image"
        with self._policy.guard(look, refusals=VisConfigError):
            placement = choose_alignment(
                self.options.alignment,
                pipeline,
                first_loaded(loads),
                model,
                state.loop.dataloader.dataset,
            )
            if placement.reason:
                runner.logger.warning(
                    f"{self.name}: the {state.mode} data set {type(leaf).__name__} is "
                    "drawn on the network's own input, as alignment='network' does: "
                    f"{placement.reason}"
                )
            state.placements[id(leaf)] = placement
            first = next(first_loaded(loads))
        if first is not None and maker is not None:
            attempt = "try a picture before the run"
            with self._policy.guard(attempt, refusals=VisError):
                sample = maker.prepare(PlacedImage("trial", first, placement))
                if sample is not None:
                    state.panel(sample)

    # One validation or test run. MMEngine calls these also in a training.

    def before_train(self, runner: Runner) -> None:
        """Note that validations are the training's from now on."""
        self._training = True
        if self.run_options.draw and "val" not in self._loops:
            runner.logger.warning(
                f"{self.name}: nothing is drawn in this training, since it has no "
                "validation; set val_dataloader, val_evaluator and val_cfg"
            )

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        state = self._loops.get(mode)
        if state is None:
            return
        self._measured.clear()
        # The log repeats scalars of an earlier run that are still there.
        scalars = runner.message_hub.log_scalars
        for name in [n for n in scalars if n.startswith(f"{mode}/{self.name}/")]:
            del scalars[name]
        # Not runner.epoch: it would build the training loop in a pure validation.
        loop = runner._train_loop
        number, step = None, 0
        if mode == "val" and isinstance(loop, BaseLoop):
            number, step = _validation(loop)
        state.start_run(
            self.run_options.interval, number if self._training else None, step
        )

    def _before_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        mode: str = "train",
    ) -> None:
        state = self._followed(mode)
        if state is not None and not self._policy.ends_run:
            with self._policy.guard(f"find the images of a {mode} batch"):
                state.begin_batch(batch_idx, data_batch)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = "train",
    ) -> None:
        # In the iteration, because EMAHook puts the training weights back before
        # after_val_epoch.
        state = self._drawn(mode)
        if state is None or not outputs or self._policy.ends_run:
            return
        wanted: list[tuple[int, SelectedImage]] = []
        with self._policy.guard(f"find the images of a {mode} batch"):
            wanted = state.wanted(outputs)
        for position, image in wanted:
            make = partial(state.make_sample, image, position, outputs[position])
            self._draw(state, image, make, position)
        state.record = None

    def _draw(
        self,
        state: VisLoop,
        image: SelectedImage,
        make: Callable[[], Any],
        position: int = 0,
    ) -> None:
        """Draw the sample of an image, at a position of the batch, and publish it."""
        picture_id, boxed = state.picture_id(image), None
        state.seen.update((image.image_id, picture_id))
        with self._policy.guard(f"draw {picture_id}"), preserve_rng_state():
            sample = make()
            with self._policy.guard(f"measure {picture_id}"):
                self._measure(state, sample, image)
            if self._publisher.wants_boxes:
                with self._policy.guard(f"find the boxes of {picture_id}"):
                    boxed = boxed_image(state, sample, image, position)
            picture = VisImage(sample.image_id, state.panel(sample), boxed)
            if is_main_process():
                self._publisher.publish(state.mode, picture, state.step)
            else:
                self._writer.submit(self._store, picture)

    def _store(self, picture: VisImage) -> None:
        with self._policy.guard(f"keep {picture.image_id} for rank 0"):
            self._spool.add(picture)

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        state = self._drawn(mode)
        if state is None:
            return
        self._writer.wait()
        # Between the first and the last collective no rank may fail alone.
        met = set().union(*all_gather_object(state.seen))
        with self._policy.guard("gather the pictures of all ranks"):
            self._spool.gather()
        if is_main_process():
            self._publish_gathered(state)
            self._publisher.finish(commit=self._ends_row(runner, mode))
        state.drawing = False
        self._policy.share()
        missing = [i.image_id for i in state.selector.images if i.image_id not in met]
        if missing:
            runner.logger.warning(
                f"{self.name}: {len(missing)} selected image(s) never came through the "
                f"{mode} loop: {', '.join(missing[:5])}"
            )

    @property
    def _logs(self) -> bool:
        """Whether the hook logs scalars beside the metrics."""
        return False

    def _measure(self, state: VisLoop, sample: Any, image: SelectedImage) -> None:
        """Take what is logged of a sample beside its picture."""

    def _log_scalars(
        self, runner: Runner, mode: str, pass_name: str, scalars: Mapping[str, float]
    ) -> None:
        """Log with the metrics of a loop, at their step, as MMEngine's hook does."""
        start = "/".join(filter(None, (mode, self.name, pass_name)))
        for name, value in scalars.items():
            runner.message_hub.update_scalar(f"{start}/{name}", np.float64(value))

    def after_run(self, runner: Runner) -> None:
        """Say what was drawn and what failed."""
        if not self._loops:
            return
        count, self._publisher.num_published = self._publisher.num_published, 0
        if count:
            done = "shown" if self.run_options.show else "published"
            runner.logger.info(f"{self.name}: {count} picture(s) {done}")
        self._policy.report()

    def _publish_gathered(self, state: VisLoop) -> None:
        with self._policy.guard("read the pictures of the other ranks"):
            for picture in self._spool.images():
                # Samplers repeat images so that all ranks have equally many.
                if picture.image_id not in state.seen:
                    state.seen.add(picture.image_id)
                    self._publisher.publish(state.mode, picture, state.step)
        self._spool.clear()

    def _ends_row(self, runner: Runner, mode: str) -> bool:
        """Whether nobody after this hook ends the run's row of history."""
        later = runner.hooks[runner.hooks.index(self) + 1 :]
        # In a test, MMEngine's LoggerHook writes no scalars.
        return not any(
            (isinstance(hook, BaseVisHook) and hook._drawn(mode))
            or (isinstance(hook, LoggerHook) and mode == "val")
            for hook in later
        )

    def _followed(self, mode: str) -> VisLoop | None:
        """The loop of whose batches the hook is told."""
        return self._drawn(mode)

    def _drawn(self, mode: str) -> VisLoop | None:
        """The loop of a mode, if its current run is drawn."""
        state = self._loops.get(mode)
        return state if state is not None and state.drawing else None


def dataset_of(loop: BaseLoop) -> Any:
    """The data set of a loop.

    Raises:
        VisConfigError: If it has none, or several.
    """
    dataset = getattr(getattr(loop, "dataloader", None), "dataset", None)
    if dataset is None:
        raise VisConfigError(
            f"{type(loop).__name__} has no data set in 'dataloader', so nobody knows "
            "which images it will bring; set draw=False, or take a loop of one data "
            "loader"
        )
    return dataset


def of_all_ranks(own: dict[str, dict]) -> dict[str, dict]:
    """Samplers repeat images so that all ranks have equally many; each counts once."""
    everything: dict[str, dict] = {}
    for of_rank in all_gather_object(own):
        for name, found in of_rank.items():
            everything.setdefault(name, {}).update(found)
    return everything


def _validation(loop: BaseLoop) -> tuple[int, int]:
    """Number of the training's current validation, from 0, and its epoch or iteration.

    Counted by the loop, so that a resumed training goes on as it would have.
    """
    now = loop.iter if isinstance(loop, IterBasedTrainLoop) else loop.epoch
    begin = max(getattr(loop, "val_begin", 1), 1)
    # MMEngine asks for the interval of the epoch that comes next.
    starts = [start - 1 for start in getattr(loop, "dynamic_milestones", [1])]
    intervals = getattr(loop, "dynamic_intervals", [getattr(loop, "val_interval", 1)])
    number = 0
    for start, end, interval in zip(starts, [*starts[1:], now], intervals):
        first, last = max(start, begin), min(end, now)
        number += max((last - 1) // interval - (first - 1) // interval, 0)
    return number, now


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
