"""Heads that make their scores in ways of their own, against plain formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.test_attribution.helpers import LOGGER, agrees, layercam

META = dict(img_shape=(32, 40), ori_shape=(32, 40), scale_factor=(1.0, 1.0))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        given = self.convs[0](maps[0]), self.convs[1](maps[0])
        return tuple(3 * (own - own.mean()) / own.std() for own in given)


class Detector(nn.Module):
    """Boxes are the best cells of the first two classes, scored by a function."""

    def __init__(self, score: Callable) -> None:
        super().__init__()
        self.neck = nn.Conv2d(3, 4, 4, 4)
        self.bbox_head = Head()
        self.beside = nn.Conv2d(4, 4, 3, padding=1)
        self.score = score

    def forward(self, inputs: Tensor, samples: Any, mode: str = "predict") -> Any:
        scores = self.score(self, self.neck(inputs))[0].flatten()
        best = scores.topk(3).indices
        rows, columns = best % 80 // 10, best % 10
        boxes = torch.stack([columns, rows, columns + 2, rows + 2], 1) * 4.0
        samples[0].pred_instances = InstanceData(
            bboxes=boxes, scores=scores[best], labels=best // 80
        )
        return samples


def product(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    return cls.sigmoid() * quality.sigmoid()


def in_place(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    scores = cls.sigmoid()
    scores *= quality.sigmoid()
    return scores


def into_views(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    views = cls.sigmoid().unbind()
    for scores, factor in zip(views, quality.sigmoid()):
        scores.mul_(factor)
    return torch.stack(views)


def into_parts(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    parts = (cls.sigmoid() * quality.sigmoid()).split(2, dim=1)
    parts[1][:, :] = 0
    return torch.cat(parts, dim=1)


def root(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    scores = torch.cat([cls.sigmoid(), torch.zeros(1, 1, 8, 10)], dim=1)
    return (scores * quality.sigmoid()[:, :1]).sqrt()


def plain_root(own: Detector, x: Tensor) -> Tensor:
    cls, quality = own.bbox_head((x,))
    return (cls.sigmoid() * quality.sigmoid()[:, :1]).sqrt()


def copied(own: Detector, x: Tensor) -> Tensor:
    return copy.deepcopy(product(own, x))


def with_another(own: Detector, x: Tensor) -> Tensor:
    return own.bbox_head((x,))[0].sigmoid() * own.beside(x).sigmoid()


def one_after_the_other(own: Detector, x: Tensor) -> Tensor:
    first, again = own.bbox_head((x,))
    return own.bbox_head((first + again,))[0].sigmoid()


def mean_of_both(own: Detector, x: Tensor) -> Tensor:
    first, _ = own.bbox_head((x,))
    return (own.bbox_head((first,))[0] + first).sigmoid()


@pytest.mark.parametrize(
    ("score", "formula"),
    [
        (in_place, product),
        (into_views, product),
        (into_parts, lambda own, x: product(own, x)[:, :2]),
        (root, plain_root),
        (copied, product),
        (with_another, with_another),
        (one_after_the_other, one_after_the_other),
        (mean_of_both, mean_of_both),
    ],
)
def test_maps_and_boxes_are_those_of_the_formula(score, formula):
    torch.manual_seed(0)
    detector = Detector(score).eval().requires_grad_(False)
    inputs = torch.randn(1, 3, 32, 40)
    (plain,) = detector(inputs, [InstanceData()])
    x = detector.neck(inputs).requires_grad_()
    scores = formula(detector, x)[0].flatten().topk(3).values
    options = BoxAMOptions(score_thr=0.0, method="layercam")
    own = BoxAttributor(detector, options, logger=LOGGER)
    predictions, explanations = own.explain(inputs, META)
    assert torch.equal(predictions.scores, plain.pred_instances.scores)
    for explanation, value in zip(explanations, scores, strict=True):
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        expected = layercam(x[0].detach(), gradient[0])
        assert agrees(explanation.maps[0].saliency, expected)


def in_numpy(own: Detector, x: Tensor) -> Tensor:
    return torch.from_numpy(product(own, x).numpy().clip(0.1))


def test_drise_explains_what_is_scored_in_numpy():
    torch.manual_seed(0)
    detector = Detector(in_numpy).eval().requires_grad_(False)
    detector.backbone = nn.Identity()
    inputs = torch.randn(1, 3, 32, 40)

    def explained(method: str) -> Any:
        options = BoxAMOptions(score_thr=0.0, method=method, num_masks=20)
        return BoxAttributor(detector, options, logger=LOGGER).explain(inputs, META)[1]

    with pytest.raises(VisError, match=r"Detector cannot predict.*method='drise'"):
        explained("boxam")
    assert len(explained("drise")) == 3
