"""Records every call of a network's modules during one whole forward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import VisError
from .nested import OutputIndex, OutputKey, flatten_tensors, map_tensors


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
        keys: The calls in the order in which they began.
        ends: For each call the position of the first one that began after its end;
            the calls in between are its own.
        outputs: What each call gave.
        given: The tensors in the arguments of each call. The place of one begins with
            0 for positional arguments and 1 for keywords.
        versions: By their ids, how often outputs had been modified by their ends.
    """

    keys: list[CallKey] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    outputs: dict[CallKey, Any] = field(default_factory=dict)
    given: dict[CallKey, list[tuple[OutputIndex, torch.Tensor]]] = field(
        default_factory=dict
    )
    versions: dict[int, int] = field(default_factory=dict)

    def raw(self, key: OutputKey) -> torch.Tensor:
        """A tensor that a call gave."""
        output = self.outputs[CallKey(key.layer, key.call_index)]
        return dict(flatten_tensors(output))[key.output_index]

    def position(self, key: CallKey) -> int:
        """Place of a call in the order; a ``ReplayError`` if there was none."""
        if key not in self.outputs:
            raise ReplayError(f"{key.path} did not run in the recorded pass")
        return self.keys.index(key)


def submodules(detector: nn.Module) -> dict[str, nn.Module]:
    """What is below a detector, by paths."""
    return {path: module for path, module in detector.named_modules() if path}


def trace_forward(
    modules: Mapping[str, nn.Module], forward: Callable[[], Any]
) -> CallTrace:
    """Run a whole forward of ``predict`` on an image and keep everything."""
    trace = CallTrace()
    counts: Counter[str] = Counter()

    def call(path: str, original: Callable, args: tuple, kwargs: dict) -> Any:
        key = CallKey(path, counts[path])
        counts[path] += 1
        position = len(trace.keys)
        trace.keys.append(key)
        trace.ends.append(-1)
        trace.given[key] = list(flatten_tensors((args, kwargs)))
        output = original(*args, **kwargs)
        trace.ends[position] = len(trace.keys)
        # New containers, which the network does not change.
        trace.outputs[key] = map_tensors(output, lambda _, tensor: tensor)
        for _, tensor in flatten_tensors(output):
            trace.versions.setdefault(id(tensor), tensor._version)
        return output

    with patched_forwards(modules, call), torch.no_grad():
        forward()
    return trace


@contextlib.contextmanager
def patched_forwards(
    modules: Mapping[str, nn.Module], call: Callable[..., Any]
) -> Iterator[None]:
    """Let every call of a module below the detector go through ``call``."""

    def patched(path: str, original: Callable) -> Callable:
        return lambda *args, **kwargs: call(path, original, args, kwargs)

    before = []
    try:
        for path, module in modules.items():
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = patched(path, module.forward)
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
