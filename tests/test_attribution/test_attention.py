"""Cross-attention of decoders against what their own operations give."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mmcv.ops.multi_scale_deform_attn as deformable
import numpy as np
import pytest
import torch
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import nn

from mmyolo_vis_hooks.attribution.attention import (
    DecoderAttention,
    DenseAttention,
    SampledAttention,
)
from mmyolo_vis_hooks.errors import VisConfigError
from tests.families import Family, build_family, plain_predict
from tests.test_attribution.helpers import explain


def test_places_between_cells_give_their_weight_to_all_four():
    """Two heads and one query on a map of 2 x 4; the second head looks outside too."""
    # Half a cell is 1/8 of the width and 1/4 of the height.
    places = torch.tensor(
        [
            [[[[3 / 8, 1 / 4], [4 / 8, 2 / 4]]], [[[7 / 8, 3 / 4], [1.0, 3 / 4]]]],
        ]
    )
    weights = torch.tensor([[[[0.6, 0.4]], [[0.5, 0.5]]]])
    looked = SampledAttention(places, weights, [(2, 4)])
    (own,) = looked.maps([0], (16, 32))
    expected = [
        [0.0, 0.3 + 0.05, 0.05, 0.0],
        [0.0, 0.05, 0.05, 0.25 + 0.125],  # half of the last one lies outside
    ]
    np.testing.assert_allclose(own[0].numpy(), expected, atol=1e-6)
    points = looked.points([0], (16, 32))[0]
    expected_points = [
        (12, 4, 0.3), (16, 8, 0.2), (28, 12, 0.25), (32, 12, 0.25)
    ]  # fmt: skip
    np.testing.assert_allclose(points.numpy(), expected_points, atol=1e-5)


def test_cells_are_folded_row_by_row():
    weights = torch.arange(16.0).reshape(2, 8)
    (own,) = DenseAttention(weights).maps([1], (16, 32))
    assert own.tolist() == [[[8, 9, 10, 11], [12, 13, 14, 15]]]


def query_and_plain(family: Family) -> tuple[list[int], Any]:
    """Which queries gave the best three scores, by their values."""
    raw: list[torch.Tensor] = []
    head = family.detector.bbox_head
    with head.register_forward_hook(lambda m, a, out: raw.append(out[0])):
        plain = plain_predict(family)
    scores = raw[0][-1, 0]
    own = scores.softmax(-1) if family.name == "detr" else scores.sigmoid()
    queries = []
    for score, label in zip(plain.scores[:3], plain.labels[:3]):
        (query,) = (own[:, label] - score).abs().lt(1e-6).nonzero().flatten().tolist()
        queries.append(query)
    return queries, plain


def test_the_map_of_detr_is_that_of_its_queries_and_keys():
    family = build_family("detr")
    queries, plain = query_and_plain(family)
    layers = [layer.cross_attn.attn for layer in family.detector.decoder.layers]
    weights = []

    def keep(module: Any, args: Any, kwargs: dict) -> None:
        """Softmax of scaled products, head by head."""
        q, k = module.in_proj_weight.chunk(3)[:2]
        q_bias, k_bias = module.in_proj_bias.chunk(3)[:2]
        query = (kwargs["query"] @ q.T + q_bias).squeeze()
        key = (kwargs["key"] @ k.T + k_bias).squeeze()
        size = module.head_dim
        heads = [
            (query[:, s : s + size] @ key[:, s : s + size].T / size**0.5).softmax(-1)
            for s in range(0, query.shape[1], size)
        ]
        weights.append(torch.stack(heads).mean(0))

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in layers]
    try:
        plain_predict(family)
    finally:
        for handle in handles:
            handle.remove()
    mean = torch.stack(weights).mean(0)
    predictions, explanations = explain(family, method="attention")
    assert torch.equal(predictions.scores, plain.scores)
    for query, own in zip(queries, explanations):
        (found,) = own.maps
        assert (found.layer, own.points) == ("decoder attention", None)
        expected = mean[query].reshape(found.saliency.shape)
        np.testing.assert_allclose(found.saliency, expected.numpy(), atol=1e-6)
        assert found.saliency.max() > 1.2 * found.saliency.min()


@pytest.mark.parametrize("name", ["deformable_detr", "dino"])
def test_maps_and_points_are_those_of_the_operation_itself(name):
    """A value that is one at a single cell is given back as the weight of the cell."""
    family = build_family(name)
    queries, plain = query_and_plain(family)
    given: list[tuple] = []
    operation = deformable.multi_scale_deformable_attn_pytorch

    def spy(value: Any, shapes: Any, places: Any, weights: Any) -> Any:
        given.append((shapes, places, weights))
        return operation(value, shapes, places, weights)

    with mock.patch.object(deformable, "multi_scale_deformable_attn_pytorch", spy):
        plain_predict(family)
    of_decoder = given[-len(family.detector.decoder.layers) :]
    of_tokens = []
    for shapes, places, weights in of_decoder:
        count, heads = int(shapes.prod(1).sum()), weights.shape[2]
        ones = torch.eye(count)[None, :, None].expand(1, -1, heads, -1).contiguous()
        places, weights = places[:, queries], weights[:, queries]
        out = operation(ones, shapes, places, weights)
        of_tokens.append(out[0].reshape(len(queries), heads, count).mean(1))
    mean = torch.stack(of_tokens).mean(0)

    predictions, explanations = explain(family, method="attention")
    assert torch.equal(predictions.scores, plain.scores)
    sizes = [(16, 20), (8, 10), (4, 5), (2, 3)]
    for number, own in enumerate(explanations):
        maps = {m.layer: m.saliency for m in own.maps}
        assert list(maps) == [f"decoder attention[{n}]" for n in range(4)]
        start = 0
        for (h, w), saliency in zip(sizes, maps.values()):
            expected = mean[number, start : start + h * w].reshape(h, w) * (h * w / 320)
            np.testing.assert_allclose(saliency, expected.numpy(), atol=1e-6)
            start += h * w
        places = [p[0, queries[number]].transpose(0, 1) for _, p, _ in of_decoder]
        given_weights = [w[0, queries[number]] for _, _, w in of_decoder]
        by_level = own.points.reshape(len(of_decoder), -1, 4, places[0].shape[2], 3)
        for layer, weights in enumerate(given_weights):
            heads = len(weights)
            np.testing.assert_allclose(
                by_level[layer, ..., 2],
                weights.numpy() / heads / len(of_decoder),
                atol=1e-6,
            )
            # The finest level has cells of 8 pixels.
            finest = places[layer][0] * torch.tensor([20.0, 16.0]) * 8
            np.testing.assert_allclose(
                by_level[layer, :, 0, :, :2], finest.numpy(), atol=1e-3
            )
        assert own.points[:, 2].sum() == pytest.approx(1, abs=1e-5)


def test_the_weights_of_conditional_attention():
    torch.manual_seed(0)
    module = ConditionalAttention(8, 2, cross_attn=True).eval()
    kept = []
    forward = module.forward_attn
    module.forward_attn = lambda *a, **k: kept.append(forward(*a, **k)) or kept[-1]
    layer = nn.Module()
    layer.cross_attn = module
    detector = nn.Module()
    detector.decoder = nn.Module()
    detector.decoder.layers = nn.ModuleList([layer])
    query, key = torch.randn(1, 3, 8), torch.randn(1, 8, 8)
    with DecoderAttention(detector).recorded() as layers, torch.no_grad():
        module(query, key, query_pos=query, key_pos=key, ref_sine_embed=query)
    assert torch.allclose(layers[0].weights, kept[0][1][0], atol=1e-6)
    assert layers[0].weights.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert not module.attn_drop._forward_hooks


def test_detectors_without_a_decoder_and_options_without_a_meaning():
    with pytest.raises(VisConfigError, match="'attention' cannot work with Fast"):
        explain(build_family("faster_rcnn"), method="attention")
    odd = SimpleNamespace(decoder=SimpleNamespace(layers=[SimpleNamespace()]))
    with pytest.raises(VisConfigError, match="follows the query"):
        DecoderAttention(odd)
    for option in ({"target": "logit"}, {"aug_smooth": True}, {"layers": ["neck"]}):
        with pytest.raises(VisConfigError, match="cannot work with method='attention'"):
            explain(build_family("detr"), method="attention", **copy.deepcopy(option))
