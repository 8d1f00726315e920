"""Whether maps change when the weights do: the check of random weights.

Source: Adebayo et al. 2018, "Sanity checks for saliency maps". A map that hardly
changes when the weights are drawn anew shows the image, or the place of the box, and
not what the detector has learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..attribution.anchors import locate_anchors
from ..attribution.methods import METHODS, weigh
from ..attribution.targets import class_logits
from ..errors import VisError
from ..network.graph import GraphForward, PredictionGraph, TapPoint, gradients
from ..network.state import frozen, preserve_rng_state
from .pointing_game import spearman

PARTS = {"random head": "bbox_head", "all random": ""}
"""Which part of a detector is drawn anew, by the name of the check."""

UNCHANGED = 0.9
"""A map whose rank correlation with the trained one's is larger has not changed."""


def can_be_checked(method: str) -> bool:
    """Whether a method makes its map of activations, and of gradients at most."""
    kind = METHODS.get(method)
    return kind is not None and (
        kind.kind == "activation"
        or (kind.kind == "gradient" and not kind.second_order and not kind.targets)
    )


def randomised(detector: nn.Module, part: str) -> nn.Module:
    """A copy whose convolutions and linear layers below ``part`` are drawn anew.

    ``''`` means the whole detector. The copies are the same in every run.
    """
    other = copy.deepcopy(detector)
    with preserve_rng_state():
        # Not 0, with which a detector may have been initialised.
        torch.manual_seed(20181003)
        for module in (other.get_submodule(part) if part else other).modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.reset_parameters()
    return other


class SanityCheck:
    """Rank correlations of maps before and after weights were made random.

    A map is of the raw class logit at a detection's own anchor, on the map of the neck
    that has most influence on it; the same anchor and the same map are looked at in the
    other detectors, whatever they find there.

    Args:
        detector (nn.Module): With a ``neck`` and a ``bbox_head``.
        methods (Sequence[str]): Methods for which :func:`can_be_checked` holds.

    Raises:
        VisError: If the detector has no such parts.
    """

    def __init__(self, detector: nn.Module, methods: Sequence[str]) -> None:
        modules = dict(detector.named_modules())
        missing = [name for name in ("neck", "bbox_head") if name not in modules]
        if missing:
            raise VisError(
                f"{type(detector).__name__} has no {missing[0]!r}, which the check of "
                "random weights needs; leave it out"
            )
        others = {name: randomised(detector, part) for name, part in PARTS.items()}
        self._detectors = {"": detector, **others}
        self._forwards = {
            name: GraphForward(own, [TapPoint("neck", own.get_submodule("neck"))])
            for name, own in self._detectors.items()
        }
        self._methods = list(methods)
        self.reset()

    def reset(self) -> None:
        """Forget all maps."""
        self._found: dict[str, dict[str, list[float]]] = {
            method: {name: [] for name in PARTS} for method in self._methods
        }

    def update(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any], chosen: Sequence[int]
    ) -> None:
        """Look at some detections of an image ``(1, C, H, W)``."""
        graphs = {name: self._run(name, inputs, metainfo) for name in self._detectors}
        plain = graphs[""]
        labels = plain.predictions.labels[list(chosen)].tolist()
        scores = plain.predictions.scores[list(chosen)]
        for anchor in locate_anchors(scores, labels, plain):
            if not anchor.entries:
                continue
            key, place = class_logits(anchor)[0]
            logit = plain.head_outputs[key][place]
            slopes = gradients(logit, list(plain.taps.values()))
            sizes = [0.0 if s is None else float(s.abs().sum()) for s in slopes]
            level = int(np.argmax(sizes))
            for method in self._methods:
                maps = {
                    name: self._map(method, graph, key, place, level)
                    for name, graph in graphs.items()
                }
                for name in PARTS:
                    either = (maps[""] > 0) | (maps[name] > 0)
                    if either.sum() > 1:
                        value = spearman(maps[""][either], maps[name][either])
                        self._found[method][name].append(value)

    def _run(
        self, name: str, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> PredictionGraph:
        with frozen(self._detectors[name]):
            return self._forwards[name].run(inputs, metainfo)

    def _map(
        self, method: str, graph: PredictionGraph, key: Any, place: Any, level: int
    ) -> np.ndarray:
        tap = list(graph.taps.values())[level]
        given = [tap.detach()]
        if METHODS[method].kind == "gradient":
            (slope,) = gradients(graph.head_outputs[key][place], [tap])
            given.append(torch.zeros_like(tap) if slope is None else slope)
        return weigh(method, *given)[0].cpu().numpy()

    def compute(self) -> dict[str, dict[str, float]]:
        """Mean rank correlation by method, then by the part that was drawn anew.

        It is NaN where no map could be ranked.
        """
        return {
            method: {
                name: float(np.nanmean(own)) if np.isfinite(own).any() else np.nan
                for name, own in of_method.items()
            }
            for method, of_method in self._found.items()
        }

    def unchanged(self) -> list[str]:
        """Methods whose map did not change, whatever the weights are."""
        return [
            method
            for method, found in self.compute().items()
            if any(value > UNCHANGED for value in found.values())
        ]
