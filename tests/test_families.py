"""The detectors that other tests explain, and the gradients they are compared with."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from tests.families import (
    FAMILIES,
    SIDES,
    Family,
    build_family,
    map_tensors,
    plain_predict,
    reference_gradients,
)

ONE_STAGE = FAMILIES[:11]
TRANSFORMERS = ("detr", "deformable_detr", "dino")
# Where nothing that follows is cut off on purpose, so that differences see the same
# as gradients: proposals and DINO's reference points are behind us there.
UNCUT_LAYERS = {
    "faster_rcnn": "roi_head.bbox_roi_extractor",
    "mask_rcnn": "roi_head.bbox_roi_extractor",
    "cascade_rcnn": "roi_head.bbox_roi_extractor.2",
    "dino": "decoder.layers.1",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_three_moderate_detections_at_different_places(name):
    family = build_family(name)
    detections = plain_predict(family)
    assert len(detections) >= 3
    scores = detections.scores[:3]
    assert 0.2 < float(scores.min()) <= float(scores.max()) < 0.9
    # Ranks must not change with rounding.
    assert float(-detections.scores[:4].diff().max()) > 1e-3
    overlaps = box_iou(detections.bboxes[:3], detections.bboxes[:3])
    assert float(overlaps.triu(1).max()) < 0.4
    assert not detections.scores.requires_grad
    assert not family.detector.training
    assert not any(p.requires_grad for p in family.detector.parameters())


def test_two_builds_are_equal():
    family = build_family("dino")
    random_state = torch.get_rng_state()
    again = build_family.__wrapped__("dino")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(again.inputs, family.inputs)
    for key, value in family.detector.state_dict().items():
        assert torch.equal(value, again.detector.state_dict()[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_sees_the_input_of_the_head(name):
    family = build_family(name)
    levels = []
    for maps in reference_gradients(family, family.detector.neck):
        assert all(torch.isfinite(gradient).all() for _, gradient in maps)
        # The change of a score of about 0.5 when an activation vanishes.
        changes = [float((output * grad).abs().max()) for output, grad in maps]
        assert max(changes) > 1e-3
        levels.append(changes.index(max(changes)))
        if name in ONE_STAGE:
            # Also where the neck builds one of its outputs on another.
            assert sum(change > 0 for change in changes) == 1
    if name not in TRANSFORMERS:  # they look at all levels at once
        assert len(set(levels)) > 1
    plain_predict(family)  # no hook is left that needs a graph
    assert not family.detector.neck._forward_hooks


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the detectors run in float64, in which differences are exact enough."""
    # `mmcv.ops.nms` as an attribute is the function of the same name.
    operators = importlib.import_module("mmcv.ops.nms").ext_module
    operator = operators.nms

    def nms(boxes: Tensor, scores: Tensor, **options: Any) -> Tensor:
        # It takes float32 only, and its choice does not depend on more.
        return operator(boxes.to(torch.float32), scores.to(torch.float32), **options)

    monkeypatch.setattr(operators, "nms", nms)
    # FCOS and ATSS round the box deltas so.
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)


def shifted_targets(
    family: Family, module: nn.Module, which: int, cell: int, shift: float
) -> dict[str, Tensor]:
    """Scores and sides of all detections when one number of an output is another."""
    seen = 0

    def shift_cell(output: Tensor) -> Tensor:
        nonlocal seen
        output = output.clone()
        if seen == which:
            output.view(-1)[cell] += shift
        seen += 1
        return output

    with module.register_forward_hook(lambda m, a, out: map_tensors(out, shift_cell)):
        detections = plain_predict(family)
    return {
        "score": detections.scores,
        **dict(zip(SIDES, detections.bboxes.unbind(1))),
    }


def test_the_reference_knows_every_call_of_a_shared_layer():
    family = build_family("rtmdet")
    conv = family.detector.get_submodule("bbox_head.head_module.cls_convs.0.0.conv")
    for calls in reference_gradients(family, conv):
        sizes_hw = [tuple(output.shape[-2:]) for output, _ in calls]
        assert sizes_hw == [(16, 20), (8, 10), (4, 5)]
        assert sum(bool(gradient.any()) for _, gradient in calls) == 1


def test_the_reference_keeps_what_is_activated_in_place():
    family = build_family("rtmdet")
    norm = family.detector.get_submodule("bbox_head.head_module.cls_convs.0.0.bn")
    ((output, gradient),) = reference_gradients(family, norm, indices=[0])[0]
    assert float(output.min()) < -1  # below all that SiLU gives
    assert gradient.shape == output.shape


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_equals_finite_differences(name):
    family = build_family(name)
    detector = copy.deepcopy(family.detector).double()
    if name == "mask_rcnn":
        detector.roi_head.mask_head = None  # it pastes masks in float32 only
    family = dataclasses.replace(
        family, detector=detector, inputs=family.inputs.double()
    )
    module = detector.get_submodule(UNCUT_LAYERS.get(name, "neck"))
    step = 1e-5
    for target, index in (("score", 0), ("score", 2), ("x1", 0), ("y2", 1)):
        (maps,) = reference_gradients(family, module, target=target, indices=[index])
        largest = [float(gradient.abs().max()) for _, gradient in maps]
        which = largest.index(max(largest))
        gradient = maps[which][1].flatten()
        cell = int(gradient.abs().argmax())
        above, below = (
            shifted_targets(family, module, which, cell, shift)[target][index]
            for shift in (step, -step)
        )
        difference = float(above - below) / (2 * step)
        assert abs(difference) > 1e-3
        assert float(gradient[cell]) == pytest.approx(difference, rel=1e-4)
