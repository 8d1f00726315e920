"""Real detectors of 17 families, small, untrained and ready to predict.

They are built from the configs that MMYOLO and MMDetection ship, with fewer
channels, layers, classes and queries, so that the code that runs is the real one.
Their random weights are tuned until they find something: batch norms know the
statistics of the input, and the last layers give logits of a chosen mean and spread.

:func:`reference_gradients` is plain autograd, slow and independent of the package.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import mmdet.utils
import mmyolo.utils
import torch
from mmdet.models.dense_heads import base_dense_head, rtmdet_ins_head
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from tests.family_recipes import GEOMETRIES, NUM_CLASSES, RECIPES, Recipe, Tuning

NETWORK_HW = (128, 160)
SIDES = ("x1", "y1", "x2", "y2")

FAMILIES: tuple[str, ...] = tuple(RECIPES)


@dataclass(frozen=True)
class Family:
    """One detector with an image in which it finds something.

    Attributes:
        name: One of ``FAMILIES``.
        detector: In eval mode, without gradients for the parameters.
        inputs: ``(1, 3, 128, 160)`` float32, normalised and padded.
        data_samples: One sample with the metainfo that ``predict`` reads.
    """

    name: str
    detector: nn.Module
    inputs: Tensor
    data_samples: list[DetDataSample]


@functools.cache
def build_family(name: str) -> Family:
    """Build a detector, the same in every process; the random state stays as it was.

    The instance is shared by all tests: copy it before you change anything.
    """
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        detector = _build_detector(recipe)
        geometry, filled = GEOMETRIES[recipe.geometry]
        inputs = _make_inputs(detector, filled)
        sample = DetDataSample(
            metainfo=dict(
                geometry,
                img_id=1,
                img_path=f"{name}.jpg",
                batch_input_shape=NETWORK_HW,
                pad_shape=NETWORK_HW,
            )
        )
        family = Family(name, detector, inputs, [sample])
        with torch.no_grad():
            _randomise_norms(detector)
            _learn_statistics(family)
            if recipe.query_scale != 1:
                detector.query_embedding.weight *= recipe.query_scale
            for tuning in recipe.tunings:
                _tune(family, tuning)
    return family


@torch.no_grad()
def plain_predict(family: Family) -> InstanceData:
    """The final detections, boxes in pixels of the original image."""
    return _predict(family.detector, family.inputs, family.data_samples)


def reference_gradients(
    family: Family,
    module: nn.Module,
    *,
    target: str = "score",
    indices: Sequence[int] = (0, 1, 2),
) -> list[list[tuple[Tensor, Tensor]]]:
    """Gradients of final detections by plain autograd through the whole network.

    What ``predict`` treats as constant is constant here too: the proposals of a
    two-stage detector, and the reference points that DINO passes from one decoder
    layer to the next. Only where ``predict`` cuts off the scores themselves, the
    cut is repaired (see :func:`_repaired_graph`).

    The target is ``'score'``, or a side of the final box in the original image. Each
    detection has all tensors that the module returned, in the order of the calls and
    within a call in the order of the output; each with its gradient of the same shape,
    zero where the tensor has no influence.
    """
    outputs: list[Tensor] = []

    def keep_tensor(output: Tensor) -> Tensor:
        # A clone, because the module may have used the tensor itself before it
        # returned it: YOLOv5's neck makes coarser levels of finer ones. The network
        # goes on with another clone, because it may change that in place.
        outputs.append(output.clone())
        return outputs[-1].clone()

    def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
        return map_tensors(output, keep_tensor)

    inputs = family.inputs.clone().requires_grad_(True)
    handle = module.register_forward_hook(keep)
    with handle, _repaired_graph(family), torch.enable_grad():
        detections = _predict(family.detector, inputs, family.data_samples)
    if not torch.equal(detections.scores.detach(), plain_predict(family).scores):
        raise RuntimeError(f"the repaired graph of {family.name} changes the scores")
    gradients = []
    for index in indices:
        if target == "score":
            scalar = detections.scores[index]
        else:
            scalar = detections.bboxes[index, SIDES.index(target)]
        parts = torch.autograd.grad(
            scalar, outputs, retain_graph=True, allow_unused=True
        )
        gradients.append(
            [
                (output.detach(), torch.zeros_like(output) if part is None else part)
                for output, part in zip(outputs, parts)
            ]
        )
    return gradients


class _OutOfPlaceProduct(TorchFunctionMode):
    """Makes ``scores *= objectness`` a product that autograd can differentiate."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("mul_", "__imul__"):
            func = Tensor.mul
        return func(*args, **(kwargs or {}))


@contextmanager
def _repaired_graph(family: Family) -> Iterator[None]:
    """Let gradients through the heads that cut the scores off.

    YOLOX multiplies its objectness in place into a view of the batch, which autograd
    refuses. (YOLOv5 and YOLOv7 do so after they have selected, thus copied, rows.)
    MMDetection's one-stage heads detach what they select from the batch.
    """
    with ExitStack() as stack:
        if family.name == "yolox":
            head: Any = family.detector.bbox_head
            predict_by_feat = head.predict_by_feat

            def without_in_place(*args: Any, **kwargs: Any) -> Any:
                with _OutOfPlaceProduct():
                    return predict_by_feat(*args, **kwargs)

            stack.enter_context(
                mock.patch.object(head, "predict_by_feat", without_in_place)
            )
        if family.name in ("retinanet", "fcos", "atss", "rtmdet_ins"):
            for heads in (base_dense_head, rtmdet_ins_head):
                stack.enter_context(
                    mock.patch.object(heads, "select_single_mlvl", _select_attached)
                )
        yield


def _select_attached(
    levels: Sequence[Tensor], index: int, detach: bool = True
) -> list[Tensor]:
    return [level[index] for level in levels]


def _predict(
    detector: Any, inputs: Tensor, data_samples: list[DetDataSample]
) -> InstanceData:
    samples = copy.deepcopy(data_samples)
    return detector.predict(inputs, samples, rescale=True)[0].pred_instances


def map_tensors(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested containers with the function's results for the tensors."""
    if isinstance(node, Tensor):
        return function(node)
    if isinstance(node, dict):
        return type(node)((k, map_tensors(v, function)) for k, v in node.items())
    if isinstance(node, (list, tuple)):
        return type(node)(map_tensors(child, function) for child in node)
    return node


def _build_detector(recipe: Recipe) -> Any:
    mmdet.utils.register_all_modules(init_default_scope=False)
    mmyolo.utils.register_all_modules(init_default_scope=False)
    package = recipe.config.split("::")[0]
    with DefaultScope.overwrite_default_scope(package):
        config = get_config(recipe.config)
        model = Config(dict(model=config.model))
        model.merge_from_dict(dict(model=recipe.options))
        _shrink(model.model, thin=package == "mmdet")
        detector = MODELS.build(model.model)
        # It would log two lines for each parameter.
        with mock.patch.object(BaseModule, "_dump_init_info"):
            detector.init_weights()
    return detector.eval().requires_grad_(False)


def _shrink(node: Any, thin: bool) -> None:
    """Drop downloads; fewer classes, and fewer channels where ``thin``."""
    if isinstance(node, (list, tuple)):
        for child in node:
            _shrink(child, thin)
    if not isinstance(node, dict):
        return
    init = node.get("init_cfg")
    if isinstance(init, dict) and "checkpoint" in init:
        node["init_cfg"] = None
    if "num_classes" in node:
        node["num_classes"] = NUM_CLASSES
    if node.get("type") == "SyncBN":
        node["type"] = "BN"
    if thin and node.get("type") != "ChannelMapper":
        for key in ("in_channels", "out_channels", "feat_channels"):
            if node.get(key) == 256:
                node[key] = 64
        for key in ("conv_out_channels", "fc_out_channels"):
            if key in node:
                node[key] = 64
    for child in node.values():
        _shrink(child, thin)


def _make_inputs(detector: nn.Module, filled: tuple[slice, slice]) -> Tensor:
    """A picture of soft coloured spots with a few sharp edges, normalised."""
    image = torch.full((1, 3, *NETWORK_HW), 110.0)
    for num_rows, mode in (
        (4, "bicubic"),
        (8, "nearest"),
        (16, "bicubic"),
        (32, "bicubic"),
    ):
        spots = torch.randn(1, 3, num_rows, num_rows * 5 // 4)
        image += 32 * nn.functional.interpolate(spots, NETWORK_HW, mode=mode)
    image = image.clamp(0, 255).round()
    preprocessor: Any = detector.data_preprocessor
    if preprocessor._enable_normalize:
        image = (image - preprocessor.mean) / preprocessor.std
    rows, columns = filled
    inputs = torch.zeros_like(image)
    inputs[:, :, rows, columns] = image[:, :, rows, columns]
    return inputs


def _randomise_norms(detector: nn.Module) -> None:
    """As in trained networks: no residual branch is off, no two channels equal."""
    for name, module in detector.named_modules():
        if isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.1)
        elif name.endswith(("sampling_offsets", "attention_weights")):
            # Untrained, they do not look at the query.
            module.weight.normal_(0, 0.02)


def _learn_statistics(family: Family) -> None:
    """Give batch norms the statistics of the image itself."""
    norms = [m for m in family.detector.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average, should it run more than once
        norm.train()
    plain_predict(family)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


def _tune(family: Family, tuning: Tuning) -> None:
    layers: list[Any] = [
        module
        for name, module in family.detector.named_modules()
        if re.fullmatch(tuning.layers, name)
    ]
    if not layers:
        raise LookupError(f"{family.name} has no layer {tuning.layers!r}")
    values: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: Any, _args: Any, output: Tensor) -> None:
        channels_first = output.transpose(0, 1) if output.ndim == 4 else output.mT
        values[layer].append(channels_first.reshape(len(layer.bias), -1))

    for layer in layers:
        fan_in = layer.weight[0].numel()
        layer.weight.normal_(0, fan_in**-0.5)
        layer.bias.zero_()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_hook(keep))
        plain_predict(family)
    for layer in layers:
        channels = torch.cat(values[layer], dim=1)
        scale = tuning.std / channels.std(dim=1)
        layer.weight *= scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        means = torch.tensor(tuning.means).repeat(len(layer.bias) // len(tuning.means))
        layer.bias.copy_(means - channels.mean(dim=1) * scale)
