"""Several processes on a machine without GPU, where MMEngine's launchers demand one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper without what torch refuses on a CPU.

    That is a device's number, and batch norms that are synchronised.
    """

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        options["device_ids"] = None
        super().__init__(revert_sync_batchnorm(module), **options)


@contextlib.contextmanager
def cpu_ranks(config: Config) -> Iterator[None]:
    """A block in which the Runner of a config starts gloo if there is no GPU.

    MMEngine's launchers do all else. Where processes have a GPU each, or there is only
    one process, nothing is changed.
    """
    if config.get("launcher", "none") == "none" or get_device() != "cpu":
        yield
        return
    config.merge_from_dict({"env_cfg.dist_cfg.backend": "gloo"})
    plain = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
    }
    wrapper = config.get("model_wrapper_cfg") or plain
    if wrapper.get("type", plain["type"]) == plain["type"]:
        kind = CPUDistributedDataParallel.__name__
        config.model_wrapper_cfg = {**wrapper, "type": f"mmengine.{kind}"}
    with mock.patch.object(torch.cuda, "set_device"):
        yield


def leave_group() -> None:
    """End gloo's process group together: its threads abort a rank that ends alone."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
