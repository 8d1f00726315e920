"""The check of random weights on the toy that finds bright squares."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmyolo_vis_hooks.attribution.methods import METHODS, register_method
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.metrics.sanity import SanityCheck, can_be_checked, randomised
from tests.toy_boxes import box_detector

META = dict(ori_shape=(64, 96), img_shape=(64, 96), scale_factor=(1.0, 1.0),
            batch_input_shape=(64, 96))  # fmt: skip


@pytest.fixture
def looked_at(tmp_path, toy_data):
    detector = box_detector(tmp_path, toy_data)
    inputs = torch.full((1, 3, 64, 96), -1.0)
    inputs[..., 16:40, 24:48] = 3.0
    inputs += 0.1 * torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = detector(inputs, [DetDataSample(metainfo=META)], mode="predict")
    assert len(found.pred_instances) > 0
    return detector, inputs


def test_only_what_was_named_is_drawn_anew(looked_at):
    detector, _ = looked_at
    before = copy.deepcopy(detector.state_dict())
    state = torch.get_rng_state()
    head, everything = randomised(detector, "bbox_head"), randomised(detector, "")
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])
    for name, value in head.named_parameters():
        changed = not torch.equal(value, before[name])
        assert changed == name.startswith("bbox_head"), name
    assert not torch.equal(everything.backbone.stages[0].weight, before[
        "backbone.stages.0.weight"
    ])  # fmt: skip
    again = randomised(detector, "").state_dict()
    assert all(torch.equal(v, again[n]) for n, v in everything.state_dict().items())


def test_a_map_that_does_not_look_at_weights_is_reported(looked_at):
    detector, inputs = looked_at

    @register_method("place", kind="activation", summary="A ramp.", formula="x + y")
    def place(activations):
        cells = activations[:, 0].numel()
        ramp = torch.arange(1, cells + 1, dtype=torch.float32)
        return ramp.view_as(activations[:, 0])

    try:
        check = SanityCheck(detector, ["place", "odam"])
        check.update(inputs, META, [0])
        found = check.compute()
        assert found["place"] == {"random head": 1.0, "all random": 1.0}
        assert found["odam"]["random head"] < 0.9
        assert check.unchanged() == ["place"]
        check.reset()
        assert np.isnan(check.compute()["place"]["all random"])
        assert check.unchanged() == []
    finally:
        del METHODS["place"]


def test_the_activations_of_a_random_head_are_those_of_the_trained(looked_at):
    detector, inputs = looked_at
    check = SanityCheck(detector, ["eigencam"])
    check.update(inputs, META, [0])
    found = check.compute()["eigencam"]
    assert found["random head"] == pytest.approx(1)
    assert "eigencam" in check.unchanged()


def test_what_can_be_checked():
    can = {name for name in METHODS if can_be_checked(name)}
    assert {"boxam", "odam", "eigencam", "ssgradcam++"} <= can
    assert not {"drise", "evidence", "shapleycam", "odam_combined"} & can
    assert not can_be_checked("search")


def test_a_detector_without_the_parts_is_refused():
    with pytest.raises(VisError, match="has no 'neck'"):
        SanityCheck(nn.Conv2d(3, 3, 1), ["boxam"])
