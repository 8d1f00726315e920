"""Time and memory of box explanations, side by side with the ways of others.

The unit of everything is one plain forward: ``predict`` without gradients, with its
post-processing. All jobs of a table take turns, round after round, and a ratio is the
median of the ratios within the rounds, so that a busy machine disturbs it least.

- ``gradients``: this package's default method for one box and for 20 boxes, of one
  pyramid level and of all; and the way of a whole backward pass per box, through
  the post-processing, to the inputs of the head at all levels.
- ``ablation``: AblationCAM per channel; and the way of a whole forward per channel,
  preprocessing and NMS included, that looks for the box among the new detections.
  How alike the rankings of the channels are is measured against whole forwards that
  are scored as here: at the box's own anchor.
- ``drise``: masks per second, in batches and one forward per mask.
- ``memory``: the peak of each, in a process of its own.

    python tools/benchmarks/boxam.py
    python tools/benchmarks/boxam.py --quick --detectors yolov5_s
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _measure import (
    describe_machine,
    format_bytes,
    format_seconds,
    num_cores,
    peak,
    positive,
    reset_peak,
    warn_if_busy,
)
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MMVIS_SHARED") or ROOT.parent / "shared")
PARTS = ("gradients", "ablation", "drise", "memory")
NUM_BOXES = 20
TARGET_ONE, TARGET_MANY = 1.2, 1.5
TARGET_NECK, TARGET_BACKBONE = 100.0, 5.0
TARGET_RANKING = 0.99
OURS, PEERS = "this package", "the others' way"


@dataclass
class Scene:
    """A detector with an image on which it finds boxes at every level.

    Attributes:
        detector: In eval mode.
        image: ``(3, H, W)`` uint8, of the network's size.
        inputs: ``(1, 3, H, W)``, what the data preprocessor makes of it.
        metainfo: Of its data sample.
        ablated: Layers whose channels are left out, and how much faster than a whole
            forward per channel each shall be.
    """

    detector: Any
    image: Any
    inputs: Any
    metainfo: dict[str, Any]
    ablated: dict[str, float]

    def samples(self, count: int = 1) -> list[Any]:
        from mmdet.structures import DetDataSample

        return [DetDataSample(metainfo=dict(self.metainfo)) for _ in range(count)]

    def predict(self) -> Any:
        """The plain forward; gives the final detections."""
        import torch

        with torch.no_grad():
            (output,) = self.detector(self.inputs, self.samples(), mode="predict")
        return output.pred_instances

    def test_step(self) -> Any:
        """The same from the raw image on."""
        import torch

        data = {"inputs": [self.image], "data_samples": self.samples()}
        with torch.no_grad():
            (output,) = self.detector.test_step(data)
        return output.pred_instances


@dataclass(frozen=True)
class Timing:
    """Seconds of one job in every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, unit: Timing) -> float:
        """Median of the ratios within the rounds."""
        return statistics.median(
            own / other for own, other in zip(self.seconds, unit.seconds)
        )


@dataclass(frozen=True)
class Figure:
    """One line of a table.

    Attributes:
        detector: Name of the detector.
        job: What was measured.
        ours: Text of this package's result.
        peers: Text of the others' result.
        ratio: What is compared with the goal.
        unit: Of the ratio.
        goal: What was promised, None if nothing was.
        at_most: Whether the ratio shall be below the goal, not above.
    """

    detector: str
    job: str
    ours: str
    peers: str
    ratio: float
    unit: str
    goal: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        reached = self.ratio <= self.goal if self.at_most else self.ratio >= self.goal
        sign = "<" if self.at_most else ">="
        return f"{sign} {self.goal:g}: " + ("reached" if reached else "NOT reached")


def take_turns(jobs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Run all jobs in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


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
    config.model.test_cfg.nms.iou_threshold = 0.8  # 20 boxes at every level
    with DefaultScope.overwrite_default_scope("mmyolo"):
        detector = MODELS.build(config.model).eval()
    weights = str(SHARED / "weights" / "yolox_nano_coco.pth")
    load_checkpoint(detector, weights, map_location="cpu", logger="silent")
    photo: Any = cv2.imread(str(SHARED / "data" / "demo.jpg"))
    height, width = photo.shape[:2]
    image = torch.from_numpy(cv2.resize(photo, (size, size))).permute(2, 0, 1)
    layers = {
        "neck.out_convs.1": TARGET_NECK,
        "neck.bottom_up_blocks.1": TARGET_NECK,
        "backbone.stage4": TARGET_BACKBONE,
    }
    return _scene(detector, image, (height, width), layers)


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
    layers = {
        "neck.top_down_layers.1": TARGET_NECK,
        "neck.bottom_up_layers.1": TARGET_NECK,
        "backbone.stage4": TARGET_BACKBONE,
    }
    scene = _scene(detector, image, (size, size), layers)
    _tune(scene)
    return scene


DETECTORS: dict[str, Callable[[int | None], Scene]] = {
    "yolox_nano": yolox_nano,
    "yolov5_s": yolov5_s,
}


def _scene(
    detector: Any, image: Any, original_hw: tuple[int, int], layers: dict[str, float]
) -> Scene:
    height, width = (int(n) for n in image.shape[-2:])
    metainfo = dict(
        img_shape=(height, width),
        batch_input_shape=(height, width),
        ori_shape=original_hw,
        scale_factor=(width / original_hw[1], height / original_hw[0]),
        pad_param=np.zeros(4, np.float32),
        img_id=0,
        img_path="benchmark.jpg",
    )
    scene = Scene(detector, image, None, metainfo, layers)
    data = {"inputs": [image], "data_samples": scene.samples()}
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
        convs = detector.bbox_head.head_module.convs_pred
        # Rarer on fine levels, which have more cells.
        for conv, objectness in zip(convs, (-7.0, -6.0, -2.5)):
            means = torch.tensor([0.0] * 4 + [objectness] + [-10.0] * 80).repeat(3)
            stds = torch.tensor([0.5] * 4 + [2.0] + [2.0] * 80).repeat(3)
            seen: list[Any] = []
            handle = conv.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output)
            )
            detector(scene.inputs, mode="tensor")
            handle.remove()
            values = seen[0][0].flatten(1)
            gain = stds / values.std(dim=1).clamp(min=1e-6)
            conv.weight *= gain[:, None, None, None]
            conv.bias.copy_((conv.bias - values.mean(dim=1)) * gain + means)


# --- this package --------------------------------------------------------------


class Explainer:
    """This package's mapper, for boxes that the benchmark chooses."""

    def __init__(
        self, scene: Scene, layers: Sequence[str] | None = None, **options: Any
    ) -> None:
        from mmyolo_vis_hooks.attribution.attribute import BoxMapOptions, BoxMapper

        modules = dict(scene.detector.named_modules())
        self._scene = scene
        self.chosen: list[int] = []
        self.mapper = BoxMapper(
            scene.detector,
            None if layers is None else {path: modules[path] for path in layers},
            BoxMapOptions(topk=-1, score_thr=0.0, **options),
            logger=logging.getLogger("boxam benchmark"),
        )
        self.mapper.choose = lambda predictions: (  # type: ignore[method-assign]
            self.chosen or list(range(len(predictions.scores)))
        )

    def explain(self, chosen: Sequence[int] = ()) -> Any:
        """Explain these detections; none for all of them."""
        self.chosen = list(chosen)
        return self.mapper.explain(self._scene.inputs, self._scene.metainfo)


def boxes_by_level(scene: Scene) -> dict[str, list[int]]:
    """The best detections of each level, fine levels first, at most 20 of each.

    No two of one cell: the boxes of an untrained detector crowd in a few cells.
    """
    import torch

    from mmyolo_vis_hooks.network.graph import GraphForward, TapPoint
    from mmyolo_vis_hooks.network.state import frozen

    detector = scene.detector
    groups: dict[int, list[int]] = {}
    taken: set[tuple[int, ...]] = set()
    with frozen(detector):
        forward = GraphForward(detector, [TapPoint("neck", detector.neck)])
        graph = forward.run(scene.inputs, scene.metainfo)
        raw = list(graph.head_outputs.values())
        for cells in {output.shape[-2:].numel() for output in raw}:
            groups[cells] = []
        for index, score in enumerate(graph.predictions.scores):
            slopes = torch.autograd.grad(
                score, raw, retain_graph=True, allow_unused=True
            )
            for output, slope in zip(raw, slopes):
                if slope is not None and bool(slope.any()):
                    level = output.shape[-2:].numel()
                    cell = (level, *slope.nonzero()[0, -2:].tolist())
                    if len(groups[level]) < NUM_BOXES and cell not in taken:
                        groups[level].append(index)
                    taken.add(cell)
                    break
            if all(len(found) == NUM_BOXES for found in groups.values()):
                break
    ordered = [groups[cells] for cells in sorted(groups, reverse=True)]
    return {f"P{3 + i}": found for i, found in enumerate(ordered) if found}


def choices(scene: Scene) -> dict[str, list[int]]:
    """The boxes that are explained together, at most 20, by level and mixed."""
    levels = boxes_by_level(scene)
    mixed = [index for share in zip(*levels.values()) for index in share]
    return {**levels, "all levels": mixed[:NUM_BOXES]}


@dataclass
class AblationSpy:
    """Seconds and weights of the ablation within the mapper's calls."""

    seconds: list[float] = field(default_factory=list)
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        from mmyolo_vis_hooks.attribution import attribute as box_mapper

        ablate, weigh = box_mapper.BoxMapper._ablated_maps, box_mapper.weigh_channels

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return ablate(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - start)

        def seen(maps: Any, weights: np.ndarray, **kwargs: Any) -> Any:
            self.weights = np.array(weights)
            return weigh(maps, weights, **kwargs)

        with (
            mock.patch.object(box_mapper.BoxMapper, "_ablated_maps", timed),
            mock.patch.object(box_mapper, "weigh_channels", seen),
        ):
            yield


# --- the others' way -----------------------------------------------------------


class WholeBackward:
    """A graph from the head's inputs on, and a backward pass per box over all of it."""

    def __init__(self, scene: Scene) -> None:
        from mmyolo_vis_hooks.network.graph import GraphForward, TapPoint

        self._scene = scene
        self._forward = GraphForward(
            scene.detector, [TapPoint("neck", scene.detector.neck)]
        )

    def explain(self, chosen: Sequence[int]) -> list[Any]:
        import torch

        from mmyolo_vis_hooks.attribution.methods import weigh

        # Not `frozen`, whose time is ours.
        parameters = [p for p in self._scene.detector.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad = False
        try:
            graph = self._forward.run(self._scene.inputs, self._scene.metainfo)
            taps = list(graph.taps.values())
            found = []
            for index in chosen:
                gradients = torch.autograd.grad(
                    graph.predictions.scores[index],
                    taps,
                    retain_graph=True,
                    allow_unused=True,
                )
                found.append(
                    [
                        weigh("layercam", tap.detach(), gradient)
                        for tap, gradient in zip(taps, gradients)
                        if gradient is not None
                    ]
                )
        finally:
            for parameter in parameters:
                parameter.requires_grad = True
        return found


class WholeForwards:
    """A whole forward per channel, from the raw image to the matched detection."""

    def __init__(self, scene: Scene, path: str, box: int) -> None:
        self._scene = scene
        self._module = dict(scene.detector.named_modules())[path]
        self.activation = recorded_output(scene, self._module)
        detections = scene.predict()
        self._box = detections.bboxes[box : box + 1].detach().clone()
        self._label = int(detections.labels[box])
        self._next = 0

    def next_score(self) -> float:
        """The score without the channel after the last one."""
        self._next += 1
        return self.score_without(self._next % self.activation.shape[1])

    def score_without(self, channel: int) -> float:
        """IoU and score of the best match of the box, 0 if there is none."""
        import torch
        from torchvision.ops import box_iou

        ablated = self.activation.clone()
        lowest = ablated.min()
        ablated[:, channel] = 0.0 if lowest == 0 else lowest - 1e7
        with (
            torch.no_grad(),
            mock.patch.object(self._module, "forward", return_value=ablated),
        ):
            detections = self._scene.test_step()
        if not len(detections.scores):
            return 0.0
        overlaps = box_iou(self._box, detections.bboxes)[0]
        best = int(overlaps.argmax())
        if overlaps[best] <= 0.5 or int(detections.labels[best]) != self._label:
            return 0.0
        return float(overlaps[best] + detections.scores[best])


def recorded_output(scene: Scene, module: Any) -> Any:
    outputs: list[Any] = []
    handle = module.register_forward_hook(
        lambda module, args, output: outputs.append(output.detach().clone())
    )
    scene.predict()
    handle.remove()
    return outputs[0]


def weights_at_anchor(scene: Scene, path: str, box: int) -> np.ndarray:
    """Share of its score that a box loses without each channel, by whole forwards.

    The score is the product of the sigmoids of the raw outputs on which it depends:
    class and objectness at the box's anchor.
    """
    import torch

    from mmyolo_vis_hooks.network.graph import GraphForward, TapPoint
    from mmyolo_vis_hooks.network.state import frozen

    detector = scene.detector
    with frozen(detector):
        forward = GraphForward(detector, [TapPoint("neck", detector.neck)])
        graph = forward.run(scene.inputs, scene.metainfo)
        raw = graph.head_outputs
        slopes = torch.autograd.grad(
            graph.predictions.scores[box], list(raw.values()), allow_unused=True
        )
        places = {
            key: tuple((slope != 0).nonzero()[0].tolist())
            for key, slope in zip(raw, slopes)
            if slope is not None and bool((slope != 0).any())
        }

    def score() -> float:
        with torch.no_grad():
            outputs = detector(scene.inputs, mode="tensor")
        product = 1.0
        for key, place in places.items():
            value = outputs
            for position in key.output_index:
                value = value[position]
            product *= float(value[place].double().sigmoid())
        return product

    module = dict(detector.named_modules())[path]
    activation = recorded_output(scene, module)
    before = score()
    weights = []
    for channel in range(activation.shape[1]):
        ablated = activation.clone()
        ablated[:, channel] = 0
        with mock.patch.object(module, "forward", return_value=ablated):
            weights.append((before - score()) / before)
    return np.array(weights)


# --- the parts -----------------------------------------------------------------


def measure_gradients(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Ours and a whole backward per box, in plain forwards."""
    ours, peers = Explainer(scene, method="boxam"), WholeBackward(scene)
    jobs: dict[str, Callable[[], Any]] = {"plain": scene.predict}
    for level, found in choices(scene).items():
        for chosen in (found[:1], found):
            job = f"{len(chosen)} {'box' if len(chosen) == 1 else 'boxes'}, {level}"
            jobs[f"ours {job}"] = partial(ours.explain, chosen)
            jobs[f"peers {job}"] = partial(peers.explain, chosen)
    timings = take_turns(jobs, rounds)
    plain = timings.pop("plain")
    figures = [
        Figure(name, "plain forward", format_seconds(plain.median), "", 1.0, "forwards")
    ]
    for job in (key[5:] for key in timings if key.startswith("ours ")):
        mine, theirs = timings[f"ours {job}"], timings[f"peers {job}"]
        figures.append(
            Figure(
                name,
                f"boxam, {job}",
                f"{format_seconds(mine.median)}",
                f"{format_seconds(theirs.median)} ({theirs.over(plain):.2f} forwards)",
                mine.over(plain),
                "forwards",
                TARGET_ONE if job.startswith("1 ") else TARGET_MANY,
                at_most=True,
            )
        )
    return figures


def measure_ablation(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Ours and a whole forward per channel."""
    box = choices(scene)["all levels"][2]  # of the coarsest level, below the others
    figures = []
    for path, goal in [("", TARGET_NECK), *scene.ablated.items()]:
        explainer = Explainer(scene, [path] if path else None, method="ablationcam")
        spy = AblationSpy()
        with spy.watching():
            _, (explanation,) = explainer.explain([box])
            if not spy.seconds:
                continue  # no influence on this box
            whole: Callable[[], Any] = scene.test_step
            if path:
                whole = WholeForwards(scene, path, box).next_score
            spy.seconds.clear()
            jobs: dict[str, Callable[[], Any]] = {
                "ours": partial(explainer.explain, [box]),
                "peers": whole,
            }
            timings = take_turns(jobs, rounds)
            mine = Timing(tuple(spy.seconds[1:]))
        count = spy.weights.shape[-1]
        per_channel = Timing(tuple(seconds / count for seconds in mine.seconds))
        title = explanation.maps[0].layer if explanation.maps else path
        figures.append(
            Figure(
                name,
                f"ablationcam, {title}, {count} channels, per channel",
                f"{format_seconds(per_channel.median)} (all with forward: "
                f"{format_seconds(timings['ours'].median)})",
                format_seconds(timings["peers"].median),
                timings["peers"].over(per_channel),
                "x faster",
                goal,
            )
        )
        if path:
            from mmyolo_vis_hooks.metrics.pointing_game import spearman

            expected = weights_at_anchor(scene, path, box)
            figures.append(
                Figure(
                    name,
                    f"ablationcam, {title}, ranking of the channels",
                    "",
                    "",
                    spearman(spy.weights[0], expected),
                    "Spearman",
                    TARGET_RANKING,
                )
            )
    return figures


def measure_drise(name: str, scene: Scene, rounds: int) -> list[Figure]:
    """Masks in batches, and one forward per mask."""
    masks = 16
    batched = Explainer(scene, method="drise", num_masks=masks)
    single = Explainer(scene, method="drise", num_masks=masks, batch_size=1)
    timings = take_turns(
        {"ours": lambda: batched.explain([0]), "peers": lambda: single.explain([0])},
        rounds,
    )
    return [
        Figure(
            name,
            f"drise, {masks} masks",
            f"{masks / timings['ours'].median:.1f} masks/s",
            f"{masks / timings['peers'].median:.1f} masks/s",
            timings["peers"].over(timings["ours"]),
            "x faster",
        )
    ]


MEMORY_JOBS = ("plain forward", "boxam, 20 boxes", "ablationcam")


def measure_memory(name: str, args: argparse.Namespace) -> list[Figure]:
    """Peaks of ours and the others, each in a process of its own."""
    figures = []
    for job in MEMORY_JOBS:
        found = {side: run_child(name, job, side, args) for side in (OURS, PEERS)}
        figures.append(
            Figure(
                name,
                f"peak memory, {job}",
                format_bytes(found[OURS]),
                format_bytes(found[PEERS]),
                found[OURS] / max(1, found[PEERS]),
                "of theirs",
            )
        )
    return figures


def run_child(name: str, job: str, side: str, args: argparse.Namespace) -> int:
    request = dict(
        detector=name, job=job, side=side, threads=args.threads, size=args.size
    )
    completed = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode != 0:
        raise SystemExit(f"The child for {job} failed:\n{completed.stderr}")
    return int(completed.stdout.splitlines()[-1])


def child_main(request: dict[str, Any]) -> None:
    """Entry of a child: prints the peak beyond the detector and a plain forward."""
    prepare(request["threads"])
    scene = DETECTORS[request["detector"]](request["size"])
    found = choices(scene)["all levels"]
    job, ours = request["job"], request["side"] == OURS
    run: Callable[[], Any] = scene.predict
    if job == "boxam, 20 boxes":
        explainer, peers = Explainer(scene, method="boxam"), WholeBackward(scene)
        # What is found out on the first image stays; it is not part of the peak.
        explainer.explain(found)
        run = partial((explainer if ours else peers).explain, found)
    elif job == "ablationcam":
        path = next(iter(scene.ablated))
        own = Explainer(scene, [path], method="ablationcam")
        own.explain(found[1:2])
        whole = WholeForwards(scene, path, found[1])
        run = partial(own.explain, found[1:2]) if ours else whole.next_score
    # What earlier forwards have freed would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    run()
    print(peak() - before)


# --- entry ---------------------------------------------------------------------


def prepare(threads: int) -> None:
    import cv2
    import torch

    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore")
    os.environ.setdefault("MMVIS_SHARED", str(SHARED))
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    logging.getLogger("boxam benchmark").setLevel(logging.ERROR)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--detectors", nargs="+", choices=[*DETECTORS], default=[*DETECTORS]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--size", type=positive, help="side of the input; default: the detector's"
    )
    parser.add_argument("--rounds", type=positive, default=25)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument(
        "--threads",
        type=positive,
        default=num_cores(),
        help="of torch; a run has one per core",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child_main(json.loads(sys.argv[2]))
        return 0
    args = parse_args()
    console = Console()
    if not sys.platform.startswith("linux"):
        console.print("This benchmark reads /proc, which only Linux has.")
        return 2
    prepare(args.threads)
    warn_if_busy(console)
    rounds = 3 if args.quick else args.rounds
    figures: list[Figure] = []
    for name in args.detectors:
        if name == "yolox_nano" and not (SHARED / "weights").is_dir():
            console.print(f"{name} is left out: its weights are not in {SHARED}.")
            continue
        scene = DETECTORS[name](args.size)
        few = max(2, rounds // 5)
        parts: dict[str, Callable[[], list[Figure]]] = {
            "gradients": partial(measure_gradients, name, scene, rounds),
            "ablation": partial(measure_ablation, name, scene, few),
            "drise": partial(measure_drise, name, scene, few),
            "memory": partial(measure_memory, name, args),
        }
        for part in args.parts:
            with console.status(f"{name}: {part}"):
                figures += parts[part]()
    # A pipe has no width of its own; the table needs about this much.
    console = console if console.is_terminal else Console(width=160)
    console.print(as_table(figures, args, rounds))
    if args.json:
        args.json.write_text(json.dumps([asdict(f) for f in figures], indent=2))
    return 0


def as_table(figures: Sequence[Figure], args: argparse.Namespace, rounds: int) -> Table:
    table = Table(
        title="Explanations of boxes",
        caption=describe_machine(args.threads)
        + f"; median of {rounds} rounds, of a fifth for ablation and "
        "masks; memory beyond the process that holds the "
        "detector",
    )
    for title in ("detector", "job"):
        table.add_column(title)
    for title in (OURS, PEERS, "ratio"):
        table.add_column(title, justify="right")
    table.add_column("goal")
    for figure in figures:
        ratio = f"{figure.ratio:.0f}" if figure.ratio >= 20 else f"{figure.ratio:.3g}"
        table.add_row(
            figure.detector,
            figure.job,
            figure.ours,
            figure.peers,
            f"{ratio} {figure.unit}",
            figure.verdict,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
