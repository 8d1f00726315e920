"""Time and memory of a feature-map overlay, side by side with MMEngine.

Both sides draw the same map over the same image at the image's full resolution:
MMEngine's ``Visualizer.draw_featmap`` and this package's ``overlay_feature_map``.
Each measurement runs in a child process of its own, whose memory is limited, and
the parent compares the two pictures. The feature map is 1/32 of the image.

    python tools/benchmarks/featmap.py
    python tools/benchmarks/featmap.py --sizes 1920x1080 --channels 512
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _measure import (
    describe_machine,
    format_bytes,
    format_seconds,
    num_cores,
    peak,
    positive,
    reset_peak,
    status,
    warn_if_busy,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

STRIDE = 32
OURS, MMENGINE = "this package", "MMEngine"
TARGET_SIZE, TARGET_CHANNELS = (1920, 1080), 512
TARGET_SPEED_UP, TARGET_SAVED = 100.0, 4e9
# One run that takes this long is repeated no more.
LONG_RUN_S = 5.0


@dataclass(frozen=True)
class Job:
    """What one child measures.

    Attributes:
        side: ``OURS`` or ``MMENGINE``.
        size_wh: Width and height of the image, pixels.
        channels: Channels of the feature map.
        reduction: ``'select_max'`` or ``'squeeze_mean'``.
        repeats: Greatest number of timed runs.
        threads: Threads of torch and OpenCV.
        limit_bytes: Memory the child may allocate beyond its start.
    """

    side: str
    size_wh: tuple[int, int]
    channels: int
    reduction: str
    repeats: int
    threads: int
    limit_bytes: int

    @property
    def map_hw(self) -> tuple[int, int]:
        width, height = self.size_wh
        return math.ceil(height / STRIDE), math.ceil(width / STRIDE)

    @property
    def upsampled_bytes(self) -> int:
        """Size of all channels in float32 at the image's resolution."""
        return self.channels * self.size_wh[0] * self.size_wh[1] * 4


@dataclass(frozen=True)
class Result:
    """What a child reports; ``error`` is set if it did not finish."""

    seconds: float = math.nan
    runs: int = 0
    peak_bytes: int = 0
    error: str = ""


# --- child ---------------------------------------------------------------------


def measure(job: Job, picture_path: Path) -> Result:
    """Run one side in this process and save its picture."""
    import cv2
    import torch

    torch.set_num_threads(job.threads)
    cv2.setNumThreads(job.threads)
    draw = _ours() if job.side == OURS else _mmengine()
    # Whatever is imported or set up at the first call is not part of the drawing.
    draw(torch.rand(4, 2, 2), np.zeros((64, 64, 3), np.uint8), job.reduction)

    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(job.channels, *job.map_hw, generator=generator).relu_()
    image_rgb = np.random.default_rng(0).integers(
        0, 256, (job.size_wh[1], job.size_wh[0], 3), dtype=np.uint8
    )
    _limit_memory(job.limit_bytes)
    before = reset_peak()
    seconds: list[float] = []
    picture = np.empty(0)
    while len(seconds) < job.repeats and max(seconds, default=0) < LONG_RUN_S:
        picture = np.empty(0)  # so that two are never held at once
        start = time.perf_counter()
        picture = draw(feature_map, image_rgb, job.reduction)
        seconds.append(time.perf_counter() - start)
    peak_bytes = peak() - before
    np.save(picture_path, picture)
    return Result(statistics.median(seconds), len(seconds), peak_bytes)


def _ours() -> Callable[[Any, np.ndarray, str], np.ndarray]:
    from mmyolo_vis_hooks.render.featmap_panel import overlay_feature_map

    return lambda feature_map, image_rgb, reduction: overlay_feature_map(
        feature_map, image_rgb, channel_reduction=reduction
    )


def _mmengine() -> Callable[[Any, np.ndarray, str], np.ndarray]:
    import warnings

    from mmengine.visualization import Visualizer

    warnings.filterwarnings("ignore", message="Since the spatial dimensions")
    return lambda feature_map, image_rgb, reduction: Visualizer.draw_featmap(
        feature_map, image_rgb, channel_reduction=reduction
    )


def _limit_memory(limit_bytes: int) -> None:
    """Limit what is allocated from now on.

    Not RLIMIT_AS: torch maps far more address space than it uses.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = status("VmData") + limit_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def child_main(request: str, picture: str) -> None:
    """Entry of a child: a job as JSON in, a result as JSON out."""
    fields = json.loads(request)
    job = Job(**{**fields, "size_wh": tuple(fields["size_wh"])})
    try:
        result = measure(job, Path(picture))
    except MemoryError as error:
        result = Result(error=f"out of memory: {error}")
    except RuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        result = Result(error="out of memory")
    print(json.dumps(asdict(result)))


# --- parent --------------------------------------------------------------------


def run_child(job: Job, picture: Path) -> Result:
    """Measure in a fresh process."""
    completed = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(job)), str(picture)],
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode != 0:
        if completed.returncode == -9:
            return Result(error="killed by the system, out of memory")
        raise SystemExit(
            f"The child for {job.side} failed with {completed.returncode}:\n"
            f"{completed.stderr}"
        )
    return Result(**json.loads(completed.stdout.splitlines()[-1]))


def compare(first: Path, second: Path) -> str:
    """How far two pictures differ."""
    if not (first.exists() and second.exists()):
        return "-"
    one, other = np.load(first), np.load(second)
    if one.shape != other.shape:
        return "other size"
    difference = np.maximum(one, other) - np.minimum(one, other)
    if not difference.any():
        return "identical"
    return f"within {difference.max()}"


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KeyError("MemAvailable")


def parse_size(text: str) -> tuple[int, int]:
    names = {"1080p": "1920x1080", "4k": "3840x2160"}
    try:
        width, height = (int(n) for n in names.get(text.lower(), text).split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write WIDTHxHEIGHT such as 1920x1080"
        ) from None
    if min(width, height) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return width, height


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        metavar="WxH",
        default=[(640, 640), (1920, 1080), (4000, 3000)],
        help="image sizes, width first",
    )
    parser.add_argument(
        "--channels", type=positive, nargs="+", default=[128, 512, 1024]
    )
    parser.add_argument(
        "--reductions",
        nargs="+",
        choices=["select_max", "squeeze_mean"],
        default=["select_max", "squeeze_mean"],
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=15,
        help="timed runs of this package; MMEngine gets a fifth",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=num_cores(),
        help="threads of torch and OpenCV",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="memory of a child; default: 85 %% of what is available now",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def measure_pair(job: Job, folder: Path) -> tuple[Result, Result, str]:
    """Ours and MMEngine's result for one setting, and how the pictures differ."""
    ours_path, theirs_path = folder / "ours.npy", folder / "mmengine.npy"
    for path in (ours_path, theirs_path):
        path.unlink(missing_ok=True)
    ours = run_child(job, ours_path)
    theirs_job = Job(
        **{**asdict(job), "side": MMENGINE, "repeats": max(1, job.repeats // 5)}
    )
    if job.upsampled_bytes > job.limit_bytes:
        theirs = Result(error=f"needs {format_bytes(job.upsampled_bytes)}")
    else:
        theirs = run_child(theirs_job, theirs_path)
        if theirs.error:
            theirs = Result(
                error=f"{theirs.error}; needs > {format_bytes(job.upsampled_bytes)}"
            )
    return ours, theirs, compare(ours_path, theirs_path)


def add_row(table: Table, job: Job, ours: Result, theirs: Result, same: str) -> None:
    width, height = job.size_wh
    row = [f"{width}x{height}", str(job.channels), job.reduction]
    if ours.error:
        row += [ours.error, "-"]
    else:
        row += [format_seconds(ours.seconds), format_bytes(ours.peak_bytes)]
    if theirs.error:
        row += ["skipped", theirs.error, "-", "-"]
    else:
        row += [format_seconds(theirs.seconds), format_bytes(theirs.peak_bytes)]
        if ours.error:
            row += ["-", "-"]
        else:
            row += [
                f"{theirs.seconds / ours.seconds:.0f}x",
                format_bytes(theirs.peak_bytes - ours.peak_bytes),
            ]
    table.add_row(*row, same)


def target_line(job: Job, ours: Result, theirs: Result) -> str | None:
    """Whether the promise is kept, at the setting it was made for."""
    if (job.size_wh, job.channels) != (TARGET_SIZE, TARGET_CHANNELS):
        return None
    if ours.error or theirs.error:
        return None
    speed_up = theirs.seconds / ours.seconds
    saved = theirs.peak_bytes - ours.peak_bytes
    kept = speed_up >= TARGET_SPEED_UP and saved >= TARGET_SAVED
    return (
        f"1080p/512 {job.reduction}: {speed_up:.0f}x faster, {format_bytes(saved)} "
        f"less (target: {TARGET_SPEED_UP:.0f}x and {format_bytes(TARGET_SAVED)}): "
        + ("reached" if kept else "NOT reached")
    )


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child_main(*sys.argv[2:4])
        return 0
    args = parse_args()
    console = Console()
    if not sys.platform.startswith("linux"):
        console.print("This benchmark reads /proc and sets limits that only Linux has.")
        return 2
    limit = int(
        args.memory_limit * 1e9 if args.memory_limit else 0.85 * available_bytes()
    )
    table = Table(
        title="Overlay of a feature map at the image's full resolution",
        caption=describe_machine(args.threads)
        + f"; memory limit of a child {format_bytes(limit)}; median of "
        f"{args.repeats} runs of this package and up to {max(1, args.repeats // 5)} of "
        "MMEngine; memory beyond the process that holds map and image",
    )
    table.add_column("image")
    for name in ("channels", "reduction", OURS, "memory", MMENGINE, "memory"):
        table.add_column(name, justify="left" if name == "reduction" else "right")
    for name in ("faster", "memory saved", "grey levels"):
        table.add_column(name, justify="right")

    jobs = [
        Job(OURS, size, channels, reduction, args.repeats, args.threads, limit)
        for size in args.sizes
        for channels in args.channels
        for reduction in args.reductions
    ]
    warn_if_busy(console)
    lines, records = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, console=console, transient=True)
    with tempfile.TemporaryDirectory() as folder, progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            name = f"{job.size_wh[0]}x{job.size_wh[1]}, {job.channels} channels"
            progress.update(task, description=f"{name}, {job.reduction}")
            ours, theirs, same = measure_pair(job, Path(folder))
            add_row(table, job, ours, theirs, same)
            line = target_line(job, ours, theirs)
            lines += [line] if line else []
            records.append(
                {
                    "job": asdict(job),
                    "ours": asdict(ours),
                    "mmengine": asdict(theirs),
                    "pictures": same,
                }
            )
            progress.advance(task)
    # A pipe has no width of its own; the table needs about this much.
    console = console if console.is_terminal else Console(width=136)
    console.print(table)
    for line in lines:
        console.print(line)
    if args.json:
        args.json.write_text(json.dumps(records, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
