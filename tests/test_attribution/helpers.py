"""What tests of maps share: the attributor, and slow references of its maps."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.families import (
    Family,
    plain_predict,
    reference_gradients,
)

LOGGER = logging.getLogger("test_attribution")
# The block whose input is explained, since the head is a 1x1 convolution.
MOVED = {
    "yolov5": [
        "neck.top_down_layers.1",
        "neck.bottom_up_layers.0",
        "neck.bottom_up_layers.1",
    ],
    "yolov7": ["neck.out_layers.0", "neck.out_layers.1", "neck.out_layers.2"],
}
TRANSFORMERS = ("detr", "deformable_detr", "dino")


def attributor(
    family: Family, layers: list[str] | None = None, **options: Any
) -> BoxAttributor:
    options = {"score_thr": 0.0, "topk": 3, "target_layers": layers, **options}
    names = options.pop("class_names", ())
    own = BoxAMOptions(**options)
    return BoxAttributor(family.detector, own, logger=LOGGER, class_names=names)


def explain(family: Family, layers: list[str] | None = None, **options: Any) -> tuple:
    own = attributor(family, layers, **options)
    return own.explain(family.inputs, family.data_samples[0].metainfo)


@contextmanager
def input_as_output(block: nn.Module):
    """An identity whose output is what goes into a block."""
    identity = nn.Identity()
    handle = block.register_forward_pre_hook(lambda _, args: (identity(args[0]),))
    try:
        yield identity
    finally:
        handle.remove()


def references(
    family: Family, count: int, target: str = "score"
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Candidates per detection: maps ``(C, h, w)`` with their gradients."""
    indices = tuple(range(count))
    if family.name in MOVED:
        blocks = dict(family.detector.named_modules())
        found: list[list] = [[] for _ in indices]
        heads = reference_gradients(
            family, family.detector.neck, target=target, indices=indices
        )
        for level, path in enumerate(MOVED[family.name]):
            with input_as_output(blocks[path]) as identity:
                own = reference_gradients(
                    family, identity, target=target, indices=indices
                )
            # Finer levels lead to coarser ones too; the box's own is what counts.
            for all_maps, maps, head in zip(found, own, heads):
                if bool((head[level][1] != 0).any()):
                    all_maps += maps
    elif family.name in TRANSFORMERS:
        encoder = family.detector.encoder
        found = reference_gradients(family, encoder, target=target, indices=indices)
        found = [[p for pair in maps for p in folded(*pair)] for maps in found]
        return found
    else:
        neck = family.detector.neck
        found = reference_gradients(family, neck, target=target, indices=indices)
    return [[(a[0], g[0]) for a, g in maps] for maps in found]


def folded(tokens: torch.Tensor, gradient: torch.Tensor) -> list:
    """Maps in a sequence of tokens of strides 8, 16, 32 and 64 of 128x160."""
    grids = {20: [(4, 5)], 426: [(16, 20), (8, 10), (4, 5), (2, 3)]}
    maps, start = [], 0
    for h, w in grids[tokens.shape[1]]:
        part = slice(start, start + h * w)
        maps.append(tuple(t[0, part].T.reshape(-1, h, w) for t in (tokens, gradient)))
        start += h * w
    return maps


def most_influential(maps: list) -> tuple[torch.Tensor, torch.Tensor]:
    return max(maps, key=lambda pair: float((pair[0] * pair[1]).abs().sum()))


def layercam(activation: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    return (gradient.relu() * activation).sum(dim=0).relu().numpy()


def agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(np.abs(found - expected).max() <= 1e-5 * expected.max())


class RawOutputs:
    """Raw outputs of a head, and the place of a detection, by brute force."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.head = family.detector.bbox_head

    def run(self, taps: tuple[nn.Module, Any] | None = None) -> tuple:
        """``(class scores, objectness)`` per level; with another output of taps."""
        outputs: list = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise StopIteration

        handles = [self.head.register_forward_hook(stop)]
        if taps is not None:
            handles.append(taps[0].register_forward_hook(lambda m, a, o: taps[1](o)))
        samples = copy.deepcopy(self.family.data_samples)
        try:
            with suppress(StopIteration):
                self.family.detector.predict(self.family.inputs, samples)
        finally:
            for handle in handles:
                handle.remove()
        (output,) = outputs
        return output[0], (output[2] if len(output) == 3 else None)

    def score(self, scores: Any, factors: Any, place: tuple) -> torch.Tensor:
        level, channel, row, column = place
        value = scores[level][0, channel, row, column].sigmoid()
        if factors is not None:
            value = value * factors[level][0, 0, row, column].sigmoid()
        return value

    def place(self, index: int) -> tuple[int, int, int, int]:
        """Level, channel, row and column whose score is that of a detection."""
        plain = plain_predict(self.family)
        wanted, label = float(plain.scores[index]), int(plain.labels[index])
        with torch.no_grad():
            scores, factors = self.run()
        found = []
        for level, tensor in enumerate(scores):
            for channel, row, column in np.ndindex(*tensor.shape[1:]):
                if channel % 6 != label:
                    continue
                place = (level, channel, row, column)
                if abs(float(self.score(scores, factors, place)) - wanted) < 1e-6:
                    found.append(place)
        (place,) = found
        return place
