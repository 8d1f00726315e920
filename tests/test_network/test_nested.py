from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import torch

from mmyolo_vis_hooks.network.nested import flatten_tensors, map_tensors

Maps = namedtuple("Maps", "fine coarse")


@dataclasses.dataclass(frozen=True)
class Record:
    maps: list
    note: str = "kept"
    first: torch.Tensor | None = None
    number: int = dataclasses.field(default=3, init=False)


def nest() -> Any:
    return {
        "maps": Maps(torch.tensor(1.0), [torch.tensor(2.0), None]),
        7: (torch.tensor(3.0), "text", OrderedDict(a=torch.tensor(4.0))),
        "record": Record([torch.tensor(5.0)], first=torch.tensor(6.0)),
    }


INDICES = [
    ("maps", 0),
    ("maps", 1, 0),
    ("7", 0),
    ("7", 2, "a"),
    ("record", "maps", 0),
    ("record", "first"),
]


def test_rebuilt_with_other_tensors():
    given = nest()
    indices = []

    def change(index: tuple, tensor: torch.Tensor) -> torch.Tensor:
        indices.append(index)
        return tensor * 10

    found = map_tensors(given, change)
    assert indices == [index for index, _ in flatten_tensors(given)] == INDICES
    assert [float(t) for _, t in flatten_tensors(found)] == [10, 20, 30, 40, 50, 60]
    assert [float(t) for _, t in flatten_tensors(given)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(found["maps"], Maps)
    assert isinstance(found["maps"].coarse, list)
    assert isinstance(found[7], tuple)
    assert isinstance(found[7][2], OrderedDict)
    assert found[7][1] == "text"
    assert isinstance(found["record"], Record)
    assert (found["record"].note, found["record"].number) == ("kept", 3)
    for value in (None, 3, "text", object(), Record):
        assert list(flatten_tensors(value)) == []
        assert map_tensors(value, lambda _, t: t) is value
