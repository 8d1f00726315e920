"""From a layer, or the image itself, to the maps of the boxes, as a method has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..network.replay import ReplayEngine
from .blackbox import final_scores
from .evidence import PixelPath, baseline_of
from .methods import (
    limited,
    require_finite,
    shaped,
    validate,
    weigh,
    weigh_channels,
)
from .perturb import PerturbedLayer, input_target, layer_target
from .scoring import Scorer
from .spots import Case, Spot, derivatives


class MapMaker:
    """Makes maps of the kinds of methods that look at spots.

    Args:
        detector (nn.Module): The detector, without wrappers.
        options (BoxAMOptions): The method, and what it is asked for.
        engine (ReplayEngine): That of the detector.
        scorer (Callable): From case, members and target to what scores the boxes.
    """

    def __init__(
        self,
        detector: nn.Module,
        options: Any,
        engine: ReplayEngine,
        scorer: Callable[..., Scorer],
    ) -> None:
        self._method = validate(options.method, eigen_smooth=options.eigen_smooth)
        self._options = options
        self._engine = engine
        self._scorer = scorer
        self._detector = detector

    def maps(self, case: Case, spot: Spot) -> torch.Tensor:
        """Maps ``(K, h, w)`` of the boxes of a spot, on its device.

        Args:
            case (Case): The image and its boxes.
            spot (Spot): Where they are explained.

        Raises:
            VisError: If the method cannot work here.
        """
        if self._method.kind == "pixels":
            return self._pixel_maps(case, spot)
        maps, map_hw = self._layer_maps(case, spot), spot.view.activations.shape[-2:]
        if maps.shape[-2:] == map_hw:
            return maps
        # Where cells lie is told by the layer's grid, not by one that was reduced.
        return F.interpolate(maps[None], map_hw, mode="bilinear")[0]

    def _layer_maps(self, case: Case, spot: Spot) -> torch.Tensor:
        method, eigen_smooth = self._method, self._options.eigen_smooth
        limit = partial(limited, limits=self._options.max_shape)
        activations = limit(spot.view.activations)
        if method.kind in ("ablation", "masking"):
            weights = method.function(self._perturbed(case, spot))
            shape = len(spot.members), activations.shape[1]
            weights = shaped(weights, shape, f"method={method.name!r}")
            return weigh_channels(activations[0], weights, eigen_smooth=eigen_smooth)
        if method.kind == "activation":
            shared = weigh(method.name, activations)
            return shared.expand(len(spot.members), -1, -1)
        map_hw = spot.view.activations.shape[-2:]
        is_whole = eigen_smooth or not method.elementwise
        one_size = len({(w.height, w.width) for w in spot.windows}) == 1
        if one_size and not is_whole and activations.shape[-2:] == map_hw:
            crops = torch.stack([w.cut(activations[0]) for w in spot.windows])
            parts = weigh(method.name, crops, torch.stack(spot.gradients))
            return torch.stack([w.pad(p, map_hw) for w, p in zip(spot.windows, parts)])
        maps = []
        for number in range(len(spot.members)):
            slopes = derivatives(case, spot, number, second=method.second_order)
            given = activations, *map(limit, slopes)
            maps.append(weigh(method.name, *given, eigen_smooth=eigen_smooth))
        return torch.cat(maps)

    def _pixel_maps(self, case: Case, spot: Spot) -> torch.Tensor:
        method, options, graph = self._method, self._options, case.graph
        target = input_target(case, self._engine, method.name)
        scorer = self._scorer(case, members=spot.members, target=target)
        preprocessor = getattr(self._detector, "data_preprocessor", None)
        baseline = baseline_of(options.baseline, graph.inputs, preprocessor)
        chosen = [case.boxes.indices[k] for k in spot.members]

        @torch.no_grad()
        def found(count: int, images: Callable[[slice], torch.Tensor]) -> torch.Tensor:
            if case.target.name != "score":  # which is all that detections tell
                return scorer.scores_of_many(count, images, "cells")
            given = self._detector, graph.detections(), chosen, graph.metainfo
            score, parts = final_scores(*given), scorer.parts(count, "cells")
            return torch.cat([score(images(part)) for part in parts])

        path = PixelPath(
            graph.inputs,
            baseline,
            graph.network_boxes()[chosen],
            steps=options.steps,
            num_masks=options.masks,
            num_cells=options.cells,
            scorer=scorer,
            found=found,
        )
        shape = len(spot.members), *graph.network_hw
        maps = shaped(method.function(path), shape, f"method={method.name!r}")
        require_finite(maps, "the gradients at the pixels")
        return maps.float() if options.signed else maps.float().relu()

    def _perturbed(self, case: Case, spot: Spot) -> PerturbedLayer:
        view, inputs = spot.view, case.graph.inputs
        if self._method.kind == "masking":
            target = input_target(case, self._engine, self._method.name)
        else:
            target = layer_target(self._engine, case.graph.points, view)
        scorer = self._scorer(case, members=spot.members, target=target)
        ratio = self._options.ratio_channels_to_ablate
        return PerturbedLayer(view.activations[0], ratio, view, scorer, inputs)
