"""Finds where the head decided a detection.

A final score depends on the raw outputs of the head in one place only: the cell, region
or query that made the box. The gradient of the score finds it for any head, and tells
which raw outputs take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..network.graph import PredictionGraph, gradients
from ..network.maps import lies_over
from ..network.nested import OutputKey

_RATIO_TOLERANCE = 1e-3
# TF32 keeps ten bits.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class RawEntries:
    """Elements of one raw output that take part in a scalar.

    ``places`` are their indices, ``(n, ndim)`` int64; ``values`` and ``gradient``, the
    derivative of the scalar by each of them, are ``(n,)``. The output ``is_map`` if it
    is ``(1, C, h, w)`` over the image; those of regions and of queries, which may be
    ``(layers, 1, Q, C)``, are none.
    """

    key: OutputKey
    shape: tuple[int, ...]
    is_map: bool
    places: torch.Tensor
    values: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Anchor:
    """Where the head decided one detection.

    ``entries`` is everything that takes part, by raw output; empty if the scalar has no
    gradient at all, such as a saturated score.
    """

    label: int
    entries: tuple[RawEntries, ...]

    @property
    def cell(self) -> tuple[int, int] | None:
        """Row and column of the cell, None where there is not exactly one."""
        cells: set[tuple[int, int]] = set()
        for entries in self.entries:
            if not entries.is_map:
                return None
            cells.update((row, column) for *_, row, column in entries.places.tolist())
        return cells.pop() if len(cells) == 1 else None

    @property
    def keys(self) -> tuple[OutputKey, ...]:
        """The raw outputs that take part."""
        return tuple(entries.key for entries in self.entries)


def locate_anchors(
    scalars: torch.Tensor, labels: Sequence[int], graph: PredictionGraph
) -> list[Anchor]:
    """Find the elements of the raw outputs that decided scalars ``(K,)`` with a graph.

    Mostly two backward passes find all of them: of the sum of the scalars, and of
    their weighted sum. The ratio of both gradients is the weight, and so the number,
    of the scalar that an element belongs to. Scalars that share a cell, as boxes of two
    classes from one anchor do, get a pass of their own.
    """
    raw = graph.head_outputs
    entries = partial(_entries, raw, graph.network_hw)
    together = _locate_together(scalars, raw, entries) if len(scalars) > 2 else {}
    alone: dict[int, list[RawEntries]] = {}
    waiting = set(range(len(scalars))) - set(together)
    while waiting:
        for k in waiting:
            slopes = _raw_gradients(scalars[k], raw)
            found = [(key, g, g.nonzero()) for key, g in slopes.items()]
            alone[k] = [entries(key, g, at) for key, g, at in found if len(at)]
        # What two scalars share may look like an element of a third.
        taken = set().union(*map(_cells, alone.values()))
        waiting = {k for k in together.keys() - alone if _cells(together[k]) & taken}
    return [
        Anchor(label, tuple(alone[k] if k in alone else together[k]))
        for k, label in enumerate(labels)
    ]


def _locate_together(
    scalars: torch.Tensor,
    raw: Mapping[OutputKey, torch.Tensor],
    entries: Callable[..., RawEntries],
) -> dict[int, list[RawEntries]]:
    """Elements of the scalars that share no cell with another."""
    numbers = torch.arange(1, len(scalars) + 1, device=scalars.device).to(scalars)
    once = _raw_gradients(scalars.sum(), raw)
    weighted = _raw_gradients((scalars * numbers).sum(), raw)
    found: dict[int, list[RawEntries]] = {}
    owners: dict[tuple, set[int]] = {}
    for key, gradient in once.items():
        places = weighted[key].nonzero()
        index = tuple(places.t())
        ratio = (weighted[key][index] / gradient[index]).double()
        number = ratio.round()
        clear = (ratio - number).abs() <= _RATIO_TOLERANCE
        clear &= (number >= 1) & (number <= len(scalars))
        own = torch.where(clear, number - 1, -1).long()
        for k in own.unique().tolist():
            of_box = entries(key, gradient, places[own == k])
            for cell in _cells([of_box]):
                owners.setdefault(cell, set()).add(k)
            found.setdefault(k, []).append(of_box)
    shared = set().union(*(own for own in owners.values() if len(own) > 1))
    return {k: entries for k, entries in found.items() if k not in shared | {-1}}


def _cells(found: Sequence[RawEntries]) -> set[tuple[int, ...]]:
    """Where elements lie; cells of levels of different sizes are different cells."""
    cells: set[tuple[int, ...]] = set()
    for entries in found:
        size = entries.shape[-2:] if entries.is_map else ()
        for place in entries.places.tolist():
            cells.add((*size, *place[-2:]) if size else (0, *place[:-1]))
    return cells


def _raw_gradients(
    scalar: torch.Tensor, raw: Mapping[OutputKey, torch.Tensor]
) -> dict[OutputKey, torch.Tensor]:
    found = zip(raw, gradients(scalar, list(raw.values())))
    return {key: slope.detach() for key, slope in found if slope is not None}


def _entries(
    raw: Mapping[OutputKey, torch.Tensor],
    network_hw: tuple[int, int],
    key: OutputKey,
    gradient: torch.Tensor,
    places: torch.Tensor,
) -> RawEntries:
    tensor, index = raw[key].detach(), tuple(places.t())
    shape, is_map = tuple(tensor.shape), lies_over(tensor, network_hw)
    return RawEntries(key, shape, is_map, places, tensor[index], gradient[index])


def through_head(
    graph: PredictionGraph, anchors: Sequence[Anchor], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients of a sum of scalars: to first order, of the elements of anchors."""
    slopes = {
        key: torch.zeros_like(graph.head_outputs[key])
        for key in wanted_outputs(anchors)
    }
    for entries in (own for anchor in anchors for own in anchor.entries):
        slopes[entries.key][tuple(entries.places.t())] += entries.gradient
    outputs = [graph.head_outputs[key] for key in slopes]
    return gradients(outputs, tensors, slopes=list(slopes.values()))


def say_it_all(
    anchors: Sequence[Anchor], scalars: torch.Tensor, graph: PredictionGraph
) -> bool:
    """Whether the elements of anchors are all that scalars ``(K,)`` depend on.

    They are not where something beside the head takes part in a score too, such as a
    branch that rates masks; and they say some of it twice where heads follow one
    another.
    """
    taps = list(graph.taps.values())

    def joined(slopes: Sequence[torch.Tensor | None]) -> torch.Tensor:
        known = (torch.zeros_like(t) if s is None else s for t, s in zip(taps, slopes))
        return torch.cat([slope.flatten() for slope in known])

    whole = joined(gradients(scalars.sum(), taps))
    apart = (whole - joined(through_head(graph, anchors, taps))).abs().max()
    return not apart > _TOLERANCE * whole.abs().max()  # nor does NaN tell of others


def wanted_outputs(anchors: Sequence[Anchor]) -> list[OutputKey]:
    """The raw outputs in which the anchors lie, each once."""
    return sorted({key for anchor in anchors for key in anchor.keys})
