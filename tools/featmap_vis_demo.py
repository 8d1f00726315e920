"""Feature maps: ``python tools/featmap_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse

from torch import nn

from _vis_demo import Demo, logger, look, make_demo_parser, run_demo
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel
from mmyolo_vis_hooks.samples import SampleMaker, make_sample_maker


def parse_args() -> argparse.Namespace:
    description = "Show what layers of a detector put out, laid over the images"
    return make_demo_parser(description, FeatMapOptions).parse_args()


def main() -> None:
    look(
        parse_args(),
        FeatMapOptions,
        make_maker,
        FeatMapPanel,
        title="Feature maps",
        fade=False,
    )


def make_maker(demo: Demo, detector: nn.Module) -> SampleMaker:
    return make_sample_maker(detector, demo.options, demo.class_names, logger)


if __name__ == "__main__":
    run_demo(main)
