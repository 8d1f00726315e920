"""Detectors, methods and targets of one's own, and views of an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn
from torchvision.ops import box_iou

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.attribution.methods import register_method
from mmyolo_vis_hooks.attribution.targets import register_target
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.families import (
    Family,
    build_family,
    plain_predict,
)
from tests.test_attribution.helpers import (
    LOGGER,
    agrees,
    attributor,
    explain,
    layercam,
    most_influential,
    references,
)
from tests.toy_boxes import ToyBoxDetector


def test_augmented_maps_are_the_mean_over_mirrors_and_brightnesses():
    """Padding beside the image stays where it is."""
    left = 16
    family = bright_squares(left)
    meta = family.data_samples[0].metainfo
    part = slice(left, left + 144)  # of the 160 columns
    predictions, explanations = explain(family, aug_smooth=True, topk=5)
    everything = attributor(family, topk=-1)
    sums: list[list[np.ndarray]] = [[] for _ in explanations]
    for mirrored in (False, True):
        for factor in (1.0, 0.9, 1.1):
            inputs = family.inputs.clone()
            if mirrored:
                inputs[..., part] = inputs[..., part].flip(-1)
            others, maps = everything.explain(inputs * factor, meta)
            boxes = others.bboxes.clone()
            if mirrored:  # in pixels of the original image
                boxes[:, 0] = 180 - others.bboxes[:, 2]
                boxes[:, 2] = 180 - others.bboxes[:, 0]
            by_index = {e.index: e for e in maps}
            for own, explanation in zip(sums, explanations):
                box = predictions.bboxes[explanation.index][None]
                same = others.labels == predictions.labels[explanation.index]
                overlaps = box_iou(box, boxes)[0] * same
                best = int(overlaps.argmax())
                for layer_map in by_index[best].maps if overlaps[best] >= 0.5 else ():
                    if layer_map.layer != explanation.maps[0].layer:
                        continue
                    saliency = layer_map.saliency / layer_map.saliency.max()
                    own.append(turned(saliency, left) if mirrored else saliency)
    assert len(sums) >= 3
    assert min(len(own) for own in sums) == 6
    for own, explanation in zip(sums, explanations):
        mean = np.mean(own, axis=0, dtype=np.float32)
        assert np.abs(explanation.maps[0].saliency - mean).max() < 1e-4


def bright_squares(left: int) -> Family:
    """Three squares beside padding, found by a detector that looks for them."""
    torch.manual_seed(0)
    detector = ToyBoxDetector(data_preprocessor=None).eval().requires_grad_(False)
    inputs = torch.zeros(1, 3, 128, 160)
    inputs[..., left : left + 144] = -0.5
    for top, x in ((8, 16), (72, 96), (40, 48)):
        inputs[..., top : top + 24, left + x : left + x + 24] = 2.5
    sample = DetDataSample(
        metainfo=dict(
            ori_shape=(160, 180),
            img_shape=(128, 160),
            batch_input_shape=(128, 160),
            scale_factor=(0.8, 0.8),
            pad_param=(0, 0, left, 16 - left),
        )
    )
    return Family("toy", detector, inputs, [sample])


def turned(saliency: np.ndarray, left: int) -> np.ndarray:
    """Turn a map about the middle of 144 of its 160 columns of pixels, cell by cell."""
    stride = 160 // saliency.shape[1]
    centres = (np.arange(saliency.shape[1]) + 0.5) * stride
    # A map is piecewise linear between the centres of its cells, and zero beyond.
    knots = np.concatenate([[-stride / 2], centres, [160 + stride / 2]])
    padded = np.pad(saliency, ((0, 0), (1, 1)))
    places = 2 * left + 144 - centres
    return np.stack([np.interp(places, knots, row, 0, 0) for row in padded])


class Unheaded(nn.Module):
    """A detector whose head has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, 4, 1)
        self.top = nn.Conv2d(4, 2, 1)

    def forward(self, inputs: Any, data_samples: Any, mode: str = "predict") -> Any:
        heat = self.top(self.backbone(inputs)).sigmoid()
        for own, sample in zip(heat, data_samples):
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[0.0, 0.0, 8.0, 8.0]]),
                scores=own[1].max()[None],
                labels=torch.ones(1, dtype=torch.long),
            )
        return data_samples


def test_a_detector_of_another_make():
    torch.manual_seed(0)
    detector = Unheaded().eval()
    meta = dict(img_shape=(32, 32), ori_shape=(32, 32), scale_factor=(1.0, 1.0))
    inputs = torch.randn(1, 3, 32, 32)

    def run(**options: Any) -> Any:
        own = BoxAttributor(
            detector, BoxAMOptions(score_thr=0.0, **options), logger=LOGGER
        )
        return own.explain(inputs, meta)[1]

    features = detector.backbone(inputs)
    heat = detector.top(features).sigmoid()[0, 1]
    (gradient,) = torch.autograd.grad(heat.max(), features)
    expected = layercam(features[0].detach(), gradient[0])
    (explanation,) = run()
    assert agrees(explanation.maps[0].saliency, expected)
    for method, target, match in (
        ("boxam", "logit", "'bbox_head'"),
        ("boxam", "x1", "carry no gradients"),
        ("ablationcam", "score", "'bbox_head'"),
    ):
        with pytest.raises(VisError, match=match):
            run(method=method, target=target)
    assert run(method="drise", num_masks=4)
    detector.forward = lambda inputs, samples, mode: samples  # a panoptic one's
    for method in ("boxam", "drise"):
        with pytest.raises(VisError, match="Unheaded gives no bboxes, scores, labels"):
            run(method=method)


def test_a_method_and_a_target_of_ones_own(registry):
    @register_method(
        "mine",
        kind="gradient",
        summary="Mine.",
        formula="max_c g * A",
        default_smooth=0.2,
    )
    def mine(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        return (gradients * activations).amax(1)

    @register_target("margin", summary="how far the logit is above zero")
    def margin(boxes: Any) -> torch.Tensor:
        return boxes.scores.logit()

    family = build_family("yolox")
    _, explanations = explain(family, method="mine", target="margin")
    scores = plain_predict(family).scores
    for explanation, maps in zip(explanations, references(family, 3)):
        activation, gradient = most_influential(maps)
        score = scores[explanation.index]
        expected = (gradient * activation).amax(dim=0).relu() / (score * (1 - score))
        assert explanation.layer == explanation.maps[0].layer
        assert explanation.smooth == 0.2
        assert agrees(explanation.maps[0].saliency, expected.numpy())
    with pytest.raises(VisConfigError, match="compares scores"):
        BoxAMOptions(method="ablationcam", target="margin")
    with pytest.raises(VisConfigError, match="kind='colour' is unknown"):
        register_method("mine", kind="colour", summary="", formula="")


@pytest.mark.parametrize(
    ("kind", "function", "match"),
    [
        ("gradient", lambda a, g: (g * a).sum((1, 2)), "gives a tensor of shape"),
        ("gradient", lambda a, g: (g * a).sum(1)[:, :2], "gives a tensor of shape"),
        ("gradient", lambda a, g: (g * a).sum(1).numpy(), "gives ndarray"),
        ("gradient", lambda a, g: (g * a.relu_()).sum(1), "in place"),
        ("gradient", lambda a, g: a.sum(1) * np.nan, "no finite map"),
        ("ablation", lambda layer: torch.ones(3), r"shape \(3,\)"),
        ("black_box", lambda image: torch.ones(3, 4), r"shape \(3, 4\)"),
    ],
)
def test_a_method_that_gives_no_maps_is_named(registry, kind, function, match):
    register_method("mine", kind=kind, summary="", formula="")(function)
    with pytest.raises(VisError, match=f"method='mine' .*{match}"):
        explain(build_family("yolox"), method="mine")


class Learned(nn.Module):
    """A weight for each channel."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.arange(count) / count)

    def forward(self, activations: torch.Tensor, gradients: torch.Tensor) -> Any:
        return torch.einsum("c,kchw->khw", self.weights, activations * gradients)


def test_a_method_may_be_a_module_with_weights(registry):
    family = build_family("yolox")
    count = family.detector.neck.out_channels
    for _ in range(2):  # a cell that is run again
        register_method("mine", kind="gradient", summary="", formula="")(Learned(count))
    _, explanations = explain(family, method="mine")
    for explanation, maps in zip(explanations, references(family, 3)):
        activation, gradient = most_influential(maps)
        weights = (torch.arange(count) / count)[:, None, None]
        expected = (weights * activation * gradient).sum(dim=0).relu().numpy()
        assert agrees(explanation.maps[0].saliency, expected)
    register_method(
        "joined", kind="gradient", summary="", formula="", targets=("score", "nope")
    )(lambda a, g: (g * a).sum(1))
    with pytest.raises(VisConfigError, match="target='nope' is unknown"):
        explain(family, method="joined")


def test_a_target_gives_a_number_for_each_box_of_what_the_network_gave(registry):
    register_target("mine", summary="")(lambda boxes: boxes.scores.sum())
    with pytest.raises(VisError, match=r"target='mine' gives a tensor of shape \(\)"):
        explain(build_family("yolox"), target="mine")
    register_target("mine", summary="")(lambda boxes: boxes.scores.detach())
    _, explanations = explain(build_family("yolox"), target="mine")
    assert all("depends on nothing" in e.warning for e in explanations)
