"""What the programs share: errors in one line, configs and their options, Runners."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    OPTIM_WRAPPERS,
    RUNNERS,
    DefaultScope,
    build_functions,
)
from mmengine.runner import Runner, autocast
from packaging.version import parse
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table

from _cpu_ranks import cpu_ranks

# The package of this checkout, installed or not. Importing it registers the hooks
# and the checkpoint loaders, whatever the config imports.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
try:
    from mmyolo_vis_hooks.data.alignment import network_input
    from mmyolo_vis_hooks.data.pipeline import ImagePipeline, Loaded
    from mmyolo_vis_hooks.detector import read_config
    from mmyolo_vis_hooks.errors import VisError, one_line
    from mmyolo_vis_hooks.hooks.loading import check_checkpoint_fits
    from mmyolo_vis_hooks.network.layer_table import survey_layers
    from mmyolo_vis_hooks.publish.files import make_writable
    from mmyolo_vis_hooks.render.layer_tree import layer_tree
except RuntimeError as unusable_mmcv:
    sys.exit(f"error: {unusable_mmcv}")

DATALOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_REMOTE = ("http://", "https://", "s3://", "petrel://", "open-mmlab://", "openmmlab://")


_TRACEBACK = "MMYOLO_VIS_TRACEBACK"

# What libraries tell each other; nobody who runs a program can change it.
if not sys.warnoptions:  # ``python -W`` and ``PYTHONWARNINGS`` bring it back
    for _category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", _category)
    warnings.simplefilter("ignore", SyntaxWarning)
    _LIBRARIES = "(torch|torchvision|mm(engine|cv|det|yolo)|numpy|matplotlib|importlib)"
    warnings.filterwarnings("ignore", category=UserWarning, module=_LIBRARIES + r"\b")


class ToolError(Exception):
    """A mistake of the caller; the message says how to mend it."""


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; a mistake of the caller ends it with one line and status 2.

    Ctrl-C ends it with one word.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells report it
    except (ToolError, VisError) as error:
        if os.environ.get(_TRACEBACK):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def config_mistakes(name: str, *, while_running: bool = False) -> Iterator[None]:
    """Turn what a config makes libraries raise into one line that names the file.

    Args:
        name: Of the config file.
        while_running: True where the block runs what was built. Only what fails while
            something is built from the config is then a mistake in it; data sets are
            built that late. All else is a bug, whose traceback is needed.
    """
    try:
        yield
    except (ToolError, VisError):
        raise
    except Exception as error:
        if while_running and not _was_building(error):
            raise
        raise ToolError(
            f"the config {name} cannot be used: {one_line(error)} ({_TRACEBACK}=1 "
            "shows where; --cfg-options changes settings, such as paths)"
        ) from error


def _was_building(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    builder = build_functions.__file__
    return any(frame.f_code.co_filename == builder for frame, _ in frames)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all of OpenMMLab's tools have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="path of the config file")
    parser.add_argument(
        "--work-dir",
        help="folder of logs, checkpoints and pictures; "
        "work_dirs/NAME_OF_THE_CONFIG if neither this nor the config says it",
    )
    add_cfg_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run",
    )
    # torch.distributed.launch wrote it with '_', torch >= 2.0 with '-'.
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS
    )
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that changes settings of the config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="settings that replace those of the config: a.b=1 c=x,y d='[(1,2),(3,4)]'",
    )


class _Settings(DictAction):
    """MMEngine's ``KEY=VALUE``, with the message of a usual option for other words."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse the words after the option."""
        try:
            super().__call__(parser, namespace, values, option_string)
        except (ValueError, AssertionError) as error:
            wrong = " ".join(values)
            parser.error(f"{option_string} takes KEY=VALUE, not {wrong!r} ({error})")


def read_merged(name: str, args: argparse.Namespace) -> Config:
    """Read a config, and put the settings of ``--cfg-options`` into it."""
    config = read_config(name)
    try:
        config.merge_from_dict(args.cfg_options or {})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ToolError(f"--cfg-options does not fit the config: {error}") from error
    return config


def load_config(args: argparse.Namespace) -> Config:
    """Read the config with what :func:`make_parser` parsed in it."""
    config = read_merged(args.config, args)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config.launcher = args.launcher
    if args.work_dir:
        config.work_dir = args.work_dir
    elif config.get("work_dir") is None:
        name = os.path.splitext(os.path.basename(args.config))[0]
        config.work_dir = os.path.join("work_dirs", name)
    for name in DATALOADERS:
        loader = config.get(name) or ConfigDict()
        metainfo = innermost_dataset(loader).get("metainfo") or {}
        wrong = [key for key in metainfo if key != str(key).lower()]
        if wrong:
            raise ToolError(
                f"{name}: metainfo has the key(s) {', '.join(wrong)}; MMDetection "
                "looks for lower-case keys (classes, palette)"
            )
        # MMEngine marks dicts from `_base_ = 'mmyolo::...'` with the scope and passes
        # it on to the collate function, which does not know it and is found without.
        if isinstance(loader.get("collate_fn"), dict):
            loader.collate_fn.pop("_scope_", None)
    # Not above: the package looks first whether mmcv can be used.
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    setup_cache_size_limit_of_dynamo()
    return config


def check_checkpoint(path: str, option: str) -> None:
    """Make sure that a local checkpoint exists."""
    if "://" in path or path.startswith(_REMOTE):
        return
    if not os.path.isfile(os.path.expanduser(path)):
        raise ToolError(f"{option}: there is no checkpoint {path}")


def innermost_dataset(loader: ConfigDict) -> ConfigDict:
    """The dataset of a loader's config, out of its wrappers."""
    dataset = loader
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def build_runner(config: Config) -> Runner:
    """Build the Runner, or the one that the config's ``runner_type`` names."""
    check_mlflow(config)
    make_writable(Path(config.work_dir))
    with cpu_ranks(config):
        if "runner_type" not in config:
            runner = Runner.from_cfg(config)
        else:
            scope = config.get("default_scope", "mmengine")
            with DefaultScope.overwrite_default_scope(scope):
                runner = RUNNERS.build(config)
    runner.register_hook(CheckpointGuard())
    return runner


def check_mlflow(config: Config) -> None:
    """Refuse what MLflow refuses while the Runner is built, before any hook is there.

    Raises:
        ToolError: If its data would go to plain files, as MMEngine has it by default.
    """
    backends = (config.get("visualizer") or {}).get("vis_backends") or ()
    in_files = any(
        str(backend.get("type")).endswith("MLflowVisBackend")
        and backend.get("tracking_uri") is None
        for backend in backends
    )
    if not in_files or os.environ.get("MLFLOW_ALLOW_FILE_STORE") == "true":
        return
    try:
        version = parse(metadata.version("mlflow"))
    except metadata.PackageNotFoundError:
        return
    if version >= parse("3.13"):
        raise ToolError(
            f"MLflowVisBackend: MLflow {version} refuses to keep runs in plain files; "
            "set tracking_uri='sqlite:///mlflow.db', or the address of a server"
        )


class CheckpointGuard(Hook):
    """Ends a run whose checkpoint does not fit, also where no hook draws."""

    # Before EMAHook, which takes for granted that there is a state_dict.
    priority = "VERY_HIGH"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the model."""
        check_checkpoint_fits(runner, checkpoint)


def print_layers(
    detector: torch.nn.Module,
    pipeline: ImagePipeline,
    loaded: Loaded,
    *,
    depth: int = 3,
    all_layers: bool = False,
) -> None:
    """Print the layers of a detector with what they put out for an image.

    Layers below ``depth`` are only counted; ``all_layers`` adds those that cannot be
    targeted, with the reason.
    """
    inputs, metainfo = network_input(detector, pipeline.pack(loaded))
    rows = survey_layers(detector, inputs, metainfo)
    print_table(layer_tree(rows, depth=depth, all_layers=all_layers))


def table_of(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1
) -> Table:
    """Make a table whose first columns are words, and the others numbers."""
    table = Table(title=title, box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: RenderableType) -> None:
    """Print a table as wide as it is: a terminal folds long lines and cuts nothing."""
    plain = partial(Console, markup=False, emoji=False)  # names may look like markup
    wide = plain(width=1000)
    width = Measurement.get(wide, wide.options, table).maximum
    plain(width=max(Console().width, width)).print(table)


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU: autocast to bfloat16.

    ``AmpOptimWrapper`` needs a GPU. bfloat16 has the exponents of float32, so
    losses are not scaled, and a checkpoint has what ``OptimWrapper`` saves.
    """

    @contextlib.contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Autocast the forward of a training step."""
        parent: AbstractContextManager = super().optim_context(model)
        with parent, autocast(device_type="cpu", dtype=torch.bfloat16):
            yield
