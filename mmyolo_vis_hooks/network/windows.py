"""Windows of maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


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
