"""Runs what depends on one layer, up to the raw outputs that are wanted.

A detector's own ``forward`` is run again, and each module in it decides what to do:
one that had finished before the layer ran, or whose inputs are the very tensors that
were recorded, gives the output that was recorded; everything else computes.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .graph import HeadKey
from .nested import OutputIndex, flatten_tensors, map_tensors, tensors_in
from .trace import CallKey, CallTrace, ReplayError, patched_forwards

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


@dataclass(frozen=True)
class Job:
    """One image, what is replaced in its forward, and what is wanted of it."""

    modules: Mapping[str, nn.Module]
    forward: Callable[[], Any]
    target: ReplayTarget
    wanted: tuple[HeadKey, ...]
    trace: CallTrace


class OtherCallsError(ReplayError):
    """The network called other modules than had been recorded."""


class _Stop(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


class PartialRun:
    """One run of what depends on the target. See the module's text for the rule."""

    def __init__(
        self, job: Job, batch: torch.Tensor, held: Collection[CallKey]
    ) -> None:
        self._job = job
        self._batch = batch
        self._held = held
        self._next = 0
        self._target = job.trace.position(job.target.call)
        self._outputs: dict[HeadKey, torch.Tensor] = {}
        self._calls = {CallKey(key.path, key.call_index) for key in job.wanted}
        self.computed: list[tuple[CallKey, list[torch.Tensor]]] = []

    @property
    def is_past_target(self) -> bool:
        """Whether the target has been replaced."""
        return self._next > self._target

    @property
    def size(self) -> int:
        """Number of elements that the calls put out."""
        return sum(t.numel() for _, tensors in self.computed for t in tensors)

    def run(self) -> list[torch.Tensor]:
        """Compute the wanted outputs, repeated where all values give the same."""
        mode = _Joining(len(self._batch))
        with patched_forwards(self._job.modules, self._call), mode:
            try:
                self._job.forward()
            except _Stop:
                pass
            else:
                raise OtherCallsError("the forward ended before the wanted outputs")
        found = [self._outputs[key] for key in self._job.wanted]
        shapes = [self._job.trace.raw(key).shape for key in self._job.wanted]
        return [
            _repeated(output, len(self._batch)) if output.shape == shape else output
            for output, shape in zip(found, shapes)
        ]

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        position, trace, target = self._next, self._job.trace, self._job.target
        if position >= len(trace.keys) or trace.keys[position].path != path:
            raise OtherCallsError(f"{path} runs where another call had been recorded")
        key, end = trace.keys[position], trace.ends[position]
        if key == target.call and target.side == "output":
            output = self._replaced(trace.output(key))
        elif end <= self._target or (
            position > self._target and self._is_recorded(key, args, kwargs)
        ):
            output = trace.output(key)
            if key in self._held:
                # A head may reshape it by the number of its rows.
                output = _rows_for_all(output, len(self._batch))
        else:
            if key == target.call:
                args = self._replaced(args)
            output = self._computed(position, original, args, kwargs)
        self._next = end
        if key in self._calls:
            for index, tensor in flatten_tensors(output):
                self._outputs[HeadKey(*key, index)] = tensor
            if all(wanted in self._outputs for wanted in self._job.wanted):
                raise _Stop
        return output

    def _computed(
        self, position: int, original: Callable, args: tuple, kwargs: dict
    ) -> Any:
        key, end = self._job.trace.keys[position], self._job.trace.ends[position]
        self._next += 1
        if position > self._target:
            args, kwargs = _widened(args, kwargs, len(self._batch))
        output = original(*args, **kwargs)
        if self._next != end:
            raise OtherCallsError(f"{key.path} made other calls than recorded")
        if position > self._target:
            self.computed.append((key, tensors_in(output)))
        return output

    def _is_recorded(self, key: CallKey, args: tuple, kwargs: dict) -> bool:
        """Whether a call that follows the target gives its recorded output."""
        if key in self._held:
            return True
        given, recorded = tensors_in((args, kwargs)), self._job.trace.given[key]
        return (
            bool(given)
            and len(given) == len(recorded)
            and all(map(operator.is_, given, recorded))
        )

    def _replaced(self, value: Any) -> Any:
        # A copy, since what follows may work in place.
        place, batch = self._job.target.place, self._batch
        return map_tensors(value, lambda i, t: batch.clone() if i == place else t)


def whole_run(
    job: Job,
    change: Callable[[torch.Tensor], torch.Tensor],
    held: Collection[CallKey] = (),
) -> list[torch.Tensor]:
    """The wanted outputs of a whole forward.

    Args:
        job (Job): What is wanted.
        change (Callable): Gives the value of the target for the one that is there.
        held (Collection): Calls whose recorded outputs are given. Defaults to ().
    """
    counts: Counter[str] = Counter()
    outputs: dict[HeadKey, torch.Tensor] = {}
    target = job.target

    def replaced(value: Any) -> Any:
        return map_tensors(
            value, lambda i, t: change(t).clone() if i == target.place else t
        )

    def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        key = CallKey(path, counts[path])
        counts[path] += 1
        if key in held:
            return job.trace.output(key)
        if key == target.call and target.side == "input":
            args = replaced(args)
        output = original(*args, **kwargs)
        if key == target.call and target.side == "output":
            output = replaced(output)
        for index, tensor in flatten_tensors(output):
            outputs[HeadKey(*key, index)] = tensor
        if all(wanted in outputs for wanted in job.wanted):
            raise _Stop
        return output

    with patched_forwards(job.modules, call), contextlib.suppress(_Stop):
        job.forward()
    missing = sorted({key.path for key in job.wanted if key not in outputs})
    if missing:
        raise ReplayError(f"{', '.join(missing)} did not give what is wanted")
    return [outputs[key] for key in job.wanted]


def leading_elsewhere(job: Job, value: torch.Tensor) -> tuple[frozenset[CallKey], bool]:
    """What depends on the target by other ways than those of gradients.

    Returns:
        tuple: Calls from which no gradient leads to what is wanted; and whether Python
        is told values, so that the values of a batch would be chosen for together.
    """
    run = PartialRun(job, value.detach().requires_grad_(), ())
    mode = _Attached(run)
    with torch.enable_grad(), mode:
        ends = [output for output in run.run() if output.requires_grad]
        found = [(k, t) for k, own in run.computed for t in own if t.requires_grad]
        if not ends or not found:
            return frozenset(), mode.reads_values
        total = torch.stack([end.float().sum() for end in ends]).sum()
        gradients = torch.autograd.grad(total, [t for _, t in found], allow_unused=True)
    live = {key for (key, _), gradient in zip(found, gradients) if gradient is not None}
    held, inside_until = set(), 0
    for position in sorted(
        {job.trace.keys.index(k) for k, _ in found if k not in live}
    ):
        if position >= inside_until:
            held.add(job.trace.keys[position])
            inside_until = job.trace.ends[position]
    return frozenset(held), mode.reads_values


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


class _Joining(TorchFunctionMode):
    """Joins a batch and the single image that was recorded, which nothing broadcasts.

    Args:
        size (int): Number of values in the batch.
    """

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
                tensors, _ = _widened(tuple(args[0]), {}, self._size)
                args = (tensors, *args[1:])
        return func(*args, **kwargs)


def _widened(args: tuple, kwargs: dict, size: int) -> tuple[tuple, dict]:
    """Expand single images among arguments to the size of the batch beside them."""

    def rows(value: Any) -> int:
        # Integers are sizes and indices, which are no images' values.
        is_values = (
            isinstance(value, torch.Tensor)
            and value.ndim > 1
            and (value.dtype not in (torch.int64, torch.int32))
        )
        return value.shape[0] if is_values else 0

    def expanded(value: Any) -> Any:
        return value.expand(size, *value.shape[1:]) if rows(value) == 1 else value

    if size == 1 or not {1, size} <= {rows(v) for v in (*args, *kwargs.values())}:
        return args, kwargs
    return tuple(map(expanded, args)), {k: expanded(v) for k, v in kwargs.items()}


def _rows_for_all(output: Any, size: int) -> Any:
    """What a call that is not computed would give for a batch."""

    def expanded(_: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        is_image = tensor.ndim > 1 and tensor.shape[0] == 1
        return tensor.expand(size, *tensor.shape[1:]) if is_image else tensor

    return map_tensors(output, expanded)


def batch_axis(single: torch.Size, batch: torch.Size) -> int | None:
    """The axis of size 1 that has another size in a batch, or could have one."""
    axes = [i for i, (one, many) in enumerate(zip(single, batch)) if one != many]
    if not axes:
        return list(single).index(1) if 1 in single else None
    fits = len(axes) == 1 and len(single) == len(batch) and single[axes[0]] == 1
    return axes[0] if fits else None


def _repeated(output: torch.Tensor, size: int) -> torch.Tensor:
    axis = batch_axis(output.shape, output.shape)
    if size == 1 or axis is None:
        return output
    return output.expand(*(size if i == axis else -1 for i in range(output.ndim)))
