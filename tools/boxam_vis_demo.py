"""What made each box: ``python tools/boxam_vis_demo.py IMG CONFIG CHECKPOINT``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from torch import nn

from _vis_demo import Demo, logger, make_demo_parser, run_demo
from mmyolo_vis_hooks.attribution.attribute import BoxMapOptions, BoxMapper
from mmyolo_vis_hooks.attribution.methods import METHODS, caption_of, method_of
from mmyolo_vis_hooks.attribution.saliency import FUSIONS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from mmyolo_vis_hooks.box_samples import BoxSampleMaker
from mmyolo_vis_hooks.data.samples import labels_of
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.render.boxam_panel import SCOPES, BoxAMPanel


def parse_args() -> argparse.Namespace:
    parser = make_demo_parser(
        "Show where a detector looked for each of its boxes", None
    )
    parser.add_argument(
        "--method",
        default="boxam",
        metavar="METHOD",
        help=f"how a map is made, one of {', '.join(METHODS)}; docs/boxam.md explains "
        "them",
    )
    parser.add_argument(
        "--target",
        default="score",
        choices=TARGETS,
        help="what is explained of a box",
    )
    parser.add_argument(
        "--topk",
        type=int,
        default=-1,
        help="explain at most so many boxes, the best first; -1 all",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        help="explain boxes of these classes only, by name or number",
    )
    parser.add_argument(
        "--norm-in-bbox",
        action="store_true",
        help="show and normalise a map inside its box only",
    )
    parser.add_argument(
        "--scope",
        default="box",
        choices=SCOPES,
        help="a panel per box or per class, or only the joint map of the image",
    )
    parser.add_argument(
        "--fusion",
        default="max",
        choices=FUSIONS,
        help="how the maps of several layers become one",
    )
    parser.add_argument(
        "--smooth",
        type=float,
        help="sigma of a Gaussian over the map, as a share of the box's size "
        "(default: 0.1 for boxam, 0 for other methods)",
    )
    parser.add_argument(
        "--eigen-smooth",
        action="store_true",
        help="first principal component of the weighted activations",
    )
    parser.add_argument(
        "--aug-smooth",
        action="store_true",
        help="mean over the mirrored image and three brightnesses",
    )
    parser.add_argument(
        "--max-shape",
        nargs="+",
        type=int,
        default=[-1],
        metavar="CELLS",
        help="reduce activations to this height and width first; -1 does not",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="changed activations or images that run at once, for ablationcam, "
        "scorecam and drise",
    )
    parser.add_argument(
        "--ratio-channels-to-ablate",
        type=float,
        default=0.5,
        help="share of the channels that ablationcam tries",
    )
    parser.add_argument(
        "--num-masks", type=int, default=1000, help="number of masks of drise"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.6,
        help="share of the map in the blend where it is strong",
    )
    parser.add_argument(
        "--colormap", default="plasma", help="any name of OpenCV or matplotlib"
    )
    args = parser.parse_args()
    args.title, args.fade = "Box activation maps", True
    return args


def main() -> None:
    args = parse_args()
    method = method_of(args.method)
    if args.target_layers is not None and method.kind == "black_box":
        raise VisConfigError(
            f"--target-layers cannot work with --method {args.method}, which looks at "
            "no layer; leave it out"
        )
    options = BoxMapOptions(
        method=args.method,
        target=args.target,
        score_thr=args.score_thr,
        topk=args.topk,
        eigen_smooth=args.eigen_smooth,
        aug_smooth=args.aug_smooth,
        max_shape=args.max_shape,
        batch_size=args.batch_size,
        ratio_channels_to_ablate=args.ratio_channels_to_ablate,
        num_masks=args.num_masks,
    )
    drawing: dict[str, Any] = dict(
        scope=args.scope,
        fusion=args.fusion,
        smooth=method.default_smooth if args.smooth is None else args.smooth,
        norm_in_bbox=args.norm_in_bbox,
        alpha=args.alpha,
        colormap=args.colormap,
        score_thr=args.score_thr,
        caption=caption_of(args.method, args.target),
    )
    BoxAMPanel(**drawing)  # wrong values fail before the network is built
    demo = Demo.of(args)
    detector = demo.build()
    if args.preview_model:
        demo.preview(detector)
        return
    if args.classes is not None:
        wanted = [int(c) if c.isdecimal() else c for c in args.classes]
        options = options.with_classes(labels_of(wanted, demo.class_names))
    maker = _sample_maker(demo, detector, options)
    explainer = BoxAMPanel(
        **drawing, class_names=demo.class_names, palette=demo.palette
    )
    sys.exit(demo.run(maker, explainer))


def _sample_maker(
    demo: Demo, detector: nn.Module, options: BoxMapOptions
) -> BoxSampleMaker:
    layers = demo.args.target_layers
    mapper = BoxMapper(
        detector,
        None if layers is None else resolve_layers(detector, layers),
        options,
        logger=logger,
        # Two bars at once would overwrite each other.
        show_progress=len(demo.source) == 1,
    )
    maker = BoxSampleMaker(detector, mapper, alignment=demo.args.alignment)
    try:
        maker.prepare()
    except VisError:
        raise
    except Exception as error:
        # The trial is on noise; real images may do.
        logger.debug("the trial before the first image: %s", error)
    return maker


if __name__ == "__main__":
    run_demo(main)
