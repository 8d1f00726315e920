"""Methods that change what the network sees, against whole forwards."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.attribution.blackbox import rise_masks
from mmyolo_vis_hooks.attribution.methods import METHODS, register_method
from mmyolo_vis_hooks.attribution.perturb import ablationcam, scorecam
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.families import (
    FAMILIES,
    Family,
    build_family,
    map_tensors,
    plain_predict,
)
from tests.test_attribution.helpers import (
    LOGGER,
    TRANSFORMERS,
    RawOutputs,
    agrees,
    attributor,
    explain,
)


def ablated_score(
    raw: RawOutputs, place: tuple, channel: int, layer: torch.nn.Module | None = None
) -> float:
    """The slow way: a whole forward without a channel of a layer, or of the neck."""

    def tap(output: Any) -> Any:
        changed = map_tensors(output, torch.clone)
        (changed if layer else changed[place[0]])[:, channel] = 0
        return changed

    with torch.no_grad():
        scores, factors = raw.run((layer or raw.family.detector.neck, tap))
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
    expected = [(score - ablated_score(raw, place, c)) / score for c in channels]
    # The best box is the first of its level.
    close = partial(np.allclose, b=expected, rtol=1e-3, atol=1e-5)
    own = next(w for w in weights if close(w[0, channels]))
    cam = np.einsum("c,chw->hw", own[0], neck[place[0]][0].detach().numpy()).clip(0)
    assert first.maps[0].layer == f"neck[{place[0]}]"
    assert agrees(first.maps[0].saliency, cam.astype(np.float32))
    assert np.abs(expected).max() > 1e-3


def test_a_layer_beside_a_tensor_that_is_changed_in_place(registry, caplog):
    """A ResNet adds a ``downsample`` in place to what was computed before it."""
    family = build_family("retinanet")
    raw = RawOutputs(family)
    layers = ["backbone.layer3[0].downsample", "backbone.layer3[1].conv1"]
    method, weights = spy_on(ablationcam)
    options = dict(method=method, topk=1, ratio_channels_to_ablate=0.03)
    with caplog.at_level(logging.WARNING, LOGGER.name):
        _, (explanation,) = explain(family, layers, **options)
    module = "backbone.layer3.0.downsample"
    # Not for what comes behind it.
    (said,) = (m for m in caplog.messages if m.startswith("Whole forwards are run"))
    assert f"on {module}, since" in said
    assert "it gave other values than in a whole forward" in said
    (own,), _ = weights
    channels = np.flatnonzero(own).tolist()
    assert len(channels) >= 5
    place = raw.place(explanation.index)
    score = float(plain_predict(family).scores[explanation.index])
    block = family.detector.get_submodule(module)
    lost = [score - ablated_score(raw, place, c, block) for c in channels]
    assert np.allclose(own[channels] * score, lost, rtol=1e-3, atol=1e-6)


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
    shares = []
    for (mask,) in rise_masks(count, tuple(family.inputs.shape[-2:]), batch_size=1):
        shares.append(float(mask.mean()))
        scores = [masked_score(family, mask[None], place) for place in places]
        total += np.array(scores)[:, None, None] * mask[0].numpy()
    assert abs(np.mean(shares) - 0.5) < 0.05 < np.std(shares) * 5
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
        assert explanation.maps[0].layer == "image"
        difference = explanation.maps[0].saliency - (expected - expected.min())
        assert np.abs(difference).max() < 1e-4 * expected.max()


@pytest.mark.parametrize("name", ["faster_rcnn", "detr", "deformable_detr"])
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
        if explanation.maps:
            assert agrees(explanation.maps[0].saliency, expected - expected.min())


# One of each kind on each kind of head in every run, and all pairs at night.
ONE_OF_A_KIND = ["gradcam++", "shapleycam", "eigencam", "ablationcam"]
QUICK = [*itertools.product(ONE_OF_A_KIND, ["yolov5", "cascade_rcnn", "detr"])]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.nightly)
        for pair in itertools.product(METHODS, FAMILIES)
        if pair[0] != "attention" or pair[1] in TRANSFORMERS
    ],
)
def test_every_method_runs_on_every_family(method, name):
    family = build_family(name)
    options = dict(ratio_channels_to_ablate=0.1, num_masks=20)
    _, (explanation,) = explain(family, method=method, topk=1, **options)
    if not explanation.maps and (method, name) not in QUICK:
        assert explanation.warning  # it says why
        return
    assert len(explanation.maps) == 1 or method == "attention"  # a map per level
    for found in explanation.maps:
        assert found.saliency.ndim == 2
        assert np.isfinite(found.saliency).all()
        assert found.saliency.min() >= 0 or METHODS[method].kind == "pixels"
        assert found.saliency.max() > 0


@pytest.mark.parametrize("method", ["drise", "ablationcam"])
def test_a_bar_is_for_terminals_only(method, capsys):
    """In a log, it would leave an empty line for each layer of each image."""
    family = build_family("yolox")
    own = BoxAttributor(
        family.detector,
        BoxAMOptions(
            method=method,
            topk=1,
            score_thr=0.0,
            num_masks=2,
            ratio_channels_to_ablate=0.1,
        ),
        logger=LOGGER,
        show_progress=True,
    )
    _, explanations = own.explain(family.inputs, family.data_samples[0].metainfo)
    assert len(explanations) == 1
    assert capsys.readouterr().out == ""
