"""How much of the evidence lies in the objects, and whether it leaves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..metrics.pointing_game import energy_inside

if TYPE_CHECKING:
    from .result import Diagnosis

Shares = dict[tuple[str, int], tuple[str, float]]
"""By image and index of an object: its class, and the share of its map inside of it."""

_FALL = 0.05
_LEAST_OBJECTS = 3


def shares_inside(diagnosis: Diagnosis) -> Shares:
    """Of each explained hit, what lies in its object: in its mask, or else its box."""
    image_hw = diagnosis.image_rgb.shape[:2]
    shares = {}
    for own in diagnosis.found:
        if own.map is not None:
            region = diagnosis.truth.region(own.record.truth, image_hw)
            share = energy_inside(own.map.saliency, region)
            shares[diagnosis.image_id, own.record.truth] = own.class_name, share
    return shares


def mean_by_class(shares: Shares) -> dict[str, float]:
    """Means of the shares, by class."""
    return {
        name: float(np.mean(list(own.values())))
        for name, own in _by_class(shares).items()
    }


class EnergyWatch:
    """Notices that the evidence leaves the objects of a class.

    Objects that were found both times are compared, so that a new, small one does not
    look like a loss. A fall of 0.05 counts, from the best validation so far, where AP
    has not fallen with it.
    """

    def __init__(self) -> None:
        self._best: dict[str, tuple[dict[tuple[str, int], float], float]] = {}

    def update(self, shares: Shares, ap: float) -> list[str]:
        """What is to be said after a validation.

        Args:
            shares (dict): Of this validation, as of :func:`shares_inside`.
            ap (float): Of this validation.
        """
        alarms = []
        for name, own in sorted(_by_class(shares).items()):
            before, ap_before = self._best.get(name, ({}, 0.0))
            common = own.keys() & before.keys()
            if len(common) >= _LEAST_OBJECTS:
                now = float(np.mean([own[key] for key in common]))
                then = float(np.mean([before[key] for key in common]))
                if now < then and not (then - now > _FALL and ap >= ap_before):
                    continue
                if now < then:
                    alarms.append(
                        f"of the evidence for {name!r}, {now:.0%} lies inside of "
                        f"{len(common)} objects, where it was {then:.0%}, and AP went "
                        f"from {ap_before:.3f} to {ap:.3f}: their surroundings may be "
                        "learnt instead of them"
                    )
            self._best[name] = own, ap
        return alarms


def _by_class(shares: Shares) -> dict[str, dict[tuple[str, int], float]]:
    grouped: dict[str, dict[tuple[str, int], float]] = {}
    for key, (name, share) in shares.items():
        grouped.setdefault(name, {})[key] = share
    return grouped
