"""Walks the nested outputs of layers: tensors in tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

OutputIndex = tuple[Any, ...]
"""Where a tensor lies in a nested output: () for a tensor that stands alone."""


class OutputKey(NamedTuple):
    """One tensor that a call of a layer gave."""

    layer: str
    call_index: int
    output_index: OutputIndex

    @property
    def title(self) -> str:
        """Name for captions: ``neck[1]``, and ``conv (call 2)`` for a later call."""
        output = "".join(f"[{index}]" for index in self.output_index)
        call = "" if self.call_index == 0 else f" (call {self.call_index + 1})"
        return f"{self.layer}{output}{call}"


def flatten_tensors(
    output: Any, index: OutputIndex = ()
) -> Iterator[tuple[OutputIndex, torch.Tensor]]:
    """Walk nested outputs depth first; give each tensor with its indices."""
    if isinstance(output, torch.Tensor):
        yield index, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from flatten_tensors(value, (*index, str(key)))
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from flatten_tensors(value, (*index, i))
    elif _is_record(output):
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            yield from flatten_tensors(value, (*index, field.name))


def map_tensors(
    output: Any,
    change: Callable[[OutputIndex, torch.Tensor], torch.Tensor],
    index: OutputIndex = (),
) -> Any:
    """Rebuild nested outputs with other tensors; nothing is modified in place.

    Args:
        output: Tensors in tuples, named tuples, lists, dicts and dataclasses; what
            is none of these is kept.
        change (Callable): Gives the new tensor for the index and the tensor that
            is there.
    """
    if isinstance(output, torch.Tensor):
        return change(index, output)
    if isinstance(output, dict):
        items = {
            key: map_tensors(value, change, (*index, str(key)))
            for key, value in output.items()
        }
        return items if type(output) is dict else type(output)(items)
    if isinstance(output, (list, tuple)):
        values = [
            map_tensors(value, change, (*index, i)) for i, value in enumerate(output)
        ]
        if hasattr(output, "_fields"):
            return type(output)(*values)
        return values if isinstance(output, list) else tuple(values)
    if _is_record(output):
        record = copy.copy(output)
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            changed = map_tensors(value, change, (*index, field.name))
            object.__setattr__(record, field.name, changed)  # frozen ones too
        return record
    return output


def _is_record(output: Any) -> bool:
    return dataclasses.is_dataclass(output) and not isinstance(output, type)
