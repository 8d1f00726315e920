"""What made each box: ``python tools/boxam_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys

from torch import nn

from _vis_demo import Demo, logger, make_demo_parser, run_demo
from mmyolo_vis_hooks.api import make_box_mapper
from mmyolo_vis_hooks.declare import add_arguments, options_from
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
from mmyolo_vis_hooks.samples import BoxSampleMaker


def parse_args() -> argparse.Namespace:
    parser = make_demo_parser("Show where a detector looked for each of its boxes")
    add_arguments(parser, BoxAMOptions)
    args = parser.parse_args()
    args.title, args.fade = "Box activation maps", True
    return args


def main() -> None:
    args = parse_args()
    options = options_from(args, BoxAMOptions)
    demo = Demo.of(args)
    detector = demo.build()
    if args.preview_model:
        demo.preview(detector)
        return
    maker = _sample_maker(demo, detector, options)
    panel = BoxAMPanel(options, demo.class_names, demo.palette)
    sys.exit(demo.run(maker, panel))


def _sample_maker(
    demo: Demo, detector: nn.Module, options: BoxAMOptions
) -> BoxSampleMaker:
    mapper = make_box_mapper(
        detector,
        options,
        demo.class_names,
        logger,
        # Two bars at once would overwrite each other.
        show_progress=len(demo.source) == 1,
    )
    maker = BoxSampleMaker(detector, mapper, channels=options.image_channels)
    demo.try_on_first(maker, detector)
    return maker


if __name__ == "__main__":
    run_demo(main)
