"""Maps of boxes against slow references that share no code with the package."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn

from mmyolo_vis_hooks.attribution.methods import weigh
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layer
from tests.families import (
    FAMILIES,
    Family,
    build_family,
    plain_predict,
    reference_gradients,
)
from tests.test_attribution.helpers import (
    LOGGER,
    MOVED,
    RawOutputs,
    agrees,
    attributor,
    explain,
    layercam,
    most_influential,
    references,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_of_each_box_is_that_of_plain_autograd(name):
    family = build_family(name)
    predictions, explanations = explain(family, topk=6)
    plain = plain_predict(family)
    assert torch.equal(predictions.scores, plain.scores)
    assert len(explanations) == 6 <= len(plain.scores)
    shown = 0
    for explanation, maps in zip(explanations, references(family, 6)):
        expected = layercam(*most_influential(maps))
        if expected.max() == 0:
            assert "negative or zero" in explanation.warning
            continue
        shown += 1
        (found,) = explanation.maps
        assert found.saliency.dtype == np.float32
        assert found.saliency.max() > 0
        assert explanation.warning == ""
        assert agrees(found.saliency, expected)
        # What passes could not be off by a cell, nor by a thousandth.
        assert not agrees(np.roll(found.saliency, 1, axis=1), expected)
        assert not agrees(found.saliency * 1.001, expected)
    assert shown >= 3


class Growing(nn.Module):
    """Looks at where a cell is, and leaves the central one as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        return x * (1 + 0.05 * (torch.arange(width) - width // 2))


@pytest.mark.parametrize("name", ["yolov8", "yolov5"])
def test_boxes_share_a_pass_unless_the_head_looks_beyond_windows(name):
    plain = build_family(name)
    placed = dataclasses.replace(plain, detector=copy.deepcopy(plain.detector))
    preds = "cls_preds" if name == "yolov8" else "convs_pred"
    for conv in getattr(placed.detector.bbox_head.head_module, preds):
        last = conv[-1] if name == "yolov8" else conv
        last.register_forward_hook(lambda module, args, output: Growing()(output))
    for family in (plain, placed):
        own, calls = attributor(family, topk=12), []
        given = family.inputs, family.data_samples[0].metainfo
        own.explain(*given)
        head = family.detector.bbox_head
        handle = head.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        try:
            _, explanations = own.explain(*given)
            assert len(calls) == 2  # predict's, and one on windows
            own.choose = lambda predictions: [0]
            own.explain(*given)
            assert len(calls) == 3  # a single box needs no windows
        finally:
            handle.remove()
        for explanation, maps in zip(explanations, references(family, 12)):
            expected = layercam(*most_influential(maps))
            if expected.max() > 0:
                assert agrees(explanation.maps[0].saliency, expected)


def changed(name: str, kind: str) -> Family:
    """A family whose head looks farther at some cells, or takes not every window."""
    family = build_family(name)
    family = dataclasses.replace(family, detector=copy.deepcopy(family.detector))
    head = family.detector.bbox_head.head_module
    if kind == "corner pooling":
        for convs in head.multi_level_cls_convs:
            convs.register_forward_hook(
                lambda m, args, out: out + out.flip(-1).cummax(-1).values.flip(-1)
            )
    elif kind == "reflection":
        for conv in (m for m in head.modules() if isinstance(m, nn.Conv2d)):
            if conv.kernel_size == (3, 3):
                conv.padding_mode = "reflect"
                conv._reversed_padding_repeated_twice = [1] * 4
    elif kind == "twice":
        bbox_head = family.detector.bbox_head
        predict = bbox_head.predict

        def predict_twice(maps, *args, **kwargs):
            bbox_head(maps)
            return predict(maps, *args, **kwargs)

        bbox_head.predict = predict_twice
    elif kind in ("no number", "too few cells"):

        def on_windows(module, args, out):
            if 5 * out.shape[-2] == 4 * out.shape[-1]:
                return out  # of the whole image
            return out * np.nan if kind == "no number" else out[..., :1, :1]

        for conv in head.multi_level_conv_cls:
            conv.register_forward_hook(on_windows)
    else:
        for path in MOVED[name]:
            block = family.detector.get_submodule(path)
            block.register_forward_pre_hook(lambda m, args: (args[0].relu_(),))
    return family


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("yolox", "corner pooling"),
        ("yolox", "reflection"),
        ("yolox", "twice"),
        ("yolox", "no number"),
        ("yolox", "too few cells"),
        ("yolov5", "in place"),
    ],
)
def test_boxes_have_their_maps_of_any_head(name, kind):
    family = changed(name, kind)
    own = attributor(family, topk=16)
    given = family.inputs, family.data_samples[0].metainfo
    finest = [e.index for e in own.explain(*given)[1] if e.cell and max(e.cell) > 5]
    assert len(finest) > 1
    expected = references(family, max(finest) + 1)
    own.choose = lambda predictions: finest  # no box is of another level
    for index, explanation in zip(finest, own.explain(*given)[1]):
        maps = layercam(*most_influential(expected[index]))
        assert agrees(explanation.maps[0].saliency, maps)


class Copying(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def test_levels_that_lead_to_each_other():
    """A map that no block gave itself is explained beside the inputs of others."""
    family = build_family("yolov5")
    family = dataclasses.replace(family, detector=copy.deepcopy(family.detector))
    family.detector.neck.out_layers[1] = Copying()
    _, explanations = explain(family, topk=6)
    layers = [explanation.maps[0].layer for explanation in explanations]
    assert "neck[1]" in layers
    assert "input of neck.top_down_layers[1]" in layers
    for own, layer, maps in zip(explanations, layers, references(family, 6)):
        if layer != "neck[1]":
            assert agrees(own.maps[0].saliency, layercam(*most_influential(maps)))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("yolov5", ("x1", "y2")),
        ("fcos", ("y1", "x2")),
        ("cascade_rcnn", ("x1", "y1")),
        ("dino", ("x2", "y2")),
    ],
)
def test_the_map_of_a_box_side(name, targets):
    family = build_family(name)
    for target in targets:
        _, explanations = explain(family, target=target, method="gradcam")
        for explanation, maps in zip(explanations, references(family, 3, target)):
            activation, gradient = most_influential(maps)
            expected = (gradient * activation).sum(dim=0).relu().numpy()
            assert agrees(explanation.maps[0].saliency, expected)


@pytest.mark.parametrize(
    ("name", "target"),
    [("yolox", "logit"), ("yolox", "objectness"), ("yolov8", "logit"),
     ("fcos", "objectness"), ("yolov8", "objectness")],
)  # fmt: skip
def test_raw_targets(name, target):
    family = build_family(name)
    raw = RawOutputs(family)
    if (name, target) == ("yolov8", "objectness"):
        with pytest.raises(VisConfigError, match="target='objectness' cannot work"):
            explain(family, target=target)
        return
    _, explanations = explain(family, target=target, method="gradcam")
    for explanation in explanations:
        level, channel, row, column = raw.place(explanation.index)
        neck: list = []

        def tap(output: Any, kept: list = neck) -> Any:
            kept += [t.detach().clone().requires_grad_() for t in output]
            return tuple(t.clone() for t in kept)

        with torch.enable_grad():
            scores, factors = raw.run((family.detector.neck, tap))
            own = scores[level][0, channel, row, column]
            if target == "objectness":
                own = factors[level][0, 0, row, column]
        (gradient,) = torch.autograd.grad(own, neck[level])
        expected = (gradient * neck[level].detach()).sum(dim=1).relu()[0].numpy()
        (found,) = explanation.maps
        assert found.layer == f"neck[{level}]"
        assert agrees(found.saliency, expected)


def test_combined_odam_joins_the_score_and_the_sides():
    family = build_family("yolox")
    _, found = explain(family, method="odam_combined")
    parts = [
        explain(family, method="odam", target=target)[1]
        for target in ("score", "x1", "y1", "x2", "y2")
    ]
    for own, *scalars in zip(found, *parts):
        normalised = [
            m.saliency / m.saliency.max() for part in scalars for m in part.maps
        ]
        assert agrees(own.maps[0].saliency, np.maximum.reduce(normalised))


@pytest.mark.parametrize("name", ["yolox", "yolov5"])
def test_explicit_layers_give_a_map_each(name):
    """Also where the neck goes on with what it gave, behind another layer."""
    family = build_family(name)
    layers = ["backbone.stage4", "neck.out_layers[1]", "neck"]
    _, explanations = explain(family, layers, method="layercam")
    modules = dict(family.detector.named_modules())
    stage = reference_gradients(family, modules["backbone.stage4"])
    neck = reference_gradients(family, modules["neck"])
    for explanation, stage_maps, neck_maps in zip(explanations, stage, neck):
        found = {m.layer: m.saliency for m in explanation.maps}
        activation, gradient = stage_maps[0]
        expected = {"backbone.stage4": layercam(activation[0], gradient[0])}
        for level, (activation, gradient) in enumerate(neck_maps):
            if gradient.abs().max() > 0:
                expected[f"neck[{level}]"] = layercam(activation[0], gradient[0])
                if level == 1:
                    expected["neck.out_layers[1]"] = expected["neck[1]"]
        assert found.keys() == {k for k, v in expected.items() if v.max() > 0}
        for layer, saliency in found.items():
            assert agrees(saliency, expected[layer]), layer


# A layer with something in place behind it, and one that each level calls.
LAYERS = {
    "yolov5": ("backbone.stage3[1].blocks[0].conv2.bn", "bbox_head.head_module"),
    "ppyoloe": ("backbone.stage2", "bbox_head.head_module.cls_stems[1].conv"),
    "retinanet": ("backbone.layer3[1].bn2", "bbox_head.cls_convs[1].conv"),
    "rtmdet_ins": (
        "backbone.stage3[1].short_conv.bn",
        "bbox_head.cls_convs[0][0].conv",
    ),
    "cascade_rcnn": ("backbone.layer3", "neck.fpn_convs[1].conv"),
    "dino": ("backbone.layer3",),
}


def assert_maps_of(family: Family, layer: str, explanations: Any) -> None:
    """Of all its calls and outputs, those of plain autograd."""
    module = resolve_layer(family.detector, layer)
    shown = 0
    for own, maps in zip(explanations, reference_gradients(family, module)):
        expected = [layercam(a[0], g[0]) for a, g in maps if a.ndim == 4]
        expected = [saliency for saliency in expected if saliency.max() > 0]
        for found, one in zip(own.maps, expected, strict=True):
            assert agrees(found.saliency, one)
            shown += 1
    assert shown


@pytest.mark.parametrize("name", LAYERS)
def test_the_maps_of_any_layer(name):
    family = build_family(name)
    for layer in LAYERS[name]:
        assert_maps_of(family, layer, explain(family, [layer], method="layercam")[1])
    assert all(parameter.grad is None for parameter in family.detector.parameters())


def variant(name: str, change: Any) -> Family:
    family = build_family(name)
    detector = copy.deepcopy(family.detector)
    change(detector)
    return dataclasses.replace(family, detector=detector)


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
    checkpointed = variant("retinanet", change)
    layer3: Any = checkpointed.detector.backbone.layer3
    own_forward = vars(layer3).get("forward")
    for layer in ("backbone.layer2[0]", "backbone.layer3[1].conv1"):
        _, explanations = explain(checkpointed, [layer], method="layercam")
        assert_maps_of(build_family("retinanet"), layer, explanations)
    assert vars(layer3).get("forward") is own_forward
    assert layer3[0].with_cp == (change is set_checkpoints)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_surroundings_forbid_them(surroundings):
    family = build_family("yolov8")
    with surroundings():
        own = dataclasses.replace(family, inputs=family.inputs.clone())
        _, explanations = explain(own, ["neck"], method="layercam")
        assert not torch.is_grad_enabled()
    assert_maps_of(family, "neck", explanations)


def test_all_scores_of_yolov5():
    """Then no row is selected before the product in place."""
    settings = dict(score_thr=0.0, multi_label=False)
    family = variant("yolov5", lambda d: d.bbox_head.test_cfg.update(settings))
    predictions, explanations = explain(family)
    assert torch.equal(predictions.scores, plain_predict(family).scores)
    assert all(own.maps for own in explanations)


def test_what_regions_give_is_no_map():
    with pytest.raises(FeatureShapeError, match="cannot be laid over an image"):
        explain(build_family("faster_rcnn"), ["roi_head.bbox_roi_extractor"])


def test_a_map_is_named_as_captions_print_it():
    family = build_family("yolox")
    _, everything = explain(family, ["neck"], topk=8)
    _, found = explain(family, ["neck[0]"], topk=8)
    assert {e.layer for e in found} == {"neck[0]", ""}
    for own, whole in zip(found, everything):
        if own.maps:
            assert np.array_equal(own.maps[0].saliency, whole.maps[0].saliency)
        else:
            assert own.warning.endswith(f"it was made at {whole.layer}")
    with pytest.raises(FeatureShapeError, match=r"no map neck\[3\]; write one of neck"):
        explain(family, ["neck[3]"])


@pytest.mark.parametrize(("limit", "size_hw"), [(4, (4, 4)), ((2, 3), (2, 3))])
def test_reduced_maps_cover_what_the_layer_covers(limit, size_hw):
    """A grid of 2x3 cells would pass for one of stride 64, which covers more."""
    family = build_family("yolox")
    kept: list = []
    with family.detector.neck.register_forward_hook(lambda m, a, out: kept.extend(out)):
        plain_predict(family)
    _, found = explain(family, max_shape=limit, method="eigencam", topk=10)
    assert len({e.layer for e in found}) > 1
    for explanation in found:
        (own,) = explanation.maps
        maps = kept[int(own.layer[-2])]
        assert own.saliency.shape == maps.shape[-2:]
        small = torch.nn.functional.interpolate(maps, size_hw, mode="bilinear")
        expected = torch.nn.functional.interpolate(
            weigh("eigencam", small)[None], maps.shape[-2:], mode="bilinear"
        )
        assert agrees(own.saliency, expected[0, 0].numpy())


def test_smoothing_of_the_maps():
    family = build_family("yolox")
    _, (plain,) = explain(family, method="layercam", topk=1, max_shape=-1)
    _, (smooth,) = explain(family, method="layercam", topk=1, eigen_smooth=True)
    assert max(plain.maps[0].saliency.shape) > 5
    assert not agrees(smooth.maps[0].saliency, plain.maps[0].saliency)


def test_a_second_image_of_another_size():
    family = build_family("yolox")
    own = attributor(family, topk=10)
    own.explain(family.inputs, family.data_samples[0].metainfo)
    larger = torch.nn.functional.interpolate(
        family.inputs, (192, 160), mode="bilinear", align_corners=False
    )
    network_hw = tuple(larger.shape[-2:])
    meta = {**family.data_samples[0].metainfo, "img_shape": network_hw,
            "batch_input_shape": network_hw}  # fmt: skip
    _, found = own.explain(larger, meta)
    fresh = attributor(family, topk=10)
    _, expected = fresh.explain(larger, meta)
    assert any(e.maps for e in found)
    for one, other in zip(found, expected):
        assert (one.index, one.warning) == (other.index, other.warning)
        assert len(one.maps) == len(other.maps)
        for a, b in zip(one.maps, other.maps):
            assert agrees(a.saliency, b.saliency)


def test_soft_nms_is_refused_before_the_run_and_drise_works(caplog):
    family = copy.deepcopy(build_family("retinanet"))
    family.detector.bbox_head.test_cfg.nms = dict(type="soft_nms", iou_threshold=0.5)
    meta = family.data_samples[0].metainfo
    with pytest.raises(VisError, match=r"carry no gradients.*method='drise'"):
        attributor(family).prepare(family.inputs, meta)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        _, found = explain(family, method="drise", num_masks=6)
    assert len(found) == 3
    assert "scored by the final detections" in caplog.text


def test_a_map_of_a_single_cell_is_refused():
    family = copy.deepcopy(build_family("yolov8"))
    family.detector.backbone.stage4.add_module("attention", ChannelAttention())
    own = attributor(family, ["backbone.stage4.attention.pool"])
    for run in (own.prepare, own.explain):
        with pytest.raises(FeatureShapeError, match=r"pool gives.*a single cell"):
            run(family.inputs, family.data_samples[0].metainfo)


class ChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.pool(x).sigmoid()


def test_a_warning_names_the_class(caplog):
    family = build_family("yolox")
    names = ("cat", "dog", "cow", "bus", "car", "cup")
    own = attributor(family, ["neck.out_layers[0]"], topk=-1, class_names=names)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        found, explanations = own.explain(
            family.inputs, family.data_samples[0].metainfo
        )
    blank = next(e.index for e in explanations if e.warning)
    name = names[int(found.labels[blank])]
    assert f"detection {blank} ({name}): neck.out_layers[0]" in caplog.text
