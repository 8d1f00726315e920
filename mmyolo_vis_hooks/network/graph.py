"""Runs a detector's own ``predict`` so that its detections carry gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import FeatureShapeError, VisError
from .nested import OutputIndex, flatten_tensors, map_tensors
from .recorder import image_tensors

# After so many detections a raw output that no score depended on is taken for one
# that none can depend on; a saturated one would have shown itself in a low score.
_ENOUGH_DETECTIONS = 50


@dataclass(frozen=True)
class TapPoint:
    """A module whose output, or input, can be tapped.

    Attributes:
        layer: Name for captions and messages.
        module: The module.
        side: ``'output'`` or ``'input'``: the first argument of the module, seen by
            this module alone.
    """

    layer: str
    module: nn.Module
    side: str = "output"


class TapKey(NamedTuple):
    """One tensor that passed a tap."""

    layer: str
    call_index: int
    output_index: OutputIndex

    @property
    def title(self) -> str:
        """Name for captions: ``neck[1]``, and ``conv (call 2)`` for a later call."""
        output = "".join(f"[{index}]" for index in self.output_index)
        call = "" if self.call_index == 0 else f" (call {self.call_index + 1})"
        return f"{self.layer}{output}{call}"


class HeadKey(NamedTuple):
    """One raw output of a detection head."""

    path: str
    call_index: int
    output_index: OutputIndex


_Kind = tuple[str, OutputIndex]


def _kind(path: str, output_index: OutputIndex) -> _Kind:
    """A head's kind of output, such as its class scores at all levels."""
    return path, output_index[:1]


@dataclass
class PredictionGraph:
    """What one forward of ``predict`` left behind.

    Attributes:
        inputs: ``(1, 3, H, W)``, the normalised and padded input.
        taps: Tensors at the tap points, in the order in which they ran:
            ``(1, C, h, w)`` or tokens ``(1, N, C)``. They are nodes of the graph.
        head_outputs: Raw outputs of the detection heads, in the order of the calls.
        predictions: Final detections of the image in the original frame; the
            scores, and mostly the boxes, carry gradients.
    """

    inputs: torch.Tensor
    taps: dict[TapKey, torch.Tensor] = field(default_factory=dict)
    head_outputs: dict[HeadKey, torch.Tensor] = field(default_factory=dict)
    predictions: InstanceData = field(default_factory=InstanceData)

    @property
    def network_hw(self) -> tuple[int, int]:
        """Height and width of the network's input, pixels."""
        return self.inputs.shape[-2], self.inputs.shape[-1]


class GraphForward:
    """Runs ``predict`` with a graph that begins at the earliest tap.

    No parameter takes part in the graph, so what lies before the taps costs what it
    costs without gradients. No loss, no
    ground truth and nothing that depends on the kind of head is needed; two habits
    of heads would cut the graph, and are undone after the head's own forward only:

    - Heads with objectness multiply scores in place in a view that autograd
      protects. The product is then made out of place, with the same values.
    - MMDetection's dense heads detach their raw outputs. Where scores come out
      without a graph, the forward is repeated with ``detach`` as the identity.

    Args:
        detector (nn.Module): The detector, without wrappers.
        taps (Sequence[TapPoint]): Where gradients will be wanted.
    """

    def __init__(self, detector: nn.Module, taps: Sequence[TapPoint]) -> None:
        self._detector = detector
        self._taps = tuple(taps)
        self.heads = head_modules(detector)
        self._keep_graph = False
        self._detections_seen = 0
        self._touched: set[_Kind] = set()
        self._idle: frozenset[_Kind] = frozenset()
        self._no_gradients = (
            f"the scores of {type(detector).__name__} carry no gradients back to the "
            "layers: its post-processing cuts the graph (soft-NMS does), or the layers "
            "take no part in them; use method='drise', which needs none, or another "
            "layer"
        )

    def run(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        *,
        attach: Callable[[], Iterator[Any]] | None = None,
        from_heads: bool = False,
        scores_only: bool = False,
    ) -> PredictionGraph:
        """Predict the detections of one image.

        The detector must be :func:`frozen`, also while gradients are taken.

        Args:
            inputs (Tensor): ``(1, 3, H, W)``, as the data preprocessor gives it.
            metainfo (Mapping): Of the image's data sample.
            attach (Callable, optional): Registers further forward hooks and gives
                their handles. Defaults to None.
            from_heads (bool): Begin the graph at the raw outputs of the heads; the
                taps are then recorded without one. Defaults to False.
            scores_only (bool): With ``from_heads``, leave raw outputs out of the
                graph of which it is known by then that no score depends on them, as
                those that make boxes; boxes may carry no gradients then. Defaults to
                False.

        Raises:
            VisError: If the detections carry no gradients.
            FeatureShapeError: If a tap did not run or holds no map.
        """
        idle = self._idle if from_heads and scores_only else frozenset()
        graph = self._run_once(inputs, metainfo, attach, from_heads, idle)
        predictions = graph.predictions
        if len(predictions.scores) and not predictions.scores.requires_grad:
            if not self._keep_graph and self.heads:
                self._keep_graph = True
                graph = self._run_once(inputs, metainfo, attach, from_heads, idle)
            if not graph.predictions.scores.requires_grad:
                raise VisError(self._no_gradients)
        if self._detections_seen < _ENOUGH_DETECTIONS:
            self._look_back(graph)
        return graph

    def _look_back(self, graph: PredictionGraph) -> None:
        """See which raw outputs the scores depend on, and that there is a way back.

        Soft-NMS of MMCV makes a graph that cannot be walked back.
        """
        scores = graph.predictions.scores
        nodes: dict[Any, torch.Tensor] = {**graph.taps, **graph.head_outputs}
        nodes = {key: node for key, node in nodes.items() if node.requires_grad}
        if not len(scores) or not nodes:
            return
        # Unequal shares, so that no influence cancels another.
        shares = torch.arange(1, len(scores) + 1, device=scores.device)
        try:
            gradients = torch.autograd.grad(
                (scores * shares).sum(),
                list(nodes.values()),
                retain_graph=True,
                allow_unused=True,
            )
        except NotImplementedError as error:
            raise VisError(self._no_gradients) from error
        self._detections_seen += len(scores)
        for key, gradient in zip(nodes, gradients):
            if isinstance(key, HeadKey) and gradient is not None and gradient.any():
                self._touched.add(_kind(key.path, key.output_index))
        if self._detections_seen >= _ENOUGH_DETECTIONS:
            sizes: dict[_Kind, set[torch.Size]] = {}
            for key, output in graph.head_outputs.items():
                kind = _kind(key.path, key.output_index)
                sizes.setdefault(kind, set()).add(output.shape[2:])
            # A level on which no box was found yet is no kind.
            everywhere = set().union(*sizes.values())
            self._idle = frozenset(
                kind
                for kind, own in sizes.items()
                if kind not in self._touched and own == everywhere
            )

    def _run_once(
        self,
        inputs: torch.Tensor,
        metainfo: Mapping[str, Any],
        attach: Callable[[], Iterator[Any]] | None,
        from_heads: bool,
        idle: Collection[_Kind],
    ) -> PredictionGraph:
        # Tensors of inference mode take part in no graph; their copies do.
        inputs = inputs.clone() if inputs.is_inference() else inputs.detach()
        graph = PredictionGraph(inputs)
        calls: Counter[str] = Counter()
        handles: list[Any] = []
        data_sample = DetDataSample(metainfo=dict(metainfo))
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [handle.remove() for handle in handles])
            stack.enter_context(torch.set_grad_enabled(not from_heads))
            mode = _KeepGraph(self._keep_graph)
            for tap in self._taps:
                handles.append(_attach_tap(tap, graph, calls, not from_heads))
            for path, head in self.heads.items():
                hook = _head_hook(path, graph, mode, calls, from_heads, idle)
                handles.append(head.register_forward_hook(hook))
            if attach is not None:
                handles.extend(attach())
            stack.callback(mode.leave)
            (output,) = self._detector(graph.inputs, [data_sample], mode="predict")
        graph.predictions = output.pred_instances
        silent = [tap.layer for tap in self._taps if not calls["tap " + tap.layer]]
        if silent:
            raise FeatureShapeError(
                f"target_layers: {', '.join(silent)} did not run when the detector "
                "predicted; choose a layer that takes part in inference"
            )
        return graph


def head_modules(detector: nn.Module) -> dict[str, nn.Module]:
    """The modules that give the raw class scores of the final detections.

    OpenMMLab's detectors call them ``bbox_head``, in a list for cascades; a head of
    region proposals is none of them.

    Args:
        detector (nn.Module): The detector, without wrappers.
    """
    heads: dict[str, nn.Module] = {}
    for path, module in detector.named_modules():
        if path.split(".")[-1] != "bbox_head" or path.startswith(tuple(heads) or "\0"):
            continue
        if isinstance(module, nn.ModuleList):
            heads.update({f"{path}.{i}": item for i, item in enumerate(module)})
        else:
            heads[path] = module
    return heads


def _attach_tap(
    tap: TapPoint, graph: PredictionGraph, calls: Counter[str], with_graph: bool
) -> Any:
    def store(value: Any) -> Any:
        call_index = calls["tap " + tap.layer]
        calls["tap " + tap.layer] += 1
        wanted = dict(image_tensors(value, len(graph.inputs), tap.layer))

        def change(index: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            if index not in wanted:
                return tensor
            if with_graph and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            elif with_graph:
                # A node of its own: the module may have gone on with the tensor.
                tensor = tensor.view_as(tensor)
            graph.taps[TapKey(tap.layer, call_index, index)] = tensor
            # A copy, so that in-place operations that follow leave the node alone.
            return tensor.clone() if with_graph else tensor

        return map_tensors(value, change)

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda module, args: (store(args[0]), *args[1:])
        )
    return tap.module.register_forward_hook(lambda module, args, output: store(output))


def _head_hook(
    path: str,
    graph: PredictionGraph,
    mode: _KeepGraph,
    calls: Counter[str],
    from_heads: bool,
    idle: Collection[_Kind],
) -> Callable:
    def begun(index: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().requires_grad_(_kind(path, index) not in idle)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        call_index = calls["head " + path]
        calls["head " + path] += 1
        if from_heads:
            torch.set_grad_enabled(True)
            output = map_tensors(output, begun)
        for index, tensor in flatten_tensors(output):
            if tensor.is_floating_point():
                graph.head_outputs[HeadKey(path, call_index, index)] = tensor
        mode.enter()
        return output

    return hook


class _KeepGraph(TorchFunctionMode):
    """Undoes what would cut the graph between raw outputs and detections."""

    def __init__(self, keep_detached: bool) -> None:
        super().__init__()
        self._keep_detached = keep_detached
        self._active = False

    def enter(self) -> None:
        """Begin; not earlier than after the head, since every operation costs."""
        if not self._active:
            self.__enter__()
            self._active = True

    def leave(self) -> None:
        """End, if it had begun."""
        if self._active:
            self._active = False
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._keep_detached and func is torch.Tensor.detach:
            return args[0]
        if func in _OUT_OF_PLACE and isinstance(args[0], torch.Tensor):
            target = args[0]
            if target.requires_grad and target._is_view():
                try:
                    return func(*args, **kwargs)
                except RuntimeError:  # a view that autograd protects
                    return _OUT_OF_PLACE[func](*args, **kwargs)
        return func(*args, **kwargs)


_OUT_OF_PLACE: dict[Any, Callable] = {
    torch.Tensor.mul_: torch.mul,
    torch.Tensor.__imul__: torch.mul,
    torch.Tensor.add_: torch.add,
    torch.Tensor.__iadd__: torch.add,
    torch.Tensor.div_: torch.div,
    torch.Tensor.__itruediv__: torch.div,
    torch.Tensor.sigmoid_: torch.sigmoid,
}
