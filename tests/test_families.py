"""The detectors that other tests explain, and the gradients they are compared with."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import (
    FAMILIES,
    SIDES,
    Family,
    build_family,
    map_tensors,
    plain_predict,
    reference_gradients,
)

TRANSFORMERS = ("detr", "deformable_detr", "dino")
# Where nothing that follows is cut off on purpose, so that differences see the same
# as gradients: proposals and DINO's reference points are behind us there.
UNCUT_LAYERS = {
    "faster_rcnn": "roi_head.bbox_roi_extractor",
    "mask_rcnn": "roi_head.bbox_roi_extractor",
    "cascade_rcnn": "roi_head.bbox_roi_extractor.2",
    "dino": "decoder.layers.1",
}


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
