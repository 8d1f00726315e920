from __future__ import annotations

import pytest
from torch import nn

from mmyolo_vis_hooks.errors import (
    LayerNotFoundError,
    VisConfigError,
)
from mmyolo_vis_hooks.network.layer_path import (
    layer_of_map,
    parse_layer_path,
    resolve_layer,
    resolve_layers,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stage4 = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
        self.neck = nn.Module()
        self.neck.out_layers = nn.ModuleList([nn.Identity(), nn.Tanh(), nn.Sigmoid()])
        self.neck.branches = nn.ModuleDict({"p3": nn.ReLU(), "p4": nn.ReLU6()})
        self.neck.empty = nn.ModuleList()


@pytest.mark.parametrize(
    "path",
    [
        "", ".a", "a.", "a..b", "a[", "a[x]", "a[1]b", "[1]", "a b",
        "__import__('os').system('x')", "a[0]; b", None, 3,
    ],
)  # fmt: skip
def test_parse_refuses(path):
    with pytest.raises(VisConfigError, match="target_layers"):
        parse_layer_path(path)


def test_resolve_by_index_and_name():
    net = Net()
    assert resolve_layer(net, "neck.out_layers[2]") is net.neck.out_layers[2]
    assert resolve_layer(net, "neck.out_layers.1") is net.neck.out_layers[1]
    assert resolve_layer(net, "neck.out_layers[-1]") is net.neck.out_layers[2]
    assert resolve_layer(net, "backbone.stage4[1]") is net.backbone.stage4[1]
    assert resolve_layer(net, "neck.branches.p4") is net.neck.branches["p4"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("backbone.stage5", "backbone.stage4"),
        ("neck.out_layer[2]", r"neck\.out_layers\[2\]"),
        ("neck.out_layers[3]", r"neck\.out_layers\[2\]"),
        ("nekc", "neck"),
        ("neck.out_layers.\u00b2", "neck"),
        ("backbone.forward", "no layer|is no"),
    ],
)
def test_unknown_path_lists_near_matches(path, near):
    with pytest.raises(LayerNotFoundError, match=near):
        resolve_layer(Net(), path)


def test_containers_without_forward_give_their_items_in_order():
    net = Net()
    layers = resolve_layers(
        net, ["neck.branches", "neck.out_layers", "backbone.stage4"]
    )
    assert list(layers) == [
        "neck.branches.p3",
        "neck.branches.p4",
        "neck.out_layers[0]",
        "neck.out_layers[1]",
        "neck.out_layers[2]",
        "backbone.stage4",
    ]
    assert layers["neck.branches.p4"] is net.neck.branches["p4"]


def test_a_detector_inside_another_one():
    net = nn.Module()
    net.student, net.teacher = Net(), Net()
    with pytest.raises(LayerNotFoundError) as caught:
        resolve_layer(net, "backbone")
    message = str(caught.value)
    assert "near matches: student.backbone, teacher.backbone" in message
    with pytest.raises(LayerNotFoundError, match=r"student\.neck\.out_layers\[1\]"):
        resolve_layer(net, "neck.out_layers[1]")


def test_a_block_that_was_fused():
    net = Net()
    net.backbone.stage4[0].deploy = True
    with pytest.raises(LayerNotFoundError, match=r"'backbone.stage4\[0\]' was fused"):
        resolve_layer(net, "backbone.stage4[0].rbr_dense.bn")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("neck[0]", "neck"),
        ("neck.2", "neck"),
        ("neck.out_layers[1][0]", "neck.out_layers[1]"),
        ("neck.out_layers[1]", "neck.out_layers[1]"),
        ("backbone", "backbone"),
    ],
)
def test_the_caption_of_a_map_names_its_layer(path, layer):
    net = Net()
    assert layer_of_map(net, path) == layer
    assert resolve_layer(net, path) is resolve_layer(net, layer)


@pytest.mark.parametrize(
    ("caption", "remedy"),
    [
        ("stem (call 2)", "write 'stem', which"),
        ("neck.fpn[p3]", "write 'neck.fpn', which"),
        ("input of neck.out_layers[0]", "target_layers=None explains"),
    ],
)
def test_captions_that_are_no_paths_name_what_to_write(caption, remedy):
    with pytest.raises(VisConfigError, match=remedy):
        parse_layer_path(caption)
