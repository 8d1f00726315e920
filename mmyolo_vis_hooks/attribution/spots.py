"""Where boxes are explained: the maps of a layer, and the boxes' gradients on them.

The gradient of a box at the level that made it is zero farther than the level's radius
from its anchor. So boxes of different levels, and boxes of one level whose windows do
not overlap, share a *colour*: one backward pass of the sum of their scalars, out of
which each window is read. That is exact, and serves every method that needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import FeatureShapeError
from ..network.graph import PredictionGraph, TapKey, gradients
from ..network.levels import Level, Pyramid
from ..network.maps import token_slices
from ..network.trace import CallTrace
from ..records import LayerMap
from .anchors import Anchor, wanted_outputs
from .targets import BOX_SIDES, ChosenBoxes, Target

PIXELS = "image"
"""What stands for a layer where the pixels themselves are explained."""


@dataclass(frozen=True)
class View:
    """One map within a tapped tensor: the tensor itself, or a level of its tokens.

    The tensor, a node of the graph, is ``(1, C, h, w)``, or tokens ``(1, N, C)`` of
    which ``tokens`` names the first, the rows and the columns.
    """

    title: str
    tap: TapKey
    tensor: torch.Tensor
    tokens: tuple[int, int, int] | None = None

    def maps(self, values: torch.Tensor) -> torch.Tensor:
        """``(n, C, h, w)`` of values shaped as the tapped tensor, ``(n, ...)``."""
        if self.tokens is None:
            return values
        start, h, w = self.tokens
        part = values[:, start : start + h * w]
        return part.transpose(1, 2).reshape(len(values), -1, h, w)

    @property
    def activations(self) -> torch.Tensor:
        """``(1, C, h, w)``, without a graph."""
        return self.maps(self.tensor.detach())

    def scaled(self, factors: torch.Tensor) -> torch.Tensor:
        """The tensor ``(n, ...)`` with the map's channels times factors ``(n, C)``."""
        value = self.tensor.detach().repeat(len(factors), *[1] * (self.tensor.ndim - 1))
        if self.tokens is None:
            return value * factors[:, :, None, None]
        start, h, w = self.tokens
        value[:, start : start + h * w] *= factors[:, None]
        return value


def views_of(graph: PredictionGraph, taps: Iterable[TapKey]) -> list[View]:
    """All maps in tapped tensors.

    Raises:
        FeatureShapeError: If tokens fit no grid over the input, or a map has a single
            cell and so says nothing about where.
    """
    views = []
    for tap in taps:
        tensor = graph.taps[tap]
        if tensor.ndim == 4:
            views.append(View(tap.title, tap, tensor))
        else:
            slices = token_slices(tensor[0], graph.network_hw, tap.layer)
            for level, tokens in enumerate(slices):
                index = (*tap.output_index, level) if len(slices) > 1 else ()
                title = tap._replace(output_index=index or tap.output_index).title
                views.append(View(title, tap, tensor, tokens))
        if views[-1].activations.shape[-2:] == (1, 1):
            raise FeatureShapeError(
                f"target_layers: {views[-1].title} gives a map of a single cell, as "
                "layers of channel attention do, which has no place in the image; "
                "choose another layer"
            )
    return views


class Window(NamedTuple):
    """A rectangle of cells of a map."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def around(cls, cell: Sequence[int], level: Level, map_hw: Sequence[int]) -> Window:
        """What a box with its anchor in a cell depends on; moved into the map."""
        if level.radius is None:
            return cls(0, 0, *map_hw)
        sizes = [min(2 * level.radius + 1, whole) for whole in map_hw]
        begins = [
            min(max(position - level.radius, 0), whole - size)
            for position, size, whole in zip(cell, sizes, map_hw)
        ]
        return cls(*begins, *sizes)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """The part ``(..., a, b)`` of values ``(..., h, w)``."""
        rows = slice(self.top, self.top + self.height)
        return values[..., rows, self.left : self.left + self.width]

    def pad(self, part: torch.Tensor, map_hw: Sequence[int]) -> torch.Tensor:
        """The part on the whole map, zero elsewhere."""
        whole = part.new_zeros(*part.shape[:-2], *map_hw)
        self.cut(whole).copy_(part)
        return whole

    def overlaps(self, other: Window) -> bool:
        """Whether windows of one size share cells."""
        rows, columns = abs(self.top - other.top), abs(self.left - other.left)
        return rows < self.height and columns < self.width


@dataclass
class Case:
    """One image and one target while it is being explained.

    ``scalars`` are ``(K,)`` with a graph; ``anchors`` are None without a head that can
    be asked; ``forward`` runs ``predict`` on the image, and ``trace`` gives what it
    computed.
    """

    boxes: ChosenBoxes
    target: Target
    scalars: torch.Tensor
    anchors: list[Anchor] | None
    forward: Callable[[], Any]
    trace: Callable[[], CallTrace]

    @property
    def graph(self) -> PredictionGraph:
        return self.boxes.graph

    def gradients(self, k: int, tensors: Sequence[torch.Tensor]) -> Sequence:
        """Those of one box, through the head alone where its anchor is known."""
        if self.anchors is None or not self.anchors[k].entries:
            return gradients(self.scalars[k], tensors)
        return _through_head(self.graph, [self.anchors[k]], tensors)


@dataclass
class Spot:
    """A map on which boxes are explained, which are its members.

    Where they are known, it has the gradients ``(C, a, b)`` of each in its window,
    outside of which there are none; the whole map has no windows.
    """

    view: View
    members: list[int] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)


def influences(case: Case, k: int, taps: Sequence[TapKey]) -> list[Spot]:
    """The maps at which a box has a gradient."""
    found = case.gradients(k, [case.graph.taps[tap] for tap in taps])
    known = {tap: g for tap, g in zip(taps, found) if g is not None}
    views = views_of(case.graph, known)
    pairs = [(view, view.maps(known[view.tap])) for view in views]
    return [Spot(view, [k], [g[0]]) for view, g in pairs if bool(g.any())]


def spots_of_pixels(case: Case) -> list[Spot]:
    """The image itself, for the boxes whose score is not saturated."""
    view = View(PIXELS, TapKey(PIXELS, 0, ()), case.graph.inputs)
    count, anchors = len(case.boxes.indices), case.anchors
    members = [k for k in range(count) if anchors is None or anchors[k].entries]
    return [Spot(view, members)] if members else []


def spots_at(case: Case, views: Sequence[View]) -> list[Spot]:
    """Given maps, each with the boxes that it has an influence on."""
    titles = {view.title for view in views}
    taps = list(dict.fromkeys(view.tap for view in views))
    spots: dict[str, Spot] = {}
    for k in range(len(case.boxes.indices)):
        for own in influences(case, k, taps):
            if own.view.title in titles:
                spot = spots.setdefault(own.view.title, Spot(own.view))
                spot.members += own.members
                spot.gradients += own.gradients
    return list(spots.values())


def spots_of_levels(
    case: Case, pyramid: Pyramid, *, with_gradients: bool
) -> list[Spot]:
    """The maps on which the head decided the boxes, with gradients if these are wanted.

    That is the level whose raw outputs made a box, and for boxes of regions and of
    queries the map with the greatest gradient times activation.
    """
    spots: dict[TapKey, Spot] = {}
    others = []
    placed: list[_Placed] = []
    for k in range(len(case.boxes.indices)):
        anchor = case.anchors[k] if case.anchors is not None else None
        level = pyramid.level_of(anchor.keys) if anchor is not None else None
        if anchor is None or level is None or anchor.cell is None:
            found = influences(case, k, list(case.graph.taps))
            others += sorted(found, key=_energy, reverse=True)[:1]
            continue
        tensor = case.graph.taps[level.tap]
        spot = Spot(View(level.tap.title, level.tap, tensor))
        spot = spots.setdefault(level.tap, spot)
        spot.members.append(k)
        spot.windows.append(Window.around(anchor.cell, level, tensor.shape[-2:]))
        placed.append(_Placed(k, anchor, spot, spot.windows[-1]))
    if with_gradients:
        slopes: dict[int, torch.Tensor] = {}
        for group in colours(placed, separate=pyramid.separate):
            slopes |= _colour_gradients(case, group)
        for k, _, spot, _ in placed:
            spot.gradients.append(slopes[k])
    return [*spots.values(), *others]


def _energy(spot: Spot) -> float:
    return float((spot.gradients[0] * spot.view.activations[0]).abs().sum())


class _Placed(NamedTuple):
    """A box whose anchor is a cell."""

    number: int
    anchor: Anchor
    spot: Spot
    window: Window


def colours(placed: Sequence[_Placed], *, separate: bool) -> list[list[_Placed]]:
    """Groups of boxes no two of which have gradients in the same cells.

    If levels are separate, boxes of different ones never collide.
    """

    def collide(one: _Placed, other: _Placed) -> bool:
        if one.spot is not other.spot:
            return not separate
        return one.window.overlaps(other.window)

    groups: list[list[_Placed]] = []
    for box in placed:
        free = (g for g in groups if not any(collide(box, other) for other in g))
        group = next(free, None)
        if group is None:
            groups.append(group := [])
        group.append(box)
    return groups


def _colour_gradients(case: Case, group: Sequence[_Placed]) -> dict[int, torch.Tensor]:
    """Gradients of boxes in their windows, by one pass."""
    tensors = {box.spot.view.tap: box.spot.view.tensor for box in group}
    anchors = [box.anchor for box in group]
    slopes = _through_head(case.graph, anchors, list(tensors.values()))
    at = {
        tap: torch.zeros_like(tensor) if slope is None else slope
        for (tap, tensor), slope in zip(tensors.items(), slopes)
    }
    return {box.number: box.window.cut(at[box.spot.view.tap][0]) for box in group}


def _through_head(
    graph: PredictionGraph, anchors: Sequence[Anchor], tensors: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Gradients of the sum of scalars; to first order one is its anchor's elements."""
    outputs = {key: graph.head_outputs[key] for key in wanted_outputs(anchors)}
    slopes = {key: torch.zeros_like(output) for key, output in outputs.items()}
    for entries in (entries for anchor in anchors for entries in anchor.entries):
        slopes[entries.key][tuple(entries.places.t())] = entries.gradient
    return gradients(list(outputs.values()), tensors, slopes=list(slopes.values()))


def derivatives(
    case: Case, spot: Spot, number: int, *, second: bool
) -> list[torch.Tensor]:
    """The gradient of a member on the whole map, ``(1, C, h, w)``.

    To second order also the second derivative times the activations.
    """
    view = spot.view
    if not second:
        gradient = spot.gradients[number]
        if spot.windows:
            map_hw = view.activations.shape[-2:]
            gradient = spot.windows[number].pad(gradient, map_hw)
        return [gradient[None]]
    tensor = view.tensor
    scalar = case.scalars[spot.members[number]]
    (slope,) = gradients(scalar, [tensor], create_graph=True)
    slope = torch.zeros_like(tensor) if slope is None else slope
    (product,) = gradients(slope, [tensor], slopes=[tensor.detach()])
    product = torch.zeros_like(tensor) if product is None else product
    return [view.maps(slope.detach()), view.maps(product)]


def why_blank(
    case: Case, k: int, maps: Sequence[LayerMap], named: Sequence[str]
) -> str:
    """Why a box has no map at the named layers, or maps that are zero everywhere."""
    target = case.target.name
    if maps:
        silent = ", ".join(layer_map.layer for layer_map in maps)
        if silent == PIXELS:
            return (
                f"no pixel speaks for this {target}, which may be saturated all the "
                "way from the baseline; try target='logit'"
            )
        return (
            f"nothing at {silent} speaks for this {target}: all weighted "
            "activations are negative or zero"
        )
    if not case.scalars.requires_grad:
        return f"the {target} does not depend on what the network computes"
    if not named:
        reason = "the score is saturated, 1 or 0 to the last digit"
        if target in BOX_SIDES:
            reason = "the box is cut off there, at the border of the image"
        elif target == "mask":
            reason = "its mask is empty"
        return f"the {target} cannot be differentiated here: {reason}"
    made_at = [s.view.title for s in influences(case, k, list(case.graph.taps))]
    where = f"; it was made at {', '.join(made_at)}" if made_at else ""
    return f"{', '.join(named)}: no influence on this box{where}"
