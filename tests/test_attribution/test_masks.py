"""The target ``'mask'``: what spoke for the outline of an instance."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData

from mmyolo_vis_hooks.attribution.targets import TARGETS, ChosenBoxes
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.network.graph import PredictionGraph
from tests.families import Family, _repaired_graph, build_family, plain_predict
from tests.test_attribution.helpers import agrees, explain, layercam, most_influential


def chosen(logits: torch.Tensor, image_hw: tuple[int, int], *labels: int) -> Any:
    final = InstanceData(
        scores=torch.ones(len(labels)),
        labels=torch.tensor(labels),
        masks=torch.zeros(len(labels), *image_hw, dtype=torch.bool),
    )
    graph = PredictionGraph(torch.zeros(1, 3, 8, 8), predictions=final)
    graph.squashed += [torch.zeros(1, 9, 3, 3), logits]
    return ChosenBoxes(graph, list(range(len(labels))), "Toy")


def test_the_mean_of_what_is_positive():
    """Of two instances and two classes; the class of each counts."""
    logits = torch.tensor(
        [
            [[[9.0, 9.0], [9.0, 9.0]], [[1.0, 3.0], [-2.0, -4.0]]],
            [[[-1.0, 6.0], [-1.0, -1.0]], [[9.0, 9.0], [9.0, 9.0]]],
        ]
    )
    means = TARGETS["mask"].function(chosen(logits, (5, 7), 1, 0))
    assert means.tolist() == [2.0, 6.0]
    agnostic = logits[:, :1]
    means = TARGETS["mask"].function(chosen(agnostic, (5, 7), 1, 0))
    assert means.tolist() == [9.0, 6.0]
    on_image = torch.tensor([[[[1.0, -1.0]], [[-3.0, -5.0]]]])
    means = TARGETS["mask"].function(chosen(on_image, (1, 2), 1, 0))
    assert means.tolist() == [1.0, 0.0]  # the second mask is empty
    with pytest.raises(VisError, match="raw scores of the masks of Toy"):
        TARGETS["mask"].function(chosen(torch.zeros(7, 2, 2, 2), (5, 7), 1, 0))


def reference(family: Family, count: int) -> list[list[tuple]]:
    """Maps of the neck with gradients, by plain autograd of spied logits."""
    levels: list[torch.Tensor] = []
    spied: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> Any:
        levels.extend(tensor.clone() for tensor in output)
        return tuple(tensor.clone() for tensor in levels)

    detector: Any = family.detector
    interpolate = F.interpolate

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        spied.append(interpolate(*args, **kwargs))
        return spied[-1]

    inputs = family.inputs.clone().requires_grad_(True)
    with ExitStack() as stack:
        stack.enter_context(_repaired_graph(family))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(detector.neck.register_forward_hook(keep))
        if family.name == "mask_rcnn":
            head = detector.roi_head.mask_head
            hook = lambda m, a, output: spied.append(output)  # noqa: E731
            stack.enter_context(head.register_forward_hook(hook))
        else:
            stack.enter_context(mock.patch.object(F, "interpolate", spy))
        samples = copy.deepcopy(family.data_samples)
        final = detector.predict(inputs, samples, rescale=True)[0].pred_instances
    maps = []
    for k in range(count):
        if family.name == "mask_rcnn":
            logits = spied[-1][k, int(final.labels[k])]
            inside = logits > 0
        else:
            height, width = final.masks.shape[1:]
            logits = spied[-1][0, k, :height, :width]
            inside = final.masks[k]
        found = torch.autograd.grad(
            logits[inside].mean(), levels, retain_graph=True, allow_unused=True
        )
        pairs = zip(levels, found)
        maps.append([(a[0].detach(), g[0]) for a, g in pairs if g is not None])
    return maps


@pytest.mark.parametrize("name", ["mask_rcnn", "rtmdet_ins"])
def test_the_map_of_a_mask_is_that_of_plain_autograd(name):
    family = build_family(name)
    _, explanations = explain(family, target="mask", topk=3)
    _, of_scores = explain(family, topk=3)
    empty = [not mask.any() for mask in plain_predict(family).masks[:3]]
    assert sum(empty) == (name == "rtmdet_ins")
    for own, score, maps, is_empty in zip(
        explanations, of_scores, reference(family, 3), empty
    ):
        if is_empty:
            assert "its mask is empty" in own.warning
            continue
        (found,) = own.maps
        expected = layercam(*most_influential(maps))
        assert expected.max() > 0
        assert agrees(found.saliency, expected)
        if found.saliency.shape == score.maps[0].saliency.shape:
            assert not agrees(found.saliency, score.maps[0].saliency)


def test_a_detector_without_masks_says_so():
    with pytest.raises(VisConfigError, match="target='mask' cannot work with Faster"):
        explain(build_family("faster_rcnn"), target="mask")
    with pytest.raises(VisConfigError, match="it compares scores"):
        explain(build_family("mask_rcnn"), target="mask", method="ablationcam")
