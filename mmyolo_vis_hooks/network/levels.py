"""Finds the maps on which a detector decides, and which of them made a box.

Most heads look at the maps of a neck, one per pyramid level, and decide a box in one
cell of one of them. Which raw output depends on which map, and how far around the
cell, is measured once by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import VisConfigError
from .graph import (
    GraphForward,
    HeadKey,
    PredictionGraph,
    TapKey,
    TapPoint,
    gradients,
    head_modules,
)
from .layer_path import bracketed
from .nested import flatten_tensors
from .trace import CallKey, CallTrace
from .windows import Window, WindowedHead, agree

# What a detector ends its features with, the last one first.
_LAST_MAPS = ("encoder", "neck", "backbone")


@dataclass(frozen=True)
class Level:
    """One map on which the head decides.

    ``outputs`` are raw ones that depend on this level alone; none where levels share
    them, as in heads of regions and of queries. A cell of these depends on the cells of
    the map up to the ``radius``; None if on the whole map, or that is not known.
    """

    tap: TapKey
    outputs: frozenset[HeadKey]
    radius: int | None = None


@dataclass(frozen=True)
class Pyramid:
    """The levels of a detector in the order of the network, and where to tap for all.

    ``head`` can be run on windows of the levels; None if not.
    """

    points: tuple[TapPoint, ...]
    levels: tuple[Level, ...]
    head: WindowedHead | None = None

    def level_of(self, outputs: Iterable[HeadKey]) -> Level | None:
        """The level on which all the raw outputs depend, None if that is not one."""
        wanted = set(outputs)
        found = (level for level in self.levels if wanted and wanted <= level.outputs)
        return next(found, None)


def last_maps(detector: nn.Module) -> TapPoint:
    """The module whose output is the last that lies on the image.

    Raises:
        VisConfigError: If the detector has none of the modules that detectors have.
    """
    for name in _LAST_MAPS:
        module = getattr(detector, name, None)
        if isinstance(module, nn.Module):
            return TapPoint(name, module)
    raise VisConfigError(
        f"target_layers=None cannot choose a layer of {type(detector).__name__}, which "
        f"has no {' or '.join(_LAST_MAPS)}; name the layers"
    )


def survey(
    detector: nn.Module,
    inputs: torch.Tensor,
    metainfo: Mapping[str, Any],
    trace: Callable[[], CallTrace],
) -> Pyramid:
    """Measure the levels of a ``frozen`` detector on one image.

    A head of 1x1 convolutions decides on a single cell, and a map of single cells
    says nothing. There the input of the block that made the level's map is taken
    instead, as the beginning of a graph: what leads from there to other levels is
    not theirs. ``trace`` gives all calls of a forward.
    """
    point = last_maps(detector)
    graph = GraphForward(detector, [point]).run(inputs, metainfo)
    levels = [_measured(Level(tap, _own(graph, tap)), graph) for tap in graph.taps]
    own: dict[TapKey, nn.Module | None] = dict.fromkeys(graph.taps)
    if not any(level.radius == 0 for level in levels):
        return Pyramid((point,), tuple(levels), _windowed(detector, graph, levels, own))
    calls = trace()
    moved = [
        _producer(detector, calls, level.tap) if level.radius == 0 else None
        for level in levels
    ]
    points = [producer[0] for producer in moved if producer is not None]
    if not points:
        return Pyramid((point,), tuple(levels), _windowed(detector, graph, levels, own))
    if not all(moved):
        # A graph that began at one level's block would be cut off from its map.
        points = [*(replace(moved_point, cut=False) for moved_point in points), point]
    graph = GraphForward(detector, points).run(inputs, metainfo)
    blocks: dict[TapKey, nn.Module | None] = {}
    for number, producer in enumerate(moved):
        if producer is not None:
            tap = TapKey(producer[0].layer, producer[1], ())
            levels[number] = _measured(replace(levels[number], tap=tap), graph)
        blocks[levels[number].tap] = producer[0].module if producer else None
    head = _windowed(detector, graph, levels, blocks)
    return Pyramid(tuple(points), tuple(levels), head)


def _windowed(
    detector: nn.Module,
    graph: PredictionGraph,
    levels: Sequence[Level],
    blocks: Mapping[TapKey, nn.Module | None],
) -> WindowedHead | None:
    """The head, if it gives for central windows what it gave in the network."""
    heads = head_modules(detector)
    if len(heads) != 1 or not all(level.outputs for level in levels):
        return None
    ((path, module),) = heads.items()
    head = WindowedHead(path, module, blocks)
    inputs, centres = {}, []
    for number, level in enumerate(levels):
        height, width = map_hw = graph.taps[level.tap].shape[-2:]
        window = Window.around((height // 2, width // 2), level.radius, map_hw)
        part = window.cut(graph.taps[level.tap].detach())
        inputs[level.tap] = part.repeat(number + 1, 1, 1, 1)  # as many as anything else
        row, column = height // 2 - window.top, width // 2 - window.left
        for key in level.outputs:
            expected = window.cut(graph.head_outputs[key].detach())[..., row, column]
            centres.append((key, row, column, expected))
    try:
        with torch.no_grad():
            found = head.run(inputs)
            # What stands for levels without boxes.
            head.run({tap: part[:1, :, :1, :1] for tap, part in inputs.items()})
        fits = all(agree(found[k][-1:, :, y, x], value) for k, y, x, value in centres)
    except Exception:  # whatever a head raises that takes something else
        return None
    return head if fits else None


def _own(graph: PredictionGraph, tap: TapKey) -> frozenset[HeadKey]:
    """Raw outputs ``(1, C, h, w)`` on the map's own grid that see no other map."""
    own = []
    for key, output in graph.head_outputs.items():
        if output.ndim != 4 or output.shape[-2:] != graph.taps[tap].shape[-2:]:
            continue
        sees = {t for t, g in _central_gradients(graph, key).items() if g is not None}
        if sees == {tap}:
            own.append(key)
    return frozenset(own)


def _measured(level: Level, graph: PredictionGraph) -> Level:
    """The level with the radius of what a central cell of its outputs sees."""
    if level.tap not in graph.taps or not level.outputs:
        return replace(level, radius=None)
    height, width = graph.taps[level.tap].shape[-2:]
    radius = 0
    for key in level.outputs:
        gradient = _central_gradients(graph, key)[level.tap]
        if gradient is not None:
            cells = (gradient[0] != 0).any(dim=0).nonzero()
            middle = cells.new_tensor([height // 2, width // 2])
            radius = max([radius, *(cells - middle).abs().flatten().tolist()])
    sees_all = 2 * radius + 1 >= max(height, width) and radius > 0
    return replace(level, radius=None if sees_all else radius)


def _central_gradients(
    graph: PredictionGraph, key: HeadKey
) -> dict[TapKey, torch.Tensor | None]:
    output = graph.head_outputs[key]
    centre = output[..., output.shape[-2] // 2, output.shape[-1] // 2].sum()
    return dict(zip(graph.taps, gradients(centre, list(graph.taps.values()))))


def _producer(
    detector: nn.Module, calls: CallTrace, tap: TapKey
) -> tuple[TapPoint, int] | None:
    """The input of the outermost block with weights that made a map, and its call."""
    made_by = CallKey(tap.layer, tap.call_index)
    made = dict(flatten_tensors(calls.outputs[made_by]))[tap.output_index]
    modules = dict(detector.named_modules())
    candidates = [
        key
        for key, output in calls.outputs.items()
        if key != made_by
        and any(_same(tensor, made) for _, tensor in flatten_tensors(output))
        and any(True for _ in modules[key.path].parameters())
    ]
    for key in sorted(candidates, key=lambda key: key.path.count(".")):
        given = [
            place
            for place, tensor in calls.given[key]
            if tensor.ndim == 4 and tensor.shape[-2:] == made.shape[-2:]
        ]
        if given == [(0, 0)]:
            name, module = f"input of {bracketed(key.path)}", modules[key.path]
            return TapPoint(name, module, side="input", cut=True), key.call_index
    return None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
