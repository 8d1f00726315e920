"""Re-runs only that part of a network which depends on one layer, in batches.

The detector's own ``forward`` runs again, and each module in it decides what to do: one
that had finished before the layer ran, or whose inputs are the very tensors that were
recorded, gives the output that was recorded; everything else computes.

Calls that follow the layer, but from which no gradient leads to what is wanted, give
their recorded outputs too: other pyramid levels of a head, and what feeds a choice. So
the proposals of a two-stage detector and the queries that an encoder selects stay those
of the image, as a score at the box's own anchor needs it.

Whether that is right is tried once per layer and wanted outputs against whole
forwards; where it is not, as in a network that hides a state, these are run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from logging import Logger
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .graph import HeadKey
from .nested import OutputIndex, flatten_tensors, map_tensors
from .trace import CallKey, CallTrace, ReplayError, patched_forwards, trace_forward

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
_INTEGERS = (torch.int64, torch.int32)
_READING = frozenset(
    ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy")
)


class ReplayTarget(NamedTuple):
    """The tensor that a replay replaces.

    Attributes:
        call: The call that gives or takes it.
        place: Where it lies in the nested output, or among the arguments.
        side: ``'output'`` or ``'input'``.
    """

    call: CallKey
    place: OutputIndex
    side: str = "output"


class OtherCallsError(ReplayError):
    """The network called other modules than had been recorded."""


class _Stop(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


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
        self.modules = {path: m for path, m in detector.named_modules() if path}
        self.logger = logger
        self.decisions: dict[tuple, _Decision] = {}

    def trace(self, forward: Callable[[], Any]) -> CallTrace:
        """Run ``predict`` on an image and keep everything."""
        return trace_forward(self.modules, forward)


class Replay:
    """Gives the wanted raw outputs of one image for other values of the target.

    Args:
        engine (ReplayEngine): Of the detector.
        forward (Callable): Runs ``predict`` of the detector on the image.
        trace (CallTrace): What it computed.
        target (ReplayTarget): What is replaced. Its first axis is that of the images.
        wanted (Sequence[HeadKey]): What is computed.

    Raises:
        ReplayError: If the target does not run, or has no influence on what is wanted.
    """

    def __init__(
        self,
        engine: ReplayEngine,
        forward: Callable[[], Any],
        trace: CallTrace,
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
    ) -> None:
        self.modules = engine.modules
        self.forward = forward
        self.trace = trace
        self.target = target
        self.wanted = tuple(wanted)
        self._engine = engine
        self._key = target, self.wanted
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
        device = self.trace.raw(self.wanted[0]).device.type
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
            return self._whole(lambda _: batch)
        try:
            if len(batch) > 1:
                batch = batch.contiguous(memory_format=decision.layout)
            return _PartialRun(self, batch, decision.held).run()
        except OtherCallsError as error:
            self._engine.decisions[self._key] = self._give_up(error)
            return self.run(batch)

    def _whole(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        held: Collection[CallKey] = (),
    ) -> list[torch.Tensor]:
        """The wanted outputs of a whole forward with another value of the target."""
        counts: Counter[str] = Counter()
        outputs: dict[HeadKey, torch.Tensor] = {}
        target = self.target

        def replaced(place: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            return change(tensor).clone() if place == target.place else tensor

        def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            key = CallKey(path, counts[path])
            counts[path] += 1
            if key in held:
                return map_tensors(self.trace.outputs[key], lambda _, t: t.clone())
            if key == target.call and target.side == "input":
                args = map_tensors(args, replaced)
            output = original(*args, **kwargs)
            if key == target.call and target.side == "output":
                output = map_tensors(output, replaced)
            self.collect(key, output, outputs)
            return output

        with patched_forwards(self.modules, call), contextlib.suppress(_Stop):
            self.forward()
        missing = sorted({key.path for key in self.wanted if key not in outputs})
        if missing:
            raise ReplayError(f"{', '.join(missing)} did not give what is wanted")
        return [outputs[key] for key in self.wanted]

    def collect(
        self, key: CallKey, output: Any, outputs: dict[HeadKey, torch.Tensor]
    ) -> None:
        """Keep what a call gave if it is wanted; end the forward if that is all."""
        if not any(wanted[:2] == key for wanted in self.wanted):
            return
        for index, tensor in flatten_tensors(output):
            outputs[HeadKey(*key, index)] = tensor
        if all(wanted in outputs for wanted in self.wanted):
            raise _Stop

    # The trial.

    def _decide(self) -> _Decision:
        """Try the recorded value and another one against whole forwards."""
        path, seen = self.target.call.path, []

        def other(value: torch.Tensor) -> torch.Tensor:
            seen.append(value.detach().clone())
            return _rippled(seen[0])

        self.trace.position(self.target.call)
        recorded = [self.trace.raw(key) for key in self.wanted]
        with torch.no_grad():
            expected = self._whole(other)
        if not seen:
            raise ReplayError(
                f"{path} has no tensor at {self.target.place}, or runs too late"
            )
        if seen[0].shape[0] != 1:
            raise ReplayError(
                f"{path} gives {tuple(seen[0].shape)}, whose first axis is not that of "
                "the images"
            )
        if all(map(torch.equal, recorded, expected)):
            heads = ", ".join(sorted({key.path for key in self.wanted}))
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
        other = _rippled(value)
        held, reads_values = self._leading_elsewhere(value)
        with torch.no_grad():
            single = _PartialRun(self, other, held)
            found = single.run()
            if held and not all(map(_agree, found, expected)):
                # Another value makes a network choose other regions or queries.
                expected = self._whole(lambda _: other, held)
            again = _PartialRun(self, value, held).run()
            pairs = zip(found + again, expected + recorded)
            for key, pair in zip(self.wanted * 2, pairs):
                if not _agree(*pair):
                    raise ReplayError(
                        f"{key.path} gave other values than in a whole forward"
                    )
            layouts = [] if reads_values else [torch.contiguous_format]
            if layouts and value.is_cpu and value.ndim == 4:
                layouts.insert(0, torch.channels_last)
            batch = torch.cat([value, other])
            for layout in layouts:
                try:
                    laid = batch.contiguous(memory_format=layout)
                    rows = _PartialRun(self, laid, held).run()
                except Exception:  # whatever a network raises that was given one image
                    continue
                if all(map(_is_batch_of, rows, recorded, expected)):
                    return _Decision("batch", held, single.size, layout)
        return _Decision("single", held)

    def _leading_elsewhere(
        self, value: torch.Tensor
    ) -> tuple[frozenset[CallKey], bool]:
        """Calls from which no gradient leads to what is wanted.

        And whether Python is told values: those of a batch would be chosen for
        together.
        """
        computed: list[tuple[int, torch.Tensor]] = []
        run = _PartialRun(self, value.detach().requires_grad_(), (), computed)
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
                held.add(self.trace.keys[position])
                inside_until = self.trace.ends[position]
        return frozenset(held), mode.reads_values

    def _give_up(self, error: Exception) -> _Decision:
        self._engine.logger.warning(
            "Whole forwards are run for what depends on "
            f"{self.target.call.path}, since it cannot be re-run by itself: "
            f"{error or type(error).__name__}"
        )
        return _Decision("whole")


class _PartialRun:
    """One run of what depends on the target. See the module's text for the rule."""

    def __init__(
        self,
        replay: Replay,
        batch: torch.Tensor,
        held: Collection[CallKey],
        computed: list[tuple[int, torch.Tensor]] | None = None,
    ) -> None:
        self._replay = replay
        self._batch = batch
        self._held = held
        self._computed = computed
        self._target = replay.trace.position(replay.target.call)
        self._next = self._depth = 0
        self._outputs: dict[HeadKey, torch.Tensor] = {}
        # Of recorded tensors what the network got: by id, which no other has meanwhile.
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.size = 0

    @property
    def is_past_target(self) -> bool:
        """Whether the target has been replaced."""
        return self._next > self._target

    def run(self) -> list[torch.Tensor]:
        """Compute the wanted outputs."""
        with patched_forwards(self._replay.modules, self._call):
            try:
                self._replay.forward()
            except _Stop:
                return [self._outputs[key] for key in self._replay.wanted]
        raise OtherCallsError("the forward ended before the wanted outputs")

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        position, trace, target = self._next, self._replay.trace, self._replay.target
        if position >= len(trace.keys) or trace.keys[position].path != path:
            raise OtherCallsError(f"{path} runs where another call had been recorded")
        key, end = trace.keys[position], trace.ends[position]
        follows = position > self._target
        if key == target.call and target.side == "output":
            output = map_tensors(trace.outputs[key], self._replaced)
        elif end <= self._target or (follows and self._is_recorded(key, args, kwargs)):
            output = map_tensors(trace.outputs[key], self._recorded)
        else:
            self._next += 1
            if key == target.call:
                args = map_tensors(args, self._replaced)
            if follows:
                args, kwargs = self._widened(args, kwargs)
            self._depth += 1
            output = original(*args, **kwargs)
            self._depth -= 1
            if self._next != end:
                raise OtherCallsError(f"{path} made other calls than recorded")
            if follows:
                tensors = [tensor for _, tensor in flatten_tensors(output)]
                self.size += sum(tensor.numel() for tensor in tensors)
                if self._computed is not None:
                    self._computed += [(position, tensor) for tensor in tensors]
        self._next = end
        self._replay.collect(key, output, self._outputs)
        return output

    def _is_recorded(self, key: CallKey, args: tuple, kwargs: dict) -> bool:
        """Whether a call that follows the target gives its recorded output."""
        if key in self._held:
            return True
        given = [tensor for _, tensor in flatten_tensors((args, kwargs))]
        recorded = self._replay.trace.given[key]
        return (
            bool(given)
            and len(given) == len(recorded)
            and all(
                self._given.get(id(one), (one, one))[1] is other
                for one, (_, other) in zip(given, recorded)
            )
        )

    def _recorded(self, _: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        """What the network gets of a recorded tensor, which nothing must change."""
        # The detector itself has a list of samples, which knows of one image.
        own = self._expanded(tensor) if self._depth else tensor
        own = tensor.clone() if own is tensor else own
        self._given[id(own)] = own, tensor
        return own

    def _replaced(self, place: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        if place == self._replay.target.place:
            return self._batch.clone()
        return tensor if self.is_past_target else self._recorded(place, tensor)

    def _widened(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Expand single images among arguments to the size of the batch beside them."""
        tensors = [tensor for _, tensor in flatten_tensors((args, kwargs))]
        rows = {tensor.shape[0] for tensor in tensors if tensor.ndim > 1}
        if len(self._batch) == 1 or not {1, len(self._batch)} <= rows:
            return args, kwargs

        def widened(_: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            own = self._expanded(tensor)
            if id(tensor) in self._given:
                self._given[id(own)] = own, self._given[id(tensor)][1]
            return own

        return map_tensors((args, kwargs), widened)

    def _expanded(self, tensor: torch.Tensor) -> torch.Tensor:
        # Integers are sizes and indices, which are no images' values.
        is_image = tensor.ndim > 1 and tensor.shape[0] == 1
        if len(self._batch) == 1 or not is_image or tensor.dtype in _INTEGERS:
            return tensor
        return tensor.expand(len(self._batch), *tensor.shape[1:])


class _Attached(TorchFunctionMode):
    """Lets gradients through ``detach``, and sees what Python is told."""

    def __init__(self, run: _PartialRun) -> None:
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
    """Whether a batch gave what its two values gave by themselves."""
    axis = batch_axis(first.shape, rows.shape)
    if axis is None or rows.shape == first.shape:
        return False
    slack = _BATCH_TOLERANCE * _difference(first, second)
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
