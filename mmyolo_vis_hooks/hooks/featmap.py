"""``FeatMapVisHook``: the feature maps of chosen layers, laid on the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmengine.registry import HOOKS

from ..render.featmap_panel import FeatMapPanel
from .base import BaseVisHook, Explainer, refuse_unknown_options


@HOOKS.register_module()
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
        target_layers (Sequence[str] | str): Module paths such as
            ``'backbone'``, ``'backbone.stage4'`` or ``'neck.out_layers[2]'``. A
            layer that gives several maps, or is called several times, gives each
            of them. Defaults to ``('backbone', 'neck')``.
        channel_reduction (str, optional): How a map's channels become one:
            ``'squeeze_mean'`` averages them, ``'select_max'`` takes the channel
            with the largest sum, None shows the ``topk`` channels with the
            largest sums. Defaults to ``'squeeze_mean'``.
        topk (int): Number of channels shown if ``channel_reduction`` is None.
            -1 draws a map of 1 or 3 channels as an image. Defaults to 4.
        arrangement (Sequence[int]): Rows and columns of the grid in which the
            ``topk`` channels of a layer are laid out. Defaults to (2, 2).
        alpha (float): Share of the heat map in the overlay, in [0, 1].
            Defaults to 0.5.
        colormap (str): Name of an OpenCV or matplotlib colour map.
            Defaults to ``'jet'``.
        score_thr (float): Detections with a higher score are drawn on the image;
            1 draws none. Defaults to 0.3.
        draw (bool): False switches the hook off. Defaults to True.
        interval (int): Every how many validation (or test) runs pictures are
            made, starting with the first. Defaults to 1.
        num_images (int): Number of images, spread evenly over the dataset; -1
            takes all. Defaults to 4.
        image_indices (Sequence[int], optional): Indices of the images in the
            dataset, instead of ``num_images``. Defaults to None.
        alignment (str): ``'resize'`` runs the detector once more per image, on
            the image stretched so that it needs no padding; ``'letterbox'``
            records the loop's own forward and maps it back to the image;
            ``'network'`` draws on the network's own padded input.
            Defaults to ``'resize'``.
        override_loop_pipeline (bool): Let the loop itself run on the
            Resize-only pipeline; its metrics are then of that pipeline.
            Defaults to False.
        name (str, optional): Part of the pictures' tags. A second hook of the
            same name gets a number. Defaults to ``'featmap'``.
        show (bool): Show the pictures in a window instead of publishing them.
            Defaults to False.
        wait_time (float): Seconds each window stays; 0 waits for a key.
            Defaults to 0.
        backend_args (dict, optional): File backend that images are read with.
            Defaults to None.
        on_error (str): ``'log'`` reports a failure while drawing and lets the run
            go on; ``'raise'`` ends the run. Defaults to ``'log'``.

    Raises:
        VisConfigError: While the Runner is built, if an option has a value that
            cannot work; at the start of the run, if it does not fit the model,
            the dataset or the pipeline.
    """

    default_name = "featmap"

    def __init__(
        self,
        *,
        target_layers: Sequence[str] | str = ("backbone", "neck"),
        channel_reduction: str | None = "squeeze_mean",
        topk: int = 4,
        arrangement: Sequence[int] = (2, 2),
        alpha: float = 0.5,
        colormap: str = "jet",
        score_thr: float = 0.3,
        draw: bool = True,
        interval: int = 1,
        num_images: int = 4,
        image_indices: Sequence[int] | None = None,
        alignment: str = "resize",
        override_loop_pipeline: bool = False,
        name: str | None = None,
        show: bool = False,
        wait_time: float = 0.0,
        backend_args: dict | None = None,
        on_error: str = "log",
        **unknown: Any,
    ) -> None:
        refuse_unknown_options(self, unknown)
        super().__init__(
            target_layers=target_layers,
            draw=draw,
            interval=interval,
            num_images=num_images,
            image_indices=image_indices,
            alignment=alignment,
            override_loop_pipeline=override_loop_pipeline,
            name=name,
            show=show,
            wait_time=wait_time,
            backend_args=backend_args,
            on_error=on_error,
        )
        self._make_explainer = partial(
            FeatMapPanel,
            channel_reduction=channel_reduction,
            topk=topk,
            arrangement=arrangement,
            alpha=alpha,
            colormap=colormap,
            score_thr=score_thr,
        )
        # Wrong values fail now and not in the first validation.
        self._make_explainer()

    def build_explainer(
        self, class_names: Sequence[str], palette: Sequence[Any] | None
    ) -> Explainer:
        """Give the explainer with the options of this hook."""
        return self._make_explainer(class_names=class_names, palette=palette)
