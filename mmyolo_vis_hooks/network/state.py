"""Leaves a model and the random generators as they were found."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

# In eval mode these write to none of their buffers, which are most of a detector's.
_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Its `activation_checkpointing` wraps the forwards of modules.
_CHECKPOINTING = "mmengine.runner.activation_checkpointing"


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
def frozen(model: nn.Module) -> Iterator[None]:
    """A block whose forwards leave no trace: eval mode, parameters in no graph.

    Modes, buffers, ``requires_grad``, random states and attributes of modules are
    afterwards as they were. Gradients of activations can be computed inside, also where
    the surroundings forbid gradients. Modules of MMDetection and MMEngine that throw
    their activations away and compute them again for the gradients keep them meanwhile,
    since torch allows no gradients but those of the parameters otherwise. What is under
    ``torch.compile`` runs as it was written: compiled code calls no hooks.

    Args:
        model (nn.Module): The detector, without wrappers.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    plain = () if training else _PLAIN_NORMS
    # `model.parameters()` takes several times as long.
    parameters = (p for module in modules for p in module._parameters.values())
    learned = [p for p in parameters if p is not None and p.requires_grad]
    # MMYOLO's heads keep the points of a size, in the dtype of its first forward.
    attributes = [(own, own.copy()) for own in map(vars, modules)]
    with torch.inference_mode(False), preserve_rng_state():
        buffers = [
            (buffer, buffer.clone())
            for module in modules
            if type(module) not in plain
            for buffer in module._buffers.values()
            if buffer is not None
        ]
        try:
            for own, _ in attributes:
                _run_plainly(own)
            if training:
                model.eval()
            for parameter in learned:
                parameter.requires_grad = False
            yield
        finally:
            for module in training:
                module.training = True
            for parameter in learned:
                parameter.requires_grad = True
            for own, before in attributes:
                own.update(before)
                if len(own) > len(before):
                    for name in own.keys() - before.keys():
                        del own[name]
            with torch.no_grad():
                for buffer, value in buffers:
                    # Writing equal values too would break graphs that hold the buffer.
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _run_plainly(own: dict[str, Any]) -> None:
    """Take activation checkpointing and compiled code out of a module's attributes."""
    if own.get("with_cp") is True:
        own["with_cp"] = False
    if own.get("_compiled_call_impl") is not None:
        own["_compiled_call_impl"] = None
    forward: Any = own.get("forward")
    if getattr(forward, "__globals__", {}).get("__name__") == _CHECKPOINTING:
        own["forward"] = forward.__wrapped__
    elif hasattr(forward, "_torchdynamo_orig_callable"):
        own["forward"] = forward._torchdynamo_orig_callable


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of a model is under ``torch.compile``."""
    return any(
        vars(module).get("_compiled_call_impl") is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
