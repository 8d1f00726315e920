"""Scores boxes at their own anchors in what a network gives for changed values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.progress import track

from ..errors import VisError
from ..network.graph import gradients
from ..network.partial import Job, ReplayTarget
from ..network.replay import Replay, ReplayEngine, batch_axis
from .anchors import Anchor, RawEntries, wanted_outputs
from .spots import Case

ScoreLink = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""From raw elements, ``(N, n)`` per raw output, to scores ``(N,)``."""


def score_link(anchor: Anchor, score: float) -> ScoreLink | None:
    """Find how a head makes a final score of its raw outputs at the anchor.

    The forms that detectors use are tried: a softmax over the classes, also of the
    mean of several stages; the product of the sigmoids of everything that takes
    part, and its square root. The one that gives the score and its gradient is it;
    None if there is none.
    """
    if not anchor.entries:
        return None
    sizes = {len(entries.values) for entries in anchor.entries}
    own = int(anchor.entries[0].gradient.argmax())  # of a softmax, only this raises it

    def product(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([v.sigmoid() for v in raw], dim=1).prod(dim=1)

    def root(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        return product(raw).sqrt()

    def softmax(raw: Sequence[torch.Tensor]) -> torch.Tensor:
        mean = torch.stack(list(raw)).mean(dim=0)
        return mean.softmax(dim=-1)[:, own]

    forms = [product, root]
    if len(sizes) == 1 and sizes != {1}:
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


class Scorer:
    """Scores K boxes in raw outputs that are run again, a batch of values at a time.

    The values are those of the target. A ``VisError`` says why boxes cannot be scored
    at their anchors.
    """

    def __init__(
        self,
        engine: ReplayEngine,
        options: Any,
        case: Case,
        *,
        members: Sequence[int],
        target: ReplayTarget,
        show: bool,
    ) -> None:
        if case.anchors is None:
            raise VisError(
                f"method={options.method!r} scores a box at its own anchor, which is "
                "known where a module called 'bbox_head' alone makes the score, and "
                f"{case.boxes.detector} has none that does; use a gradient method"
            )
        anchors = [case.anchors[k] for k in members]
        if case.target.name == "score":
            links = map(score_link, anchors, case.scalars[list(members)].tolist())
        else:
            links = map(linear_link, anchors)
        self._anchors = [(own, link) for own, link in zip(anchors, links) if link]
        if len(self._anchors) < len(anchors):
            raise VisError(
                "how this detector makes a score of its raw outputs is not known, so a "
                "box cannot be scored at its own anchor; use target='logit' or a "
                "gradient method"
            )
        wanted = tuple(wanted_outputs(anchors))
        job = Job(engine.modules, case.forward, case.trace(), target, wanted)
        self._replay = Replay(engine, job)
        self._show = show
        self.batch_size = self._replay.batch_size(options.batch_size)

    def recorded_scores(self) -> torch.Tensor:
        """The scores as they were, ``(K,)`` float64."""
        scores = [
            link([entries.values[None] for entries in anchor.entries])[0]
            for anchor, link in self._anchors
        ]
        return torch.stack(scores).double()

    @torch.no_grad()
    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """Scores ``(n, K)`` float64 for values ``(n, ...)`` of the target."""
        return torch.stack(self._columns(values), dim=1).double()

    @torch.enable_grad()
    def slopes(self, values: torch.Tensor) -> torch.Tensor:
        """Sums ``(K, ...)`` over values ``(n, ...)`` of each score's derivatives."""
        values = values.detach().requires_grad_()
        scores = self._columns(values)
        found = [gradients(score.sum(), [values])[0] for score in scores]
        nothing = torch.zeros_like(values)
        return torch.stack([(nothing if s is None else s).sum(dim=0) for s in found])

    def scores_of_many(
        self, count: int, values: Callable[[slice], torch.Tensor], title: str
    ) -> torch.Tensor:
        """The same for ``count`` values, made batch by batch, under a progress bar."""
        parts = self.parts(count, title)
        return torch.cat([self.scores(values(part)) for part in parts])

    def slopes_of_many(
        self, count: int, values: Callable[[slice], torch.Tensor], title: str
    ) -> torch.Tensor:
        """The sums of :meth:`slopes` over ``count`` values, made batch by batch."""
        total = torch.zeros(())
        for part in self.parts(count, title):
            slopes = self.slopes(values(part))
            total = total.to(slopes) + slopes
        return total

    def parts(self, count: int, title: str) -> Iterable[slice]:
        """Which of ``count`` values run at once, under a progress bar."""
        size = self.batch_size
        parts = [slice(b, min(b + size, count)) for b in range(0, count, size)]
        return track(parts, title, transient=True, disable=not self._show)

    def _columns(self, values: torch.Tensor) -> list[torch.Tensor]:
        outputs = dict(zip(self._replay.job.wanted, self._replay.run(values)))
        return [
            link([_read(entries, outputs[entries.key]) for entries in anchor.entries])
            for anchor, link in self._anchors
        ]


def _read(entries: RawEntries, output: torch.Tensor) -> torch.Tensor:
    """An anchor's elements ``(N, n)`` in a raw output with N in place of 1."""
    index = list(entries.places.to(output.device).t())
    if output.shape == entries.shape:
        return output[tuple(index)][None]
    axis = batch_axis(entries.shape, output.shape)
    if axis is None:
        raise VisError(
            f"raw outputs of {tuple(output.shape)} do not follow those of "
            f"{entries.shape}"
        )
    index[axis] = torch.arange(output.shape[axis], device=output.device)[:, None]
    return output[tuple(i if d == axis else i[None] for d, i in enumerate(index))]
