"""Methods that weigh a channel by what boxes score without it, or behind it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import VisError
from ..network.graph import TapPoint
from ..network.maps import View
from ..network.partial import ReplayTarget
from ..network.replay import ReplayEngine
from ..network.trace import CallKey
from .methods import register_method, require_finite
from .scoring import Scorer
from .spots import Case


@dataclass(frozen=True)
class PerturbedLayer:
    """What a method may ask of a layer ``(C, h, w)``, and of K boxes that it led to.

    ``ratio`` is the share of the channels that shall be tried.
    """

    activations: torch.Tensor
    ratio: float
    view: View
    scorer: Scorer
    inputs: torch.Tensor

    def scores(self) -> torch.Tensor:
        """What the boxes score as they are, ``(K,)`` float64."""
        return self.scorer.recorded_scores()

    def scores_times(self, factors: torch.Tensor) -> torch.Tensor:
        """Scores ``(n, K)`` float64 with channels multiplied by factors ``(n, C)``."""

        def scaled(part: slice) -> torch.Tensor:
            return self.view.scaled(factors[part])

        title = f"channels of {self.view.title}"
        return self.scorer.scores_of_many(len(factors), scaled, title)

    def scores_behind(self, maps: torch.Tensor) -> torch.Tensor:
        """Scores ``(n, K)`` float64 on the image behind each of maps ``(n, h, w)``.

        A map is normalised to 0 to 1.
        """

        def masked(part: slice) -> torch.Tensor:
            size = self.inputs.shape[-2:]
            masks = F.interpolate(maps[part, None], size, mode="bilinear")
            low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), True)
            return self.inputs * ((masks - low) / (high - low + 1e-8))

        title = f"image behind {self.view.title}"
        return self.scorer.scores_of_many(len(maps), masked, title)


def layer_target(
    engine: ReplayEngine, taps: Sequence[TapPoint], view: View
) -> ReplayTarget:
    """The tensor of a layer, which is replaced."""
    point = next(point for point in taps if point.layer == view.key.layer)
    modules = engine.modules.items()
    path = next(path for path, module in modules if module is point.module)
    place = view.key.output_index if point.side == "output" else (0,)
    return ReplayTarget(CallKey(path, view.key.call_index), place, point.side)


def input_target(case: Case, engine: ReplayEngine, method: str) -> ReplayTarget:
    """The image that goes into the network, which is replaced."""
    if "backbone" not in engine.modules:
        raise VisError(
            f"method={method!r} masks what goes into the module 'backbone', which "
            f"{case.boxes.detector} has not; use a gradient method"
        )
    return ReplayTarget(CallKey("backbone", 0), (0,), "input")


@register_method(
    "ablationcam",
    kind="ablation",
    summary="Ablation-CAM: channels weighed by what the target loses without them.",
    formula="relu(sum_c w_c * A), w_c = (y - y_c) / |y|, y_c = target without channel "
    "c",
)
def ablationcam(layer: PerturbedLayer) -> torch.Tensor:
    """Desai and Ramaswamy 2020, eq. 3. Departure: divided by ``|y|``, so that a channel
    whose loss lowers the target has a positive weight for negative targets too."""
    channels = most_active(layer.activations, layer.ratio)
    factors = layer.activations.new_ones(len(channels), len(layer.activations))
    factors.scatter_(1, channels[:, None], 0)
    scores, without = layer.scores(), layer.scores_times(factors)
    require_finite(without, "the scores")
    weights = scores.new_zeros(len(scores), len(layer.activations))
    size = torch.where(scores == 0, 1, scores.abs())
    weights[:, channels] = ((scores - without) / size).T
    return weights


@register_method(
    "scorecam",
    kind="masking",
    summary="Score-CAM: channels weighed by the target's value when only what lies "
    "under the channel is shown.",
    formula="relu(sum_c w_c * A), w = softmax over channels of the target on the image "
    "times the normalised channel",
)
def scorecam(layer: PerturbedLayer) -> torch.Tensor:
    scores = layer.scores_behind(layer.activations)
    require_finite(scores, "the scores")
    return scores.softmax(dim=0).T


def most_active(activations: torch.Tensor, ratio: float) -> torch.Tensor:
    """The channels of ``(C, h, w)`` with the largest mean size, at least one."""
    count = max(1, round(len(activations) * ratio))
    sizes = activations.float().abs().mean(dim=(1, 2))
    return sizes.topk(count).indices.sort().values
