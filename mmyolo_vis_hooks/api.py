"""The core that the three doors share: options in, what records and draws out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from logging import Logger
from typing import Any

from torch import nn

from .attribution.attribute import BoxMapOptions, BoxMapper
from .attribution.methods import caption_of
from .data.samples import labels_of
from .network.layer_path import resolve_layers
from .options import BoxAMOptions, FeatMapOptions
from .render.boxam_panel import BoxAMPanel
from .render.featmap_panel import FeatMapPanel


def make_featmap_panel(
    options: FeatMapOptions, class_names: Sequence[str], palette: Sequence[Any] | None
) -> FeatMapPanel:
    """Make what draws feature maps.

    Args:
        options (FeatMapOptions): How.
        class_names (Sequence[str]): Names of the classes; may be empty.
        palette (Sequence, optional): Their RGB colours.
    """
    return FeatMapPanel(
        channel_reduction=options.channel_reduction,
        topk=options.topk,
        arrangement=options.arrangement,
        alpha=options.alpha,
        colormap=options.colormap,
        score_thr=options.score_thr,
        class_names=class_names,
        palette=palette,
    )


def make_boxam_panel(
    options: BoxAMOptions, class_names: Sequence[str], palette: Sequence[Any] | None
) -> BoxAMPanel:
    """Make what draws explained boxes; arguments as for the other panel."""
    return BoxAMPanel(
        scope=options.scope,
        fusion=options.fusion,
        normalize_layers=options.normalize_layers,
        smooth=options.sigma,
        norm_in_bbox=options.norm_in_bbox,
        alpha=options.alpha,
        colormap=options.colormap,
        score_thr=options.score_thr,
        caption=caption_of(options.method, options.target),
        class_names=class_names,
        palette=palette,
    )


def make_box_mapper(
    detector: nn.Module,
    options: BoxAMOptions,
    class_names: Sequence[str],
    logger: Logger,
    *,
    show_progress: bool = False,
) -> BoxMapper:
    """Make what explains the boxes of a detector.

    Args:
        detector (nn.Module): The detector, without wrappers.
        options (BoxAMOptions): What is explained and how.
        class_names (Sequence[str]): Names that ``options.classes`` may use.
        logger (Logger): Told what a user should know.
        show_progress (bool): Show a bar while masks or channels are tried.
            Defaults to False.

    Raises:
        VisError: If the options do not fit the detector or the classes.
    """
    wanted: Any = options.classes
    labels = None if wanted is None else labels_of(wanted, class_names)
    names = [own.name for own in fields(BoxMapOptions) if hasattr(options, own.name)]
    names.remove("classes")
    return BoxMapper(
        detector,
        None
        if options.target_layers is None
        else resolve_layers(detector, options.target_layers),
        BoxMapOptions(
            classes=labels, **{name: getattr(options, name) for name in names}
        ),
        logger=logger,
        show_progress=show_progress,
    )
