"""Prints the layers of a detector, for all tools that take ``--target-layers``."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from torch import nn

from mmyolo_vis_hooks.data.alignment import network_input
from mmyolo_vis_hooks.data.pipeline import ImagePipeline, Loaded
from mmyolo_vis_hooks.network.layer_table import survey_layers
from mmyolo_vis_hooks.render.layer_tree import layer_tree


def print_layers(
    detector: nn.Module,
    pipeline: ImagePipeline,
    loaded: Loaded,
    *,
    depth: int = 3,
    all_layers: bool = False,
) -> None:
    """Print the layers of a detector with what they put out for an image.

    Args:
        detector: In eval mode.
        pipeline: What the image goes through.
        loaded: The image.
        depth: Deeper layers are only counted.
        all_layers: Also show those that cannot be targeted, with the reason.
    """
    inputs, metainfo = network_input(detector, pipeline.pack(loaded))
    rows = survey_layers(detector, inputs, metainfo)
    table = layer_tree(rows, depth=depth, all_layers=all_layers)
    # As wide as the table is: a terminal folds long lines by itself, and cuts nothing.
    wide = Console(width=1000)
    width = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(Console().width, width)).print(table)
