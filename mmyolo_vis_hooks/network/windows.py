"""Windows of a level's map, and the head on these alone.

A box depends on its level's map in a window around its anchor only. So the gradients of
many boxes come from one pass through the head on a batch of their windows, instead of a
pass through all of the maps for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .graph import HeadKey, TapKey
from .nested import flatten_tensors


class Window(NamedTuple):
    """A rectangle of cells of a map."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def around(
        cls, cell: Sequence[int], radius: int | None, map_hw: Sequence[int]
    ) -> Window:
        """Cells up to a radius from one, moved into the map; None takes all of it."""
        if radius is None:
            return cls(0, 0, *map_hw)
        sizes = [min(2 * radius + 1, whole) for whole in map_hw]
        begins = [
            min(max(position - radius, 0), whole - size)
            for position, size, whole in zip(cell, sizes, map_hw)
        ]
        return cls(*begins, *sizes)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """The part ``(..., a, b)`` of values ``(..., h, w)``."""
        rows = slice(self.top, self.top + self.height)
        return values[..., rows, self.left : self.left + self.width]

    def pad(self, part: torch.Tensor, map_hw: Sequence[int]) -> torch.Tensor:
        """The part on the whole map, zero elsewhere."""
        whole = part.new_zeros(*part.shape[:-2], *map_hw)
        self.cut(whole).copy_(part)
        return whole


@dataclass(frozen=True)
class WindowedHead:
    """A head that takes the maps of all levels, or windows of them.

    ``blocks`` make the maps of what is tapped, in the head's order; None where the maps
    themselves are.
    """

    path: str
    head: nn.Module
    blocks: Mapping[TapKey, nn.Module | None]

    def run(
        self, windows: Mapping[TapKey, torch.Tensor]
    ) -> dict[HeadKey, torch.Tensor]:
        """Raw outputs ``(K, c, a, b)`` of windows ``(K, C, a, b)`` of every level."""
        # Copies, so that in-place operations leave the windows alone.
        copies = ((windows[tap].clone(), block) for tap, block in self.blocks.items())
        maps = [part if block is None else block(part) for part, block in copies]
        outputs = flatten_tensors(self.head(tuple(maps)))
        return {HeadKey(self.path, 0, index): output for index, output in outputs}


# TF32 keeps ten bits. A head that looks at something else than windows is far off.
_TOLERANCE = 1e-2


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether raw outputs of windows are those of the whole maps."""
    largest = float(expected.abs().max())
    return bool((found - expected).abs().max() <= _TOLERANCE * largest)
