"""What others draw of detectors, by their published descriptions.

Nothing of their code is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mmyolo_vis_hooks.attribution.methods import weigh
from mmyolo_vis_hooks.attribution.saliency import render_saliency
from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.network.state import frozen

PEERS: dict[str, dict[str, Any]] = {
    # Ultralytics' heat maps of 2026: LayerCAM of the class logit at all inputs of the
    # head, each by its maximum, the greatest of them.
    "ultralytics": dict(
        method="layercam",
        target="logit",
        target_layers=["neck"],
        fusion="max",
        normalize_layers=True,
    ),
}
"""Options of ``explain`` that come to the same, by name."""

MMYOLO_DEMO = "mmyolo_demo"


def mmyolo_demo(
    detector: nn.Module,
    inputs: torch.Tensor,
    metainfo: Mapping[str, Any],
    box_xyxy: np.ndarray,
    label: int,
) -> np.ndarray:
    """Grad-CAM as MMYOLO's demo describes it, over the network's input.

    Its target is the sum of the losses with the detection itself as the only object,
    its layer the coarsest map of the neck. What raises the loss is shown.

    Args:
        detector (nn.Module): One of MMYOLO's.
        inputs (Tensor): ``(1, C, H, W)``.
        metainfo (Mapping): Of the image's data sample.
        box_xyxy (np.ndarray): ``(4,)``, in pixels of ``inputs``.
        label (int): Class of the detection.
    """
    taken: list[torch.Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> tuple[torch.Tensor, ...]:
        maps = [level.detach() for level in output]
        taken.append(maps[-1].requires_grad_())
        return tuple(maps)

    row = torch.tensor([[0, label, *box_xyxy.tolist()]], device=inputs.device)
    objects = dict(bboxes_labels=row, img_metas=[dict(metainfo)])
    with frozen(detector), torch.enable_grad():
        handle = detector.neck.register_forward_hook(cut)  # type: ignore
        try:
            losses = detector(inputs, objects, mode="loss")
        finally:
            handle.remove()
        flat = [
            value
            for name, own in losses.items()
            if "loss" in name
            for value in (own if isinstance(own, (list, tuple)) else [own])
        ]
        total = torch.stack([value.sum() for value in flat]).sum()
        (gradient,) = torch.autograd.grad(total, taken[0])
    saliency = weigh("gradcam_averaged", taken[0].detach(), gradient)[0].cpu().numpy()
    height, width = inputs.shape[-2:]
    return render_saliency(saliency, FrameTransform.identity((height, width)))
