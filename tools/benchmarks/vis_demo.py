"""Speed and memory of the demo tools over a folder of images.

- ``speed``: images per second of ``featmap_vis_demo.py`` and ``boxam_vis_demo.py``
  with their pictures and page, beside a plain loop over the same images: read, test
  pipeline, network, and a picture of the same size written as JPEG. The network's part
  of ``boxam_vis_demo.py`` is the forward with the explanations, which
  ``boxam.py`` measures in forwards. Both take turns, round after round. The goal: at
  least 80 % of the plain loop, since reading, drawing and encoding overlap with the
  network.
- ``memory``: resident memory of a process while it draws 1,000 images.

    python tools/benchmarks/vis_demo.py
    python tools/benchmarks/vis_demo.py --parts memory --images 200
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from _measure import (
    describe_machine,
    format_bytes,
    format_seconds,
    num_cores,
    positive,
    warn_if_busy,
)
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MMVIS_SHARED") or ROOT.parent / "shared")
PARTS = ("speed", "memory")
TOOLS = ("featmap_vis_demo", "boxam_vis_demo")
TARGET_SPEED = 0.8
# Of the memory after a tenth of the images.
TARGET_GROWTH = 1.05


def fill_folder(folder: Path, count: int) -> None:
    """Put so many photographs into a folder, the same few again and again."""
    photos = sorted((SHARED / "data" / "coco128").rglob("*.jpg"))
    if not photos:
        import cv2
        from sklearn.datasets import load_sample_images

        for number, image in enumerate(load_sample_images().images):
            path = folder.parent / f"photo{number}.jpg"
            cv2.imwrite(str(path), image[..., ::-1])
            photos.append(path)
    for number, photo in zip(range(count), itertools.cycle(photos)):
        os.symlink(photo, folder / f"{number:05d}.jpg")


def prepare(
    tool: str, folder: Path, out_dir: Path
) -> tuple[Any, Callable[[], Any], Any]:
    """A tool's network, ready, and the function that draws the folder."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    import importlib

    import _vis_demo

    module = importlib.import_module(tool)
    weights = SHARED / "weights" / "yolox_nano_coco.pth"
    config = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"
    if not weights.is_file():
        sys.exit(f"the weights of YOLOX-nano are not in {SHARED}")
    found: dict[str, Any] = {}

    def keep(demo: Any, maker: Any, panel: Any, **page: Any) -> int:
        found.update(demo=demo, maker=maker, panel=panel, **page)
        return 0

    arguments = [tool, str(folder), str(config), str(weights), "--out-dir"]
    os.environ.setdefault("MMVIS_SHARED", str(SHARED))
    with (
        mock.patch.object(sys, "argv", [*arguments, str(out_dir)]),
        mock.patch.object(_vis_demo.Demo, "run", keep),
        contextlib.suppress(SystemExit),
    ):
        module.main()
    demo = found.pop("demo")

    def draw() -> None:
        with mock.patch.object(_vis_demo, "Console", _silent):
            demo.run(**found)

    return demo, draw, found["maker"]


def _silent(**options: Any) -> Console:
    return Console(file=open(os.devnull, "w"), **{**options, "stderr": False})


def plain_loop(
    demo: Any, maker: Any, explains: bool, out_dir: Path
) -> Callable[[], None]:
    """Read, network, write: what has to be done at the least."""
    import cv2
    import torch
    from mmengine.dataset import pseudo_collate

    import _vis_demo

    detector = maker._detector
    drawn = Path(demo.args.out_dir)
    pictures: dict[str, Any] = {
        path.stem: cv2.imread(str(path)) for path in sorted(drawn.glob("*.jpg"))
    }

    def loop() -> None:
        for number, image in enumerate(demo.source):
            loaded = _vis_demo.load_image(demo.pipeline, number, image)
            if explains:
                maker.run(image.name, loaded, demo.placement)
            else:
                data = demo.placement.pipeline.pack(loaded)
                with torch.no_grad():
                    detector.test_step(pseudo_collate([data]))
            file = out_dir / f"{image.name}.jpg"
            quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
            cv2.imwrite(str(file), pictures[image.name], quality)

    return loop


def measure_speed(tool: str, count: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds per image of the tool and of the plain loop, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, drawn, plain = (Path(scratch) / n for n in ("in", "drawn", "plain"))
        for path in (folder, plain):
            path.mkdir()
        fill_folder(folder, count)
        demo, draw, maker = prepare(tool, folder, drawn)
        draw()
        loop = plain_loop(demo, maker, tool == "boxam_vis_demo", plain)
        loop()
        ours: list[float] = []
        others: list[float] = []
        for _ in range(rounds):
            for job, seconds in ((draw, ours), (loop, others)):
                start = time.perf_counter()
                job()
                seconds.append((time.perf_counter() - start) / count)
    ratios = [plain / own for own, plain in zip(ours, others)]
    return statistics.median(ours), statistics.median(others), statistics.median(ratios)


def measure_memory(tool: str, count: int) -> list[int]:
    """Resident bytes after each tenth of the images, in a process of its own."""
    request = json.dumps(dict(tool=tool, count=count))
    result = subprocess.run(
        [sys.executable, __file__, "--child", request],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def child_main(tool: str, count: int) -> None:
    """Draw a folder and print what it took."""
    import _vis_demo

    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "in"
        folder.mkdir()
        fill_folder(folder, count)
        draw = prepare(tool, folder, Path(scratch) / "out")[1]
        load = _vis_demo.load_image
        done = 0

        def watched(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done % max(1, count // 10) == 0:
                sizes.append(resident())
            return load(*args)

        with mock.patch.object(_vis_demo, "load_image", watched):
            draw()
    print(json.dumps(sizes))


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=positive, default=1000, help="for memory")
    parser.add_argument("--batch", type=positive, default=64, help="images of a round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def main() -> int:
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--child"]:
        sys.path.insert(0, str(ROOT))
        child_main(**json.loads(sys.argv[2]))
        return 0
    args = parse_args()
    console = Console()
    if not sys.platform.startswith("linux"):
        console.print("This benchmark reads /proc, which only Linux has.")
        return 2
    warn_if_busy(console)
    table = Table(
        title="Demo tools over a folder", caption=describe_machine(num_cores())
    )
    for title in ("tool", "what", "here", "plain loop", "ratio", "goal"):
        table.add_column(title)
    figures = []
    for tool in args.tools:
        if "speed" in args.parts:
            own, plain, ratio = measure_speed(tool, args.batch, args.rounds)
            reached = "reached" if ratio >= TARGET_SPEED else "NOT reached"
            table.add_row(
                tool,
                f"time per image, {args.batch} images",
                format_seconds(own),
                format_seconds(plain),
                f"{ratio:.2f} of its speed",
                f">= {TARGET_SPEED}: {reached}",
            )
            figures.append(dict(tool=tool, part="speed", own=own, plain=plain))
        if "memory" in args.parts:
            sizes = measure_memory(tool, args.images)
            growth = sizes[-1] / sizes[0]
            reached = "reached" if growth <= TARGET_GROWTH else "NOT reached"
            table.add_row(
                tool,
                f"memory over {args.images} images",
                f"{format_bytes(sizes[0])} at first, {format_bytes(sizes[-1])} at last",
                "",
                f"{growth:.3f}",
                f"<= {TARGET_GROWTH}: {reached}",
            )
            figures.append(dict(tool=tool, part="memory", sizes=sizes))
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
