"""How much of the evidence lies in the objects, and when it is said to leave them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmyolo_vis_hooks.diagnosis.diagnose import Diagnoser
from mmyolo_vis_hooks.diagnosis.energy import EnergyWatch
from mmyolo_vis_hooks.diagnosis.look import judge
from mmyolo_vis_hooks.diagnosis.maps import ErrorMap, ErrorMapper
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.options import DiagnosisOptions

from .test_matching import SQUARE, detections

HALF = np.zeros((100, 100), bool)
HALF[10:50, 10:30] = True  # the left half of SQUARE


def explained(
    monkeypatch, truth: Any, rows: list, own: ErrorMap, candidates: list | None = None
) -> Diagnosis:
    """Detections and candidates that all have one map."""
    image = np.zeros((100, 100, 3), np.uint8)
    found, reached = detections(*rows), detections(*(candidates or rows))
    options, names = DiagnosisOptions(), ("dog",)
    given = found, reached, GroundTruth.of(truth)
    without = judge("a", image, *given, options, names)

    def maps(self: Any, *args: Any, candidates: bool = False) -> dict:
        return dict.fromkeys(range(len(args[1])), own)

    monkeypatch.setattr(ErrorMapper, "maps", maps)
    monkeypatch.setattr(ErrorMapper, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(
        "mmyolo_vis_hooks.diagnosis.diagnose.ClassComparer", lambda *_: None
    )
    logger = logging.getLogger("test")
    return Diagnoser(None, options, names, logger).explain(without, None)


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (None, 0.75),
        (HALF, 0.5),
        ([[10, 10, 30, 10, 30, 50, 10, 50]], 0.5),
        (coco_mask.encode(np.asfortranarray(HALF.astype(np.uint8))), 0.5),
        ([], 0.75),
    ],
)
def test_the_share_of_a_map_inside_mask_or_box(monkeypatch, mask, share):
    """Half of it lies on the left, a quarter on the right, a quarter outside."""
    saliency = np.zeros((100, 100), np.float32)
    saliency[20, 20], saliency[20, 40], saliency[80, 80] = 1.0, 0.5, 0.5
    instance = dict(bbox=SQUARE, bbox_label=0)
    if mask is not None:
        instance["mask"] = mask
    own = ErrorMap(saliency, "neck[0]", inside=0.75, near=0.75)
    found = explained(monkeypatch, [instance], [(SQUARE, 0.9, 0)], own)
    assert found.energy_inside() == {"dog": pytest.approx(share)}
    assert found.found[0].map is own
    assert repr(found.found[0]) == "Found(dog 0.90, IoU 1.00)"


def test_a_mask_for_each_object_or_none():
    given = dict(boxes_xyxy=[SQUARE], labels=[0], masks=np.stack([HALF, HALF]))
    with pytest.raises(VisConfigError, match="2 masks for 1 objects"):
        GroundTruth.of(given)
    given["masks"] = HALF[None]
    assert GroundTruth.of(given).region(0, (100, 100)).sum() == 800


@pytest.mark.parametrize(("near", "said"), [(0.4, True), (0.6, False)])
def test_a_false_positive_whose_evidence_lies_outside_is_called_a_shortcut(
    monkeypatch, near, said
):
    own = ErrorMap(np.ones((100, 100), np.float32), "neck[0]", 0.16, near)
    (false,) = explained(monkeypatch, [], [(SQUARE, 0.9, 0)], own).false_positives
    line = "greatest IoU with any object 0.00"
    if said:
        line += "; a shortcut: 16% of the map is inside"
    assert false.why == line


def test_the_winner_and_its_map_stand_beside_what_it_suppressed(monkeypatch):
    behind = (10, 22, 50, 62)
    objects = [dict(bbox=box, bbox_label=0) for box in (SQUARE, behind)]
    front = (SQUARE, 0.9, 0)
    own = ErrorMap(np.ones((100, 100), np.float32), "neck[1]", 0.16, 0.9)
    found = explained(monkeypatch, objects, [front], own, [front, (behind, 0.7, 0)])
    (missed,) = found.missed
    assert missed.map is missed.other_map is own
    assert missed.why == (
        "0.70 for 'dog' at neck[1], suppressed by 'dog' 0.90, IoU 0.54"
    )
    one, two = found.draw(max_panels=1), found.draw(max_panels=2)
    height = min(one.shape[0], two.shape[0])
    # The second panel stands beside the first: outlines in green, of what was found.
    green = lambda p: (abs(p[-height // 3 :] - (44, 160, 80)).max(2) < 3).sum()  # noqa: E731
    assert green(two.astype(int)) > 1.5 * green(one.astype(int)) > 0


def shares(*values: float, first: int = 0) -> dict:
    return {("a", first + i): ("dog", value) for i, value in enumerate(values)}


def test_the_alarm_is_for_evidence_that_leaves_while_ap_does_not_fall():
    watch = EnergyWatch()
    assert watch.update(shares(0.8, 0.8, 0.8), 0.4) == []
    assert watch.update(shares(0.76, 0.76, 0.76), 0.5) == []  # too little
    assert watch.update(shares(0.7, 0.7, 0.7), 0.3) == []  # AP falls too
    (alarm,) = watch.update(shares(0.7, 0.72, 0.74), 0.45)
    assert alarm == (
        "of the evidence for 'dog', 72% lies inside of 3 objects, where it was 80%, "
        "and AP went from 0.400 to 0.450: their surroundings may be learnt instead of "
        "them"
    )
    assert watch.update(shares(0.7, 0.72, 0.74), 0.5) == []  # said once


def test_objects_that_were_found_once_are_no_loss():
    watch = EnergyWatch()
    watch.update(shares(0.8, 0.8, 0.8), 0.4)
    assert watch.update(shares(0.8, 0.8, 0.8, 0.1, 0.1), 0.5) == []
    assert watch.update(shares(0.2, 0.2, first=10), 0.6) == []  # nothing in common
