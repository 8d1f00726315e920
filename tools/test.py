"""Test a detector: ``python tools/test.py CONFIG CHECKPOINT``."""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import copy
from pathlib import Path

from mmengine.config import Config, ConfigDict

from _common import (
    ToolError,
    build_runner,
    check_checkpoint,
    config_mistakes,
    innermost_dataset,
    load_config,
    make_parser,
    run_tool,
)
from _cpu_ranks import leave_group
from mmyolo_vis_hooks.publish.files import make_writable
from mmyolo_vis_hooks.publish.window import why_no_window


def parse_args() -> argparse.Namespace:
    parser = make_parser("Test a detector, and evaluate it")
    parser.add_argument("checkpoint", help="path or URL of the checkpoint")
    parser.add_argument(
        "--out", metavar="FILE.pkl", help="write the predictions to this pickle file"
    )
    parser.add_argument(
        "--json-prefix",
        help="write the results as JSON files with this prefix and do not evaluate",
    )
    parser.add_argument("--tta", action="store_true", help="use test-time augmentation")
    parser.add_argument(
        "--show", action="store_true", help="show the detections in a window"
    )
    parser.add_argument(
        "--show-dir",
        help="save pictures with the detections under WORK_DIR/TIMESTAMP/SHOW_DIR",
    )
    parser.add_argument(
        "--wait-time",
        type=float,
        default=2,
        help="seconds that --show leaves a window open (default: 2)",
    )
    parser.add_argument(
        "--deploy",
        action="store_true",
        help="switch MMYOLO's re-parameterized layers to their deployed form",
    )
    args = parser.parse_args()
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        parser.error(f"--out writes a pickle file; call it .pkl, not {args.out}")
    return args


def main() -> None:
    args = parse_args()
    problem = why_no_window() if args.show else None
    if problem:
        raise ToolError(f"--show opens windows, and {problem}; use --show-dir")
    for file in filter(None, (args.out, args.json_prefix)):
        make_writable(Path(file).parent)  # or it is noticed when all is done
    with config_mistakes(args.config):
        runner = build_runner(prepare(args))
    if args.out:
        # The one of MMDetection also encodes masks.
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    with config_mistakes(args.config, while_running=True):
        runner.test()
    leave_group()


def prepare(args: argparse.Namespace) -> Config:
    """Read the config, with what the command line says in it."""
    config = load_config(args)
    if config.get("test_dataloader") is None or config.get("test_evaluator") is None:
        raise ToolError(f"{args.config} has no test_dataloader or no test_evaluator")
    check_checkpoint(args.checkpoint, "checkpoint")
    config.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw_detections(config, args)
    if args.deploy:
        hooks = [*(config.get("custom_hooks") or [])]
        config.custom_hooks = [*hooks, {"type": "mmyolo.SwitchToDeployHook"}]
    if args.json_prefix:
        format_only(config, args.json_prefix)
    if args.tta:
        use_tta(config)
    return config


def draw_detections(config: Config, args: argparse.Namespace) -> None:
    """Make ``DetVisualizationHook`` show or save the detections."""
    hook = (config.get("default_hooks") or {}).get("visualization")
    if not hook:
        raise ToolError(
            "--show and --show-dir need a hook in the config: default_hooks="
            "dict(visualization=dict(type='mmdet.DetVisualizationHook'))"
        )
    hook.draw = True
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        hook.test_out_dir = args.show_dir


def format_only(config: Config, prefix: str) -> None:
    """Let the metrics write their JSON files and nothing else."""
    evaluator = config.test_evaluator
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        metric.format_only = True
        metric.outfile_prefix = prefix


def use_tta(config: Config) -> None:
    """Wrap the model and replace the test pipeline for test-time augmentation.

    A config without ``tta_model`` or ``tta_pipeline`` gets MMDetection's: the
    image and its mirror image.
    """
    if "tta_model" not in config:
        nms = {"type": "nms", "iou_threshold": 0.5}
        config.tta_model = {
            "type": "mmdet.DetTTAModel",
            "tta_cfg": {"nms": nms, "max_per_img": 100},
        }
    dataset = innermost_dataset(config.test_dataloader)
    if "tta_pipeline" not in config:
        *steps, pack = copy.deepcopy(dataset.pipeline)
        if not str(pack.get("type")).endswith("PackDetInputs"):
            raise ToolError(
                "--tta: the config has no tta_pipeline, and its test pipeline does "
                f"not end with PackDetInputs but with {pack.get('type')!r}"
            )
        keys = pack.get("meta_keys", ("img_id", "img_path", "ori_shape", "img_shape"))
        pack.meta_keys = (*keys, "scale_factor", "flip", "flip_direction")
        flips = [{"type": "mmdet.RandomFlip", "prob": prob} for prob in (1.0, 0.0)]
        views = {"type": "TestTimeAug", "transforms": [flips, [pack]]}
        config.tta_pipeline = [*steps, views]
    config.model = ConfigDict(**config.tta_model, module=config.model)
    # A shape per batch does not go with several views of one image.
    if "batch_shapes_cfg" in dataset:
        dataset.batch_shapes_cfg = None
    dataset.pipeline = config.tta_pipeline


if __name__ == "__main__":
    run_tool(main)
