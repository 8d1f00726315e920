"""Train a small detector and watch what it sees, and why it finds its boxes.

    python tools/demo.py [--work-dir work_dirs/demo] [--epochs 12]

Makes a data set of handwritten digits from what scikit-learn ships, trains a
YOLOv8-n on it with the three hooks on, tests the best checkpoint with
``tools/test.py``, and lays the pictures of the same images out by epoch.
Nothing is downloaded. It takes a few minutes on two cores, and fails if the detector
is not good or a picture is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / "configs" / "demo" / "yolov8_n_digits.py"
EPOCHS = 12
NUM_TRAIN = 600
NUM_VAL = 80
REQUIRED_MAP50 = 0.8
METRIC = "coco/bbox_mAP_50"


class DemoError(Exception):
    """The demo did not do what it promises."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/demo"), help="where all goes"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at least 2")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help="images")
    parser.add_argument("--num-val", type=int, default=NUM_VAL, help="images")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args()
    if args.epochs < 2 or args.num_train < 16 or args.num_val < 4:
        parser.error("needs 2 epochs, 16 training and 4 validation images at least")
    return args


def main() -> int:
    args = parse_args()
    # Threads that spin for long while they wait make a training many times slower
    # where others want the cores too. OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    # Not the sys.stdout that is turned to the log file below.
    console = Console(file=sys.stdout, highlight=False)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    log = args.work_dir / "demo.log"
    try:
        run(args, console, log)
    except DemoError as error:
        console.print(
            f"[bold red]The demo failed:[/] {escape(str(error))}\n"
            f"The log is {shown(log)}",
            soft_wrap=True,
        )
        return 1
    except KeyboardInterrupt:
        console.print(f"Interrupted. The log is {shown(log)}")
        return 130
    except Exception:
        console.print(f"[bold red]The demo failed.[/] The log is {shown(log)}")
        raise
    return 0


def run(args: argparse.Namespace, console: Console, log: Path) -> None:
    start = time.monotonic()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, *times, console=console)
    with progress, output_to(log):
        task = progress.add_task("Importing torch and OpenMMLab", total=1)
        import_libraries()
        check_device(args.device)
        progress.update(task, completed=1)

        config = make_config(args, make_data(args, progress))
        config_path = args.work_dir / "config.py"
        config.dump(config_path)
        trained = train(config, progress)
        tested = test(config_path, trained["checkpoint"], args.work_dir, progress)
        sheets = check_pictures(config, trained, tested, progress)
    tell(console, trained, tested, sheets, time.monotonic() - start)
    least = {"epochs": EPOCHS, "num_train": NUM_TRAIN, "num_val": NUM_VAL}
    is_full = all(getattr(args, name) >= number for name, number in least.items())
    if is_full and tested["metrics"][METRIC] < REQUIRED_MAP50:
        raise DemoError(
            f"mAP50 is {tested['metrics'][METRIC]:.3f}, and {REQUIRED_MAP50} or more "
            f"is expected after {args.epochs} epochs"
        )


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what libraries print and warn into a file."""
    with (
        open(path, "w", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def import_libraries() -> None:
    """Import what takes seconds, or say what is missing."""
    # The package of this checkout, installed or not.
    sys.path.insert(0, str(TOOLS.parent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # The package first: it looks for a usable mmcv.
            for name in ("mmyolo_vis_hooks", "mmyolo.models"):
                importlib.import_module(name)
        except (ImportError, RuntimeError) as error:
            raise DemoError(f"{error}\n'make install' installs all it needs") from error


def check_device(device: str) -> None:
    """Keep off a GPU for which mmcv has no ops."""
    import torch
    from mmcv.ops import get_compiling_cuda_version

    if get_compiling_cuda_version() == "not available":
        if device == "cuda":
            raise DemoError(
                "--device cuda: mmcv was built without CUDA ops; run "
                "'FORCE_CUDA=1 python tools/mmcv_builder.py --force', or take "
                "--device cpu"
            )
        # In time: nothing has asked torch for a GPU yet.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if device == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no GPU; use --device cpu")


def make_data(args: argparse.Namespace, progress: Progress) -> Path:
    from digits_dataset import DigitsOptions, make_dataset

    options = DigitsOptions(args.num_train, args.num_val, args.seed)
    total = args.num_train + args.num_val
    task = progress.add_task("Digits on photos", total=total)
    root = make_dataset(
        (args.work_dir / "digits").resolve(),
        options,
        on_image=lambda: progress.advance(task),
    )
    progress.update(task, completed=total)
    return root


def make_config(args: argparse.Namespace, data_root: Path) -> Any:
    """The demo's config with the options of the command line in it."""
    from mmengine.config import Config

    config = Config.fromfile(CONFIG)
    config.work_dir = str((args.work_dir / "train").resolve())
    config.randomness.seed = args.seed
    for split in ("train", "val", "test"):
        config[f"{split}_dataloader"].dataset.data_root = f"{data_root}/"
    for split in ("val", "test"):
        config[f"{split}_evaluator"].ann_file = f"{data_root}/annotations/val.json"
    config.train_cfg.max_epochs = args.epochs
    config.default_hooks.checkpoint.interval = args.epochs
    cosine = config.param_scheduler[-1]
    cosine.update(end=args.epochs, T_max=args.epochs - 1)
    # A demo that hides a failure shows nothing.
    for hook in vis_hooks(config).values():
        hook.on_error = "raise"
    return config


def vis_hooks(config: Any) -> dict[str, Any]:
    """The configs of the hooks that the demo is about, by the name in their tags."""
    names = dict(FeatMapVisHook="featmap", BoxAMVisHook="boxam", ErrorVisHook="errors")
    hooks = {hook.type: hook for hook in config.custom_hooks}
    return {name: hooks[kind] for kind, name in names.items()}


def train(config: Any, progress: Progress) -> dict[str, Any]:
    """Train; give the best checkpoint, the pictures' folder and the metrics."""
    import torch
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    class ProgressHook(Hook):
        """Moves the bar and keeps the metrics of each validation."""

        priority = "VERY_LOW"
        history: dict[int, dict[str, float]] = {}
        task = progress.add_task("Training", total=None)

        def before_train(self, runner: Runner) -> None:
            progress.update(self.task, total=runner.max_iters)

        def before_train_epoch(self, runner: Runner) -> None:
            self._describe(f"{runner.epoch + 1}/{runner.max_epochs}")

        def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            progress.advance(self.task)

        def before_val_epoch(self, runner: Runner) -> None:
            self._describe(f"{runner.epoch}/{runner.max_epochs}, validating")

        def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
            self.history[runner.epoch] = metrics
            # Of maps there are none as long as nothing is found.
            energy = runner.message_hub.log_scalars.get("val/boxam/energy_box")
            worth = f"   energy_box {energy.current():.3f}" if energy else ""
            progress.console.print(
                f"  epoch {runner.epoch:>2}   mAP50 {metrics[METRIC]:.3f}   "
                f"mAP {metrics['coco/bbox_mAP']:.3f}{worth}"
            )

        def _describe(self, where: str) -> None:
            progress.update(self.task, description=f"Training: epoch {where}")

    runner = Runner.from_cfg(config)
    # A fifth faster on a CPU; the convolutions pass the layout on.
    runner.model.to(memory_format=torch.channels_last)
    runner.register_hook(ProgressHook())
    runner.train()
    best = runner.message_hub.get_info("best_ckpt", None)
    if best is None:
        raise DemoError("the training saved no checkpoint")
    return {
        "checkpoint": Path(best),
        "vis_data": Path(runner.log_dir) / "vis_data",
        "history": ProgressHook.history,
    }


def test(
    config_path: Path, checkpoint: Path, work_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Test the checkpoint with ``tools/test.py``, in a process of its own."""
    task = progress.add_task("Testing the best checkpoint", total=None)
    folder = work_dir / "test"
    command = [
        *(sys.executable, str(TOOLS / "test.py"), str(config_path), str(checkpoint)),
        *("--work-dir", str(folder), "--out", str(folder / "predictions.pkl")),
    ]
    log = work_dir / "test.log"
    before = set(folder.glob("*/"))
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=file).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise DemoError(f"tools/test.py failed; see {shown(log)}: {''.join(last)}")
    (run_dir,) = set(folder.glob("*/")) - before
    metrics = json.loads((run_dir / f"{run_dir.name}.json").read_text())
    progress.update(task, total=1, completed=1)
    return {"metrics": metrics, "vis_data": run_dir / "vis_data"}


def check_pictures(
    config: Any, trained: dict[str, Any], tested: dict[str, Any], progress: Progress
) -> list[Path]:
    """Make sure that no picture is missing; lay them out by epoch."""
    from mmyolo_vis_hooks.publish.files import write_image
    from mmyolo_vis_hooks.render.montage import Cell, montage

    task = progress.add_task("Laying maps out by epoch", total=None)
    history = trained["history"]
    sheets: list[Path] = []
    in_training = 0
    for name, hook in vis_hooks(config).items():
        num_images = hook.get("num_images", 4)
        pictures = read_pictures(trained["vis_data"], "val", name)
        expected = {(image, epoch) for image, _ in pictures for epoch in history}
        if set(pictures) != expected or len(pictures) != num_images * len(history):
            raise DemoError(
                f"{len(pictures)} {name} pictures of the training are in "
                f"{shown(trained['vis_data'])}, not {num_images} for each of "
                f"{len(history)} validations"
            )
        if len(read_pictures(tested["vis_data"], "test", name)) != num_images:
            raise DemoError(f"tools/test.py did not draw {num_images} {name} pictures")
        in_training += len(pictures)
        images = sorted({image for image, _ in pictures})
        progress.update(task, total=len(sheets) + len(images))
        for image in images:
            cells = [
                Cell(pictures[image, epoch], f"epoch {epoch} · mAP50 {own[METRIC]:.3f}")
                for epoch, own in history.items()
            ]
            sheet = trained["vis_data"].parent / f"{name}_by_epoch_{image}.png"
            write_image(str(sheet), montage(cells))
            sheets.append(sheet)
            progress.advance(task)
    in_events = count_events(trained["vis_data"])
    if in_events != in_training:
        raise DemoError(
            f"TensorBoard has {in_events} pictures of the training, not {in_training}"
        )
    return sheets


def read_pictures(vis_data: Path, mode: str, name: str) -> dict[tuple[str, int], Any]:
    """Decoded RGB pictures of a hook, by image id and step."""
    import cv2

    pictures = {}
    for path in sorted((vis_data / "vis_image").glob(f"{mode}.{name}.*.png")):
        image, _, step = path.stem[len(f"{mode}.{name}.") :].rpartition("_")
        picture = cv2.imread(str(path))
        if picture is None or picture.std() < 1:
            raise DemoError(f"{shown(path)} shows nothing")
        pictures[image, int(step)] = picture[..., ::-1]
    return pictures


def count_events(vis_data: Path) -> int:
    """Number of pictures that TensorBoard reads from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import (
        IMAGES,
        EventAccumulator,
    )

    events = EventAccumulator(str(vis_data), size_guidance={IMAGES: 0})
    events.Reload()
    return sum(len(events.Images(tag)) for tag in events.Tags()[IMAGES])


def tell(
    console: Console,
    trained: dict[str, Any],
    tested: dict[str, Any],
    sheets: list[Path],
    seconds: float,
) -> None:
    """Say what came out and where it is."""
    metrics = tested["metrics"]
    program = Path(sys.executable).with_name("tensorboard")
    command = shown(program) if program.exists() else "tensorboard"
    command += f" --logdir {shown(trained['vis_data'])}"
    # Its server keeps ten pictures of a tag unless it is told otherwise.
    if len(trained["history"]) > 10:
        command += f" --samples_per_plugin images={len(trained['history'])}"
    console.print(
        f"\n[bold]mAP50 {metrics[METRIC]:.3f}[/], mAP {metrics['coco/bbox_mAP']:.3f} "
        f"on images that the detector has not seen, after "
        f"{seconds // 60:.0f} min {seconds % 60:.0f} s\n\n"
        "[bold]The same images from epoch to epoch[/]",
        soft_wrap=True,
    )
    lines = [shown(sheet) for sheet in sheets]
    lines += ["", "All pictures of the training and of tools/test.py"]
    lines += [f"{shown(run['vis_data'])}/vis_image" for run in (trained, tested)]
    lines += ["", "TensorBoard, with the losses and the mAP", command]
    # Paths must stay in one piece to be copied.
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def shown(path: Path) -> str:
    """The path relative to the working directory, if it is below."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
