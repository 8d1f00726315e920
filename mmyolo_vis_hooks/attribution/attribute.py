"""From a detector and an image to one map per detection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import Logger
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import nn

from ..data.samples import detections_of
from ..errors import VisConfigError, VisError
from ..geometry import FrameTransform
from ..network.graph import (
    GraphForward,
    HeadKey,
    PredictionGraph,
    TapKey,
    TapPoint,
    head_modules,
)
from ..network.levels import Level, Pyramid, last_maps, survey
from ..network.recorder import token_slices
from ..network.replay import CallKey, Replay, ReplayEngine, ReplayTarget
from ..network.state import frozen
from ..records import BoxExplanation, LayerMap
from .methods import (
    CamMethod,
    ablation_weights,
    channels_to_ablate,
    score_weights,
    validate,
    validate_ratio,
    weigh,
    weigh_channels,
    weigh_second_order,
)
from .progress import track
from .rise import accumulate, detection_similarities, rise_masks
from .targets import (
    BOX_SIDES,
    Anchor,
    RawKey,
    ScoreLink,
    batch_axis,
    class_logits,
    gather,
    locate_anchors,
    objectness_logits,
    score_link,
    validate_target,
)

# Below this many boxes on a level, separate backward passes are faster than one
# batch of crops.
_MIN_CROPS = 3
_CROP_TOLERANCE = 1e-4
_MAX_CROPS = 1024
_BLACK_BOX_BATCH = 8
# Test-time augmentation of pytorch-grad-cam: mirrored or not, three brightnesses.
_AUGMENTATIONS = tuple(
    (mirrored, factor) for mirrored in (False, True) for factor in (1.0, 0.9, 1.1)
)


@dataclass(frozen=True)
class BoxMapOptions:
    """What is explained and how. See ``BoxAMVisHook`` for the meaning.

    Raises:
        VisConfigError: If a value can never work.
    """

    method: str = "boxam"
    target: str = "score"
    score_thr: float = 0.3
    topk: int = 10
    classes: Sequence[int] | None = None
    eigen_smooth: bool = False
    aug_smooth: bool = False
    max_shape: int | Sequence[int] = -1
    batch_size: int | None = None
    ratio_channels_to_ablate: float = 1.0
    num_masks: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        method = validate(self.method, eigen_smooth=self.eigen_smooth)
        validate_target(self.target)
        validate_ratio(self.ratio_channels_to_ablate)
        _check_share("score_thr", self.score_thr)
        _check_count("topk", self.topk, "use a positive number, or -1 for all", -1)
        if self.batch_size is not None:
            remedy = "use a positive number, or None for one that suits the network"
            _check_count("batch_size", self.batch_size, remedy)
        _check_count("num_masks", self.num_masks, "use a positive number of masks")
        for name in ("eigen_smooth", "aug_smooth"):
            if not isinstance(getattr(self, name), bool):
                raise VisConfigError(
                    f"{name}={getattr(self, name)!r} cannot work: use True or False"
                )
        shape: Any = self.max_shape
        if isinstance(shape, int) and not isinstance(shape, bool):
            shape = (shape,)
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) not in (1, 2)
            or not all(
                isinstance(n, int) and not isinstance(n, bool) and (n == -1 or n >= 1)
                for n in shape
            )
        ):
            raise VisConfigError(
                f"max_shape={self.max_shape!r} cannot work: use one number of cells, "
                "or a height and a width; -1 sets no limit"
            )
        object.__setattr__(self, "max_shape", (int(shape[0]), int(shape[-1])))
        if self.aug_smooth and method.kind == "black_box":
            raise VisConfigError(
                f"aug_smooth=True cannot work with method={self.method!r}, which is a "
                "mean over many changed images already; leave it False"
            )
        if self.method == "odam_combined" and self.target != "score":
            raise VisConfigError(
                f"target={self.target!r} cannot work with method='odam_combined', "
                "which joins the maps of the score and of the four box sides; leave "
                "target='score'"
            )
        if method.kind == "black_box" and self.target != "score":
            raise VisConfigError(
                f"target={self.target!r} cannot work with method={self.method!r}, "
                "which sees nothing but final detections; leave target='score'"
            )
        if method.kind in ("ablation", "masking") and self.target in BOX_SIDES:
            raise VisConfigError(
                f"target={self.target!r} cannot work with method={self.method!r}, "
                "which compares scores; use 'score', 'logit' or 'objectness'"
            )

    def with_classes(self, labels: Sequence[int] | None) -> BoxMapOptions:
        """The same options for detections of these classes only."""
        return replace(self, classes=labels)


def _check_share(name: str, value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not 0 <= float(value) <= 1
    ):
        raise VisConfigError(f"{name}={value!r} cannot work: use 0 to 1")


def _check_count(name: str, value: Any, remedy: str, special: int = 1) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not (value >= 1 or value == special)
    ):
        raise VisConfigError(f"{name}={value!r} cannot work: {remedy}")


@dataclass
class _View:
    """A map within a tapped tensor: the tensor itself, or a level of its tokens."""

    title: str
    tap: TapKey
    tensor: torch.Tensor
    tokens: tuple[int, int, int] | None = None

    def maps(self, values: torch.Tensor) -> torch.Tensor:
        """``(N, C, h, w)`` of values shaped as the tapped tensor, ``(N, ...)``."""
        if self.tokens is None:
            return values
        start, h, w = self.tokens
        part = values[:, start : start + h * w]
        return part.transpose(1, 2).reshape(len(values), -1, h, w)

    def scaled(self, factors: torch.Tensor) -> torch.Tensor:
        """The tensor with each channel of this map multiplied by a factor.

        Args:
            factors (Tensor): ``(N, C)``.

        Returns:
            Tensor: ``(N, ...)``.
        """
        value = self.tensor.detach().repeat(len(factors), *[1] * (self.tensor.ndim - 1))
        if self.tokens is None:
            return value * factors[:, :, None, None]
        start, h, w = self.tokens
        value[:, start : start + h * w] *= factors[:, None]
        return value


@dataclass
class _Image:
    """One image while it is being explained."""

    graph: PredictionGraph
    has_graph: bool
    forward: Callable[[], Any]
    indices: list[int]
    labels: list[int]
    scalars: torch.Tensor
    anchors: list[Anchor] | None
    recorded: dict[CallKey, Any] = field(default_factory=dict)


class BoxMapper:
    """Explains the detections of one image at a time.

    Args:
        detector (nn.Module): The detector, without wrappers.
        layers (Mapping[str, nn.Module], optional): Path and module of each layer;
            None takes for each box the map on which the head decided it.
        options (BoxMapOptions): What is explained and how.
        logger (Logger): Told what a user should know.
        show_progress (bool): Show a bar while masks or channels are tried.
            Defaults to False.
    """

    def __init__(
        self,
        detector: nn.Module,
        layers: Mapping[str, nn.Module] | None,
        options: BoxMapOptions,
        *,
        logger: Logger,
        show_progress: bool = False,
    ) -> None:
        self.options = options
        self._max_shape: tuple[int, int] = tuple(options.max_shape)  # type: ignore
        self._method: CamMethod = validate(
            options.method, eigen_smooth=options.eigen_smooth
        )
        self._detector = detector
        self._paths = {id(m): path for path, m in detector.named_modules()}
        self._layers = (
            None
            if layers is None
            else [TapPoint(path, module) for path, module in layers.items()]
        )
        self._heads = head_modules(detector)
        self._engine = ReplayEngine(detector, self._heads, logger)
        self._logger = logger
        self._show_progress = show_progress
        self._pyramid: Pyramid | None = None
        self._forward: GraphForward | None = None
        self._no_crops: set[TapKey] = set()
        self._unpruned: set[TapKey] = set()
        self._always_graph = False
        if self._method.kind != "black_box" and layers is None:
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
            with frozen(self._detector, parameters=False):
                return self._explain_black_box(inputs, metainfo)
        graph, explanations = self._explained(inputs, metainfo, self.choose)
        if self.options.aug_smooth and explanations:
            explanations = self._augmented(graph, metainfo, explanations)
        return _without_graph(graph.predictions), tuple(explanations)

    def _explained(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        choose: Callable[[InstanceData], list[int]],
    ) -> tuple[PredictionGraph, list[BoxExplanation]]:
        if self._forward is None:
            with frozen(self._detector):
                self._forward_on(inputs, metainfo)
        if self._crops_everything():
            try:
                with frozen(self._detector, parameters=False):
                    return self._explained_by(inputs, metainfo, choose, True)
            except _NeedsGraph:
                pass  # some box is not made of crops
            except RuntimeError as error:
                # A head that works in place on its raw outputs.
                if "in-place operation" not in str(error):
                    raise
            self._always_graph = True
        with frozen(self._detector):
            return self._explained_by(inputs, metainfo, choose, False)

    def _explained_by(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        choose: Callable[[InstanceData], list[int]],
        from_heads: bool,
    ) -> tuple[PredictionGraph, list[BoxExplanation]]:
        graph, recorded = self._run(inputs, metainfo, from_heads=from_heads)
        chosen = choose(graph.predictions)
        return graph, self._explain(graph, recorded, metainfo, chosen)

    def choose(self, predictions: InstanceData) -> list[int]:
        """Which detections are explained, the highest score first."""
        options = self.options
        scores = predictions.scores.detach()
        kept = scores > options.score_thr
        if options.classes is not None:
            wanted = torch.tensor(list(options.classes), device=scores.device)
            kept &= torch.isin(predictions.labels, wanted)
        order = torch.argsort(scores, descending=True, stable=True)
        kept_list = kept.tolist()
        indices = [i for i in order.tolist() if kept_list[i]]
        return indices if options.topk < 0 else indices[: options.topk]

    def prepare(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> None:
        """Find out on an image whether everything that is asked for can be had.

        Args:
            inputs (Tensor): ``(1, 3, H, W)``; any image will do.
            metainfo (Mapping): Of its data sample.

        Raises:
            VisError: If layers do not run, or no score carries a gradient.
            VisConfigError: If the target is none of this detector's.
        """
        if self._method.kind == "black_box":
            return
        try:
            with frozen(self._detector):
                self._forward_on(inputs, metainfo)
                graph, _ = self._run(inputs, metainfo)
                scores = graph.predictions.scores.detach()
                if len(scores):
                    self._image(graph, {}, metainfo, [int(scores.argmax())])
                for view in self._views(graph, list(graph.taps)):
                    view.maps(view.tensor)
        finally:
            # Levels are measured on the first real image, whose maps are larger.
            self._forward, self._pyramid = None, None

    # One forward.

    def _forward_on(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> GraphForward:
        if self._forward is None:
            points = self._tap_points(inputs, metainfo)
            self._forward = GraphForward(self._detector, points)
        return self._forward

    def _run(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        *,
        from_heads: bool = False,
    ) -> tuple[PredictionGraph, dict[CallKey, Any]]:
        recorded: dict[CallKey, Any] = {}

        def attach() -> Iterator[Any]:
            recorded.clear()
            yield from self._engine.attach_recording(recorded)

        forward = self._forward_on(inputs, metainfo)
        graph = forward.run(
            inputs,
            metainfo,
            attach=attach,
            from_heads=from_heads,
            scores_only=self._explains_scores,
        )
        return graph, recorded

    def _crops_everything(self) -> bool:
        """Whether the gradients of all boxes come from crops, and none from a graph."""
        if self._pyramid is None or self._always_graph:
            return False
        return self._takes_crops and all(
            level.outputs
            and level.radius is not None
            and level.tap not in self._no_crops
            for level in self._pyramid.levels
        )

    @property
    def _explains_scores(self) -> bool:
        options = self.options
        return options.target not in BOX_SIDES and options.method != "odam_combined"

    @property
    def _takes_crops(self) -> bool:
        return (
            self._method.kind == "gradient"
            and self._method.elementwise
            and not self.options.eigen_smooth
            and max(self._max_shape) < 0
        )

    def _tap_points(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[TapPoint, ...]:
        if self._layers is not None:
            points = list(self._layers)
            try:
                base = last_maps(self._detector)
            except VisConfigError:
                return tuple(points)
            # To name the level that did make a box on which the layers have none.
            if base.layer not in {point.layer for point in points}:
                points.append(base)
            return tuple(points)
        forward = self._replayable(inputs, metainfo)
        self._pyramid = survey(
            self._detector, inputs, metainfo, lambda: self._engine.trace(forward)
        )
        return self._pyramid.points

    def _replayable(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> Callable[[], Any]:
        def forward() -> Any:
            sample = DetDataSample(metainfo=dict(metainfo))
            return self._detector(inputs, [sample], mode="predict")

        return forward

    def _image(
        self,
        graph: PredictionGraph,
        recorded: dict[CallKey, Any],
        metainfo: Mapping[str, Any],
        indices: list[int],
        target: str | None = None,
    ) -> _Image:
        """Find the scalars that are explained, and where the head decided them."""
        target = target or self.options.target
        predictions = graph.predictions
        labels = predictions.labels[indices].tolist()
        forward = self._replayable(graph.inputs, metainfo)
        if target in BOX_SIDES:
            boxes = getattr(predictions.bboxes, "tensor", predictions.bboxes)
            scalars = boxes[indices, BOX_SIDES.index(target)]
            if not scalars.requires_grad:
                raise VisError(
                    f"target={target!r}: the boxes of {type(self._detector).__name__} "
                    "carry no gradients; use target='score'"
                )
        else:
            scalars = predictions.scores[indices]
        raw: dict[RawKey, torch.Tensor] = {}
        raw.update(graph.head_outputs.items())
        anchors = locate_anchors(scalars, labels, raw) if raw else None
        if target in ("logit", "objectness"):
            if anchors is None:
                raise VisConfigError(
                    f"target={target!r} needs a module called 'bbox_head', and "
                    f"{type(self._detector).__name__} has none; use target='score'"
                )
            places = class_logits if target == "logit" else objectness_logits
            found = [places(anchor) for anchor in anchors]
            scalars = torch.stack(
                [
                    torch.stack(
                        [raw[HeadKey(*key)][place] for key, place in own]
                    ).mean()
                    if own
                    else scalars.new_zeros(())
                    for own in found
                ]
            )
            anchors = locate_anchors(scalars, labels, raw)
        has_graph = any(tap.requires_grad for tap in graph.taps.values())
        return _Image(
            graph, has_graph, forward, indices, labels, scalars, anchors, recorded
        )

    # Which map of which layer.

    def _views(self, graph: PredictionGraph, taps: Collection[TapKey]) -> list[_View]:
        views = []
        for tap in taps:
            tensor = graph.taps[tap]
            if tensor.ndim == 4:
                views.append(_View(tap.title, tap, tensor))
                continue
            slices = token_slices(tensor[0], graph.network_hw, tap.layer)
            for level, tokens in enumerate(slices):
                index = tap.output_index
                if len(slices) > 1:
                    index = (*index, level)
                title = tap._replace(output_index=index).title
                views.append(_View(title, tap, tensor, tokens))
        return views

    def _explain(
        self,
        graph: PredictionGraph,
        recorded: dict[CallKey, Any],
        metainfo: Mapping[str, Any],
        indices: list[int],
    ) -> list[BoxExplanation]:
        if not indices:
            return []
        if self.options.method == "odam_combined":
            return self._combined(graph, recorded, metainfo, indices)
        image = self._image(graph, recorded, metainfo, indices)
        return self._explain_image(image)

    def _combined(
        self,
        graph: PredictionGraph,
        recorded: dict[CallKey, Any],
        metainfo: Mapping[str, Any],
        indices: list[int],
    ) -> list[BoxExplanation]:
        """ODAM's joined map: the greatest of the normalised maps of all scalars."""
        rounds = [
            self._explain_image(self._image(graph, recorded, metainfo, indices, target))
            for target in ("score", *BOX_SIDES)
        ]
        joined = []
        for parts in zip(*rounds):
            layers: dict[str, list[np.ndarray]] = {}
            for layer_map in (m for part in parts for m in part.maps):
                peak = layer_map.saliency.max()
                layers.setdefault(layer_map.layer, []).append(layer_map.saliency / peak)
            maps = tuple(
                LayerMap(layer, np.maximum.reduce(found))
                for layer, found in layers.items()
            )
            joined.append(BoxExplanation(parts[0].index, maps, parts[0].warning))
        return joined

    def _explain_image(self, image: _Image) -> list[BoxExplanation]:
        count = len(image.indices)
        found: list[list[LayerMap]] = [[] for _ in range(count)]
        if self._layers is None:
            groups, rest = self._by_level(image)
            maps = self._cropped_maps(image, groups)
            for level, members in groups:
                view = _View(level.tap.title, level.tap, image.graph.taps[level.tap])
                left = [k for k in members if k not in maps]
                maps.update(self._level_maps(image, level, view, left))
                for k in members:
                    if k in maps:
                        found[k].append(LayerMap(view.title, maps[k]))
            for k in rest:
                best = self._most_influential(image, k)
                if best is not None:
                    view, gradient = best
                    saliency = self._view_maps(image, view, [k], {k: gradient})[k]
                    found[k].append(LayerMap(view.title, saliency))
        else:
            names = {point.layer for point in self._layers}
            taps = [tap for tap in image.graph.taps if tap.layer in names]
            views = self._views(image.graph, taps)
            gradients = [self._gradients(image, k, taps) for k in range(count)]
            for view in views:
                own = {
                    k: found_at[view.tap]
                    for k, found_at in enumerate(gradients)
                    if view.tap in found_at
                    and bool((view.maps(found_at[view.tap]) != 0).any())
                }
                for k, saliency in self._view_maps(image, view, list(own), own).items():
                    found[k].append(LayerMap(view.title, saliency))
        return [self._explanation(image, k, found[k]) for k in range(count)]

    def _explanation(
        self, image: _Image, k: int, maps: list[LayerMap]
    ) -> BoxExplanation:
        shown = tuple(m for m in maps if m.saliency.max() > 0)
        warning = "" if shown else self._why_blank(image, k, maps)
        if warning:
            self._logger.warning(
                f"detection {image.indices[k]} (class {image.labels[k]}): {warning}"
            )
        return BoxExplanation(image.indices[k], shown, warning)

    def _why_blank(self, image: _Image, k: int, maps: list[LayerMap]) -> str:
        target = self.options.target
        if maps:
            layers = ", ".join(m.layer for m in maps)
            return (
                f"nothing at {layers} speaks for this {target}: all weighted "
                "activations are negative or zero"
            )
        if self._layers is None:
            return (
                f"the {target} cannot be differentiated here: the score is saturated, "
                "1 or 0 to the last digit"
            )
        layers = ", ".join(point.layer for point in self._layers)
        base = [
            tap
            for tap in image.graph.taps
            if tap.layer not in {point.layer for point in self._layers}
        ]
        gradients = self._gradients(image, k, base)
        made_at = [
            view.title
            for view in self._views(image.graph, list(gradients))
            if bool((view.maps(gradients[view.tap]) != 0).any())
        ]
        where = f"; it was made at {', '.join(made_at)}" if made_at else ""
        return f"{layers}: no influence on this box{where}"

    def _by_level(
        self, image: _Image
    ) -> tuple[list[tuple[Level, list[int]]], list[int]]:
        """Boxes by the level that made them, and those made on no single one."""
        groups: dict[TapKey, tuple[Level, list[int]]] = {}
        rest = []
        for k in range(len(image.indices)):
            anchor = image.anchors[k] if image.anchors is not None else None
            level = None
            if anchor is not None and self._pyramid is not None:
                level = self._pyramid.level_of(HeadKey(*key) for key in anchor.keys)
            if level is None or anchor is None or anchor.cell is None:
                rest.append(k)
            else:
                groups.setdefault(level.tap, (level, []))[1].append(k)
        return list(groups.values()), rest

    def _most_influential(
        self, image: _Image, k: int
    ) -> tuple[_View, torch.Tensor] | None:
        """The map whose gradient times activation is greatest, and its gradient."""
        gradients = self._gradients(image, k, list(image.graph.taps))
        best, most = None, 0.0
        for view in self._views(image.graph, list(gradients)):
            gradient = gradients[view.tap]
            influence = view.maps(gradient.detach() * view.tensor.detach())
            energy = float(influence.abs().sum())
            if energy > most:
                best, most = (view, gradient), energy
        return best

    # Gradients.

    def _gradients(
        self, image: _Image, k: int, taps: Sequence[TapKey]
    ) -> dict[TapKey, torch.Tensor]:
        """Gradients of one scalar at the taps that lead to it."""
        if not taps:
            return {}
        scalar = self._scalar(image, k)
        if scalar is None or not scalar.requires_grad:
            return {}
        anchor = image.anchors[k] if image.anchors is not None else None
        if not image.has_graph:
            if anchor is not None and not anchor.entries:
                return {}
            raise _NeedsGraph
        second = self._method.second_order
        found = torch.autograd.grad(
            scalar,
            [image.graph.taps[tap] for tap in taps],
            retain_graph=True,
            create_graph=second,
            allow_unused=True,
        )
        return {tap: g for tap, g in zip(taps, found) if g is not None}

    def _scalar(self, image: _Image, k: int) -> torch.Tensor | None:
        """What is differentiated: the scalar, or to first order the same, shorter."""
        anchor = image.anchors[k] if image.anchors is not None else None
        if anchor is None or self._method.second_order:
            return image.scalars[k]
        if not anchor.entries:
            return image.scalars[k]
        raw = image.graph.head_outputs
        parts = [
            (raw[HeadKey(*entries.key)][tuple(entries.places.t())] * entries.gradient)
            for entries in anchor.entries
        ]
        return torch.cat(parts).sum()

    def _level_maps(
        self, image: _Image, level: Level, view: _View, members: list[int]
    ) -> dict[int, np.ndarray]:
        """Maps of boxes of one level, but by crops."""
        gradients = {}
        if self._method.kind == "gradient" and members:
            for k in members:
                own = self._gradients(image, k, [level.tap])
                if level.tap in own:
                    gradients[k] = own[level.tap]
            members = list(gradients)
        return self._view_maps(image, view, members, gradients, level)

    def _cropped_maps(
        self, image: _Image, groups: Sequence[tuple[Level, list[int]]]
    ) -> dict[int, np.ndarray]:
        """Maps by one backward pass through crops of what each box depends on.

        Boxes of a level that cannot be cropped are missing, and those of a level with
        few boxes where a graph makes passes of their own cheaper.
        """
        cropped: list[tuple[Level, list[int], torch.Tensor, list]] = []
        totals = []
        with torch.enable_grad():
            for level, members in groups:
                if (
                    not self._takes_crops
                    or level.radius is None
                    or level.tap in self._no_crops
                    or (image.has_graph and len(members) < _MIN_CROPS)
                ):
                    continue
                value = image.graph.taps[level.tap]
                crops, offsets = self._crops(image, level, value, members)
                crops.requires_grad_()
                outputs = self._replayed_crops(image, level, members, crops)
                if outputs is None:
                    continue
                total = self._cropped_scalars(image, members, outputs, offsets)
                if total is None:
                    self._no_crops.add(level.tap)
                    continue
                cropped.append((level, members, crops, offsets))
                totals.append(total)
            if not totals:
                return {}
            gradients = torch.autograd.grad(
                torch.stack(totals).sum(), [crops for _, _, crops, _ in cropped]
            )
        maps: dict[int, np.ndarray] = {}
        for (level, members, crops, offsets), gradient in zip(cropped, gradients):
            parts = weigh(self._method.name, crops.detach(), gradient)
            shape = image.graph.taps[level.tap].shape[-2:]
            for k, part, (top, left) in zip(members, parts, offsets):
                maps[k] = np.zeros(shape, np.float32)
                maps[k][top : top + part.shape[0], left : left + part.shape[1]] = part
        return maps

    def _cropped_scalars(
        self,
        image: _Image,
        members: Sequence[int],
        outputs: Mapping[HeadKey, torch.Tensor],
        offsets: Sequence[tuple[int, int]],
    ) -> torch.Tensor | None:
        """To first order the sum of the boxes' scalars on their crops.

        Returns:
            Tensor: None if the crops give other raw outputs than the whole map.
        """
        anchors = self._anchors(image, members)
        parts = []
        for key, output in outputs.items():
            own = [
                (k, entries)
                for k, anchor in enumerate(anchors)
                for entries in anchor.entries
                if entries.key == key
            ]
            numbers = [k for k, entries in own for _ in range(len(entries.values))]
            boxes = torch.tensor(numbers, device=output.device)
            begins = torch.tensor([offsets[k] for k in numbers], device=output.device)
            places = torch.cat([entries.places for _, entries in own])
            places = places.to(output.device)
            rows, columns = (places[:, -2:] - begins).unbind(dim=1)
            found = output[boxes, places[:, 1], rows, columns]
            if not _agrees(found.detach(), torch.cat([e.values for _, e in own])):
                return None
            parts.append(found @ torch.cat([e.gradient for _, e in own]))
        return torch.stack(parts).sum()

    def _replayed_crops(
        self, image: _Image, level: Level, members: list[int], crops: torch.Tensor
    ) -> dict[HeadKey, torch.Tensor] | None:
        """Raw outputs on crops; None if the head cannot run on them."""
        for prune in (True, False):
            if prune and level.tap in self._unpruned:
                continue
            replay = self._replay(image, level.target, members, prune=prune)
            if not replay.is_partial:
                continue
            try:
                return dict(zip(replay.wanted, replay.run(crops)))
            except Exception:  # whatever a head raises where sizes do not fit
                self._unpruned.add(level.tap)
        self._no_crops.add(level.tap)
        return None

    def _crops(
        self, image: _Image, level: Level, value: torch.Tensor, members: list[int]
    ) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """``(K, C, a, b)``: what each box depends on, and where it begins."""
        value = value.detach()[0]
        height, width = value.shape[-2:]
        radius = level.radius or 0
        size_hw = min(2 * radius + 1, height), min(2 * radius + 1, width)
        offsets = []
        for anchor in self._anchors(image, members):
            cell = anchor.cell or (0, 0)
            # At an edge of the map the crop has the same edge, and its padding.
            top, left = (
                min(max(position - radius, 0), whole - part)
                for position, whole, part in zip(cell, (height, width), size_hw)
            )
            offsets.append((top, left))
        crops = torch.stack(
            [
                value[:, top : top + size_hw[0], left : left + size_hw[1]]
                for top, left in offsets
            ]
        )
        return crops, offsets

    # From a layer's map and gradients to maps of boxes.

    def _view_maps(
        self,
        image: _Image,
        view: _View,
        members: list[int],
        gradients: Mapping[int, torch.Tensor],
        level: Level | None = None,
    ) -> dict[int, np.ndarray]:
        if not members:
            return {}
        kind = self._method.kind
        if kind == "ablation":
            return self._ablated_maps(image, view, members, level)
        if kind == "masking":
            return self._masked_maps(image, view, members)
        name, eigen_smooth = self._method.name, self.options.eigen_smooth
        maps = view.maps(view.tensor.detach())
        if kind == "activation":
            (shared,) = weigh(name, self._limited(maps), None)
            return dict.fromkeys(members, shared)
        if self._method.second_order:
            return {k: self._second_order(view, gradients[k]) for k in members}
        return {
            k: weigh(
                name,
                self._limited(maps),
                self._limited(view.maps(gradients[k].detach())),
                eigen_smooth=eigen_smooth,
            )[0]
            for k in members
        }

    def _second_order(self, view: _View, gradient: torch.Tensor) -> np.ndarray:
        # The library would free the graph, which the next box needs too.
        (product,) = torch.autograd.grad(
            gradient,
            view.tensor,
            grad_outputs=view.tensor.detach(),
            retain_graph=True,
            allow_unused=True,
        )
        if product is None:  # the target is linear in the map
            product = torch.zeros_like(gradient)
        maps = view.maps(view.tensor.detach()).clone().requires_grad_()
        slopes = _WithProduct.apply(
            maps, view.maps(gradient.detach()), view.maps(product)
        )
        return weigh_second_order(maps, slopes, eigen_smooth=self.options.eigen_smooth)[
            0
        ]

    def _limited(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of at most ``max_shape``, to save memory."""
        size = [
            size if limit < 0 else min(size, limit)
            for size, limit in zip(maps.shape[-2:], self._max_shape)
        ]
        if size == list(maps.shape[-2:]):
            return maps
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)

    # Methods that change what the network computes.

    def _replay(
        self,
        image: _Image,
        target: ReplayTarget,
        members: Sequence[int],
        *,
        prune: bool = True,
    ) -> Replay:
        anchors = self._anchors(image, members)
        wanted = sorted({HeadKey(*key) for anchor in anchors for key in anchor.keys})
        return self._engine.replay(
            image.forward, target, wanted, image.recorded, prune=prune
        )

    def _anchors(self, image: _Image, members: Sequence[int]) -> list[Anchor]:
        if image.anchors is None:
            raise VisError(
                f"method={self._method.name!r} scores a box at its own anchor and "
                f"needs a module called 'bbox_head' for it, which "
                f"{type(self._detector).__name__} has not; use a gradient method"
            )
        return [image.anchors[k] for k in members]

    def _links(self, image: _Image, members: Sequence[int]) -> list[ScoreLink]:
        """How the scalar of each box follows from its raw outputs."""
        anchors = self._anchors(image, members)
        if self.options.target == "score":
            scores = image.scalars.detach()[list(members)].tolist()
            return [score_link(a, score) for a, score in zip(anchors, scores)]
        return [partial(_linear, anchor) for anchor in anchors]

    def _ablated_maps(
        self, image: _Image, view: _View, members: list[int], level: Level | None
    ) -> dict[int, np.ndarray]:
        """AblationCAM: a channel weighs what the box loses without it."""
        # Without a gradient there is no anchor to score at.
        members = [k for k in members if self._anchors(image, [k])[0].entries]
        if not members:
            return {}
        options = self.options
        maps = view.maps(view.tensor.detach())
        channels = channels_to_ablate(maps[0], options.ratio_channels_to_ablate)
        target = level.target if level is not None else self._target_of(view.tap)
        anchors, links = self._anchors(image, members), self._links(image, members)
        scorer = _Scorer(self._replay(image, target, members), anchors, links)
        height, width = maps.shape[-2:]
        crops: torch.Tensor | None = None
        offsets: list[tuple[int, int]] = []
        if (
            level is not None
            and level.radius is not None
            and level.tap not in self._no_crops
            and len(members) * (2 * level.radius + 1) ** 2 < height * width
        ):
            crops, offsets = self._crops(image, level, view.tensor, members)
            if self._replayed_crops(image, level, members, crops) is None:
                crops = None
            else:
                prune = level.tap not in self._unpruned
                replay = self._replay(image, target, members, prune=prune)
                cropping = _Scorer(replay, anchors, links)
                if cropping.reproduces(crops, offsets):
                    scorer = cropping
                else:
                    self._no_crops.add(level.tap)
                    crops = None
        rows: list[torch.Tensor] = []
        if crops is not None:
            # As many cells at once as a batch of whole maps has.
            cells = crops.shape[0] * crops.shape[-2] * crops.shape[-1]
            step = max(
                1, scorer.batch_size(options.batch_size) * height * width // cells
            )
            step = min(step, max(1, _MAX_CROPS // len(crops)))
        else:
            step = scorer.batch_size(options.batch_size)
        chunks = [channels[i : i + step] for i in range(0, len(channels), step)]
        for chunk in track(chunks, f"ablation of {view.title}", self._show_progress):
            factors = maps.new_ones(len(chunk), maps.shape[1])
            factors[range(len(chunk)), chunk] = 0
            if crops is None:
                rows.append(scorer.scores(view.scaled(factors)))
            else:
                rows.append(scorer.cropped_scores(crops, factors, offsets))
        ablated = torch.cat(rows).double().cpu().numpy()
        weights = np.zeros((len(members), maps.shape[1]))
        before = scorer.recorded_scores()
        for row, score, after in zip(weights, before, ablated.T):
            row[channels] = ablation_weights(score, after)
        found = weigh_channels(
            self._limited(maps)[0], weights, eigen_smooth=options.eigen_smooth
        )
        return dict(zip(members, found))

    def _masked_maps(
        self, image: _Image, view: _View, members: list[int]
    ) -> dict[int, np.ndarray]:
        """Score-CAM: a channel weighs what the box scores where it is active."""
        members = [k for k in members if self._anchors(image, [k])[0].entries]
        if not members:
            return {}
        backbone = getattr(self._detector, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise VisError(
                f"method={self._method.name!r} masks what goes into the module "
                f"'backbone', which {type(self._detector).__name__} has not; use "
                "method='drise'"
            )
        target = ReplayTarget(CallKey(self._paths[id(backbone)], 0), (0,), "input")
        scorer = _Scorer(
            self._replay(image, target, members),
            self._anchors(image, members),
            self._links(image, members),
        )
        maps = view.maps(view.tensor.detach())[0]
        step = scorer.batch_size(self.options.batch_size)
        chunks = list(maps.split(step))
        rows = []
        for chunk in track(chunks, f"masks of {view.title}", self._show_progress):
            masks = F.interpolate(
                chunk[:, None], image.graph.network_hw, mode="bilinear"
            )
            low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), True)
            masks = (masks - low) / (high - low + 1e-8)
            rows.append(scorer.scores(image.graph.inputs * masks))
        scores = torch.cat(rows).double().cpu().numpy()
        weights = np.stack([score_weights(own) for own in scores.T])
        found = weigh_channels(
            self._limited(maps[None])[0],
            weights,
            eigen_smooth=self.options.eigen_smooth,
        )
        return dict(zip(members, found))

    def _target_of(self, tap: TapKey) -> ReplayTarget:
        path = self._paths[id(self._modules_of_taps()[tap.layer])]
        return ReplayTarget(CallKey(path, tap.call_index), tap.output_index)

    def _modules_of_taps(self) -> dict[str, nn.Module]:
        points = self._layers or (self._pyramid.points if self._pyramid else ())
        return {point.layer: point.module for point in points}

    def _explain_black_box(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any]
    ) -> tuple[InstanceData, tuple[BoxExplanation, ...]]:
        """D-RISE: what masks let the detector still see the box."""
        options = self.options
        batch_size = options.batch_size or _BLACK_BOX_BATCH
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))

        def predict(batch: torch.Tensor) -> list[Any]:
            samples = [DetDataSample(metainfo=dict(metainfo)) for _ in batch]
            return self._detector(batch, samples, mode="predict")

        with torch.no_grad():
            (output,) = predict(inputs)
            chosen = self.choose(output.pred_instances)
            if not chosen:
                return output.pred_instances, ()
            found = detections_of(output)
            boxes, labels = found.boxes_xyxy[chosen], found.labels[chosen]

            def weighed() -> Iterator[tuple[torch.Tensor, np.ndarray]]:
                batches = rise_masks(
                    options.num_masks,
                    network_hw,
                    seed=options.seed,
                    batch_size=batch_size,
                    device=inputs.device,
                    dtype=inputs.dtype,
                )
                total = -(
                    -options.num_masks // (options.batch_size or _BLACK_BOX_BATCH)
                )
                for masks in track(batches, "D-RISE", self._show_progress, total):
                    outputs = predict(inputs * masks)
                    yield (
                        masks,
                        np.stack(
                            [
                                detection_similarities(boxes, labels, detections_of(o))
                                for o in outputs
                            ]
                        ),
                    )

            maps = accumulate(weighed())
        explanations = []
        for index, saliency in zip(chosen, maps):
            # What does not matter has the mean of the weights.
            saliency = saliency - saliency.min()
            shown = bool(saliency.max() > 0)
            explanations.append(
                BoxExplanation(
                    index,
                    (LayerMap("image", saliency),) if shown else (),
                    "" if shown else "no mask let the detector see this box",
                )
            )
        return output.pred_instances, tuple(explanations)

    # Test-time augmentation.

    def _augmented(
        self,
        graph: PredictionGraph,
        metainfo: Mapping[str, Any],
        explanations: Sequence[BoxExplanation],
    ) -> list[BoxExplanation]:
        """Mean of the normalised maps of mirrored, darker and brighter inputs."""
        boxes = _network_boxes(graph.predictions, metainfo)
        sums: list[dict[str, list[np.ndarray]]] = [
            {m.layer: [m.saliency / m.saliency.max()] for m in e.maps}
            for e in explanations
        ]
        for mirrored, factor in _AUGMENTATIONS[1:]:
            inputs = graph.inputs.flip(-1) if mirrored else graph.inputs
            pairs: dict[int, int] = {}

            def choose(
                other: InstanceData, mirrored: bool = mirrored, pairs: dict = pairs
            ) -> list[int]:
                seen = _network_boxes(other, metainfo)
                if mirrored:
                    width = graph.network_hw[1]
                    seen = seen[:, [2, 1, 0, 3]] * seen.new_tensor([-1, 1, -1, 1])
                    seen = seen + seen.new_tensor([width, 0, width, 0])
                pairs.update(
                    _matches(graph.predictions, boxes, other, seen, explanations)
                )
                return list(pairs.values())

            _, again = self._explained(inputs * factor, metainfo, choose)
            for own, found in zip(pairs, again):
                for layer_map in found.maps:
                    saliency = layer_map.saliency / layer_map.saliency.max()
                    saliency = saliency[:, ::-1] if mirrored else saliency
                    sums[own].setdefault(layer_map.layer, []).append(saliency)
        return [
            replace(
                explanation,
                maps=tuple(
                    LayerMap(layer, np.stack(found).mean(axis=0, dtype=np.float32))
                    for layer, found in own.items()
                    if layer in {m.layer for m in explanation.maps}
                ),
            )
            for explanation, own in zip(explanations, sums)
        ]


class _NeedsGraph(Exception):
    """Gradients are wanted of a forward whose graph begins at the heads."""


class _WithProduct(torch.autograd.Function):
    """A gradient whose Hessian-vector product is known already."""

    @staticmethod
    def forward(
        ctx: Any, maps: torch.Tensor, gradient: torch.Tensor, product: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(product)
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple:
        (product,) = ctx.saved_tensors
        return product, None, None


class _Scorer:
    """Scores boxes at their own anchors in replayed raw outputs."""

    def __init__(
        self,
        replay: Replay,
        anchors: Sequence[Anchor],
        links: Sequence[ScoreLink],
    ) -> None:
        self._replay = replay
        self._anchors = anchors
        self._links = links
        self._wanted = sorted({HeadKey(*key) for a in anchors for key in a.keys})
        self._one_by_one = False

    def batch_size(self, wanted: int | None) -> int:
        """The number of values that run at once: the wanted, or what is fast."""
        if wanted is not None:
            return wanted
        return self._replay.batch_size

    def recorded_scores(self) -> list[float]:
        """The scores as they were."""
        return [
            float(link([entries.values[None] for entries in anchor.entries]))
            for anchor, link in zip(self._anchors, self._links)
        ]

    @torch.no_grad()
    def scores(self, batch: torch.Tensor) -> torch.Tensor:
        """Scores ``(N, K)`` with the target replaced by each of ``(N, ...)``."""
        if len(batch) > 1 and not self._one_by_one:
            try:
                return self._read(batch)
            except Exception:
                # Whatever a network raises that was given one image's metainfo, or
                # takes all regions of a batch for those of one image. One by one it
                # says so again if something else is wrong.
                self._one_by_one = True
        return torch.cat([self._read(batch[n : n + 1]) for n in range(len(batch))])

    def _read(self, batch: torch.Tensor) -> torch.Tensor:
        outputs = dict(zip(self._wanted, self._replay.run(batch)))
        columns = []
        for anchor, link in zip(self._anchors, self._links):
            values = []
            for entries in anchor.entries:
                output = outputs[HeadKey(*entries.key)]
                axis = batch_axis(entries.shape, tuple(output.shape))
                if axis is None and len(batch) > 1:
                    raise VisError("the raw outputs have no axis for a batch")
                values.append(gather(entries, output))
            columns.append(link(values))
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def cropped_scores(
        self,
        crops: torch.Tensor,
        factors: torch.Tensor,
        offsets: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Scores ``(N, K)`` where each box sees its crop, channels times a factor.

        Args:
            crops (Tensor): ``(K, C, a, b)``.
            factors (Tensor): ``(N, C)``.
            offsets (Sequence): Row and column at which each crop begins.
        """
        batch = (crops[None] * factors[:, None, :, None, None]).flatten(0, 1)
        outputs = dict(zip(self._wanted, self._replay.run(batch)))
        columns = []
        for k, (anchor, link) in enumerate(zip(self._anchors, self._links)):
            values = [
                gather(
                    entries,
                    outputs[HeadKey(*entries.key)][k :: len(crops)],
                    [offsets[k]] * len(factors),
                )
                for entries in anchor.entries
            ]
            columns.append(link(values))
        return torch.stack(columns, dim=1)

    def reproduces(
        self, crops: torch.Tensor, offsets: Sequence[tuple[int, int]]
    ) -> bool:
        """Whether the crops give the recorded scores."""
        whole = crops.new_ones(1, crops.shape[1])
        found = self.cropped_scores(crops, whole, offsets)[0].double()
        return _agrees(found, torch.tensor(self.recorded_scores()).to(found))


def _linear(anchor: Anchor, raw: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(
        [(v * e.gradient).sum(dim=1) for v, e in zip(raw, anchor.entries)]
    ).sum(dim=0)


def _agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = expected.abs().clamp(min=1)
    return bool(((found - expected).abs() <= _CROP_TOLERANCE * scale).all())


def _without_graph(predictions: InstanceData) -> InstanceData:
    plain = InstanceData()
    for name, value in predictions.items():
        plain[name] = value.detach() if hasattr(value, "detach") else value
    return plain


def _network_boxes(
    predictions: InstanceData, metainfo: Mapping[str, Any]
) -> torch.Tensor:
    """Final boxes ``(N, 4)`` in the network's frame, on the CPU."""
    boxes = getattr(predictions.bboxes, "tensor", predictions.bboxes)
    frame = FrameTransform.from_metainfo(metainfo)
    return torch.from_numpy(
        frame.boxes_to_network(boxes.detach().float().cpu().numpy())
    )


def _matches(
    predictions: InstanceData,
    boxes: torch.Tensor,
    other_predictions: InstanceData,
    other_boxes: torch.Tensor,
    explanations: Sequence[BoxExplanation],
) -> dict[int, int]:
    """For explanations the detection of another view that is the same object's."""
    pairs: dict[int, int] = {}
    if not len(other_boxes):
        return pairs
    labels = predictions.labels.cpu()
    other_labels = other_predictions.labels.cpu()
    for k, explanation in enumerate(explanations):
        index = explanation.index
        overlaps = bbox_overlaps(boxes[index : index + 1], other_boxes)[0]
        overlaps[other_labels != labels[index]] = 0
        best = int(overlaps.argmax())
        if overlaps[best] >= 0.5:
            pairs[k] = best
    return pairs
