"""Feature maps: ``python tools/featmap_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse

from _vis_demo import look, make_demo_parser, run_demo
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel


def parse_args() -> argparse.Namespace:
    description = "Show what layers of a detector put out, laid over the images"
    return make_demo_parser(description, FeatMapOptions).parse_args()


def main() -> None:
    look(parse_args(), FeatMapOptions, FeatMapPanel, title="Feature maps")


if __name__ == "__main__":
    run_demo(main)
