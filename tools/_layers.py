"""Prints the layers of a detector, for all tools that take ``--target-layers``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from rich.console import Console
from torch import nn

from mmyolo_vis_hooks.network.layer_table import survey_layers
from mmyolo_vis_hooks.render.layer_tree import layer_tree


def print_layers(
    detector: nn.Module,
    pipeline: Callable,
    image_bgr: np.ndarray,
    *,
    depth: int = 3,
    all_layers: bool = False,
) -> None:
    """Print the layers of a detector with what they put out for an image.

    Args:
        detector: In eval mode.
        pipeline: Test pipeline that takes a decoded image.
        image_bgr: ``(H, W, 3)`` uint8, BGR.
        depth: Deeper layers are only counted.
        all_layers: Also show those that cannot be targeted, with the reason.
    """
    data = pipeline(dict(img=image_bgr, img_id=0, img_path=None, instances=[]))
    with torch.no_grad():
        batch = detector.data_preprocessor(  # type: ignore[operator]
            pseudo_collate([data]), False
        )
    metainfo = batch["data_samples"][0].metainfo
    node = survey_layers(detector, batch["inputs"], metainfo)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width of its own
    console.print(layer_tree(node, depth=depth, all_layers=all_layers))
