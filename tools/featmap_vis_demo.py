"""Feature maps: ``python tools/featmap_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys

from _vis_demo import Demo, make_demo_parser, run_demo
from mmyolo_vis_hooks.declare import add_arguments, options_from
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel
from mmyolo_vis_hooks.samples import SampleMaker


def parse_args() -> argparse.Namespace:
    parser = make_demo_parser(
        "Show what layers of a detector put out, laid over the images"
    )
    add_arguments(parser, FeatMapOptions)
    args = parser.parse_args()
    args.title, args.fade = "Feature maps", False
    return args


def main() -> None:
    args = parse_args()
    options = options_from(args, FeatMapOptions)
    demo = Demo.of(args)
    detector = demo.build()
    if args.preview_model:
        demo.preview(detector)
        return
    maker = SampleMaker(
        detector,
        resolve_layers(detector, options.target_layers),
        channels=options.image_channels,
    )
    panel = FeatMapPanel(options, demo.class_names, demo.palette)
    sys.exit(demo.run(maker, panel))


if __name__ == "__main__":
    run_demo(main)
