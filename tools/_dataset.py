"""The data set that a program looks at, its objects, and the arguments for it."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from _common import ToolError
from mmyolo_vis_hooks.data.selector import SelectedImage
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config of the detector and its data set."""
    parser.add_argument(
        "config", help="config file, or mmyolo::FOLDER/FILE.py for one of MMYOLO's"
    )


def add_data_arguments(parser: argparse.ArgumentParser, out_dir: str) -> None:
    """Add which data set is looked at, where, and the folder of what is written."""
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        default="val",
        help="whose data set is looked at (default: val)",
    )
    parser.add_argument(
        "--out-dir",
        default=out_dir,
        help=f"folder of what is written (default: {out_dir})",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add where the network runs."""
    parser.add_argument(
        "--device",
        default="cuda:0" if torch.cuda.is_available() else "cpu",
        help="where the network runs: cuda:0 is the first GPU",
    )


def build_dataset(config: Config, split: str, option: str = "--split") -> Any:
    """The data set of a config's dataloader; the option is the one that names it."""
    loader = config.get(f"{split}_dataloader")
    if not loader:
        raise ToolError(f"{option} {split}: the config has no such dataloader")
    scope = DefaultScope.overwrite_default_scope(config.get("default_scope"))
    with scope, contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        return DATASETS.build(loader.dataset)


def objects_of(image: SelectedImage) -> GroundTruth:
    """The objects of an image of a data set that must have some."""
    info = image.dataset.get_data_info(image.index)
    if "instances" not in info:
        raise ToolError(
            f"the data set {type(image.dataset).__name__} has no annotated objects "
            f"(image {image.image_id}); --split val or --cfg-options name one"
        )
    return GroundTruth.of(info["instances"])
