"""``BoxAMVisHook``: what made each detection, laid on the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mmengine.dist import is_main_process
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..attribution.attribute import BoxMapOptions, BoxMapper
from ..attribution.methods import caption_of, method_of
from ..box_samples import BoxSampleMaker
from ..data.samples import labels_of
from ..errors import VisError
from ..network.layer_path import resolve_layers
from ..render.boxam_panel import BoxAMPanel
from ..samples import SampleMaker
from .base import (
    BaseVisHook,
    Explainer,
    check_option,
    refuse_unknown_options,
)


@HOOKS.register_module()
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
        method (str): How a map is made; ``docs/boxam.md`` lists all of them with
            formulas and limits. Defaults to ``'boxam'``: LayerCAM at the level that
            made the box, smoothed at the scale of the box.
        target (str): What is explained of a detection: its final ``'score'``, the
            raw class ``'logit'`` or the raw ``'objectness'`` (or centerness) at the
            anchor that made it, or a side ``'x1'``, ``'y1'``, ``'x2'``, ``'y2'`` of
            its box. Defaults to ``'score'``.
        target_layers (Sequence[str] | str, optional): Module paths, as for
            ``FeatMapVisHook``. None takes for each box the map on which the head
            decided it. Defaults to None.
        scope (str): ``'box'`` draws a panel per box, ``'class'`` one per class,
            ``'image'`` only the map of all boxes. Defaults to ``'box'``.
        fusion (str): How maps of several layers become one: ``'max'``, ``'mean'``,
            ``'sum'`` or ``'product'``. Defaults to ``'max'``.
        normalize_layers (bool): Divide each layer's map by its maximum before they
            are fused. Defaults to True.
        smooth (float, optional): Sigma of a Gaussian over the map, in units of the
            square root of the box's area. None takes 0.1 for ``'boxam'`` and 0 for
            the other methods. Defaults to None.
        norm_in_bbox (bool): Show and normalise a map within its box only.
            Defaults to False.
        eigen_smooth (bool): Take the first principal component of the weighted
            activations instead of their sum. Defaults to False.
        aug_smooth (bool): Mean over six inputs: mirrored or not, and three
            brightnesses. Defaults to False.
        topk (int): Explain at most so many detections of an image, the highest
            scores first; -1 all. Defaults to 10.
        score_thr (float): Explain and draw detections with a higher score.
            Defaults to 0.3.
        classes (Sequence[str | int], optional): Explain detections of these classes
            only, by name or index. Defaults to None.
        max_shape (int | Sequence[int]): Reduce activations to at most this height
            and width before they are weighted; -1 does not. Defaults to -1.
        batch_size (int, optional): How many changed activations or images the methods
            that perturb run at once; None takes what suits the network.
            Defaults to None.
        ratio_channels_to_ablate (float): Share of the channels that ``ablationcam``
            tries, in (0, 1]. Defaults to 1.0.
        num_masks (int): Number of masks of ``drise``. Defaults to 1000.
        alpha (float): Share of the heat map in the overlay where the map is strong,
            in [0, 1]. Defaults to 0.6.
        colormap (str): Name of an OpenCV or matplotlib colour map. Defaults to
            ``'plasma'``, which can be read with any colour vision.
        draw, interval, num_images, image_indices, alignment, override_loop_pipeline,
            name, show, wait_time, backend_args, on_error: As for ``FeatMapVisHook``;
            ``'letterbox'`` and ``'network'`` explain the input tensor of the loop.

    Raises:
        VisConfigError: While the Runner is built, if an option has a value that
            cannot work; at the start of the run, if it does not fit the model, the
            dataset or the pipeline.
    """

    default_name = "boxam"
    chooses_layers = True

    def __init__(
        self,
        *,
        method: str = "boxam",
        target: str = "score",
        target_layers: Sequence[str] | str | None = None,
        scope: str = "box",
        fusion: str = "max",
        normalize_layers: bool = True,
        smooth: float | None = None,
        norm_in_bbox: bool = False,
        eigen_smooth: bool = False,
        aug_smooth: bool = False,
        topk: int = 10,
        score_thr: float = 0.3,
        classes: Sequence[str | int] | str | int | None = None,
        max_shape: int | Sequence[int] = -1,
        batch_size: int | None = None,
        ratio_channels_to_ablate: float = 1.0,
        num_masks: int = 1000,
        alpha: float = 0.6,
        colormap: str = "plasma",
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
        wanted: Any = classes
        if isinstance(classes, (str, int)) and not isinstance(classes, bool):
            wanted = [classes]
        check_option(
            "classes",
            classes,
            wanted is None
            or (
                isinstance(wanted, (list, tuple))
                and len(wanted) > 0
                and all(
                    isinstance(c, str)
                    or (isinstance(c, int) and not isinstance(c, bool) and c >= 0)
                    for c in wanted
                )
            ),
            "use names or indices of classes, counted from 0, or None for all",
        )
        self.classes: Sequence[str | int] | None = wanted
        self._options = BoxMapOptions(
            method=method,
            target=target,
            score_thr=score_thr,
            topk=topk,
            eigen_smooth=eigen_smooth,
            aug_smooth=aug_smooth,
            max_shape=max_shape,
            batch_size=batch_size,
            ratio_channels_to_ablate=ratio_channels_to_ablate,
            num_masks=num_masks,
        )
        known = method_of(method)
        check_option(
            "target_layers",
            target_layers,
            target_layers is None or known.kind != "black_box",
            f"method={method!r} looks at no layer; leave target_layers=None",
        )
        self._make_explainer = partial(
            BoxAMPanel,
            scope=scope,
            fusion=fusion,
            normalize_layers=normalize_layers,
            smooth=known.default_smooth if smooth is None else smooth,
            norm_in_bbox=norm_in_bbox,
            alpha=alpha,
            colormap=colormap,
            score_thr=score_thr,
            caption=caption_of(method, target),
        )
        # Wrong values fail now and not in the first validation.
        self._make_explainer()

    def build_sample_maker(
        self, runner: Runner, detector: nn.Module, class_names: Sequence[str]
    ) -> SampleMaker:
        """Give what explains the boxes, after a trial on the detector."""
        mapper = BoxMapper(
            detector,
            None
            if self.target_layers is None
            else resolve_layers(detector, self.target_layers),
            self._options.with_classes(
                None if self.classes is None else labels_of(self.classes, class_names)
            ),
            logger=runner.logger,
            show_progress=is_main_process(),
        )
        maker = BoxSampleMaker(
            detector,
            mapper,
            alignment=self.alignment,
            backend_args=self.backend_args,
        )
        try:
            maker.prepare()
        except VisError:
            raise
        except Exception as error:
            # The trial is on noise, before any checkpoint is loaded. What a detector
            # makes of that need not be a mistake in the config.
            if self.on_error == "raise":
                raise
            self._policy.record("try an explanation before the run", error)
        return maker

    def build_explainer(
        self, class_names: Sequence[str], palette: Sequence[Any] | None
    ) -> Explainer:
        """Give the explainer with the options of this hook."""
        return self._make_explainer(class_names=class_names, palette=palette)
