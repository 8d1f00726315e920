"""Which method tells most of what made the detections, over a data set.

    python tools/eval_boxam.py CONFIG CHECKPOINT --methods boxam odam --out-dir maps

Detections that hit an object are explained by each method, and by baselines that look
at no detector; the same metrics are taken of all. Written are ``table.csv``,
``table.json`` and ``table.md``, the curves of insertion and deletion, what more
forwards gain, and pictures of the best and worst cases. What was measured stays in
``images.jsonl``, so that an interrupted call goes on where it was.
"""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _common import (
    ToolError,
    add_cfg_options,
    check_checkpoint,
    config_mistakes,
    print_table,
    read_merged,
    run_tool,
)
from _dataset import add_config, add_data_arguments
from _evaluation import Evaluation, measure
from _kept import Kept, open_out_dir, progress
from _quality_report import (
    Case,
    TextTable,
    case_picture,
    draw_budget,
    draw_curves,
    main_value,
    tables_of,
)
from mmyolo_vis_hooks.metrics.baselines import BASELINES
from mmyolo_vis_hooks.metrics.metric import METRICS, Metric, validate_metric
from mmyolo_vis_hooks.metrics.sanity import PARTS, SanityCheck, can_be_checked
from mmyolo_vis_hooks.publish.files import write_image, write_whole


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how well maps tell what made the detections"
    )
    add_config(parser)
    parser.add_argument("checkpoint", help="its weights, a path or an address")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["boxam", "layercam", "odam"],
        metavar="METHOD",
        help="methods, with options as in drise:num_masks=300 if need be; 'search' "
        "and 'ridge' try regions of the box, 'ultralytics' and 'mmyolo_demo' draw as "
        "others do (default: boxam layercam odam)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["pointing", "energy", "inside"],
        metavar="METRIC",
        help=f"of {', '.join(METRICS)} (default: pointing energy inside)",
    )
    parser.add_argument(
        "--score",
        choices=["iou", "own", "cosine"],
        default="iou",
        help="what insertion and deletion ask for: the greatest product of IoU and "
        "score of the class, the score at the detection's own anchor, or the greatest "
        "product of IoU and cosine of the class vectors (default: iou)",
    )
    parser.add_argument(
        "--num-detections",
        type=int,
        default=100,
        help="detections of so many objects, of images in a random order; -1 all "
        "(default: 100)",
    )
    parser.add_argument(
        "--per-image",
        type=int,
        default=2,
        help="at most so many of an image, the best first (default: 2)",
    )
    parser.add_argument(
        "--half",
        choices=["all", "even", "odd"],
        default="all",
        help="every other image: choose on one half, report on the other "
        "(default: all)",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        help="of detections with a higher score (default: 0.3)",
    )
    parser.add_argument(
        "--against",
        default="Gaussian",
        metavar="MAP",
        help="method or baseline that the others are compared with, detection by "
        "detection (default: Gaussian)",
    )
    add_data_arguments(parser, "./boxam_quality")
    parser.add_argument(
        "--num-pictures",
        type=int,
        default=3,
        help="so many of the best cases of the first method, and of the worst "
        "(default: 3)",
    )
    parser.add_argument(
        "--sanity",
        action="store_true",
        help="also look whether maps change when the weights are made random, of "
        "methods that need no more than gradients",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if args.num_detections < 1 and args.num_detections != -1:
        raise ToolError(f"--num-detections {args.num_detections}: use 1 or more, or -1")
    if args.per_image < 1:
        raise ToolError(f"--per-image {args.per_image}: use 1 or more")
    if args.num_pictures < 0:
        raise ToolError(f"--num-pictures {args.num_pictures}: use 0 or more")
    if not 0 <= args.score_thr <= 1:
        raise ToolError(f"--score-thr {args.score_thr}: use 0 to 1")
    known = [*args.methods, *BASELINES]
    if args.against not in known:
        raise ToolError(f"--against {args.against}: use one of {', '.join(known)}")
    check_checkpoint(args.checkpoint, "CHECKPOINT")


def order_of(images: Sequence[str], half: str) -> list[str]:
    """Images in a random order, the same in every run."""
    start, step = {"all": (0, 1), "even": (0, 2), "odd": (1, 2)}[half]
    chosen = images[start::step]
    return [chosen[k] for k in np.random.default_rng(0).permutation(len(chosen))]


def look(
    evaluation: Evaluation, images: list[str], kept: Kept, args: Any
) -> Iterator[Case]:
    """Measure detections until there are enough."""
    metrics = [Metric(name) for name in args.metrics]
    missing = math.inf if args.num_detections == -1 else args.num_detections
    for name in progress(images, "images"):
        if name not in kept:
            _, explained = evaluation.explain(name)
            found = [dict(size=e.size, maps=measure(e, metrics)) for e in explained]
            kept.add(name, found)
        for number, own in enumerate(kept.known[name]):
            yield Case(name, number, **own)
            missing -= 1
            if missing <= 0:
                return


def draw_cases(
    evaluation: Evaluation, cases: list[Case], value: str, args: argparse.Namespace
) -> None:
    """Where the first method is most, and least, above the other map."""
    method, against = args.methods[0], args.against
    if method == against:
        against = next(iter(BASELINES))
    known = [
        (case.maps[method][value] - case.maps[against][value], case)
        for case in cases
        if all(value in case.maps.get(name, {}) for name in (method, against))
    ]
    known.sort(key=lambda pair: pair[0])
    count = min(args.num_pictures, len(known) // 2)
    for kind, own in (("worst", known[:count]), ("best", known[::-1][:count])):
        for rank, (_, case) in enumerate(own, 1):
            picture_rgb, explained = evaluation.explain(case.image)
            drawn = case_picture(picture_rgb, explained[case.number], case, value)
            write_image(f"{args.out_dir}/{kind}_{rank}_{case.image}.jpg", drawn)


def check_sanity(
    evaluation: Evaluation, cases: list[Case], methods: list[str]
) -> TextTable:
    """How alike maps are to those of random weights, and which did not change."""
    check = SanityCheck(evaluation.detector, [m for m in methods if can_be_checked(m)])
    for name in progress(dict.fromkeys(case.image for case in cases), "random weights"):
        look, chosen = evaluation.find(name)
        check.update(look.inputs, look.metainfo, chosen)
    found, unchanged = check.compute(), check.unchanged()
    rows = []
    for method in methods:
        values = [f"{value:.3f}" for value in found.get(method, {}).values()]
        note = "DOES NOT CHANGE" if method in unchanged else ""
        rows.append([method, *values, note] if values else [method, "", "", "no check"])
    title = "rank correlation with the map of the trained detector"
    return TextTable(title, ["map", *PARTS, ""], rows)


def main() -> None:
    args = parse_args()
    check(args)
    config = read_merged(args.config, args)
    for name in args.metrics:  # some may be of what the config imports
        validate_metric(name)
    out_dir = Path(args.out_dir)
    with config_mistakes(args.config):
        evaluation = Evaluation(
            config,
            args.checkpoint,
            args.methods,
            split=args.split,
            device=args.device,
            score_thr=args.score_thr,
            per_image=args.per_image,
            score=args.score,
        )
    settings = dict(
        **evaluation.settings(),
        methods=args.methods,
        metrics=args.metrics,
        per_image=args.per_image,
        score_thr=args.score_thr,
        score=args.score,
    )
    open_out_dir(out_dir, "images.jsonl")
    kept = Kept(out_dir / "images.jsonl", settings)
    images = order_of(list(evaluation.images), args.half)
    cases = list(look(evaluation, images, kept, args))
    if not cases:
        raise ToolError(
            "no detection hits an object; lower --score-thr, or name other weights"
        )
    value = main_value(cases, args.metrics)
    if value is None:
        raise ToolError(
            f"--metrics {' '.join(args.metrics)}: the boxes are too small for any of "
            "them; take pointing or energy"
        )
    tables = tables_of(cases, args.against)
    for table in (tables.overview, tables.by_size[value]):
        print_table(table.rich())
        print()
    write_whole(out_dir / "table.csv", tables.csv().encode())
    write_whole(out_dir / "table.json", tables.json(settings).encode())
    write_whole(out_dir / "table.md", tables.markdown().encode())
    draw_curves(cases, out_dir / "curves.png")
    draw_budget(tables, value, out_dir / "budget.png")
    if args.sanity:
        sanity = check_sanity(evaluation, cases, args.methods)
        print_table(sanity.rich())
        write_whole(out_dir / "sanity.md", sanity.markdown().encode())
    draw_cases(evaluation, cases, value, args)
    print(f"{out_dir}: table.csv, .json and .md, curves, budget and pictures of cases")


if __name__ == "__main__":
    run_tool(main)
