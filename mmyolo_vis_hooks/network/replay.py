"""Re-runs only that part of a network which depends on one layer, in batches.

A detector's own ``forward`` is run again, and each module in it decides what to do:
one that had finished before the layer ran, or whose inputs are the very tensors that
were recorded, gives the output that was recorded; everything else computes. The run
stops at the last raw output that is wanted, so there is no NMS in it.

Calls that follow the layer, but from which no gradient leads to what is wanted, give
their recorded outputs too: other pyramid levels of a head, and what feeds a choice.
The proposals of a two-stage detector and the queries that an encoder selects stay
those of the image, as a score at the box's own anchor needs it.

Whether that is right is tried once per layer and wanted outputs against whole
forwards; a network that hides a state, or takes another way for other values, does
not pass, and then whole forwards are run.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import Logger
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import VisError
from .graph import HeadKey
from .nested import OutputIndex, flatten_tensors, map_tensors, tensors_in

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


class ReplayError(VisError, RuntimeError):
    """A network did not run as it had been recorded."""


class CallKey(NamedTuple):
    """One call of a module: its path, and how many calls of it came before."""

    path: str
    call_index: int


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


@dataclass
class CallTrace:
    """Everything that one whole forward computed.

    Attributes:
        copied: Calls whose outputs are kept as copies, since they are modified in
            place after the call.
        keys: The calls in the order in which they began.
        ends: For each call the position of the first one that began after its end;
            the calls in between are its own.
        outputs: What each call gave.
        inputs: The positional arguments of each call.
        given: All tensors among the arguments of each call.
        versions: How often the tensors of an output had been modified by its end.
    """

    copied: Collection[CallKey] = ()
    keys: list[CallKey] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    outputs: dict[CallKey, Any] = field(default_factory=dict)
    inputs: dict[CallKey, tuple] = field(default_factory=dict)
    given: dict[CallKey, list[torch.Tensor]] = field(default_factory=dict)
    versions: dict[CallKey, list[int]] = field(default_factory=dict)

    def modified(self) -> set[CallKey]:
        """Calls whose outputs were modified in place after they had ended."""
        return {
            key
            for key, versions in self.versions.items()
            if [t._version for t in tensors_in(self.outputs[key])] != versions
        }

    def output(self, key: CallKey) -> Any:
        """What a call gave, for a network that goes on with it."""
        return _kept(self.outputs[key], key in self.copied)

    def raw(self, key: HeadKey) -> torch.Tensor:
        """A raw output of a head."""
        output = self.outputs[CallKey(key.path, key.call_index)]
        return dict(flatten_tensors(output))[key.output_index]

    def position(self, key: CallKey) -> int:
        """Place of a call in the order.

        Raises:
            ReplayError: If there was no such call.
        """
        if key not in self.outputs:
            raise ReplayError(f"{key.path} did not run in the recorded pass")
        return self.keys.index(key)

    def num_rows(self) -> set[int]:
        """The lengths that first axes have: a batch of as many would be mistaken."""
        return {
            tensor.shape[0]
            for tensors in self.given.values()
            for tensor in tensors
            if tensor.ndim
        }


@dataclass(frozen=True)
class _Job:
    """One image, what is replaced in its forward, and what is wanted of it."""

    modules: Mapping[str, nn.Module]
    forward: Callable[[], Any]
    target: ReplayTarget
    wanted: tuple[HeadKey, ...]
    trace: CallTrace
    prune: bool


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

    def __init__(
        self, detector: nn.Module, heads: Mapping[str, nn.Module], logger: Logger
    ) -> None:
        self._modules = {path: m for path, m in detector.named_modules() if path}
        self._logger = logger
        self._decisions: dict[tuple, _Decision] = {}
        self._modified: set[CallKey] = set()

    def replay(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
        recorded: dict[Any, Any],
        *,
        prune: bool = True,
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
        job = _Job(
            self._modules, forward, target, tuple(wanted), recorded["trace"], prune
        )
        return Replay(job, self._decisions, self._logger)

    def trace(
        self, forward: Callable[[], Any], copied: Collection[CallKey] = ()
    ) -> CallTrace:
        """Run a whole forward and keep everything.

        Args:
            forward (Callable): Runs ``predict`` of the detector on an image.
            copied (Collection): See :class:`CallTrace`. Defaults to ().
        """
        trace = CallTrace(frozenset(copied))
        counts: Counter[str] = Counter()

        def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            key = CallKey(path, counts[path])
            counts[path] += 1
            position = len(trace.keys)
            trace.keys.append(key)
            trace.ends.append(-1)
            trace.inputs[key] = _kept(args)
            trace.given[key] = tensors_in((args, kwargs))
            output = original(*args, **kwargs)
            trace.ends[position] = len(trace.keys)
            trace.outputs[key] = _kept(output, key in trace.copied)
            trace.versions[key] = [t._version for t in tensors_in(trace.outputs[key])]
            return output

        with _patched_forwards(self._modules, call), torch.no_grad():
            forward()
        return trace

    def _recorded(self, forward: Callable[[], Any]) -> CallTrace:
        """A trace whose outputs are those at the end of each call."""
        trace = self.trace(forward, self._modified)
        while modified := trace.modified():
            self._modified |= modified
            trace = self.trace(forward, self._modified)
        return trace


class Replay:
    """Gives the wanted raw outputs of one image for other values of the target.

    Args:
        job (_Job): What is replaced and wanted.
        decisions (dict): How targets are replayed; gets an entry for a new one.
        logger (Logger): Told where whole forwards have to be run.
    """

    def __init__(
        self, job: _Job, decisions: dict[tuple, _Decision], logger: Logger
    ) -> None:
        self._job = job
        self._decisions = decisions
        self._logger = logger
        self._key = (job.target, job.wanted, job.prune)
        self._rows = job.trace.num_rows()
        if self._key not in decisions:
            decisions[self._key] = self._decide()

    @property
    def wanted(self) -> tuple[HeadKey, ...]:
        """What is computed."""
        return self._job.wanted

    @property
    def is_partial(self) -> bool:
        """Whether less than whole forwards is run."""
        return self._decisions[self._key].way != "whole"

    @property
    def batch_size(self) -> int:
        """How many values at once are fast; 1 if they run one at a time anyway."""
        decision = self._decisions[self._key]
        if decision.way != "batch":
            return 1
        device = self._job.trace.raw(self.wanted[0]).device.type
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
            return _whole(self._job, lambda _: batch)
        try:
            if len(batch) > 1:
                batch = batch.contiguous(memory_format=decision.layout)
            return _Pass(self._job, batch, decision.held).run()
        except _OtherCallsError as error:
            self._decisions[self._key] = self._give_up(error)
            return self.run(batch)

    def _decide(self) -> _Decision:
        """Try the recorded value and another one against whole forwards."""
        path, wanted = self._job.target.call.path, self.wanted
        recorded = [self._job.trace.raw(key) for key in wanted]
        seen: list[torch.Tensor] = []

        def other(value: torch.Tensor) -> torch.Tensor:
            seen.append(value.detach().clone())
            return _rippled(seen[0])

        self._job.trace.position(self._job.target.call)
        with torch.no_grad():
            expected = _whole(self._job, other)
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
        held, reads_values = _leading_elsewhere(job, value)
        if not job.prune:
            held = frozenset()
        with torch.no_grad():
            single = _Pass(job, other, held)
            found = single.run()
            if held and not all(map(_agree, found, expected)):
                # Another value makes a network choose other regions or queries.
                expected = _whole(job, lambda _: other, held)
            again = _Pass(job, value, held).run()
            for key, pairs in zip(
                self.wanted * 2, zip(found + again, expected + recorded)
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
                    rows = _Pass(job, laid, held).run()
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


class _OtherCallsError(ReplayError):
    """The network called other modules than had been recorded."""


class _Stop(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


class _Pass:
    """One run of what depends on the target. See the module's text for the rule."""

    def __init__(
        self, job: _Job, batch: torch.Tensor, held: Collection[CallKey]
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
        with _patched_forwards(self._job.modules, self._call), mode:
            try:
                self._job.forward()
            except _Stop:
                pass
            else:
                raise _OtherCallsError("the forward ended before the wanted outputs")
        found = [self._outputs[key] for key in self._job.wanted]
        shapes = [self._job.trace.raw(key).shape for key in self._job.wanted]
        return [
            _repeated(output, len(self._batch)) if output.shape == shape else output
            for output, shape in zip(found, shapes)
        ]

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        position, trace, target = self._next, self._job.trace, self._job.target
        if position >= len(trace.keys) or trace.keys[position].path != path:
            raise _OtherCallsError(f"{path} runs where another call had been recorded")
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
            raise _OtherCallsError(f"{key.path} made other calls than recorded")
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


def _whole(
    job: _Job,
    change: Callable[[torch.Tensor], torch.Tensor],
    held: Collection[CallKey] = (),
) -> list[torch.Tensor]:
    """The wanted outputs of a whole forward.

    Args:
        job (_Job): What is wanted.
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

    with _patched_forwards(job.modules, call), contextlib.suppress(_Stop):
        job.forward()
    missing = sorted({key.path for key in job.wanted if key not in outputs})
    if missing:
        raise ReplayError(f"{', '.join(missing)} did not give what is wanted")
    return [outputs[key] for key in job.wanted]


def _leading_elsewhere(
    job: _Job, value: torch.Tensor
) -> tuple[frozenset[CallKey], bool]:
    """What depends on the target by other ways than those of gradients.

    Returns:
        tuple: Calls from which no gradient leads to what is wanted; and whether Python
        is told values, so that the values of a batch would be chosen for together.
    """
    run = _Pass(job, value.detach().requires_grad_(), ())
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

    def __init__(self, run: _Pass) -> None:
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


@contextlib.contextmanager
def _patched_forwards(
    modules: Mapping[str, nn.Module], call: Callable[..., Any]
) -> Iterator[None]:
    """Let every call of a module below the detector go through ``call``."""
    patched = []
    try:
        for path, module in modules.items():
            patched.append((module, vars(module).get("forward")))
            vars(module)["forward"] = _patched(path, module.forward, call)
        yield
    finally:
        for module, own in patched:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _patched(path: str, original: Callable, call: Callable) -> Callable:
    return lambda *args, **kwargs: call(path, original, args, kwargs)


def _kept(values: Any, copied: bool = False) -> Any:
    """New containers, which nobody else changes, with the same tensors or copies."""
    return map_tensors(values, lambda _, t: t.clone() if copied else t)


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
    axis = _batch_axis(first.shape, rows.shape)
    if axis is None or rows.shape == first.shape:
        return False
    slack = _BATCH_TOLERANCE * _difference(first, second)
    return all(
        _agree(rows.narrow(axis, n, 1), alone, slack)
        for n, alone in enumerate((first, second))
    )


def _batch_axis(single: torch.Size, batch: torch.Size) -> int | None:
    """The axis of size 1 that has another size in a batch, or could have one."""
    axes = [i for i, (one, many) in enumerate(zip(single, batch)) if one != many]
    if not axes:
        return list(single).index(1) if 1 in single else None
    fits = len(axes) == 1 and len(single) == len(batch) and single[axes[0]] == 1
    return axes[0] if fits else None


def _joined(first: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    axis = _batch_axis(first.shape, rest.shape)
    if axis is None:
        raise ReplayError("the raw outputs have no axis for several values")
    return torch.cat([first, rest], axis)


def _repeated(output: torch.Tensor, size: int) -> torch.Tensor:
    axis = _batch_axis(output.shape, output.shape)
    if size == 1 or axis is None:
        return output
    return output.expand(*(size if i == axis else -1 for i in range(output.ndim)))
