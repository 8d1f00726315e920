"""What made each box: ``python tools/boxam_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse

from torch import nn

from _vis_demo import Demo, logger, look, make_demo_parser, run_demo
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
from mmyolo_vis_hooks.samples import SampleMaker, make_sample_maker


def parse_args() -> argparse.Namespace:
    description = "Show where a detector looked for each of its boxes"
    return make_demo_parser(description, BoxAMOptions).parse_args()


def main() -> None:
    look(
        parse_args(),
        BoxAMOptions,
        make_maker,
        BoxAMPanel,
        title="Box activation maps",
        fade=True,
    )


def make_maker(demo: Demo, detector: nn.Module) -> SampleMaker:
    maker = make_sample_maker(
        detector,
        demo.options,
        demo.class_names,
        logger,
        # Two bars at once would overwrite each other.
        show_progress=len(demo.source) == 1,
    )
    demo.try_on_first(maker, detector)
    return maker


if __name__ == "__main__":
    run_demo(main)
