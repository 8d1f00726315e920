"""Runs a detector's own ``predict`` so that its detections carry gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn
from torch.overrides import TorchFunctionMode

from ..data.detections import detections_of
from ..errors import VisError, one_line
from ..geometry import FrameTransform
from .maps import image_tensors
from .nested import OutputIndex, OutputKey, flatten_tensors, map_tensors
from .recorder import did_not_run


class NoGradientError(VisError):
    """Detections have no gradient at the layers."""


@dataclass(frozen=True)
class TapPoint:
    """A module whose output or input (the first argument) can be tapped.

    ``layer`` is its name for captions. With ``cut`` the graph begins anew here, so that
    no gradient leads to taps before this one.
    """

    layer: str
    module: nn.Module
    side: str = "output"
    cut: bool = False


@dataclass
class PredictionGraph:
    """What one forward of ``predict`` left behind.

    ``points`` were tapped, and ``taps`` are nodes of the graph in the order in which
    they ran: ``(1, C, h, w)`` or tokens ``(1, N, C)``. ``head_outputs`` are raw, in the
    order of the calls. Scores, and mostly boxes, of ``predictions`` carry gradients;
    they are in the original frame, which ``metainfo`` of the image's sample tells.
    ``squashed`` are maps ``(n, c, h, w)`` that went through a sigmoid behind the head,
    such as the raw scores of masks.
    """

    inputs: torch.Tensor
    metainfo: Mapping[str, Any] = field(default_factory=dict)
    taps: dict[OutputKey, torch.Tensor] = field(default_factory=dict)
    head_outputs: dict[OutputKey, torch.Tensor] = field(default_factory=dict)
    predictions: InstanceData = field(default_factory=InstanceData)
    squashed: list[torch.Tensor] = field(default_factory=list)
    points: tuple[TapPoint, ...] = ()

    @property
    def network_hw(self) -> tuple[int, int]:
        """Height and width of the network's input, pixels."""
        return self.inputs.shape[-2], self.inputs.shape[-1]

    def network_boxes(self) -> np.ndarray:
        """The final boxes ``(N, 4)`` in pixels of the network's input."""
        metainfo = {"batch_input_shape": self.network_hw, **self.metainfo}
        return network_boxes(self.predictions, FrameTransform.from_metainfo(metainfo))

    def detections(self) -> InstanceData:
        """The final detections without a graph."""
        plain = InstanceData()
        for name, value in self.predictions.items():
            plain[name] = value.detach() if hasattr(value, "detach") else value
        return plain


class GraphForward:
    """Runs ``predict`` with a graph that begins at the earliest tap.

    What lies before the taps costs what it costs without gradients. Two habits of heads
    would cut the graph, and are undone after the head's own forward only:

    - Heads with objectness multiply scores in place in a view that autograd
      protects. They get copies, with the same values.
    - MMDetection's dense heads detach their raw outputs. Where scores come out
      without a graph, the forward is repeated with ``detach`` as the identity.

    Args:
        detector (nn.Module): The detector, without wrappers.
        taps (Sequence[TapPoint]): Where gradients will be wanted.
    """

    def __init__(self, detector: nn.Module, taps: Sequence[TapPoint]) -> None:
        self._detector = detector
        self.taps = tuple(taps)
        self.heads = head_modules(detector)
        self._keep_graph = False

    def run(self, inputs: torch.Tensor, metainfo: Mapping[str, Any]) -> PredictionGraph:
        """Predict the detections of one image.

        Args:
            inputs (Tensor): ``(1, 3, H, W)``, as the data preprocessor gives it. The
                detector must be :func:`frozen`, also while gradients are taken.
            metainfo (Mapping): Of the image's data sample.

        Raises:
            NoGradientError: If the detections carry no gradients.
            FeatureShapeError: If a tap did not run or holds no map.
        """
        graph = self._run_once(inputs, metainfo, self._keep_graph)
        if not _has_graph(graph) and not self._keep_graph and self.heads:
            graph = self._run_once(inputs, metainfo, True)
            self._keep_graph = _has_graph(graph)
        if not _has_graph(graph):
            raise NoGradientError(
                _NO_GRADIENTS.format(f"the scores of {type(self._detector).__name__}")
            )
        return graph

    def _run_once(
        self, inputs: torch.Tensor, metainfo: Mapping[str, Any], keep_graph: bool
    ) -> PredictionGraph:
        # Tensors of inference mode take part in no graph; their copies do.
        inputs = inputs.clone() if inputs.is_inference() else inputs.detach()
        graph = PredictionGraph(inputs, metainfo, points=self.taps)
        taps_ran: Counter[str] = Counter()
        heads_ran: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:

            def keep_raw(path: str, module: nn.Module, args: Any, output: Any) -> None:
                if not heads_ran:  # not earlier, since every operation costs
                    stack.enter_context(_KeepGraph(keep_graph, graph.squashed))
                for index, tensor in flatten_tensors(output):
                    if tensor.is_floating_point():
                        key = OutputKey(path, heads_ran[path], index)
                        graph.head_outputs[key] = tensor
                heads_ran[path] += 1

            stack.enter_context(torch.enable_grad())
            for tap in self.taps:
                stack.enter_context(_attach_tap(tap, graph, taps_ran))
            for path, head in self.heads.items():
                hook = head.register_forward_hook(partial(keep_raw, path))
                stack.enter_context(hook)
            try:
                (output,) = prediction_of(self._detector, graph.inputs, metainfo)()
            except RuntimeError as error:
                if not heads_ran:  # the network failed by itself
                    raise
                # Such as of post-processing in NumPy, which takes no graph.
                raise NoGradientError(
                    f"{type(self._detector).__name__} cannot predict while gradients "
                    f"are kept: {one_line(error)}; use method='drise', which needs none"
                ) from error
        graph.predictions = instances_of(output, self._detector)
        silent = {t.layer: t.module for t in self.taps if not taps_ran[t.layer]}
        if silent:
            raise did_not_run(self._detector, silent)
        return graph


def network_boxes(predictions: InstanceData, frame: FrameTransform) -> np.ndarray:
    """Final boxes ``(N, 4)`` float32 in pixels of the network's input."""
    return frame.boxes_to_network(detections_of(predictions).boxes_xyxy)


def instances_of(output: Any, detector: nn.Module) -> InstanceData:
    """The detections of a data sample; a ``VisError`` if there are none to explain."""
    found = getattr(output, "pred_instances", {})
    missing = [name for name in ("bboxes", "scores", "labels") if name not in found]
    if missing:
        raise VisError(
            f"{type(detector).__name__} gives no {', '.join(missing)} as "
            "pred_instances, so there is no box to explain"
        )
    return found


def prediction_of(
    detector: nn.Module, inputs: torch.Tensor, metainfo: Mapping[str, Any]
) -> Callable[[], Any]:
    """What runs ``predict`` of a detector on an image."""

    def predict() -> Any:
        sample = DetDataSample(metainfo=dict(metainfo))
        return detector(inputs, [sample], mode="predict")

    return predict


def head_modules(detector: nn.Module) -> dict[str, nn.Module]:
    """The modules that give the raw class scores of the final detections.

    OpenMMLab's detectors call them ``bbox_head``, in a list for cascades; a head of
    region proposals is none of them.
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


def gradients(
    scalar: torch.Tensor | Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    *,
    slopes: Sequence[torch.Tensor] | None = None,
    create_graph: bool = False,
) -> list[torch.Tensor | None]:
    """Gradients at tensors of a graph, which is kept; nobody's ``.grad`` is touched.

    Args:
        scalar (Tensor | Sequence[Tensor]): What is differentiated.
        tensors (Sequence[Tensor]): Where the gradients are wanted. None is given where
            one has no influence.
        slopes (Sequence[Tensor], optional): Derivatives of something by each tensor
            in ``scalar``, where these are no scalars. Defaults to None.
        create_graph (bool): Make a graph of the gradients too. Defaults to False.

    Raises:
        NoGradientError: If something on the way cannot be differentiated.
    """
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    outputs = [scalar] if isinstance(scalar, torch.Tensor) else list(scalar)
    if not wanted or not all(output.requires_grad for output in outputs):
        return [None] * len(tensors)
    try:
        found = torch.autograd.grad(
            outputs,
            wanted,
            grad_outputs=slopes,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    except NotImplementedError as error:
        # Operations such as MMCV's soft-NMS put nodes without a derivative in a graph.
        raise NoGradientError(_NO_GRADIENTS.format("the scores")) from error
    by_id = dict(zip(map(id, wanted), found))
    return [by_id.get(id(tensor)) for tensor in tensors]


_NO_GRADIENTS = (
    "{} carry no gradients back to the layers: the post-processing cuts the graph "
    "(soft-NMS does), or the layers take no part in them; use method='drise', which "
    "needs none, or another layer"
)


def _has_graph(graph: PredictionGraph) -> bool:
    scores = graph.predictions.scores
    return not len(scores) or scores.requires_grad


def _attach_tap(tap: TapPoint, graph: PredictionGraph, calls: Counter[str]) -> Any:
    def store(value: Any) -> Any:
        call_index = calls[tap.layer]
        calls[tap.layer] += 1
        wanted = image_tensors(value, len(graph.inputs), tap.layer, call_index)

        def change(index: OutputIndex, tensor: torch.Tensor) -> torch.Tensor:
            key = OutputKey(tap.layer, call_index, index)
            if key not in wanted:
                return tensor
            if tap.cut or not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            else:
                # A node of its own: the module may have gone on with the tensor.
                tensor = tensor.view_as(tensor)
            graph.taps[key] = tensor
            # A copy, so that in-place operations that follow leave the node alone.
            return tensor.clone()

        return map_tensors(value, change)

    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda module, args: (store(args[0]), *args[1:])
        )
    return tap.module.register_forward_hook(lambda module, args, output: store(output))


class _KeepGraph(TorchFunctionMode):
    """Undoes what would cut the graph between raw outputs and detections.

    It keeps the maps that are put through a sigmoid meanwhile.
    """

    def __init__(self, keep_detached: bool, squashed: list[torch.Tensor]) -> None:
        super().__init__()
        self._keep_detached = keep_detached
        self._squashed = squashed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given: Any = args[0] if args else None
        if self._keep_detached and func is torch.Tensor.detach:
            return given
        if func is torch.Tensor.__deepcopy__ and not given.is_leaf:
            return given.clone()
        if func in _ROOTS and args:
            # The slope at zero is infinite: NaN even where nothing depends on it.
            args = torch.where(given > 0, given, given.detach()), *args[1:]
        result = func(*args, **kwargs)
        if func in _SIGMOIDS and result.ndim == 4:
            self._squashed.append(given)
        if func in _VIEWS:
            return tuple(view.clone() for view in result)
        return result.clone() if func in _SCORES else result


_ROOTS = (torch.sqrt, torch.Tensor.sqrt)
_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid)
# Autograd keeps these for the way back, and lets nobody write into them,
_SCORES = (*_SIGMOIDS, torch.softmax, torch.Tensor.softmax, F.softmax)
# nor into one of several views.
_VIEWS = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("unbind", "split", "chunk", "tensor_split")
)
