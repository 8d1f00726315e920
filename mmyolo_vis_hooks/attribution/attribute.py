"""From a detector and an image to one map per detection.

Read :meth:`BoxAttributor.explain` from top to bottom: a forward with a graph, the
choice of boxes, the anchor that made each of them, the layer on which it is explained,
the method, and the maps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from logging import Logger
from typing import Any

import torch
from mmengine.structures import InstanceData
from rich import get_console
from torch import nn

from ..data.detections import labels_of
from ..declare import one_of
from ..errors import VisConfigError, VisError
from ..network.graph import (
    GraphForward,
    PredictionGraph,
    TapPoint,
    instances_of,
    prediction_of,
)
from ..network.layer_path import layer_of_map, named_maps, resolve_layers
from ..network.levels import Pyramid, last_maps, survey
from ..network.maps import View
from ..network.replay import ReplayEngine
from ..network.state import frozen
from ..network.trace import trace_forward
from ..records import BoxExplanation, LayerMap, name_of
from .anchors import Anchor, locate_anchors, say_it_all
from .attention import DecoderAttention, looked_at
from .augment import Choose, smoothed
from .blackbox import MaskedImage, final_scores
from .gradient import joined_targets
from .maps import MapMaker
from .methods import rectified, shaped, validate
from .perturb import input_target
from .scoring import Scorer
from .spots import (
    Case,
    Spot,
    spots_at,
    spots_of_levels,
    spots_of_pixels,
    tapped_views,
    why_blank,
)
from .targets import TARGETS, ChosenBoxes, Target

_BLACK_BOX_BATCH = 8
_Found = tuple[InstanceData, list[BoxExplanation]]


class BoxAttributor:
    """Explains the detections of one image at a time.

    Args:
        detector (nn.Module): The detector, without wrappers.
        options (BoxAMOptions): What is explained and how.
        class_names (Sequence[str]): Names that ``options.classes`` may use.
        logger (Logger): Told what a user should know.
        show_progress (bool): Show a bar while masks or channels are tried, where
            there is a terminal. Defaults to False.
    """

    def __init__(
        self,
        detector: nn.Module,
        options: Any,
        *,
        logger: Logger,
        class_names: Sequence[str] = (),
        show_progress: bool = False,
    ) -> None:
        self.options = options
        self._method = validate(options.method, eigen_smooth=options.eigen_smooth)
        layers = resolve_layers(detector, options.target_layers or ())
        self._names = list(layers)
        owners = {layer_of_map(detector, name): layers[name] for name in layers}
        self._named = [TapPoint(path, module) for path, module in owners.items()]
        self._detector = detector
        self._labels: Sequence[int] | None = None
        if options.classes is not None:
            self._labels = labels_of(options.classes, class_names)
        self._class_names = class_names
        self._logger = logger
        # In a file, a bar that goes away leaves an empty line.
        self._show_progress = show_progress and get_console().is_terminal
        self._engine = ReplayEngine(detector, logger)
        self._scorer = partial(Scorer, self._engine, options, show=self._show_progress)
        self._maker = MapMaker(detector, options, self._engine, self._scorer)
        self._forward: GraphForward | None = None
        self._pyramid: Pyramid | None = None
        self._said_note = False
        self._at_anchors: set[str] = set()  # targets that anchors say everything of
        self._recorded: Callable[[], Any] = contextlib.nullcontext
        if self._method.kind == "attention":
            self._recorded = DecoderAttention(detector).recorded
        if self._method.kind != "black_box" and not self._named:
            last_maps(detector)

    def explain(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[InstanceData, tuple[BoxExplanation, ...]]:
        """Predict the detections of one image and explain the best of them.

        Args:
            inputs (Tensor): ``(1, 3, H, W)``, as the data preprocessor gives it.
            metainfo (Mapping): Of the image's data sample.

        Returns:
            tuple: All final detections, without a graph, and the explanations of
            the chosen ones, the highest score first.

        Raises:
            VisError: If the detections cannot be explained.
        """
        inputs = inputs.detach()
        if self._method.kind == "black_box":
            predictions, explanations = self._explain_black_box(inputs, metainfo)
        else:
            predictions, explanations = self._explain(inputs, metainfo, self.choose)
        if self.options.aug_smooth and explanations:

            def again(view: torch.Tensor, choose: Choose) -> list[BoxExplanation]:
                return self._explain(view, metainfo, choose)[1]

            explanations = smoothed(inputs, predictions, explanations, metainfo, again)
        return predictions, tuple(explanations)

    def _explain(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any], choose: Choose
    ) -> _Found:
        with frozen(self._detector), self._recorded() as looked:
            graph = self._run(inputs, metainfo)
            chosen = choose(graph.predictions)
            rounds = []
            for case in self._cases(graph, metainfo, chosen) if chosen else ():
                if looked:
                    found = looked_at(self._method, looked, case)
                else:
                    found = [(maps, None) for maps in self._maps_at_layers(case)]
                rounds.append(
                    [self._explained(case, k, *own) for k, own in enumerate(found)]
                )
        return graph.detections(), [joined_targets(r) for r in zip(*rounds)]

    def _maps_at_layers(self, case: Case) -> list[list[LayerMap]]:
        maps: list[list[LayerMap]] = [[] for _ in case.boxes.indices]
        for spot in self._spots(case):
            found = self._maker.maps(case, spot)
            for k, saliency in zip(spot.members, found):
                maps[k].append(LayerMap(spot.view.title, saliency.cpu().numpy()))
        return maps

    def prepare(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> None:
        """Find out on an image whether everything that is asked for can be had.

        A ``VisError`` says what cannot, such as a score without a gradient.
        """
        if self._method.kind == "black_box":
            return
        try:
            with frozen(self._detector):
                graph = self._run(inputs.detach(), metainfo)
                scores = graph.predictions.scores.detach()
                if len(scores):
                    list(self._cases(graph, metainfo, [int(scores.argmax())]))
        finally:
            # Levels are measured on the first image, whose maps may be larger.
            self._forward, self._pyramid = None, None

    # The forward.

    def _run(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> PredictionGraph:
        if self._forward is None:
            points = self._tap_points(inputs, metainfo)
            self._forward = GraphForward(self._detector, points)
        graph = self._forward.run(inputs, metainfo)
        self._views(graph)
        return graph

    def _tap_points(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Sequence[TapPoint]:
        if self._method.kind in ("black_box", "pixels", "attention"):
            return [last_maps(self._detector)]
        if not self._named:
            self._pyramid = survey(self._detector, inputs, metainfo)
            return self._pyramid.points
        try:
            base = last_maps(self._detector)
        except VisConfigError:
            return self._named
        # To name the level that did make a box on which the layers have no influence.
        names = {point.layer for point in self._named}
        return [*self._named, *([] if base.layer in names else [base])]

    def _views(self, graph: PredictionGraph) -> list[View]:
        """The maps of the layers that the user named."""
        layers = {point.layer for point in self._named}
        taps = [tap for tap in graph.taps if tap.layer in layers]
        return named_maps(self._names, tapped_views(graph, taps))

    # The boxes.

    def choose(self, predictions: InstanceData) -> list[int]:
        """Which detections are explained, the highest score first."""
        scores = predictions.scores.detach()
        kept = scores > self.options.score_thr
        if self._labels is not None:
            wanted = torch.tensor(list(self._labels), device=scores.device)
            kept &= torch.isin(predictions.labels, wanted)
        order = torch.argsort(scores, descending=True, stable=True)
        indices = order[kept[order]].tolist()
        topk = self.options.topk
        return indices if topk < 0 else indices[:topk]

    def targets(self) -> list[Target]:
        """What is explained of them; of several, the maps are joined."""
        names = self._method.targets or (self.options.target,)
        return [TARGETS[one_of("target", name, TARGETS)] for name in names]

    # The anchors.

    def _cases(
        self, graph: PredictionGraph, metainfo: Mapping[str, Any], indices: list[int]
    ) -> list[Case]:
        """For each target the scalars, and where the head decided them."""
        forward = prediction_of(self._detector, graph.inputs, metainfo)

        trace = functools.cache(partial(trace_forward, self._engine.modules, forward))
        boxes = ChosenBoxes(graph, indices, type(self._detector).__name__)
        cases = []
        for target in self.targets():
            given = target.function(boxes)
            scalars = shaped(given, (len(indices),), f"target={target.name!r}")
            anchors = self._anchors(target, scalars, boxes)
            cases.append(Case(boxes, target, scalars, anchors, forward, trace))
        return cases

    def _anchors(
        self, target: Target, scalars: torch.Tensor, boxes: ChosenBoxes
    ) -> list[Anchor] | None:
        """Where they were decided, if that is all there is to them; found out once."""
        graph = boxes.graph
        if not graph.head_outputs or not target.at_anchor:
            return None
        anchors = locate_anchors(scalars, boxes.labels, graph)
        if target.name not in self._at_anchors and any(a.entries for a in anchors):
            if not say_it_all(anchors, scalars, graph):
                return None
            self._at_anchors.add(target.name)
        return anchors

    # The layer.

    def _spots(self, case: Case) -> list[Spot]:
        if self._method.kind == "pixels":
            return spots_of_pixels(case)
        if self._pyramid is None:
            return spots_at(case, self._views(case.graph))
        first_order = self._method.kind == "gradient" and not self._method.second_order
        return spots_of_levels(case, self._pyramid, with_gradients=first_order)

    # What looks at no layer.

    def _explain_black_box(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> _Found:
        method, options = self._method, self.options
        with frozen(self._detector):
            try:
                predictions, chosen, scorer = self.anchored(inputs, metainfo)
            except VisError:
                with torch.no_grad():
                    (output,) = prediction_of(self._detector, inputs, metainfo)()
                predictions, scorer = instances_of(output, self._detector), None
                chosen = self.choose(predictions)
            if not chosen:
                return predictions, []
            if scorer is not None:
                score: Callable = scorer.scores
                batch_size = scorer.batch_size
            else:
                score = final_scores(self._detector, predictions, chosen, metainfo)
                batch_size = options.batch_size or _BLACK_BOX_BATCH
                if not self._said_note:
                    self._said_note = True
                    self._logger.warning(
                        f"method={method.name!r}: boxes are scored by the final "
                        "detections, not at anchors"
                    )
            bar = self._show_progress
            image = MaskedImage(inputs, score, options.num_masks, batch_size, bar)
            with torch.no_grad():
                maps = method.function(image)
            shape = len(chosen), *inputs.shape[-2:]
            maps = shaped(maps, shape, f"method={method.name!r}")
            maps = rectified(maps, method.name)
        explanations = []
        for index, saliency in zip(chosen, maps.cpu().numpy()):
            shown = (LayerMap("image", saliency),) if saliency.max() > 0 else ()
            warning = "" if shown else "no mask let the detector see this box"
            explanations.append(self._record(index, shown, warning))
        return predictions, explanations

    def anchored(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[InstanceData, list[int], Scorer | None]:
        """The detections, and what scores the chosen ones at their own anchors.

        In eval mode, and for a method that looks at no layer. A ``VisError`` says why
        boxes cannot be scored so.
        """
        graph = self._run(inputs, metainfo)
        chosen = self.choose(graph.predictions)
        if not chosen:
            return graph.detections(), [], None
        (case,) = self._cases(graph, metainfo, chosen)
        if any(anchor.cell is None for anchor in case.anchors or ()):
            raise VisError("regions and queries move when the image changes")
        target = input_target(case, self._engine, self._method.name)
        scorer = self._scorer(case, members=range(len(chosen)), target=target)
        return graph.detections(), chosen, scorer

    # The record.

    def _explained(
        self, case: Case, k: int, maps: list[LayerMap], points: Any
    ) -> BoxExplanation:
        shown = tuple(m for m in maps if m.saliency.any())
        warning = "" if shown else why_blank(case, k, maps, self._names)
        index, label = case.boxes.indices[k], case.boxes.labels[k]
        if warning:
            # The logger drops a second record with the same template.
            name = name_of(label, self._class_names)
            self._logger.warning(f"detection {index} ({name}): {warning}")
        cell = case.anchors[k].cell if case.anchors is not None else None
        return self._record(index, shown, warning, cell=cell, points=points)

    def _record(self, index: int, maps: tuple, warning: str, **own: Any) -> Any:
        smooth = self._method.default_smooth
        return BoxExplanation(index, maps, warning, smooth=smooth, **own)
