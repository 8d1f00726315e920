"""Time of box explanations, side by side with the ways of others.

The unit is one plain forward: ``predict`` without gradients, with its post-processing.
All jobs of a table take turns, round after round, and a ratio is the median of the
ratios within the rounds, so that a busy machine disturbs it least.

- ``gradients``: this package's default method for one, ten and thirty boxes; and the
  way of a backward pass per box, through the post-processing, to the head's inputs.
- ``ablation``: AblationCAM per channel; and the way of a whole forward per channel, NMS
  included. What is recorded once per image is not counted, but shown.
- ``drise``: masks per second at the boxes' own anchors; and whole forwards with NMS.
- ``import``: of the package, and of MMDetection, in processes of their own.

    python tools/benchmarks/boxam.py
    python tools/benchmarks/boxam.py --quick --detectors yolov5_s
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _measure import describe_machine, num_cores, positive, warn_if_busy
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MMVIS_SHARED") or ROOT.parent / "shared")
PARTS = ("gradients", "ablation", "drise", "import")
MOST_FORWARDS = {1: 1.2, 10: 1.5, 30: 2.0}
LEAST_SPEEDUP = {"neck": 100.0, "backbone": 3.0}
MOST_IMPORT = 1.5
NUM_MASKS = 64


@dataclass
class Scene:
    """A detector with an image on which it finds boxes at every level."""

    detector: Any
    inputs: Any
    metainfo: dict[str, Any]
    ablated: tuple[str, ...]

    def predict(self) -> Any:
        """The plain forward; gives the final detections."""
        import torch

        with torch.no_grad():
            (output,) = self.detector(self.inputs, [self.sample()], mode="predict")
        return output.pred_instances

    def sample(self) -> Any:
        from mmdet.structures import DetDataSample

        return DetDataSample(metainfo=dict(self.metainfo))


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``at_most`` says on which side of the goal it is good."""

    detector: str
    job: str
    ours: str
    theirs: str
    ratio: float
    goal: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        reached = self.ratio <= self.goal if self.at_most else self.ratio >= self.goal
        sign = "<=" if self.at_most else ">="
        return f"{sign} {self.goal:g}: " + ("reached" if reached else "NOT reached")


def take_turns(
    jobs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of all jobs, run in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Sequence[float], unit: Sequence[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(own, unit))


def shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.3g} ms"


# --- detectors -----------------------------------------------------------------


def yolox_nano(size: int | None) -> Scene:
    """The trained YOLOX-nano on a photograph, 416x416."""
    import cv2
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope
    from mmengine.runner import load_checkpoint

    import mmyolo_vis_hooks  # noqa: F401  # loads checkpoints safely

    size = size or 416
    config = Config.fromfile(ROOT / "configs" / "coco128" / "yolox_nano_coco128.py")

    with DefaultScope.overwrite_default_scope("mmyolo"):
        detector = MODELS.build(config.model).eval()
    weights = str(SHARED / "weights" / "yolox_nano_coco.pth")
    load_checkpoint(detector, weights, map_location="cpu", logger="silent")
    photo: Any = cv2.imread(str(SHARED / "data" / "demo.jpg"))
    image = torch.from_numpy(cv2.resize(photo, (size, size))).permute(2, 0, 1)
    layers = ("neck.out_convs.2", "neck.bottom_up_blocks.1", "backbone.stage4")
    return _scene(detector, image, photo.shape[:2], layers)


def yolov5_s(size: int | None) -> Scene:
    """YOLOv5-s at 640x640, untrained, with logits like those of a trained one."""
    import torch
    import torch.nn.functional as F
    from mmengine.hub import get_config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope
    from mmyolo.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    size = size or 640
    config = get_config("mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope("mmyolo"):
            detector = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        coarse = torch.rand(1, 3, size // 16, size // 16)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic")[0]
    image = (smooth.clamp(0, 1) * 255).to(torch.uint8)
    layers = ("neck.bottom_up_layers.1", "backbone.stage4")
    scene = _scene(detector, image, (size, size), layers)
    _tune(scene)
    return scene


DETECTORS: dict[str, Callable[[int | None], Scene]] = {
    "yolox_nano": yolox_nano,
    "yolov5_s": yolov5_s,
}


def _scene(
    detector: Any, image: Any, original_hw: Sequence[int], layers: tuple[str, ...]
) -> Scene:
    height, width = (int(n) for n in image.shape[-2:])
    metainfo = dict(
        img_shape=(height, width),
        batch_input_shape=(height, width),
        ori_shape=tuple(original_hw),
        scale_factor=(width / original_hw[1], height / original_hw[0]),
        pad_param=np.zeros(4, np.float32),
        img_id=0,
        img_path="benchmark.jpg",
    )
    scene = Scene(detector, None, metainfo, layers)
    data = {"inputs": [image], "data_samples": [scene.sample()]}
    scene.inputs = detector.data_preprocessor(data)["inputs"]
    return scene


def _tune(scene: Scene) -> None:
    """Give an untrained YOLOv5 norms that know the image, and rare, clear boxes."""
    import torch
    from torch import nn

    detector = scene.detector
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.train().momentum = 1.0
        detector(scene.inputs, mode="tensor")
        for norm, momentum in zip(norms, momenta):
            norm.eval().momentum = momentum
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


def backward_per_box(scene: Scene, chosen: Sequence[int]) -> list[Any]:
    """A graph from the head's inputs on, and a backward pass per box over all of it."""
    import torch

    from mmyolo_vis_hooks.network.graph import GraphForward, TapPoint

    detector = scene.detector.requires_grad_(False)
    forward = GraphForward(detector, [TapPoint("neck", detector.neck)])
    graph = forward.run(scene.inputs, scene.metainfo)
    taps, scores = list(graph.taps.values()), graph.predictions.scores
    found = []
    for k in chosen:
        slopes = torch.autograd.grad(
            scores[k], taps, retain_graph=True, allow_unused=True
        )
        pairs = [(t.detach(), g) for t, g in zip(taps, slopes) if g is not None]
        found.append([(g.relu() * a).sum(1).relu().numpy() for a, g in pairs])
    return found


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


def measure_gradients(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Ours and a whole backward per box, in plain forwards."""
    own = attributor(scene, method="boxam")
    jobs: dict[str, Callable[[], Any]] = {"plain": scene.predict}
    counts = {}
    for count in MOST_FORWARDS:
        chosen = mixed_boxes(scene, count)
        counts[count] = len(chosen)
        jobs[f"ours {count}"] = partial(explain, own, scene, chosen)
        jobs[f"theirs {count}"] = partial(backward_per_box, scene, chosen)
    seconds = take_turns(jobs, rounds)
    plain = seconds["plain"]
    figures = [Figure(name, "plain forward", shown(plain), "", 1.0)]
    for count, goal in MOST_FORWARDS.items():
        ours, theirs = seconds[f"ours {count}"], seconds[f"theirs {count}"]
        job = f"boxam, {counts[count]} boxes, in forwards"
        other = f"{shown(theirs)} ({ratio(theirs, plain):.2f} forwards)"
        figures.append(
            Figure(name, job, shown(ours), other, ratio(ours, plain), goal, True)
        )
    return figures


def measure_ablation(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Ours and a whole forward per channel."""
    from mmyolo_vis_hooks.attribution.methods import register_method
    from mmyolo_vis_hooks.attribution.perturb import ablationcam

    one_per_level = mixed_boxes(scene, 3)
    per_channel = []

    @register_method("timed_ablationcam", kind="ablation", summary="", formula="")
    def timed(layer: Any) -> Any:
        start = time.perf_counter()
        weights = ablationcam(layer)
        per_channel.append((time.perf_counter() - start) / weights.shape[1])
        return weights

    figures = []
    for path in scene.ablated:
        found = explain(
            attributor(scene, [path], method="gradcam"), scene, one_per_level
        )
        chosen = [e.index for e in found if e.maps][-1:]
        own = attributor(scene, [path], method="timed_ablationcam")
        ours = partial(explain, own, scene, chosen)
        theirs = partial(forward_without_channel, scene, path)
        seconds = take_turns({"ours": ours, "theirs": theirs}, rounds)
        channels = per_channel[-rounds:]
        job = f"ablationcam, {path}, times as fast per channel"
        mine = f"{shown(channels)} (all with the forward: {shown(seconds['ours'])})"
        times = ratio(seconds["theirs"], channels)
        goal = LEAST_SPEEDUP[path.split(".")[0]]
        figures.append(Figure(name, job, mine, shown(seconds["theirs"]), times, goal))
    return figures


def measure_drise(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Ours and whole forwards with post-processing, for ten boxes."""
    own = attributor(scene, method="drise", num_masks=NUM_MASKS)
    chosen = mixed_boxes(scene, 10)

    def whole() -> None:
        for _ in range(NUM_MASKS):
            scene.predict()

    ours = partial(explain, own, scene, chosen)
    seconds = take_turns({"ours": ours, "theirs": whole}, rounds)
    mine, other = (
        f"{NUM_MASKS / statistics.median(s):.1f} masks/s" for s in seconds.values()
    )
    times = ratio(seconds["theirs"], seconds["ours"])
    return [Figure(name, "drise, 10 boxes, times as fast", mine, other, times)]


def measure_import(rounds: int) -> list[Figure]:
    """Importing the package and MMDetection, each in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c"]
    jobs = {
        module: partial(
            subprocess.run, [*command, f"import {module}"], check=True, cwd=ROOT
        )
        for module in ("mmyolo_vis_hooks", "mmdet.apis")
    }
    seconds = take_turns(jobs, rounds)
    ours, theirs = seconds.values()
    times = ratio(ours, theirs)
    job = "import, in imports of mmdet.apis"
    return [Figure("", job, shown(ours), shown(theirs), times, MOST_IMPORT, True)]


# --- entry ---------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--detectors", nargs="+", choices=[*DETECTORS], default=[*DETECTORS]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=positive, help="side of the input")
    parser.add_argument("--rounds", type=positive, default=25)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--threads", type=positive, default=num_cores())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    import torch

    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore")
    os.environ.setdefault("MMVIS_SHARED", str(SHARED))
    torch.set_num_threads(args.threads)
    logging.getLogger("boxam benchmark").setLevel(logging.ERROR)
    console = Console(width=160)
    warn_if_busy(console)
    rounds = 3 if args.quick else args.rounds
    few = max(2, rounds // 5)
    figures = measure_import(few) if "import" in args.parts else []
    parts: dict[str, Callable[[str, Scene, int], list[Figure]]] = {
        "gradients": measure_gradients,
        "ablation": measure_ablation,
        "drise": measure_drise,
    }
    for name in args.detectors:
        if name == "yolox_nano" and not (SHARED / "weights").is_dir():
            console.print(f"{name} is left out: its weights are not in {SHARED}.")
            continue
        scene = DETECTORS[name](args.size)
        for part in (part for part in args.parts if part in parts):
            figures += parts[part](name, scene, rounds if part == "gradients" else few)
    table = Table(title="Box explanations", caption=describe_machine(args.threads))
    for title in (
        "detector",
        "job",
        "this package",
        "the others' way",
        "ratio",
        "goal",
    ):
        table.add_column(title)
    for f in figures:
        row = (f.detector, f.job, f.ours, f.theirs, f"{f.ratio:.3g}", f.verdict)
        table.add_row(*row)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in figures], indent=2))


if __name__ == "__main__":
    main()
