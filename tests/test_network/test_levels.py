from __future__ import annotations

import pytest
from torch import nn

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.network.levels import Pyramid, last_maps, survey
from mmyolo_vis_hooks.network.nested import OutputKey
from mmyolo_vis_hooks.network.state import frozen
from tests.families import FAMILIES, Family, build_family

_NECK = [f"neck[{i}]" for i in range(5)]
_YOLOV5 = [
    "input of neck.top_down_layers[1]",
    "input of neck.bottom_up_layers[0]",
    "input of neck.bottom_up_layers[1]",
]
_YOLOV7 = [f"input of neck.out_layers[{i}]" for i in range(3)]

# Titles, number of own raw outputs of each level, and radii. A map of 4x5 cells is
# seen as a whole by two convolutions of 3x3; group norms and squeezing see all.
_EXPECTED: dict[str, tuple[list[str], int, list[int | None]]] = {
    "yolov5": (_YOLOV5, 3, [1, 1, 1]),
    "yolov6": (_NECK[:3], 2, [1, 1, 1]),
    "yolov7": (_YOLOV7, 3, [1, 1, 1]),
    "yolov8": (_NECK[:3], 2, [2, 2, None]),
    "yolox": (_NECK[:3], 3, [2, 2, None]),
    "rtmdet": (_NECK[:3], 2, [2, 2, None]),
    "ppyoloe": (_NECK[:3], 2, [None, None, None]),
    "retinanet": (_NECK, 2, [5, None, None, None, None]),
    "fcos": (_NECK, 3, [None] * 5),
    "atss": (_NECK, 3, [None] * 5),
    "rtmdet_ins": (_NECK[:3], 3, [2, 2, None]),
    # Regions and queries may look at every level.
    "faster_rcnn": (_NECK, 0, [None] * 5),
    "cascade_rcnn": (_NECK, 0, [None] * 5),
    "mask_rcnn": (_NECK, 0, [None] * 5),
    "detr": (["encoder"], 0, [None]),
    "deformable_detr": (["encoder"], 0, [None]),
    "dino": (["encoder"], 0, [None]),
}


def survey_of(family: Family) -> Pyramid:
    with frozen(family.detector):
        metainfo = family.data_samples[0].metainfo
        return survey(family.detector, family.inputs, metainfo)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_levels_of_each_family(name):
    family = build_family(name)
    pyramid = survey_of(family)
    titles, num_outputs, radii = _EXPECTED[name]
    assert [level.tap.title for level in pyramid.levels] == titles
    assert [len(level.outputs) for level in pyramid.levels] == [num_outputs] * len(
        titles
    )
    assert [level.radius for level in pyramid.levels] == radii
    # No two levels have an output in common.
    outputs = [key for level in pyramid.levels for key in level.outputs]
    assert len(outputs) == len(set(outputs))
    assert not any(m._forward_hooks for m in family.detector.modules())


def test_which_level_made_an_output():
    pyramid = survey_of(build_family("retinanet"))
    fine, coarse = (OutputKey("bbox_head", 0, (0, i)) for i in (0, 2))
    boxes = OutputKey("bbox_head", 0, (1, 0))
    for keys, level in (([fine], 0), ([fine, boxes], 0), ([coarse], 2)):
        found = pyramid.level_of(keys)
        assert found is pyramid.levels[level]
    assert pyramid.level_of([fine, coarse]) is None
    assert pyramid.level_of([]) is None


def test_the_last_maps():
    for name, layer in (("yolov5", "neck"), ("detr", "encoder")):
        point = last_maps(build_family(name).detector)
        assert point.layer == layer
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(VisConfigError, match=r"target_layers=None.*Sequential"):
        last_maps(model)
    model.backbone = nn.Identity()
    assert last_maps(model).layer == "backbone"
