from __future__ import annotations

import random
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.network.layer_table import LayerNode, survey_layers
from mmyolo_vis_hooks.network.recorder import LayerRecorder
from tests.families import build_family

NETWORK_HW = (8, 12)


class Give(nn.Module):
    """Gives what the detector hands it, nested as it likes."""

    def forward(self, *outputs):
        return outputs[0] if len(outputs) == 1 else outputs


class Tied(nn.Module):
    """Two convolutions with one weight of 36 numbers, and a bias of 4 each."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(3, 4, 3, padding=1)
        self.one.weight = nn.Parameter(torch.zeros(4, 3, 1, 3))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.one(x)


class CalledList(nn.ModuleList):
    def forward(self, x):
        return self[0](x)


class Unreadable(dict):
    def items(self):
        raise RuntimeError("no items")


class Net(nn.Module):
    """Each layer's output is known by hand, for an input of 8 x 12 pixels."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.alias = self.pool
        self.inplace = nn.ReLU(inplace=True)
        self.uneven = nn.AdaptiveAvgPool2d((3, 5))
        self.tied = Tied()
        self.norm = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
        self.levels = nn.ModuleList([nn.MaxPool2d(2), nn.MaxPool2d(4)])
        self.branches = nn.ModuleDict({"p3": nn.Identity(), "p4": nn.Identity()})
        self.shared_items = nn.ModuleList([self.levels[1], self.levels[1]])
        self.nested_list = nn.ModuleList([nn.ModuleList([nn.Identity()])])
        self.called_list = CalledList([nn.MaxPool2d(8)])
        self.half_run = nn.ModuleList([nn.Identity(), nn.Tanh()])
        self.no_items = nn.ModuleList([nn.ModuleList()])
        self.unused = nn.Identity()
        self.odd_names = nn.ModuleDict({"a-b": nn.Identity(), "7": nn.Identity()})
        self.reversed = nn.Sequential()
        self.reversed.add_module("1", nn.Identity())
        self.reversed.add_module("0", nn.Identity())
        for name in GIVEN:
            self.add_module(name, Give())
        self.error = None

    def forward(self, inputs, data_samples=None, mode="tensor"):
        assert mode == "predict"
        assert data_samples[0].img_shape == NETWORK_HW
        self.pool(self.pool(inputs))
        self.inplace(self.pool(inputs))
        self.uneven(inputs)
        self.tied(inputs)
        self.norm(inputs)
        for layer in [*self.levels, *self.branches.values(), *self.odd_names.values()]:
            layer(inputs)
        self.nested_list[0][0](inputs)
        self.called_list(inputs)
        self.half_run[0](inputs)
        self.reversed(inputs)
        for name, outputs in GIVEN.items():
            getattr(self, name)(*outputs)
        random.random(), np.random.rand(), torch.rand(1)
        if self.error is not None:
            raise self.error
        return data_samples


def zeros(*shape):
    return torch.zeros(shape)


# Tokens over 8 x 12 pixels: 4 x 6 = 24 at stride 2, 2 x 3 = 6 at stride 4.
GIVEN = {
    "dicts": ({"p3": zeros(1, 4, 4, 6), "deep": [zeros(1, 2, 2, 3), "text", None]},),
    "tokens": (zeros(1, 24, 5),),
    "class_token": (zeros(1, 1 + 6, 5),),
    "pyramid": (zeros(1, 24 + 6, 5), zeros(1, 7, 1, 1)),
    "vector": (zeros(1, 9),),
    "integers": (torch.zeros(1, 3, 4, 6, dtype=torch.int64),),
    "rois": (zeros(7, 3, 2, 2),),
    "queries": (zeros(1, 100, 5),),
    "volume": (zeros(1, 3, 2, 4, 6),),
    "empty": (zeros(1, 0, 4, 6),),
    "unreadable": (Unreadable(),),
}

UNTARGETABLE = {
    "": "is the detector itself",
    "tied.two": "does not run",
    "half_run": "item [1] does not run",
    "half_run[1]": "does not run",
    "no_items": "has no items",
    "no_items[0]": "has no items",
    "unused": "does not run",
    "odd_names.a-b": "has a name that no path can spell",
    "reversed[1]": "has a name that no path can spell",
    "reversed[0]": "has a name that no path can spell",
    "vector": "gives no map",
    "integers": "gives no map",
    "rois": "gives (7, 3, 2, 2) for one image",
    "queries": "gives 100 tokens that fit no grid",
    "volume": "gives (1, 3, 2, 4, 6), which is no map",
    "empty": "gives an empty map",
    "unreadable": "gives what cannot be read (no items)",
}


def survey(net: nn.Module) -> dict[str, LayerNode]:
    metainfo = {"img_shape": NETWORK_HW}
    root = survey_layers(net, zeros(1, 3, *NETWORK_HW), metainfo)
    return {node.path: node for node in root.walk()}


@pytest.fixture(scope="module")
def nodes() -> dict[str, LayerNode]:
    return survey(Net())


def shapes(node: LayerNode) -> list[tuple[int, int, int]]:
    return [output.shape for output in node.outputs]


class TestOutputs:
    def test_every_call_of_a_shared_layer(self, nodes):
        pool = nodes["pool"]
        assert pool.num_calls == 3
        assert shapes(pool) == [(3, 4, 6), (3, 2, 3), (3, 4, 6)]
        assert [output.stride_hw for output in pool.outputs] == [(2, 2), (4, 4), (2, 2)]
        assert [output.call_index for output in pool.outputs] == [0, 1, 2]
        assert "alias" not in nodes  # the same module as `pool`

    def test_in_place_layer(self, nodes):
        assert shapes(nodes["inplace"]) == [(3, 4, 6)]

    def test_strides_that_are_not_square(self, nodes):
        (output,) = nodes["uneven"].outputs
        assert output.shape == (3, 3, 5)
        assert output.stride_hw == pytest.approx((8 / 3, 12 / 5))

    def test_nested_output(self, nodes):
        outputs = nodes["dicts"].outputs
        assert [(o.index, o.shape) for o in outputs] == [
            (("p3",), (4, 4, 6)),
            (("deep", 0), (2, 2, 3)),
        ]
        assert [o.num_tokens for o in outputs] == [None, None]

    def test_tokens_are_folded(self, nodes):
        (output,) = nodes["tokens"].outputs
        assert (output.index, output.shape) == ((), (5, 4, 6))
        assert (output.stride_hw, output.num_tokens) == ((2, 2), 24)
        (output,) = nodes["class_token"].outputs
        assert (output.shape, output.num_tokens) == ((5, 2, 3), 7)

    def test_levels_in_one_sequence(self, nodes):
        outputs = nodes["pyramid"].outputs
        assert [(o.index, o.shape, o.num_tokens) for o in outputs] == [
            ((0, 0), (5, 4, 6), 30),
            ((0, 1), (5, 2, 3), 30),
            ((1,), (7, 1, 1), None),
        ]

    def test_containers_have_the_maps_of_their_items(self, nodes):
        levels = nodes["levels"]
        assert levels.targetable
        assert levels.gives_items
        assert levels.num_calls == 0
        assert [(o.layer, o.shape) for o in levels.outputs] == [
            ("levels[0]", (3, 4, 6)),
            ("levels[1]", (3, 2, 3)),
        ]
        assert [o.layer for o in nodes["branches"].outputs] == [
            "branches.p3",
            "branches.p4",
        ]
        # Its own maps are never drawn, although it runs.
        called = nodes["called_list"]
        assert called.num_calls == 1
        assert [o.layer for o in called.outputs] == ["called_list[0]"]
        assert not nodes["levels[0]"].gives_items

    def test_container_of_layers_that_are_listed_elsewhere(self, nodes):
        node = nodes["shared_items"]
        assert [o.layer for o in node.outputs] == ["shared_items[0]", "shared_items[1]"]
        assert shapes(node) == [(3, 2, 3)] * 2
        assert node.children == ()

    def test_reasons(self, nodes):
        found = {p: n.why_not for p, n in nodes.items() if not n.targetable}
        assert found == UNTARGETABLE
        assert all(nodes[path].outputs == () for path in found)


class TestTree:
    def test_order_and_paths(self, nodes):
        root = nodes[""]
        names = [name for name, _ in Net().named_modules()]
        assert len(nodes) == len(names)
        spelled = [path.replace("[", ".").replace("]", "") for path in nodes]
        assert spelled == names
        assert root.type_name == "Net"
        assert root.network_hw == NETWORK_HW
        assert [child.path for child in nodes["levels"].children] == [
            "levels[0]",
            "levels[1]",
        ]

    def test_shared_parameters_count_once(self, nodes):
        assert nodes["tied.one"].num_parameters == 36 + 4
        assert nodes["tied"].num_parameters == 36 + 4 + 4
        assert nodes["norm"].num_parameters == 6
        assert nodes[""].num_parameters == 36 + 4 + 4 + 6
        assert nodes["pool"].num_parameters == 0

    def test_agrees_with_the_recorder(self, nodes):
        net = Net().eval()
        sample = DetDataSample(metainfo={"img_shape": NETWORK_HW})
        assert_agreement(net, zeros(1, 3, *NETWORK_HW), [sample], nodes[""])


class TestNothingChanges:
    def state(self, net):
        return (
            [module.training for module in net.modules()],
            [buffer.clone() for buffer in net.buffers()],
            [(p.clone(), p.requires_grad, p.grad) for p in net.parameters()],
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_modes_buffers_randomness_and_hooks(self, error):
        net = Net().train()
        net.norm[1].eval()
        net.tied.one.bias.requires_grad = False
        net.error = error
        before = self.state(net)
        if error is None:
            survey(net)
        else:
            with pytest.raises(error):
                survey(net)
        torch.testing.assert_close(self.state(net), before, rtol=0, atol=0)
        assert hooks_left(net) == 0

    def test_hooks_that_cannot_all_be_registered(self, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        net = Net()
        monkeypatch.setattr(net.unused, "register_forward_hook", interrupted)
        with pytest.raises(KeyboardInterrupt):
            survey(net)
        assert hooks_left(net) == 0

    def test_runs_in_eval_mode_without_gradients(self):
        net = Net().train()
        seen = []
        net.pool.register_forward_hook(
            lambda module, args, output: seen.append(
                (module.training, torch.is_grad_enabled())
            )
        )
        survey(net)
        assert set(seen) == {(False, False)}


@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 3, 8, 12)])
def test_inputs_of_another_shape(shape):
    with pytest.raises(VisConfigError, match=r"inputs has the shape .*\(1, 3, H, W\)"):
        survey_layers(Net(), zeros(*shape), {})


@pytest.mark.parametrize(
    "name", ["yolov5", "yolox", "retinanet", "detr", "faster_rcnn"]
)
def test_real_detectors(name):
    family = build_family(name)
    metainfo = family.data_samples[0].metainfo
    root = survey_layers(family.detector, family.inputs, metainfo)
    assert hooks_left(family.detector) == 0
    named = dict(family.detector.named_modules())
    assert len(list(root.walk())) == len(named)
    nodes = {node.path: node for node in root.walk()}
    assert nodes["backbone"].targetable
    assert nodes["neck"].targetable
    if name == "faster_rcnn":
        # 128 x 160 pixels; the last level is a pooled one.
        assert shapes(nodes["neck"]) == [
            (64, 32, 40),
            (64, 16, 20),
            (64, 8, 10),
            (64, 4, 5),
            (64, 2, 3),
        ]
        assert nodes["neck"].outputs[4].stride_hw == pytest.approx((64, 160 / 3))
        assert "for one image" in nodes["roi_head.bbox_roi_extractor"].why_not
        assert nodes["roi_head.bbox_head"].why_not == "gives no map"
        assert nodes["roi_head"].why_not == "does not run"
    if name == "detr":
        assert nodes["encoder"].outputs[0].shape == (256, 4, 5)
        assert nodes["encoder"].outputs[0].num_tokens == 20
        assert not nodes["decoder"].targetable
    assert_agreement(family.detector, family.inputs, family.data_samples, root)


def assert_agreement(detector, inputs, data_samples, root: LayerNode) -> None:
    """What is targetable is recorded with the same maps; the rest fails."""
    good = [node for node in root.walk() if node.targetable]
    bad = [node for node in root.walk() if node.path and not node.targetable]
    assert good
    assert bad
    layers = resolve_layers(detector, [node.path for node in good])
    samples = [DetDataSample(metainfo=sample.metainfo) for sample in data_samples]
    others = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        record = stack.enter_context(LayerRecorder(detector, layers).record([0]))
        for node in bad:
            try:
                found = resolve_layers(detector, [node.path])
            except VisConfigError:
                continue
            if node.why_not == "has a name that no path can spell":
                # The path leads to another layer, which would be drawn instead.
                name = node.path.replace("[", ".").replace("]", "")
                assert detector.get_submodule(name) not in found.values()
                continue
            recorder = LayerRecorder(detector, found)
            others[node.path] = stack.enter_context(recorder.record([0]))
        detector(inputs, samples, mode="predict")
    assert record.error is None
    recorded = {}
    for activation in record.activations(0):
        key = (activation.call_index, activation.output_index)
        shape = tuple(activation.feature_map.shape)
        recorded.setdefault(activation.layer, []).append((*key, shape))
    for node in good:
        expected = {}
        for output in node.outputs:
            key = (output.call_index, output.index)
            expected.setdefault(output.layer, []).append((*key, output.shape))
        own = resolve_layers(detector, [node.path])
        assert expected == {path: recorded[path] for path in own}
    for path, other in others.items():
        if other.error is None:
            try:
                maps = [activation.feature_map for activation in other.activations(0)]
            except FeatureShapeError:
                continue
            assert any(feature_map.numel() == 0 for feature_map in maps), path


def hooks_left(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    )
