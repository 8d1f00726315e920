"""What maps of detections are measured on: their objects, and the detector itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from torch import nn

from .data.detections import detections_of
from .diagnosis.matching import GroundTruth, match
from .geometry import FrameTransform
from .metrics.faithfulness import Score, subjects_of
from .metrics.metric import Subject
from .records import Detections, Look


def subjects_with_objects(
    detector: nn.Module,
    look: Look,
    chosen: Sequence[int],
    instances: Sequence[Mapping[str, Any]] = (),
    *,
    score: Score | None = None,
    batch_size: int = 8,
) -> list[Subject]:
    """The subjects of some detections, with the objects that they hit.

    Args:
        detector (nn.Module): What was looked at; in eval mode.
        look (Look): The forward that found them.
        chosen (Sequence[int]): Which of its detections, the highest score first.
        instances (Sequence[Mapping]): Objects as a data set has them, in the original
            frame; those with a ``'mask'`` give its outline.
        score, batch_size: As of :func:`subjects_of`.
    """
    subjects = subjects_of(
        detector,
        look.inputs,
        look.metainfo,
        look.predictions,
        chosen,
        score=score,
        batch_size=batch_size,
    )
    if not instances or not subjects or not look.in_original:
        return subjects
    frame = FrameTransform.from_metainfo(look.metainfo)
    truth = GroundTruth.of(instances)
    truth = replace(truth, boxes_xyxy=frame.boxes_to_network(truth.boxes_xyxy))
    found = detections_of(look.predictions)
    boxes = np.stack([subject.box_xyxy for subject in subjects])
    own = Detections(boxes, found.scores[list(chosen)], found.labels[list(chosen)])
    for hit in match(own, truth).hits:
        subjects[hit.detection] = replace(
            subjects[hit.detection],
            truth_xyxy=truth.boxes_xyxy[hit.truth],
            mask=_outline(truth.region(hit.truth, frame.image_hw), frame),
        )
    return subjects


def _outline(region: np.ndarray, frame: FrameTransform) -> np.ndarray | None:
    """The outline of an object in the network's frame, ``(H, W)`` bool."""
    if region.shape != frame.image_hw:  # its box, or an outline in another image
        return None
    (scale_x, scale_y), (left, top) = frame.scale_xy, frame.offset_xy
    # OpenCV counts from the centres of pixels.
    matrix = np.array(
        [
            [scale_x, 0, left + scale_x / 2 - 0.5],
            [0, scale_y, top + scale_y / 2 - 0.5],
        ]
    )
    return cv2.warpAffine(
        region.astype(np.uint8),
        matrix,
        frame.network_hw[::-1],
        flags=cv2.INTER_NEAREST,
    ).astype(bool)
