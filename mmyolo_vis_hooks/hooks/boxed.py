"""What a viewer that draws boxes by itself gets beside a picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.selector import SelectedImage
from ..diagnosis.matching import GroundTruth
from ..records import BoxedImage, Detections
from ..render.montage import cell_size_hw, resize_image
from ..render.panel import resized_boxes
from ..samples import leads_there, on_picture
from .vis_loop import VisLoop


def boxed_image(
    state: VisLoop, sample: Any, image: SelectedImage, position: int
) -> BoxedImage:
    """The image that a panel begins with, at its size, with its boxes and objects.

    Args:
        state (VisLoop): The loop.
        sample (Sample | Diagnosis): What the panel draws.
        image (SelectedImage): Of the data set, which knows its objects.
        position (int): Of the image in the batch.
    """
    image_hw = sample.image_rgb.shape[:2]
    size_hw = cell_size_hw(image_hw)

    def resized(boxes: Detections, keep: Any) -> Detections:
        xyxy = resized_boxes(boxes.boxes_xyxy, image_hw, size_hw)
        keep = keep & np.isfinite(xyxy).all(axis=1)
        return Detections(xyxy, boxes.scores, boxes.labels).take(keep)

    truth, metainfo = None, dict[str, Any]()
    placement = state.placements[id(image.dataset)]
    instances = image.info.get("instances")
    on_input = placement.alignment == "network"
    if on_input:  # that of the drawn view: augmented ones were merged in another
        _, metainfo = state.recorded.given(position)
    if instances and (not on_input or leads_there(placement, metainfo)):
        found = GroundTruth.of(instances)
        scores = np.ones(len(found), np.float32)
        objects = Detections(found.boxes_xyxy, scores, found.labels)
        truth = resized(on_picture(objects, placement, metainfo), True)
    predictions = sample.detections
    return BoxedImage(
        resize_image(sample.image_rgb, size_hw),
        resized(predictions, predictions.scores > state.options.score_thr),
        truth,
        state.class_names,
        sample.layers,
    )
