from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import Tensor, nn

from mmyolo_vis_hooks.errors import FeatureShapeError, VisError
from mmyolo_vis_hooks.network.graph import (
    GraphForward,
    PredictionGraph,
    TapPoint,
    head_modules,
)
from mmyolo_vis_hooks.network.state import frozen
from tests.families import (
    SIDES,
    Family,
    build_family,
    plain_predict,
    reference_gradients,
)

# A family of each kind. A layer of the backbone with something in place behind it, and
# one of neck, encoder or head; shared layers of heads are called once for each level.
_LAYERS = {
    "yolov5": ("backbone.stage3.1.blocks.0.conv2.bn", "bbox_head.head_module"),
    "ppyoloe": ("backbone.stage2", "bbox_head.head_module.cls_stems.1.conv"),
    "retinanet": ("backbone.layer3.1.bn2", "bbox_head.cls_convs.1.conv"),
    "rtmdet_ins": ("backbone.stage3.1.short_conv.bn", "bbox_head.cls_convs.0.0.conv"),
    "cascade_rcnn": ("backbone.layer3", "neck.fpn_convs.1.conv"),
    "dino": ("backbone.layer3", "encoder.layers.0.ffn"),
}


def predict_graph(family: Family, *layers: str, **sides: str) -> PredictionGraph:
    detector = family.detector
    points = [
        TapPoint(layer, detector.get_submodule(layer), **sides) for layer in layers
    ]
    return GraphForward(detector, points).run(
        family.inputs, family.data_samples[0].metainfo
    )


def variant(name: str, change: Any) -> Family:
    family = build_family(name)
    detector = copy.deepcopy(family.detector)
    change(detector)
    return dataclasses.replace(family, detector=detector)


def gradients_at(graph: PredictionGraph, scalar: Tensor) -> list[Tensor]:
    taps = list(graph.taps.values())
    found = torch.autograd.grad(scalar, taps, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(tap) if gradient is None else gradient
        for tap, gradient in zip(taps, found)
    ]


def assert_gradients(
    graph: PredictionGraph,
    reference: list[list[tuple[Tensor, Tensor]]],
    target: str = "score",
) -> None:
    """At least three detections, each to 1e-5 of its reference's maximum."""
    assert len(reference) >= 3
    influences = []
    for index, maps in enumerate(reference):
        scalar = (
            graph.predictions.scores[index]
            if target == "score"
            else graph.predictions.bboxes[index, SIDES.index(target)]
        )
        found = gradients_at(graph, scalar)
        expected = [(o, g) for o, g in maps if o.ndim >= 3 and o.is_floating_point()]
        assert len(found) == len(expected)
        largest = max(float(gradient.abs().max()) for _, gradient in expected)
        influences.append(largest)
        for tap, one, (output, other) in zip(graph.taps.values(), found, expected):
            assert torch.equal(tap.detach(), output)
            assert float((one - other).abs().max()) <= 1e-5 * largest
    # A layer of one level has no influence on the boxes of the others.
    assert max(influences) > 1e-6


@pytest.mark.parametrize("name", _LAYERS)
def test_gradients_of_scores_and_sides(name):
    family = build_family(name)
    plain = plain_predict(family)
    with frozen(family.detector):
        for layer in _LAYERS[name]:
            graph = predict_graph(family, layer)
            module = family.detector.get_submodule(layer)
            assert_gradients(graph, reference_gradients(family, module))
        graph = predict_graph(family, "neck")
        assert torch.equal(graph.predictions.scores, plain.scores)
        assert torch.equal(graph.predictions.bboxes, plain.bboxes)
        assert torch.equal(graph.predictions.labels, plain.labels)
        assert graph.network_hw == (128, 160)
        for target in ("x1", "y2"):
            reference = reference_gradients(family, family.detector.neck, target=target)
            assert_gradients(graph, reference, target)
    assert all(parameter.grad is None for parameter in family.detector.parameters())
    heads = head_modules(family.detector)
    prefix = "roi_head.bbox_head" if "rcnn" in name else "bbox_head"
    assert all(path.startswith(prefix) for path in heads)
    assert len(heads) == (3 if name == "cascade_rcnn" else 1)
    assert {key.layer for key in graph.head_outputs} == set(heads)
    assert all(o.requires_grad for o in graph.head_outputs.values())


@pytest.mark.parametrize("name", ["retinanet", "dino"])
def test_several_taps_at_once_and_no_graph_before_the_first(name):
    family = build_family(name)
    detector = family.detector
    layers = ("neck", _LAYERS[name][0])  # the later one first
    graphs = []
    first = next(iter(detector.backbone.children()))
    handle = first.register_forward_hook(
        lambda m, a, output: graphs.append(output.requires_grad)
    )
    try:
        with frozen(detector):
            graph = predict_graph(family, *layers)
    finally:
        handle.remove()
    assert not any(graphs)
    for layer in layers:
        own = {key: tap for key, tap in graph.taps.items() if key.layer == layer}
        module = detector.get_submodule(layer)
        assert_gradients(
            dataclasses.replace(graph, taps=own), reference_gradients(family, module)
        )


def test_all_scores_of_yolov5():
    """Then no row is selected before the product in place."""

    def change(detector: Any) -> None:
        detector.bbox_head.test_cfg.update(score_thr=0.0, multi_label=False)

    family = variant("yolov5", change)
    plain = plain_predict(family)
    with frozen(family.detector):
        graph = predict_graph(family, "neck")
        assert torch.equal(graph.predictions.scores, plain.scores)
        found = gradients_at(graph, graph.predictions.scores.sum())
    assert all(bool(gradient.any()) for gradient in found)


def test_layers_that_give_no_gradient():
    family = variant("yolov8", lambda d: d.add_module("unused", nn.Conv2d(3, 3, 1)))
    missing = pytest.raises(FeatureShapeError, match="unused did not run")
    with frozen(family.detector), missing:
        predict_graph(family, "neck", "unused")
    rcnn = build_family("faster_rcnn")
    with frozen(rcnn.detector):
        with pytest.raises(FeatureShapeError, match="cannot be laid over an image"):
            predict_graph(rcnn, "roi_head.bbox_roi_extractor")
        # The proposals are constants.
        with pytest.raises(VisError, match="carry no gradients"):
            predict_graph(rcnn, "rpn_head.rpn_conv")
    for detector in (family.detector, rcnn.detector):
        assert not any(m._forward_hooks for m in detector.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_error(error):
    family = build_family("rtmdet")
    head: Any = family.detector.bbox_head

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    head.predict_by_feat, own = fail, head.predict_by_feat
    try:
        with frozen(family.detector), pytest.raises(error):
            predict_graph(family, "neck", "backbone")
    finally:
        del head.predict_by_feat
    assert head.predict_by_feat == own
    for module in family.detector.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    # No mode is left either: this product is in place.
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError):
        leaf.mul_(2)


# Where the caller stands.


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_surroundings_forbid_them(surroundings):
    family = build_family("yolov8")
    reference = reference_gradients(family, family.detector.neck)
    with surroundings():
        own = dataclasses.replace(family, inputs=family.inputs.clone())
        with frozen(family.detector):
            assert_gradients(predict_graph(own, "neck"), reference)
            graph = predict_graph(own, "backbone.stem", side="input")
            (gradient,) = gradients_at(graph, graph.predictions.scores[0])
            assert gradient.shape == family.inputs.shape
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (
            surroundings is torch.inference_mode
        )


def set_checkpoints(detector: nn.Module) -> None:
    for module in detector.modules():
        if hasattr(module, "with_cp"):
            module.with_cp = True


@pytest.mark.parametrize(
    "change",
    [
        set_checkpoints,
        lambda detector: turn_on_activation_checkpointing(
            detector.backbone, ["layer2", "layer3"]
        ),
    ],
    ids=["with_cp", "mmengine"],
)
def test_activations_that_are_computed_again(change):
    """Layers in blocks that keep no activations for the backward pass."""
    family = build_family("retinanet")
    checkpointed = variant("retinanet", change)
    detector: Any = checkpointed.detector
    own_forward = vars(detector.backbone.layer3).get("forward")
    for layer in ("backbone.layer2.0", "backbone.layer3.1.conv1"):
        reference = reference_gradients(family, family.detector.get_submodule(layer))
        with frozen(detector):
            assert_gradients(predict_graph(checkpointed, layer), reference)
    assert vars(detector.backbone.layer3).get("forward") is own_forward
    assert detector.backbone.layer3[0].with_cp == (change is set_checkpoints)
