"""What maps of detections are measured on: their objects, and the detector itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from mmdet.structures import DetDataSample
from pycocotools import mask as coco_mask
from torch import nn

from .data.alignment import packed_frame
from .data.samples import detections_of
from .diagnosis.matching import GroundTruth, match
from .geometry import FrameTransform
from .metrics.faithfulness import subjects_of
from .metrics.metric import Subject
from .records import Detections, Look


def subjects_with_objects(
    detector: nn.Module,
    look: Look,
    chosen: Sequence[int],
    instances: Sequence[Mapping[str, Any]] = (),
) -> list[Subject]:
    """The subjects of some detections, with the objects that they hit.

    Args:
        detector (nn.Module): What was looked at; in eval mode.
        look (Look): The forward that found them.
        chosen (Sequence[int]): Which of its detections, the highest score first.
        instances (Sequence[Mapping]): Objects as a data set has them, in the original
            frame; those with a ``'mask'`` give its outline.
    """
    subjects = subjects_of(
        detector, look.inputs, look.metainfo, look.predictions, chosen
    )
    if not instances or not subjects:
        return subjects
    height, width = look.metainfo["ori_shape"][:2]
    network_hw = (int(look.inputs.shape[-2]), int(look.inputs.shape[-1]))
    frame = packed_frame((int(height), int(width)), network_hw, look.metainfo)
    truth = GroundTruth.of(instances)
    truth = replace(truth, boxes_xyxy=frame.boxes_to_network(truth.boxes_xyxy))
    found = detections_of(DetDataSample(pred_instances=look.predictions))
    boxes = np.stack([subject.box_xyxy for subject in subjects])
    own = Detections(boxes, found.scores[list(chosen)], found.labels[list(chosen)])
    for hit in match(own, truth).hits:
        subjects[hit.detection] = replace(
            subjects[hit.detection],
            truth_xyxy=truth.boxes_xyxy[hit.truth],
            mask=_outline(instances[hit.truth], frame),
        )
    return subjects


def _outline(instance: Mapping[str, Any], frame: FrameTransform) -> np.ndarray | None:
    """The outline of an object in the network's frame, ``(H, W)`` bool."""
    outline = instance.get("mask")
    if not outline:
        return None
    height, width = frame.image_hw
    encoded: Any = outline
    if isinstance(outline, list) or isinstance(outline["counts"], list):
        parts = coco_mask.frPyObjects(outline, height, width)
        encoded = coco_mask.merge(parts) if isinstance(parts, list) else parts
    (scale_x, scale_y), (left, top) = frame.scale_xy, frame.offset_xy
    # OpenCV counts from the centres of pixels.
    matrix = np.array(
        [
            [scale_x, 0, left + scale_x / 2 - 0.5],
            [0, scale_y, top + scale_y / 2 - 0.5],
        ]
    )
    return cv2.warpAffine(
        coco_mask.decode(encoded),
        matrix,
        frame.network_hw[::-1],
        flags=cv2.INTER_NEAREST,
    ).astype(bool)
