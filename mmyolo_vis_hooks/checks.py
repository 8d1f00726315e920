"""What option values may be: a check gives the value as the package uses it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from typing import Any

from .declare import Check, one_of, refuse
from .metrics.metric import METRICS, validate_metric
from .network.layer_path import parse_layer_path

_MAX_TILES = 1024


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(name, value, "use True or False")
    return value


def choice(values: Collection[str | None]) -> Check:
    return lambda name, value: one_of(name, value, values)


def number(remedy: str, most: float = 1.0, *, above_0: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        is_real = isinstance(value, Real) and not isinstance(value, bool)
        # Not as a float: a number may be too large for one.
        if not is_real or not 0 <= value <= most or (above_0 and value == 0):
            raise refuse(name, value, remedy)
        return float(value)

    return check


def count(
    remedy: str, special: int | None = None, least: int = 1, step: int = 1
) -> Check:
    def check(name: str, value: Any) -> int:
        fits = is_int(value) and value >= least and value % step == 0
        if not fits and not (is_int(value) and value == special):
            raise refuse(name, value, remedy)
        return int(value)

    return check


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def checked_by(validate: Callable[[Any], Any]) -> Check:
    def check(name: str, value: Any) -> Any:
        validate(value)
        return value

    return check


def layers(remedy: str) -> Check:
    def check(name: str, value: Any) -> tuple[str, ...]:
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence) or not len(paths):
            raise refuse(name, value, remedy)
        for path in paths:
            parse_layer_path(path)
        return tuple(paths)

    return check


def indices(remedy: str, length: int | None = None) -> Check:
    def check(name: str, value: Any) -> tuple[int, ...]:
        is_list = isinstance(value, (list, tuple, range)) and len(value) > 0
        if (
            not is_list
            or not all(is_int(i) and i >= 0 for i in value)
            or len(value) != (length or len(value))
        ):
            raise refuse(name, value, remedy)
        return tuple(map(int, value))

    return check


def class_list(name: str, value: Any) -> tuple[str | int, ...]:
    wanted = [value] if isinstance(value, str) or is_int(value) else value
    if (
        not isinstance(wanted, (list, tuple))
        or not wanted
        or not all(isinstance(c, str) or (is_int(c) and c >= 0) for c in wanted)
    ):
        remedy = "use names or indices of classes, counted from 0, or None for all"
        raise refuse(name, value, remedy)
    return tuple(c if isinstance(c, str) else int(c) for c in wanted)


def grid(name: str, value: Any) -> tuple[int, int]:
    is_pair = isinstance(value, Sequence) and len(value) == 2
    if not is_pair or not all(is_int(n) and n > 0 for n in value):
        raise refuse(name, value, "use two positive numbers, rows and columns")
    rows, columns = int(value[0]), int(value[1])
    if rows * columns > _MAX_TILES:
        raise refuse(name, value, f"use at most {_MAX_TILES} places in all")
    return rows, columns


def map_limit(name: str, value: Any) -> tuple[int, int]:
    sizes = (value,) if is_int(value) else value
    if (
        not isinstance(sizes, (list, tuple))
        or len(sizes) not in (1, 2)
        or not all(is_int(n) and (n == -1 or n >= 1) for n in sizes)
    ):
        remedy = "use one number of cells, or a height and a width; -1 sets no limit"
        raise refuse(name, value, remedy)
    return int(sizes[0]), int(sizes[-1])


def metric_list(name: str, value: Any) -> tuple[str, ...]:
    wanted = [value] if isinstance(value, str) else value
    if not isinstance(wanted, (list, tuple)):
        raise refuse(name, value, f"use a list of {', '.join(map(repr, METRICS))}")
    return tuple(validate_metric(metric).name for metric in wanted)


def tag(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[\w-]{1,64}", value, re.A):
        remedy = "use at most 64 letters, digits, '_' and '-': it is part of file names"
        raise refuse(name, value, remedy)
    return value


def is_int(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)
