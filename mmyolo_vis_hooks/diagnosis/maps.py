"""What made a false positive, and what there was of a missed object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from logging import Logger
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import nn

from ..attribution.attribute import BoxAttributor
from ..attribution.saliency import normalize_saliency, raw_saliency
from ..data.detections import detections_of
from ..geometry import FrameTransform, cells_per_pixel
from ..metrics.pointing_game import energy_inside
from ..options import BoxAMOptions
from ..records import BoxExplanation, Detections
from .candidates import opened

if TYPE_CHECKING:
    from .look import Look


@dataclass(frozen=True, eq=False)
class ErrorMap:
    """Where the evidence for a box lies.

    Attributes:
        saliency: ``(H, W)`` float32 over the image, 0 to 1: 1 is its maximum.
        layer: Where the box was decided, such as ``'neck[1]'``.
        inside: Share of the map that lies in the box: little of it says that the
            detector looked at the surroundings.
        near: Share of it that lies in the box, or within a cell of the layer around it:
            what a map cannot place more exactly.
        peak: Its maximum before it was divided by it, in the unit of what is explained:
            with it maps of several detectors have one scale.
    """

    saliency: np.ndarray
    layer: str
    inside: float
    near: float
    peak: float = 1.0

    @property
    def is_shortcut(self) -> bool:
        """Whether more than half of the evidence lies outside of the box."""
        return self.near < 0.5

    @property
    def note(self) -> str:
        """Where it was looked at, and how much of it lies inside, in a few words."""
        return f"map at {self.layer}, {self.inside:.0%} of it inside"

    def __repr__(self) -> str:
        return f"ErrorMap({self.layer}, {self.inside:.0%} inside)"


class _Wanted(BoxAttributor):
    """Explains the boxes that it is told to."""

    wanted = Detections()
    indices: Mapping[int, int] = {}

    def choose(self, predictions: InstanceData) -> list[int]:
        self.indices = found_again(predictions, self.wanted)
        return list(dict.fromkeys(self.indices.values()))


class ErrorMapper:
    """Explains final detections and candidates of one detector.

    Args:
        detector (nn.Module): The detector, without wrappers.
        logger (Logger): Told what a user should know.
        options (BoxAMOptions, optional): Method, target and layers. Defaults to None:
            those of ``BoxAMOptions``.
        class_names (Sequence[str]): Names of the classes, for what is logged.
    """

    def __init__(
        self,
        detector: nn.Module,
        logger: Logger,
        options: BoxAMOptions | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self._detector = detector
        self._options = options or BoxAMOptions()
        self._attributor = _Wanted(
            detector, self._options, class_names=class_names, logger=logger
        )

    def maps(
        self,
        look: Look,
        wanted: Detections,
        *,
        candidates: bool = False,
    ) -> dict[int, ErrorMap]:
        """Explain some final detections, or some candidates, of an image.

        Args:
            look (Look): At the image.
            wanted (Detections): Those that are explained.
            candidates (bool): Whether they are some of those that :func:`opened`
                gives. Defaults to False: of the final ones.

        Returns:
            dict: Maps by position; those without any influence, and those that a
            forward in full precision does not find, are left out.
        """
        if not len(wanted):
            return {}
        self._attributor.wanted = wanted
        with (
            opened(self._detector) if candidates else nullcontext(),
            torch.autocast(look.inputs.device.type, enabled=False),
        ):
            found = self._attributor.explain(look.inputs, look.metainfo)
        predictions, explanations = found
        frame, boxes = look.frame, detections_of(predictions).boxes_xyxy
        maps = {}
        for explanation in explanations:
            box_xyxy = boxes[explanation.index]
            raw = raw_saliency(explanation, frame, box_xyxy, smooth=self._options.sigma)
            saliency = normalize_saliency(raw).astype(np.float32, copy=False)
            if saliency.any():
                cell_xy = _cell_xy(explanation, frame)
                margin = np.concatenate([-cell_xy, cell_xy])
                speaking = saliency.clip(min=0)  # of a signed map what is for the box
                maps[explanation.index] = ErrorMap(
                    saliency,
                    explanation.layer,
                    energy_inside(speaking, box_xyxy),
                    energy_inside(speaking, box_xyxy + margin),
                    float(raw.max()),
                )
        indices = self._attributor.indices
        return {k: maps[index] for k, index in indices.items() if index in maps}


def found_again(predictions: InstanceData, wanted: Detections) -> dict[int, int]:
    """Which predictions of another forward are the wanted boxes.

    Another precision, another batch or test-time augmentation put them into another
    order, and may have found others.

    Returns:
        dict: Index of the prediction of its class that is nearest in place and score,
        by position in ``wanted``; boxes whose sides are a quarter of its size away
        are none.
    """
    own = detections_of(predictions)
    indices = {}
    for k, (box, score) in enumerate(zip(wanted.boxes_xyxy, wanted.scores)):
        size = max(1.0, float((box[2:] - box[:2]).max()))
        apart = np.abs(own.boxes_xyxy - box).max(axis=1) / size
        same = (own.labels == wanted.labels[k]) & (apart < 0.25)
        if same.any():
            distance = np.where(same, apart + np.abs(own.scores - score), np.inf)
            indices[k] = int(distance.argmin())
    return indices


def _cell_xy(explanation: BoxExplanation, frame: FrameTransform) -> np.ndarray:
    """Width and height of the largest cell of the maps, in pixels of the image."""
    cells = [
        cells_per_pixel(own.saliency.shape, frame.network_hw)[::-1]
        for own in explanation.maps
    ]
    return 1 / (np.array(cells).min(axis=0) * frame.scale_xy)
