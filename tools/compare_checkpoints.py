"""What changed from one checkpoint to another, object by object.

    python tools/compare_checkpoints.py CONFIG A B --out-dir comparison

It looks at the same images and objects with both, and writes ``summary.json``,
``changes.json``, ``changes.csv`` and a page ``index.html`` with the maps of both side
by side. An interrupted call goes on where it was.
"""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import ToolError, config_mistakes, print_table, run_tool, table_of
from _dataset import add_config
from _errors import (
    Errors,
    add_shared_arguments,
    check_classes,
    commonest,
    read_checked,
)
from _kept import Kept, open_out_dir, progress
from mmyolo_vis_hooks.diagnosis.compare import (
    BROKEN,
    CHANGES,
    FOUND_BY,
    MENDED,
    NOTHING,
    WRONG_IN_BOTH,
    Change,
    Side,
    compare_image,
    summarize,
)
from mmyolo_vis_hooks.diagnosis.cost import SIZES
from mmyolo_vis_hooks.diagnosis.maps import ErrorMap
from mmyolo_vis_hooks.diagnosis.report import FOUND, KINDS, as_written, csv_text
from mmyolo_vis_hooks.diagnosis.result import Found, Missed
from mmyolo_vis_hooks.publish.errors_page import (
    ASSETS,
    PageError,
    PageImages,
    PageMap,
    write_errors_page,
)
from mmyolo_vis_hooks.publish.files import OwnFiles, write_whole

# Colours that people tell apart whatever their sight.
_OBJECT, _A, _B = (255, 255, 255), (255, 176, 0), (100, 143, 255)
_COLORS = {MENDED: (44, 160, 80), BROKEN: (220, 38, 127), WRONG_IN_BOTH: (255, 176, 0)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Say what changed from one checkpoint to another, object by object"
    )
    add_config(parser)
    parser.add_argument("a", help="the first checkpoint, a path or an address")
    parser.add_argument("b", help="the second")
    parser.add_argument("--config-b", help="config of the second, if it has another")
    add_shared_arguments(parser, "./comparison")
    return parser.parse_args()


def check_alike(a: Errors, b: Errors) -> None:
    """Make sure that the same objects are looked at."""
    check_classes(a.names, b.names)
    if a.images.keys() != b.images.keys() or any(
        truth.parts() != b.truths[name].parts() for name, truth in a.truths.items()
    ):
        raise ToolError(
            "the data sets of both configs have other images or objects; make them one "
            "with --cfg-options, or name another --split"
        )


def print_report(summary: dict[str, Any]) -> None:
    objects, false = summary["objects"], summary["false"]
    a, b = summary["a"], summary["b"]
    print(
        f"{sum(objects.values())} objects in {a['images']} images: "
        f"{objects['both']} found by both, {objects['only A']} only by A, "
        f"{objects['only B']} only by B, {objects['neither']} by neither"
    )
    print(
        f"false positives: {false['both']} of both, {false['only A']} only of A, "
        f"{false['only B']} only of B"
    )
    title = f"AP {a['ap']:.3f} → {b['ap']:.3f}"
    kinds = summary["kinds"].items()
    rows = [[kind, *map(str, counts.values())] for kind, counts in kinds]
    print_table(table_of(title, ["kind", "A", "B", "mended", "new"], rows))


def changes_csv(changes: list[Change]) -> str:
    rows = Counter(
        (c.change, c.found_by, c.a.kind, c.b.kind, c.class_name, c.size)
        for c in changes
    )
    header = ["change", "found by", "A", "B", "class", "size", "count"]
    return csv_text(header, ([*key, n] for key, n in sorted(rows.items())))


def draw_maps(
    a: Errors,
    b: Errors,
    changes: dict[str, list[Change]],
    names: list[str],
    images: PageImages,
    kept: Kept,
) -> None:
    """Draw the maps of images, as far as they are not there yet."""
    waiting = [name for name in names if a.key(name) not in kept]
    for name in progress(waiting, "maps"):
        (of_a, why_a), (of_b, why_b) = (maps_of(errors, name) for errors in (a, b))
        found = []
        for number, own in enumerate(changes[name]):
            pair = (of_a.get(place(own, own.a)), of_b.get(place(own, own.b)))
            found.append(write_maps(own, number, pair, (why_a, why_b), images))
        kept.add(a.key(name), found)


def place(change: Change, side: Side) -> tuple[str, int | None]:
    """What tells the maps of an image apart."""
    if change.truth is not None:
        return "object", change.truth
    return "detection", side.detection


def maps_of(
    errors: Errors, name: str
) -> tuple[dict[tuple[str, int | None], ErrorMap | None], str]:
    """The maps of an image, and why others have none."""
    diagnosis = errors.diagnose(name, maps=True)
    objects: list[Found | Missed] = [*diagnosis.found, *diagnosis.missed]
    wrong = diagnosis.false_positives
    maps: dict[tuple[str, int | None], ErrorMap | None] = {
        **{("object", own.record.truth): own.map for own in objects},
        **{("detection", own.record.detection): own.map for own in wrong},
    }
    beyond = f"of more than {errors.options.topk} (--topk)"
    return maps, beyond if any(maps.values()) else diagnosis.note or beyond


def write_maps(
    change: Change,
    number: int,
    pair: tuple[ErrorMap | None, ErrorMap | None],
    whys: tuple[str, str],
    images: PageImages,
) -> list[dict[str, Any]]:
    """Write the maps of both on one scale, and their difference."""
    peak = max((own.peak for own in pair if own is not None), default=0.0)
    written, values = [], []
    for side, own, why, seen in zip("AB", pair, whys, (change.a, change.b)):
        if own is None:
            note = "there is no box" if seen.box_xyxy is None else why
            written.append(PageMap("", f"Map of {side}", note))
            continue
        share = own.peak / peak
        note = f"{own.layer}, {own.inside:.0%} inside, maximum {share:.2f}"
        written.append(PageMap(f"{number}{side.lower()}", f"Map of {side}", note))
        values.append(own.saliency * share)
        images.write_map(change.image, written[-1], values[-1])
    if len(values) == 2:
        note = "red: more under B, blue: more under A"
        written.append(PageMap(f"{number}d", "B minus A", note, signed=True))
        images.write_map(change.image, written[-1], values[1] - values[0])
    return [asdict(page_map) for page_map in written]


def page_change(change: Change, maps: list[dict[str, Any]]) -> PageError:
    """What the page shows of a change."""
    a, b = change.a, change.b
    boxes = [("object", change.box_xyxy)] if change.truth is not None else []
    sides = (("of A", a.box_xyxy), ("of B", b.box_xyxy))
    boxes += [(role, box) for role, box in sides if box is not None]
    kinds = [side.kind.replace("missed: ", "") for side in (a, b)]
    whys = [f"{n}: {own.why}" for n, own in (("A", a), ("B", b)) if own.why]
    return PageError(
        change.image,
        f"{change.class_name}: {kinds[0]} → {kinds[1]}",
        " · ".join(whys),
        (
            change.change,
            a.kind,
            b.kind,
            change.found_by or "no object",
            change.class_name,
            change.size,
        ),
        max(a.score, b.score),
        abs(change.gained),
        tuple(boxes),
        tuple(PageMap(**own) for own in maps),
    )


def main() -> None:
    args = parse_args()
    name_b = args.config_b or args.config
    configs = [
        read_checked(args, args.config, args.a, "A"),
        read_checked(args, name_b, args.b, "B"),
    ]
    with config_mistakes(args.config):
        a = Errors(args, configs[0], args.a)
    with config_mistakes(name_b):
        b = Errors(args, configs[1], args.b)
    check_alike(a, b)
    out_dir = Path(args.out_dir)
    open_out_dir(out_dir, "a.jsonl")
    kept_a = Kept(out_dir / "a.jsonl", a.settings())
    kept_b = Kept(out_dir / "b.jsonl", b.settings())
    files = OwnFiles(out_dir, ASSETS)
    images = PageImages(files)
    found_a = a.look(kept_a, images, every=True, what="images under A")
    found_b = b.look(kept_b, images, what="images under B")

    changes = {
        own.image: compare_image(
            own,
            other,
            a.truths[own.image],
            a.names,
            a.num_objects,
            **a.thresholds,
        )
        for own, other in zip(found_a, found_b)
    }
    everything = [change for own in changes.values() for change in own]
    reports = [a.report(found_a).summary(), b.report(found_b).summary()]
    summary = {"a": reports[0], "b": reports[1], **summarize(everything)}
    texts = [
        {**as_written(own), "change": own.change, "found_by": own.found_by}
        for own in everything
    ]
    for name, text in (
        ("summary.json", json.dumps(summary, indent=1)),
        ("changes.json", json.dumps(texts, indent=1)),
        ("changes.csv", changes_csv(everything)),
    ):
        write_whole(out_dir / name, text.encode())
    print_report(summary)

    gained: Counter[str] = Counter()
    for own in everything:
        gained[own.image] += abs(own.gained)  # type: ignore[assignment]
    count = None if args.num_pictures < 0 else args.num_pictures
    most = [name for name, _ in gained.most_common(count)]
    drawn = Kept(out_dir / "maps.jsonl", {"a": a.settings(), "b": b.settings()})
    draw_maps(a, b, changes, most, images, drawn)
    shown: list[PageError] = []
    for name, own_changes in changes.items():
        note = f"not of the {len(most)} images that change most"
        none = [asdict(PageMap("", "No maps", note))]
        maps = drawn.known.get(a.key(name), [none] * len(own_changes))
        shown += map(page_change, own_changes, maps)
    objects = summary["objects"]
    write_errors_page(
        files,
        shown,
        title=f"From {Path(args.a).name} (A) to {Path(args.b).name} (B)",
        lead=f"{objects['only B']} objects found by B only, {objects['only A']} by A "
        f"only, {objects['both']} by both, {objects['neither']} by neither; AP "
        f"{reports[0]['ap']:.3f} → {reports[1]['ap']:.3f}.",
        noun=("box", "boxes"),
        columns=4,
        order="Greatest change first",
        images={own.image: own.image_hw for own in found_a},
        pictures={},
        groups={
            "Change": CHANGES,
            "Under A": (FOUND, NOTHING, *KINDS),
            "Under B": (FOUND, NOTHING, *KINDS),
            "Found by": (*FOUND_BY, "no object"),
            "Class": commonest(everything),
            "Size": SIZES,
        },
        roles={"object": _OBJECT, "of A": _A, "of B": _B},
        colors=_COLORS,
    )
    print(f"{out_dir}: index.html, summary.json, changes.json, changes.csv")


if __name__ == "__main__":
    run_tool(main)
