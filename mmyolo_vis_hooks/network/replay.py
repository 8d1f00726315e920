"""Re-runs only that part of a network which depends on one layer, in batches.

A detector's own ``forward`` is run again, and each module in it decides what to do:
one that ran before the layer, or whose inputs do not depend on it, gives the output
that was recorded; one on the way from the layer to the wanted raw outputs computes;
one that depends on the layer but leads elsewhere, such as another pyramid level of a
head, gives its recorded output too. The run stops at the last wanted output, so
there is no NMS in it. Nothing in it knows of a kind of network.

What depends on the layer is found by following tensors, and what leads to the wanted
outputs by autograd, which knows no way through a choice: the proposals of a two-stage
detector and the queries that an encoder selects stay those that were recorded. Both
are done once per layer, in trials whose outputs must be the recorded ones, and for
another value those of a whole forward; a network that keeps a hidden state, or whose
control flow depends on the data, does not pass them, and then whole forwards are run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import Logger
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import VisError
from .graph import HeadKey
from .nested import OutputIndex, flatten_tensors, map_tensors, tensors_in
from .state import frozen_parameters

_TOLERANCE = 1e-4
# Half precision rounds more than that.
_TOLERANCE_IN_EPS = 8
# Other batch sizes take other kernels, which round otherwise, most with TF32. What
# mixes the images of a batch is wrong by as much as they differ.
_BATCH_TOLERANCE = 0.02


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

    def until(self, wanted: Sequence[HeadKey]) -> CallLayout:
        """The calls that began before the last wanted output was there.

        What comes after it, such as masks of the boxes, depends on what was found.
        """
        size = max(
            self.ends[self.position(CallKey(key.path, key.call_index))]
            for key in wanted
        )
        return CallLayout(
            self.keys[:size], tuple(min(end, size) for end in self.ends[:size])
        )


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
        paths: Modules whose calls a replay decides about.
        whole: Those of the live calls that are left alone: all that goes in depends on
            the target, and all calls inside are live.
        live_size: Number of elements that the live calls put out for one value.
        shape: Of the recorded target.
        wanted_shapes: Of the recorded wanted outputs.
        batched: Whether several values can run at once.
        channels_last: Whether they may lie in memory with the channels last, which the
            operators of MMCV take for another order of the values.
    """

    layout: CallLayout
    target: ReplayTarget
    wanted: tuple[HeadKey, ...]
    live: frozenset[CallKey]
    served: frozenset[CallKey]
    mutable: frozenset[CallKey]
    paths: frozenset[str]
    shape: torch.Size
    wanted_shapes: tuple[torch.Size, ...]
    batched: bool = True
    channels_last: bool = False
    whole: frozenset[CallKey] = frozenset()
    live_size: int = 0

    @property
    def has_batch_axis(self) -> bool:
        """Whether the target's first axis is that of the images."""
        return self.shape[0] == 1


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
        instead (Callable): Gives another replay, should the network run otherwise
            than planned.
    """

    def __init__(
        self,
        network: Network,
        forward: Callable[[], Any],
        plan: ReplayPlan,
        recorded: Mapping[CallKey, Any],
        instead: Callable[[], SuffixReplay | FullReplay],
    ) -> None:
        self.plan = plan
        self._network = network
        self._forward = forward
        self._recorded = recorded
        self._instead = instead
        self._other: SuffixReplay | FullReplay | None = None

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs.

        Args:
            batch (Tensor): ``(N, ...)``, N values for the target; may be cropped to
                a smaller height and width where what is live only convolves. One
                value of the recorded shape, where that does not begin with an axis
                of size 1 for the image.

        Returns:
            list[Tensor]: One per wanted output, with N in place of the recorded
            batch of 1; with a graph if gradients are enabled and ``batch`` has one.

        Raises:
            ReplayError: If there is no axis in the outputs for several values.
        """
        if self._other is None:
            try:
                if self.plan.batched or not self.plan.has_batch_axis:
                    return self._run(batch)
                return _run_rows(self._run, batch)
            except _UnexpectedCallError:
                if batch.shape[1:] != self.plan.shape[1:]:
                    raise
                self._other = self._instead()
        return self._other.run(batch)

    def _run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        if self.plan.channels_last and len(batch) > 1:
            # Half again as fast, and the convolutions pass the layout on.
            batch = batch.contiguous(memory_format=torch.channels_last)
        run = _Run(self._network, self.plan, self._recorded, batch)
        outputs = run.execute(self._forward)
        return run.wanted(outputs)


class FullReplay:
    """Runs whole forwards instead, one value at a time: slow, but always right.

    Args:
        network (Network): The detector's modules.
        forward (Callable): Runs the detector on the image.
        target (ReplayTarget): What is replaced.
        wanted (Sequence[HeadKey]): The raw outputs that are computed.
        held (Mapping, optional): Calls whose outputs are replaced by these.
            Defaults to None.
        has_batch_axis (bool): See :class:`ReplayPlan`. Defaults to True.
    """

    def __init__(
        self,
        network: Network,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
        held: Mapping[CallKey, Any] | None = None,
        *,
        has_batch_axis: bool = True,
    ) -> None:
        self._network = network
        self._module = network.modules[target.call.path]
        self._forward = forward
        self._target = target
        self._wanted = wanted
        self._held = dict(held or {})
        self._has_batch_axis = has_batch_axis

    def run(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs, as ``SuffixReplay.run``."""
        if not self._has_batch_axis:
            return self.run_one(batch)
        return _run_rows(self.run_one, batch)

    def run_one(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Compute the wanted raw outputs for one value of the recorded shape."""
        counts: Counter[str] = Counter()
        found: dict[HeadKey, torch.Tensor] = {}
        target = self._target

        def replaced(tensors: Any) -> Any:
            counts["target of the replay"] += 1
            if counts["target of the replay"] - 1 != target.call.call_index:
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
            for path, outputs in self._held_calls().items():
                hook = _holding_hook(outputs)
                module = self._network.modules[path]
                stack.callback(module.register_forward_hook(hook).remove)
            if target.side == "input":
                handle = self._module.register_forward_pre_hook(
                    lambda module, args: replaced(args)
                )
            else:
                handle = self._module.register_forward_hook(
                    lambda module, args, output: replaced(output)
                )
            stack.callback(handle.remove)
            for path, head in self._network.heads.items():
                stack.callback(head.register_forward_hook(on_head(path)).remove)
            with contextlib.suppress(_Stop):
                self._forward()
        if counts["target of the replay"] <= target.call.call_index:
            raise ReplayError(f"{target.call.path} did not run, so nothing is replaced")
        missing = sorted({key.path for key in self._wanted if key not in found})
        if missing:
            raise ReplayError(f"{', '.join(missing)} did not give what is wanted")
        return [found[key] for key in self._wanted]

    def _held_calls(self) -> dict[str, dict[int, Any]]:
        calls: dict[str, dict[int, Any]] = {}
        for key, output in self._held.items():
            calls.setdefault(key.path, {})[key.call_index] = output
        return calls


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
        self._detector = detector
        self._network = Network(detector, heads)
        self._logger = logger
        self._plans: dict[tuple, ReplayPlan | None] = {}
        self._has_batch_axis: dict[ReplayTarget, bool] = {}

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
            # Ahead of hooks that change the output: they run in a replay, too.
            yield self._network.modules[path].register_forward_hook(
                _recording_hook(path, indices, mutable, recorded), prepend=True
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
        wanted = tuple(wanted)
        key = (target, wanted, prune)

        def whole() -> FullReplay:
            return FullReplay(
                self._network,
                forward,
                target,
                wanted,
                has_batch_axis=self._has_batch_axis.get(target, True),
            )

        def planned_again() -> SuffixReplay | FullReplay:
            # An image may take another way, as where no region is of a certain size.
            plan = self._plan(forward, target, wanted, recorded, prune)
            self._plans[key] = plan
            if plan is None:
                return whole()
            return SuffixReplay(self._network, forward, plan, recorded, given_up)

        def given_up() -> FullReplay:
            self._plans[key] = None
            self._warn(target, "which calls it makes depends on the values")
            return whole()

        if key not in self._plans:
            self._plans[key] = self._plan(forward, target, wanted, recorded, prune)
        plan = self._plans[key]
        if plan is None:
            return whole()
        if not (plan.served | {plan.target.call}) <= recorded.keys():
            trace = self.trace(forward, plan.mutable)
            if trace.layout.until(wanted) != plan.layout:
                return planned_again()
            recorded.update(trace.outputs)
        return SuffixReplay(self._network, forward, plan, recorded, planned_again)

    def _warn(self, target: ReplayTarget, reason: object) -> None:
        self._logger.warning(
            f"Whole forwards are run for what depends on {target.call.path}, since it "
            f"cannot be re-run by itself: {reason}"
        )

    def _plan(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: tuple[HeadKey, ...],
        recorded: dict[CallKey, Any],
        prune: bool,
    ) -> ReplayPlan | None:
        trace = self.trace(forward, target=target)
        modified = frozenset(trace.modified())
        if modified:
            trace = self.trace(forward, modified, target)
        layout = trace.layout.until(wanted)
        if trace.layout.position(target.call) >= len(layout.keys):
            raise NoInfluenceError(f"{target.call.path} runs after what is wanted")
        value = _target_value(trace, target)
        everything = frozenset(layout.keys)
        plan = ReplayPlan(
            layout,
            target,
            wanted,
            live=everything,
            served=everything,
            mutable=modified,
            paths=frozenset(key.path for key in layout.keys),
            shape=value.shape,
            wanted_shapes=tuple(_element(trace.outputs, key).shape for key in wanted),
        )
        self._has_batch_axis[target] = plan.has_batch_axis
        try:
            with frozen_parameters(self._detector):
                plan = self._tried_plan(forward, plan, trace.outputs, value, prune)
        except NoInfluenceError:
            raise
        except Exception as error:  # whatever a network raises that is run otherwise
            self._warn(target, error or type(error).__name__)
            return None
        recorded.update(
            {key: trace.outputs[key] for key in (*plan.served, target.call)}
        )
        return plan

    def _tried_plan(
        self,
        forward: Callable[[], Any],
        plan: ReplayPlan,
        recorded: Mapping[CallKey, Any],
        value: torch.Tensor,
        prune: bool,
    ) -> ReplayPlan:
        target, wanted = plan.target, plan.wanted
        held: frozenset[CallKey] = frozenset()
        with torch.enable_grad():
            leaf = value.detach().requires_grad_()
            run = _Run(self._network, plan, recorded, leaf, attached=True)
            outputs = run.execute(forward)
            ends = [outputs[key] for key in wanted if outputs[key].requires_grad]
            if not ends:
                self._refuse(forward, target, wanted, leaf)
            if prune:
                live = _calls_between(run.live_outputs, ends)
                # What follows the target, but by no way that autograd knows.
                held = frozenset(run.live_outputs) - live - run.holders
                plan = replace(plan, live=live)
            # A choice that the values of a batch make together is made for each.
            batched = plan.has_batch_axis and not run.reads_values
            del run, outputs, ends

        def replayed(batch: torch.Tensor) -> tuple[_Run, list[torch.Tensor]]:
            run = _Run(self._network, plan, recorded, batch)
            outputs = run.execute(forward)
            return run, run.wanted(outputs)

        with torch.no_grad():
            run, same = replayed(value)
            for key, found in zip(wanted, same):
                _compare(key, found, _element(recorded, key), "the recorded ones")
            ripples = _rippled(value)
            whole = FullReplay(
                self._network,
                forward,
                target,
                wanted,
                {key: _detached(recorded[key], True) for key in held},
            )
            _, other = replayed(ripples)
            for key, found, expected in zip(wanted, other, whole.run_one(ripples)):
                _compare(key, found, expected, "those of a whole forward")
            served = frozenset(run.served)
            whole_calls, paths = run.undivided()
            plan = replace(
                plan,
                served=served,
                mutable=plan.mutable & (served | {target.call}),
                paths=paths,
                whole=whole_calls,
                live_size=run.live_size,
            )
            _, again = replayed(ripples)
            for key, found, expected in zip(wanted, again, other):
                _compare(key, found, expected, "those with every call followed")

            def runs_as(pair: torch.Tensor) -> bool:
                try:
                    _, both = replayed(pair)
                except Exception:  # whatever a network raises that was given one image
                    return False
                return all(map(_is_batch_of, both, same, other))

            channels_last = False
            if batched:
                pair = torch.cat([value, ripples])
                channels_last = value.is_cpu and value.ndim == 4
                if channels_last:
                    other_order = pair.contiguous(memory_format=torch.channels_last)
                    channels_last = runs_as(other_order)
                batched = channels_last or runs_as(pair)
        return replace(plan, batched=batched, channels_last=channels_last)

    def _refuse(
        self,
        forward: Callable[[], Any],
        target: ReplayTarget,
        wanted: Sequence[HeadKey],
        leaf: torch.Tensor,
    ) -> None:
        """Raise what says why nothing that follows the target has a gradient."""
        found = FullReplay(self._network, forward, target, wanted).run_one(leaf)
        paths = ", ".join(sorted({key.path for key in wanted}))
        if any(tensor.requires_grad for tensor in found):
            raise ReplayError(f"what leads from it to {paths} cannot be followed")
        raise NoInfluenceError(f"{target.call.path} has no influence on {paths}")

    def trace(
        self,
        forward: Callable[[], Any],
        copied: Collection[CallKey] = (),
        target: ReplayTarget | None = None,
    ) -> CallTrace:
        """Run a whole forward and keep everything.

        Args:
            forward (Callable): Runs ``predict`` of the detector on an image.
            copied (Collection): Calls whose outputs are copied, because they are
                modified in place later.
            target (ReplayTarget, optional): Where it is an input, this is copied
                too. Defaults to None.
        """
        trace = CallTrace()
        counts: Counter[str] = Counter()
        own_input = target.call if target and target.side == "input" else None

        def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
            key = CallKey(path, counts[path])
            counts[path] += 1
            position = len(trace.keys)
            trace.keys.append(key)
            trace.ends.append(-1)
            trace.inputs[key] = _detached(args, True) if key == own_input else args
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


class _UnexpectedCallError(ReplayError):
    """The network called other modules than had been recorded."""


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
        *,
        attached: bool = False,
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
        size = len(batch) if plan.has_batch_axis else 1
        self._mode = _Following(network, size, attached)
        self._outputs: dict[HeadKey, torch.Tensor] = {}
        self.served: set[CallKey] = set()
        self.live_size = 0
        self._visited: set[int] = set()
        self._only_following: set[int] = set()
        self._inside = False
        self.live_outputs: dict[CallKey, list[torch.Tensor]] = {}
        self.holders: set[CallKey] = set()

    def execute(self, forward: Callable[[], Any]) -> dict[HeadKey, torch.Tensor]:
        with _patched_forwards(self._modules, self._call), self._mode:
            try:
                forward()
            except _Stop:
                return self._outputs
        raise _UnexpectedCallError("the forward ended before the wanted outputs")

    def wanted(self, outputs: Mapping[HeadKey, torch.Tensor]) -> list[torch.Tensor]:
        """The wanted outputs, repeated where they are the same for all images."""
        found = [outputs[key] for key in self._plan.wanted]
        size = self._mode.batch_size
        if size == 1:
            return found
        return [
            _repeated(output, size) if output.shape == shape else output
            for output, shape in zip(found, self._plan.wanted_shapes)
        ]

    @property
    def reads_values(self) -> bool:
        """Whether Python was told values of tensors that depend on the target."""
        return self._mode.reads_values

    def undivided(self) -> tuple[frozenset[CallKey], frozenset[str]]:
        """The outermost calls that can be left alone, and the modules of the others."""
        whole: set[CallKey] = set()
        paths: set[str] = set()
        keys, ends = self._layout.keys, self._layout.ends
        inside_until = 0
        for position in sorted(self._visited):
            if position < inside_until:
                continue
            paths.add(keys[position].path)
            inner = range(position, ends[position])
            if self._only_following.issuperset(inner):
                whole.add(keys[position])
                inside_until = ends[position]
        return frozenset(whole), frozenset(paths)

    def _call(self, path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        if self._inside:
            return original(*args, **kwargs)
        position = self._next
        if position >= len(self._layout.keys):
            raise _UnexpectedCallError(f"{path} runs after the last recorded call")
        key, end = self._layout.keys[position], self._layout.ends[position]
        if key.path != path:
            raise _UnexpectedCallError(
                f"{path} runs where {key.path} had been recorded"
            )
        self._visited.add(position)
        follows = self._mode.follows((args, kwargs))
        holds_target = position <= self._target_position < end
        if position == self._target_position:
            if self._plan.target.side == "output":
                self._next = end
                return self._finish(key, position, self._replaced(self._serve(key)))
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
        if key in self._plan.whole:
            self._next = end
            output = self._undisturbed(original, args, kwargs)
            self._mode.mark(output, (args, kwargs))
            return self._finish(key, position, output)
        self._next += 1
        if holds_target:
            self.holders.add(key)
        elif all(map(self._mode.is_marked, tensors_in((args, kwargs)))):
            self._only_following.add(position)
        if follows:
            # Attention moves the batch to another axis, where nothing can be widened.
            # Not the levels of a pyramid: those without the target keep their size.
            args = tuple(map(self._mode.widened_tensor, args))
            kwargs = {k: self._mode.widened_tensor(v) for k, v in kwargs.items()}
        if self._is_plain_leaf(key, args, kwargs):
            # What goes in is marked and what comes out will be: nothing to follow.
            output = self._undisturbed(original, args, kwargs)
        else:
            output = original(*args, **kwargs)
        if self._next != end:
            raise _UnexpectedCallError(
                f"{path} made other calls than had been recorded"
            )
        if follows:
            # Also what autograd functions of extensions gave, which nothing follows.
            self._mode.mark(output, (args, kwargs))
        with torch._C.DisableTorchFunction():  # each attribute would be followed
            tensors = tensors_in(output)
            self.live_outputs[key] = [t for t in tensors if t.requires_grad]
            self.live_size += sum(t.numel() for t in tensors)
        return self._finish(key, position, output)

    def _undisturbed(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        self._inside = True
        try:
            with torch._C.DisableTorchFunction():
                return original(*args, **kwargs)
        finally:
            self._inside = False

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


_READING = frozenset(
    ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy")
)


class _Following(TorchFunctionMode):
    """Follows which tensors depend on the target, and widens the others.

    A recorded tensor has a batch of 1 and one that depends on the target a batch of
    N. Where both meet and no broadcasting joins them, the recorded one is expanded.

    Args:
        network (Network): The detector's modules.
        batch_size (int): N.
        attached (bool): Let autograd see through ``detach``.
    """

    def __init__(self, network: Network, batch_size: int, attached: bool) -> None:
        super().__init__()
        self.batch_size = batch_size
        self._attached = attached
        self.reads_values = False
        self._buffers = network.buffers

    def follows(self, values: Any) -> bool:
        """Whether one of the nested tensors depends on the target."""
        return any(self.is_marked(tensor) for tensor in tensors_in(values))

    def is_wide(self, values: Any) -> bool:
        """Whether one of the nested tensors was expanded to the batch."""
        return self.batch_size > 1 and any(
            tensor.ndim > 1 and tensor.shape[0] == self.batch_size
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
        if self.batch_size == 1:
            return values
        return map_tensors(values, lambda _, tensor: self._widen(tensor))

    def widened_tensor(self, value: Any) -> Any:
        """A recorded tensor expanded to the batch; what is none is kept."""
        if self.batch_size == 1 or not isinstance(value, torch.Tensor):
            return value
        return self._widen(value)

    def is_marked(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on the target."""
        return getattr(tensor, "_follows_target", None) is self

    def _widen(self, tensor: torch.Tensor) -> torch.Tensor:
        if (
            self.is_marked(tensor)
            or tensor.ndim < 2
            or tensor.shape[0] != 1
            or isinstance(tensor, nn.Parameter)
            or id(tensor) in self._buffers
            # Sizes and indices, which are no images' values.
            or tensor.dtype in (torch.int64, torch.int32)
        ):
            return tensor
        return tensor.expand(self.batch_size, *tensor.shape[1:])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.follows((args, kwargs)):
            if self.batch_size == 1:
                return func(*args, **kwargs)
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                # Reshaped to a size that was read from what follows.
                return func(*self.widened(args), **self.widened(kwargs))
        name = getattr(func, "__name__", "")
        if name == "_shape_as_tensor":  # sizes are nobody's values
            return func(*args, **kwargs)
        if name in ("__get__", "size", "dim"):
            output = func(*args, **kwargs)
            self.mark(output, (args, kwargs))
            return output
        if self._attached and name == "detach":
            func = torch.clone
        self.reads_values |= name in _READING
        assigns = name in ("__setitem__", "copy_")
        in_place = assigns or _out_of_place(name) is not None
        if (
            in_place
            and not assigns
            and self.batch_size > 1
            and not self.is_marked(args[0])
        ):
            # A recorded tensor, which is too small for all images.
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
            patched.append((module, own))
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


def _compare(
    key: HeadKey, found: torch.Tensor, expected: torch.Tensor, whose: str
) -> None:
    if found.shape != expected.shape:
        raise ReplayError(
            f"{key.path} gave {tuple(found.shape)} where {tuple(expected.shape)} had "
            "been recorded"
        )
    difference = _difference(found, expected)
    if not difference <= _tolerance(expected):
        raise ReplayError(
            f"{key.path} gave values that differ by {difference:.2g} from {whose}"
        )


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max()) if one.numel() else 0.0


def _tolerance(values: torch.Tensor) -> float:
    largest = float(values.float().abs().max()) if values.numel() else 0.0
    precision = 0.0
    if values.is_floating_point():
        precision = _TOLERANCE_IN_EPS * torch.finfo(values.dtype).eps
    return max(_TOLERANCE, precision) * max(1e-6, largest)


def _rippled(value: torch.Tensor) -> torch.Tensor:
    """Other values that are like those: no random number is drawn for them."""
    waves = torch.arange(value.numel(), device=value.device).cos().to(value.dtype)
    return value * (0.8 + 0.1 * waves.reshape(value.shape))


def _is_batch_of(both: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a batch of two gave what the two gave by themselves."""
    allowed = max(_BATCH_TOLERANCE * _difference(one, other), _tolerance(one))
    axes = [i for i, size in enumerate(one.shape) if size == 1 and both.shape[i] == 2]
    if both.ndim != one.ndim or both.shape == one.shape or not axes:
        return False
    found = both.split(1, axes[0])
    return all(
        row.shape == alone.shape and _difference(row, alone) <= allowed
        for row, alone in zip(found, (one, other))
    )


def _repeated(output: torch.Tensor, size: int) -> torch.Tensor:
    """An output with its first axis of size 1 expanded."""
    sizes = list(output.shape)
    if 1 not in sizes:
        return output
    sizes[sizes.index(1)] = size
    return output.expand(sizes)


def _run_rows(
    run: Callable[[torch.Tensor], list[torch.Tensor]], batch: torch.Tensor
) -> list[torch.Tensor]:
    """Run values one by one and join the outputs along their axis of size 1."""
    rows = [run(batch[:1])]
    if len(batch) == 1:
        return rows[0]
    axes = [[i for i, n in enumerate(output.shape) if n == 1] for output in rows[0]]
    if not all(axes):
        raise ReplayError("the raw outputs have no axis for several values")
    rows += [run(batch[n : n + 1]) for n in range(1, len(batch))]
    return [torch.cat(values, own[0]) for values, own in zip(zip(*rows), axes)]


def _holding_hook(outputs: Mapping[int, Any]) -> Callable:
    count = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal count
        count += 1
        return outputs.get(count - 1)

    return hook
