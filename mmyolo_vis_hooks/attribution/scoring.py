"""Scores boxes at their own anchors in what a network gives for changed values."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..network.graph import HeadKey, head_modules
from ..network.nested import flatten_tensors
from .anchors import gather, linear_link, score_link, wanted_outputs
from .progress import track
from .spots import Case


class Rerun(Protocol):
    """Gives raw outputs for changed values of something."""

    def batch_size(self, asked: int | None) -> int:
        """How many values run at once: as many as asked for, or what is fast."""

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """The wanted raw outputs for values ``(n, ...)``, with n in place of 1."""


class InputRerun:
    """Raw outputs for other images: forwards that end where these are known.

    Args:
        detector (nn.Module): The detector; must be ``frozen``.
        metainfo (Mapping): Of the image's data sample.
        wanted (Sequence[HeadKey]): The raw outputs.
    """

    def __init__(
        self,
        detector: nn.Module,
        metainfo: Mapping[str, Any],
        wanted: Sequence[HeadKey],
    ) -> None:
        self._detector = detector
        self._metainfo = metainfo
        self._wanted = wanted

    def batch_size(self, asked: int | None) -> int:
        """A GPU wants to be filled; a processor is no faster with many."""
        on_cpu = next(self._detector.parameters()).device.type == "cpu"
        return asked or (4 if on_cpu else 32)

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Run images ``(n, 3, H, W)``."""
        found: dict[HeadKey, torch.Tensor] = {}
        counts: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            for path, head in head_modules(self._detector).items():
                hook = partial(self._keep, found, counts, path)
                stack.callback(head.register_forward_hook(hook).remove)
            stack.enter_context(contextlib.suppress(_Known))
            samples = [DetDataSample(metainfo=dict(self._metainfo)) for _ in batch]
            self._detector(batch, samples, mode="predict")
        return [found[key] for key in self._wanted]

    def _keep(
        self,
        found: dict[HeadKey, torch.Tensor],
        counts: Counter[str],
        path: str,
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> None:
        for index, tensor in flatten_tensors(output):
            found[HeadKey(path, counts[path], index)] = tensor
        counts[path] += 1
        if all(key in found for key in self._wanted):
            raise _Known


class _Known(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


class Scorer:
    """Scores boxes in raw outputs that are run again, a batch of values at a time.

    Args:
        case (Case): The boxes.
        members (Sequence[int]): Which K of them; all have an anchor.
        rerun (Callable): Gives what runs changed values, for the wanted raw outputs.
        batch_size (int, optional): How many values run at once; None takes what suits
            the network.
        show_progress (bool): Show a bar on a terminal.
    """

    def __init__(
        self,
        case: Case,
        members: Sequence[int],
        rerun: Callable[[Sequence[HeadKey]], Rerun],
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
        self._rerun = rerun(self._wanted)
        self.batch_size = self._rerun.batch_size(batch_size)

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
        outputs = dict(zip(self._wanted, self._rerun.run(values)))
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
