"""Why objects are missed and where false positives come from, over a data set.

    python tools/explain_errors.py CONFIG CHECKPOINT --out-dir errors

It writes ``summary.json``, ``errors.json`` and ``errors.csv``, and pictures of the
images that lose most. What was diagnosed stays in ``images.jsonl``, so that an
interrupted call goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from rich.console import Console
from rich.progress import track
from rich.table import Table

from _common import (
    ToolError,
    add_cfg_options,
    check_checkpoint,
    config_mistakes,
    merge_options,
    run_tool,
)
from mmyolo_vis_hooks.data.alignment import Placement, first_loaded, own_placement
from mmyolo_vis_hooks.data.pipeline import ImagePipeline, prepare_data
from mmyolo_vis_hooks.data.selector import ImageSelector, SelectedImage
from mmyolo_vis_hooks.declare import add_arguments, options_from
from mmyolo_vis_hooks.detector import (
    build_detector,
    check_device,
    classes_and_palette,
    load_weights,
    read_config,
)
from mmyolo_vis_hooks.diagnosis.diagnose import Diagnoser, Diagnosis
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth
from mmyolo_vis_hooks.diagnosis.report import ErrorReport, ImageErrors
from mmyolo_vis_hooks.options import DiagnosisOptions
from mmyolo_vis_hooks.publish.files import make_writable, write_image, write_whole

logger = logging.getLogger("mmyolo_vis_hooks")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say why objects are missed and where false positives come from"
    )
    parser.add_argument(
        "config", help="config file, or mmyolo::FOLDER/FILE.py for one of MMYOLO's"
    )
    parser.add_argument("checkpoint", help="its weights, a path or an address")
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        default="val",
        help="whose data set is looked at (default: val)",
    )
    parser.add_argument(
        "--out-dir",
        default="./errors",
        help="folder of what is written (default: ./errors)",
    )
    parser.add_argument(
        "--num-pictures",
        type=int,
        default=20,
        help="pictures of so many images, those that lose most (default: 20)",
    )
    parser.add_argument(
        "--device",
        default="cuda:0" if torch.cuda.is_available() else "cpu",
        help="where the network runs: cuda:0 is the first GPU",
    )
    add_arguments(parser, DiagnosisOptions)
    add_cfg_options(parser)
    return parser.parse_args()


class Errors:
    """Looks at the images of a data set."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.options = options_from(args, DiagnosisOptions)
        self.detector = build_detector(config, check_device(args.device))
        loader = config.get(f"{args.split}_dataloader")
        if not loader:
            raise ToolError(f"--split {args.split}: the config has no such dataloader")
        scope = DefaultScope.overwrite_default_scope(config.get("default_scope"))
        with scope, contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset = DATASETS.build(loader.dataset)
        self.images = ImageSelector(dataset, -1, None).images
        metainfo = load_weights(self.detector, args.checkpoint)
        self.names, _ = classes_and_palette(metainfo, dataset.metainfo)
        self._diagnoser = Diagnoser(self.detector, self.options, self.names, logger)
        self._placements: dict[int, Placement] = {}

    def truth(self, image: SelectedImage) -> GroundTruth:
        info = image.dataset.get_data_info(image.index)
        if "instances" not in info:
            raise ToolError(
                f"the data set {type(image.dataset).__name__} has no annotated objects "
                f"(image {image.image_id}); --split val or --cfg-options name one"
            )
        return GroundTruth.of(info["instances"])

    def diagnose(self, image: SelectedImage, *, maps: bool) -> Diagnosis:
        placement = self._placements.get(id(image.dataset))
        if placement is None:
            placement = self._placements[id(image.dataset)] = self._place(image.dataset)
        loaded = prepare_data(image.dataset, image.index, placement.pipeline.load)
        truth = self.truth(image)
        name = image.image_id
        return self._diagnoser.look(name, loaded, placement, truth, maps=maps)

    def _place(self, dataset: Any) -> Placement:
        """Find out on its first images whether maps of a data set lie right."""
        pipeline = ImagePipeline(dataset.pipeline, channels=self.options.image_channels)
        own = [image for image in self.images if image.dataset is dataset]
        loads = [partial(prepare_data, dataset, i.index, pipeline.load) for i in own]
        placement = own_placement(pipeline, first_loaded(loads), self.detector)
        if not placement.proven:
            logger.warning(f"no maps will be drawn: {placement.reason}")
        return placement


def look(errors: Errors, kept: Path, settings: dict[str, Any]) -> list[ImageErrors]:
    """Diagnose the images that an earlier call did not come to."""
    known = read_kept(kept, settings)
    with open(kept, "a", encoding="utf-8") as file:
        if not known:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(settings) + "\n")
        waiting = [image for image in errors.images if image.image_id not in known]
        console = Console(stderr=True)
        for image in track(waiting, "images", console=console):
            own = ImageErrors.of(errors.diagnose(image, maps=False))
            known[image.image_id] = own
            file.write(own.to_json() + "\n")
            file.flush()
    return [known[image.image_id] for image in errors.images]


def read_kept(kept: Path, settings: dict[str, Any]) -> dict[str, ImageErrors]:
    """What an earlier call found; its last line may have been cut off."""
    if not kept.exists():
        if any(kept.parent.iterdir()):
            raise ToolError(
                f"{kept.parent} holds files that are not of an earlier call; name "
                "another --out-dir"
            )
        return {}
    first, *lines = kept.read_text(encoding="utf-8").split("\n")
    if not first:
        return {}
    if json.loads(first) != settings:
        raise ToolError(
            f"{kept.parent} holds errors of another call, with other weights, settings "
            "or objects than this one; name another --out-dir, or remove it"
        )
    found = [ImageErrors.from_json(line) for line in lines if line.endswith("}")]
    # What was cut off is written again.
    whole = "".join(f"{own.to_json()}\n" for own in found)
    write_whole(kept, f"{first}\n{whole}".encode())
    return {own.image: own for own in found}


def digest(*parts: bytes) -> str:
    """What tells a call from one of other weights, settings or objects."""
    total = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def print_report(report: ErrorReport) -> None:
    summary = report.summary()
    table = Table(
        title=f"{summary['images']} images, {summary['hits']} objects found, "
        f"AP {summary['ap']:.3f}"
    )
    for column in ("", "kind", "count", "small", "medium", "large", "AP if mended"):
        table.add_column(column, justify="left" if column in ("", "kind") else "right")
    for group, kind, counts, gain in report.table():
        shown = "" if gain is None else f"+{gain:.3f}"
        table.add_row(group, kind, *map(str, counts), shown)
    Console(width=100).print(table)


def main() -> None:
    args = parse_args()
    if args.num_pictures < 0:
        raise ToolError(f"--num-pictures {args.num_pictures}: use 0 or more")
    check_checkpoint(args.checkpoint, "CHECKPOINT")
    config = read_config(args.config)
    merge_options(config, args.cfg_options)
    out_dir = Path(args.out_dir)
    with config_mistakes(args.config):
        errors = Errors(args, config)
    make_writable(out_dir)
    options = errors.options
    truths = [errors.truth(image) for image in errors.images]
    settings = dict(
        config=digest(repr(config.to_dict()).encode()),
        weights=digest(*map(_bytes_of, errors.detector.state_dict().values())),
        objects=digest(*(part for truth in truths for part in truth.parts())),
        score_thr=options.score_thr,
        iou_thr=options.iou_thr,
    )
    found = look(errors, out_dir / "images.jsonl", settings)

    objects: Counter[int] = Counter()
    for truth in truths:
        objects.update(truth.labels[~truth.ignored].tolist())
    report = ErrorReport(errors.names, objects, iou_thr=options.iou_thr)
    for own, truth in zip(found, truths):
        report.add(own, truth)
    for name, text in (
        ("summary.json", json.dumps(report.summary(), indent=1)),
        ("errors.json", report.errors_json()),
        ("errors.csv", report.csv()),
    ):
        write_whole(out_dir / name, text.encode())
    print_report(report)

    by_name = {image.image_id: image for image in errors.images}
    for rank, name in enumerate(report.worst_images(args.num_pictures), 1):
        picture = errors.diagnose(by_name[name], maps=True).draw()
        write_image(str(out_dir / f"{rank:03d}_{name}.jpg"), picture)
    print(f"{out_dir}: summary.json, errors.json, errors.csv and pictures by rank")


if __name__ == "__main__":
    run_tool(main)
