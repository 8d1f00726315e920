from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from mmdet.structures import DetDataSample
from torch import nn

from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.network.layer_table import LayerRow, survey_layers
from mmyolo_vis_hooks.network.recorder import LayerRecorder
from tests.families import build_family
from tests.test_network.test_recorder import hooks_left

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
}

UNTARGETABLE = {
    "tied.two": "does not run",
    "half_run": "item [1] does not run",
    "half_run[1]": "does not run",
    "no_items": "has no items",
    "no_items[0]": "has no items",
    "unused": "does not run",
    "odd_names.a-b": "has a name that no path can spell",
    "reversed[1]": "has a name that no path can spell",
    "reversed[0]": "has a name that no path can spell",
    "vector": "gives no map: (1, 9)",
    "integers": "gives no map: (1, 3, 4, 6)",
    "rois": "gives no map: (7, 3, 2, 2)",
    "queries": "gives no map: (1, 100, 5)",
    "volume": "gives no map: (1, 3, 2, 4, 6)",
    "empty": "gives no map: (1, 0, 4, 6)",
}
SHAPES = {
    "pool": [(3, 4, 6), (3, 2, 3), (3, 4, 6)],  # called three times
    "inplace": [(3, 4, 6)],
    "uneven": [(3, 3, 5)],
    "dicts": [(4, 4, 6), (2, 2, 3)],
    "tokens": [(5, 4, 6)],
    "class_token": [(5, 2, 3)],
    "pyramid": [(5, 4, 6), (5, 2, 3), (7, 1, 1)],
    "levels": [(3, 4, 6), (3, 2, 3)],
    "branches": [(3, 8, 12), (3, 8, 12)],
    "called_list": [(3, 1, 1)],
    "shared_items": [(3, 2, 3), (3, 2, 3)],
}
# Shared ones count once.
PARAMETERS = {"tied.one": 36 + 4, "tied": 36 + 4 + 4, "norm": 6, "pool": 0}


def survey(net: nn.Module) -> list[LayerRow]:
    return survey_layers(net, zeros(1, 3, *NETWORK_HW), {"img_shape": NETWORK_HW})


def test_what_each_layer_gives():
    rows = survey(Net())
    assert [row.path.replace("[", ".").replace("]", "") for row in rows] == [
        name for name, _ in Net().named_modules() if name
    ]
    nodes = {row.path: row for row in rows}
    assert {p: row.why_not for p, row in nodes.items() if row.why_not} == UNTARGETABLE
    assert not any(nodes[path].shapes for path in UNTARGETABLE)
    for path, shapes in SHAPES.items():
        assert list(nodes[path].shapes) == shapes
    for path, count in PARAMETERS.items():
        assert nodes[path].num_parameters == count
    assert "alias" not in nodes  # the same module as `pool`
    assert (nodes["levels[0]"].depth, nodes["levels"].depth) == (2, 1)
    assert nodes["pool"].network_hw == NETWORK_HW


def test_modes_and_hooks_stay():
    net = Net().train()
    net.norm[1].eval()
    net.error = KeyboardInterrupt
    modes = [module.training for module in net.modules()]
    with pytest.raises(KeyboardInterrupt):
        survey(net)
    assert [module.training for module in net.modules()] == modes
    assert hooks_left(net) == 0


def test_inputs_of_another_shape():
    with pytest.raises(VisConfigError, match=r"inputs has the shape .*\(1, 3, H, W\)"):
        survey_layers(Net(), zeros(2, 3, 8, 12), {})


def test_a_real_detector():
    family = build_family("detr")
    metainfo = family.data_samples[0].metainfo
    rows = survey_layers(family.detector, family.inputs, metainfo)
    nodes = {row.path: row for row in rows}
    assert nodes["encoder"].shapes == ((256, 4, 5),)  # of 20 tokens
    assert nodes["decoder"].why_not
    assert_agreement(family.detector, family.inputs, family.data_samples, rows)


def assert_agreement(detector, inputs, data_samples, rows: list[LayerRow]) -> None:
    """What is targetable is recorded with the same maps; the rest fails."""
    good = [row for row in rows if not row.why_not]
    bad = [row for row in rows if row.why_not and "spell" not in row.why_not]
    assert good
    assert bad
    samples = [DetDataSample(metainfo=sample.metainfo) for sample in data_samples]
    records = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for row in rows:
            try:
                layers = resolve_layers(detector, [row.path])
            except VisConfigError:
                assert row.why_not
                continue
            recorder = LayerRecorder(detector, layers)
            records[row.path] = stack.enter_context(recorder.record([0]))
        detector(inputs, samples, mode="predict")
    for row in good:
        found = records[row.path].activations(0)
        assert [tuple(a.feature_map.shape) for a in found] == list(row.shapes)
    for row in bad:
        record = records.get(row.path)
        if record is None or record.error is not None:
            continue
        try:
            maps = [a.feature_map for a in record.activations(0)]
        except FeatureShapeError:
            continue
        assert any(feature_map.numel() == 0 for feature_map in maps), row.path
