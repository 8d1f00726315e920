"""Reads detections and classes out of what MMDetection's heads and data sets give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import VisConfigError, did_you_mean
from ..records import Detections


def detections_of(found: Any) -> Detections:
    """Read final detections, or those of a data sample if it has any.

    Boxes are :func:`upright`.
    """
    instances = getattr(found, "pred_instances", found)
    if "bboxes" not in instances:
        return Detections()
    return Detections(
        upright(instances.bboxes.detach()).float().cpu().numpy(),
        instances.scores.detach().float().cpu().numpy(),
        instances.labels.detach().cpu().numpy(),
    )


def upright(boxes: Any) -> torch.Tensor:
    """Boxes ``(N, 4)`` xyxy, with their graph, of a tensor or of MMDetection.

    Rotated ones ``(cx, cy, w, h, radian)`` give the upright boxes around them.
    """
    boxes = getattr(boxes, "tensor", boxes)
    boxes = boxes.reshape(-1, boxes.shape[-1])
    if boxes.shape[1] != 5:
        return boxes[:, :4]
    centres, sizes, angles = boxes.split((2, 2, 1), dim=1)
    cos, sin = angles.cos().abs(), angles.sin().abs()
    reach = (sizes * cos + sizes.flip(1) * sin) / 2
    return torch.cat([centres - reach, centres + reach], dim=1)


def class_names_of(metainfo: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names of a dataset; empty if it has none."""
    names = metainfo.get("classes") or metainfo.get("CLASSES") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def palette_of(metainfo: Mapping[str, Any]) -> list[tuple[int, ...]] | None:
    """RGB colours of a dataset's classes, or one for all; None for ``'random'``."""
    palette = metainfo.get("palette", metainfo.get("PALETTE"))
    if isinstance(palette, np.ndarray):
        palette = palette.tolist()
    if not isinstance(palette, (list, tuple)) or not palette:
        return None
    colors = [palette] if isinstance(palette[0], int) else palette
    return [tuple(color) for color in colors]


def labels_of(
    classes: Sequence[str | int], class_names: Sequence[str]
) -> tuple[int, ...]:
    """Indices of classes that are given by name or index.

    Raises:
        VisConfigError: If the data set has no such class.
    """
    names = list(class_names)
    for value in classes:
        known = not names or value < len(names) if isinstance(value, int) else False
        if not known and value not in names:
            there = ", ".join(map(repr, names)) or "no names: use indices"
            remedy = did_you_mean(value, names, f"it has {there}")
            raise VisConfigError(
                f"classes: {value!r} is no class of the data set; {remedy}"
            )
    return tuple(c if isinstance(c, int) else names.index(c) for c in classes)
