"""Feature maps: ``python tools/featmap_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys

from _vis_demo import Demo, make_demo_parser, run_demo
from mmyolo_vis_hooks.featmap import CHANNEL_REDUCTIONS
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel
from mmyolo_vis_hooks.samples import SampleMaker


def parse_args() -> argparse.Namespace:
    parser = make_demo_parser(
        "Show what layers of a detector put out, laid over the images", ["backbone"]
    )
    parser.add_argument(
        "--channel-reduction",
        default="select_max",
        choices=[*CHANNEL_REDUCTIONS, "None"],
        help="squeeze_mean averages the channels, select_max takes the one with the "
        "largest sum, None shows the --topk channels with the largest sums",
    )
    parser.add_argument(
        "--topk",
        type=int,
        default=4,
        help="number of channels for --channel-reduction None; -1 draws a map of 1 or "
        "3 channels as a picture",
    )
    parser.add_argument(
        "--arrangement",
        nargs=2,
        type=int,
        default=[2, 2],
        metavar=("ROWS", "COLUMNS"),
        help="grid in which the channels of a layer are laid out",
    )
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="share of the map in the blend"
    )
    parser.add_argument(
        "--colormap", default="jet", help="any name of OpenCV or matplotlib"
    )
    args = parser.parse_args()
    args.title, args.fade = "Feature maps", False
    return args


def main() -> None:
    args = parse_args()
    options = dict(
        channel_reduction=(
            None if args.channel_reduction == "None" else args.channel_reduction
        ),
        topk=args.topk,
        arrangement=args.arrangement,
        alpha=args.alpha,
        colormap=args.colormap,
        score_thr=args.score_thr,
    )
    FeatMapPanel(**options)  # wrong values fail before the network is built
    demo = Demo.of(args)
    detector = demo.build()
    if args.preview_model:
        demo.preview(detector)
        return
    maker = SampleMaker(
        detector,
        resolve_layers(detector, args.target_layers),
        alignment=args.alignment,
    )
    explainer = FeatMapPanel(
        **options, class_names=demo.class_names, palette=demo.palette
    )
    sys.exit(demo.run(maker, explainer))


if __name__ == "__main__":
    run_demo(main)
