"""Records every call of a network's modules during one whole forward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import VisError
from .graph import HeadKey
from .nested import flatten_tensors, map_tensors, tensors_in


class ReplayError(VisError, RuntimeError):
    """A network did not run as it had been recorded."""


class CallKey(NamedTuple):
    """One call of a module: its path, and how many calls of it came before."""

    path: str
    call_index: int


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
        return kept(self.outputs[key], key in self.copied)

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


def trace_forward(
    modules: Mapping[str, nn.Module],
    forward: Callable[[], Any],
    copied: Collection[CallKey] = (),
) -> CallTrace:
    """Run a whole forward and keep everything.

    Args:
        modules (Mapping[str, nn.Module]): Path and module of all below the detector.
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
        trace.inputs[key] = kept(args)
        trace.given[key] = tensors_in((args, kwargs))
        output = original(*args, **kwargs)
        trace.ends[position] = len(trace.keys)
        trace.outputs[key] = kept(output, key in trace.copied)
        trace.versions[key] = [t._version for t in tensors_in(trace.outputs[key])]
        return output

    with patched_forwards(modules, call), torch.no_grad():
        forward()
    return trace


@contextlib.contextmanager
def patched_forwards(
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


def kept(values: Any, copied: bool = False) -> Any:
    """New containers, which nobody else changes, with the same tensors or copies."""
    return map_tensors(values, lambda _, t: t.clone() if copied else t)
