"""What is explained: one scalar per detection, and where the head decides it.

A final score depends on the raw outputs of the head at one place only, the anchor
that made the box: a cell of one pyramid level, a query or a region. The gradient of
the score finds it for any head, and tells which raw outputs take part.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import VisConfigError, VisError

BOX_SIDES = ("x1", "y1", "x2", "y2")
TARGETS = ("score", "logit", "objectness", *BOX_SIDES)

RawKey = tuple[str, int, tuple[Any, ...]]
"""Path of a head, number of its call, and place in its nested output."""

_RATIO_TOLERANCE = 1e-3
# Up to here one look at everything is faster than a look at the cells before.
_FEW_VALUES = 100_000


def validate_target(target: Any) -> None:
    """Check the name of a target.

    Raises:
        VisConfigError: If there is none of this name.
    """
    if target not in TARGETS:
        near = difflib.get_close_matches(str(target), TARGETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise VisConfigError(
            f"target={target!r} is unknown; {hint}Use one of "
            f"{', '.join(map(repr, TARGETS))}"
        )


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

    key: RawKey
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
    def keys(self) -> tuple[RawKey, ...]:
        """The raw outputs that take part."""
        return tuple(entries.key for entries in self.entries)

    @property
    def map_hw(self) -> tuple[int, int]:
        """Height and width of the raw outputs, for an anchor with a cell."""
        height, width = self.entries[0].shape[-2:]
        return height, width


def locate_anchors(
    scalars: torch.Tensor,
    labels: Sequence[int],
    raw: Mapping[RawKey, torch.Tensor],
) -> list[Anchor]:
    """Find the elements of the raw outputs that decided scalars.

    All of them are found by two backward passes, of the sum of the scalars and of
    their weighted sum: the ratio of both gradients is the weight, and so the number,
    of the scalar that an element belongs to. Scalars of one cell may share elements,
    as boxes of two classes from one anchor do, and are looked for again, one of each
    cell at a time.

    Args:
        scalars (Tensor): ``(K,)`` with a graph.
        labels (Sequence[int]): Class of each detection.
        raw (Mapping): Raw outputs of the heads.

    Returns:
        list[Anchor]: One per scalar.
    """
    found: list[list[RawEntries]] = [[] for _ in range(len(scalars))]
    alone = set(range(len(scalars)))
    if len(alone) > 2:
        alone, cells = _locate_together(scalars, sorted(alone), raw, found)
        for group in _one_per_cell({k: own for k, own in cells.items() if k in alone}):
            if len(group) > 2:
                unclear, _ = _locate_together(scalars, group, raw, found)
                alone -= set(group) - unclear
    for k in alone:
        found[k] = []
        for key, gradient in _raw_gradients(scalars[k], raw).items():
            places = _nonzero(gradient)
            if len(places):
                found[k].append(_entries(key, raw[key], gradient, places))
    return [Anchor(label, tuple(f)) for label, f in zip(labels, found)]


_Cell = tuple[int, ...]


def _one_per_cell(cells: Mapping[int, set[_Cell]]) -> list[list[int]]:
    """Groups of scalars no two of which share a cell."""
    groups: list[list[int]] = []
    taken: list[set[_Cell]] = []
    for number, own in sorted(cells.items()):
        for group, used in zip(groups, taken):
            if not own & used:
                group.append(number)
                used |= own
                break
        else:
            groups.append([number])
            taken.append(set(own))
    return groups


def _locate_together(
    scalars: torch.Tensor,
    members: Sequence[int],
    raw: Mapping[RawKey, torch.Tensor],
    found: list[list[RawEntries]],
) -> tuple[set[int], dict[int, set[_Cell]]]:
    """Fill ``found`` for some scalars.

    Returns:
        tuple: The members for which that cannot be trusted, and the cells where
        elements of each were found.
    """
    count = len(members)
    own_scalars = scalars[list(members)]
    numbers = torch.arange(
        1, count + 1, device=own_scalars.device, dtype=own_scalars.dtype
    )
    once = _raw_gradients(own_scalars.sum(), raw)
    weighted = _raw_gradients((own_scalars * numbers).sum(), raw)
    shared_cells: set[_Cell] = set()
    cells: dict[int, set[_Cell]] = {}
    for member in members:
        found[member] = []
    for key, gradient in once.items():
        places = _nonzero(weighted[key])
        if not len(places):
            continue
        index = tuple(places.t())
        ratio = (weighted[key][index] / gradient[index]).double()
        number = ratio.round()
        clear = (ratio - number).abs() <= _RATIO_TOLERANCE
        clear &= (number >= 1) & (number <= count)
        owners = torch.where(clear, number - 1, -1.0).long().tolist()
        # Cells of levels of different sizes are different cells.
        size = raw[key].shape[-2:]
        by_owner: dict[int, list[int]] = {}
        for row, (owner, place) in enumerate(zip(owners, places.tolist())):
            cell = (*size, *place[-2:]) if len(place) == 4 else (0, *place[:-1])
            if owner < 0:
                shared_cells.add(cell)
            else:
                by_owner.setdefault(members[owner], []).append(row)
                cells.setdefault(members[owner], set()).add(cell)
        for member, rows in by_owner.items():
            found[member].append(_entries(key, raw[key], gradient, places[rows]))
    unclear = set(members) - set(cells)
    owners_of: dict[_Cell, list[int]] = {}
    for member, own in cells.items():
        if own & shared_cells:
            unclear.add(member)
        for cell in own:
            owners_of.setdefault(cell, []).append(member)
    # Two scalars in one cell may share an element whose gradients look like a third's.
    for owners_here in owners_of.values():
        if len(owners_here) > 1:
            unclear.update(owners_here)
    return unclear, cells


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
    scalar: torch.Tensor, raw: Mapping[RawKey, torch.Tensor]
) -> dict[RawKey, torch.Tensor]:
    reachable = {key: tensor for key, tensor in raw.items() if tensor.requires_grad}
    if not reachable or not scalar.requires_grad:
        return {}
    gradients = torch.autograd.grad(
        scalar, list(reachable.values()), retain_graph=True, allow_unused=True
    )
    return {k: g for k, g in zip(reachable, gradients) if g is not None}


def _entries(
    key: RawKey, tensor: torch.Tensor, gradient: torch.Tensor, places: torch.Tensor
) -> RawEntries:
    index = tuple(places.t())
    return RawEntries(
        key, tuple(tensor.shape), places, tensor.detach()[index], gradient[index]
    )


def class_logits(anchor: Anchor) -> list[tuple[RawKey, tuple[int, ...]]]:
    """Places of the raw class logits of a detection, one per stage of a cascade.

    Heads give their class scores before everything else, and their class axis has
    the number of the label, or the only element that the score depends on.

    Args:
        anchor (Anchor): Of a *score*.

    Raises:
        VisError: If the score does not depend on a class logit that can be told.
    """
    logits = []
    for entries in _class_entries(anchor):
        places = [tuple(place) for place in entries.places.tolist()]
        if len(places) > 1:
            # A softmax: every class of the row takes part.
            places = [place for place in places if place[-1] == anchor.label]
        if len(places) != 1:
            raise VisError(
                "the class logit of a detection cannot be told from the other raw "
                f"outputs of {entries.key[0]}; use target='score'"
            )
        logits.append((entries.key, places[0]))
    return logits


def objectness_logits(anchor: Anchor) -> list[tuple[RawKey, tuple[int, ...]]]:
    """Places of the raw objectness or centerness of a detection.

    Args:
        anchor (Anchor): Of a *score*.

    Raises:
        VisConfigError: If the head has none.
    """
    own = {entries.key for entries in _class_entries(anchor)}
    others = [entries for entries in anchor.entries if entries.key not in own]
    places = [
        (entries.key, tuple(entries.places[0].tolist()))
        for entries in others
        if len(entries.places) == 1
    ]
    if not places and anchor.entries:
        raise VisConfigError(
            "target='objectness' cannot work: the scores of this detector depend on "
            "class scores only; use target='score' or 'logit'"
        )
    return places


def _class_entries(anchor: Anchor) -> list[RawEntries]:
    """Of each call of a head the first raw output that takes part."""
    first: dict[tuple[str, int], RawEntries] = {}
    for entries in anchor.entries:
        call = entries.key[:2]
        if entries.key[2][:1] not in ((), (0,)):
            continue  # the class score of this call is saturated
        if call not in first or entries.key[2] < first[call].key[2]:
            first[call] = entries
    return list(first.values())


ScoreLink = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""From raw elements, ``(N, n)`` per raw output, to scores ``(N,)``."""


def score_link(anchor: Anchor, score: float) -> ScoreLink:
    """Find how a head makes a final score of its raw outputs at the anchor.

    The forms that detectors use are tried: a softmax over the classes, also of the
    mean of several stages; the product of the sigmoids of everything that takes
    part, and its square root. The one that gives the score and its gradient is it.

    Args:
        anchor (Anchor): Of the score.
        score (float): The score.

    Raises:
        VisError: If none does.
    """
    values = [entries.values.double()[None] for entries in anchor.entries]
    gradient = [entries.gradient.double() for entries in anchor.entries]
    labels = [
        [int(place[-1]) for place in entries.places.tolist()]
        for entries in anchor.entries
    ]

    def softmax(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        column = labels[0].index(anchor.label)
        return torch.stack(list(raw)).mean(dim=0).softmax(dim=-1)[:, column]

    def product(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([v.sigmoid() for v in raw], dim=1).prod(dim=1)

    def root(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return product(raw).sqrt()

    forms: list[ScoreLink] = [product, root]
    if (
        labels
        and all(row == labels[0] for row in labels)
        and (len(labels[0]) > 1 and anchor.label in labels[0])
    ):
        forms.insert(0, softmax)
    for form in forms if values else ():
        with torch.enable_grad():
            leaves = [v.clone().requires_grad_() for v in values]
            made = form(leaves)
            slopes = torch.autograd.grad(made.sum(), leaves)
        fits = abs(float(made[0].detach()) - score) <= 1e-3 * max(score, 1e-6)
        for slope, expected in zip(slopes, gradient):
            scale = max(float(expected.abs().max()), 1e-12)
            fits = fits and float((slope[0] - expected).abs().max()) <= 1e-2 * scale
        if fits:
            return form
    raise VisError(
        "how this detector makes a score of its raw outputs is not known, so a box "
        "cannot be scored at its own anchor; use target='logit' or a gradient method"
    )


def gather(
    entries: RawEntries,
    output: torch.Tensor,
    offsets: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Read an anchor's elements in replayed raw outputs.

    Args:
        entries (RawEntries): What to read.
        output (Tensor): The raw output with a batch of N in place of 1; or on N
            crops of a map.
        offsets (Sequence, optional): Row and column at which each crop begins.

    Returns:
        Tensor: ``(N, n)``.
    """
    index = list(entries.places.to(output.device).t())
    if offsets is not None:
        begin = torch.tensor(offsets, device=output.device)
        batch = torch.arange(len(output), device=output.device)[:, None]
        rows = index[-2][None] - begin[:, :1]
        columns = index[-1][None] - begin[:, 1:]
        return output[batch, index[1][None], rows, columns]
    axis = batch_axis(entries.shape, tuple(output.shape))
    if axis is None:
        return output[tuple(index)][None]
    index[axis] = torch.arange(output.shape[axis], device=output.device)[:, None]
    return output[tuple(i if d == axis else i[None] for d, i in enumerate(index))]


def batch_axis(recorded: tuple[int, ...], replayed: tuple[int, ...]) -> int | None:
    """The axis along which a replay was batched, None if it was not.

    Raises:
        VisError: If more than the batch differs.
    """
    if recorded == replayed:
        return None
    axes = [i for i, (a, b) in enumerate(zip(recorded, replayed)) if a != b]
    if len(recorded) != len(replayed) or len(axes) != 1 or recorded[axes[0]] != 1:
        raise VisError(f"raw outputs of {replayed} do not follow those of {recorded}")
    return axes[0]
