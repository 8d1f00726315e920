"""A live page: click a box, or any place of an image, and see why.

    pip install -r requirements/explore.txt
    python tools/explore.py CONFIG CHECKPOINT

It shows the validation set of the config, or the IMAGES that are named, with what was
found, missed and invented, and serves this machine alone: it asks nobody for anything.
"""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import getpass
import os
import platform
import socket
import webbrowser
from dataclasses import replace
from typing import Any

from _common import (
    ToolError,
    add_cfg_options,
    check_checkpoint,
    config_mistakes,
    read_merged,
    run_tool,
)
from _dataset import add_config, add_device, warn_of_classes
from _errors import check_classes
from _explore import View, photos_of_dataset, photos_of_files
from mmyolo_vis_hooks.declare import add_arguments
from mmyolo_vis_hooks.detector import (
    build_detector,
    check_device,
    classes_and_palette,
    load_weights,
    read_dataset,
)
from mmyolo_vis_hooks.options import DiagnosisOptions
from mmyolo_vis_hooks.publish.window import has_display


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Look into a detector live, in a browser on this machine"
    )
    add_config(parser)
    parser.add_argument("checkpoint", help="its weights, a path or an address")
    parser.add_argument(
        "images",
        nargs="*",
        default=None,
        help="images, folders or addresses instead of the data set; their objects are "
        "not known",
    )
    parser.add_argument(
        "--dataset",
        choices=["val", "test"],
        default="val",
        help="whose data set is shown (default: val)",
    )
    parser.add_argument(
        "--compare", metavar="CHECKPOINT", help="other weights, shown beside the first"
    )
    parser.add_argument(
        "--compare-config",
        metavar="CONFIG",
        help="config of these weights, if they have another",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, for this machine alone)",
    )
    parser.add_argument(
        "--port", type=int, help="port; the first free one from 7860 if not given"
    )
    add_device(parser)
    add_arguments(parser, DiagnosisOptions, without=["topk"])
    add_cfg_options(parser)
    return parser.parse_args()


def open_views(args: argparse.Namespace) -> tuple[list[View], tuple[str, ...]]:
    """The detectors on their images, and the names of the classes."""
    first = open_view(args, args.config, args.checkpoint)
    if not args.compare:
        return [first], first.names
    second = open_view(args, args.compare_config or args.config, args.compare)
    check_classes(first.names, second.names)
    if [own.name for own in first.photos] != [own.name for own in second.photos]:
        raise ToolError(
            "--compare-config: its data set has other images; make them one with "
            "--cfg-options, or name IMAGES"
        )
    # What is right is the same for both.
    second.photos = [
        replace(own, truth=other.truth)
        for own, other in zip(second.photos, first.photos)
    ]
    return [first, second], first.names


def open_view(args: argparse.Namespace, name: str, checkpoint: str) -> View:
    """One detector on its images."""
    config = read_merged(name, args)
    with config_mistakes(name):
        if args.images:
            dataset = read_dataset(config)
            photos = photos_of_files(args.images, config, args.image_channels)
        else:
            photos, dataset = photos_of_dataset(
                config, args.dataset, args.image_channels
            )
        detector = build_detector(config, check_device(args.device))
        metainfo = load_weights(detector, checkpoint)
        names, _ = classes_and_palette(metainfo, dataset.metainfo)
        if not args.images:
            warn_of_classes(dataset, names)
    return View(photos, detector, names)


def start(args: argparse.Namespace) -> tuple[Any, str]:
    """Start the page in a thread; gives it, and its address."""
    check_checkpoint(args.checkpoint, "CHECKPOINT")
    if args.compare:
        check_checkpoint(args.compare, "--compare")
    elif args.compare_config:
        raise ToolError("--compare-config is of the weights of --compare: name them")
    check_place(args.host, args.port)
    # Read when Gradio is imported: it shall ask nobody for anything.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    try:
        import gradio as gr
    except ImportError as error:
        raise ToolError(
            f"the page needs Gradio ({error}): pip install -r requirements/explore.txt"
        ) from error
    from _explore_page import CSS, Page

    page = Page(args, *open_views(args)).build()
    try:
        _, url, _ = page.launch(
            server_name=args.host,
            server_port=args.port,
            theme=gr.themes.Default(
                primary_hue="blue",
                neutral_hue="slate",
                font=["system-ui", "sans-serif"],
                font_mono=["monospace"],
            ),
            css=CSS,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
        )
    except OSError as error:
        raise ToolError(f"--host {args.host} --port {args.port}: {error}") from error
    return page, url


def check_place(host: str, port: int | None) -> None:
    """Refuse where nothing can listen; Gradio would try a hundred ports there."""
    if port is not None and not 0 < port < 65536:
        raise ToolError(f"--port {port}: use 1 to 65535")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError as error:
        raise ToolError(f"--host {host}: {error}") from error


def main() -> None:
    args = parse_args()
    page, url = start(args)
    print(f"{url}   (Ctrl-C ends it)", flush=True)
    if has_display():
        webbrowser.open(url)
    else:
        port = page.server_port
        there = f"{getpass.getuser()}@{platform.node()}"
        print(
            "This machine has no display. From yours:\n"
            f"  ssh -L {port}:127.0.0.1:{port} {there}\n"
            f"and open http://127.0.0.1:{port}",
            flush=True,
        )
    page.block_thread()


if __name__ == "__main__":
    run_tool(main)
