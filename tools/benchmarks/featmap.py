"""Time and memory of a feature-map overlay, side by side with MMEngine.

Both sides draw the same map over the same image at the image's full resolution:
MMEngine's ``Visualizer.draw_featmap`` and this package's ``overlay_feature_map``. The
map is 1/32 of the image. Each measurement has a process of its own; memory is what it
takes beyond map and image. Linux only.

    python tools/benchmarks/featmap.py
    python tools/benchmarks/featmap.py --sizes 1920x1080 --channels 512
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _measure import format_bytes, format_seconds, peak, print_table, reset_peak

STRIDE = 32
REDUCTIONS = ("select_max", "squeeze_mean")
OURS, MMENGINE = "this package", "MMEngine"
GOAL_AT = ((1920, 1080), 512)
GOAL_SPEED_UP, GOAL_SAVED = 100.0, 4e9


def measure(
    side: str, size_wh: tuple[int, int], channels: int, reduction: str, repeats: int
) -> tuple[float, int, np.ndarray]:
    """Median seconds, bytes at the peak and the picture of one side."""
    import torch
    from mmengine.visualization import Visualizer

    from mmyolo_vis_hooks.options import FeatMapOptions
    from mmyolo_vis_hooks.render.featmap_panel import overlay_feature_map

    warnings.simplefilter("ignore")  # MMEngine's, of map and image in two sizes
    draw: Any = partial(Visualizer.draw_featmap, channel_reduction=reduction)
    if side == OURS:
        options = FeatMapOptions(channel_reduction=reduction)
        draw = partial(overlay_feature_map, options=options)
    # Whatever is set up at the first call is not part of the drawing.
    small = np.zeros((64, 64, 3), np.uint8)
    draw(torch.rand(4, 2, 2), small)
    width, height = size_wh
    cells_hw = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(channels, *cells_hw, generator=generator).relu_()
    shape = (height, width, 3)
    image_rgb = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before, seconds = reset_peak(), []
    for _ in range(repeats):
        picture = np.empty(0)  # so that two are never held at once
        start = time.perf_counter()
        picture = draw(feature_map, image_rgb)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak() - before, picture


def row_of(
    size_wh: tuple[int, int], channels: int, reduction: str, repeats: int
) -> list[str]:
    """Both sides at one setting, and how far their pictures differ."""
    row = ["{}x{}".format(*size_wh), str(channels), reduction]
    setting = (size_wh, channels, reduction)
    seconds, taken, picture = in_a_process(OURS, *setting, repeats)
    row += [format_seconds(seconds), format_bytes(taken)]
    # All channels at the image's resolution, and what is made of them.
    needed = channels * size_wh[0] * size_wh[1] * 4
    if 1.3 * needed > available_bytes():
        return [*row, "", f"needs {format_bytes(needed)}", "", "", "", ""]
    theirs = in_a_process(MMENGINE, *setting, max(1, repeats // 5))
    speed_up, saved = theirs[0] / seconds, theirs[1] - taken
    apart = np.abs(picture.astype(int) - theirs[2]).max()
    row += [format_seconds(theirs[0]), format_bytes(theirs[1])]
    row += [f"{speed_up:.0f}x", format_bytes(saved), f"within {apart}"]
    if (size_wh, channels) != GOAL_AT:
        return [*row, ""]
    reached = speed_up >= GOAL_SPEED_UP and saved >= GOAL_SAVED
    goal = f"{GOAL_SPEED_UP:.0f}x, {format_bytes(GOAL_SAVED)}: "
    return [*row, goal + ("reached" if reached else "NOT reached")]


def in_a_process(*setting: Any) -> tuple[float, int, np.ndarray]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, *setting).result()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise KeyError("MemAvailable")


def parse_size(text: str) -> tuple[int, int]:
    width, height = (int(n) for n in text.split("x"))
    return width, height


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    sizes = [(640, 640), (1920, 1080), (4000, 3000)]
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", metavar="WxH", default=sizes
    )
    parser.add_argument("--channels", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument(
        "--reductions", nargs="+", choices=REDUCTIONS, default=REDUCTIONS
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="MMEngine gets a fifth (default: 15)"
    )
    args = parser.parse_args()
    rows = [
        row_of(size_wh, channels, reduction, args.repeats)
        for size_wh in args.sizes
        for channels in args.channels
        for reduction in args.reductions
    ]
    columns = ["image", "channels", "reduction", OURS, "memory", MMENGINE, "memory"]
    columns += ["faster", "saved", "grey levels", "goal"]
    print_table("Overlay of a feature map at the image's resolution", columns, rows)


if __name__ == "__main__":
    main()
