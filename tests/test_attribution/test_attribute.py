"""Maps of boxes against slow references that share no code with the package."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn
from torchvision.ops import box_iou

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.attribution.blackbox import rise_masks
from mmyolo_vis_hooks.attribution.methods import METHODS, register_method
from mmyolo_vis_hooks.attribution.perturb import ablationcam, scorecam
from mmyolo_vis_hooks.attribution.targets import TARGETS, register_target
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.families import (
    FAMILIES,
    Family,
    build_family,
    plain_predict,
    reference_gradients,
)
from tests.toy_boxes import ToyBoxDetector

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


def attributor(
    family: Family, layers: list[str] | None = None, **options: Any
) -> BoxAttributor:
    options = {"score_thr": 0.0, "topk": 3, "target_layers": layers, **options}
    labels = options.pop("labels", None)
    own = BoxAMOptions(**options)
    return BoxAttributor(family.detector, own, labels=labels, logger=LOGGER)


def explain(family: Family, layers: list[str] | None = None, **options: Any) -> tuple:
    own = attributor(family, layers, **options)
    return own.explain(family.inputs, family.data_samples[0].metainfo)


@pytest.fixture
def registry():
    """Methods and targets that a test registers are gone after it."""
    methods, targets = dict(METHODS), dict(TARGETS)
    yield
    for known, before in ((METHODS, methods), (TARGETS, targets)):
        known.clear()
        known.update(before)


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


@pytest.mark.parametrize("name", ["yolov5", "fcos", "cascade_rcnn", "dino"])
def test_the_map_of_a_box_side(name):
    family = build_family(name)
    for target in ("x1", "y2"):
        _, explanations = explain(family, target=target, method="gradcam")
        for explanation, maps in zip(explanations, references(family, 3, target)):
            activation, gradient = most_influential(maps)
            expected = (gradient * activation).sum(dim=0).relu().numpy()
            assert agrees(explanation.maps[0].saliency, expected)


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


def ablated_score(raw: RawOutputs, place: tuple, level: int, channel: int) -> float:
    """The slow way: a whole forward without one channel of one map."""

    def tap(output: Any) -> Any:
        changed = [t.clone() for t in output]
        changed[level][:, channel] = 0
        return tuple(changed)

    with torch.no_grad():
        scores, factors = raw.run((raw.family.detector.neck, tap))
    return float(raw.score(scores, factors, place))


def spy_on(function: Any) -> tuple[str, list]:
    """Name of a method that is another one and keeps the weights of its channels."""
    kept: list[np.ndarray] = []

    kind = METHODS[function.__name__].kind

    @register_method("spied", kind=kind, summary="", formula="")
    def spied(layer: Any) -> torch.Tensor:
        weights = function(layer)
        kept.append(weights.numpy())
        return weights

    return "spied", kept


@pytest.mark.parametrize("name", ["yolox", "ppyoloe", "retinanet"])
def test_ablation_weighs_by_what_the_box_loses(name, registry):
    family = build_family(name)
    raw = RawOutputs(family)
    method, weights = spy_on(ablationcam)
    _, explanations = explain(family, method=method, topk=4)
    plain = plain_predict(family)
    first = explanations[0]
    place = raw.place(first.index)
    score = float(plain.scores[first.index])
    neck: list = []
    raw.run((family.detector.neck, lambda output: neck.extend(output)))
    channels = list(range(0, neck[place[0]].shape[1], 5))
    expected = [
        (score - ablated_score(raw, place, place[0], c)) / score for c in channels
    ]
    # The best box is the first of its level.
    close = partial(np.allclose, b=expected, rtol=1e-3, atol=1e-5)
    own = next(w for w in weights if close(w[0, channels]))
    cam = np.einsum("c,chw->hw", own[0], neck[place[0]][0].detach().numpy()).clip(0)
    assert first.maps[0].layer == f"neck[{place[0]}]"
    assert agrees(first.maps[0].saliency, cam.astype(np.float32))
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 4), (0.01, 1)])
def test_the_ratio_is_the_share_of_channels_that_are_tried(ratio, count, registry):
    family = build_family("yolox")
    method, weights = spy_on(ablationcam)
    options = dict(method=method, topk=1, ratio_channels_to_ablate=ratio)
    explain(family, ["backbone.stem"], **options)
    with torch.no_grad():
        output = family.detector.backbone.stem(family.inputs)[0]
    order = output.abs().mean(dim=(1, 2)).argsort(descending=True).tolist()
    ((own,),) = weights
    assert own.shape == (16,)
    # The most active ones, and almost each of them counts for something.
    assert set(np.flatnonzero(own)) <= set(order[:count])
    assert len(np.flatnonzero(own)) >= 0.7 * count


def test_score_cam_masks_the_input(registry):
    family = build_family("yolox")
    raw = RawOutputs(family)
    method, weights = spy_on(scorecam)
    _, (explanation,) = explain(family, method=method, topk=1)
    place = raw.place(explanation.index)
    neck: list = []
    raw.run((family.detector.neck, lambda output: neck.extend(output)))
    maps = neck[place[0]].detach()
    scores = []
    for channel in range(maps.shape[1]):
        mask = torch.nn.functional.interpolate(
            maps[:, channel : channel + 1], family.inputs.shape[-2:], mode="bilinear"
        )
        mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
        scores.append(masked_score(family, mask, place))
    expected = torch.tensor(scores).softmax(dim=0).numpy()
    assert np.allclose(weights[0][0], expected, rtol=1e-4)
    assert np.ptp(scores) > 0.01


def masked_score(family: Family, mask: torch.Tensor, place: tuple) -> float:
    """What an anchor scores on the image under a mask."""
    masked = dataclasses.replace(family, inputs=family.inputs * mask)
    raw = RawOutputs(masked)
    with torch.no_grad():
        return float(raw.score(*raw.run(), place))


def test_drise_scores_at_the_own_anchor(monkeypatch):
    family = build_family("yolox")
    places = [RawOutputs(family).place(index) for index in range(2)]
    total, count = np.zeros((2, *family.inputs.shape[-2:])), 12
    for (mask,) in rise_masks(count, tuple(family.inputs.shape[-2:]), batch_size=1):
        scores = [masked_score(family, mask[None], place) for place in places]
        total += np.array(scores)[:, None, None] * mask[0].numpy()
    # Neither NMS nor anything else follows the raw outputs of masked images.
    calls = []
    head = family.detector.bbox_head
    original = head.predict_by_feat
    monkeypatch.setattr(
        head, "predict_by_feat", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    options = dict(method="drise", num_masks=count, topk=2)
    own = attributor(family, **options)
    own.explain(family.inputs, family.data_samples[0].metainfo)
    first = len(calls)
    _, found = own.explain(family.inputs, family.data_samples[0].metainfo)
    assert len(calls) - first < 6 <= count
    _, in_batches = explain(family, batch_size=7, **options)
    wanted = list(total / (count * 0.5))
    for explanation, expected in zip([*found, *in_batches], wanted * 2):
        assert explanation.note == ""
        assert explanation.maps[0].layer == "image"
        difference = explanation.maps[0].saliency - (expected - expected.min())
        assert np.abs(difference).max() < 1e-4 * expected.max()


@pytest.mark.parametrize("name", ["faster_rcnn", "detr"])
def test_drise_of_regions_and_queries_goes_by_final_detections(name, caplog):
    family = build_family(name)
    own = attributor(family, method="drise", num_masks=4, topk=2)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        for _ in range(2):
            _, found = own.explain(family.inputs, family.data_samples[0].metainfo)
    assert caplog.text.count("scored by the final detections") == 1
    plain = plain_predict(family)
    total = np.zeros((2, *family.inputs.shape[-2:]))
    for (mask,) in rise_masks(4, tuple(family.inputs.shape[-2:]), batch_size=1):
        masked = dataclasses.replace(family, inputs=family.inputs * mask)
        others = plain_predict(masked)
        for k in range(2):
            overlaps = box_iou(plain.bboxes[k][None], others.bboxes)[0]
            kept = (others.labels == plain.labels[k]) * others.scores * overlaps
            total[k] += float(kept.max() if len(kept) else 0) * mask[0].numpy()
    assert total.max() > 0
    for explanation, expected in zip(found, total / 2):
        assert "final detections" in explanation.note
        if explanation.maps:
            assert agrees(explanation.maps[0].saliency, expected - expected.min())


# One of each kind on each kind of head in every run, and all pairs at night.
ONE_OF_A_KIND = ["gradcam++", "shapleycam", "eigencam", "ablationcam", "scorecam"]
QUICK = [("scorecam", "yolov5")]
QUICK += itertools.product(ONE_OF_A_KIND[:-1], ["yolov5", "faster_rcnn", "detr"])


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.nightly)
        for pair in itertools.product(METHODS, FAMILIES)
    ],
)
def test_every_method_runs_on_every_family(method, name):
    family = build_family(name)
    options = dict(ratio_channels_to_ablate=0.1, num_masks=20)
    _, (explanation,) = explain(family, method=method, topk=1, **options)
    if not explanation.maps and (method, name) not in QUICK:
        assert explanation.note or explanation.warning  # it says why
        return
    (found,) = explanation.maps
    assert found.saliency.ndim == 2
    assert np.isfinite(found.saliency).all()
    assert found.saliency.min() >= 0
    assert found.saliency.max() > 0


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


def test_a_layer_without_influence_is_never_a_silent_blank_map(caplog):
    family = build_family("yolox")
    with caplog.at_level(logging.WARNING, LOGGER.name):
        _, explanations = explain(family, ["neck.out_layers[0]"], topk=-1)
    raw = RawOutputs(family)
    levels = [raw.place(explanation.index)[0] for explanation in explanations]
    for explanation, level in zip(explanations, levels):
        assert bool(explanation.maps) == (level == 0)
        assert bool(explanation.warning) == (level != 0)
        if level != 0:
            assert "neck.out_layers[0]: no influence" in explanation.warning
            assert f"made at neck[{level}]" in explanation.warning
            assert explanation.warning in caplog.text
    # MMEngine drops a second record with an equal template.
    templates = {r.msg for r in caplog.records if "no influence" in r.getMessage()}
    assert len(templates) == sum(level != 0 for level in levels) >= 5


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
    _, found = explain(family, topk=2, labels=[label])
    assert [e.index for e in found] == [i for i in order if plain.labels[i] == label][
        :2
    ]
    predictions, found = explain(family, score_thr=0.999)
    assert found == ()
    assert len(predictions.scores) == len(plain.scores)


def test_shape_and_smoothing_of_the_maps():
    family = build_family("yolox")
    for limit, shapes in ((4, {(4, 4)}), ((3, 5), {(3, 5)})):
        _, found = explain(family, max_shape=limit, method="eigencam")
        assert {m.saliency.shape for e in found for m in e.maps} == shapes
    _, (plain,) = explain(family, method="layercam", topk=1, max_shape=-1)
    _, (smooth,) = explain(family, method="layercam", topk=1, eigen_smooth=True)
    assert max(plain.maps[0].saliency.shape) > 5
    assert not agrees(smooth.maps[0].saliency, plain.maps[0].saliency)


def test_augmented_maps_are_the_mean_over_mirrors_and_brightnesses():
    """Padding beside the image stays where it is."""
    left = 8
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
        assert (explanation.method, explanation.target) == ("mine", "margin")
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


def test_a_target_gives_a_number_for_each_box_of_what_the_network_gave(registry):
    register_target("mine", summary="")(lambda boxes: boxes.scores.sum())
    with pytest.raises(VisError, match=r"target='mine' gives a tensor of shape \(\)"):
        explain(build_family("yolox"), target="mine")
    register_target("mine", summary="")(lambda boxes: boxes.scores.detach())
    _, explanations = explain(build_family("yolox"), target="mine")
    assert all("does not depend" in e.warning for e in explanations)


def test_soft_nms_is_refused_before_the_run_and_drise_works():
    family = copy.deepcopy(build_family("retinanet"))
    family.detector.bbox_head.test_cfg.nms = dict(type="soft_nms", iou_threshold=0.5)
    meta = family.data_samples[0].metainfo
    with pytest.raises(VisError, match=r"carry no gradients.*method='drise'"):
        attributor(family).prepare(family.inputs, meta)
    _, found = explain(family, method="drise", num_masks=6)
    assert len(found) == 3
    assert all("final detections" in e.note for e in found)


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
