"""Whether two pictures show the same things at the same places.

Edges are compared, tile by tile: where a tile of the one picture fits best into the
other one says whether, and whereto, things have moved. Colours, contrast, noise and
inversion change how well a tile fits, but not where.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import torch

from ..geometry import FrameTransform

# Half a cell of stride 8 is 4 pixels; edges are known to about one.
_TOLERANCE = 2
_SEARCH = 14
_MAX_SIDE = 1000
_TILES = 5
_MIN_TILE = 32
# A tile that fits into itself nearly as well a little further has no place of its own.
_MAX_SELF_FIT = 0.8
# So much better must it fit elsewhere to have moved: straight edges slide.
_MARGIN = 0.02
_MIN_TILES = 2
_MIN_SHARE = 0.45
_CLEAR_SHARES = (0.25, 0.75)


@dataclass(frozen=True)
class Agreement:
    """How many tiles of two pictures show the same things at the same places."""

    num_tiles: int  # with texture, which tell something
    num_alike: int  # of these, those that fit best where they are

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.num_tiles + other.num_tiles, self.num_alike + other.num_alike
        )

    @property
    def is_clear(self) -> bool:
        """Whether there is texture enough to tell, and no doubt."""
        low, high = (share * self.num_tiles for share in _CLEAR_SHARES)
        return self.num_tiles >= _MIN_TILES and not low < self.num_alike < high

    @property
    def holds(self) -> bool:
        """Whether the pictures agree; True where nothing can be told."""
        return (
            self.num_tiles < _MIN_TILES or self.num_alike >= _MIN_SHARE * self.num_tiles
        )


def compare_places(first: np.ndarray, second: np.ndarray) -> Agreement:
    """Compare where the edges of two pictures of one size lie.

    Args:
        first (np.ndarray): ``(H, W)`` or ``(H, W, C)``, any real dtype.
        second (np.ndarray): The same height and width.
    """
    shrink = min(1.0, _MAX_SIDE / max(first.shape[:2]))
    greys = [_grey(picture) for picture in (first, second)]
    if shrink < 1:
        greys = [
            cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
            for grey in greys
        ]
    edges = [_edges(grey) for grey in greys]
    tiles = [
        fits
        for rows in _spans(edges[0].shape[0])
        for columns in _spans(edges[0].shape[1])
        if (fits := _fits(edges[0], edges[1], rows, columns)) is not None
    ]
    return Agreement(len(tiles), sum(tiles))


def compare_with_input(
    image: np.ndarray, inputs: torch.Tensor, frame: FrameTransform
) -> Agreement:
    """Compare a picture with the network's input, put back through a frame.

    Args:
        image (np.ndarray): ``(H, W)`` or ``(H, W, C)``, what will be drawn on.
        inputs (Tensor): ``(C, h, w)``, the network's input.
        frame (FrameTransform): Where the image is said to lie in the input.
    """
    # Where the network sees less than the image holds, no more can be compared.
    shrink = min(1.0, *frame.scale_xy, _MAX_SIDE / max(frame.image_hw))
    height, width = (max(1, round(side * shrink)) for side in frame.image_hw)
    picture = cv2.resize(_grey(image), (width, height), interpolation=cv2.INTER_AREA)
    return compare_places(picture, _put_back(inputs, frame, (height, width)))


def _put_back(
    inputs: torch.Tensor, frame: FrameTransform, size_hw: tuple[int, int]
) -> np.ndarray:
    """The network's input over the image frame, ``size_hw`` pixels large."""
    grey = _grey(inputs.detach().float().cpu().numpy().transpose(1, 2, 0))
    # Network pixels per pixel of the result.
    steps = [
        frame.scale_xy[axis] * frame.image_hw[1 - axis] / size_hw[1 - axis]
        for axis in (0, 1)
    ]
    if max(steps) > 1:
        blur_x, blur_y = (max(0.01, (step - 1) / 2) for step in steps)
        grey = cv2.GaussianBlur(grey, (0, 0), sigmaX=blur_x, sigmaY=blur_y)
    # Continuous positions have their pixel's centre at .5, those of OpenCV at .0.
    x, y = (
        ((np.arange(size) + 0.5) * step + offset - 0.5).astype(np.float32)
        for size, step, offset in zip(size_hw[::-1], steps, frame.offset_xy)
    )
    border = cv2.BORDER_REPLICATE
    return cv2.remap(grey, *np.meshgrid(x, y), cv2.INTER_LINEAR, borderMode=border)


def _grey(picture: np.ndarray) -> np.ndarray:
    grey = picture.reshape(*picture.shape[:2], -1).mean(axis=2, dtype=np.float32)
    return np.nan_to_num(grey, posinf=0.0, neginf=0.0)


def _edges(grey: np.ndarray) -> np.ndarray:
    grey = cv2.GaussianBlur(grey, (0, 0), sigmaX=1.0)
    slopes = [cv2.Sobel(grey, cv2.CV_32F, *order) for order in ((1, 0), (0, 1))]
    # The root, or else a few strong edges are all that counts.
    return np.sqrt(np.hypot(*slopes))


def _spans(length: int) -> list[slice]:
    """Tiles along one axis, away from the border by what is searched."""
    inner = length - 2 * _SEARCH
    count = max(0, min(_TILES, inner // _MIN_TILE))
    ends = [_SEARCH + inner * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(ends)]


def _fits(
    first: np.ndarray, second: np.ndarray, rows: slice, columns: slice
) -> bool | None:
    """Whether a tile fits best where it is; None if it has no place of its own."""
    tile = first[rows, columns]
    around = tuple(slice(s.start - _SEARCH, s.stop + _SEARCH) for s in (rows, columns))
    if min(tile.std(), second[rows, columns].std()) < 1e-3 * max(1e-6, first.max()):
        return None
    _, elsewhere = _best_fits(tile, first[around])
    if elsewhere > _MAX_SELF_FIT:
        return None
    here, elsewhere = _best_fits(tile, second[around])
    return bool(here >= elsewhere - _MARGIN)


def _best_fits(tile: np.ndarray, around: np.ndarray) -> tuple[float, float]:
    """Correlation of a tile with what surrounds it: best near its place, elsewhere."""
    fit = np.nan_to_num(cv2.matchTemplate(around, tile, cv2.TM_CCOEFF_NORMED))
    near = slice(_SEARCH - _TOLERANCE, _SEARCH + _TOLERANCE + 1)
    here = float(fit[near, near].max())
    fit[near, near] = -1
    return here, float(fit.max())
