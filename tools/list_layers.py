"""Layers that can be targeted: ``python tools/list_layers.py CONFIG``."""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
from typing import Any

import numpy as np

from _common import (
    ToolError,
    add_cfg_options,
    config_mistakes,
    print_layers,
    read_merged,
    run_tool,
)
from _dataset import add_config
from mmyolo_vis_hooks.data.alignment import choose_alignment
from mmyolo_vis_hooks.data.sources import ImageSource
from mmyolo_vis_hooks.detector import (
    build_detector,
    build_pipeline,
    check_device,
    read_dataset,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="List the layers of a detector with the shapes, strides and "
        "parameters that an image gives"
    )
    add_config(parser)
    parser.add_argument("--img", help="image that says the size; --size is not needed")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=[480, 640],
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image before the test pipeline (default: 480 640)",
    )
    parser.add_argument(
        "--depth", type=int, default=3, help="deepest level to list (default: 3)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also list what cannot be targeted, with the reason",
    )
    parser.add_argument(
        "--alignment",
        choices=["resize", "letterbox", "network"],
        help="what the network looks at (default: resize, the Resize-only input, where "
        "it can be had)",
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if min(args.size) < 1:
        raise ToolError(f"--size {args.size} is no height and width; use 480 640")
    if args.depth < 1:
        raise ToolError(f"--depth {args.depth} lists nothing; use 1 or more")
    height, width = args.size
    image: Any = args.img
    if image is None:
        image = np.full((height, width, 3), 114, np.uint8)
    else:
        image = next(iter(ImageSource([image]))).read()
    config = read_merged(args.config, args)
    with config_mistakes(args.config):
        dataset = read_dataset(config)
        detector = build_detector(config, check_device("cpu"))
        pipeline = build_pipeline(config, dataset)
        loaded = pipeline.load(image)
        placement = choose_alignment(
            args.alignment,
            pipeline,
            [loaded],
            detector,
            dataset,
        )
    print_layers(
        detector, placement.pipeline, loaded, depth=args.depth, all_layers=args.all
    )


if __name__ == "__main__":
    run_tool(main)
