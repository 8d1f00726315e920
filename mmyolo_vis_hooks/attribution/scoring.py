"""Scores boxes at their own anchors in what a network gives for changed values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..network.replay import ReplayEngine, ReplayTarget
from .anchors import gather, linear_link, score_link, wanted_outputs
from .progress import track
from .spots import Case

NETWORK_INPUT = ("backbone", 0)
"""The call whose first argument is the network's input."""


class Scorer:
    """Scores boxes in replayed raw outputs, a batch of changed values at a time.

    Args:
        engine (ReplayEngine): Runs what depends on the target.
        case (Case): The boxes.
        members (Sequence[int]): Which K of them; all have an anchor.
        target (ReplayTarget): What is changed.
        batch_size (int, optional): How many values run at once; None takes what suits
            the network.
        show_progress (bool): Show a bar on a terminal.
    """

    def __init__(
        self,
        engine: ReplayEngine,
        case: Case,
        members: Sequence[int],
        target: ReplayTarget,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self._anchors = [(case.anchors or [])[k] for k in members]
        if case.target.name == "score":
            scores = case.scalars[list(members)].tolist()
            links = list(map(score_link, self._anchors, scores))
        else:
            links = list(map(linear_link, self._anchors))
        self.knows_scores = all(link is not None for link in links)
        self._links = [link for link in links if link is not None]
        self._wanted = wanted_outputs(self._anchors)
        self._show_progress = show_progress
        self._replay = engine.replay(case.forward, target, self._wanted, case.recorded)
        self.batch_size = self._replay.batch_size(batch_size)

    def recorded_scores(self) -> torch.Tensor:
        """The scores as they were, ``(K,)`` float64."""
        scores = [
            link([entries.values[None] for entries in anchor.entries])[0]
            for anchor, link in zip(self._anchors, self._links)
        ]
        return torch.stack(scores).double()

    @torch.no_grad()
    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """Scores ``(n, K)`` float64 for values ``(n, ...)`` of the target."""
        outputs = dict(zip(self._wanted, self._replay.run(values)))
        columns = [
            link([gather(entries, outputs[entries.key]) for entries in anchor.entries])
            for anchor, link in zip(self._anchors, self._links)
        ]
        return torch.stack(columns, dim=1).double()

    def scores_of_many(
        self, count: int, values: Callable[[slice], torch.Tensor], title: str
    ) -> torch.Tensor:
        """The same for ``count`` values, made batch by batch, under a progress bar."""
        begins = range(0, count, self.batch_size)
        found = [
            self.scores(values(slice(begin, min(begin + self.batch_size, count))))
            for begin in track(begins, title, self._show_progress)
        ]
        return torch.cat(found)
