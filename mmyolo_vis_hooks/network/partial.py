"""Runs what depends on one layer, up to the raw outputs that are wanted.

A detector's own ``forward`` runs again, and each module in it decides what to do: one
that had finished before the layer ran, or whose inputs are the very tensors that were
recorded, gives the output that was recorded; everything else computes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .nested import OutputIndex, OutputKey, flatten_tensors, map_tensors
from .trace import CallKey, CallTrace, ReplayError, patched_forwards

_INTEGERS = (torch.int64, torch.int32)


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


class Stop(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


@dataclass(frozen=True)
class Job:
    """What is replaced in the forward of an image, and what is wanted of it.

    ``forward`` runs ``predict`` and computes the trace. The target's first axis is that
    of the images.
    """

    modules: Mapping[str, nn.Module]
    forward: Callable[[], Any]
    trace: CallTrace
    target: ReplayTarget
    wanted: tuple[OutputKey, ...]

    def whole(
        self, value: torch.Tensor, held: Collection[CallKey] = ()
    ) -> list[torch.Tensor]:
        """The wanted outputs of a whole forward with another value of the target."""
        counts: Counter[str] = Counter()
        outputs: dict[OutputKey, torch.Tensor] = {}
        target = self.target

        def replaced(place: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            return value.clone() if place == target.place else tensor

        def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            key = CallKey(path, counts[path])
            counts[path] += 1
            if key in held:
                begin = self.trace.position(key)
                inner = self.trace.keys[begin + 1 : self.trace.ends[begin]]
                counts.update(own.path for own in inner)
                return map_tensors(self.trace.outputs[key], lambda _, t: t.clone())
            if key == target.call and target.side == "input":
                args = map_tensors(args, replaced)
            output = original(*args, **kwargs)
            if key == target.call and target.side == "output":
                output = map_tensors(output, replaced)
            self.collect(key, output, outputs)
            return output

        with patched_forwards(self.modules, call), contextlib.suppress(Stop):
            self.forward()
        missing = sorted({key.layer for key in self.wanted if key not in outputs})
        if missing:
            raise ReplayError(f"{', '.join(missing)} did not give what is wanted")
        return [outputs[key] for key in self.wanted]

    def collect(
        self, key: CallKey, output: Any, outputs: dict[OutputKey, torch.Tensor]
    ) -> None:
        """Keep what a call gave if it is wanted; end the forward if that is all."""
        if any(wanted[:2] == key for wanted in self.wanted):
            for index, tensor in flatten_tensors(output):
                outputs[OutputKey(*key, index)] = tensor
            if all(wanted in outputs for wanted in self.wanted):
                raise Stop


class PartialRun:
    """One run of what depends on the target, for a batch ``(N, ...)`` of its values.

    Held calls give their recorded outputs in any case. ``computed`` gets position and
    tensors of the calls that compute.
    """

    def __init__(
        self,
        job: Job,
        batch: torch.Tensor,
        held: Collection[CallKey],
        computed: list[tuple[int, torch.Tensor]] | None = None,
    ) -> None:
        self._job = job
        self._batch = batch
        self._held = held
        self._computed = computed
        self._target = job.trace.position(job.target.call)
        self._next = 0
        self._outputs: dict[OutputKey, torch.Tensor] = {}
        # Of recorded tensors what the network got: by id, which no other has meanwhile.
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.size = 0

    @property
    def is_past_target(self) -> bool:
        """Whether the target has been replaced."""
        return self._next > self._target

    def run(self) -> list[torch.Tensor]:
        """Compute the wanted outputs."""
        calls = patched_forwards(self._job.modules, self._call)
        with calls, _Joining(len(self._batch)):
            try:
                self._job.forward()
            except Stop:
                return [self._outputs[key] for key in self._job.wanted]
        raise OtherCallsError("the forward ended before the wanted outputs")

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        position, trace, target = self._next, self._job.trace, self._job.target
        if position >= len(trace.keys) or trace.keys[position].path != path:
            raise OtherCallsError(f"{path} runs where another call had been recorded")
        key, end = trace.keys[position], trace.ends[position]
        follows = position > self._target
        if key == target.call and target.side == "output":
            output = map_tensors(trace.outputs[key], self._replaced)
        elif end <= self._target or (follows and self._is_recorded(key, args, kwargs)):
            given = self._repeated if key in self._held else self._recorded
            output = map_tensors(trace.outputs[key], given)
        else:
            self._next += 1
            if key == target.call:
                args = map_tensors(args, self._replaced)
            if follows:
                values = _widened([*args, *kwargs.values()], len(self._batch))
                args = tuple(values[: len(args)])
                kwargs = dict(zip(kwargs, values[len(args) :]))
            output = original(*args, **kwargs)
            if self._next != end:
                raise OtherCallsError(f"{path} made other calls than recorded")
            if follows:
                tensors = [tensor for _, tensor in flatten_tensors(output)]
                self.size += sum(tensor.numel() for tensor in tensors)
                if self._computed is not None:
                    self._computed += [(position, tensor) for tensor in tensors]
        self._next = end
        self._job.collect(key, output, self._outputs)
        return output

    def _is_recorded(self, key: CallKey, args: tuple, kwargs: dict) -> bool:
        """Whether a call that follows the target gives its recorded output."""
        if key in self._held:
            return True
        given = [tensor for _, tensor in flatten_tensors((args, kwargs))]
        recorded = self._job.trace.given[key]
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
        own = tensor.clone() if self._was_modified(tensor) else tensor
        self._given[id(own)] = own, tensor
        return own

    def _repeated(self, _: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        """The same for each value: a head may reshape it by the number of its rows."""
        rows = _rows(tensor, len(self._batch))
        return rows.clone() if self._was_modified(tensor) else rows

    def _was_modified(self, tensor: torch.Tensor) -> bool:
        """Whether it was modified in place after its call, and would be so again."""
        return tensor._version != self._job.trace.versions[id(tensor)]

    def _replaced(self, place: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        if place == self._job.target.place:
            return self._batch.clone()
        return tensor if self.is_past_target else self._recorded(place, tensor)


def _rows(value: Any, size: int) -> Any:
    """A single image as often as there are values; anything else as it is."""
    # Integers are sizes and indices, which are no images' values.
    if not isinstance(value, torch.Tensor) or value.dtype in _INTEGERS:
        return value
    is_image = value.ndim > 1 and value.shape[0] == 1
    return value.expand(size, *value.shape[1:]) if is_image else value


def _widened(values: Sequence[Any], size: int) -> list[Any]:
    """Expand single images to the size of a batch among them."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    is_beside = size > 1 and any(t.ndim > 1 and len(t) == size for t in tensors)
    return [_rows(value, size) if is_beside else value for value in values]


class _Joining(TorchFunctionMode):
    """Joins a batch and single images, which nothing broadcasts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.cat, torch.concat, torch.stack) and args:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim != 0 or func is torch.stack:
                args = (_widened(args[0], self._size), *args[1:])
        return func(*args, **kwargs)
