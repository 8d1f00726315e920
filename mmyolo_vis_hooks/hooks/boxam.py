"""``BoxAMVisHook``: what made each detection, laid on the image."""

from __future__ import annotations

from mmengine.registry import HOOKS

from ..declare import takes_options
from ..options import BoxAMOptions, RunOptions
from ..render.boxam_panel import BoxAMPanel
from .base import BaseVisHook


@HOOKS.register_module()
@takes_options(BoxAMOptions, RunOptions)
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
    evaluated, in eval mode and with a graph that begins at the explained layers. The
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
