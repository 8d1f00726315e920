"""What the hooks add to a whole test run: YOLOX-nano on 128 images of COCO.

Each run is a process of its own, without hooks, with one and with both, with four
images drawn and with all; they take turns, and a share is the median over the rounds.
Processor seconds count all threads. The trial is what the hooks do before the run. A
drawn image is all that hooks do for it, in the loop and beside it, in plain images of
the same run: the rest of what it took. On a GPU, where there is one: then the memory
is the GPU's, and the processor's seconds are those of a thread that also waits for it.

    python tools/benchmarks/overhead.py
    python tools/benchmarks/overhead.py --rounds 1 --runs plain both_4
    python tools/benchmarks/overhead.py --amp
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from _measure import CONFIG, WEIGHTS, format_bytes, peak, print_table, reset_peak

KINDS = {
    "featmap": [dict(type="FeatMapVisHook")],
    "boxam": [dict(type="BoxAMVisHook")],
    "both": [dict(type="FeatMapVisHook"), dict(type="BoxAMVisHook")],
}
RUNS = {
    "plain": [],
    **{
        f"{kind}_{'all' if count < 0 else count}": [
            dict(hook, num_images=count) for hook in hooks
        ]
        for count in (4, -1)
        for kind, hooks in KINDS.items()
    },
}
# A run with four images, in plain runs; a drawn image, in plain images.
MOST_OF_FOUR = 1.05
MOST_PER_IMAGE = {"featmap": 1.5, "boxam": 2.0}
MOST_TRIAL, MOST_MEMORY = 0.5, 200e6


def child(name: str, amp: bool) -> dict[str, Any]:
    """Test once and tell what it took."""
    import torch
    from mmengine.config import Config
    from mmengine.runner import Runner

    import mmyolo_vis_hooks  # noqa: F401

    torch.set_num_threads(1)
    config = Config.fromfile(CONFIG)
    parts: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        config.update(load_from=str(WEIGHTS), work_dir=folder, log_level="ERROR")
        config.custom_hooks = [*config.custom_hooks[:-1], *RUNS[name]]
        config.test_cfg.update(fp16=amp)
        config.test_dataloader.update(num_workers=0, persistent_workers=False)
        runner = Runner.from_cfg(config)
        _watch(parts)
        # What the first forward loads and allocates is nobody's.
        with torch.no_grad():
            runner.model.eval().test_step(next(iter(runner.test_dataloader)))
        before = reset_peak()
        if on_gpu := torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        parts.clear()
        start, wall = time.process_time(), time.perf_counter()
        runner.test()
        cpu, wall = time.process_time() - start, time.perf_counter() - wall
        images = len(runner.test_dataloader.dataset)
        after = torch.cuda.max_memory_allocated() if on_gpu else peak()
    return dict(
        cpu=cpu, wall=wall, memory=after - before, images=images, parts=dict(parts)
    )


def _watch(parts: dict[str, float]) -> None:
    """Add up the processor seconds of the hooks' steps, each in its thread."""
    from mmyolo_vis_hooks.hooks.base import BaseVisHook
    from mmyolo_vis_hooks.hooks.vis_loop import VisLoop
    from mmyolo_vis_hooks.publish.backends import LocalAdapter
    from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
    from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel

    def timed(owner: Any, method: str, part: str) -> None:
        original: Callable = getattr(owner, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                parts[part] += time.thread_time() - start

        setattr(owner, method, run)

    timed(BaseVisHook, "before_run", "trial")
    timed(BaseVisHook, "_before_iter", "hook")
    timed(BaseVisHook, "_after_iter", "hook")
    timed(VisLoop, "make_sample", "look")
    timed(FeatMapPanel, "__call__", "draw")
    timed(BoxAMPanel, "__call__", "draw")
    timed(LocalAdapter, "add", "write")


def measure(runs: list[str], rounds: int, amp: bool) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in runs:
            words = [sys.executable, __file__, "--child", name, *["--amp"] * amp]
            output = subprocess.run(
                words, stdout=subprocess.PIPE, check=True, text=True
            )
            found[name].append(json.loads(output.stdout.splitlines()[-1]))
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    import torch

    def middle(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, found[name]))

    rows = []
    for name in found:
        cpu, wall = middle(name, itemgetter("cpu")), middle(name, itemgetter("wall"))
        images, memory = found[name][0]["images"], middle(name, itemgetter("memory"))
        row = [name, f"{cpu:.2f} s", f"{wall:.2f} s", format_bytes(memory)]
        if name != "plain":
            pairs = list(zip(found[name], found["plain"]))
            shares = [
                statistics.median(own[clock] / bare[clock] for own, bare in pairs)
                for clock in ("cpu", "wall")
            ]
            parts = {
                part: statistics.median(r["parts"].get(part, 0.0) for r in found[name])
                for part in ("trial", "hook", "look", "draw", "write")
            }
            drawn = parts["hook"] + parts["write"]
            count = images if name.endswith("all") else 4
            each, plain = drawn / count, (cpu - parts["trial"] - drawn) / images
            more = memory - middle("plain", itemgetter("memory"))
            row += [
                " / ".join(f"{share:.3f}" for share in shares),
                f"{each * 1e3:.0f} ms, {each / plain:.2f} plain",
                f"{parts['trial']:.2f} s",
                ", ".join(
                    f"{p} {parts[p] / drawn:.0%}" for p in ("look", "draw", "write")
                ),
                format_bytes(more),
            ]
        rows.append(row)
    columns = ["run", "processor", "wall", "memory", "in plain runs, processor / wall"]
    columns += ["a drawn image", "trial", "where it goes", "more memory"]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    print_table("A test run with the hooks", columns, rows, device)
    print(
        f"Goals: four images <= {MOST_OF_FOUR} plain runs; a drawn image <= "
        f"{MOST_PER_IMAGE['featmap']} plain images for FeatMapVisHook, <= "
        f"{MOST_PER_IMAGE['boxam']} for BoxAMVisHook; trial <= {MOST_TRIAL} s; "
        f"<= {format_bytes(MOST_MEMORY)} more memory"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--amp", action="store_true", help="under autocast")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.amp)))
        return
    runs = ["plain", *(r for r in args.runs if r != "plain")]
    report(measure(runs, args.rounds, args.amp))


if __name__ == "__main__":
    main()
