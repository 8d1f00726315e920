"""Re-runs only that part of a network which depends on one layer, in batches.

A detector's own ``forward`` is run again, and each module in it decides what to do:
one that ran before the layer, or whose inputs do not depend on it, gives the output
that was recorded; one on the way from the layer to the wanted raw outputs computes;
one that depends on the layer but leads elsewhere, such as another pyramid level of a
head, gives its recorded output too. The run stops at the last wanted output, so
there is no NMS in it. Nothing in it knows of a kind of network.

What depends on the layer is found by following tensors, and what leads to the wanted
outputs by autograd. Both are done once per layer, in a trial with the recorded
tensor itself whose outputs must be the recorded ones; a network that keeps a hidden
state, or whose control flow depends on the data, does not pass it, and then whole
forwards are run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from logging import Logger
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import VisError
from .nested import OutputIndex, flatten_tensors, map_tensors, tensors_in
from .prediction_graph import HeadKey

# Other batch sizes take other kernels, which round otherwise.
_TOLERANCE = 1e-4


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


@dataclass(frozen=True)
class CallLayout:
    """All calls of a forward in the order in which they began.

    Attributes:
        keys: The calls.
        ends: For each call the position of the first call that began after its end;
            the calls in between are its own.
    """

    keys: tuple[CallKey, ...]
    ends: tuple[int, ...]

    def position(self, key: CallKey) -> int:
        """Place of a call in the order.

        Raises:
            ReplayError: If there was no such call.
        """
        try:
            return self.keys.index(key)
        except ValueError as error:
            raise ReplayError(f"{key.path} did not run in the recorded pass") from error


@dataclass(frozen=True)
class ReplayPlan:
    """How a replay of one target towards some raw outputs runs.

    Attributes:
        layout: Calls of a whole forward.
        target: What is replaced.
        wanted: The raw outputs that are computed.
        live: Calls that compute, because they lead from the target to ``wanted``.
        served: Calls whose recorded outputs are given.
        mutable: Those of ``served`` whose outputs are modified in place afterwards.
        paths: Modules that a replay calls.
    """

    layout: CallLayout
    target: ReplayTarget
    wanted: tuple[HeadKey, ...]
    live: frozenset[CallKey]
    served: frozenset[CallKey]
    mutable: frozenset[CallKey]
    paths: frozenset[str]


@dataclass
class CallTrace:
    """Everything that one whole forward computed.

    Attributes:
        keys: The calls in the order in which they began.
        ends: See :class:`CallLayout`.
        outputs: What each call gave.
        inputs: The positional arguments of each call.
        versions: How often the tensors of an output had been modified by its end.
    """

    keys: list[CallKey] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    outputs: dict[CallKey, Any] = field(default_factory=dict)
    inputs: dict[CallKey, tuple] = field(default_factory=dict)
    versions: dict[CallKey, list[int]] = field(default_factory=dict)

    @property
    def layout(self) -> CallLayout:
        return CallLayout(tuple(self.keys), tuple(self.ends))

    def modified(self) -> set[CallKey]:
        """Calls whose outputs were modified in place after they had ended."""
        return {
            key
            for key, versions in self.versions.items()
            if [t._version for t in tensors_in(self.outputs[key])] != versions
        }


class Network:
    """The modules of a detector, looked up once.

    Attributes:
        modules: Path and module of everything below the detector.
        heads: Paths and modules of the heads.
        buffers: Identities of the buffers, which are no images' values.
    """

    def __init__(self, detector: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        self.modules = {
            path: module for path, module in detector.named_modules() if path
        }
        self.heads = dict(heads)
        self.buffers = frozenset(id(buffer) for buffer in detector.buffers())


class SuffixReplay:
    """Gives the wanted raw outputs for other values of the target.

    Args:
        network (Network): The detector's modules.
        forward (Callable): Runs the detector on the recorded image.
        plan (ReplayPlan): What to run.
        recorded (Mapping): Outputs of ``plan.served`` and of the target's call.
    """

    def __init__(
        self,
        network: Network,
        forward: Callable[[], Any],
        plan: ReplayPlan,
        recorded: Mapping[CallKey, Any],
    ) -> None:
        self.plan = plan
        self._network = network
        self._forward = forward
        self._recorded = recorded

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs.

        Args:
            batch (Tensor): ``(N, ...)``, N values for the target; may be cropped to
                a smaller height and width where what is live only convolves.

        Returns:
            list[Tensor]: One per wanted output, with N in place of the recorded
            batch of 1; with a graph if gradients are enabled and ``batch`` has one.

        Raises:
            ReplayError: If the network ran otherwise than recorded.
        """
        run = _Run(self._network, self.plan, self._recorded, batch)
        outputs = run.execute(self._forward)
        return [outputs[key] for key in self.plan.wanted]


class FullReplay:
    """Runs whole forwards instead, one value at a time: slow, but always right."""

    def __init__(
        self,
        network: Network,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
    ) -> None:
        self._module = network.modules[target.call.path]
        self._forward = forward
        self._target = target
        self._wanted = wanted
        self._heads = network.heads

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs, as ``SuffixReplay.run``."""
        rows = [self._run_one(batch[n : n + 1]) for n in range(len(batch))]
        if len(rows) == 1:
            return rows[0]
        return [_join(values) for values in zip(*rows)]

    def _run_one(self, value: torch.Tensor) -> list[torch.Tensor]:
        counts: Counter[str] = Counter()
        found: dict[HeadKey, torch.Tensor] = {}
        target = self._target

        def replaced(tensors: Any) -> Any:
            counts["target"] += 1
            if counts["target"] - 1 != target.call.call_index:
                return None
            return map_tensors(
                tensors, lambda i, t: value.clone() if i == target.place else t
            )

        def on_head(path: str) -> Callable:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                for index, tensor in flatten_tensors(output):
                    found[HeadKey(path, counts[path], index)] = tensor
                counts[path] += 1
                if all(key in found for key in self._wanted):
                    raise _Stop

            return hook

        with contextlib.ExitStack() as stack:
            if target.side == "input":
                handle = self._module.register_forward_pre_hook(
                    lambda module, args: replaced(args)
                )
            else:
                handle = self._module.register_forward_hook(
                    lambda module, args, output: replaced(output)
                )
            stack.callback(handle.remove)
            for path, head in self._heads.items():
                stack.callback(head.register_forward_hook(on_head(path)).remove)
            with contextlib.suppress(_Stop):
                self._forward()
        return [found[key] for key in self._wanted]


class ReplayEngine:
    """Plans replays of a detector, and remembers the plans from image to image.

    Args:
        detector (nn.Module): The detector, without wrappers.
        heads (Mapping[str, nn.Module]): Paths and modules of its heads.
        logger (Logger): Told where whole forwards have to be run.
    """

    def __init__(
        self, detector: nn.Module, heads: Mapping[str, nn.Module], logger: Logger
    ) -> None:
        self._network = Network(detector, heads)
        self._logger = logger
        self._plans: dict[tuple, ReplayPlan | None] = {}

    def keys_to_record(self) -> set[CallKey]:
        """Calls whose outputs the known plans give or replace."""
        plans = [plan for plan in self._plans.values() if plan is not None]
        return {key for plan in plans for key in (*plan.served, plan.target.call)}

    def attach_recording(self, recorded: dict[CallKey, Any]) -> Iterator[Any]:
        """Register hooks that record what the known plans need during a forward.

        Args:
            recorded (dict): Gets the outputs.

        Yields:
            The hooks' handles.
        """
        wanted: dict[str, set[int]] = {}
        for key in self.keys_to_record():
            wanted.setdefault(key.path, set()).add(key.call_index)
        plans = [plan for plan in self._plans.values() if plan is not None]
        mutable = {key for plan in plans for key in plan.mutable}
        for path, indices in wanted.items():
            yield self._network.modules[path].register_forward_hook(
                _recording_hook(path, indices, mutable, recorded)
            )

    def replay(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
        recorded: dict[CallKey, Any],
        *,
        prune: bool = True,
    ) -> SuffixReplay | FullReplay:
        """Give what re-runs the network from a target to raw outputs.

        Args:
            forward (Callable): Runs ``predict`` of the detector on the image.
            target (ReplayTarget): What will be replaced.
            wanted (Sequence[HeadKey]): What will be computed.
            recorded (dict): What a forward of this image has recorded of it; gets
                what is missing.
            prune (bool): Leave out what leads elsewhere. False computes all that
                depends on the target, for crops, whose sizes the recorded outputs
                do not fit. Defaults to True.

        Raises:
            ReplayError: If the target has no influence on what is wanted.
        """
        key = (target, tuple(wanted), prune)
        if key not in self._plans:
            self._plans[key] = self._plan(
                forward, target, tuple(wanted), recorded, prune
            )
        plan = self._plans[key]
        if plan is None:
            return FullReplay(self._network, forward, target, wanted)
        if not (plan.served | {plan.target.call}) <= recorded.keys():
            trace = self.trace(forward, plan.mutable)
            if trace.layout != plan.layout:
                return FullReplay(self._network, forward, target, wanted)
            recorded.update(trace.outputs)
        return SuffixReplay(self._network, forward, plan, recorded)

    def _plan(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: tuple[HeadKey, ...],
        recorded: dict[CallKey, Any],
        prune: bool,
    ) -> ReplayPlan | None:
        trace = self.trace(forward)
        modified = frozenset(trace.modified())
        if modified:
            trace = self.trace(forward, modified)
        try:
            plan = self._tried_plan(forward, target, wanted, trace, modified, prune)
        except (ReplayError, RuntimeError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, NoInfluenceError):
                raise
            self._logger.warning(
                "Whole forwards are run for what depends on %s, since it cannot be "
                "re-run by itself: %s",
                target.call.path,
                error,
            )
            return None
        recorded.update(
            {key: trace.outputs[key] for key in (*plan.served, target.call)}
        )
        return plan

    def _tried_plan(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: tuple[HeadKey, ...],
        trace: CallTrace,
        modified: frozenset[CallKey],
        prune: bool,
    ) -> ReplayPlan:
        layout = trace.layout
        everything = frozenset(layout.keys)
        paths = frozenset(key.path for key in layout.keys)
        plan = ReplayPlan(
            layout, target, wanted, everything, everything, modified, paths
        )
        layout.position(target.call)
        value = _target_value(trace, target)
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            run = _Run(self._network, plan, trace.outputs, leaf)
            outputs = run.execute(forward)
            ends = [outputs[key] for key in wanted if outputs[key].requires_grad]
            if not ends:
                raise NoInfluenceError(
                    f"{target.call.path} has no influence on "
                    f"{', '.join(sorted({key.path for key in wanted}))}"
                )
            live = _calls_between(run.live_outputs, ends) if prune else everything
        plan = ReplayPlan(layout, target, wanted, live, everything, modified, paths)
        with torch.no_grad():
            run = _Run(self._network, plan, trace.outputs, value)
            outputs = run.execute(forward)
        for key in wanted:
            _compare(key, outputs[key], _element(trace.outputs, key))
        served = frozenset(run.served)
        return ReplayPlan(
            layout,
            target,
            wanted,
            live,
            served,
            modified & served,
            frozenset(run.paths),
        )

    def trace(
        self, forward: Callable[[], Any], copied: Collection[CallKey] = ()
    ) -> CallTrace:
        """Run a whole forward and keep everything.

        Args:
            forward (Callable): Runs ``predict`` of the detector on an image.
            copied (Collection): Calls whose outputs are copied, because they are
                modified in place later.
        """
        trace = CallTrace()
        counts: Counter[str] = Counter()

        def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            key = CallKey(path, counts[path])
            counts[path] += 1
            position = len(trace.keys)
            trace.keys.append(key)
            trace.ends.append(-1)
            trace.inputs[key] = args
            output = original(*args, **kwargs)
            trace.ends[position] = len(trace.keys)
            kept = _detached(output, key in copied)
            trace.outputs[key] = kept
            trace.versions[key] = [t._version for t in tensors_in(kept)]
            return output

        with _patched_forwards(self._network.modules, call), torch.no_grad():
            forward()
        return trace


class NoInfluenceError(ReplayError):
    """The target of a replay does not lead to what is wanted."""


class _Stop(Exception):
    """Ends a forward as soon as everything that is wanted has been computed."""


class _Run:
    """One replay. See the module's text for what each call does."""

    def __init__(
        self,
        network: Network,
        plan: ReplayPlan,
        recorded: Mapping[CallKey, Any],
        batch: torch.Tensor,
    ) -> None:
        self._modules = {path: network.modules[path] for path in plan.paths}
        self._plan = plan
        self._recorded = recorded
        self._batch = batch
        self._heads = network.heads
        self._layout = plan.layout
        self._target_position = plan.layout.position(plan.target.call)
        self._last_head = max(
            plan.layout.position(CallKey(key.path, key.call_index))
            for key in plan.wanted
        )
        self._next = 0
        self._mode = _Following(network, len(batch))
        self._outputs: dict[HeadKey, torch.Tensor] = {}
        self.served: set[CallKey] = set()
        self.paths: set[str] = set()
        self.live_outputs: dict[CallKey, list[torch.Tensor]] = {}

    def execute(self, forward: Callable[[], Any]) -> dict[HeadKey, torch.Tensor]:
        with _patched_forwards(self._modules, self._call), self._mode:
            try:
                forward()
            except _Stop:
                return self._outputs
        raise ReplayError("the forward ended before the wanted outputs")

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        position = self._next
        if position >= len(self._layout.keys):
            raise ReplayError(f"{path} runs after the last recorded call")
        key, end = self._layout.keys[position], self._layout.ends[position]
        if key.path != path:
            raise ReplayError(f"{path} runs where {key.path} had been recorded")
        self.paths.add(path)
        follows = self._mode.follows((args, kwargs))
        holds_target = position <= self._target_position < end
        if position == self._target_position:
            if self._plan.target.side == "output":
                self._next = end
                return self._finish(key, position, self._replaced(self._recorded[key]))
            args, follows = self._replaced(args), True
        elif not holds_target and not (follows and key in self._plan.live):
            self._next = end
            self.served.add(key)
            output = self._serve(key)
            if follows or self._mode.is_wide((args, kwargs)):
                # What comes after it expects the whole batch, and may write to it.
                output = _detached(self._mode.widened(output), True)
                self._mode.mark(output, ())
            return self._finish(key, position, output)
        self._next += 1
        if follows:
            # Attention moves the batch to another axis, where nothing can be widened.
            # Not the levels of a pyramid: those without the target keep their size.
            args = tuple(map(self._mode.widened_tensor, args))
            kwargs = {k: self._mode.widened_tensor(v) for k, v in kwargs.items()}
        if self._is_plain_leaf(key, args, kwargs):
            # What goes in is marked and what comes out will be: nothing to follow.
            with torch._C.DisableTorchFunction():
                output = original(*args, **kwargs)
        else:
            output = original(*args, **kwargs)
        if self._next != end:
            raise ReplayError(f"{path} made other calls than had been recorded")
        if follows:
            # Also what autograd functions of extensions gave, which nothing follows.
            self._mode.mark(output, (args, kwargs))
        with torch._C.DisableTorchFunction():  # each attribute would be followed
            self.live_outputs[key] = [t for t in tensors_in(output) if t.requires_grad]
        return self._finish(key, position, output)

    def _is_plain_leaf(self, key: CallKey, args: tuple, kwargs: dict) -> bool:
        """Whether a call is of a layer of torch on one tensor that follows."""
        return (
            type(self._modules[key.path]).__module__.startswith("torch.nn.modules.")
            and self._next == self._layout.ends[self._next - 1]
            and len(args) == 1
            and not kwargs
            and isinstance(args[0], torch.Tensor)
            and self._mode.follows(args)
        )

    def _finish(self, key: CallKey, position: int, output: Any) -> Any:
        if key.path in self._heads:
            for index, tensor in flatten_tensors(output):
                self._outputs[HeadKey(key.path, key.call_index, index)] = tensor
            if position == self._last_head:
                raise _Stop
        return output

    def _replaced(self, value: Any) -> Any:
        def change(index: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            if index != self._plan.target.place:
                return tensor
            # A copy, since what follows may work in place.
            batch = self._batch.clone()
            self._mode.mark(batch, ())
            return batch

        return map_tensors(value, change)

    def _serve(self, key: CallKey) -> Any:
        output = self._recorded[key]
        return _detached(output, True) if key in self._plan.mutable else output


class _Following(TorchFunctionMode):
    """Follows which tensors depend on the target, and widens the others.

    A recorded tensor has a batch of 1 and one that depends on the target a batch of
    N. Where both meet and no broadcasting joins them, the recorded one is expanded.
    """

    def __init__(self, network: Network, batch_size: int) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._buffers = network.buffers

    def follows(self, values: Any) -> bool:
        """Whether one of the nested tensors depends on the target."""
        return any(self._is_marked(tensor) for tensor in tensors_in(values))

    def is_wide(self, values: Any) -> bool:
        """Whether one of the nested tensors was expanded to the batch."""
        return self._batch_size > 1 and any(
            tensor.ndim > 1 and tensor.shape[0] == self._batch_size
            for _, tensor in flatten_tensors(values)
        )

    def mark(self, values: Any, given: Any) -> None:
        """Note that tensors depend on the target, but for those that were given."""
        known = {id(tensor) for tensor in tensors_in(given)}
        for tensor in tensors_in(values):
            if id(tensor) not in known:
                tensor._follows_target = self  # type: ignore[attr-defined]

    def widened(self, values: Any) -> Any:
        """Nested values with recorded tensors expanded to the batch."""
        if self._batch_size == 1:
            return values
        return map_tensors(values, lambda _, tensor: self._widen(tensor))

    def widened_tensor(self, value: Any) -> Any:
        """A recorded tensor expanded to the batch; what is none is kept."""
        if self._batch_size == 1 or not isinstance(value, torch.Tensor):
            return value
        return self._widen(value)

    def _is_marked(self, tensor: torch.Tensor) -> bool:
        return getattr(tensor, "_follows_target", None) is self

    def _widen(self, tensor: torch.Tensor) -> torch.Tensor:
        if (
            self._is_marked(tensor)
            or tensor.ndim < 2
            or tensor.shape[0] != 1
            or isinstance(tensor, nn.Parameter)
            or id(tensor) in self._buffers
            # Sizes and indices, which are no images' values.
            or tensor.dtype in (torch.int64, torch.int32)
        ):
            return tensor
        return tensor.expand(self._batch_size, *tensor.shape[1:])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.follows((args, kwargs)):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "size", "dim"):
            output = func(*args, **kwargs)
            self.mark(output, (args, kwargs))
            return output
        in_place = name == "__setitem__" or _out_of_place(name) is not None
        if in_place and not self._is_marked(args[0]) and name != "__setitem__":
            # A recorded tensor, which must stay as it is and may be too small.
            func, in_place = _out_of_place(name), False
        args, kwargs = self.widened((args, kwargs))
        output = func(*args, **kwargs)
        self.mark(output, (args, kwargs))
        if in_place:
            self.mark(args[0], ())
        return output


def _out_of_place(name: str) -> Callable | None:
    """The function that gives as a new tensor what ``name`` does in place."""
    if name.startswith("__i") and name.endswith("__"):
        return getattr(torch.Tensor, f"__{name[3:]}", None)
    if name.endswith("_") and not name.endswith("__"):
        return getattr(torch.Tensor, name[:-1], None)
    return None


@contextlib.contextmanager
def _patched_forwards(
    modules: Mapping[str, nn.Module], call: Callable[..., Any]
) -> Iterator[None]:
    """Let every call of a module below the detector go through ``call``."""
    patched = []
    try:
        for path, module in modules.items():
            own = vars(module).get("forward")
            vars(module)["forward"] = _patched(path, module.forward, call)
            patched.append((module, own))
        yield
    finally:
        for module, own in patched:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


def _patched(path: str, original: Callable, call: Callable) -> Callable:
    return lambda *args, **kwargs: call(path, original, args, kwargs)


def _recording_hook(
    path: str, indices: set[int], mutable: set[CallKey], recorded: dict[CallKey, Any]
) -> Callable:
    count = 0

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        if count in indices:
            key = CallKey(path, count)
            recorded[key] = _detached(output, key in mutable)
        count += 1

    return hook


def _detached(output: Any, copied: bool) -> Any:
    return map_tensors(
        output, lambda _, t: t.detach().clone() if copied else t.detach()
    )


def _calls_between(
    outputs: Mapping[CallKey, Sequence[torch.Tensor]], ends: Sequence[torch.Tensor]
) -> frozenset[CallKey]:
    """The calls that a way to the ends leads through."""
    tensors = [(key, tensor) for key, found in outputs.items() for tensor in found]
    total = torch.stack([end.float().sum() for end in ends]).sum()
    grads = torch.autograd.grad(total, [t for _, t in tensors], allow_unused=True)
    return frozenset(key for (key, _), grad in zip(tensors, grads) if grad is not None)


def _target_value(trace: CallTrace, target: ReplayTarget) -> torch.Tensor:
    values = trace.outputs if target.side == "output" else trace.inputs
    for index, tensor in flatten_tensors(values[target.call]):
        if index == target.place:
            return tensor.detach()
    raise ReplayError(f"{target.call.path} has no tensor at {target.place}")


def _element(outputs: Mapping[CallKey, Any], key: HeadKey) -> torch.Tensor:
    output = outputs[CallKey(key.path, key.call_index)]
    return dict(flatten_tensors(output))[key.output_index]


def _compare(key: HeadKey, found: torch.Tensor, recorded: torch.Tensor) -> None:
    if found.shape != recorded.shape:
        raise ReplayError(
            f"{key.path} gave {tuple(found.shape)} where {tuple(recorded.shape)} had "
            "been recorded"
        )
    difference = float((found.float() - recorded.float()).abs().max())
    if not difference <= _TOLERANCE * max(1e-6, float(recorded.float().abs().max())):
        raise ReplayError(
            f"{key.path} gave values that differ by {difference:.2g} from the recorded "
            "ones"
        )


def _join(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Outputs of single forwards along their batch axis, the first of size 1."""
    axis = next((i for i, size in enumerate(values[0].shape) if size == 1), None)
    return torch.stack(list(values)) if axis is None else torch.cat(list(values), axis)
