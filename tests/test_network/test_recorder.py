from __future__ import annotations

import pytest
import torch
from torch import nn

from mmyolo_vis_hooks.errors import FeatureShapeError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.network.maps import views_of
from mmyolo_vis_hooks.network.nested import OutputKey
from mmyolo_vis_hooks.network.recorder import LayerRecorder


class Sample:
    def __init__(self, **metainfo):
        self.metainfo = metainfo


class Double(nn.Module):
    def forward(self, x):
        return x * 2


class Dict(nn.Module):
    def forward(self, x):
        return {"p3": x, "deep": [x + 1, (x + 2, "text", None)]}


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 3


class Net(nn.Module):
    """Each layer's output is known by hand."""

    def __init__(self):
        super().__init__()
        self.twice = Double()
        self.nested = Dict()
        self.pair = Pair()
        self.rois = nn.Identity()
        self.vector = nn.Identity()
        self.unused = nn.Identity()
        self.fails = False

    def forward(self, inputs, data_samples=None, mode="predict"):
        x = self.twice(inputs)
        x.add_(100)  # an in-place operation after the layer
        x = self.twice(x)
        self.nested(x)
        self.pair(x)
        self.rois(torch.zeros(7, 3, 2, 2))
        self.vector(torch.zeros(len(inputs), 5))
        if self.fails:
            raise KeyboardInterrupt
        return x


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )


def run(layers, keep=(0,), batch=2, flips=(False,)):
    net = Net()
    recorder = LayerRecorder(net, resolve_layers(net, layers))
    inputs = torch.arange(batch * 3 * 8 * 8, dtype=torch.float32)
    inputs = inputs.reshape(batch, 3, 8, 8)
    with recorder.record(keep) as record:
        for i, flip in enumerate(flips):
            samples = [Sample(img_id=k, view=i, flip=flip) for k in range(batch)]
            net(inputs + 1000 * i, samples)
    assert hooks_left(net) == 0
    return record, inputs


def test_keeps_the_chosen_images_only_and_every_call():
    record, inputs = run(["twice"], keep=(1,))
    first, second = record.activations(1)
    assert (first.title, second.title) == ("twice", "twice (call 2)")
    torch.testing.assert_close(first.feature_map, inputs[1] * 2)
    torch.testing.assert_close(second.feature_map, (inputs[1] * 2 + 100) * 2)
    given, metainfo = record.given(1)
    torch.testing.assert_close(given, inputs[1:])
    assert metainfo == dict(img_id=1, view=0, flip=False, batch_input_shape=(8, 8))
    with pytest.raises(VisError, match="image 0 of the batch"):
        record.given(0)


def test_nested_outputs_give_every_map_with_its_place():
    record, _ = run(["nested"])
    found = record.activations(0)
    assert [a.title for a in found] == [
        "nested[p3]",
        "nested[deep][0]",
        "nested[deep][1][0]",
    ]
    difference = found[2].feature_map - found[0].feature_map
    assert difference.unique().tolist() == [2.0]


def test_one_map_by_its_caption():
    record, _ = run(["twice", "pair[1]"])
    first, second, third = record.activations(0)
    assert [first.title, second.title, third.title] == [
        "twice",
        "twice (call 2)",
        "pair[1]",
    ]
    torch.testing.assert_close(third.feature_map, second.feature_map + 3)
    record, _ = run(["pair[2]"])
    with pytest.raises(FeatureShapeError, match=r"no map pair\[2\]; .*pair\[0\], pair"):
        record.activations(0)


def test_order_is_the_users():
    record, _ = run(["nested", "twice"])
    titles = [a.title for a in record.activations(0)]
    assert [title[:5] for title in titles] == ["neste"] * 3 + ["twice"] * 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("rois", "batch of 2"),
        ("vector", "no feature map"),
        ("unused", "did not run"),
    ],
)
def test_outputs_that_are_no_maps_are_named(layer, message):
    record, _ = run([layer])
    assert isinstance(record.error, FeatureShapeError)
    assert layer in str(record.error)
    assert message in str(record.error)


def test_first_unflipped_view_is_recorded():
    record, inputs = run(["twice"], flips=(True, False, False))
    assert record.metainfos[0]["view"] == 1
    torch.testing.assert_close(
        record.activations(0)[0].feature_map, (inputs[0] + 1000) * 2
    )
    assert len(record.activations(0)) == 2
    record, _ = run(["twice"], flips=(True,))
    with pytest.raises(VisError, match="unflipped"):
        record.activations(0)


def test_tokens_of_a_pyramid_and_a_class_token():
    # 64x96 pixels: 8x12 cells at stride 8, 4x6 at 16, 2x3 at 32.
    tokens = torch.arange(96 + 24 + 6, dtype=torch.float32)[:, None].repeat(1, 5)

    def maps(given, layer):
        views = views_of({OutputKey(layer, 0, ()): given[None]}, (64, 96))
        return [view.activations[0] for view in views]

    levels = maps(tokens, "encoder")
    assert [tuple(level.shape) for level in levels] == [
        (5, 8, 12),
        (5, 4, 6),
        (5, 2, 3),
    ]
    assert levels[1][0, 0, 0] == 96
    assert levels[2][0, 1, 2] == 96 + 24 + 5
    (single,) = maps(tokens[:25], "vit")  # 24 cells and a token
    assert single.shape == (5, 4, 6)
    assert single[0, 0, 0] == 1
    with pytest.raises(FeatureShapeError, match=r"decoder.*100 tokens"):
        maps(torch.zeros(100, 4), "decoder")


def test_a_layer_that_was_fused_away():
    net = Net()
    recorder = LayerRecorder(net, resolve_layers(net, ["unused", "twice"]))
    net.unused = nn.Identity()
    with recorder.record([0]) as record:
        net(torch.zeros(1, 3, 8, 8), [Sample()])
    with pytest.raises(FeatureShapeError, match=r"unused is no part .*SwitchToDeploy"):
        raise record.error


def test_a_layer_in_compiled_code():
    net = Net()
    net.unused = torch.compile(nn.Identity(), backend="eager")
    recorder = LayerRecorder(net, {"unused": net.unused})
    with recorder.record([0]) as record:
        net(torch.zeros(1, 3, 8, 8), [Sample()])
    with pytest.raises(FeatureShapeError, match=r"unused ran in compiled code"):
        raise record.error
