"""Why objects are missed and where false positives come from, over a data set.

    python tools/explain_errors.py CONFIG CHECKPOINT --out-dir errors

It writes ``summary.json``, ``errors.json`` and ``errors.csv``, a page ``index.html`` of
all errors, and pictures of the images that lose most. What was diagnosed stays in
``images.jsonl``, so that an interrupted call goes on where it was.
"""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from _common import config_mistakes, print_table, run_tool, table_of
from _dataset import add_config
from _errors import Errors, add_shared_arguments, commonest, read_checked
from _kept import Kept, open_out_dir, progress
from mmyolo_vis_hooks.diagnosis.cost import MISSED, SIZES
from mmyolo_vis_hooks.diagnosis.export import Export
from mmyolo_vis_hooks.diagnosis.matching import FALSE_KINDS
from mmyolo_vis_hooks.diagnosis.picture import ROLE_COLORS
from mmyolo_vis_hooks.diagnosis.report import KINDS, ErrorRecord, ErrorReport
from mmyolo_vis_hooks.diagnosis.result import FalsePositive, Missed
from mmyolo_vis_hooks.publish.errors_page import (
    ASSETS,
    PageError,
    PageImages,
    PageMap,
    write_errors_page,
)
from mmyolo_vis_hooks.publish.files import OwnFiles, write_image, write_whole

_MOST_CLASSES = 10
_NOT_DRAWN: dict = {"maps": [], "note": ""}
ROLES = dict(
    missed="missed object",
    found="found object",
    detection="detection",
    candidate="best candidate of a missed object",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say why objects are missed and where false positives come from"
    )
    add_config(parser)
    parser.add_argument("checkpoint", help="its weights, a path or an address")
    parser.add_argument(
        "--fiftyone",
        action="store_true",
        help="write a data set for FiftyOne, too, into the folder fiftyone",
    )
    add_shared_arguments(parser, "./errors")
    return parser.parse_args()


def print_report(report: ErrorReport) -> None:
    summary = report.summary()
    title = (
        f"{summary['images']} images, {summary['hits']} objects found, "
        f"AP {summary['ap']:.3f}"
    )
    columns = ["", "kind", "count", *SIZES, "AP if\nmended", *SIZES]
    rows = [
        [group, kind, *map(str, counts), *(f"+{own:.3f}" for own in gains)]
        for group, kind, counts, gains in report.table()
    ]
    print_table(table_of(title, columns, rows, words=2))

    classes = report.classes()
    most = classes[:_MOST_CLASSES]
    title = f"The {len(most)} of {len(classes)} classes that lose most"
    columns = ["class", "objects", "found", "AP", "missed", "false", "AP if mended"]
    rows = []
    for own in most:
        kind = max((MISSED, *FALSE_KINDS), key=lambda kind: own[f"dap {kind}"])
        false = sum(own[kind] for kind in FALSE_KINDS)
        numbers = own["objects"], own["hits"], f"{own['ap']:.3f}", own[MISSED], false
        gain = f"+{own[f'dap {kind}']:.3f} {kind}"
        rows.append([own["class"], *map(str, numbers), gain])
    if most:
        print()
        print_table(table_of(title, columns, rows))


def draw(
    errors: Errors, names: list[str], out_dir: Path, images: PageImages, kept: Kept
) -> None:
    """Draw pictures and maps of images, worst first, that are not there yet."""
    for rank, name in enumerate(progress(names, "pictures"), 1):
        if errors.key(name) in kept and picture_of(rank, name, out_dir).exists():
            continue
        diagnosis = errors.diagnose(name, maps=True)
        maps: list[list[dict]] = []
        wrong: list[Missed | FalsePositive] = [*diagnosis.missed]
        wrong += diagnosis.false_positives
        for number, own in enumerate(wrong):
            maps.append([])
            for page_map, values in maps_of(own, str(number)):
                images.write_map(name, page_map, values)
                maps[-1].append(asdict(page_map))
        write_image(str(picture_of(rank, name, out_dir)), diagnosis.draw())
        note = "" if any(maps) else diagnosis.note  # says why there are none
        kept.add(errors.key(name), {"maps": maps, "note": note})


def maps_of(
    own: Missed | FalsePositive, asset: str
) -> Iterator[tuple[PageMap, np.ndarray]]:
    """The maps that the page shows of an error, with their values."""
    apart = own.contrast
    if apart is not None:
        limit = float(np.abs(apart.difference).max()) or 1.0
        right, given = f"For {apart.right_name}", f"For {apart.given_name}"
        note = f"red for {apart.right_name}, blue for {apart.given_name}"
        yield PageMap(f"{asset}r", right, f"right class, {apart.layer}"), apart.right
        yield PageMap(f"{asset}g", given, f"given class, {apart.layer}"), apart.given
        yield (
            PageMap(f"{asset}d", "Their difference", note, signed=True),
            apart.difference / limit,
        )
        return
    other = own.other_map if isinstance(own, Missed) else None
    for name, title, error_map in (
        (asset, f"Map of {own.class_name}", own.map),
        (f"{asset}o", "Map of the detection", other),
    ):
        if error_map is not None:
            note = f"{error_map.layer}, {error_map.inside:.0%} of it inside"
            yield PageMap(name, title, note), error_map.saliency


def joint_maps(errors: Errors, drawn: Kept, out_dir: Path) -> dict[str, np.ndarray]:
    """The strongest of the maps of each image that has some, ``(h, w)`` uint8."""
    joint = {}
    for name in errors.images:
        known = drawn.known.get(errors.key(name), _NOT_DRAWN)
        found = [page_map for own in known["maps"] for page_map in own]
        paths = [
            out_dir / ASSETS / f"{name}.{own['asset']}.jpg"
            for own in found
            if not own["signed"]
        ]
        maps = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths]
        there = [levels for levels in maps if levels is not None]
        if there:
            joint[name] = np.max(there, axis=0)
    return joint


def picture_of(rank: int, name: str, out_dir: Path) -> Path:
    return out_dir / f"{rank:03d}_{name}.jpg"


def write_page(
    title: str,
    errors: Errors,
    report: ErrorReport,
    worst: list[str],
    drawn: Kept,
    files: OwnFiles,
) -> None:
    """Write the page of all errors, with the maps that were drawn."""
    ranks = {name: rank for rank, name in enumerate(worst, 1)}
    positions: Counter[str] = Counter()
    shown = []
    for record in report.records:
        number = positions[record.image]
        positions[record.image] += 1
        known = drawn.known.get(errors.key(record.image), _NOT_DRAWN)
        maps = known["maps"]
        # A detector that is not deterministic may have found other errors by then.
        found = maps[number] if number < len(maps) else []
        note = known["note"] or f"of more than {errors.options.topk} errors (--topk)"
        if record.mechanism and "candidate" not in dict(record.others):
            note = "there was no candidate"
        elif record.image not in ranks:
            note = f"not of the {len(worst)} images that lose most"
        own = [PageMap(**kept) for kept in found] or [PageMap("", "No map", note)]
        shown.append(page_error(record, own))
    summary = report.summary()
    missed, false = sum(summary["missed"].values()), sum(summary["false"].values())
    write_errors_page(
        files,
        shown,
        title=title,
        lead=f"{missed} objects missed and {false} false positives in "
        f"{summary['images']} images; {summary['hits']} objects found, AP "
        f"{summary['ap']:.3f}.",
        noun=("error", "errors"),
        columns=2,
        order="Most AP lost first",
        images={name: report.sizes[name] for name in positions},
        pictures={n: picture_of(r, n, Path()).name for n, r in ranks.items()},
        groups={"Kind": KINDS, "Class": commonest(report.records), "Size": SIZES},
        roles={ROLES[role]: color for role, color in ROLE_COLORS.items()},
        colors={k: ROLE_COLORS[_role(k)] for k in KINDS},
    )


def page_error(record: ErrorRecord, maps: list[PageMap]) -> PageError:
    boxes = (_role(record.full_kind), record.box_xyxy), *record.others
    return PageError(
        record.image,
        f"{record.class_name}: {record.mechanism or record.kind}",
        record.why,
        (record.full_kind, record.class_name, record.size),
        record.score,
        record.lost,
        tuple((ROLES[role], box) for role, box in boxes),
        tuple(maps),
    )


def _role(kind: str) -> str:
    return MISSED if kind.startswith(MISSED) else "detection"


def main() -> None:
    args = parse_args()
    config = read_checked(args, args.config, args.checkpoint, "CHECKPOINT")
    out_dir = Path(args.out_dir)
    with config_mistakes(args.config):
        errors = Errors(args, config, args.checkpoint)
    open_out_dir(out_dir, "images.jsonl")
    settings = errors.settings()
    kept = Kept(out_dir / "images.jsonl", settings)
    files = OwnFiles(out_dir, ASSETS)
    images = PageImages(files)
    report = errors.report(errors.look(kept, images))
    export = Export(report, errors.files, errors.category_ids)
    for name, text in (
        ("summary.json", json.dumps(report.summary(), indent=1)),
        ("errors.json", report.errors_json()),
        ("errors.csv", report.csv()),
        ("classes.csv", report.classes_csv()),
        ("detections.json", export.coco_results()),
        ("boxes.json", export.coco()),
        ("boxes.csv", export.csv()),
    ):
        write_whole(out_dir / name, text.encode())
    print_report(report)

    worst = report.worst_images(args.num_pictures)
    drawn = Kept(out_dir / "maps.jsonl", settings)
    draw(errors, worst, out_dir, images, drawn)
    if args.fiftyone:
        export.write_fiftyone(out_dir / "fiftyone", joint_maps(errors, drawn, out_dir))
    title = f"Errors of {Path(args.checkpoint).name}"
    write_page(title, errors, report, worst, drawn, files)
    print(f"{out_dir}: index.html, pictures, summary.json, errors.json, *.csv")


if __name__ == "__main__":
    run_tool(main)
