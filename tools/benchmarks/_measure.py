"""What the benchmarks share: memory, the machine's description, formats."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

from rich.console import Console


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


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine(threads: int) -> str:
    import importlib.metadata as metadata

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "mmengine", "numpy")
    )
    return f"{model}, {num_cores()} cores, {threads} threads; {versions}"


def warn_if_busy(console: Console) -> None:
    """Say so if other programs would spoil the times."""
    load = os.getloadavg()[0]
    if load > num_cores() / 2:
        console.print(
            f"Other programs keep this machine busy (load {load:.1f} on {num_cores()} "
            "cores): times will be too long and vary."
        )


def positive(text: str) -> int:
    """A positive integer from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)
