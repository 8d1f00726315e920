"""Finds the maps on which a detector decides, and which of them made a box.

Most heads look at the maps of a neck, one per pyramid level, and decide a box in one
cell of one of them. Which raw output depends on which map, and how far around the
cell, is measured once by gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import VisConfigError
from .graph import (
    GraphForward,
    PredictionGraph,
    TapPoint,
    gradients,
    head_modules,
    prediction_of,
)
from .layer_path import bracketed
from .nested import OutputKey, flatten_tensors
from .trace import CallKey, CallTrace, submodules, trace_forward

_Slopes = dict[OutputKey, torch.Tensor]
# What a detector ends its features with, the last one first.
_LAST_MAPS = ("encoder", "neck", "backbone")


@dataclass(frozen=True)
class Level:
    """One map on which the head decides.

    ``outputs`` are raw ones that depend on this level alone; none where levels share
    them, as in heads of regions and of queries. A cell of these depends on the cells of
    the map up to the ``radius``; None if on the whole map, or that is not known. Where
    the input of a block stands for the map, ``block`` makes the map of it.
    """

    tap: OutputKey
    outputs: frozenset[OutputKey]
    radius: int | None = None
    block: nn.Module | None = None


@dataclass(frozen=True)
class Pyramid:
    """The levels of a detector in the order of the network, and where to tap for all.

    ``head`` is path and module of the only head, if its raw outputs are those of the
    levels: it can be run on windows of these. None if not.
    """

    points: tuple[TapPoint, ...]
    levels: tuple[Level, ...]
    head: Any = None

    def run_head(
        self, windows: Mapping[OutputKey, torch.Tensor]
    ) -> dict[OutputKey, torch.Tensor]:
        """Raw outputs ``(K, c, a, b)`` of windows ``(K, C, a, b)`` of every level."""
        path, head = self.head
        # Copies, so that in-place operations leave the windows alone.
        copies = ((windows[level.tap].clone(), level.block) for level in self.levels)
        maps = [part if block is None else block(part) for part, block in copies]
        outputs = flatten_tensors(head(tuple(maps)))
        return {OutputKey(path, 0, index): output for index, output in outputs}

    def level_of(self, outputs: Iterable[OutputKey]) -> Level | None:
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
    detector: nn.Module, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> Pyramid:
    """Measure the levels of a ``frozen`` detector on one image.

    A head of 1x1 convolutions decides on a single cell, and a map of single cells
    says nothing. There the input of the block that made the level's map is taken
    instead, as the beginning of a graph: what leads from there to other levels is
    not theirs.
    """
    points = [last_maps(detector)]
    graph = GraphForward(detector, points).run(inputs, metainfo)
    seen, levels = _seen(graph), []
    for tap, tensor in graph.taps.items():
        own = [
            key
            for key, slopes in seen.items()
            if slopes.keys() == {tap}
            and graph.head_outputs[key].shape[-2:] == tensor.shape[-2:]
        ]
        levels.append(_measured(Level(tap, frozenset(own)), seen))
    if any(level.radius == 0 for level in levels):
        modules = submodules(detector)
        calls = trace_forward(modules, prediction_of(detector, inputs, metainfo))
        found = {
            number: producer
            for number, level in enumerate(levels)
            if level.radius == 0 and (producer := _producer(modules, calls, level.tap))
        }
        if found:
            moved = [point for point, _ in found.values()]
            if len(found) < len(levels):
                # A graph that began at one level's block would be cut off from its map.
                moved = [*(replace(point, cut=False) for point in moved), *points]
            points = moved
            graph = GraphForward(detector, points).run(inputs, metainfo)
            seen = _seen(graph)
        for number, (point, call_index) in found.items():
            tap = OutputKey(point.layer, call_index, ())
            level = Level(tap, levels[number].outputs, block=point.module)
            levels[number] = _measured(level, seen)
    heads = list(head_modules(detector).items())
    owned = sum(len(level.outputs) for level in levels)
    is_theirs = len(heads) == 1 and owned == len(graph.head_outputs)
    return Pyramid(tuple(points), tuple(levels), heads[0] if is_theirs else None)


def _seen(graph: PredictionGraph) -> dict[OutputKey, _Slopes]:
    """Gradients of the central cell of each raw output ``(1, C, h, w)``, by tap."""
    seen = {}
    for key, output in graph.head_outputs.items():
        if output.ndim == 4:
            centre = output[..., output.shape[-2] // 2, output.shape[-1] // 2].sum()
            slopes = zip(graph.taps, gradients(centre, list(graph.taps.values())))
            seen[key] = {tap: slope for tap, slope in slopes if slope is not None}
    return seen


def _measured(level: Level, seen: Mapping[OutputKey, _Slopes]) -> Level:
    """The level with the radius of what a central cell of its outputs sees."""
    slopes = [seen[key][level.tap] for key in level.outputs if level.tap in seen[key]]
    if not slopes:
        return level
    height, width = slopes[0].shape[-2:]
    radius = 0
    for slope in slopes:
        cells = (slope[0] != 0).any(dim=0).nonzero()
        middle = cells.new_tensor([height // 2, width // 2])
        radius = max([radius, *(cells - middle).abs().flatten().tolist()])
    sees_all = 2 * radius + 1 >= max(height, width) and radius > 0
    return replace(level, radius=None if sees_all else radius)


def _producer(
    modules: Mapping[str, nn.Module], calls: CallTrace, tap: OutputKey
) -> tuple[TapPoint, int] | None:
    """The input of the outermost block with weights that made a map, and its call."""
    made_by = CallKey(tap.layer, tap.call_index)
    made = dict(flatten_tensors(calls.outputs[made_by]))[tap.output_index]
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
