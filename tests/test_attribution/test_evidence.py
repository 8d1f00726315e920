"""Evidence: gradients at the pixels, against plain autograd and by its properties."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import bbox2roi, bbox_overlaps
from scipy.ndimage import gaussian_filter

from mmyolo_vis_hooks.attribution.evidence import (
    PixelPath,
    baseline_of,
    complementary_masks,
)
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.families import Family, build_family, plain_predict
from tests.test_attribution.helpers import LOGGER, RawOutputs, attributor, explain


def slow_evidence(
    family: Family, index: int, shares: list[torch.Tensor], baseline: torch.Tensor
) -> np.ndarray:
    """One image at a time, through the whole network."""
    raw = RawOutputs(family)
    place = raw.place(index)
    change, total = family.inputs - baseline, 0
    for share in shares:
        image = (baseline + share * change).requires_grad_()
        other = copy.copy(family)
        object.__setattr__(other, "inputs", image)
        raw.family = other
        scores, factors = raw.run()
        (slope,) = torch.autograd.grad(raw.score(scores, factors, place), image)
        total = total + (slope * change)[0].sum(dim=0)
    return (total / len(shares)).numpy()


@pytest.mark.parametrize("baseline", ["blur", "black"])
def test_it_is_the_mean_of_gradients_between_the_baseline_and_the_image(baseline):
    family = build_family("yolox")
    options = dict(method="evidence", baseline=baseline, target="score", topk=2)
    _, alone = explain(family, masks=0, steps=3, **options)
    _, both = explain(family, masks=2, steps=3, batch_size=2, **options)
    preprocessor = family.detector.data_preprocessor
    neutral = baseline_of(baseline, family.inputs, preprocessor)
    steps = [torch.tensor(share) for share in (1 / 6, 3 / 6, 5 / 6)]
    masks = list(complementary_masks(2, (128, 160)))
    for first, second in zip(alone, both):
        parts = [
            slow_evidence(family, first.index, shares, neutral)
            for shares in (steps, masks)
        ]
        expected = [part / np.linalg.norm(part) for part in parts]
        assert min(part.min() for part in expected) < -1e-3
        (found,), (joined,) = first.maps, second.maps
        assert found.layer == joined.layer == "image"
        assert np.abs(found.saliency - expected[0]).max() < 1e-4
        assert np.abs(joined.saliency - sum(expected)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "target"),
    [("yolox", "score"), ("yolov6", "score"), ("yolox", "objectness")],
)
def test_cells_are_hidden_and_shown_alone(name, target):
    family = build_family(name)
    options = dict(method="evidence", target=target, topk=1)
    _, plain = explain(family, **options)
    _, both = explain(family, cells=3, batch_size=5, **options)
    neutral = baseline_of("blur", family.inputs, family.detector.data_preprocessor)
    metainfo = family.data_samples[0].metainfo
    top, _, left, _ = metainfo.get("pad_param", [0] * 4)
    wanted = plain_predict(family)
    boxes = wanted.bboxes * torch.tensor(metainfo["scale_factor"] * 2)
    for slopes, joined in zip(plain, both):
        k = joined.index
        place = RawOutputs(family).place(k)
        x1, y1, x2, y2 = (boxes[k] + torch.tensor([left, top] * 2)).tolist()
        ys, xs = np.arange(128) + 0.5, np.arange(160) + 0.5
        rows, columns = (ys - y1) / (y2 - y1) * 3, (xs - x1) / (x2 - x1) * 3

        def score(shown: np.ndarray, k: int = k, place: tuple = place) -> float:
            image = torch.where(torch.from_numpy(shown), family.inputs, neutral)
            other = dataclasses.replace(family, inputs=image)
            if target == "objectness":
                level, _, row, column = place
                with torch.no_grad():
                    return float(RawOutputs(other).run()[1][level][0, 0, row, column])
            found = plain_predict(other)
            found = found[found.labels == wanted.labels[k]]
            overlaps = bbox_overlaps(wanted.bboxes[k][None], found.bboxes)[0]
            return max([0.0, *(overlaps * found.scores).tolist()])

        inside = ((rows >= 0) & (rows < 3))[:, None] & (columns >= 0) & (columns < 3)
        owns = [
            (rows // 1 == row)[:, None] & (columns // 1 == column)
            for row, column in np.ndindex(3, 3)
        ]
        owns = [own for own in owns if own.any()]
        values = [score(own | ~inside) - score(~own) for own in owns]
        worth = np.zeros((128, 160))
        for value, own in zip(values, owns):
            less = sum(value - other >= 1e-3 for other in values)
            more = sum(other - value >= 1e-3 for other in values)
            worth[own] = (less - more) / (len(owns) - 1)
        assert len(np.unique(worth)) > 4
        blur = functools.partial(
            gaussian_filter,
            sigma=0.05 * ((x2 - x1) * (y2 - y1)) ** 0.5,
            mode="constant",
            truncate=12,
        )
        first = blur(slopes.maps[0].saliency) / blur(np.ones((128, 160)))
        expected = first / np.abs(first).max() + worth
        assert np.abs(joined.maps[0].saliency - expected).max() < 2e-3


@pytest.mark.parametrize("box", [(0, 0, 20, 20), (-8, 0, 12, 20), (0, 0, 4, 4)])
def test_cells_without_a_pixel_are_none(box):
    """Where all that is seen is worth the same, no cell stands out."""
    asked = []

    def found(count, images):
        asked.append(images(slice(0, count)))
        return asked[-1].mean(dim=(1, 2, 3)).mul(1e4).round()[:, None]

    image = torch.ones(1, 1, 20, 20)

    def path(box_xyxy) -> PixelPath:
        boxes = np.array([box_xyxy], float)
        nobody: Any = None
        return PixelPath(image, 0 * image, boxes, 4, 4, 5, scorer=nobody, found=found)

    assert not path(box).worth_of_cells().any()
    assert len(asked[0]) == 2 * {20: 25, 12: 15, 4: 16}[box[2]]
    assert not path([30, 0, 40, 10]).worth_of_cells().any()


@pytest.mark.parametrize("name", ["faster_rcnn", "detr"])
def test_cells_of_regions_and_queries_are_asked_of_what_is_found(name):
    family = build_family(name)
    options = dict(method="evidence", topk=1, steps=1, masks=0)
    (one,), (other,) = (explain(family, cells=n, **options)[1] for n in (0, 2))
    plain, ranked = (
        own.maps[0].saliency / np.abs(own.maps[0].saliency).max()
        for own in (one, other)
    )
    # Half of its cells rank above the others, by up to 2 from the first to the last.
    assert np.ptp(other.maps[0].saliency) > 1.5
    assert np.abs(plain - ranked).max() > 0.5


def test_without_signs_it_is_the_positive_part():
    family = build_family("yolox")
    _, signed = explain(family, method="evidence", topk=2)
    _, positive = explain(family, method="evidence", topk=2, signed=False)
    for one, other in zip(signed, positive):
        assert one.maps[0].saliency.min() < 0
        assert np.array_equal(one.maps[0].saliency.clip(0), other.maps[0].saliency)


def test_boxes_share_the_forwards(monkeypatch):
    family = build_family("yolox")
    own = attributor(family, method="evidence", topk=3)
    own.explain(family.inputs, family.data_samples[0].metainfo)  # the trial
    images = []
    stem = family.detector.backbone.stem
    handle = stem.register_forward_hook(lambda m, a, out: images.append(len(out)))
    _, found = own.explain(family.inputs, family.data_samples[0].metainfo)
    handle.remove()
    assert len(found) == 3
    # One to find the boxes, one that is traced.
    assert sum(images) == 4 + 4 + 2


def test_masks_cover_every_pixel_once_and_keep_shares_of_all_sizes():
    state = torch.get_rng_state()
    masks = complementary_masks(40, (90, 120))
    assert torch.equal(torch.get_rng_state(), state)
    assert masks.shape == (40, 1, 90, 120)
    assert (float(masks.min()), float(masks.max())) == (0, 1)
    assert torch.allclose(masks[::2] + masks[1::2], torch.ones(1))
    shares = masks[::2].mean(dim=(1, 2, 3))
    assert torch.allclose(shares, (torch.arange(20) + 0.5) / 40, atol=0.15)
    assert shares[10:].mean() - shares[:10].mean() > 0.2
    assert torch.equal(masks, complementary_masks(40, (90, 120)))
    # A cell is a sixteenth of the longer side: between two a mask changes evenly.
    assert abs(float(masks.diff(dim=3).abs().max()) - 1 / 8) < 1e-6


def test_baselines():
    family = build_family("yolox")
    preprocessor = copy.deepcopy(family.detector.data_preprocessor)
    image = torch.rand(1, 3, 40, 60)
    mean = baseline_of("mean", image, preprocessor)
    assert torch.allclose(mean, image.mean(dim=(2, 3), keepdim=True).expand_as(image))
    black = baseline_of("black", image, preprocessor)
    assert not black.any()  # this one does not normalise
    preprocessor._enable_normalize = True
    preprocessor.mean = torch.tensor([10.0, 20, 30]).view(3, 1, 1)
    preprocessor.std = torch.tensor([1.0, 2, 5]).view(3, 1, 1)
    black = baseline_of("black", image, preprocessor)
    assert black.shape == image.shape
    assert black[0, :, 3, 4].tolist() == [-10, -10, -6]
    flat = torch.full((1, 3, 40, 60), 0.7)
    assert torch.allclose(baseline_of("blur", flat, preprocessor), flat, atol=1e-6)
    point = torch.zeros(1, 1, 101, 101)
    point[..., 50, 50] = 1
    blurred = baseline_of("blur", point, preprocessor)[0, 0]
    sigma = 0.05 * 101
    expected = np.exp(-(np.arange(12) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
    assert np.allclose(blurred[50, 50:62], expected, rtol=1e-3)


def test_a_score_that_is_saturated_all_the_way_says_so(caplog):
    family = copy.copy(build_family("yolox"))
    object.__setattr__(family, "detector", copy.deepcopy(family.detector))
    for module in family.detector.modules():
        if isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            module.bias.data += 200
    with caplog.at_level(logging.WARNING, LOGGER.name):
        _, (first, *_) = explain(family, method="evidence")
    assert not first.maps
    assert "may be saturated" in first.warning


def test_regions_stay_those_of_the_image():
    """What moves with the image would change the score without a gradient."""
    family = build_family("faster_rcnn")
    detector, inputs = family.detector, family.inputs
    options = dict(method="evidence", topk=1, target="logit", steps=1, masks=0)
    _, (found,) = explain(family, **options)
    samples = family.data_samples
    proposals = detector.rpn_head.predict(detector.extract_feat(inputs), samples)

    def raw_scores(image: torch.Tensor) -> torch.Tensor:
        maps = detector.extract_feat(image)
        rois = bbox2roi([proposals[0].bboxes])
        return detector.roi_head._bbox_forward(maps, rois)["cls_score"]

    plain = plain_predict(family)
    label, score = int(plain.labels[0]), float(plain.scores[0])
    shares = raw_scores(inputs).softmax(dim=1)[:, label]
    baseline = baseline_of("blur", inputs, None)
    middle = ((inputs + baseline) / 2).requires_grad_()
    logit = raw_scores(middle)[(shares - score).abs().argmin(), label]
    (slope,) = torch.autograd.grad(logit, middle)
    expected = (slope * (inputs - baseline))[0].sum(dim=0).numpy()
    assert np.abs(expected).max() > 0
    own = found.maps[0].saliency
    assert np.abs(own - expected / np.linalg.norm(expected)).max() < 1e-4


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(target="x1"), "target='x1'.*'evidence'"),
    (dict(aug_smooth=True), "aug_smooth=True.*'evidence'"),
    (dict(target_layers=["neck"]), "target_layers=.*'evidence'"),
    (dict(eigen_smooth=True), "eigen_smooth=True.*evidence"),
    (dict(steps=0), "steps=0"),
    (dict(masks=3), "masks=3.*even"),
    (dict(masks=-2), "masks=-2"),
    (dict(masks=2.0), r"masks=2\.0"),
    (dict(baseline="white"), "baseline='white'.*'blur', 'black', 'mean'"),
    (dict(signed=1), "signed=1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(VisConfigError, match=message):
        BoxAMOptions(method="evidence", **options)
