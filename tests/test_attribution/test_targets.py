"""Scalars that are explained, and the anchors at which heads decide them."""

from __future__ import annotations

import math

import pytest
import torch
from mmengine.structures import InstanceData

from mmyolo_vis_hooks.attribution.anchors import Anchor, locate_anchors
from mmyolo_vis_hooks.attribution.scoring import score_link
from mmyolo_vis_hooks.attribution.targets import (
    ChosenBoxes,
    class_logits,
    objectness,
    objectness_logits,
)
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.network.graph import PredictionGraph
from mmyolo_vis_hooks.network.nested import OutputKey

CLS, BOX, OBJ = (OutputKey("head", 0, (i, 0)) for i in range(3))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def raw() -> dict:
    """Raw outputs of a head with 3 classes and objectness on a 4x5 map."""
    torch.manual_seed(0)
    return {
        CLS: torch.randn(1, 3, 4, 5, requires_grad=True),
        BOX: torch.randn(1, 4, 4, 5, requires_grad=True),
        OBJ: torch.randn(1, 1, 4, 5, requires_grad=True),
    }


def located(scalars: torch.Tensor, labels: list[int], raw: dict) -> list[Anchor]:
    graph = PredictionGraph(torch.zeros(1, 3, 32, 40), head_outputs=raw)
    return locate_anchors(scalars, labels, graph)


def scores_at(raw: dict, places: list[tuple[int, int, int]]) -> torch.Tensor:
    """Scores of (label, row, column), as a head with objectness makes them."""
    everything = raw[CLS].sigmoid() * raw[OBJ].sigmoid()
    return torch.stack([everything[0, c, y, x] for c, y, x in places])


PLACES = [(2, 1, 3), (0, 3, 4), (1, 0, 0), (2, 2, 2)]


def test_what_two_boxes_share_is_not_given_to_a_third(raw):
    """The side of two boxes of one anchor looks like one of the box between them."""
    sides = raw[BOX].sigmoid()
    places = [(0, 1, 1), (0, 2, 3), (0, 1, 1)]
    scalars = torch.stack([sides[0, c, y, x] for c, y, x in places])
    anchors = located(scalars, [0, 0, 1], raw)
    assert [a.cell for a in anchors] == [(1, 1), (2, 3), (1, 1)]
    saturated = torch.stack([scalars[0], (raw[BOX][0, 0, 2, 3] * 0 + 200).sigmoid(),
                             scalars[2]])  # fmt: skip
    anchors = located(saturated, [0, 0, 1], raw)
    assert [a.cell for a in anchors] == [(1, 1), None, (1, 1)]


def test_a_saturated_score_has_an_anchor_without_entries(raw):
    scores = scores_at(raw, PLACES)
    saturated = (raw[CLS][0, 0, 0, 1] * 0 + 200).sigmoid()
    anchors = located(torch.cat([scores, saturated[None]]), [0] * 5, raw)
    assert anchors[-1].entries == ()
    assert anchors[-1].cell is None
    assert all(anchor.entries for anchor in anchors[:-1])
    assert class_logits(anchors[-1]) == []
    assert objectness_logits(anchors[-1]) == []


def test_a_saturated_objectness_leaves_the_others_theirs(raw):
    with torch.no_grad():
        raw[OBJ][0, 0, 1, 3] = 200
    predictions = InstanceData(
        scores=scores_at(raw, PLACES), labels=torch.tensor([2, 0, 1, 2])
    )
    graph = PredictionGraph(
        torch.zeros(1, 3, 32, 40), head_outputs=raw, predictions=predictions
    )
    found = objectness(ChosenBoxes(graph, [0, 1, 2, 3], "Detector"))
    own = [raw[OBJ][0, 0, row, column] for _, row, column in PLACES[1:]]
    assert torch.equal(found, torch.stack([torch.tensor(0.0), *own]))


def softmax_anchor(num_stages: int) -> tuple[dict, Anchor, float]:
    """Region 5 of 8, class 1 of 3 and background; a cascade takes the mean."""
    torch.manual_seed(1)
    keys = [OutputKey(f"roi_head.bbox_head.{i}", 0, (0,)) for i in range(num_stages)]
    raw = {key: torch.randn(8, 4, requires_grad=True) for key in keys}
    score = torch.stack(list(raw.values())).mean(dim=0).softmax(dim=-1)[5, 1]
    (anchor,) = located(score[None], [1], raw)
    return raw, anchor, float(score)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_softmax_link(num_stages):
    raw, anchor, score = softmax_anchor(num_stages)
    assert anchor.cell is None
    assert class_logits(anchor) == [(key, (5, 1)) for key in raw]
    with pytest.raises(VisError, match="no score for class 9"):
        class_logits(anchor, 9)
    link = score_link(anchor, score)
    changed = [
        torch.stack([entries.values, entries.values + torch.tensor([0, 1.0, 0, 0])])
        for entries in anchor.entries
    ]
    mean = torch.stack([raw[key][5] for key in raw]).mean(dim=0)
    expected = [mean.softmax(0)[1], (mean + torch.tensor([0, 1.0, 0, 0])).softmax(0)[1]]
    assert link(changed).tolist() == pytest.approx([float(e) for e in expected])


def test_sides_of_rotated_boxes_are_those_of_the_upright_ones():
    boxes = torch.tensor([[0.0] * 5, [50, 40, 20, 10, 0.5]], requires_grad=True)
    found = InstanceData(bboxes=boxes, scores=torch.ones(2), labels=torch.zeros(2))
    meta = dict(ori_shape=(64, 80), img_shape=(32, 40), scale_factor=(0.5, 0.5))
    graph = PredictionGraph(torch.zeros(1, 3, 32, 40), meta, predictions=found)
    sides = ChosenBoxes(graph, [1], "Rotated").boxes_xyxy
    cos, sin = math.cos(0.5), math.sin(0.5)
    assert sides[0, 0].item() == pytest.approx(50 - 10 * cos - 5 * sin)
    (slope,) = torch.autograd.grad(sides[0, 0], boxes)
    expected = [1, 0, -cos / 2, -sin / 2, 10 * sin - 5 * cos]
    assert slope[1].tolist() == pytest.approx(expected)
    assert graph.network_boxes()[1] == pytest.approx(sides[0].detach().numpy() / 2)


@pytest.mark.parametrize(
    ("shape", "axis", "place"),
    [
        ((1, 8, 4, 5), 1, (0, 5, 2, 3)),  # two anchors of three classes and another
        ((1, 1, 30, 4), 3, (0, 0, 23, 1)),  # of queries
        ((6, 1, 30, 4), 3, (5, 0, 23, 1)),
    ],
)
@pytest.mark.parametrize("softmax", [True, False])
def test_other_classes_of_maps_and_of_queries(shape, axis, place, softmax):
    torch.manual_seed(0)
    raw = {CLS: torch.randn(shape, requires_grad=True)}
    classes = raw[CLS].unflatten(axis, (-1, 4))
    scores = classes.softmax(axis + 1) if softmax else classes.sigmoid()
    score = scores.flatten(axis, axis + 1)[place]
    (anchor,) = located(score[None], [1], raw)
    assert anchor.cell == ((2, 3) if axis == 1 else None)
    assert class_logits(anchor) == [(CLS, place)]
    other = [p + (n == axis) for n, p in enumerate(place)]
    assert class_logits(anchor, 2) == [(CLS, tuple(other))]
    link = score_link(anchor, float(score))
    values = [entries.values[None] for entries in anchor.entries]
    assert float(link(values)) == pytest.approx(float(score), rel=1e-5)


def test_product_and_root_links(raw):
    product = scores_at(raw, [(2, 1, 3)])
    for score in (product, product.sqrt(), raw[CLS].sigmoid()[0, 2, 1, 3][None]):
        (anchor,) = located(score, [2], raw)
        link = score_link(anchor, float(score))
        values = [entries.values[None] for entries in anchor.entries]
        assert float(link(values)) == pytest.approx(float(score), rel=1e-5)
        lower = [torch.zeros_like(v) for v in values]
        half = 0.5 ** len(values)
        assert float(link(lower)) == pytest.approx(
            half if not torch.equal(score, product.sqrt()) else half**0.5
        )


def test_an_unknown_way_to_make_scores_is_not_guessed(raw):
    score = (raw[CLS][0, 2, 1, 3].sigmoid() ** 3)[None]
    (anchor,) = located(score, [2], raw)
    assert score_link(anchor, float(score)) is None
