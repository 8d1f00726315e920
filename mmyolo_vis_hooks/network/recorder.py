"""Records what chosen layers put out during one forward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FeatureShapeError, VisError
from ..records import Activation
from .layer_path import layer_of_map, named_maps
from .maps import image_tensors, views_of
from .nested import OutputKey
from .state import is_compiled


@dataclass
class ForwardRecord:
    """What one forward of a detector left behind for the kept images.

    Attributes:
        keep: Positions of the kept images in the batch.
        names: What the user asked for, each with its layer: ``{'neck[0]': 'neck'}``.
        inputs: ``(len(keep), 3, H, W)``, the normalised and padded input.
        metainfos: Metainfo of the kept images.
        outputs: What each call of each layer gave, cut down to the kept images.
        error: The first failure while recording; the forward itself went on.
    """

    keep: tuple[int, ...]
    names: Mapping[str, str]
    inputs: torch.Tensor | None = None
    metainfos: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[OutputKey, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None

    def given(self, position: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Input ``(1, 3, H, W)`` and metainfo of the image at a position of the batch.

        Raises:
            VisError: If the recording failed, or left this image out.
        """
        slot = self._slot(position)
        assert self.inputs is not None
        inputs = self.inputs[slot : slot + 1]
        network_hw = (int(inputs.shape[-2]), int(inputs.shape[-1]))
        return inputs, {**self.metainfos[slot], "batch_input_shape": network_hw}

    def activations(self, position: int) -> tuple[Activation, ...]:
        """Feature maps of the same image, in the order of layers and calls.

        Raises:
            VisError: Also if a layer's output is no map of the image, or has not the
                map that was asked for.
        """
        slot = self._slot(position)
        assert self.inputs is not None
        network_hw = (self.inputs.shape[-2], self.inputs.shape[-1])
        views = views_of(self.outputs, network_hw)
        return tuple(
            Activation(view.title, view.activations[slot])
            for view in named_maps(self.names, views)
        )

    def _slot(self, position: int) -> int:
        if self.error is not None:
            raise self.error
        if self.inputs is None:
            raise only_flipped()
        if position not in self.keep:
            raise VisError(f"image {position} of the batch was not recorded")
        return self.keep.index(position)


class LayerRecorder:
    """Records layers of a detector while a ``with`` block runs.

    The forward hooks live exactly as long as the block, also when it is left by
    an exception or by Ctrl-C. One entry per call is kept, so modules that are
    shared or called several times lose nothing. Tensors are copied, because
    in-place operations after a layer would change them.

    Args:
        model (nn.Module): The detector itself, without wrappers. Its
            ``forward`` receives ``inputs`` and ``data_samples``.
        layers (Mapping[str, nn.Module]): Name and module of each layer.

    Example:
        >>> recorder = LayerRecorder(model, resolve_layers(model, ['neck']))
        >>> with recorder.record(keep=[0]) as record:
        >>>     model.test_step(batch)
        >>> record.activations(0)[0].feature_map.shape
        torch.Size([64, 52, 52])
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._names = {name: layer_of_map(model, name) for name in layers}
        self._layers = {self._names[name]: module for name, module in layers.items()}

    @contextlib.contextmanager
    def record(self, keep: Sequence[int]) -> Iterator[ForwardRecord]:
        """Record the chosen positions of the batch in one forward of the model.

        Of a model that is run several times, as test-time augmentation does, the
        first run with unflipped images is recorded.
        """
        record = ForwardRecord(tuple(keep), self._names)
        calls: Counter[str] = Counter()
        batch_size = 0

        @contextlib.contextmanager
        def contained() -> Iterator[None]:
            try:
                yield
            except Exception as error:
                # The forward belongs to somebody else and must go on.
                record.error = record.error or error

        def on_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal batch_size
            if record.inputs is not None or record.error is not None:
                return
            with contained():
                inputs = args[0] if args else kwargs["inputs"]
                samples: Any = args[1] if len(args) > 1 else kwargs["data_samples"]
                metainfos = [dict(samples[i].metainfo) for i in record.keep]
                if not any(metainfo.get("flip") for metainfo in metainfos):
                    record.metainfos = metainfos
                    record.inputs = _select(inputs, record.keep)
                    batch_size = len(inputs)

        def on_end(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal batch_size
            batch_size = 0

        def on_output(path: str, module: nn.Module, args: tuple, output: Any) -> None:
            with contained():
                if batch_size:
                    given = image_tensors(output, batch_size, path, calls[path])
                    for key, tensor in given.items():
                        record.outputs[key] = _select(tensor, record.keep)
                    calls[path] += 1

        with contextlib.ExitStack() as stack:
            hook = self._model.register_forward_pre_hook(on_input, with_kwargs=True)
            stack.enter_context(hook)
            stack.enter_context(self._model.register_forward_hook(on_end))
            for path, module in self._layers.items():
                hook = module.register_forward_hook(partial(on_output, path))
                stack.enter_context(hook)
            yield record
        if record.error is not None or record.inputs is None:
            return
        silent = {p: m for p, m in self._layers.items() if not calls[p]}
        if silent:
            record.error = did_not_run(self._model, silent)
        # The user's order, not the order in which the layers ran.
        order = list(self._layers)
        found = sorted(record.outputs.items(), key=lambda e: order.index(e[0].layer))
        record.outputs = dict(found)


def did_not_run(model: nn.Module, layers: Mapping[str, nn.Module]) -> FeatureShapeError:
    """The error that says why layers gave nothing while a detector predicted."""
    parts = set(model.modules())
    if any(module not in parts for module in layers.values()):
        reason = (
            "is no part of the detector any more: its block was fused into one "
            "convolution (SwitchToDeployHook, --deploy); name the block, or do not fuse"
        )
    elif is_compiled(model):
        reason = (
            "ran in compiled code, which calls no hooks, or not at all: leave out "
            "torch.compile while you look at layers"
        )
    else:
        reason = (
            "did not run when the detector predicted; choose a layer that takes part "
            "in inference"
        )
    return FeatureShapeError(f"target_layers: {', '.join(layers)} {reason}")


def only_flipped() -> VisError:
    """The error of a detector that saw an image mirrored alone."""
    return VisError(
        "the detector did not run on an unflipped image; take flips out of the test "
        "pipeline, or leave them to test-time augmentation"
    )


def _select(tensor: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    # Indexing with a list copies, so later in-place operations do not show.
    return tensor.detach()[list(keep)]
