"""Speed and memory of the demo tools over a folder of images.

- Images per second with their pictures and page, beside a plain loop over the same
  images: read, test pipeline, network, and a picture of the same size written as JPEG.
  The network's part of ``boxam_vis_demo.py`` is the forward with the explanations,
  which ``boxam.py`` measures. The goal: at least 80 % of the plain loop, since reading,
  drawing and encoding overlap with the network.
- Resident memory of a process while it draws 1,000 images. Linux only.

    python tools/benchmarks/vis_demo.py
    python tools/benchmarks/vis_demo.py --images 200
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from _measure import (
    CONFIG,
    SHARED,
    WEIGHTS,
    format_bytes,
    format_seconds,
    print_table,
    status,
    take_turns,
    verdict,
)

TOOLS = ("featmap_vis_demo", "boxam_vis_demo")
LEAST_SPEED = 0.8
# Of the memory after a tenth of the images.
MOST_GROWTH = 1.05


def fill_folder(folder: Path, count: int) -> None:
    """Put so many photographs into a folder, the same few again and again."""
    folder.mkdir()
    photos = sorted((SHARED / "data" / "coco128").rglob("*.jpg"))
    for number, photo in zip(range(count), itertools.cycle(photos)):
        os.symlink(photo, folder / f"{number:05d}.jpg")


def prepare(tool: str, folder: Path, out_dir: Path) -> tuple[Any, Any, Callable]:
    """A tool's run and what makes its samples, and the function that draws a folder."""
    import _vis_demo

    found: list[Any] = []

    def keep(demo: Any, *args: Any, **page: Any) -> int:
        found.extend([demo, args, page])
        return 0

    words = [tool, folder, CONFIG, WEIGHTS, "--out-dir", out_dir]
    with (
        mock.patch.object(sys, "argv", list(map(str, words))),
        mock.patch.object(_vis_demo.Demo, "run", keep),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(tool).main()
    demo, (maker, panel), page = found

    def draw() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            demo.run(maker, panel, **page)

    return demo, maker, draw


def plain_loop(
    demo: Any, maker: Any, explains: bool, out_dir: Path
) -> Callable[[], None]:
    """Read, network, write: what has to be done at the least."""
    import cv2
    import torch
    from mmengine.dataset import pseudo_collate

    import _vis_demo
    from mmyolo_vis_hooks.data.alignment import PlacedImage

    out_dir.mkdir()
    pictures: dict[str, Any] = {
        path.stem: cv2.imread(str(path))
        for path in Path(demo.args.out_dir).glob("*.jpg")
    }

    def loop() -> None:
        for number, image in enumerate(demo.source):
            loaded = _vis_demo.load_image(demo.pipeline, number, image)
            if explains:
                maker.run(PlacedImage(image.name, loaded, demo.placement))
            else:
                data = demo.placement.pipeline.pack(loaded)
                with torch.no_grad():
                    maker._detector.test_step(pseudo_collate([data]))
            quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
            file = str(out_dir / f"{image.name}.jpg")
            cv2.imwrite(file, pictures[image.name], quality)

    return loop


def speed_of(tool: str, count: int, rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        fill_folder(scratch / "in", count)
        demo, maker, draw = prepare(tool, scratch / "in", scratch / "drawn")
        draw()
        loop = plain_loop(demo, maker, tool == TOOLS[1], scratch / "plain")
        own, plain = take_turns({"own": draw, "plain": loop}, rounds).values()
    shown = [format_seconds(statistics.median(s) / count) for s in (own, plain)]
    speed = statistics.median(b / a for a, b in zip(own, plain))
    job = f"time per image, {count} images"
    return [tool, job, *shown, f"{speed:.2f} of its speed", verdict(speed, LEAST_SPEED)]


def memory_of(tool: str, count: int) -> list[str]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        first, *_, last = pool.submit(watch_memory, tool, count).result()
    shown = f"{format_bytes(first)} at first, {format_bytes(last)} at last"
    growth = last / first
    goal = verdict(growth, MOST_GROWTH, at_most=True)
    return [tool, f"memory over {count} images", shown, "", f"{growth:.3f}", goal]


def watch_memory(tool: str, count: int) -> list[int]:
    """Resident bytes after each tenth of the images."""
    import _vis_demo

    sizes: list[int] = []
    load, numbers = _vis_demo.load_image, itertools.count(1)

    def watched(*args: Any) -> Any:
        if next(numbers) % max(1, count // 10) == 0:
            sizes.append(status("VmRSS"))
        return load(*args)

    with tempfile.TemporaryDirectory() as name:
        fill_folder(Path(name, "in"), count)
        _, _, draw = prepare(tool, Path(name, "in"), Path(name, "out"))
        with mock.patch.object(_vis_demo, "load_image", watched):
            draw()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--images", type=int, default=1000, help="for memory (1000)")
    parser.add_argument("--batch", type=int, default=64, help="for speed (64)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    args = parser.parse_args()
    if not WEIGHTS.is_file():
        sys.exit(f"the weights of YOLOX-nano are not in {SHARED}")
    rows = []
    for tool in args.tools:
        rows.append(speed_of(tool, args.batch, args.rounds))
        rows.append(memory_of(tool, args.images))
    columns = ["tool", "what", "here", "plain loop", "ratio", "goal"]
    print_table("Demo tools over a folder", columns, rows)


if __name__ == "__main__":
    main()
