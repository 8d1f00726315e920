"""``BoxAMVisHook``: what made each detection, laid on the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..data.selector import SelectedImage
from ..declare import takes_options
from ..geometry import FrameTransform
from ..metrics.metric import METRICS, mean_values
from ..network.state import frozen
from ..options import BoxAMOptions, BoxRunOptions
from ..records import BoxSample
from ..render.boxam_panel import BoxAMPanel
from ..subjects import subjects_with_objects
from .base import BaseVisHook, of_all_ranks
from .vis_loop import VisLoop, predicting_model


@HOOKS.register_module()
@takes_options(BoxAMOptions, BoxRunOptions)
class BoxAMVisHook(BaseVisHook):
    """Draw what made the detections of the same images in every run.

    For each image one picture is published: the image with its detections, the map
    of all explained boxes, and a panel per box with its class, score, target, layer
    and the range of its map. Add it to a config:

    .. code-block:: python

        custom_imports = dict(
            imports=['mmyolo_vis_hooks'], allow_failed_imports=False)
        custom_hooks = [dict(type='BoxAMVisHook')]

    The hook makes a forward of its own per image, of the very weights that are
    evaluated, in eval mode and with a graph that begins at the explained layers.
    ``metrics`` logs what the maps are worth as ``boxam/energy_box`` and so on, beside
    the metrics of the run: whether attention sharpens, or a shortcut is learnt. The
    run itself is not changed: metrics, weights, buffers, gradients and random states
    are what they are without the hook.

    Args:
        {options}

    Raises:
        VisConfigError: While the Runner is built, if an option has a value that
            cannot work; at the start of the run, if it does not fit the model, the
            dataset or the pipeline.
    """

    default_name = "boxam"
    options_kind = BoxAMOptions
    panel_kind = BoxAMPanel
    run_kind = BoxRunOptions

    @property
    def _logs(self) -> bool:
        return bool(self.run_options.metrics)

    def _measure(self, state: VisLoop, sample: BoxSample, image: SelectedImage) -> None:
        look, metrics = sample.look, self.run_options.metrics
        if not metrics or look is None:
            return
        _, model = predicting_model(self._detector)
        instances = image.info.get("instances") or ()
        chosen = [explanation.index for explanation in sample.explanations]
        height, width = look.inputs.shape[-2:]
        whole = FrameTransform.identity((height, width))
        box_map = BoxAMPanel(self.options).box_map
        found: list[dict[str, float]] = []
        with (
            frozen(model),
            torch.autocast(look.inputs.device.type, enabled=False),
        ):
            subjects = subjects_with_objects(
                model,
                look,
                chosen,
                instances,
                batch_size=self.options.batch_size or 8,
            )
            for explanation, subject in zip(sample.explanations, subjects):
                saliency = box_map(explanation, whole, subject.box_xyxy)
                values: dict[str, Any] = {}
                for name in metrics:
                    values |= METRICS[name].function(saliency, subject)
                found.append({k: float(v) for k, v in values.items() if not np.ndim(v)})
        self._measured.setdefault(state.pass_name, {})[image.image_id] = found

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        if self._logs and self._drawn(mode) is not None:
            for name, found in of_all_ranks(self._measured).items():
                means = mean_values(own for boxes in found.values() for own in boxes)
                self._log_scalars(runner, mode, name, means)
        super()._after_epoch(runner, mode)
