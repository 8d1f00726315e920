"""Scenes of detectors, and whole forwards in which a plain hook replaces a layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch import Tensor, nn

from mmyolo_vis_hooks.network.graph import head_modules
from mmyolo_vis_hooks.network.nested import OutputKey, flatten_tensors, map_tensors
from mmyolo_vis_hooks.network.partial import Job, ReplayTarget
from mmyolo_vis_hooks.network.replay import Replay, ReplayEngine
from mmyolo_vis_hooks.network.trace import trace_forward
from tests.families import build_family


class Enough(Exception):
    """Ends a whole forward after the raw outputs."""


@dataclasses.dataclass
class Scene:
    """A detector with its image."""

    detector: nn.Module
    forward: Callable[[], Any]

    @property
    def heads(self) -> dict[str, nn.Module]:
        return head_modules(self.detector)


def scene_of(name: str, detector: nn.Module | None = None) -> Scene:
    family = build_family(name)
    detector = detector or family.detector

    def forward() -> Any:
        samples = copy.deepcopy(family.data_samples)
        return detector(family.inputs, samples, mode="predict")

    return Scene(detector, forward)


def whole_forward(
    place: Scene, target: ReplayTarget, value: Tensor | None = None
) -> tuple[dict[OutputKey, Tensor], Tensor]:
    """Raw outputs, and what the target was, of a forward of everything."""
    outputs: dict[OutputKey, Tensor] = {}
    counts: Counter[str] = Counter()
    seen: list[Tensor] = []

    def replace_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        counts["target"] += 1
        if counts["target"] - 1 != target.call.call_index:
            return None
        seen.append(dict(flatten_tensors(output))[target.place].clone())
        if value is None:
            return None
        return map_tensors(output, lambda i, t: value * 1 if i == target.place else t)

    def collect(path: str) -> Callable:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call_index = counts[path]
            counts[path] += 1
            for index, tensor in flatten_tensors(output):
                outputs[OutputKey(path, call_index, index)] = tensor
            if counts.total() - counts["target"] == len(place.heads):
                raise Enough

        return hook

    module = place.detector.get_submodule(target.call.path)
    handles = [h.register_forward_hook(collect(p)) for p, h in place.heads.items()]
    handles.append(module.register_forward_hook(replace_output))
    try:
        with contextlib.suppress(Enough):
            place.forward()
    finally:
        for handle in handles:
            handle.remove()
    return outputs, seen[0]


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def engine_of(place: Scene) -> tuple[ReplayEngine, list[str]]:
    logger = logging.Logger("replay")
    listener = Listener()
    logger.addHandler(listener)
    return ReplayEngine(place.detector, logger), listener.messages


def replay_of(
    engine: ReplayEngine, place: Scene, target: ReplayTarget, wanted: list[OutputKey]
) -> Replay:
    trace = trace_forward(engine.modules, place.forward)
    job = Job(engine.modules, place.forward, trace, target, tuple(wanted))
    return Replay(engine, job)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= 1e-4 * float(other.abs().max())


@contextlib.contextmanager
def counted_calls(detector: nn.Module) -> Iterator[Counter[str]]:
    """Count the layers of torch that really compute: their classes' ``forward``."""
    paths = {id(module): path for path, module in detector.named_modules()}
    ran: Counter[str] = Counter()

    def counting(original: Callable) -> Callable:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            ran[paths[id(self)]] += 1
            return original(self, *args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for kind in {type(m) for m in detector.modules()}:
            if kind.__module__.startswith("torch.nn.") and "forward" in vars(kind):
                stack.enter_context(
                    mock.patch.object(kind, "forward", counting(kind.forward))
                )
        yield ran
