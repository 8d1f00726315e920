"""Evidence: which pixels of an object speak for its score, and which against.

Gradients of a box's own score at the pixels, on images between one without content and
the image itself: along the straight way, and under coarse random masks with their
complements, where the score is asked for parts of the object.

Cells of the box can be hidden and shown alone, too.

Sources: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks"
(integrated gradients); Okhrati and Lipani 2021, "A Multilinear Sampling Algorithm to
Estimate Shapley Values" (masks of every size with their complements); Zeiler and
Fergus 2014, "Visualizing and Understanding Convolutional Networks" (hidden parts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..geometry import box_cells
from .methods import register_method
from .scoring import Scorer

CELLS = 16
"""Cells of a mask along the longer side of the input."""
BLUR = 0.05
"""Sigma of the blurred image, in units of the longer side of the input."""
SMOOTH = 0.05
"""Sigma of what a map is smoothed by, in units of the side of a square of the area."""
EQUAL = 1e-3
"""Cells whose worth differs by less are worth the same."""
BASELINES = ("blur", "black", "mean")


@dataclass(frozen=True)
class PixelPath:
    """What a method may ask of an image ``(1, C, H, W)`` and K boxes on it.

    ``baseline`` is the image without content, of the same shape; ``boxes_xyxy`` are
    ``(K, 4)``, in its pixels. ``found`` gives what is left of the boxes among the final
    detections, or another target than the score, ``(n, K)``, on n images that are made
    batch by batch.
    """

    inputs: torch.Tensor
    baseline: torch.Tensor
    boxes_xyxy: np.ndarray
    steps: int
    num_masks: int
    num_cells: int
    scorer: Scorer
    found: Callable[[int, Callable[[slice], torch.Tensor]], torch.Tensor]

    def evidence(self, shares: torch.Tensor) -> torch.Tensor:
        """What each pixel adds to the scores, ``(K, H, W)``.

        The mean over images with shares ``(n, 1, H, W)`` of the image, or ``(n, 1, 1,
        1)``, the rest of which is the baseline.
        """
        change = self.inputs - self.baseline

        def between(part: slice) -> torch.Tensor:
            return self.baseline + shares[part] * change

        slopes = self.scorer.slopes_of_many(len(shares), between, "evidence")
        return (slopes * change).sum(dim=1) / len(shares)

    def worth_of_cells(self) -> torch.Tensor:
        """How each cell of a grid on a box ranks by what it is worth, ``(K, H, W)``.

        Its worth is the score that the box finds with this cell alone less that without
        it alone, while what surrounds the box stays. The cell that is worth most has 1,
        the least -1, and outside of the box it is 0.
        """
        maps = [self._worth_of_cells(k, box) for k, box in enumerate(self.boxes_xyxy)]
        return torch.stack(maps).to(self.inputs)

    def _worth_of_cells(self, k: int, box_xyxy: np.ndarray) -> torch.Tensor:
        grid = box_cells(box_xyxy, self.inputs.shape[-2:], self.num_cells)
        # Cells without a pixel, outside of the image or too small, are none.
        numbers, places = np.unique(grid, return_inverse=True)
        cells = torch.from_numpy(places.reshape(grid.shape)).to(self.inputs.device)
        cells, count = cells - int(numbers[0] < 0), int((numbers >= 0).sum())
        if not count:
            return torch.zeros(grid.shape)
        asked = torch.arange(2 * count, device=self.inputs.device).view(-1, 1, 1)

        def images(part: slice) -> torch.Tensor:
            own = cells == asked[part] % count
            alone = own | (cells < 0)
            shown = torch.where(asked[part] < count, alone, ~own)[:, None]
            return torch.where(shown, self.inputs, self.baseline)

        alone, without = self.found(2 * count, images)[:, k].chunk(2)
        worth = alone - without
        more = worth[:, None] - worth
        # Equal ones share their rank.
        more = torch.where(more.abs() < EQUAL, 0, more.sign())
        ranks = more.sum(dim=1) / max(count - 1, 1)
        return F.pad(ranks, (0, 1))[cells]  # the last lies outside

    def smoothed(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps ``(K, H, W)``, each with a Gaussian of the scale of its box."""
        sides = (self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]).clip(1)
        found = []
        for own, sigma in zip(maps, SMOOTH * np.sqrt(sides.prod(axis=1))):
            rows, columns = (_gaussians(n, float(sigma)).to(own) for n in own.shape)
            found.append(rows @ own @ columns.T)
        return torch.stack(found)


@register_method(
    "evidence",
    kind="pixels",
    summary="What inside a box speaks for its score, and what against: gradients at "
    "the pixels on the way from the blurred image and under coarse masks.",
    formula="mean of sum_c g * (x - b), b = the blurred image, g at b + m * (x - b), m "
    "= steps from 0 to 1, plus the same for m = random masks with their complements, "
    "each by its norm; with cells, smoothed and by its maximum, plus how a cell of the "
    "box ranks, -1 to 1, by IoU * score of what is found with it alone less without "
    "it; then a Gaussian with sigma = 0.05 * sqrt(box area)",
    default_smooth=SMOOTH,
    tells="tells what",
    takes_eigen_smooth=False,
)
def evidence(path: PixelPath) -> torch.Tensor:
    inputs = path.inputs
    shares = (torch.arange(path.steps).to(inputs) + 0.5) / path.steps
    masks = complementary_masks(path.num_masks, inputs.shape[-2:]).to(inputs)
    ways = [shares.view(-1, 1, 1, 1), masks]
    maps = [path.evidence(way) for way in ways if len(way)]
    # Either may be several times as large; both have half of the say.
    sizes = [own.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12) for own in maps]
    slopes = torch.stack([own / size for own, size in zip(maps, sizes)]).sum(dim=0)
    if not path.num_cells:
        return slopes
    # Gradients see small changes, cells what is left when a part is gone.
    slopes = path.smoothed(slopes)
    largest = slopes.abs().amax((1, 2), keepdim=True).clamp(min=1e-6)
    return slopes / largest + path.worth_of_cells()


def complementary_masks(count: int, image_hw: Sequence[int]) -> torch.Tensor:
    """Random masks that keep coarse cells, each followed by what it leaves out.

    Their shares are spread evenly between 0 and 1. Cells are enlarged bilinearly and
    shifted, and the masks are the same in every run.

    Args:
        count (int): Even.
        image_hw (Sequence[int]): Height and width, pixels.

    Returns:
        Tensor: ``(count, 1, H, W)`` float32, 0 to 1, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    cell = -(-max(image_hw) // CELLS)
    rows, columns = (-(-size // cell) + 1 for size in image_hw)
    masks = []
    for number in range(count // 2):
        cells = torch.rand(1, 1, rows, columns, generator=generator)
        kept = (cells < (number + 0.5) / count).float()
        large = F.interpolate(kept, scale_factor=cell, mode="bilinear")
        top, left = torch.randint(cell, (2,), generator=generator).tolist()
        mask = large[..., top : top + image_hw[0], left : left + image_hw[1]]
        masks += [mask, 1 - mask]
    return torch.cat(masks) if masks else torch.zeros(0, 1, *image_hw)


def baseline_of(kind: str, inputs: torch.Tensor, preprocessor: Any) -> torch.Tensor:
    """The image without content: blurred, black, or of its mean colour.

    Args:
        kind (str): One of ``BASELINES``.
        inputs (Tensor): ``(1, C, H, W)``, as the preprocessor gives it.
        preprocessor: Of the detector, which knows what black became.
    """
    if kind == "mean":
        return inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)
    if kind == "black":
        black = inputs.new_zeros(inputs.shape[1], 1, 1)
        if getattr(preprocessor, "_enable_normalize", False):
            black = (black - preprocessor.mean) / preprocessor.std
        return black.to(inputs).expand_as(inputs)
    sigma = BLUR * max(inputs.shape[-2:])
    rows, columns = (_gaussians(size, sigma).to(inputs) for size in inputs.shape[-2:])
    return rows @ inputs @ columns.T


def _gaussians(size: int, sigma: float) -> torch.Tensor:
    """``(size, size)``: each pixel's share of each blurred one; rows have the sum 1."""
    places = torch.arange(size, dtype=torch.float32)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return weights / weights.sum(dim=1, keepdim=True)
