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
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmyolo_vis_hooks.attribution.anchors import locate_anchors  # noqa: E402
from mmyolo_vis_hooks.attribution.attribute import BoxAttributor  # noqa: E402
from mmyolo_vis_hooks.attribution.methods import METHODS, weigh  # noqa: E402
from mmyolo_vis_hooks.attribution.saliency import box_saliency  # noqa: E402
from mmyolo_vis_hooks.attribution.targets import class_logits  # noqa: E402
from mmyolo_vis_hooks.geometry import FrameTransform  # noqa: E402
from mmyolo_vis_hooks.metrics.pointing_game import (  # noqa: E402
    energy_inside,
    pointing_hit,
    spearman,
)
from mmyolo_vis_hooks.network.graph import (  # noqa: E402
    GraphForward,
    HeadKey,
    TapPoint,
)
from mmyolo_vis_hooks.network.state import frozen  # noqa: E402
from mmyolo_vis_hooks.options import BoxAMOptions  # noqa: E402

CONFIG = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"
SLOW = ("ablationcam", "scorecam", "drise", "eigengradcam", "kpcacam", "shapleycam")
SMALL_BOX = 64
FIXED_LAYER = "neck[2] only"


@dataclass(frozen=True)
class Found:
    """A detection that matches an object.

    Attributes:
        index: Of the detection.
        box_xyxy: Predicted box, pixels of the image.
        true_box: ``(H, W)`` bool.
        true_mask: ``(H, W)`` bool.
    """

    index: int
    box_xyxy: np.ndarray
    true_box: np.ndarray
    true_mask: np.ndarray


def shared_folder() -> Path:
    return Path(os.environ.get("MMVIS_SHARED", ROOT.parent / "shared"))


def build(config: Config) -> tuple[Any, Any]:
    """The detector with its weights, and the data set with its test pipeline."""
    init_default_scope("mmyolo")
    detector = MODELS.build(config.model)
    load_checkpoint(
        detector,
        str(shared_folder() / "weights" / "yolox_nano_coco.pth"),
        map_location="cpu",
        logger="silent",
    )
    dataset = DATASETS.build(config.test_dataloader.dataset)
    return detector.eval(), dataset


def inputs_of(detector: Any, dataset: Any, index: int) -> tuple[torch.Tensor, dict]:
    data = dataset[index]
    batch = detector.data_preprocessor(
        dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]), False
    )
    metainfo = dict(batch["data_samples"][0].metainfo)
    metainfo.setdefault("batch_input_shape", tuple(batch["inputs"].shape[-2:]))
    return batch["inputs"], metainfo


def objects_of(coco: Any, dataset: Any, index: int) -> list[tuple[int, Any, Any]]:
    """Class, box and mask of each object that is no crowd."""
    info = dataset.get_data_info(index)
    labels = {c: i for i, c in enumerate(coco.getCatIds(dataset.metainfo["classes"]))}
    by_name = {
        c["id"]: dataset.metainfo["classes"].index(c["name"])
        for c in coco.loadCats(list(labels))
    }
    objects = []
    for ann in coco.loadAnns(coco.getAnnIds(imgIds=info["img_id"], iscrowd=False)):
        x, y, w, h = ann["bbox"]
        if ann["category_id"] in by_name and w > 1 and h > 1:
            mask = coco.annToMask(ann).astype(bool)
            objects.append((by_name[ann["category_id"]], (x, y, x + w, y + h), mask))
    return objects


def matches(predictions: Any, objects: list, image_hw: tuple) -> list[Found]:
    """The best detections that match an object of their class, each object once."""
    found: list[Found] = []
    taken: set[int] = set()
    boxes = predictions.bboxes.numpy()
    for index in predictions.scores.argsort(descending=True).tolist():
        if predictions.scores[index] < 0.3 or len(found) == 3:
            break
        best, most = None, 0.5
        for number, (label, box, _) in enumerate(objects):
            if number in taken or label != int(predictions.labels[index]):
                continue
            overlap = iou(boxes[index], box)
            if overlap >= most:
                best, most = number, overlap
        if best is not None:
            taken.add(best)
            _, box, mask = objects[best]
            found.append(Found(index, boxes[index], region(box, image_hw), mask))
    return found


def iou(a: Any, b: Any) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(shared / (sum(areas) - shared))


def region(box_xyxy: Any, image_hw: tuple) -> np.ndarray:
    ys, xs = (np.arange(size) + 0.5 for size in image_hw)
    x1, y1, x2, y2 = box_xyxy
    return ((ys >= y1) & (ys <= y2))[:, None] & ((xs >= x1) & (xs <= x2))


def gaussian(box_xyxy: Any, image_hw: tuple) -> np.ndarray:
    ys, xs = (np.arange(size) + 0.5 for size in image_hw)
    x1, y1, x2, y2 = box_xyxy
    along_y = np.exp(-(((ys - (y1 + y2) / 2) / ((y2 - y1) / 4)) ** 2) / 2)
    along_x = np.exp(-(((xs - (x1 + x2) / 2) / ((x2 - x1) / 4)) ** 2) / 2)
    return along_y[:, None] * along_x


class Scores:
    """Sums of what is measured of one method."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self.small: list[float] = []
        self.seconds = 0.0

    def add(self, saliency: np.ndarray, found: Found) -> None:
        blank = not saliency.max() > 0
        row = tuple(
            0.0 if blank else float(measure(saliency, area))
            for measure in (pointing_hit, energy_inside)
            for area in (found.true_box, found.true_mask)
        )
        self.rows.append((*row, float(blank)))
        x1, y1, x2, y2 = found.box_xyxy
        if (x2 - x1) * (y2 - y1) < SMALL_BOX**2:
            self.small.append(row[3])


def measure_methods(
    detector: Any, dataset: Any, coco: Any, methods: list[str], num_images: int
) -> dict[str, Scores]:
    logger = logging.getLogger("boxam_quality")
    logger.setLevel(logging.ERROR)
    options: dict = dict(score_thr=0.0, topk=-1, batch_size=16, num_masks=600)
    mappers: dict[str, tuple[BoxAttributor, float]] = {}
    for method in methods:
        own = BoxAMOptions(method=method, **options)
        smooth = METHODS[method].default_smooth
        mappers[method] = (BoxAttributor(detector, own, logger=logger), smooth)
    fixed = BoxAMOptions(method="gradcam", target_layers=["neck"], **options)
    mappers[FIXED_LAYER] = (BoxAttributor(detector, fixed, logger=logger), 0.0)
    none = BoxAttributor(detector, BoxAMOptions(score_thr=1.0), logger=logger)
    scores: dict[str, Scores] = {
        name: Scores() for name in (*mappers, "box", "Gaussian on the box")
    }
    for index in track(range(min(num_images, len(dataset))), transient=True):
        inputs, metainfo = inputs_of(detector, dataset, index)
        frame = FrameTransform.from_metainfo(metainfo)
        plain, _ = none.explain(inputs, metainfo)
        chosen = matches(plain, objects_of(coco, dataset, index), frame.image_hw)
        for found in chosen:
            scores["box"].add(
                region(found.box_xyxy, frame.image_hw).astype(np.float32), found
            )
            scores["Gaussian on the box"].add(
                gaussian(found.box_xyxy, frame.image_hw), found
            )
        for name, (mapper, smooth) in mappers.items():
            mapper.choose = lambda _, own=chosen: [f.index for f in own]  # type: ignore
            start = time.perf_counter()
            _, explanations = mapper.explain(inputs, metainfo)
            scores[name].seconds += time.perf_counter() - start
            for found, explanation in zip(chosen, explanations):
                if name == FIXED_LAYER:
                    explanation = copy.copy(explanation)
                    maps = tuple(m for m in explanation.maps if m.layer == "neck[2]")
                    object.__setattr__(explanation, "maps", maps)
                saliency = box_saliency(
                    explanation, frame, found.box_xyxy, smooth=smooth
                )
                scores[name].add(saliency, found)
    return scores


def randomised(detector: Any, part: str) -> Any:
    """A copy whose weights below ``part`` are drawn anew."""
    torch.manual_seed(0)
    other = copy.deepcopy(detector)
    module = other.get_submodule(part) if part else other
    for child in module.modules():
        if isinstance(child, torch.nn.Conv2d):
            child.reset_parameters()
    return other


def sanity(detector: Any, dataset: Any, num_images: int) -> Iterator[tuple[str, Any]]:
    """Rank correlations of maps before and after weights were made random."""
    parts = {"the same weights": None, "random head": "bbox_head", "all random": ""}
    others = {
        name: detector if part is None else randomised(detector, part)
        for name, part in parts.items()
    }
    found: dict[str, list[float]] = {name: [] for name in parts}
    for index in track(range(min(num_images, len(dataset))), transient=True):
        inputs, metainfo = inputs_of(detector, dataset, index)
        first: list[np.ndarray] = []
        places: list = []
        for name, other in others.items():
            with frozen(other):
                graph = GraphForward(other, [TapPoint("neck", other.neck)]).run(
                    inputs, metainfo
                )
                if name == "the same weights":
                    scores = graph.predictions.scores
                    kept = (scores > 0.3).nonzero()[:3, 0].tolist()
                    if not kept:
                        break
                    labels = graph.predictions.labels[kept].tolist()
                    raw: dict = dict(graph.head_outputs)
                    anchors = locate_anchors(scores[kept], labels, raw)
                    places = [class_logits(a)[0] for a in anchors if a.entries]
                maps = []
                for key, place in places:
                    output = graph.head_outputs[HeadKey(*key)]
                    tap = list(graph.taps.values())[key[2][-1]]
                    (gradient,) = torch.autograd.grad(
                        output[place], tap, retain_graph=True
                    )
                    maps.append(weigh("boxam", tap.detach(), gradient)[0].numpy())
            first = first or maps
            found[name] += [
                spearman(a[b + a > 0], b[b + a > 0]) for a, b in zip(first, maps)
            ]
    for name, values in found.items():
        yield name, np.asarray(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
    )
    default = [name for name in METHODS if name not in SLOW]
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=default, metavar="NAME"
    )
    parser.add_argument("--images", type=int, default=128, help="default: 128")
    parser.add_argument("--sanity", action="store_true", help="also randomise weights")
    args = parser.parse_args()
    console = Console(width=max(110, Console().width))
    if not (shared_folder() / "data" / "coco128").is_dir():
        console.print("Real images not found; MMVIS_SHARED names their folder.")
        return
    from pycocotools.coco import COCO

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    config = Config.fromfile(CONFIG)
    detector, dataset = build(config)
    coco = COCO(dataset.ann_file)
    scores = measure_methods(detector, dataset, coco, args.methods, args.images)
    count = len(scores["box"].rows)
    table = Table(title=f"{count} detections, {len(scores['box'].small)} of them small")
    table.add_column("map", no_wrap=True, min_width=20)
    for column in (
        *("pointing, box", "mask", "energy, box", "mask", "mask, small"),
        *("blank", "ms/box"),
    ):
        table.add_column(column, justify="right")
    for name, own in scores.items():
        means = np.asarray(own.rows).mean(axis=0)
        cells = [f"{value:.3f}" for value in (*means[:4], np.mean(own.small))]
        time_per_box = f"{own.seconds / count * 1e3:.1f}" if own.seconds else ""
        table.add_row(name, *cells, f"{means[4]:.0%}", time_per_box)
    console.print(table)
    if args.sanity:
        table = Table(title="rank correlation with the map of the trained weights")
        for column in ("weights", "mean", "standard error"):
            table.add_column(column)
        for name, values in sanity(detector, dataset, args.images):
            error = values.std() / len(values) ** 0.5
            table.add_row(name, f"{values.mean():.3f}", f"{error:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
