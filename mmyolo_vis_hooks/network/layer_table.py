"""Surveys which layers of a detector can be targeted, and which maps they give."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import FeatureShapeError, LayerNotFoundError, VisConfigError
from .graph import prediction_of
from .layer_path import bracketed, resolve_layer, resolve_layers
from .maps import image_tensors, views_of
from .nested import flatten_tensors
from .state import frozen


@dataclass(frozen=True)
class LayerRow:
    """A layer, and what an image gets if it is targeted.

    Attributes:
        path: As users write it, ``'neck.out_layers[2]'``.
        type_name: Name of the module's class.
        depth: 1 for the detector's own children.
        num_parameters: Of the layer and all below it, shared ones counted once.
        network_hw: Height and width of the network's input, pixels.
        shapes: ``(C, h, w)`` of every map, in the order of the calls. A ``ModuleList``
            or ``ModuleDict`` has those of its items.
        why_not: Why the layer cannot be targeted, to be read after its name ('does
            not run'); empty if it can.
    """

    path: str
    type_name: str
    depth: int
    num_parameters: int
    network_hw: tuple[int, int]
    shapes: tuple[tuple[int, int, int], ...]
    why_not: str


def survey_layers(
    detector: nn.Module, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> list[LayerRow]:
    """Run a detector once and list what its layers give, each before those below it.

    The rules are those of :class:`.recorder.LayerRecorder` and
    :func:`.layer_path.resolve_layers`, so a layer is targetable exactly if the hooks
    can draw it. Only shapes are kept, and nothing of the detector changes. A layer that
    works on single regions looks like a layer of the image if it happens to run on
    exactly one. A shared layer is listed once, where it is found first.

    Args:
        detector (nn.Module): The detector itself, without wrappers.
        inputs (Tensor): ``(1, 3, H, W)`` float, as the data preprocessor gives it,
            on the detector's device; a ``VisConfigError`` for another batch.
        metainfo (Mapping): Metainfo of the image, as ``predict`` reads it.
    """
    if inputs.ndim != 4 or len(inputs) != 1:
        raise VisConfigError(
            f"inputs has the shape {tuple(inputs.shape)}; pass one image, (1, 3, H, W)"
        )
    network_hw = (inputs.shape[-2], inputs.shape[-1])
    shapes: dict[nn.Module, list[tuple[int, int, int]]] = {}
    problems: dict[nn.Module, str] = {}

    def on_output(module: nn.Module, args: tuple, output: Any) -> None:
        try:
            views = views_of(image_tensors(output, 1, ""), network_hw)
            maps = [view.activations[0] for view in views]
        except FeatureShapeError:
            maps = []
        if not maps or any(feature_map.numel() == 0 for feature_map in maps):
            sizes = [str(tuple(tensor.shape)) for _, tensor in flatten_tensors(output)]
            given = " and ".join(sizes) or "no tensor"
            problems.setdefault(module, f"gives no map: {given}")
        own = shapes.setdefault(module, [])
        own += [(len(m), m.shape[-2], m.shape[-1]) for m in maps]

    with frozen(detector), torch.no_grad(), contextlib.ExitStack() as stack:
        for module in detector.modules():
            stack.enter_context(module.register_forward_hook(on_output))
        prediction_of(detector, inputs, metainfo)()
    rows = []
    for name, module in detector.named_modules():
        if not name:
            continue
        path = bracketed(name)
        layers, why_not = _targeted(detector, path, module)
        for item_path, item in layers.items():
            reason = problems.get(item, "" if item in shapes else "does not run")
            suffix = item_path[len(path) :].lstrip(".")
            if reason and not why_not:
                why_not = f"item {suffix} {reason}" if suffix else reason
        found = [] if why_not else [s for m in layers.values() for s in shapes[m]]
        rows.append(
            LayerRow(
                path=path,
                type_name=type(module).__name__,
                depth=name.count(".") + 1,
                num_parameters=sum(p.numel() for p in module.parameters()),
                network_hw=network_hw,
                shapes=tuple(found),
                why_not=why_not,
            )
        )
    return rows


def _targeted(
    detector: nn.Module, path: str, module: nn.Module
) -> tuple[dict[str, nn.Module], str]:
    """The layers that a path stands for, or why it stands for none."""
    try:
        if resolve_layer(detector, path) is module:
            return resolve_layers(detector, [path]), ""
    except LayerNotFoundError:
        return {}, "has no items"
    except VisConfigError:
        pass
    return {}, "has a name that no path can spell"
