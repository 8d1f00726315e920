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
    with _preserved(_modules_of(model)):
        yield


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block whose forwards leave no trace: eval mode, parameters in no graph.

    Modes, buffers, ``requires_grad``, ``.grad`` and random states are afterwards as
    they were. Gradients of activations can be computed inside, also where the
    surroundings forbid gradients.

    Args:
        model (nn.Module): The detector, without wrappers.
    """
    modules = _modules_of(model)
    with (
        torch.inference_mode(False),
        preserve_rng_state(),
        _preserved(modules),
    ):
        if any(module.training for module in modules):
            model.eval()
        for parameter in _parameters_of(modules):
            if parameter.requires_grad:
                parameter.requires_grad = False
        yield


# With hundreds of modules, walking and setting in the ways that torch offers takes a
# fifth of the time of a small detector's forward.


def _modules_of(model: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [
                child for child in module._modules.values() if child is not None
            ]
    return list(found.values())


def _parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [
        parameter
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]


@contextlib.contextmanager
def _preserved(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = [module.training for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in _parameters_of(modules)]
    with torch.no_grad():
        buffers = [
            (buffer, buffer.clone())
            for module in modules
            for buffer in module._buffers.values()
            if buffer is not None
        ]
    try:
        yield
    finally:
        for module, training in zip(modules, modes):
            if module.training != training:
                module.training = training
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad = requires_grad
            if parameter.grad is not grad:
                parameter.grad = grad
        with torch.no_grad():
            # Writing equal values too would break graphs that still hold the buffer.
            for buffer, value in _changed(buffers):
                buffer.copy_(value)


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
