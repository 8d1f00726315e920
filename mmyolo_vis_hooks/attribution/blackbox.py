"""Methods that look at no layer: D-RISE, and the random masks that it lays on images.

Sources: RISE (Petsiuk et al. 2018) for the masks and their weighted mean, D-RISE
(Petsiuk et al. 2021) for the similarity of detections, VX-CODE (2026) for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from rich.progress import track
from torch import nn

from ..data.detections import detections_of
from ..records import Detections
from .methods import register_method, require_finite

CELLS = 16
KEEP = 0.5
_ONE_PLACE = 0.9


@dataclass(frozen=True)
class MaskedImage:
    """What a method may ask of an image ``(1, 3, H, W)`` and K boxes on it.

    ``score`` gives what the boxes score, ``(n, K)``, on images ``(n, 3, H, W)``.
    """

    inputs: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]
    num_masks: int
    batch_size: int
    show_progress: bool = False

    def masked_scores(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Random masks ``(n, 1, H, W)`` and what the boxes score under them."""
        batches = rise_masks(
            self.num_masks,
            self.inputs.shape[-2:],
            batch_size=self.batch_size,
            device=self.inputs.device,
            dtype=self.inputs.dtype,
        )
        for masks in track(
            batches,
            "random masks",
            total=-(-self.num_masks // self.batch_size),
            transient=True,
            disable=not self.show_progress,
        ):
            scores = self.score(self.inputs * masks)
            require_finite(scores, "the scores under a mask")
            yield masks, scores


@register_method(
    "drise",
    kind="black_box",
    summary="D-RISE: which random masks of the image leave the detection as it was.",
    formula="sum_i s_i * M_i / (N * keep), s_i = the score at the box's own anchor on "
    "the image times mask M_i",
    takes_eigen_smooth=False,
)
def drise(image: MaskedImage) -> torch.Tensor:
    """RISE (eq. 6). Departure: what does not matter has the mean of the weights there,
    and zero here."""
    total = torch.zeros(())
    for masks, scores in image.masked_scores():
        # Autocast would take the product in half precision.
        with torch.autocast(masks.device.type, enabled=False):
            part = torch.tensordot(scores.float().T, masks[:, 0].float(), dims=1)
        total = total.to(part) + part
    maps = total / (image.num_masks * KEEP)
    return maps - maps.amin((1, 2), keepdim=True)


def rise_masks(
    num_masks: int,
    image_hw: Sequence[int],
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[torch.Tensor]:
    """Random smooth masks ``(b, 1, H, W)`` in [0, 1], one batch after the other.

    A mask is a coarse grid of zeros and ones, half of each, upsampled bilinearly to one
    cell more than the image and cut out at a random place, so that the cells' borders
    differ from mask to mask. The random numbers come from a generator of their own on
    the CPU, a mask's at a time: the masks are the same in every run, on every device
    and for every ``batch_size``.

    Examples:
        >>> [len(masks) for masks in rise_masks(20, (48, 64), batch_size=8)]
        [8, 8, 4]
    """
    generator = torch.Generator().manual_seed(0)
    height, width = image_hw
    cell_hw = (-(-height // CELLS), -(-width // CELLS))
    size_hw = ((CELLS + 1) * cell_hw[0], (CELLS + 1) * cell_hw[1])
    for start in range(0, num_masks, batch_size):
        count = min(batch_size, num_masks - start)
        drawn = torch.stack(
            [torch.rand(CELLS**2 + 2, generator=generator) for _ in range(count)]
        )
        grids = (drawn[:, 2:] < KEEP).float().view(count, 1, CELLS, CELLS)
        large = F.interpolate(
            grids.to(device), size_hw, mode="bilinear", align_corners=False
        )
        shifts = (drawn[:, :2] * torch.tensor(cell_hw)).long().tolist()
        masks = [
            own[:, top : top + height, left : left + width]
            for own, (top, left) in zip(large, shifts)
        ]
        yield torch.stack(masks).to(dtype)


Similarity = Callable[[Detections, Sequence[int], Detections], np.ndarray]
"""From the detections of an image, K indices of them and the detections of another
image to how much of each of the K is among these, ``(K,)``."""


def final_scores(
    detector: nn.Module,
    predictions: InstanceData,
    chosen: list[int],
    metainfo: Mapping[str, Any],
    similarity: Similarity | None = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What scores boxes by the final detections on other images.

    The similarity is :func:`detection_similarities` by default.
    """
    similarity = similarity or detection_similarities
    wanted = detections_of(predictions)

    def score(batch: torch.Tensor) -> torch.Tensor:
        samples = [DetDataSample(metainfo=dict(metainfo)) for _ in batch]
        outputs = detector(batch, samples, mode="predict")
        found = [similarity(wanted, chosen, detections_of(o)) for o in outputs]
        return torch.from_numpy(np.stack(found)).to(batch.device)

    return score


def detection_similarities(
    wanted: Detections, chosen: Sequence[int], found: Detections
) -> np.ndarray:
    """How much of each of K detections is left on a masked image, ``(K,)`` in [0, 1].

    D-RISE (eq. 6): the best, over all detections, of IoU * similarity of the class
    vectors * objectness. Departure: final detections carry one class and one score, so
    the similarity of the classes is 1 or 0, and the score, in which heads with
    objectness include it, stands for the objectness.
    """
    own = wanted.take(list(chosen))
    same_label = own.labels[:, None] == found.labels[None]
    return _best(_overlaps(own, found) * same_label * found.scores)


def vector_similarities(
    wanted: Detections, chosen: Sequence[int], found: Detections
) -> np.ndarray:
    """The same without the objectness, and with class vectors as far as there are any.

    VX-CODE (2026): the best of IoU * cosine of the class vectors. Departure: a head
    that gives a box of each class its own detection says by all that lie at one place,
    with an IoU above 0.9, what the classes are there; of one that gives the best class
    alone nothing but that is known.
    """
    own = wanted.take(list(chosen))
    count = 1 + max([*wanted.labels, *found.labels], default=0)
    vectors = _class_vectors(own, wanted, count), _class_vectors(found, found, count)
    return _best(_overlaps(own, found) * (vectors[0] @ vectors[1].T))


def _class_vectors(own: Detections, found: Detections, num_classes: int) -> np.ndarray:
    """The greatest score of each class among what was found at the place of each of N
    detections, ``(N, C)``, of length 1."""
    vectors = np.zeros((len(own), num_classes))
    here, there = (_overlaps(own, found) > _ONE_PLACE).nonzero()
    np.maximum.at(vectors, (here, found.labels[there]), found.scores[there])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def _overlaps(one: Detections, other: Detections) -> np.ndarray:
    """IoU of each of N boxes and each of M, ``(N, M)`` float32."""
    boxes = (torch.from_numpy(d.boxes_xyxy) for d in (one, other))
    return bbox_overlaps(*boxes).numpy()


def _best(similarities: np.ndarray) -> np.ndarray:
    return similarities.max(axis=1, initial=0).astype(np.float32)
