from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from mmyolo_vis_hooks.network.layer_path import resolve_layer
from mmyolo_vis_hooks.network.state import (
    frozen,
)


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_frozen_model_is_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    model[0].weight.requires_grad = False
    mean = model[1].running_mean.clone()
    random_state = torch.get_rng_state()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        model.train()
        model(torch.randn(2, 3, 4, 4))
        assert not torch.equal(model[1].running_mean, mean)
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, False, True]
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert torch.equal(model[1].running_mean, mean)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random_state)


class KeepsPoints(nn.Module):
    """As heads of MMYOLO do, in the dtype of the first forward of a size."""

    size = None

    def forward(self, x):
        if self.size != x.shape:
            self.size, self.points = x.shape, torch.full((), 1e-4, dtype=x.dtype)
        return x + self.points


def test_what_a_module_keeps_of_a_frozen_forward_is_forgotten():
    model = nn.Sequential(KeepsPoints())
    half = torch.zeros(2, dtype=torch.bfloat16)
    with frozen(model):
        assert model(half.float()).dtype == torch.float32
    assert model(half).dtype == torch.bfloat16
    with frozen(model):
        model(torch.zeros(3))
    assert model[0].size == half.shape
    assert model[0].points.dtype == torch.bfloat16


class Pair(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body = wrap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.body(x))


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def compiled_method(module):
    # As MMEngine does it.
    module.forward = compiled(module.forward)
    return module


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_method])
def test_what_is_compiled_runs_plainly_in_a_frozen_block(wrap):
    model = Pair(wrap).eval()
    inputs = torch.ones(1, 3, 2, 2)
    with torch.no_grad():
        expected = model(inputs)
        before = [dict(vars(module)) for module in model.modules()]
        with frozen(model):
            seen = []
            layer = resolve_layer(model, "body[1]")
            handle = layer.register_forward_hook(lambda *given: seen.append(given))
            assert torch.equal(model(inputs), expected)
            handle.remove()
            assert len(seen) == 1
        for module, own in zip(model.modules(), before):
            assert {k: v for k, v in vars(module).items() if k in own} == own
