from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData

from mmyolo_vis_hooks.data.detections import (
    class_names_of,
    detections_of,
    palette_of,
)


def sample(boxes) -> DetDataSample:
    instances = InstanceData(
        bboxes=boxes,
        scores=torch.full((len(boxes),), 0.5),
        labels=torch.zeros(len(boxes), dtype=torch.long),
    )
    return DetDataSample(pred_instances=instances)


@pytest.mark.parametrize(
    ("box", "box_xyxy"),
    [
        ([10, 20, 40, 60], [10, 20, 40, 60]),
        ([50, 40, 20, 10, 0], [40, 35, 60, 45]),
        ([50, 40, 20, 10, math.pi / 2], [45, 30, 55, 50]),
        ([50, 40, 20, 20, -math.pi / 4], [35.858, 25.858, 64.142, 54.142]),
    ],
)
def test_upright_and_rotated_boxes(box, box_xyxy):
    boxes = torch.tensor([box], dtype=torch.float32)
    found = detections_of(sample(boxes)).boxes_xyxy
    np.testing.assert_allclose(found, [box_xyxy], atol=1e-3)
    assert found.dtype == np.float32


def test_box_objects_empty_boxes_and_no_instances():
    boxes = HorizontalBoxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert detections_of(sample(boxes)).boxes_xyxy.tolist() == [[1, 2, 3, 4]]
    for width in (4, 5):
        empty = detections_of(sample(torch.zeros(0, width)))
        assert empty.boxes_xyxy.shape == (0, 4)
    assert len(detections_of(DetDataSample())) == 0


@pytest.mark.parametrize(
    ("palette", "colors"),
    [
        ([(1, 2, 3), [4, 5, 6]], [(1, 2, 3), (4, 5, 6)]),
        ((1, 2, 3), [(1, 2, 3)]),
        (np.array([[1, 2, 3]]), [(1, 2, 3)]),
        ("random", None),
        (None, None),
        ([], None),
    ],
)
def test_palettes_that_mmdetection_takes(palette, colors):
    assert palette_of(dict(palette=palette)) == colors
    assert palette_of({}) is None


def test_class_names():
    assert class_names_of(dict(classes=["cat", "dog"])) == ("cat", "dog")
    assert class_names_of(dict(CLASSES=("cat",))) == ("cat",)
    assert class_names_of(dict(classes="cat")) == ("cat",)
    assert class_names_of(dict(classes=None)) == ()
