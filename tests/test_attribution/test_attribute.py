"""Maps of boxes against slow references that share no code with the package."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn
from torchvision.ops import box_iou

from mmyolo_vis_hooks.attribution import attribute as module
from mmyolo_vis_hooks.attribution.attribute import BoxMapOptions, BoxMapper
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from tests.families import (
    FAMILIES,
    Family,
    build_family,
    plain_predict,
    reference_gradients,
)

LOGGER = logging.getLogger("test_box_mapper")
# The block whose input is explained, since the head is a 1x1 convolution.
MOVED = {
    "yolov5": [
        "neck.top_down_layers.1",
        "neck.bottom_up_layers.0",
        "neck.bottom_up_layers.1",
    ],
    "yolov7": ["neck.out_layers.0", "neck.out_layers.1", "neck.out_layers.2"],
}
TRANSFORMERS = ("detr", "deformable_detr", "dino")
TWO_STAGE = ("faster_rcnn", "cascade_rcnn", "mask_rcnn")


def mapper(
    family: Family, layers: list[str] | None = None, **options: Any
) -> BoxMapper:
    options = {"score_thr": 0.0, "topk": 3, **options}
    return BoxMapper(
        family.detector,
        None if layers is None else resolve_layers(family.detector, layers),
        BoxMapOptions(**options),
        logger=LOGGER,
    )


def explain(family: Family, layers: list[str] | None = None, **options: Any) -> tuple:
    own = mapper(family, layers, **options)
    return own.explain(family.inputs, family.data_samples[0].metainfo)


@contextmanager
def input_as_output(block: nn.Module):
    """An identity whose output is what goes into a block."""
    identity = nn.Identity()
    handle = block.register_forward_pre_hook(lambda _, args: (identity(args[0]),))
    try:
        yield identity
    finally:
        handle.remove()


def references(
    family: Family, count: int, target: str = "score"
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Candidates per detection: maps ``(C, h, w)`` with their gradients."""
    indices = tuple(range(count))
    if family.name in MOVED:
        blocks = dict(family.detector.named_modules())
        found: list[list] = [[] for _ in indices]
        heads = reference_gradients(
            family, family.detector.neck, target=target, indices=indices
        )
        for level, path in enumerate(MOVED[family.name]):
            with input_as_output(blocks[path]) as identity:
                own = reference_gradients(
                    family, identity, target=target, indices=indices
                )
            # Finer levels lead to coarser ones too; the box's own is what counts.
            for all_maps, maps, head in zip(found, own, heads):
                if bool((head[level][1] != 0).any()):
                    all_maps += maps
    elif family.name in TRANSFORMERS:
        encoder = family.detector.encoder
        found = reference_gradients(family, encoder, target=target, indices=indices)
        found = [[p for pair in maps for p in folded(*pair)] for maps in found]
        return found
    else:
        neck = family.detector.neck
        found = reference_gradients(family, neck, target=target, indices=indices)
    return [[(a[0], g[0]) for a, g in maps] for maps in found]


def folded(tokens: torch.Tensor, gradient: torch.Tensor) -> list:
    """Maps in a sequence of tokens of strides 8, 16, 32 and 64 of 128x160."""
    grids = {20: [(4, 5)], 426: [(16, 20), (8, 10), (4, 5), (2, 3)]}
    maps, start = [], 0
    for h, w in grids[tokens.shape[1]]:
        part = slice(start, start + h * w)
        maps.append(tuple(t[0, part].T.reshape(-1, h, w) for t in (tokens, gradient)))
        start += h * w
    return maps


def most_influential(maps: list) -> tuple[torch.Tensor, torch.Tensor]:
    return max(maps, key=lambda pair: float((pair[0] * pair[1]).abs().sum()))


def layercam(activation: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    return (gradient.relu() * activation).sum(dim=0).relu().numpy()


def agrees(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(np.abs(found - expected).max() <= 1e-5 * expected.max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("topk", [3, 10])
def test_the_map_of_each_box_is_that_of_plain_autograd(name, topk):
    """Few boxes go through passes of their own, many of a level through crops."""
    family = build_family(name)
    predictions, explanations = explain(family, topk=topk)
    plain = plain_predict(family)
    assert torch.equal(predictions.scores, plain.scores)
    assert len(explanations) == topk <= len(plain.scores)
    for explanation, maps in zip(explanations, references(family, topk)):
        expected = layercam(*most_influential(maps))
        if expected.max() == 0:
            assert "negative or zero" in explanation.warning
            assert topk > 3
            continue
        (found,) = explanation.maps
        assert found.saliency.dtype == np.float32
        assert found.saliency.max() > 0
        assert explanation.warning == ""
        assert agrees(found.saliency, expected)
        # What passes could not be off by a cell, nor by a thousandth.
        assert not agrees(np.roll(found.saliency, 1, axis=1), expected)
        assert not agrees(found.saliency * 1.001, expected)


@pytest.mark.parametrize(
    ("name", "cropped"),
    [
        ("yolov5", True),
        ("yolov6", True),
        ("yolov7", True),
        ("yolov8", True),
        ("yolox", True),
        ("rtmdet", True),
        ("rtmdet_ins", True),
        ("retinanet", True),
        ("ppyoloe", False),  # its head pools over the whole map
        ("fcos", False),  # group norm
        ("atss", False),
    ],
)
def test_many_boxes_of_a_level_take_one_pass_through_crops(name, cropped, monkeypatch):
    family = build_family(name)
    in_crops: set[int] = set()
    original = BoxMapper._cropped_maps

    def spy(self, *args):
        maps = original(self, *args)
        in_crops.update(maps)
        return maps

    monkeypatch.setattr(BoxMapper, "_cropped_maps", spy)
    _, explanations = explain(family, topk=10)
    levels = [e.maps[0].layer for e in explanations if e.maps]
    # The finest: a crop of a map of a few cells is the map.
    common = min(level for level in levels if levels.count(level) >= 3)
    shown = [k for k, e in enumerate(explanations) if e.maps]
    for k, level in zip(shown, levels):
        if level == common:
            assert (k in in_crops) == cropped


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("target", ["x1", "y2"])
def test_the_map_of_a_box_side(name, target):
    family = build_family(name)
    _, explanations = explain(family, target=target, method="gradcam")
    for explanation, maps in zip(explanations, references(family, 3, target)):
        activation, gradient = most_influential(maps)
        expected = (gradient * activation).sum(dim=0).relu().numpy()
        (found,) = explanation.maps
        assert agrees(found.saliency, expected)


class RawOutputs:
    """Raw outputs of a head, and the place of a detection, by brute force."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.head = family.detector.bbox_head

    def run(self, taps: tuple[nn.Module, Any] | None = None) -> tuple:
        """``(class scores, objectness)`` per level; with another output of taps."""
        outputs: list = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise StopIteration

        handles = [self.head.register_forward_hook(stop)]
        if taps is not None:
            handles.append(taps[0].register_forward_hook(lambda m, a, o: taps[1](o)))
        samples = copy.deepcopy(self.family.data_samples)
        try:
            with suppress(StopIteration):
                self.family.detector.predict(self.family.inputs, samples)
        finally:
            for handle in handles:
                handle.remove()
        (output,) = outputs
        return output[0], (output[2] if len(output) == 3 else None)

    def score(self, scores: Any, factors: Any, place: tuple) -> torch.Tensor:
        level, channel, row, column = place
        value = scores[level][0, channel, row, column].sigmoid()
        if factors is not None:
            value = value * factors[level][0, 0, row, column].sigmoid()
        return value

    def place(self, index: int) -> tuple[int, int, int, int]:
        """Level, channel, row and column whose score is that of a detection."""
        plain = plain_predict(self.family)
        wanted, label = float(plain.scores[index]), int(plain.labels[index])
        with torch.no_grad():
            scores, factors = self.run()
        found = []
        for level, tensor in enumerate(scores):
            for channel, row, column in np.ndindex(*tensor.shape[1:]):
                if channel % 6 != label:
                    continue
                place = (level, channel, row, column)
                if abs(float(self.score(scores, factors, place)) - wanted) < 1e-6:
                    found.append(place)
        (place,) = found
        return place


@pytest.mark.parametrize("name", ["yolox", "yolov8", "fcos", "rtmdet"])
@pytest.mark.parametrize("target", ["logit", "objectness"])
def test_raw_targets(name, target):
    family = build_family(name)
    raw = RawOutputs(family)
    has_factor = name in ("yolox", "fcos")
    if target == "objectness" and not has_factor:
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


@pytest.mark.parametrize("name", ["faster_rcnn", "cascade_rcnn", "detr", "dino"])
def test_the_logit_of_regions_and_queries_has_a_map(name):
    family = build_family(name)
    _, by_score = explain(family, method="gradcam")
    _, by_logit = explain(family, method="gradcam", target="logit")
    for one, other in zip(by_score, by_logit):
        a, b = one.maps[0].saliency.ravel(), other.maps[0].saliency.ravel()
        # The logit is what drives the score, but not the same unit.
        assert a.shape == b.shape
        assert np.corrcoef(a, b)[0, 1] > 0.5
        assert not np.allclose(a, b)
    with pytest.raises(VisConfigError, match="target='objectness' cannot work"):
        explain(family, target="objectness")


def ablated_score(raw: RawOutputs, place: tuple, level: int, channel: int) -> float:
    """The slow way: a whole forward without one channel of one map."""

    def tap(output: Any) -> Any:
        changed = [t.clone() for t in output]
        changed[level][:, channel] = 0
        return tuple(changed)

    with torch.no_grad():
        scores, factors = raw.run((raw.family.detector.neck, tap))
    return float(raw.score(scores, factors, place))


@pytest.mark.parametrize("name", ["yolox", "yolov8", "ppyoloe", "retinanet", "fcos"])
@pytest.mark.parametrize("topk", [1, 10])
def test_ablation_weighs_by_what_the_box_loses(name, topk, monkeypatch):
    family = build_family(name)
    raw = RawOutputs(family)
    weights: list[np.ndarray] = []
    original = module.weigh_channels

    def spy(activations, given, **options):
        weights.append(given)
        return original(activations, given, **options)

    monkeypatch.setattr(module, "weigh_channels", spy)
    _, explanations = explain(family, method="ablationcam", topk=topk)
    plain = plain_predict(family)
    first = explanations[0]
    place = raw.place(first.index)
    score = float(plain.scores[first.index])
    neck: list = []
    raw.run((family.detector.neck, lambda output: neck.extend(output)))
    channels = range(0, neck[place[0]].shape[1], 5)
    expected = [
        (score - ablated_score(raw, place, place[0], c)) / score for c in channels
    ]
    # The best box is the first of its level.
    own = next(w for w in weights if np.allclose(w[0, list(channels)], expected,
                                                 rtol=1e-3, atol=1e-5))  # fmt: skip
    cam = np.einsum("c,chw->hw", own[0], neck[place[0]][0].detach().numpy()).clip(0)
    assert first.maps[0].layer == f"neck[{place[0]}]"
    assert agrees(first.maps[0].saliency, cam.astype(np.float32))
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("name", [*TWO_STAGE, *TRANSFORMERS, "yolov5", "yolov7"])
def test_ablation_of_other_heads(name):
    """Without a channel that counts, the score of the box itself changes."""
    family = build_family(name)
    options = dict(method="ablationcam", topk=1, ratio_channels_to_ablate=0.1)
    _, (explanation,) = explain(family, **options)
    (found,) = explanation.maps
    assert found.saliency.max() > 0
    assert found.saliency.std() > 0


def test_the_ratio_limits_the_ablated_channels(monkeypatch):
    family = build_family("yolox")
    tried = []
    original = module.channels_to_ablate
    monkeypatch.setattr(
        module,
        "channels_to_ablate",
        lambda *args: tried.append(original(*args)) or tried[-1],
    )
    explain(family, method="ablationcam", ratio_channels_to_ablate=0.25)
    num_channels = build_family("yolox").detector.neck.out_channels
    assert all(len(set(own)) <= num_channels // 2 for own in tried)
    tried.clear()
    explain(family, method="ablationcam")
    assert all(len(own) > num_channels * 0.9 for own in tried)


def test_score_cam_masks_the_input(monkeypatch):
    family = build_family("yolox")
    raw = RawOutputs(family)
    weights: list[np.ndarray] = []
    original = module.weigh_channels
    monkeypatch.setattr(
        module,
        "weigh_channels",
        lambda a, w, **k: weights.append(w) or original(a, w, **k),
    )
    _, (explanation,) = explain(family, method="scorecam", topk=1)
    place = raw.place(explanation.index)
    neck: list = []
    raw.run((family.detector.neck, lambda output: neck.extend(output)))
    maps = neck[place[0]].detach()
    scores = []
    inputs = family.inputs
    for channel in range(maps.shape[1]):
        mask = torch.nn.functional.interpolate(
            maps[:, channel : channel + 1], inputs.shape[-2:], mode="bilinear"
        )
        mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
        masked = RawOutputs(
            Family(family.name, family.detector, inputs * mask, family.data_samples)
        )
        with torch.no_grad():
            scores.append(float(masked.score(*masked.run(), place)))
    expected = torch.tensor(scores).softmax(dim=0).numpy()
    assert np.allclose(weights[0][0], expected, rtol=1e-4)
    assert np.ptp(scores) > 0.01


@pytest.mark.parametrize("batch_size", [1, 7])
def test_drise_does_not_depend_on_the_batches(batch_size):
    family = build_family("yolov6")
    options = dict(method="drise", num_masks=20, topk=2)
    _, expected = explain(family, batch_size=20, **options)
    _, found = explain(family, batch_size=batch_size, **options)
    assert [e.index for e in found] == [0, 1]
    for one, other in zip(found, expected):
        assert one.maps[0].layer == "image"
        assert one.maps[0].saliency.shape == tuple(family.inputs.shape[-2:])
        difference = np.abs(one.maps[0].saliency - other.maps[0].saliency).max()
        assert difference <= 1e-4 * other.maps[0].saliency.max()
        assert one.maps[0].saliency.min() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["yolox", "yolov5", "faster_rcnn", "detr"])
def test_every_method_runs_on_every_kind_of_head(method, name):
    family = build_family(name)
    options = dict(topk=1, num_masks=12, ratio_channels_to_ablate=0.05)
    if method == "scorecam" and name in ("detr", "faster_rcnn"):
        pytest.skip("hundreds of whole forwards; the same code as for other heads")
    _, (explanation,) = explain(family, method=method, **options)
    for found in explanation.maps:
        assert found.saliency.ndim == 2
        assert np.isfinite(found.saliency).all()
        assert found.saliency.min() >= 0
        assert found.saliency.max() > 0
    assert explanation.maps or explanation.warning


def test_methods_give_different_maps():
    family = build_family("yolox")
    maps = {}
    for method in ("boxam", "gradcam", "gradcam++", "gradcam_averaged", "eigencam"):
        _, (explanation,) = explain(family, method=method, topk=1)
        saliency = explanation.maps[0].saliency
        maps[method] = saliency / saliency.max()
    names = list(maps)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(maps[one] - maps[other]).max() > 0.01, (one, other)


def test_gradcam_is_hirescam_and_odam_of_one_scalar():
    family = build_family("yolox")
    _, expected = explain(family, method="hirescam")
    for method in ("gradcam", "odam"):
        _, found = explain(family, method=method)
        for one, other in zip(found, expected):
            assert np.array_equal(one.maps[0].saliency, other.maps[0].saliency)


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


def test_explicit_layers_give_a_map_each():
    family = build_family("yolox")
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


def test_a_layer_without_influence_is_never_a_silent_blank_map(caplog):
    family = build_family("yolox")
    plain = RawOutputs(family)
    levels = [plain.place(i)[0] for i in range(3)]
    assert set(levels) > {0}
    with caplog.at_level(logging.WARNING, LOGGER.name):
        _, explanations = explain(family, ["neck.out_layers[0]"])
    for explanation, level in zip(explanations, levels):
        assert bool(explanation.maps) == (level == 0)
        assert bool(explanation.warning) == (level != 0)
        if level != 0:
            assert "neck.out_layers[0]: no influence" in explanation.warning
            assert f"made at neck[{level}]" in explanation.warning
            assert explanation.warning in caplog.text


def test_detections_are_chosen_by_score_class_and_number():
    family = build_family("yolox")
    plain = plain_predict(family)
    order = plain.scores.argsort(descending=True).tolist()
    _, found = explain(family, topk=5)
    assert [e.index for e in found] == order[:5]
    _, found = explain(family, topk=-1)
    assert [e.index for e in found] == order
    threshold = float(plain.scores.sort(descending=True).values[3])
    _, found = explain(family, topk=-1, score_thr=threshold)
    assert [e.index for e in found] == order[:3]
    label = int(plain.labels[order[2]])
    _, found = explain(family, topk=2, classes=[label])
    assert [e.index for e in found] == [i for i in order if plain.labels[i] == label][
        :2
    ]
    predictions, found = explain(family, score_thr=0.999)
    assert found == ()
    assert len(predictions.scores) == len(plain.scores)


def test_max_shape_limits_the_map():
    family = build_family("yolox")
    for limit, shapes in ((4, {(4, 4)}), ((3, 5), {(3, 5)})):
        _, found = explain(family, max_shape=limit, method="eigencam")
        assert {m.saliency.shape for e in found for m in e.maps} == shapes
    _, found = explain(family, max_shape=-1)
    assert max(m.saliency.shape for e in found for m in e.maps) > (4, 4)


def test_eigen_smooth_changes_the_map():
    family = build_family("yolox")
    _, (plain,) = explain(family, method="layercam", topk=1)
    _, (smooth,) = explain(family, method="layercam", topk=1, eigen_smooth=True)
    assert not agrees(smooth.maps[0].saliency, plain.maps[0].saliency)


def test_augmented_maps_are_the_mean_over_mirrors_and_brightnesses():
    family = build_family("yolox")
    network_hw = tuple(family.inputs.shape[-2:])
    # Without a scale, so that boxes can be mirrored as they are.
    meta = {**family.data_samples[0].metainfo, "img_shape": network_hw,
            "ori_shape": network_hw, "scale_factor": (1.0, 1.0)}  # fmt: skip
    predictions, explanations = mapper(family, aug_smooth=True, topk=5).explain(
        family.inputs, meta
    )
    everything = mapper(family, topk=-1)
    sums: list[list[np.ndarray]] = [[] for _ in explanations]
    for mirrored in (False, True):
        for factor in (1.0, 0.9, 1.1):
            inputs = family.inputs.flip(-1) if mirrored else family.inputs
            others, maps = everything.explain(inputs * factor, meta)
            boxes = others.bboxes.clone()
            if mirrored:
                boxes[:, 0] = network_hw[1] - others.bboxes[:, 2]
                boxes[:, 2] = network_hw[1] - others.bboxes[:, 0]
            by_index = {e.index: e for e in maps}
            for own, explanation in zip(sums, explanations):
                overlaps = box_iou(predictions.bboxes[explanation.index][None], boxes)[
                    0
                ]
                same = others.labels == predictions.labels[explanation.index]
                best = int((overlaps * same).argmax())
                if overlaps[best] * same[best] < 0.5:
                    continue
                for layer_map in by_index[best].maps:
                    if layer_map.layer == explanation.maps[0].layer:
                        saliency = layer_map.saliency / layer_map.saliency.max()
                        own.append(saliency[:, ::-1] if mirrored else saliency)
    assert max(len(own) for own in sums) > 1
    for own, explanation in zip(sums, explanations):
        mean = np.mean(own, axis=0, dtype=np.float32)
        assert np.abs(explanation.maps[0].saliency - mean).max() < 1e-4


def test_levels_that_cannot_be_cropped_take_other_ways(monkeypatch):
    family = build_family("yolox")
    _, expected = explain(family, topk=10)
    monkeypatch.setattr(module, "_agrees", lambda found, expected: False)
    own = mapper(family, topk=10)
    _, found = own.explain(family.inputs, family.data_samples[0].metainfo)
    assert own._no_crops
    for one, other in zip(found, expected):
        assert agrees(one.maps[0].saliency, other.maps[0].saliency)


def test_the_detector_is_left_as_it_was():
    family = build_family("yolox")
    detector = copy.deepcopy(family.detector)
    detector.train()
    parameter = next(detector.parameters())
    parameter.requires_grad_(True)
    parameter.grad = torch.ones_like(parameter)
    state = {k: v.clone() for k, v in detector.state_dict().items()}
    modes = [m.training for m in detector.modules()]
    own = BoxMapper(
        detector,
        None,
        BoxMapOptions(score_thr=0.0, method="ablationcam"),
        logger=LOGGER,
    )
    rng = torch.get_rng_state()
    with torch.no_grad():
        own.explain(family.inputs, family.data_samples[0].metainfo)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in detector.modules()] == modes
    assert parameter.requires_grad
    assert float(parameter.grad.mean()) == 1
    assert all(torch.equal(v, state[k]) for k, v in detector.state_dict().items())
    for child in detector.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
        assert "forward" not in vars(child)


def test_works_in_inference_mode():
    family = build_family("yolox")
    _, expected = explain(family)
    with torch.inference_mode():
        inputs = family.inputs + 0
        own = mapper(family)
        _, found = own.explain(inputs, family.data_samples[0].metainfo)
    for one, other in zip(found, expected):
        assert agrees(one.maps[0].saliency, other.maps[0].saliency)


def test_a_second_image_of_another_size():
    family = build_family("yolox")
    own = mapper(family, topk=10)
    own.explain(family.inputs, family.data_samples[0].metainfo)
    larger = torch.nn.functional.interpolate(
        family.inputs, (192, 160), mode="bilinear", align_corners=False
    )
    network_hw = tuple(larger.shape[-2:])
    meta = {**family.data_samples[0].metainfo, "img_shape": network_hw,
            "batch_input_shape": network_hw}  # fmt: skip
    _, found = own.explain(larger, meta)
    fresh = mapper(family, topk=10)
    _, expected = fresh.explain(larger, meta)
    assert any(e.maps for e in found)
    for one, other in zip(found, expected):
        assert (one.index, one.warning) == (other.index, other.warning)
        assert len(one.maps) == len(other.maps)
        for a, b in zip(one.maps, other.maps):
            assert agrees(a.saliency, b.saliency)


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
        own = BoxMapper(
            detector, None, BoxMapOptions(score_thr=0.0, **options), logger=LOGGER
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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(method="boxcam"), "method='boxcam'"),
        (dict(target="class"), "target='class'"),
        (dict(method="odam_combined", target="logit"), "odam_combined"),
        (dict(method="drise", target="logit"), "drise"),
        (dict(method="ablationcam", target="x1"), "compares scores"),
        (dict(score_thr=1.5), "score_thr=1.5"),
        (dict(topk=0), "topk=0"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(num_masks=-1), "num_masks=-1"),
        (dict(max_shape=0), "max_shape=0"),
        (dict(max_shape=(1, 2, 3)), "max_shape="),
        (dict(ratio_channels_to_ablate=0), "ratio_channels_to_ablate=0"),
        (dict(eigen_smooth="yes"), "eigen_smooth='yes'"),
        (dict(aug_smooth=1), "aug_smooth=1"),
        (dict(method="drise", aug_smooth=True), "aug_smooth=True"),
        (dict(method="eigencam", eigen_smooth=True), "eigen_smooth=True"),
    ],
)
def test_options_that_cannot_work_are_refused(options, match):
    with pytest.raises(VisConfigError, match=match):
        BoxMapOptions(**options)
