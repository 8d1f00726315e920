"""``ErrorVisHook``: what a detector misses and invents while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from logging import Logger
from typing import Any

import numpy as np
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..data.alignment import Placement, first_loaded, own_placement
from ..data.pipeline import ImagePipeline, prepare_data
from ..data.samples import detections_of
from ..data.selector import ImageSelector, SelectedImage
from ..declare import takes_options
from ..diagnosis.cost import ErrorCost
from ..diagnosis.diagnose import Diagnosis
from ..diagnosis.energy import EnergyWatch, Shares, mean_by_class, shares_inside
from ..diagnosis.maps import above
from ..diagnosis.matching import GroundTruth, match
from ..diagnosis.sample import DiagnosisMaker
from ..errors import VisConfigError
from ..options import DiagnosisOptions, RunOptions
from ..records import Detections
from ..samples import SampleMaker
from .base import BaseVisHook, of_all_ranks
from .vis_loop import Panel, VisLoop, predicting_model

_Counted = tuple[Detections, GroundTruth]


def draw_errors(
    options: DiagnosisOptions, class_names: Sequence[str], palette: Any
) -> Any:
    """What draws a diagnosis; its colours mean found, missed and false."""
    return Diagnosis.draw


@HOOKS.register_module()
@takes_options(DiagnosisOptions, RunOptions)
class ErrorVisHook(BaseVisHook):
    """Count the errors of every validation, and draw why some of them are.

    The final detections of the loop are matched with the objects of the data set. All
    images are counted: ``errors/missed``, ``errors/false/confused`` and so on, and
    ``errors/dap/...``, the AP that mending a kind would gain, are logged beside the
    metrics, in every validation, whatever ``interval`` says. ``num_images`` images are
    drawn, with the reason of each miss and the evidence of each error. Of what they
    show, ``errors/energy_inside/CLASS`` is the share of the evidence for found objects
    that lies inside of them; a warning says when it falls while AP does not. Add it to
    a config:

    .. code-block:: python

        custom_imports = dict(
            imports=['mmyolo_vis_hooks'], allow_failed_imports=False)
        custom_hooks = [dict(type='ErrorVisHook')]

    Matching is all that an image costs that is not drawn. The run itself is not
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
    panel_kind = staticmethod(draw_errors)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.run_options.override_loop_pipeline:
            raise VisConfigError(
                "override_loop_pipeline=True cannot work with ErrorVisHook, which "
                "looks at what the loop itself finds; leave it False"
            )
        self._everything: dict[str, ImageSelector] = {}
        # Of the current run, by the name of the pass and of the image.
        self._found: dict[str, dict[str, _Counted]] = {}
        # The same of the evidence of the images that are drawn.
        self._shares: dict[str, Shares] = {}
        self._pass = ""
        self._watches: dict[str, EnergyWatch] = {}

    def build_maker(
        self, model: nn.Module, options: Any, class_names: Sequence[str], logger: Logger
    ) -> SampleMaker:
        """Give what turns a forward of the loop into a diagnosis."""
        return DiagnosisMaker(model, options, class_names, logger)

    def build_panel(
        self, class_names: Sequence[str], palette: Sequence[Any] | None
    ) -> Panel:
        """Give what draws a diagnosis, and keeps how much of it is about objects."""
        draw = super().build_panel(class_names, palette)

        def drawn(diagnosis: Diagnosis) -> np.ndarray:
            shares = shares_inside(diagnosis)
            self._shares.setdefault(self._pass, {}).update(shares)
            return draw(diagnosis)

        return drawn

    def _prepare_loop(self, runner: Runner, mode: str, loop: BaseLoop) -> VisLoop:
        dataset = loop.dataloader.dataset
        self._everything[mode] = ImageSelector(dataset, -1, None)
        return super()._prepare_loop(runner, mode, loop)

    def _place(
        self,
        runner: Runner,
        state: VisLoop,
        images: Sequence[SelectedImage],
        maker: SampleMaker | None,
    ) -> None:
        """Draw on the loaded image; boxes are where the evaluation has them."""
        leaf = images[0].dataset
        if "instances" not in leaf.get_data_info(images[0].index):
            raise VisConfigError(
                f"the {state.mode} data set {type(leaf).__name__} has no annotated "
                "objects; take ErrorVisHook out of a test run without annotations"
            )
        pipeline = ImagePipeline(leaf.pipeline, channels=self.options.image_channels)
        placement = Placement("letterbox", pipeline, proven=False, reason="not tried")
        loads = [partial(prepare_data, leaf, i.index, pipeline.load) for i in images]
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
        if mode in self._loops:
            self._found.clear()
            self._shares.clear()
            self._forget_scalars(runner, mode)
        super()._before_epoch(runner, mode)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = "train",
    ) -> None:
        if mode in self._loops:
            self._pass = self._loops[mode].pass_name
            for output in outputs or ():
                with self._policy.guard(f"count the errors of a {mode} image"):
                    self._keep(self._loops[mode], output)
        super()._after_iter(runner, batch_idx, data_batch, outputs, mode)

    def _keep(self, state: VisLoop, output: Any) -> None:
        image = self._everything[state.mode].find(output.metainfo)
        if image is not None:
            truth = image.dataset.get_data_info(image.index)["instances"]
            found, _ = above(detections_of(output), self.options.score_thr)
            of_pass = self._found.setdefault(state.pass_name, {})
            of_pass[image.image_id] = found, GroundTruth.of(truth)

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode in self._loops:
            everything = of_all_ranks(self._found)
            shares = of_all_ranks(self._shares)
            with self._policy.guard("add the errors up"):
                for name, found in everything.items():
                    self._log(runner, mode, name, found, shares.get(name, {}))
            if self._drawn(mode) is None:
                self._policy.share()
        super()._after_epoch(runner, mode)

    def _log(
        self,
        runner: Runner,
        mode: str,
        name: str,
        images: dict[str, _Counted],
        shares: Shares,
    ) -> None:
        cost = ErrorCost()
        for found, truth in images.values():
            cost.update(match(found, truth, iou_thr=self.options.iou_thr), found, truth)
        summary = cost.compute()
        scalars: dict[str, float] = dict(summary["counts"])
        for group in ("false", "dap"):
            for kind, value in summary[group].items():
                scalars[f"{group}/{kind.replace(' ', '_')}"] = value
        for class_name, share in mean_by_class(shares).items():
            scalars[f"energy_inside/{class_name.replace(' ', '_')}"] = share
        watch = self._watches.setdefault(f"{mode}/{name}", EnergyWatch())
        for alarm in watch.update(shares, summary["ap"]["ap"]):
            runner.logger.warning(f"{self.name}: {alarm}")
        self._log_scalars(runner, mode, name, scalars)
