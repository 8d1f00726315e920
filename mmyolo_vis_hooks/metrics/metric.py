"""The registry of metrics: what a map of a detection is worth, as numbers.

A metric is a function with a decorator. It is given a map ``(H, W)``, over the
network's input and perhaps with negative values, and the :class:`Subject` of the map;
it gives named numbers, and curves of one length, or nothing where it does not apply:

    @register_metric('peak', summary='the greatest value')
    def peak(saliency, subject):
        return {'peak': saliency.max()}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..declare import one_of, register_once

Values = Mapping[str, Any]
"""Numbers, and curves ``(n,)``, by name."""


@dataclass(frozen=True)
class Subject:
    """The detection that a map explains; all in pixels of the network's input.

    Attributes:
        box_xyxy: ``(4,)``, as it was found.
        truth_xyxy: ``(4,)``, the object that it hits; None where that is not known.
        mask: ``(H, W)`` bool, the object's outline; None where that is not known.
        score: From which pixels are shown, ``(n, H, W)`` bool, and the name of what
            replaces the others, ``'blur'`` or ``'black'``, to the share of the
            detection's score that is left, ``(n,)``. None where nobody can ask.
    """

    box_xyxy: np.ndarray
    truth_xyxy: np.ndarray | None = None
    mask: np.ndarray | None = None
    score: Callable[[np.ndarray, str], np.ndarray] | None = None


@dataclass(frozen=True)
class MetricKind:
    """A registered metric; ``asks`` says that it needs forwards of the detector."""

    name: str
    function: Callable[[np.ndarray, Subject], Values]
    summary: str
    asks: bool = False


METRICS: dict[str, MetricKind] = {}


def register_metric(name: str, *, summary: str, asks: bool = False) -> Callable:
    """Make a function a metric that can be asked for by name.

    A ``VisConfigError`` says that the name belongs to another function.
    """

    def register(function: Callable[[np.ndarray, Subject], Values]) -> Callable:
        register_once(METRICS, "metric", MetricKind(name, function, summary, asks))
        return function

    return register


def validate_metric(name: Any) -> MetricKind:
    """Look up a metric.

    Raises:
        VisConfigError: If there is none of this name.
    """
    return METRICS[one_of("metrics", name, METRICS)]


class Metric:
    """A metric over many maps: means of what it gives for each.

    Args:
        name (str): One of ``METRICS``.

    Examples:
        >>> metric = Metric('energy')
        >>> metric.update(saliency, Subject(box_xyxy))
        >>> metric.compute()
        {'energy_box': 0.91}
    """

    def __init__(self, name: str) -> None:
        self.kind = validate_metric(name)
        self.reset()

    def update(self, saliency: np.ndarray, subject: Subject) -> Values:
        """Measure one map ``(H, W)``; gives its own values."""
        values = self.kind.function(saliency, subject)
        self._found.append(values)
        return values

    def compute(self) -> dict[str, Any]:
        """Mean of each value over the maps that have it."""
        return mean_values(self._found)

    def reset(self) -> None:
        """Forget all maps."""
        self._found: list[Values] = []


def mean_values(found: Iterable[Values]) -> dict[str, Any]:
    """Mean of each value over those that have it."""
    values: dict[str, list[Any]] = {}
    for own in found:
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    return {name: np.mean(own, axis=0) for name, own in values.items()}
