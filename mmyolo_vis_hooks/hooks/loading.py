"""Sees to it that a run does not go on with weights that were not read."""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..checkpoint import check_fit, weights_of
from ..errors import CheckpointError


def check_checkpoint_fits(runner: Runner, checkpoint: Any) -> None:
    """Compare a checkpoint with the model; for ``after_load_checkpoint`` of a hook.

    A warning counts what fits. Models whose weights are spread over processes are left
    alone.

    Raises:
        CheckpointError: If no weight fits, or a training cannot be resumed from it.
    """
    source = str(runner._load_from or f"the last checkpoint of {runner.work_dir}")
    model = runner.model
    while isinstance(model, (DataParallel, DistributedDataParallel, BaseTTAModel)):
        model = model.module
    if not is_model_wrapper(model):
        check_fit(model.state_dict(), weights_of(checkpoint, source), source)
    if runner._resume and "epoch" not in (checkpoint.get("meta") or {}):
        raise CheckpointError(
            f"{source} holds weights, but not the state of a training, so it cannot be "
            "resumed; set load_from to it, and resume=False"
        )
