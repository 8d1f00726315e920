"""Leaves a model and the random generators as they were found."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's generators on exit."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    # Asking for the state of a device that nobody used would initialise it.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def preserve_model_state(model: nn.Module) -> Iterator[None]:
    """Restore modes, buffers, ``requires_grad`` and ``.grad`` on exit.

    Args:
        model (nn.Module): Any module; its parameters' values are not copied,
            since nothing here writes to them.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad = requires_grad
            parameter.grad = grad
        with torch.no_grad():
            # Writing equal values too would break graphs that still hold the buffer.
            for buffer, value in _changed(buffers):
                buffer.copy_(value)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block whose forwards leave no trace: eval mode, parameters in no graph.

    Modes, buffers, ``requires_grad``, ``.grad`` and random states are afterwards as
    they were. Gradients of activations can be computed inside, also where the
    surroundings forbid gradients.

    Args:
        model (nn.Module): The detector, without wrappers.
    """
    with (
        torch.inference_mode(False),
        preserve_rng_state(),
        preserve_model_state(model),
    ):
        model.eval()
        model.requires_grad_(False)
        yield


def _changed(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs that differ; one synchronisation per device, not one per pair."""
    changed = [p for p in pairs if p[0].is_cpu and not torch.equal(*p)]
    elsewhere: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pair in pairs:
        if not pair[0].is_cpu:
            elsewhere.setdefault(pair[0].device, []).append(pair)
    for group in elsewhere.values():
        flags = torch.stack([(new != old).any() for new, old in group]).tolist()
        changed += [pair for pair, flag in zip(group, flags) if flag]
    return changed
