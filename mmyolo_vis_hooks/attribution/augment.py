"""Test-time augmentation: the mean over mirrored, darker and brighter inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData

from ..geometry import FrameTransform, cells_per_pixel
from ..network.graph import network_boxes
from ..records import BoxExplanation, LayerMap

# Those of pytorch-grad-cam: mirrored or not, three brightnesses. The first is the plain
# input, which is explained already.
_VIEWS = tuple((flip, gain) for flip in (False, True) for gain in (1.0, 0.9, 1.1))[1:]
_SAME_BOX_IOU = 0.5

Choose = Callable[[InstanceData], list[int]]
"""Which of some detections are explained."""


def smoothed(
    inputs: torch.Tensor,
    predictions: InstanceData,
    explanations: Sequence[BoxExplanation],
    metainfo: Mapping[str, Any],
    explain: Callable[[torch.Tensor, Choose], list[BoxExplanation]],
) -> list[BoxExplanation]:
    """Mean of the normalised maps of a box over the views in which it is found.

    ``explain`` explains other inputs, those detections that are chosen.
    """
    network_hw = tuple(inputs.shape[-2:])
    frame = FrameTransform.from_metainfo({"batch_input_shape": network_hw, **metainfo})
    columns = image_columns(frame)
    wanted = [explanation.index for explanation in explanations]
    boxes = torch.from_numpy(network_boxes(predictions, frame))[wanted]
    labels = predictions.labels[wanted].cpu()
    found: list[dict[str, list[np.ndarray]]] = [
        {m.layer: [m.saliency / m.saliency.max()] for m in explanation.maps}
        for explanation in explanations
    ]
    for mirrored, gain in _VIEWS:
        pairs: dict[int, int] = {}

        def choose(
            others: InstanceData, mirrored: bool = mirrored, pairs: dict = pairs
        ) -> list[int]:
            seen = torch.from_numpy(network_boxes(others, frame))
            if mirrored:
                seen = mirror_boxes(seen, columns)
            overlaps = bbox_overlaps(boxes, seen)
            overlaps[labels[:, None] != others.labels.cpu()] = 0
            for k, own in enumerate(overlaps if len(seen) else ()):
                if own.max() >= _SAME_BOX_IOU:
                    pairs[k] = int(own.argmax())
            return list(pairs.values())

        view = mirror_image(inputs, columns) if mirrored else inputs
        for k, explanation in zip(pairs, explain(view * gain, choose)):
            for layer, saliency in ((m.layer, m.saliency) for m in explanation.maps):
                if layer in found[k]:
                    saliency = saliency / saliency.max()
                    if mirrored:
                        saliency = mirror_map(saliency, columns, frame.network_hw)
                    found[k][layer].append(saliency)
    return [
        replace(explanation, maps=tuple(LayerMap(n, _mean(m)) for n, m in own.items()))
        for explanation, own in zip(explanations, found)
    ]


def image_columns(frame: FrameTransform) -> tuple[int, int]:
    """First and one past the last column of the image within the network's input."""
    left = frame.offset_xy[0]
    right = left + frame.image_hw[1] * frame.scale_xy[0]
    width = frame.network_hw[1]
    return max(round(left), 0), min(round(right), width)


def mirror_image(inputs: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor:
    """Turn the image left to right and leave the padding beside it where it is."""
    mirrored = inputs.clone()
    part = slice(*columns)
    mirrored[..., part] = inputs[..., part].flip(-1)
    return mirrored


def mirror_boxes(boxes_xyxy: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor:
    """Boxes ``(N, 4)`` of the mirrored image, in pixels of the network's input."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(dim=1)
    return torch.stack([sum(columns) - x2, y1, sum(columns) - x1, y2], dim=1)


def mirror_map(
    saliency: np.ndarray, columns: tuple[int, int], network_hw: tuple[int, int]
) -> np.ndarray:
    """A map ``(h, w)`` of the mirrored image, turned back.

    The axis of the mirror may lie anywhere between cells: a column is interpolated from
    the two nearest to its mirror image.
    """
    height, width = saliency.shape
    pitch = cells_per_pixel((height, width), network_hw)[1]
    places = sum(columns) * pitch - 1 - np.arange(width)
    # What lies off the map on the other side says nothing.
    padded, cells = np.pad(saliency, ((0, 0), (1, 1))), np.arange(-1, width + 1)
    rows = [np.interp(places, cells, row) for row in padded]
    return np.stack(rows).astype(saliency.dtype)


def _mean(maps: list[np.ndarray]) -> np.ndarray:
    return np.stack(maps).mean(axis=0, dtype=np.float32)
