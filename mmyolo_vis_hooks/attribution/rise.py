"""The pieces of D-RISE: random masks, and how much of a detection survives them.

Sources: RISE (Petsiuk et al. 2018) for the masks and their weighted mean, D-RISE
(Petsiuk et al. 2021) for the similarity of detections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps

from ..errors import FeatureShapeError, VisConfigError, VisError
from ..records import Detections


def validate_mask_options(
    num_masks: Any, cells: Any, keep: Any, seed: Any, batch_size: Any
) -> None:
    """Check the options of :func:`rise_masks` that need no image.

    Raises:
        VisConfigError: If a value can never work.
    """
    counts = (("num_masks", num_masks), ("cells", cells), ("batch_size", batch_size))
    for name, value in counts:
        if not _is_integer(value) or value < 1:
            raise VisConfigError(
                f"{name}={value!r} is no count; set a positive integer"
            )
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < float(keep) < 1:
        raise VisConfigError(
            f"keep={keep!r} is no share; set a number between 0 and 1, such as 0.5"
        )
    if not _is_integer(seed) or seed < 0:
        raise VisConfigError(f"seed={seed!r} is no seed; set an integer from 0 on")


def rise_masks(
    num_masks: int,
    image_hw: tuple[int, int],
    *,
    cells: int = 16,
    keep: float = 0.5,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[torch.Tensor]:
    """Random smooth masks, one batch after the other.

    A mask is a coarse grid of zeros and ones, upsampled bilinearly to one cell more
    than the image and cut out at a random place, so that the cells' borders differ
    from mask to mask. The random numbers come from a generator of their own on the
    CPU, a mask's at a time: the masks are the same on every device and for every
    ``batch_size``. Only the grids travel to the device.

    Args:
        num_masks (int): How many masks in all.
        image_hw (tuple[int, int]): Height and width of the masks, pixels.
        cells (int): Grid cells along each side. Defaults to 16.
        keep (float): Share of the cells that are shown; the mean of every pixel over
            all masks. Defaults to 0.5.
        seed (int): Defaults to 0.
        batch_size (int): Masks that exist at a time. Defaults to 16.
        device (torch.device | str): Where the masks are made. Defaults to 'cpu'.
        dtype (torch.dtype): Defaults to float32.

    Yields:
        Tensor: ``(b, 1, H, W)`` in [0, 1], ``b`` at most ``batch_size``.

    Raises:
        VisConfigError: At the call, not at the first mask, if an option is wrong.

    Examples:
        >>> [len(masks) for masks in rise_masks(20, (48, 64), batch_size=8)]
        [8, 8, 4]
    """
    validate_mask_options(num_masks, cells, keep, seed, batch_size)
    if len(image_hw) != 2 or not all(_is_integer(n) and n > 0 for n in image_hw):
        raise VisConfigError(
            f"image_hw={image_hw!r} is no size; set (height, width) in pixels"
        )
    generator = torch.Generator().manual_seed(int(seed))
    return _masks(
        num_masks, image_hw, cells, keep, batch_size, torch.device(device), dtype,
        generator,
    )  # fmt: skip


def _masks(
    num_masks: int,
    image_hw: tuple[int, int],
    cells: int,
    keep: float,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    height, width = image_hw
    cell_hw = (-(-height // cells), -(-width // cells))
    size_hw = ((cells + 1) * cell_hw[0], (cells + 1) * cell_hw[1])
    for start in range(0, num_masks, batch_size):
        count = min(batch_size, num_masks - start)
        drawn = torch.stack(
            [torch.rand(cells**2 + 2, generator=generator) for _ in range(count)]
        )
        grids = (drawn[:, 2:] < keep).float().view(count, 1, cells, cells)
        large = F.interpolate(
            grids.to(device), size_hw, mode="bilinear", align_corners=False
        )
        masks = torch.empty((count, 1, height, width), dtype=dtype, device=device)
        shifts = (drawn[:, :2] * torch.tensor(cell_hw)).long().tolist()
        for index, (top, left) in enumerate(shifts):
            masks[index] = large[index, :, top : top + height, left : left + width]
        yield masks


def detection_similarities(
    boxes_xyxy: np.ndarray, labels: np.ndarray, detections: Detections
) -> np.ndarray:
    """How much of each explained detection is left on a masked image.

    D-RISE (eq. 6): the best, over all detections, of IoU * similarity of the class
    vectors * objectness. Departure: final detections carry one class and one score,
    so the similarity of the classes is 1 or 0, and the score, in which heads with
    objectness include it, stands for the objectness.

    Args:
        boxes_xyxy (np.ndarray): ``(K, 4)``, the boxes that are explained.
        labels (np.ndarray): ``(K,)``, their classes.
        detections (Detections): Found on the masked image, in the frame of
            ``boxes_xyxy``.

    Returns:
        np.ndarray: ``(K,)`` float32 in [0, 1]; 0 where nothing is left.
    """
    boxes = torch.as_tensor(np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4))
    if not len(detections) or not len(boxes):
        return np.zeros(len(boxes), dtype=np.float32)
    found = torch.as_tensor(np.asarray(detections.boxes_xyxy, dtype=np.float32))
    overlaps = bbox_overlaps(boxes, found).numpy()
    same_label = np.asarray(labels).reshape(-1, 1) == detections.labels[None]
    similarities = overlaps * same_label * detections.scores[None]
    return similarities.max(axis=1).astype(np.float32)


@torch.no_grad()
def accumulate(
    batches: Iterable[tuple[torch.Tensor, np.ndarray]], *, keep: float = 0.5
) -> np.ndarray:
    """Mean of the masks, each weighed by what the detector still sees under it.

    RISE (eq. 6): ``sum_i s_i M_i / (N E[M])``, where ``E[M]`` is ``keep`` for the
    masks of :func:`rise_masks`. A batch is forgotten before the next one is taken.

    Args:
        batches (Iterable): Pairs of masks ``(b, 1, H, W)`` and their weights
            ``(b, K)``, one per explained detection.
        keep (float): As for the masks. Defaults to 0.5.

    Returns:
        np.ndarray: ``(K, H, W)`` float32, not negative. A region that does not matter
        has the mean of the weights, not zero.

    Raises:
        FeatureShapeError: If the weights do not fit the masks.
        VisError: If there is no mask, or a weight is NaN or infinite.
    """
    total: torch.Tensor | None = None
    num_masks = 0
    for masks, weights in batches:
        weights = np.asarray(weights, dtype=np.float32)
        if weights.ndim != 2 or len(weights) != len(masks):
            raise FeatureShapeError(
                f"the weights of {len(masks)} masks have the shape {weights.shape}; "
                "pass one row per mask and one column per detection"
            )
        if not np.isfinite(weights).all():
            raise VisError(
                "a weight of a mask is NaN or infinite; look for detections whose "
                "scores are"
            )
        num_masks += len(masks)
        # Autocast would take the product in half precision.
        with torch.autocast(masks.device.type, enabled=False):
            columns = torch.from_numpy(weights.T.copy()).to(masks.device)
            part = torch.tensordot(columns, masks[:, 0].float(), dims=1)
        total = part if total is None else total.add_(part)
    if total is None:
        raise VisError("there is no mask to accumulate; ask for at least one")
    return (total / (num_masks * keep)).cpu().numpy()


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
