"""Train a detector: ``python tools/train.py CONFIG``."""

from __future__ import annotations

import _interrupt  # noqa: F401

import argparse
import logging

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from _common import (
    ToolError,
    build_runner,
    check_checkpoint,
    config_mistakes,
    load_config,
    make_parser,
    run_tool,
)
from _cpu_ranks import leave_group


def parse_args() -> argparse.Namespace:
    parser = make_parser("Train a detector")
    parser.add_argument(
        "--amp", action="store_true", help="train with automatic mixed precision"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the batch size, as the config says how",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue from this checkpoint; without a value, from the last one "
        "in the work dir",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with config_mistakes(args.config):
        runner = build_runner(prepare(args))
    with config_mistakes(args.config, while_running=True):
        runner.train()
    leave_group()


def prepare(args: argparse.Namespace) -> Config:
    """Read the config, with what the command line says in it."""
    config = load_config(args)
    if config.get("train_dataloader") is None or config.get("train_cfg") is None:
        raise ToolError(f"{args.config} has no train_dataloader or no train_cfg")
    if args.amp:
        use_amp(config)
    if args.auto_scale_lr:
        use_auto_scale_lr(config)
    if args.resume:
        config.resume = True
        if args.resume == "auto":
            config.load_from = None
        else:
            check_checkpoint(args.resume, "--resume")
            config.load_from = args.resume
    return config


def use_amp(config: Config) -> None:
    """Switch the optimizer wrapper to mixed precision."""
    wrapper = config.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind == "AmpOptimWrapper":
        print_log("--amp: the config has it already", "current", logging.WARNING)
    elif kind != "OptimWrapper":
        raise ToolError(
            f"--amp works with optim_wrapper.type='OptimWrapper', not with {kind!r}"
        )
    if get_device() == "cpu":
        wrapper.type = "CPUAmpOptimWrapper"
        for option in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(option, None)
    elif kind == "OptimWrapper":
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")


def use_auto_scale_lr(config: Config) -> None:
    """Switch on what the config prepared."""
    scaling = config.get("auto_scale_lr")
    if not scaling or "base_batch_size" not in scaling:
        raise ToolError(
            "--auto-scale-lr: the config does not know the batch size that its "
            "learning rate is for; set auto_scale_lr=dict(base_batch_size=...)"
        )
    scaling.enable = True


if __name__ == "__main__":
    run_tool(main)
