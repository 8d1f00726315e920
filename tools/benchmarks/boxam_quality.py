"""How well the maps of box explanations lie on their objects, on real images.

Detections of YOLOX-nano on the first 128 images of COCO train2017 that match an
object (score >= 0.3, IoU >= 0.5, at most 3 per image) are explained by each method
at the image's resolution. Shown are the pointing game (share of maps whose peak lies
in the object) and the energy (share of the map that does), for the true box and the
true mask, also for boxes below 64 pixels; beside them what a map gets that looks at
nothing: the box itself, and a Gaussian drawn on it.

``--sanity`` adds the check of Adebayo et al. 2018, "Sanity checks for saliency maps":
the rank correlation between the map of a class logit and the map at the same anchor
after the weights were made random. A map that hardly changes shows edges, not the
detector.

    python tools/benchmarks/boxam_quality.py
    python tools/benchmarks/boxam_quality.py --methods boxam odam --sanity
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from _measure import CONFIG, SHARED, WEIGHTS, print_table
from mmengine.dataset import pseudo_collate
from pycocotools.coco import COCO
from rich.progress import track
from torchvision.ops import box_iou

from mmyolo_vis_hooks import explain, load
from mmyolo_vis_hooks.attribution.anchors import locate_anchors
from mmyolo_vis_hooks.attribution.methods import METHODS, weigh
from mmyolo_vis_hooks.attribution.targets import class_logits
from mmyolo_vis_hooks.detector import build_pipeline, read_dataset
from mmyolo_vis_hooks.metrics.pointing_game import (
    energy_inside,
    pointing_hit,
    spearman,
)
from mmyolo_vis_hooks.network.graph import GraphForward, HeadKey, TapPoint
from mmyolo_vis_hooks.network.state import frozen

DATA = SHARED / "data" / "coco128"
SLOW = ("ablationcam", "scorecam", "drise", "eigengradcam", "kpcacam", "shapleycam")
SMALL_BOX = 64
Object = tuple[str, Any, np.ndarray]
"""Class, ``(4,)`` xyxy and ``(H, W)`` mask."""


def images(count: int) -> Iterator[tuple[str, list[Object]]]:
    """Path and objects, but for crowds, of each image."""
    coco = COCO(DATA / "annotations" / "instances_train2017.json")
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    for info in track(list(coco.imgs.values())[:count], transient=True):
        objects = []
        for ann in coco.loadAnns(coco.getAnnIds(imgIds=info["id"], iscrowd=False)):
            x, y, w, h = ann["bbox"]
            if w > 1 and h > 1:
                box, mask = torch.tensor([x, y, x + w, y + h]), coco.annToMask(ann)
                objects.append((names[ann["category_id"]], box, mask.astype(bool)))
        yield str(DATA / "train2017" / info["file_name"]), objects


def matches(result: Sequence[Any], objects: list[Object]) -> Iterator[tuple[Any, int]]:
    """The best detections that match an object of their class, each object once."""
    free = dict(enumerate(objects))
    for found in sorted(result, key=lambda found: -found.score):
        box = torch.as_tensor(found.box_xyxy)[None]
        overlaps = {
            number: float(box_iou(box, own[None]))
            for number, (name, own, _) in free.items()
            if name == found.class_name
        }
        best = max(overlaps, key=lambda number: overlaps[number], default=None)
        if best is not None and overlaps[best] >= 0.5:
            del free[best]
            yield found, best
        if len(objects) - len(free) == 3:
            return


def evenly(box_xyxy: Any, image_hw: Sequence[int]) -> np.ndarray:
    """1 in a box, 0 elsewhere."""
    ys, xs = (np.arange(size) + 0.5 for size in image_hw)
    x1, y1, x2, y2 = map(float, box_xyxy)
    region = ((ys >= y1) & (ys <= y2))[:, None] & ((xs >= x1) & (xs <= x2))
    return region.astype(np.float32)


def gaussian(box_xyxy: Any, image_hw: Sequence[int]) -> np.ndarray:
    """A Gaussian whose standard deviations are quarters of a box's sides."""
    ys, xs = (np.arange(size) + 0.5 for size in image_hw)
    x1, y1, x2, y2 = map(float, box_xyxy)
    along_y = np.exp(-(((ys - (y1 + y2) / 2) / ((y2 - y1) / 4)) ** 2) / 2)
    along_x = np.exp(-(((xs - (x1 + x2) / 2) / ((x2 - x1) / 4)) ** 2) / 2)
    return along_y[:, None] * along_x


def scores_of(saliency: np.ndarray, box: Any, mask: np.ndarray) -> list[float]:
    """Pointing and energy, each in box and mask, and whether the map is blank."""
    if not saliency.max() > 0:
        return [0, 0, 0, 0, 1]
    areas = evenly(box, mask.shape) > 0, mask
    measures = (pointing_hit, energy_inside)
    return [*(float(m(saliency, area)) for m in measures for area in areas), 0]


def measure_methods(
    detector: Any, methods: Sequence[str], num_images: int
) -> list[list[str]]:
    """The rows of the table."""
    ways: dict[str, dict[str, Any]] = {name: dict(method=name) for name in methods}
    one_layer = dict(method="gradcam", target_layers=["neck.out_convs[2]"])
    ways["gradcam at neck.out_convs[2] only"] = one_layer
    options = dict(
        topk=-1, score_thr=0.3, alignment="letterbox", num_masks=600, signed=False
    )
    scores: dict[str, list[list[float]]] = defaultdict(list)
    small: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for path, objects in images(num_images):
        for name, way in ways.items():
            start = time.perf_counter()
            result = explain(detector, path, **options, **way)
            spent = (time.perf_counter() - start) / max(1, len(result))
            for found, number in matches(result, objects):
                _, box, mask = objects[number]
                maps = {name: found.saliency}
                if name == methods[0]:
                    maps["the box"] = evenly(found.box_xyxy, mask.shape)
                    maps["a Gaussian on the box"] = gaussian(found.box_xyxy, mask.shape)
                x1, y1, x2, y2 = found.box_xyxy
                for key, saliency in maps.items():
                    scores[key].append(scores_of(saliency, box, mask))
                    if (x2 - x1) * (y2 - y1) < SMALL_BOX**2:
                        small[key].append(scores[key][-1][3])
                seconds[name].append(spent)
    rows = []
    for name, own in scores.items():
        *means, blank = np.asarray(own).mean(axis=0)
        cells = [f"{value:.3f}" for value in (*means, np.mean(small[name]))]
        ms = f"{np.mean(seconds[name]) * 1e3:.1f}" if seconds[name] else ""
        rows.append([name, *cells, f"{blank:.0%}", ms, str(len(own))])
    return rows


def randomised(detector: Any, part: str) -> Any:
    """A copy whose weights below ``part`` are drawn anew."""
    torch.manual_seed(0)
    other = copy.deepcopy(detector)
    module = other.get_submodule(part) if part else other
    for child in module.modules():
        if isinstance(child, torch.nn.Conv2d):
            child.reset_parameters()
    return other


def sanity(detector: Any, num_images: int) -> Iterator[list[str]]:
    """Rank correlations of maps before and after weights were made random."""
    others = {
        "the same weights": detector,
        "random head": randomised(detector, "bbox_head"),
        "all random": randomised(detector, ""),
    }
    pipeline = build_pipeline(detector.cfg, read_dataset(detector.cfg))
    found: dict[str, list[float]] = defaultdict(list)
    for path, _ in images(num_images):
        data = pseudo_collate([pipeline.pack(pipeline.load(path))])
        batch = detector.data_preprocessor(data, False)
        inputs, metainfo = batch["inputs"], dict(batch["data_samples"][0].metainfo)
        metainfo.setdefault("batch_input_shape", tuple(inputs.shape[-2:]))
        first: list[np.ndarray] = []
        places: list[Any] = []
        for name, other in others.items():
            with frozen(other):
                forward = GraphForward(other, [TapPoint("neck", other.neck)])
                graph = forward.run(inputs, metainfo)
                if other is detector:
                    scores = graph.predictions.scores
                    kept = (scores > 0.3).nonzero()[:3, 0].tolist()
                    if not kept:
                        break
                    labels = graph.predictions.labels[kept].tolist()
                    raw: Any = dict(graph.head_outputs)
                    anchors = locate_anchors(scores[kept], labels, raw)
                    places = [class_logits(a)[0] for a in anchors if a.entries]
                maps = []
                for key, place in places:
                    output = graph.head_outputs[HeadKey(*key)][place]
                    tap = list(graph.taps.values())[key[2][-1]]
                    (slope,) = torch.autograd.grad(output, tap, retain_graph=True)
                    maps.append(weigh("boxam", tap.detach(), slope)[0].numpy())
            first = first or maps
            pairs = zip(first, maps)
            found[name] += [spearman(a[b + a > 0], b[b + a > 0]) for a, b in pairs]
    for name, values in found.items():
        error = np.std(values) / len(values) ** 0.5
        yield [name, f"{np.mean(values):.3f}", f"{error:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    # The detector has no decoder.
    quick = [name for name in METHODS if name not in {*SLOW, "attention"}]
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=quick, metavar="NAME"
    )
    parser.add_argument("--images", type=int, default=128, help="(128)")
    parser.add_argument("--sanity", action="store_true", help="also randomise weights")
    args = parser.parse_args()
    if not WEIGHTS.is_file() or not DATA.is_dir():
        print(f"Real images and weights are not in {SHARED}; MMVIS_SHARED names them")
        return
    logging.getLogger("mmyolo_vis_hooks").setLevel(logging.ERROR)
    detector = load(CONFIG, WEIGHTS, device="cpu")
    columns = ["map", "pointing, box", "mask", "energy, box", "mask", "mask, small"]
    columns += ["blank", "ms per box", "boxes"]
    rows = measure_methods(detector, args.methods, args.images)
    print_table("Maps on their objects", columns, rows)
    if args.sanity:
        columns = ["weights", "rank correlation", "standard error"]
        print_table(
            "The trained detector's map", columns, sanity(detector, args.images)
        )


if __name__ == "__main__":
    main()
