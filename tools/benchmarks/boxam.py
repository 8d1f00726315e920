"""Time of box explanations, side by side with what others do.

The unit is one plain forward: ``predict`` without gradients, with its post-processing.
All jobs take turns, round after round, and a ratio is the median of the ratios within
the rounds, so that a busy machine disturbs it least.

- ``gradients``: the default method for one, ten and thirty boxes.
- ``ablation``: AblationCAM per channel; and a whole forward per channel, NMS included.
  What is recorded once per image is not counted, but shown.
- ``import``: of the package, and of MMDetection, in processes of their own.

    python tools/benchmarks/boxam.py
    python tools/benchmarks/boxam.py --quick --detectors yolov5_s
    python tools/benchmarks/boxam.py --device cuda:0
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from _measure import (
    CONFIG,
    ROOT,
    SHARED,
    WEIGHTS,
    finish,
    print_table,
    take_turns,
    verdict,
)

PARTS = ("gradients", "ablation", "import")
MOST_FORWARDS = {1: 1.2, 10: 1.5, 30: 2.0}
LEAST_SPEEDUP = {"neck": 100.0, "backbone": 3.0}
MOST_IMPORT = 1.5
COLUMNS = ["detector", "job", "this package", "other", "ratio", "goal"]


class Scene:
    """A detector with an image on which it finds boxes at every level."""

    def __init__(self, name: str, detector: Any, image: Any, ablated: Sequence[str]):
        size_hw = tuple(int(n) for n in image.shape[-2:])
        self.name, self.detector, self.ablated = name, detector, ablated
        self.metainfo = dict(
            img_shape=size_hw,
            batch_input_shape=size_hw,
            ori_shape=size_hw,
            scale_factor=(1.0, 1.0),
            pad_param=np.zeros(4, np.float32),
            img_id=0,
            img_path="benchmark.jpg",
        )
        data = {"inputs": [image], "data_samples": [self.sample()]}
        self.inputs = detector.data_preprocessor(data)["inputs"]

    def sample(self) -> Any:
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=dict(self.metainfo))

    def predict(self) -> Any:
        """The plain forward; gives the final detections."""
        import torch

        with torch.no_grad():
            (output,) = self.detector(self.inputs, [self.sample()], mode="predict")
        finish(self.inputs.device)
        return output.pred_instances


def ratio(own: Sequence[float], unit: Sequence[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(own, unit))


def shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g} ms"


# --- detectors -----------------------------------------------------------------


def yolox_nano(device: str) -> Scene:
    """The trained YOLOX-nano on a photograph, 416x416."""
    import cv2
    import torch

    from mmyolo_vis_hooks import load

    photo: Any = cv2.imread(str(SHARED / "data" / "demo.jpg"))
    image = torch.from_numpy(cv2.resize(photo, (416, 416))).permute(2, 0, 1)
    layers = ("neck.out_convs.2", "neck.bottom_up_blocks.1", "backbone.stage4")
    detector = load(CONFIG, WEIGHTS, device=device)
    return Scene("yolox_nano", detector, image, layers)


def yolov5_s(device: str, size: int = 640) -> Scene:
    """YOLOv5-s at 640x640, untrained, with logits like those of a trained one."""
    import torch
    import torch.nn.functional as F

    from mmyolo_vis_hooks.detector import build_detector

    config = "mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build_detector(config, "cpu")
        coarse = torch.rand(1, 3, size // 16, size // 16)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic")[0]
    image = (smooth.clamp(0, 1) * 255).to(torch.uint8)
    layers = ("neck.bottom_up_layers.1", "backbone.stage4")
    _tune(Scene("yolov5_s", detector, image, layers))
    return Scene("yolov5_s", detector.to(device), image, layers)


DETECTORS: dict[str, Callable[[str], Scene]] = {
    "yolox_nano": yolox_nano,
    "yolov5_s": yolov5_s,
}


def _tune(scene: Scene) -> None:
    """Give an untrained YOLOv5 norms that know the image, and rare, clear boxes."""
    import torch
    from torch import nn

    detector = scene.detector
    with torch.no_grad():
        for norm in detector.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train().momentum = 1.0
        detector(scene.inputs, mode="tensor")
        detector.eval()
        # Rarer on fine levels, which have more cells.
        convs = detector.bbox_head.head_module.convs_pred
        for conv, objectness in zip(convs, (-7.0, -6.0, -2.5)):
            means = torch.tensor([0.0] * 4 + [objectness] + [-10.0] * 80).repeat(3)
            stds = torch.tensor([0.5] * 4 + [2.0] + [2.0] * 80).repeat(3)
            seen: list[Any] = []
            hook = partial(lambda kept, m, args, output: kept.append(output), seen)
            handle = conv.register_forward_hook(hook)
            detector(scene.inputs, mode="tensor")
            handle.remove()
            values = seen[0][0].flatten(1)
            gain = stds / values.std(dim=1).clamp(min=1e-6)
            conv.weight *= gain[:, None, None, None]
            conv.bias.copy_((conv.bias - values.mean(dim=1)) * gain + means)


# --- both sides ----------------------------------------------------------------


def attributor(scene: Scene, layers: Any = None, **options: Any) -> Any:
    """This package's attributor; its ``choose`` is replaced by the benchmark's."""
    from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
    from mmyolo_vis_hooks.options import BoxAMOptions

    own = BoxAMOptions(target_layers=layers, topk=-1, score_thr=0.0, **options)
    logger = logging.getLogger("boxam benchmark")
    return BoxAttributor(scene.detector, own, logger=logger)


def explain(own: Any, scene: Scene, chosen: Sequence[int]) -> Any:
    own.choose = lambda predictions: list(chosen)
    return own.explain(scene.inputs, scene.metainfo)[1]


def mixed_boxes(scene: Scene, count: int) -> list[int]:
    """The best detections of all levels in turn, each in a cell of its own."""
    own = attributor(scene, method="gradcam")
    levels: dict[str, dict[tuple, int]] = {}
    for explanation in explain(own, scene, range(len(scene.predict().scores))):
        cells = levels.setdefault(explanation.layer, {})
        cells.setdefault(explanation.cell, explanation.index)
    levels.pop("", None)
    turns = zip(*(list(cells.values())[:count] for cells in levels.values()))
    return [index for turn in turns for index in turn][:count]


def forward_without_channel(scene: Scene, path: str) -> Any:
    """A whole forward with a channel of a layer left out."""

    def without(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[:, 0] = 0
        return output

    handle = scene.detector.get_submodule(path).register_forward_hook(without)
    try:
        return scene.predict()
    finally:
        handle.remove()


# --- the parts -----------------------------------------------------------------


def measure_gradients(scene: Scene, rounds: int) -> list[list[str]]:
    """Explanations of some boxes, in plain forwards."""
    own = attributor(scene, method="boxam")
    chosen = {count: mixed_boxes(scene, count) for count in MOST_FORWARDS}
    jobs: dict[str, Callable[[], Any]] = {"plain": scene.predict}
    for count, boxes in chosen.items():
        jobs[f"{count}"] = partial(explain, own, scene, boxes)
    seconds = take_turns(jobs, rounds)
    rows = []
    for count, goal in MOST_FORWARDS.items():
        ours, plain = seconds[f"{count}"], seconds["plain"]
        forwards = ratio(ours, plain)
        job = f"boxam, {len(chosen[count])} boxes, in plain forwards"
        row = [scene.name, job, shown(ours), shown(plain), f"{forwards:.2f}"]
        rows.append([*row, verdict(forwards, goal, at_most=True)])
    return rows


def measure_ablation(scene: Scene, rounds: int) -> list[list[str]]:
    """Ours and a whole forward per channel."""
    from mmyolo_vis_hooks.attribution.methods import register_method
    from mmyolo_vis_hooks.attribution.perturb import ablationcam

    one_per_level = mixed_boxes(scene, 3)
    per_channel = []

    @register_method("timed_ablationcam", kind="ablation", summary="", formula="")
    def timed(layer: Any) -> Any:
        start = time.perf_counter()
        weights = ablationcam(layer)
        finish(weights.device)
        per_channel.append((time.perf_counter() - start) / weights.shape[1])
        return weights

    rows = []
    for path in scene.ablated:
        gradcam = attributor(scene, [path], method="gradcam")
        found = explain(gradcam, scene, one_per_level)
        chosen = [e.index for e in found if e.maps][-1:]
        own = attributor(scene, [path], method="timed_ablationcam")
        ours = partial(explain, own, scene, chosen)
        theirs = partial(forward_without_channel, scene, path)
        seconds = take_turns({"ours": ours, "theirs": theirs}, rounds)
        channels = per_channel[-rounds:]
        job = f"ablationcam, {path}, times as fast per channel"
        mine = f"{shown(channels)} (all with the forward: {shown(seconds['ours'])})"
        times = ratio(seconds["theirs"], channels)
        row = [scene.name, job, mine, shown(seconds["theirs"]), f"{times:.3g}"]
        rows.append([*row, verdict(times, LEAST_SPEEDUP[path.split(".")[0]])])
    return rows


def measure_import(rounds: int) -> list[list[str]]:
    """Importing the package and MMDetection, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c"]
    jobs = {
        module: partial(
            subprocess.run, [*command, f"import {module}"], check=True, cwd=ROOT
        )
        for module in ("mmyolo_vis_hooks", "mmdet.apis")
    }
    ours, theirs = take_turns(jobs, rounds).values()
    times = ratio(ours, theirs)
    row = ["", "import, in imports of mmdet.apis", shown(ours), shown(theirs)]
    return [[*row, f"{times:.2f}", verdict(times, MOST_IMPORT, at_most=True)]]


# --- entry ---------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS)
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu", help="(cpu), or such as cuda:0")
    parser.add_argument("--rounds", type=int, default=25, help="(25)")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("boxam benchmark").setLevel(logging.ERROR)
    rounds = 3 if args.quick else args.rounds
    few = max(2, rounds // 5)
    rows = measure_import(few) if "import" in args.parts else []
    for name in args.detectors:
        if name == "yolox_nano" and not WEIGHTS.is_file():
            print(f"{name} is left out: its weights are not in {SHARED}")
            continue
        scene = DETECTORS[name](args.device)
        if "gradients" in args.parts:
            rows += measure_gradients(scene, rounds)
        if "ablation" in args.parts:
            rows += measure_ablation(scene, few)
    print_table("Box explanations", COLUMNS, rows, args.device)


if __name__ == "__main__":
    main()
