"""Surveys which layers of a detector can be targeted, and which maps they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import nn

from ..errors import FeatureShapeError, VisConfigError
from .layer_path import bracketed, resolve_layer, resolve_layers
from .nested import OutputIndex, flatten_tensors
from .recorder import image_tensors, spatial_maps
from .state import frozen


@dataclass(frozen=True)
class LayerOutput:
    """One feature map that an image gets if a layer is targeted.

    Attributes:
        layer: Path of the layer that computes the map: the targeted one, or an item
            of the targeted container.
        call_index: Which call of that layer during the forward gives the map.
        index: Where the map lies in the nested output of the call; empty for a
            layer that returns a single tensor.
        shape: ``(C, h, w)``.
        stride_hw: Height and width of the network's input, divided by ``h`` and
            ``w``: pixels of the network frame per cell.
        num_tokens: Length of the sequence ``(N, C)`` from which the map is folded;
            None for a layer that gives maps.
    """

    layer: str
    call_index: int
    index: OutputIndex
    shape: tuple[int, int, int]
    stride_hw: tuple[float, float]
    num_tokens: int | None = None


@dataclass(frozen=True)
class LayerNode:
    """A layer with the layers below it.

    Attributes:
        path: As users write it, ``'neck.out_layers[2]'``; empty for the detector.
        type_name: Name of the module's class.
        num_parameters: Of the layer and all below it, shared ones counted once.
        num_calls: How often the layer ran during the forward.
        network_hw: Height and width of the network's input, pixels.
        outputs: Every map that an image gets if this layer is targeted, in the order
            of the calls. A ``ModuleList`` or ``ModuleDict`` has those of its items.
        why_not: Why the layer cannot be targeted, to be read after its name ('does
            not run'); None if it can.
        children: The layers right below, in the order of ``named_modules``. A shared
            layer is listed once, where it is found first.
    """

    path: str
    type_name: str
    num_parameters: int
    num_calls: int
    network_hw: tuple[int, int]
    outputs: tuple[LayerOutput, ...]
    why_not: str | None
    children: tuple[LayerNode, ...]

    @property
    def targetable(self) -> bool:
        """Whether an image gets at least one map if this layer is targeted."""
        return self.why_not is None

    @property
    def gives_items(self) -> bool:
        """Whether the maps are those of the items of a container."""
        return any(output.layer != self.path for output in self.outputs)

    def walk(self) -> Iterator[LayerNode]:
        """This layer and all below it, each before its children."""
        yield self
        for child in self.children:
            yield from child.walk()


def survey_layers(
    detector: nn.Module, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> LayerNode:
    """Run a detector once and list what its layers give.

    The rules are those of :class:`.recorder.LayerRecorder` and
    :func:`.layer_path.resolve_layers`, so a layer is targetable exactly if the hooks
    can draw it. Only shapes are kept. Modes, buffers, ``requires_grad``, ``.grad``,
    random states and forward hooks are afterwards as they were, also if the forward
    fails.

    A layer that works on single regions is known by its batch size. It looks like a
    layer of the image if it happens to run on exactly one region.

    Args:
        detector (nn.Module): The detector itself, without wrappers.
        inputs (Tensor): ``(1, 3, H, W)`` float, as the data preprocessor gives it,
            on the detector's device.
        metainfo (Mapping): Metainfo of the image, as ``predict`` reads it.

    Returns:
        LayerNode: The detector, with the layers below it.

    Raises:
        VisConfigError: If ``inputs`` is not a batch of one image.
    """
    if inputs.ndim != 4 or len(inputs) != 1:
        raise VisConfigError(
            f"inputs has the shape {tuple(inputs.shape)}; pass one image, (1, 3, H, W)"
        )
    survey = _Survey(detector, (inputs.shape[-2], inputs.shape[-1]))
    samples = [DetDataSample(metainfo=dict(metainfo))]
    handles = []
    with frozen(detector, parameters=False), torch.no_grad():
        try:
            for module in detector.modules():
                handles.append(module.register_forward_hook(survey.on_output))
            detector(inputs, samples, mode="predict")
        finally:
            for handle in handles:
                handle.remove()
    return survey.node(detector)


class _Survey:
    """What the layers of one detector gave during one forward."""

    def __init__(self, detector: nn.Module, network_hw: tuple[int, int]) -> None:
        self._detector = detector
        self._network_hw = network_hw
        self._calls: Counter[nn.Module] = Counter()
        self._maps: dict[nn.Module, list[LayerOutput]] = {}
        self._problems: dict[nn.Module, str] = {}
        self._seen: set[nn.Module] = set()

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        call_index = self._calls[module]
        self._calls[module] += 1
        if module in self._problems:
            return
        try:
            maps = self._maps_of(output, call_index)
        except FeatureShapeError as error:
            self._problems[module] = str(error)
        except Exception as error:
            # The recorder could not read this output either, and says so.
            self._problems[module] = f"gives what cannot be read ({error})"
        else:
            self._maps.setdefault(module, []).extend(maps)

    def node(self, module: nn.Module, name: str = "") -> LayerNode:
        self._seen.add(module)
        children = []
        for key, child in module.named_children():
            if child not in self._seen:
                children.append(self.node(child, f"{name}.{key}" if name else key))
        path = bracketed(name)
        outputs, why_not = self._target(module, path)
        return LayerNode(
            path=path,
            type_name=type(module).__name__,
            num_parameters=sum(p.numel() for p in module.parameters()),
            num_calls=self._calls[module],
            network_hw=self._network_hw,
            outputs=outputs,
            why_not=why_not,
            children=tuple(children),
        )

    def _target(
        self, module: nn.Module, path: str
    ) -> tuple[tuple[LayerOutput, ...], str | None]:
        """The maps of a layer, or why there are none."""
        if not path:
            return (), "is the detector itself"
        if not self._leads_to(path, module):
            return (), "has a name that no path can spell"
        try:
            layers = resolve_layers(self._detector, [path])
        except VisConfigError:
            return (), "has no items"
        outputs: list[LayerOutput] = []
        for item_path, item in layers.items():
            problem = self._problem(item)
            if problem is not None:
                suffix = item_path[len(path) :].lstrip(".")
                return (), f"item {suffix} {problem}" if suffix else problem
            outputs += [replace(output, layer=item_path) for output in self._maps[item]]
        return tuple(outputs), None

    def _leads_to(self, path: str, module: nn.Module) -> bool:
        try:
            return resolve_layer(self._detector, path) is module
        except VisConfigError:
            return False

    def _problem(self, module: nn.Module) -> str | None:
        if not self._calls[module]:
            return "does not run"
        return self._problems.get(module)

    def _maps_of(self, output: Any, call_index: int) -> list[LayerOutput]:
        """The maps of one call; an error carries the reason in a few words."""
        try:
            tensors = image_tensors(output, 1, "")
        except FeatureShapeError as error:
            raise FeatureShapeError(_why_no_tensors(output)) from error
        found = []
        for output_index, tensor in tensors:
            try:
                maps = spatial_maps(tensor[0], self._network_hw, "")
            except FeatureShapeError as error:
                raise FeatureShapeError(_why_no_maps(tensor)) from error
            for level, feature_map in enumerate(maps):
                channels, height, width = feature_map.shape
                if not feature_map.numel():
                    raise FeatureShapeError("gives an empty map")
                found.append(
                    LayerOutput(
                        layer="",
                        call_index=call_index,
                        index=output_index
                        if len(maps) == 1
                        else (*output_index, level),
                        shape=(channels, height, width),
                        stride_hw=(
                            self._network_hw[0] / height,
                            self._network_hw[1] / width,
                        ),
                        num_tokens=tensor.shape[1] if tensor.ndim == 3 else None,
                    )
                )
        return found


def _why_no_tensors(output: Any) -> str:
    for _, tensor in flatten_tensors(output):
        if tensor.ndim >= 3 and tensor.is_floating_point() and len(tensor) != 1:
            return f"gives {tuple(tensor.shape)} for one image"
    return "gives no map"


def _why_no_maps(tensor: torch.Tensor) -> str:
    if tensor.ndim == 3:
        return f"gives {tensor.shape[1]} tokens that fit no grid"
    return f"gives {tuple(tensor.shape)}, which is no map"
