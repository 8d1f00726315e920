"""What made a false positive, and what there was of a missed object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from logging import Logger
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import nn

from ..attribution.attribute import BoxAttributor
from ..attribution.saliency import normalize_saliency, raw_saliency
from ..data.alignment import packed_frame
from ..geometry import FrameTransform, cells_per_pixel
from ..metrics.pointing_game import energy_inside
from ..options import BoxAMOptions
from ..records import BoxExplanation, Detections
from .opening import opened


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


class _Named(BoxAttributor):
    """Explains the detections that it is told to."""

    indices: Sequence[int] = ()

    def choose(self, predictions: InstanceData) -> list[int]:
        return list(self.indices)


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
        self._attributor = _Named(
            detector, self._options, class_names=class_names, logger=logger
        )

    def maps(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        image_hw: tuple[int, int],
        detections: Sequence[int],
        candidates: Sequence[int],
    ) -> tuple[dict[int, ErrorMap], dict[int, ErrorMap]]:
        """Explain some final detections and some candidates of an image.

        Args:
            inputs (Tensor): ``(1, 3, H, W)``, as the data preprocessor gives it.
            metainfo (Mapping): Of its data sample.
            image_hw (tuple[int, int]): Size of the image.
            detections (Sequence[int]): Which final detections.
            candidates (Sequence[int]): Which candidates, as :func:`opened` gives them.

        Returns:
            tuple: Maps by detection, and by candidate; those without any influence are
            left out.
        """
        explained = partial(self._explained, inputs, metainfo, image_hw)
        found = explained(detections) if detections else {}
        if not candidates:
            return found, {}
        with opened(self._detector):
            return found, explained(candidates)

    def _explained(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        image_hw: tuple[int, int],
        indices: Sequence[int],
    ) -> dict[int, ErrorMap]:
        self._attributor.indices = indices
        with torch.autocast(inputs.device.type, enabled=False):
            predictions, explanations = self._attributor.explain(inputs, metainfo)
        frame = packed_frame(image_hw, metainfo["batch_input_shape"], metainfo)
        maps = {}
        for explanation in explanations:
            box = predictions.bboxes[explanation.index]
            box_xyxy = getattr(box, "tensor", box).detach().float().cpu().numpy()
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
        return maps


def _cell_xy(explanation: BoxExplanation, frame: FrameTransform) -> np.ndarray:
    """Width and height of the largest cell of the maps, in pixels of the image."""
    cells = [
        cells_per_pixel(own.saliency.shape, frame.network_hw)[::-1]
        for own in explanation.maps
    ]
    return 1 / (np.array(cells).min(axis=0) * frame.scale_xy)


def above(detections: Detections, score_thr: float) -> tuple[Detections, np.ndarray]:
    """Detections above a threshold, and which of all these are."""
    kept = np.flatnonzero(detections.scores > score_thr)
    return (
        Detections(
            detections.boxes_xyxy[kept],
            detections.scores[kept],
            detections.labels[kept],
        ),
        kept,
    )
