"""Re-runs only that part of a network which depends on one layer, in batches.

What runs is told in :mod:`.partial`. Calls that follow the layer, but from which no
gradient leads to what is wanted, give their recorded outputs too: other pyramid levels
of a head, and what feeds a choice. So the proposals of a two-stage detector and the
queries that an encoder selects stay those of the image, as a score at the box's own
anchor needs it.

Whether that is right is tried once per layer and wanted outputs against whole
forwards; where it is not, as in a network that hides a state, these are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from logging import Logger
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .nested import flatten_tensors
from .partial import Job, OtherCallsError, PartialRun
from .trace import CallKey, ReplayError, submodules

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
_READING = frozenset(
    ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy")
)


@dataclass(frozen=True)
class _Decision:
    """How a target is replayed: the outcome of the trial."""

    way: str  # 'batch', 'single' for one value at a time, or 'whole' forwards
    # Calls that give their recorded outputs although they depend on the target.
    held: frozenset[CallKey] = frozenset()
    size: int = 0  # elements that the calls put out for one value
    # A CPU is half again as fast with the channels last, which operators of MMCV take
    # for another order of values.
    layout: torch.memory_format = torch.contiguous_format


class ReplayEngine:
    """What the replays of a detector share: how each target is replayed.

    Args:
        detector (nn.Module): The detector, without wrappers. It must be ``frozen``
            whenever something is run.
        logger (Logger): Told where whole forwards have to be run.
    """

    def __init__(self, detector: nn.Module, logger: Logger) -> None:
        self.modules = submodules(detector)
        self.logger = logger
        self.decisions: dict[tuple, _Decision] = {}


class Replay:
    """Gives the wanted raw outputs of one image for other values of the target.

    Raises:
        ReplayError: If the target does not run, or has no influence on what is wanted.
    """

    def __init__(self, engine: ReplayEngine, job: Job) -> None:
        self.job = job
        self._engine = engine
        self._key = job.target, job.wanted
        if self._key not in engine.decisions:
            engine.decisions[self._key] = self._decide()

    @property
    def _decision(self) -> _Decision:
        return self._engine.decisions[self._key]

    def batch_size(self, asked: int | None = None) -> int:
        """How many values run at once: as many as asked for, or what is fast.

        It is 1 where they run one at a time anyway.
        """
        if self._decision.way != "batch":
            return 1
        if asked is not None:
            return asked
        device = self.job.trace.raw(self.job.wanted[0]).device.type
        most = _VALUES_AT_ONCE.get(device, _VALUES_AT_ONCE_ELSEWHERE)
        least, greatest = _BATCH_SIZES
        return min(max(most // max(1, self._decision.size), least), greatest)

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
        decision = self._decision
        if len(batch) > 1 and decision.way != "batch":
            rows = [self.run(value[None]) for value in batch]
            return [_joined(parts) for parts in zip(*rows)]
        if decision.way == "whole":
            return self.job.whole(batch)
        try:
            if len(batch) > 1:
                batch = batch.contiguous(memory_format=decision.layout)
            return PartialRun(self.job, batch, decision.held).run()
        except OtherCallsError as error:
            self._engine.decisions[self._key] = self._give_up(error)
            return self.run(batch)

    # The trial.

    def _decide(self) -> _Decision:
        """Try two values against whole forwards."""
        call, place, side = self.job.target
        self.job.trace.position(call)
        there = dict(flatten_tensors(self.job.trace.outputs[call]))
        if side == "input":
            there = {at[1:]: tensor for at, tensor in self.job.trace.given[call]}
        if place not in there:
            raise ReplayError(f"{call.path} has no tensor at {place}")
        value = there[place].clone()
        if value.shape[0] != 1:
            raise ReplayError(
                f"{call.path} gives {tuple(value.shape)}, whose first axis is not that "
                "of the images"
            )
        # No random number is drawn for others that are like those.
        waves = torch.arange(value.numel(), device=value.device).cos().to(value.dtype)
        other = value * (0.8 + 0.1 * waves.reshape(value.shape))
        with torch.no_grad():
            recorded = [self.job.trace.raw(key) for key in self.job.wanted]
            if all(map(torch.equal, recorded, self.job.whole(other))):
                heads = ", ".join(sorted({key.layer for key in self.job.wanted}))
                raise ReplayError(f"{call.path} has no influence on {heads}")
            try:
                return self._tried(value, other)
            except (
                Exception
            ) as error:  # whatever a network raises that is run otherwise
                return self._give_up(error)

    def _tried(self, *values: torch.Tensor) -> _Decision:
        held, reads_values = self._leading_elsewhere(values[0])
        expected = []
        for value in values:
            # Another value makes a network choose other regions or queries.
            expected.append(self.job.whole(value, held))
            run = PartialRun(self.job, value, held)
            if not all(map(_agree, run.run(), expected[-1])):
                raise ReplayError("it gave other values than in a whole forward")
        layouts = [] if reads_values else [torch.contiguous_format]
        if layouts and value.is_cpu and value.ndim == 4:
            layouts.insert(0, torch.channels_last)
        for layout in layouts:
            try:
                batch = torch.cat(values).contiguous(memory_format=layout)
                rows = PartialRun(self.job, batch, held).run()
            except Exception:  # whatever a network raises that was given one image
                continue
            if all(map(_is_batch_of, rows, *expected)):
                return _Decision("batch", held, run.size, layout)
        return _Decision("single", held)

    def _leading_elsewhere(
        self, value: torch.Tensor
    ) -> tuple[frozenset[CallKey], bool]:
        """Calls from which no gradient leads to what is wanted.

        And whether Python is told values: those of a batch would be chosen for
        together.
        """
        computed: list[tuple[int, torch.Tensor]] = []
        run = PartialRun(self.job, value.detach().requires_grad_(), (), computed)
        mode = _Attached(run)
        with torch.enable_grad(), mode:
            ends = [output for output in run.run() if output.requires_grad]
            found = [(n, tensor) for n, tensor in computed if tensor.requires_grad]
            if not ends or not found:
                return frozenset(), mode.reads_values
            total = torch.stack([end.float().sum() for end in ends]).sum()
            slopes = torch.autograd.grad(
                total, [tensor for _, tensor in found], allow_unused=True
            )
        live = {n for (n, _), slope in zip(found, slopes) if slope is not None}
        held, inside_until = set(), 0
        for position in sorted({n for n, _ in found} - live):
            if position >= inside_until:
                held.add(self.job.trace.keys[position])
                inside_until = self.job.trace.ends[position]
        return frozenset(held), mode.reads_values

    def _give_up(self, error: Exception) -> _Decision:
        self._engine.logger.warning(
            "Whole forwards are run for what depends on "
            f"{self.job.target.call.path}, since it cannot be re-run by itself: "
            f"{error or type(error).__name__}"
        )
        return _Decision("whole")


class _Attached(TorchFunctionMode):
    """Lets gradients through ``detach``, and sees what Python is told."""

    def __init__(self, run: PartialRun) -> None:
        super().__init__()
        self._run = run
        self.reads_values = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READING and self._run.is_past_target:
            self.reads_values |= not isinstance(args[0], nn.Parameter)
        func = torch.clone if func is torch.Tensor.detach else func
        return func(*args, **(kwargs or {}))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _agree(found: torch.Tensor, expected: torch.Tensor, slack: float = 0.0) -> bool:
    if found.shape != expected.shape:
        return False
    exact = not expected.is_floating_point()
    eps = 0.0 if exact else torch.finfo(expected.dtype).eps
    found, expected = found.float(), expected.float()
    share = max(_TOLERANCE, _TOLERANCE_IN_EPS * eps)
    allowed = max(share * max(1e-6, _largest(expected)), slack)
    return _largest(found - expected) <= allowed


def _is_batch_of(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a batch gave what its two values gave by themselves."""
    axis = batch_axis(first.shape, rows.shape)
    if axis is None or rows.shape == first.shape:
        return False
    slack = _BATCH_TOLERANCE * _largest(first.float() - second.float())
    return all(
        _agree(rows.narrow(axis, n, 1), alone, slack)
        for n, alone in enumerate((first, second))
    )


def batch_axis(single: Sequence[int], batch: Sequence[int]) -> int | None:
    """The axis of size 1 that has another size in a batch, or could have one."""
    axes = [i for i, (one, many) in enumerate(zip(single, batch)) if one != many]
    if not axes:
        return list(single).index(1) if 1 in single else None
    fits = len(axes) == 1 and len(single) == len(batch) and single[axes[0]] == 1
    return axes[0] if fits else None


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    axis = batch_axis(parts[0].shape, parts[0].shape)
    if axis is None:
        raise ReplayError("the raw outputs have no axis for several values")
    return torch.cat(list(parts), axis)
