"""What tells two classes of one box apart: the one that it was given, and the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import CRITICAL, Logger
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import nn

from ..attribution.attribute import BoxAttributor
from ..attribution.saliency import raw_saliency
from ..attribution.targets import ChosenBoxes, Target
from ..data.detections import detections_of
from ..options import BoxAMOptions
from ..records import Detections
from ..render.boxes import class_name
from .maps import found_again

if TYPE_CHECKING:
    from .look import Look

Pair = tuple[int, int]
"""Index of a detection, and the class that it should have been given."""


@dataclass(frozen=True, eq=False)
class ClassContrast:
    """What speaks for each of two classes of one box, and what tells them apart.

    The maps are of the raw class scores at the anchor that made the box: gradient times
    activation, summed over the channels, which tells what a cell adds to first order.
    So the map of a difference is the difference of the maps.

    Attributes:
        given_name: The class that the box was given.
        right_name: The class of the object.
        given: ``(H, W)`` float32 over the image, 0 to 1: what speaks for the given
            class, in shares of the larger maximum of both.
        right: The same of the right class.
        difference: ``(H, W)`` float32, the right class's score minus the given one's,
            in logits per cell: positive where the image speaks for the right class.
        layer: Where it was looked at, such as ``'neck[1]'``.
    """

    given_name: str
    right_name: str
    given: np.ndarray
    right: np.ndarray
    difference: np.ndarray
    layer: str

    def __repr__(self) -> str:
        names = f"{self.right_name} against {self.given_name}"
        return f"ClassContrast({names} at {self.layer})"


class _Pairs(BoxAttributor):
    """Explains four numbers of each pair: two raw scores and both their differences.

    Maps are rectified, so it takes two to have one of any sign.
    """

    detections = Detections()
    wanted: Sequence[Pair] = ()
    # Of those that are found, which prediction it is.
    pairs: Mapping[Pair, Pair] = {}

    def choose(self, predictions: InstanceData) -> list[int]:
        again = found_again(predictions, self.detections)
        known = [pair for pair in self.wanted if pair[0] in again]
        self.pairs = {(own, label): (again[own], label) for own, label in known}
        return 4 * [index for index, _ in self.pairs.values()]

    def targets(self) -> list[Target]:
        return [Target("class score", self._scores, "two raw class scores and more")]

    def _scores(self, boxes: ChosenBoxes) -> torch.Tensor:
        indices, labels = map(list, zip(*self.pairs.values()))
        once = ChosenBoxes(boxes.graph, indices, boxes.detector)
        given, right = once.logits(), once.logits(labels)
        return torch.cat([given, right, right - given, given - right])


class ClassComparer:
    """Tells the classes of detections apart.

    Args:
        detector (nn.Module): The detector, without wrappers.
        class_names (Sequence[str]): Names of the classes.
    """

    def __init__(self, detector: nn.Module, class_names: Sequence[str]) -> None:
        self._names = class_names
        # That nothing speaks for a class is no news here.
        silent = Logger(__name__, CRITICAL)
        self._pairs = _Pairs(detector, BoxAMOptions(method="hirescam"), logger=silent)
        self._smooth = BoxAMOptions().sigma

    def contrasts(
        self,
        look: Look,
        detections: Detections,
        pairs: Sequence[Pair],
    ) -> dict[Pair, ClassContrast]:
        """Compare the class of each detection with another one.

        Args:
            look (Look): At the image.
            detections (Detections): Final ones.
            pairs (Sequence[Pair]): Which of them, each with the right class.

        Returns:
            dict: By pair; those without any influence, and those that a forward in
            full precision does not find, are left out.

        Raises:
            VisError: If this detector's raw class scores cannot be had.
        """
        self._pairs.detections, self._pairs.wanted = detections, pairs
        with torch.autocast(look.inputs.device.type, enabled=False):
            predictions, found = self._pairs.explain(look.inputs, look.metainfo)
        frame, again = look.frame, detections_of(predictions)
        contrasts = {}
        known = self._pairs.pairs
        for number, (pair, (index, _)) in enumerate(known.items()):
            four, box = found[number :: len(known)], again.boxes_xyxy[index]
            given, right, more, less = (
                raw_saliency(own, frame, box, smooth=self._smooth) for own in four
            )
            difference, peak = more - less, max(given.max(), right.max())
            if difference.any():
                contrasts[pair] = ClassContrast(
                    class_name(int(again.labels[index]), self._names),
                    class_name(pair[1], self._names),
                    given / peak if peak else given,
                    right / peak if peak else right,
                    difference,
                    four[2].layer or four[3].layer,
                )
        return contrasts
