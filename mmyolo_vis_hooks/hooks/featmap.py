"""``FeatMapVisHook``: the feature maps of chosen layers, laid on the image."""

from __future__ import annotations

from mmengine.registry import HOOKS

from ..declare import takes_options
from ..options import FeatMapOptions, RunOptions
from ..render.featmap_panel import FeatMapPanel
from .base import BaseVisHook


@HOOKS.register_module()
@takes_options(FeatMapOptions, RunOptions)
class FeatMapVisHook(BaseVisHook):
    """Draw feature maps of the same images in every validation and test run.

    For each image one panel is published: the image with its detections, and
    the maps of every layer with name, shape and value range. Add it to a config:

    .. code-block:: python

        custom_imports = dict(
            imports=['mmyolo_vis_hooks'], allow_failed_imports=False)
        custom_hooks = [dict(type='FeatMapVisHook', target_layers=['neck'])]

    The run itself is not changed: metrics, weights, buffers, gradients and
    random states are what they are without the hook.

    Args:
        {options}

    Raises:
        VisConfigError: While the Runner is built, if an option has a value that
            cannot work; at the start of the run, if it does not fit the model,
            the dataset or the pipeline.
    """

    default_name = "featmap"
    options_kind = FeatMapOptions
    panel_kind = FeatMapPanel
