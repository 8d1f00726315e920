"""Where boxes are explained: the maps of a layer, and the boxes' gradients on them.

The gradient of a box at the level that made it is zero farther than the level's radius
from its anchor. So one pass through the head, on the windows of all boxes, gives what a
pass for each gives on the whole maps. That is used where the raw outputs at the anchors
come out as they were, and serves every method that needs gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import FeatureShapeError
from ..network.graph import PredictionGraph, gradients
from ..network.levels import Pyramid
from ..network.maps import View, views_of
from ..network.nested import OutputKey
from ..network.trace import CallTrace
from ..network.windows import Window
from ..records import LayerMap
from .anchors import Anchor, through_head, wanted_outputs
from .targets import BOX_SIDES, ChosenBoxes, Target

PIXELS = "image"
"""What stands for a layer where the pixels themselves are explained."""
# Boxes that share a pass: what a pass keeps in memory grows with them.
_WINDOWS_AT_ONCE = 32
# TF32 keeps ten bits. A head that looks at something else than windows is far off.
_WINDOW_TOLERANCE = 1e-2

_NO_SLOPE = {
    **dict.fromkeys(BOX_SIDES, "the box is cut off there, at the border of the image"),
    **dict.fromkeys(
        ("score", "logit", "objectness"),
        "the score is saturated, 1 or 0 to the last digit",
    ),
    "mask": "its mask is empty",
}
"""Why a target has no gradient."""


def tapped_views(graph: PredictionGraph, taps: Iterable[OutputKey]) -> list[View]:
    """All maps in tapped tensors.

    Raises:
        FeatureShapeError: If tokens fit no grid over the input, or a map has a single
            cell and so says nothing about where.
    """
    views = views_of({tap: graph.taps[tap] for tap in taps}, graph.network_hw)
    for view in views:
        if view.activations.shape[-2:] == (1, 1):
            raise FeatureShapeError(
                f"target_layers: {view.title} gives a map of a single cell, as "
                "layers of channel attention do, which has no place in the image; "
                "choose another layer"
            )
    return views


@dataclass
class Case:
    """One image and one target while it is being explained.

    ``scalars`` are ``(K,)`` with a graph; ``anchors`` are None without a head that
    alone decides them; ``forward`` runs ``predict`` on the image, and ``trace`` gives
    what it computed.
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
        return through_head(self.graph, [self.anchors[k]], tensors)


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


def influences(case: Case, k: int, taps: Sequence[OutputKey]) -> list[Spot]:
    """The maps at which a box has a gradient."""
    found = case.gradients(k, [case.graph.taps[tap] for tap in taps])
    known = {tap: g for tap, g in zip(taps, found) if g is not None}
    views = tapped_views(case.graph, known)
    pairs = [(view, view.maps(known[view.key])) for view in views]
    return [Spot(view, [k], [g[0]]) for view, g in pairs if bool(g.any())]


def spots_of_pixels(case: Case) -> list[Spot]:
    """The image itself, for the boxes whose score is not saturated."""
    view = View(PIXELS, OutputKey(PIXELS, 0, ()), case.graph.inputs)
    count, anchors = len(case.boxes.indices), case.anchors
    members = [k for k in range(count) if anchors is None or anchors[k].entries]
    return [Spot(view, members)] if members else []


def spots_at(case: Case, views: Sequence[View]) -> list[Spot]:
    """Given maps, each with the boxes that it has an influence on."""
    titles = {view.title for view in views}
    taps = list(dict.fromkeys(view.key for view in views))
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
    spots: dict[OutputKey, Spot] = {}
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
        window = Window.around(anchor.cell, level.radius, tensor.shape[-2:])
        placed.append(_Placed(k, anchor, spot, window))
    if with_gradients:
        slopes = _gradients_in_windows(case, placed, pyramid)
        for box in placed:
            window, slope = slopes[box.number]
            box.spot.windows.append(window)
            box.spot.gradients.append(slope)
    return [*spots.values(), *others]


def _energy(spot: Spot) -> float:
    return float((spot.gradients[0] * spot.view.activations[0]).abs().sum())


class _Placed(NamedTuple):
    """A box whose anchor is a cell."""

    number: int
    anchor: Anchor
    spot: Spot
    window: Window


def _gradients_in_windows(
    case: Case, placed: Sequence[_Placed], pyramid: Pyramid
) -> dict[int, tuple[Window, torch.Tensor]]:
    """Gradients of boxes in their windows, many by one pass where that is faster.

    A window that leaves out a part of the gradient becomes the whole map.
    """
    # Running the head again on some cells costs as much as a pass through thrice them.
    cells = 3 * sum(box.window.height * box.window.width for box in placed)
    whole = sum(box.spot.view.tensor[0, 0].numel() for box in placed)
    slopes: dict[int, tuple[Window, torch.Tensor]] = {}
    if pyramid.head is not None and len(placed) > 1 and cells < whole:
        for begin in range(0, len(placed), _WINDOWS_AT_ONCE):
            part = placed[begin : begin + _WINDOWS_AT_ONCE]
            slopes |= _through_windows(case, part, pyramid)
    for number, anchor, spot, window in placed:
        if number not in slopes:
            (slope,) = through_head(case.graph, [anchor], [spot.view.tensor])
            slope = torch.zeros_like(spot.view.tensor) if slope is None else slope
            if slope.count_nonzero() > window.cut(slope).count_nonzero():
                window = Window(0, 0, *slope.shape[-2:])
            slopes[number] = window, window.cut(slope[0])
    return slopes


def _through_windows(
    case: Case, placed: Sequence[_Placed], pyramid: Pyramid
) -> dict[int, tuple[Window, torch.Tensor]]:
    """The same by one pass; nothing if the head takes no windows, or gives other
    values there."""
    rows: dict[OutputKey, list[_Placed]] = {level.tap: [] for level in pyramid.levels}
    for box in placed:
        rows[box.spot.view.key].append(box)
    inputs = {}
    for tap, boxes in rows.items():
        whole = case.graph.taps[tap].detach()
        cuts = [box.window.cut(whole) for box in boxes] or [whole[..., :1, :1]]
        inputs[tap] = torch.cat(cuts).requires_grad_()
    try:
        with torch.enable_grad():
            outputs = pyramid.run_head(inputs)
    except Exception:  # whatever a head raises that takes something else
        return {}
    slopes = {}
    for key in wanted_outputs([box.anchor for box in placed]):
        output = outputs.get(key)
        own = [
            (entries, [row, 0, -box.window.top, -box.window.left])
            for boxes in rows.values()
            for row, box in enumerate(boxes)
            for entries in box.anchor.entries
            if entries.key == key
        ]
        places = torch.cat([e.places + e.places.new_tensor(to) for e, to in own])
        # A GPU does not survive an index that is too large.
        if output is None or bool((places >= places.new_tensor(output.shape)).any()):
            return {}
        at = tuple(places.t())
        expected = torch.cat([e.values for e, _ in own])
        largest = float(expected.abs().max())
        apart = (output[at] - expected).abs().max()
        if not apart <= _WINDOW_TOLERANCE * largest:  # nor where it is not finite
            return {}
        slopes[key] = torch.zeros_like(output)
        slopes[key][at] = torch.cat([e.gradient for e, _ in own])
    given = [outputs[key] for key in slopes]
    found = gradients(given, list(inputs.values()), slopes=list(slopes.values()))
    return {
        box.number: (box.window, part)
        for boxes, slope in zip(rows.values(), found)
        if slope is not None
        for box, part in zip(boxes, slope)
    }


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
    nowhere = case.anchors is not None and not case.anchors[k].entries
    if nowhere or not named or not case.scalars.requires_grad:
        reason = _NO_SLOPE.get(target, "it depends on nothing that the network gives")
        return f"the {target} cannot be differentiated here: {reason}"
    made_at = [s.view.title for s in influences(case, k, list(case.graph.taps))]
    where = f"; it was made at {', '.join(made_at)}" if made_at else ""
    return f"{', '.join(named)}: no influence on this box{where}"
