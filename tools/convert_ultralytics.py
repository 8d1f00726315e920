"""Make MMYOLO's checkpoint of one of Ultralytics.

``python tools/convert_ultralytics.py IN.pt OUT.pth --config CONFIG``
"""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _common import ToolError, add_cfg_options, read_merged, run_tool
from mmyolo_vis_hooks.detector import build_detector
from mmyolo_vis_hooks.inert import InertObject, read_inertly, some
from mmyolo_vis_hooks.publish.files import write_whole

# Where the layers of the models of Ultralytics are in MMYOLO's. Layers that are not
# named have no weights.
_BACKBONE = {
    0: "backbone.stem",
    1: "backbone.stage1.0",
    2: "backbone.stage1.1",
    3: "backbone.stage2.0",
    4: "backbone.stage2.1",
    5: "backbone.stage3.0",
    6: "backbone.stage3.1",
    7: "backbone.stage4.0",
    8: "backbone.stage4.1",
    9: "backbone.stage4.2",
}
_V5_NECK = {
    10: "neck.reduce_layers.2",
    13: "neck.top_down_layers.0.0",
    14: "neck.top_down_layers.0.1",
    17: "neck.top_down_layers.1",
    18: "neck.downsample_layers.0",
    20: "neck.bottom_up_layers.0",
    21: "neck.downsample_layers.1",
    23: "neck.bottom_up_layers.1",
}
_V8_NECK = {
    12: "neck.top_down_layers.0",
    15: "neck.top_down_layers.1",
    16: "neck.downsample_layers.0",
    18: "neck.bottom_up_layers.0",
    19: "neck.downsample_layers.1",
    21: "neck.bottom_up_layers.1",
}
_POOLING = {"cv1": "conv1", "cv2": "conv2"}
_V5_PARTS = {"cv1": "main_conv", "cv2": "short_conv", "cv3": "final_conv"}
_V8_PARTS = {"cv1": "main_conv", "cv2": "final_conv"}
_V5_HEAD = {"m": "convs_pred"}
_V8_HEAD = {"cv2": "reg_preds", "cv3": "cls_preds"}
# Constants of the decoding, which MMYOLO has in the config.
_NO_WEIGHTS = re.compile(r"model\.(24\.anchors|24\.anchor_grid|22\.dfl\.conv\.weight)")
_V5_STRIDES = (8, 16, 32)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make MMYOLO's checkpoint of one of Ultralytics (YOLOv5 since "
        "v6.0, YOLOv8). Nothing in the file is executed."
    )
    parser.add_argument("input", metavar="IN", help="the .pt file")
    parser.add_argument("output", metavar="OUT", help="the .pth file to write")
    parser.add_argument(
        "--config", required=True, help="config of the same model, with its classes"
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = read_merged(args.config, args)
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise ToolError(f"OUT: there is no folder {folder}")
    model = read_model(args.input)
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        raise ToolError("OUT is the same file as IN; give it another name")
    detector = build_detector(config, "cpu")
    saved = dict(tensors_of(model))
    weights = rename(saved, args.input)
    names = class_names_of(model)
    is_v5 = "model.24.anchors" in saved
    kind = "YOLOv5" if is_v5 else "YOLOv8"
    check_weights(weights, detector, names, f"{args.input} ({kind}) and {args.config}")
    if is_v5:
        check_anchors(saved["model.24.anchors"], detector)
    meta = {"dataset_meta": {"classes": names}}
    content = io.BytesIO()
    torch.save({"state_dict": weights, "meta": meta}, content)
    write_whole(Path(args.output), content.getvalue())
    print(
        f"{args.output}: {len(weights)} tensors, all fit {args.config}; "
        f"{len(names)} classes: {some(names)}"
    )


def read_model(path: str) -> InertObject:
    """The pickled model of a checkpoint of Ultralytics; nothing in it runs."""
    checkpoint, _ = read_inertly(path, "cpu")
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    # In training both are there, and the averaged one is what is validated.
    for key in ("ema", "model"):
        model = found.get(key)
        if isinstance(model, InertObject) and any(True for _ in tensors_of(model)):
            return model
    raise ToolError(
        f"{path} is no checkpoint of Ultralytics: neither its 'ema' nor its 'model' "
        "is a pickled model"
    )


def tensors_of(
    module: InertObject, prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a module's state dict, float16 as float32."""
    state = module.state if isinstance(module.state, Mapping) else {}
    hidden = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, torch.Tensor) and name not in hidden:
                value = value.detach()
                yield (
                    prefix + name,
                    value.float() if value.is_floating_point() else value,
                )
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, InertObject):
            yield from tensors_of(child, f"{prefix}{name}.")


def class_names_of(model: InertObject) -> tuple[str, ...]:
    """Class names in the order of their labels."""
    names = model.state.get("names") or ()
    if isinstance(names, Mapping):
        names = [names[label] for label in sorted(names)]
    return tuple(map(str, names))


def rename(saved: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Give tensors the names that they have in MMYOLO."""
    if "model.24.m.0.weight" in saved:
        neck, parts, head_layer, head = _V5_NECK, _V5_PARTS, 24, _V5_HEAD
    elif "model.22.cv2.0.0.conv.weight" in saved:
        neck, parts, head_layer, head = _V8_NECK, _V8_PARTS, 22, _V8_HEAD
    else:
        raise ToolError(
            f"{path} is neither a YOLOv5 (v6.0 or newer, P5) nor a YOLOv8 detector: "
            f"its last tensors are {', '.join(list(saved)[-2:])}"
        )
    layers = {**_BACKBONE, **neck}
    weights, unknown = {}, []
    for key, value in saved.items():
        if _NO_WEIGHTS.fullmatch(key):
            continue
        _, layer, part, *rest = key.split(".")
        number = int(layer) if layer.isdecimal() else -1
        if number == head_layer and part in head:
            new = ["bbox_head.head_module", head[part], *rest]
        elif number == 9 and part in _POOLING:
            new = [layers[9], _POOLING[part], *rest]
        elif number in layers and part in parts:
            new = [layers[number], parts[part], *rest]
        elif number in layers and part == "m":
            block, conv, *rest = rest
            new = [layers[number], "blocks", block, conv.replace("cv", "conv"), *rest]
        elif number in layers and part in ("conv", "bn"):
            new = [layers[number], part, *rest]
        else:
            unknown.append(key)
            continue
        weights[".".join(new)] = value
    if unknown:
        raise ToolError(f"{path} has parts that MMYOLO does not: {some(unknown)}")
    return weights


def check_weights(
    weights: Mapping[str, torch.Tensor],
    detector: nn.Module,
    names: tuple[str, ...],
    what: str,
) -> None:
    """Make sure that a detector gets all of its weights, and nothing is left over."""
    own = detector.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    found = {"missing": missing, "unknown": unknown, "shapes": shapes}
    details = "; ".join(f"{what} {some(keys)}" for what, keys in found.items() if keys)
    if not details:
        return
    classes = getattr(getattr(detector, "bbox_head", None), "num_classes", None)
    if classes not in (None, len(names)):
        details += (
            f"; the file has {len(names)} classes, the config {classes}: set "
            "num_classes wherever the config has it"
        )
    raise ToolError(f"{what} do not fit: {details}")


def check_anchors(anchors: torch.Tensor, detector: Any) -> None:
    """Make sure that YOLOv5's anchors, in cells of their level, are the config's."""
    trained = anchors * torch.tensor(_V5_STRIDES).view(-1, 1, 1)
    own = torch.tensor(detector.bbox_head.prior_generator.base_sizes).float()
    # float16 has three digits.
    if trained.shape != own.shape or not torch.allclose(trained, own, rtol=2e-3):
        sizes = [
            [tuple(round(float(side), 1) for side in size) for size in level]
            for level in trained
        ]
        raise ToolError(
            "the weights were trained with other anchors than the config has; set "
            f"model.bbox_head.prior_generator.base_sizes={sizes}"
        )


if __name__ == "__main__":
    run_tool(main)
