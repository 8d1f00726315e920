from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import nn

from mmyolo_vis_hooks.network.state import (
    preserve_model_state,
    preserve_rng_state,
)


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_random_generators_continue_as_if_nothing_happened():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    found = [draw()]
    with contextlib.suppress(RuntimeError), preserve_rng_state():
        draw()
        raise RuntimeError
    found.append(draw())
    assert found == expected


def test_model_is_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].eval()
    model[0].weight.requires_grad = False
    grad = model[0].bias.grad = torch.ones(4)
    mean = model[1].running_mean.clone()
    with contextlib.suppress(RuntimeError), preserve_model_state(model):
        model.train()
        model.requires_grad_(True)
        model(torch.randn(2, 3, 4, 4)).sum().backward()
        assert not torch.equal(model[1].running_mean, mean)
        raise RuntimeError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert model[0].bias.grad is grad
    assert torch.equal(model[1].running_mean, mean)
    assert model[1].num_batches_tracked == 0
