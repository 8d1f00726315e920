"""Finds where the head decided a detection, and scores the detection there.

A final score depends on the raw outputs of the head in one place only: the cell, region
or query that made the box. The gradient of the score finds it for any head, and tells
which raw outputs take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import VisError
from ..network.graph import HeadKey, gradients

_RATIO_TOLERANCE = 1e-3
# Up to here one look at everything is faster than a look at the cells before.
_FEW_VALUES = 100_000


@dataclass(frozen=True)
class RawEntries:
    """Elements of one raw output that take part in a scalar.

    Attributes:
        key: Which raw output.
        shape: Its shape.
        places: ``(n, ndim)`` int64, indices of the elements.
        values: ``(n,)`` their values.
        gradient: ``(n,)`` derivative of the scalar by each of them.
    """

    key: HeadKey
    shape: tuple[int, ...]
    places: torch.Tensor
    values: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True)
class Anchor:
    """Where the head decided one detection.

    Attributes:
        label: Class of the detection.
        entries: Everything that takes part, by raw output; empty if the scalar has
            no gradient at all, such as a saturated score.
    """

    label: int
    entries: tuple[RawEntries, ...]

    @property
    def cell(self) -> tuple[int, int] | None:
        """Row and column of the cell, None where there is not exactly one."""
        cells: set[tuple[int, int]] = set()
        for entries in self.entries:
            if len(entries.shape) != 4:
                return None
            cells.update((row, column) for *_, row, column in entries.places.tolist())
        return cells.pop() if len(cells) == 1 else None

    @property
    def keys(self) -> tuple[HeadKey, ...]:
        """The raw outputs that take part."""
        return tuple(entries.key for entries in self.entries)


def locate_anchors(
    scalars: torch.Tensor,
    labels: Sequence[int],
    raw: Mapping[HeadKey, torch.Tensor],
) -> list[Anchor]:
    """Find the elements of the raw outputs that decided scalars.

    Mostly two backward passes find all of them: of the sum of the scalars, and of
    their weighted sum. The ratio of both gradients is the weight, and so the number,
    of the scalar that an element belongs to. Scalars that share a cell, as boxes of two
    classes from one anchor do, get a pass of their own.

    Args:
        scalars (Tensor): ``(K,)`` with a graph.
        labels (Sequence[int]): Class of each detection.
        raw (Mapping): Raw outputs of the heads.

    Returns:
        list[Anchor]: One per scalar.
    """
    together = _locate_together(scalars, raw) if len(scalars) > 2 else {}
    alone: dict[int, list[RawEntries]] = {}
    waiting = set(range(len(scalars))) - set(together)
    while waiting:
        for k in waiting:
            slopes = _raw_gradients(scalars[k], raw)
            found = [(key, g, _nonzero(g)) for key, g in slopes.items()]
            alone[k] = [_entries(key, raw, g, at) for key, g, at in found if len(at)]
        # What two scalars share may look like an element of a third.
        taken = set().union(*map(_cells, alone.values()))
        waiting = {k for k in together.keys() - alone if _cells(together[k]) & taken}
    return [
        Anchor(label, tuple(alone[k] if k in alone else together[k]))
        for k, label in enumerate(labels)
    ]


_Cell = tuple[int, ...]


def _locate_together(
    scalars: torch.Tensor, raw: Mapping[HeadKey, torch.Tensor]
) -> dict[int, list[RawEntries]]:
    """Elements of the scalars that share no cell with another."""
    numbers = torch.arange(1, len(scalars) + 1, device=scalars.device).to(scalars)
    once = _raw_gradients(scalars.sum(), raw)
    weighted = _raw_gradients((scalars * numbers).sum(), raw)
    found: dict[int, list[RawEntries]] = {}
    owners: dict[_Cell, set[int]] = {}
    for key, gradient in once.items():
        places = _nonzero(weighted[key])
        index = tuple(places.t())
        ratio = (weighted[key][index] / gradient[index]).double()
        number = ratio.round()
        clear = (ratio - number).abs() <= _RATIO_TOLERANCE
        clear &= (number >= 1) & (number <= len(scalars))
        rows: dict[int, list[int]] = {}
        for row, k in enumerate(torch.where(clear, number - 1, -1).long().tolist()):
            rows.setdefault(k, []).append(row)
        for k, own in rows.items():
            entries = _entries(key, raw, gradient, places[own])
            for cell in _cells([entries]):
                owners.setdefault(cell, set()).add(k)
            found.setdefault(k, []).append(entries)
    shared = set().union(*(own for own in owners.values() if len(own) > 1))
    return {k: entries for k, entries in found.items() if k not in shared | {-1}}


def _cells(found: Sequence[RawEntries]) -> set[_Cell]:
    """Where elements lie; cells of levels of different sizes are different cells."""
    cells: set[_Cell] = set()
    for entries in found:
        size = entries.shape[-2:] if len(entries.shape) == 4 else ()
        for place in entries.places.tolist():
            cells.add((*size, *place[-2:]) if size else (0, *place[:-1]))
    return cells


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    """Indices ``(n, ndim)`` of what is not zero, as ``Tensor.nonzero``."""
    values = values.detach()
    if (
        values.is_cpu
        and values.ndim == 4
        and values.shape[0] == 1
        and values.numel() > _FEW_VALUES
    ):
        # Cells first: to look at each channel is most of what a box costs here.
        rows, columns = values.abs().sum(dim=1)[0].nonzero().unbind(dim=1)
        channels, cells = values[0][:, rows, columns].nonzero().unbind(dim=1)
        batch = torch.zeros_like(channels)
        return torch.stack([batch, channels, rows[cells], columns[cells]], dim=1)
    return values.nonzero()


def _raw_gradients(
    scalar: torch.Tensor, raw: Mapping[HeadKey, torch.Tensor]
) -> dict[HeadKey, torch.Tensor]:
    found = zip(raw, gradients(scalar, list(raw.values())))
    return {key: gradient for key, gradient in found if gradient is not None}


def _entries(
    key: HeadKey,
    raw: Mapping[HeadKey, torch.Tensor],
    gradient: torch.Tensor,
    places: torch.Tensor,
) -> RawEntries:
    tensor, index = raw[key].detach(), tuple(places.t())
    return RawEntries(key, tuple(tensor.shape), places, tensor[index], gradient[index])


def wanted_outputs(anchors: Sequence[Anchor]) -> list[HeadKey]:
    """The raw outputs in which the anchors lie, each once."""
    return sorted({key for anchor in anchors for key in anchor.keys})


ScoreLink = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""From raw elements, ``(N, n)`` per raw output, to scores ``(N,)``."""


def score_link(anchor: Anchor, score: float) -> ScoreLink | None:
    """Find how a head makes a final score of its raw outputs at the anchor.

    The forms that detectors use are tried: a softmax over the classes, also of the
    mean of several stages; the product of the sigmoids of everything that takes
    part, and its square root. The one that gives the score and its gradient is it.

    Args:
        anchor (Anchor): Of the score.
        score (float): The score.

    Returns:
        Callable: None if no form is right.
    """
    if not anchor.entries:
        return None
    labels = [[int(p[-1]) for p in e.places.tolist()] for e in anchor.entries]
    own = labels[0]

    def product(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([v.sigmoid() for v in raw], dim=1).prod(dim=1)

    def root(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return product(raw).sqrt()

    def softmax(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        mean = torch.stack(list(raw)).mean(dim=0)
        return mean.softmax(dim=-1)[:, own.index(anchor.label)]

    forms = [product, root]
    if len(own) > 1 and anchor.label in own and all(row == own for row in labels):
        forms.insert(0, softmax)
    return next((form for form in forms if _is_link(form, anchor, score)), None)


def _is_link(link: ScoreLink, anchor: Anchor, score: float) -> bool:
    with torch.enable_grad():
        leaves = [e.values.double()[None].requires_grad_() for e in anchor.entries]
        made = link(leaves)
        slopes = torch.autograd.grad(made.sum(), leaves)
    if abs(float(made[0].detach()) - score) > 1e-3 * max(score, 1e-6):
        return False
    for slope, entries in zip(slopes, anchor.entries):
        expected = entries.gradient.double()
        scale = max(float(expected.abs().max()), 1e-12)
        if float((slope[0] - expected).abs().max()) > 1e-2 * scale:
            return False
    return True


def linear_link(anchor: Anchor) -> ScoreLink:
    """To first order, the scalar of an anchor from its raw outputs."""

    def link(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [(v * e.gradient).sum(dim=1) for v, e in zip(raw, anchor.entries)]
        return torch.stack(parts).sum(dim=0)

    return link


def gather(entries: RawEntries, output: torch.Tensor) -> torch.Tensor:
    """Read an anchor's elements in replayed raw outputs.

    Args:
        entries (RawEntries): What to read.
        output (Tensor): The raw output with a batch of N in place of 1.

    Returns:
        Tensor: ``(N, n)``.

    Raises:
        VisError: If more than the batch differs from what was recorded.
    """
    index = list(entries.places.to(output.device).t())
    axis = _batch_axis(entries.shape, tuple(output.shape))
    if axis is None:
        return output[tuple(index)][None]
    index[axis] = torch.arange(output.shape[axis], device=output.device)[:, None]
    return output[tuple(i if d == axis else i[None] for d, i in enumerate(index))]


def _batch_axis(recorded: tuple[int, ...], replayed: tuple[int, ...]) -> int | None:
    """The axis along which a replay was batched, None if it was not."""
    if recorded == replayed:
        return None
    axes = [i for i, (a, b) in enumerate(zip(recorded, replayed)) if a != b]
    if len(recorded) != len(replayed) or len(axes) != 1 or recorded[axes[0]] != 1:
        raise VisError(f"raw outputs of {replayed} do not follow those of {recorded}")
    return axes[0]
