"""Re-runs only that part of a network which depends on one layer, in batches.

What runs is told in :mod:`.partial`. Calls that follow the layer, but from which no
gradient leads to what is wanted, give their recorded outputs too: other pyramid levels
of a head, and what feeds a choice. The proposals of a two-stage detector and the
queries that an encoder selects stay those of the image, as a score at the box's own
anchor needs it.

Whether that is right is tried once per layer and wanted outputs against whole
forwards; a network that hides a state, or takes another way for other values, does
not pass, and then whole forwards are run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import Logger
from typing import Any

import torch
from torch import nn

from .graph import HeadKey
from .partial import (
    Job,
    OtherCallsError,
    PartialRun,
    ReplayTarget,
    batch_axis,
    leading_elsewhere,
    whole_run,
)
from .trace import CallKey, CallTrace, ReplayError, trace_forward

_TOLERANCE = 1e-4
# Half precision rounds more than that.
_TOLERANCE_IN_EPS = 8
# Other batch sizes take other kernels, which round otherwise, most with TF32. What
# mixes the images of a batch is wrong by as much as they differ.
_BATCH_TOLERANCE = 0.02
# Values that the modules of a replay may put out at once. A CPU is fastest while
# they stay in its caches; a GPU wants to be filled.
_VALUES_AT_ONCE = {"cpu": 90_000_000}
_VALUES_AT_ONCE_ELSEWHERE = 2_000_000_000
_BATCH_SIZES = (4, 32)


@dataclass(frozen=True)
class _Decision:
    """How a target is replayed: the outcome of the trial.

    Attributes:
        way: ``'batch'``, ``'single'`` for one value at a time, or ``'whole'`` for
            whole forwards.
        held: Calls that give their recorded outputs although they depend on the
            target. None of them is part of another.
        size: Number of elements that the calls put out for one value.
        layout: How a batch lies in memory. A CPU is half again as fast with the
            channels last, which operators of MMCV take for another order of values.
    """

    way: str
    held: frozenset[CallKey] = frozenset()
    size: int = 0
    layout: torch.memory_format = torch.contiguous_format


class ReplayEngine:
    """Makes replays of a detector, and remembers how each target is replayed.

    Args:
        detector (nn.Module): The detector, without wrappers. It must be ``frozen``
            whenever something is run.
        logger (Logger): Told where whole forwards have to be run.
    """

    def __init__(self, detector: nn.Module, logger: Logger) -> None:
        self._modules = {path: m for path, m in detector.named_modules() if path}
        self._logger = logger
        self._decisions: dict[tuple, _Decision] = {}
        self._modified: set[CallKey] = set()

    def replay(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
        recorded: dict[str, CallTrace],
    ) -> Replay:
        """Give what re-runs the network from a target to raw outputs.

        Args:
            forward (Callable): Runs ``predict`` of the detector on the image.
            target (ReplayTarget): What will be replaced. Its first axis is that of
                the images.
            wanted (Sequence[HeadKey]): What will be computed.
            recorded (dict): Belongs to the image: empty at first, it keeps what a
                whole forward computed for further replays.

        Raises:
            ReplayError: If the target does not run, or has no influence on what is
                wanted.
        """
        if "trace" not in recorded:
            recorded["trace"] = self._recorded(forward)
        job = Job(self._modules, forward, target, tuple(wanted), recorded["trace"])
        return Replay(job, self._decisions, self._logger)

    def trace(self, forward: Callable[[], Any]) -> CallTrace:
        """Run a whole forward and keep everything.

        Args:
            forward (Callable): Runs ``predict`` of the detector on an image.
        """
        return trace_forward(self._modules, forward)

    def _recorded(self, forward: Callable[[], Any]) -> CallTrace:
        """A trace whose outputs are those at the end of each call."""
        trace = trace_forward(self._modules, forward, self._modified)
        while modified := trace.modified():
            self._modified |= modified
            trace = trace_forward(self._modules, forward, self._modified)
        return trace


class Replay:
    """Gives the wanted raw outputs of one image for other values of the target.

    Args:
        job (Job): What is replaced and wanted.
        decisions (dict): How targets are replayed; gets an entry for a new one.
        logger (Logger): Told where whole forwards have to be run.
    """

    def __init__(
        self, job: Job, decisions: dict[tuple, _Decision], logger: Logger
    ) -> None:
        self._job = job
        self._decisions = decisions
        self._logger = logger
        self._key = (job.target, job.wanted)
        self._rows = job.trace.num_rows()
        if self._key not in decisions:
            decisions[self._key] = self._decide()

    def batch_size(self, asked: int | None = None) -> int:
        """How many values run at once.

        Args:
            asked (int, optional): What the user set; None takes what is fast.

        Returns:
            int: 1 where they run one at a time anyway.
        """
        decision = self._decisions[self._key]
        if decision.way != "batch":
            return 1
        if asked is not None:
            return asked
        device = self._job.trace.raw(self._job.wanted[0]).device.type
        most = _VALUES_AT_ONCE.get(device, _VALUES_AT_ONCE_ELSEWHERE)
        least, greatest = _BATCH_SIZES
        return min(max(most // max(1, decision.size), least), greatest)

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs.

        Args:
            batch (Tensor): ``(N, ...)``, N values for the target.

        Returns:
            list[Tensor]: One per wanted output, with N in place of the first axis of
            size 1; with a graph if gradients are enabled and ``batch`` has one.

        Raises:
            ReplayError: If an output has no axis for several values.
        """
        decision = self._decisions[self._key]
        if len(batch) > 1 and (decision.way != "batch" or len(batch) in self._rows):
            # What is left of a batch of as many as anything else has rows.
            return list(map(_joined, self.run(batch[:1]), self.run(batch[1:])))
        if decision.way == "whole":
            return whole_run(self._job, lambda _: batch)
        try:
            if len(batch) > 1:
                batch = batch.contiguous(memory_format=decision.layout)
            return PartialRun(self._job, batch, decision.held).run()
        except OtherCallsError as error:
            self._decisions[self._key] = self._give_up(error)
            return self.run(batch)

    def _decide(self) -> _Decision:
        """Try the recorded value and another one against whole forwards."""
        path, wanted = self._job.target.call.path, self._job.wanted
        recorded = [self._job.trace.raw(key) for key in wanted]
        seen: list[torch.Tensor] = []

        def other(value: torch.Tensor) -> torch.Tensor:
            seen.append(value.detach().clone())
            return _rippled(seen[0])

        self._job.trace.position(self._job.target.call)
        with torch.no_grad():
            expected = whole_run(self._job, other)
        if not seen:
            raise ReplayError(
                f"{path} has no tensor at {self._job.target.place}, or runs too late"
            )
        if seen[0].shape[0] != 1:
            raise ReplayError(
                f"{path} gives {tuple(seen[0].shape)}, whose first axis is not that of "
                "the images"
            )
        if all(map(torch.equal, recorded, expected)):
            heads = ", ".join(sorted({key.path for key in wanted}))
            raise ReplayError(f"{path} has no influence on {heads}")
        try:
            return self._tried(seen[0], recorded, expected)
        except Exception as error:  # whatever a network raises that is run otherwise
            return self._give_up(error)

    def _tried(
        self,
        value: torch.Tensor,
        recorded: list[torch.Tensor],
        expected: list[torch.Tensor],
    ) -> _Decision:
        job, other = self._job, _rippled(value)
        held, reads_values = leading_elsewhere(job, value)
        with torch.no_grad():
            single = PartialRun(job, other, held)
            found = single.run()
            if held and not all(map(_agree, found, expected)):
                # Another value makes a network choose other regions or queries.
                expected = whole_run(job, lambda _: other, held)
            again = PartialRun(job, value, held).run()
            for key, pairs in zip(
                self._job.wanted * 2, zip(found + again, expected + recorded)
            ):
                if not _agree(*pairs):
                    raise ReplayError(
                        f"{key.path} gave other values than in a whole forward"
                    )
            count = next(n for n in itertools.count(2) if n not in self._rows)
            batch = torch.cat([value, *[other] * (count - 1)])
            layouts = [] if reads_values else [torch.contiguous_format]
            if layouts and value.is_cpu and value.ndim == 4:
                layouts.insert(0, torch.channels_last)
            for layout in layouts:
                try:
                    laid = batch.contiguous(memory_format=layout)
                    rows = PartialRun(job, laid, held).run()
                except Exception:  # whatever a network raises that was given one image
                    continue
                if all(map(_is_batch_of, rows, recorded, expected)):
                    return _Decision("batch", held, single.size, layout)
        return _Decision("single", held)

    def _give_up(self, error: Exception) -> _Decision:
        self._logger.warning(
            "Whole forwards are run for what depends on "
            f"{self._job.target.call.path}, since it cannot be re-run by itself: "
            f"{error or type(error).__name__}"
        )
        return _Decision("whole")


def _rippled(value: torch.Tensor) -> torch.Tensor:
    """Other values that are like those: no random number is drawn for them."""
    waves = torch.arange(value.numel(), device=value.device).cos().to(value.dtype)
    return value * (0.8 + 0.1 * waves.reshape(value.shape))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max()) if one.numel() else 0.0


def _agree(found: torch.Tensor, expected: torch.Tensor, slack: float = 0.0) -> bool:
    if found.shape != expected.shape:
        return False
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    precision = 0.0
    if expected.is_floating_point():
        precision = _TOLERANCE_IN_EPS * torch.finfo(expected.dtype).eps
    allowed = max(_TOLERANCE, precision) * max(1e-6, largest)
    return _difference(found, expected) <= max(allowed, slack)


def _is_batch_of(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a batch gave what its first two values gave by themselves."""
    axis = batch_axis(first.shape, rows.shape)
    if axis is None or rows.shape == first.shape:
        return False
    slack = _BATCH_TOLERANCE * _difference(first, second)
    return all(
        _agree(rows.narrow(axis, n, 1), alone, slack)
        for n, alone in enumerate((first, second))
    )


def _joined(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    axis = batch_axis(first.shape, rest.shape)
    if axis is None:
        raise ReplayError("the raw outputs have no axis for several values")
    return torch.cat([first, rest], axis)
