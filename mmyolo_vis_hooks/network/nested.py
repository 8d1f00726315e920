"""Walks the nested outputs of layers: tensors in tuples, lists, dicts, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

OutputIndex = tuple[Any, ...]
"""Where a tensor lies in a nested output: () for a tensor that stands alone."""


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
        for name, value in _fields(output):
            yield from flatten_tensors(value, (*index, name))


def tensors_in(output: Any) -> list[torch.Tensor]:
    """The tensors of nested outputs, depth first; faster than with their indices."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in tensors_in(value)]
    if output is None or isinstance(output, (int, float, str)):
        return []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if _is_record(output):
        return [t for _, value in _fields(output) for t in tensors_in(value)]
    return []


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
        for name, value in _fields(output):
            changed = map_tensors(value, change, (*index, name))
            object.__setattr__(record, name, changed)  # frozen ones too
        return record
    return output


def _is_record(output: Any) -> bool:
    return dataclasses.is_dataclass(output) and not isinstance(output, type)


def _fields(record: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(record, f.name)) for f in dataclasses.fields(record)]
