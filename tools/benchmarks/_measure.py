"""What the benchmarks share: the detector, turns, memory, tables."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MMVIS_SHARED") or ROOT.parent / "shared")
CONFIG = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"
WEIGHTS = SHARED / "weights" / "yolox_nano_coco.pth"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def take_turns(
    jobs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of all jobs, run in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def finish(device: Any) -> None:
    """Wait for what a GPU was given to do."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> int:
    """Forget the peak so far; the resident memory now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The greatest resident memory since :func:`reset_peak`, bytes."""
    return status("VmHWM")


def format_bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def verdict(value: float, goal: float, *, at_most: bool = False) -> str:
    """A goal, and whether a value reaches it."""
    reached = value <= goal if at_most else value >= goal
    sign = "<=" if at_most else ">="
    return f"{sign} {goal:g}: " + ("reached" if reached else "NOT reached")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    device: str = "cpu",
) -> None:
    """Print figures, and on which machine they were measured."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    if device != "cpu":
        import torch

        model = f"{torch.cuda.get_device_name(device)}, {model}"
    cores = len(os.sched_getaffinity(0))
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "mmengine")]
    table = Table(title=title, caption=", ".join([model, f"{cores} cores", *versions]))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    load = os.getloadavg()[0]
    if load > 1.5 * cores:
        console.print(f"Other programs kept this machine busy (load {load:.1f}).")
