"""What made each box: ``python tools/boxam_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse

from _vis_demo import look, make_demo_parser, run_demo
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel


def parse_args() -> argparse.Namespace:
    description = "Show where a detector looked for each of its boxes"
    return make_demo_parser(description, BoxAMOptions).parse_args()


def main() -> None:
    look(parse_args(), BoxAMOptions, BoxAMPanel, title="Box activation maps")


if __name__ == "__main__":
    run_demo(main)
