"""Maps of the same detections side by side, with what chance could have done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

SIZES = {
    "all": (0.0, np.inf),
    "< 48 px": (0.0, 48.0),
    "48 to 160 px": (48.0, 160.0),
    "> 160 px": (160.0, np.inf),
}
"""Groups of boxes by the square root of their area; the upper end belongs to them."""

_NUM_SAMPLES = 2000


@dataclass(frozen=True)
class Compared:
    """A value of a map in one group of boxes.

    ``low`` and ``high`` are the 95 % interval of ``mean``, NaN of a single image; those
    of ``difference`` to the other map are paired, detection by detection.
    """

    map: str
    value: str
    size: str
    count: int
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        return self.difference_low > 0 or self.difference_high < 0


class Comparison:
    """Values of several maps, update by update, with intervals.

    The intervals come from a bootstrap over images, since detections of one image are
    alike: 2,000 samples, the same in every run.

    Args:
        against (str): The map that the others are compared with.
    """

    def __init__(self, against: str) -> None:
        self.against = against
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._images: dict[str, int] = {}
        self._image_of: list[int] = []
        self._sizes: list[float] = []
        self._found: list[Mapping[str, Mapping[str, float]]] = []

    def update(
        self, image: str, size: float, found: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Add one detection.

        Args:
            image (str): Name of its image.
            size (float): Square root of the area of its box, pixels.
            found (Mapping): Values by name, by map.
        """
        self._image_of.append(self._images.setdefault(image, len(self._images)))
        self._sizes.append(size)
        self._found.append(found)

    def compute(self) -> list[Compared]:
        """One record per map, value and size that has any detection."""
        return list(self._records()) if self._found else []

    def _records(self) -> Iterator[Compared]:
        count = len(self._images)
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(count, np.full(count, 1 / count), _NUM_SAMPLES)
        sizes = np.array(self._sizes)
        maps = dict.fromkeys(name for found in self._found for name in found)
        values = dict.fromkeys(
            v for f in self._found for own in f.values() for v in own
        )
        for size, (above, most) in SIZES.items():
            of_size = (sizes > above) & (sizes <= most)
            for value in values:
                other = self._column(self.against, value)
                for name in maps:
                    own = self._column(name, value)
                    has = of_size & ~np.isnan(own)
                    if has.any():
                        mean = self._interval(own, has, drawn)
                        both = has & ~np.isnan(other)
                        less = self._interval(own - other, both, drawn)
                        yield Compared(name, value, size, int(has.sum()), *mean, *less)

    def _column(self, name: str, value: str) -> np.ndarray:
        values = [found.get(name, {}).get(value, np.nan) for found in self._found]
        return np.array(values, float)

    def _interval(
        self, values: np.ndarray, has: np.ndarray, drawn: np.ndarray
    ) -> tuple[float, float, float]:
        if not has.any():
            return np.nan, np.nan, np.nan
        of = np.array(self._image_of)[has]
        if len(set(of.tolist())) < 2:  # one image says nothing of chance
            return float(values[has].mean()), np.nan, np.nan
        sums = np.bincount(of, values[has], len(self._images))
        counts = drawn @ np.bincount(of, minlength=len(self._images))
        means = (drawn @ sums)[counts > 0] / counts[counts > 0]
        low, high = np.percentile(means, (2.5, 97.5))
        return float(values[has].mean()), float(low), float(high)
