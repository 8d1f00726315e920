"""``ErrorVisHook``: what a detector misses and invents while it is trained."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from logging import Logger
from typing import Any, NamedTuple, cast

from mmengine.dist import all_gather_object, get_rank
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..data.alignment import Placement, first_loaded, own_placement
from ..data.detections import detections_of
from ..data.pipeline import ImagePipeline
from ..data.selector import ImageSelector, SelectedImage
from ..declare import takes_options
from ..diagnosis.cost import ErrorCost, ap_lost
from ..diagnosis.diagnose import Diagnoser
from ..diagnosis.energy import EnergyWatch, Shares, mean_by_class, shares_inside
from ..diagnosis.matching import GroundTruth, Matches, match
from ..diagnosis.mechanisms import MissedObject, why_missed
from ..diagnosis.result import Diagnosis
from ..errors import VisConfigError
from ..network.graph import instances_of
from ..network.state import preserve_rng_state
from ..options import DiagnosisOptions, ErrorRunOptions
from ..records import Detections
from ..samples import SampleMaker
from .base import BaseVisHook, dataset_of, of_all_ranks
from .vis_loop import Panel, VisLoop, predicting_model


class _Counted(NamedTuple):
    """What is kept of every image."""

    matches: Matches
    found: Detections
    truth: GroundTruth
    missed: Sequence[MissedObject] = ()


@HOOKS.register_module()
@takes_options(DiagnosisOptions, ErrorRunOptions)
class ErrorVisHook(BaseVisHook):
    """Count the errors of every validation, and draw why some of them are.

    The final detections of the loop are matched with the objects of the data set. All
    images are counted: ``errors/missed``, ``errors/false/confused`` and so on, and
    ``errors/dap/...``, the AP that mending a kind would gain, are logged beside the
    metrics, in every validation, whatever ``interval`` says. ``num_images`` images are
    drawn, with the reason of each miss and the evidence of each error; those of
    ``select='worst'`` in the last iteration, by a forward of their own. Of what they
    show, ``errors/energy_inside/CLASS`` is the share of the evidence for found objects
    that lies inside of them; a warning says when it falls while AP does not. Add it to
    a config:

    .. code-block:: python

        custom_imports = dict(
            imports=['mmyolo_vis_hooks'], allow_failed_imports=False)
        custom_hooks = [dict(type='ErrorVisHook')]

    Matching is all that an image costs that is not drawn, but with
    ``mechanisms='all'``. The run itself is not
    changed: metrics, weights, buffers, gradients and random states are what they are
    without the hook.

    Args:
        {options}

    Raises:
        VisConfigError: While the Runner is built, if an option has a value that
            cannot work; at the start of the run, if the data set has no objects.
    """

    default_name = "errors"
    options_kind = DiagnosisOptions
    run_kind = ErrorRunOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.run_options.override_loop_pipeline:
            raise VisConfigError(
                "override_loop_pipeline=True cannot work with ErrorVisHook, which "
                "looks at what the loop itself finds; leave it False"
            )
        if self._worst and self.run_options.image_indices is not None:
            raise VisConfigError(
                "select='worst' and image_indices cannot both say which images are "
                "drawn; leave one of them"
            )
        self._everything: dict[str, ImageSelector] = {}
        # As what is counted of every image, of the evidence of those that are drawn.
        self._shares: dict[str, Shares] = {}
        self._watches: dict[str, EnergyWatch] = {}

    @property
    def _worst(self) -> bool:
        return self.run_options.select == "worst"

    @property
    def _logs(self) -> bool:
        return True

    @property
    def _mechanisms(self) -> bool:
        return self.run_options.mechanisms == "all"

    def build_maker(
        self, model: nn.Module, options: Any, class_names: Sequence[str], logger: Logger
    ) -> SampleMaker:
        """Give what turns a forward of the loop into a diagnosis."""
        return Diagnoser(model, options, class_names, logger)

    def build_panel(self, class_names: Sequence[str], palette: Any) -> Panel:
        """Give what draws a diagnosis; its colours mean found, missed and false."""
        return Diagnosis.draw

    def _measure(self, state: VisLoop, sample: Diagnosis, image: SelectedImage) -> None:
        self._shares.setdefault(state.pass_name, {}).update(shares_inside(sample))

    def _selector(self, dataset: Any) -> ImageSelector:
        return super()._selector(dataset) if not self._worst else _all_of(dataset)

    def _set_up(self, runner: Runner) -> None:
        super()._set_up(runner)
        self._watches.clear()

    def _prepare_loop(self, runner: Runner, mode: str, loop: BaseLoop) -> VisLoop:
        dataset = dataset_of(loop)
        self._everything[mode] = _all_of(dataset)
        state = super()._prepare_loop(runner, mode, loop)
        state.record_all = self._mechanisms
        if self._worst:  # none is known before the last iteration
            if not all(all_gather_object(_num_batches(loop))):
                raise VisConfigError(
                    "select='worst' cannot work with this data loader: it does not "
                    "know how many batches it has, or has none for one of the ranks; "
                    "leave select='fixed'"
                )
            state.selector = ImageSelector(dataset, 0, [])
        return state

    def _place(
        self,
        runner: Runner,
        state: VisLoop,
        images: Sequence[SelectedImage],
        maker: SampleMaker | None,
    ) -> None:
        """Draw on the loaded image; boxes are where the evaluation has them."""
        leaf = images[0].dataset
        if "instances" not in images[0].info:
            raise VisConfigError(
                f"the {state.mode} data set {type(leaf).__name__} has no annotated "
                "objects; take ErrorVisHook out of a test run without annotations"
            )
        pipeline = ImagePipeline(leaf.pipeline, channels=self.options.image_channels)
        placement = Placement("letterbox", pipeline, proven=False, reason="not tried")
        loads = [partial(image.through, pipeline.load) for image in images]
        _, model = predicting_model(self._detector)
        with self._policy.guard(f"look at the first {state.mode} image"):
            placement = own_placement(pipeline, first_loaded(loads), model)
            if not placement.proven:
                runner.logger.warning(
                    f"{self.name}: errors of the {state.mode} data set "
                    f"{type(leaf).__name__} get no maps: {placement.reason}"
                )
        state.placements[id(leaf)] = placement

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        self._shares.clear()
        super()._before_epoch(runner, mode)

    def _followed(self, mode: str) -> VisLoop | None:
        # Also a run that is not drawn: all its images are counted.
        return self._loops.get(mode)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = "train",
    ) -> None:
        state = self._loops.get(mode)
        if state is not None:
            for position, output in enumerate(outputs or ()):
                with self._policy.guard(f"count the errors of a {mode} image"):
                    self._keep(state, position, output)
        super()._after_iter(runner, batch_idx, data_batch, outputs, mode)
        if state is not None:
            state.record = None
            if self._worst and batch_idx == _num_batches(state.loop) - 1:
                self._draw_worst(state)

    def _keep(self, state: VisLoop, position: int, output: Any) -> None:
        image = self._everything[state.mode].find(output.metainfo)
        if image is None:
            return
        truth = GroundTruth.of(image.info["instances"])
        found = detections_of(instances_of(output, self._detector))
        found = found.take(found.scores > self.options.score_thr)
        matches = match(found, truth, iou_thr=self.options.iou_thr)
        counted = _Counted(matches, found, truth)
        of_pass = self._measured.setdefault(state.pass_name, {})
        of_pass[image.image_id] = counted
        if self._mechanisms and matches.missed:
            with self._policy.guard(
                f"find out why objects of {image.image_id} are missed"
            ):
                missed = self._why_missed(state, position, output, counted)
                of_pass[image.image_id] = counted._replace(missed=missed)

    def _why_missed(
        self,
        state: VisLoop,
        position: int,
        output: Any,
        counted: _Counted,
    ) -> Sequence[MissedObject]:
        inputs, metainfo = state.recorded.given(position)
        final = detections_of(output)
        with state.autocast(), preserve_rng_state():
            candidates = _maker(state).candidates(final, inputs, metainfo)
        return why_missed(
            counted.matches,
            counted.found,
            candidates,
            counted.truth,
            score_thr=self.options.score_thr,
            iou_thr=self.options.iou_thr,
        )

    def _draw_worst(self, state: VisLoop) -> None:
        """Draw the images that lose most, each on the first rank that met it."""
        own = self._measured.get(state.pass_name, {})
        by_rank = all_gather_object(own)
        if not state.drawing or self._policy.ends_run:
            return
        with self._policy.guard("choose the worst images"):
            images = {name: one for found in by_rank for name, one in found.items()}
            losses = ap_lost(list(images.values()))
            worst = sorted(zip(images, losses), key=lambda pair: (-pair[1], pair[0]))
            number = self.run_options.num_images
            limit = None if number < 0 else number
            chosen = [name for name, loss in worst if loss][:limit]
            elsewhere = {name for found in by_rank[: get_rank()] for name in found}
            here = own.keys() & set(chosen) - elsewhere
            for image in self._everything[state.mode].images:
                if image.image_id in here:
                    look = partial(self._look, state, image, own[image.image_id])
                    self._draw(state, image, look)

    def _look(self, state: VisLoop, image: SelectedImage, known: _Counted) -> Diagnosis:
        placed, maker = state.placed(image), _maker(state)
        with state.autocast():
            return maker.diagnose(maker.look(placed, known.truth, known.found))

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode in self._loops:
            everything = of_all_ranks(self._measured)
            shares = of_all_ranks(self._shares)
            with self._policy.guard("add the errors up"):
                for name, found in (everything or {"": {}}).items():
                    self._warn_of_gaps(runner, mode, found)
                    self._log(runner, mode, name, found, shares.get(name, {}))
            state = self._drawn(mode)
            if state is None:
                self._policy.share()
            elif self._worst and state.batch < _num_batches(state.loop) - 1:
                runner.logger.warning(
                    f"{self.name}: the {mode} loop ended before its last batch, in "
                    "which select='worst' draws, so no picture is drawn; leave "
                    "select='fixed'"
                )
        super()._after_epoch(runner, mode)

    def _warn_of_gaps(self, runner: Runner, mode: str, counted: Container) -> None:
        names = [image.image_id for image in self._everything[mode].images]
        lost = [name for name in names if name not in counted]
        if lost:
            runner.logger.warning(
                f"{self.name}: {len(lost)} of the {len(names)} images of the {mode} "
                f"loop are not counted: {', '.join(lost[:5])}"
            )

    def _log(
        self,
        runner: Runner,
        mode: str,
        name: str,
        images: dict[str, _Counted],
        shares: Shares,
    ) -> None:
        cost = ErrorCost(mechanisms=self._mechanisms)
        for own in images.values():
            cost.update(*own)
        summary = cost.compute()
        scalars: dict[str, float] = dict(summary["counts"])
        for group in ("missed", "false", "dap"):
            for kind, value in summary[group].items():
                scalars[f"{group}/{kind.replace(' ', '_')}"] = value
        for class_name, share in mean_by_class(shares).items():
            scalars[f"energy_inside/{class_name.replace(' ', '_')}"] = share
        watch = self._watches.setdefault(f"{mode}/{name}", EnergyWatch())
        for alarm in watch.update(shares, summary["ap"]["ap"]):
            runner.logger.warning(f"{self.name}: {alarm}")
        self._log_scalars(runner, mode, name, scalars)


def _num_batches(loop: BaseLoop) -> int:
    """How many batches a loop has on this rank; 0 where nobody knows."""
    try:
        return len(loop.dataloader)
    except TypeError:
        return 0


def _maker(state: VisLoop) -> Diagnoser:
    return cast(Diagnoser, state.maker)


def _all_of(dataset: Any) -> ImageSelector:
    return ImageSelector(dataset, -1, None)
