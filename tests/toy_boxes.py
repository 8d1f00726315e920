"""A detector with a head of the usual kind, small enough for unit tests.

Like ``ToyDetector`` it finds bright squares from the start, but its boxes come from two
pyramid levels, carry gradients, and are several an image.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import nn
from torchvision.ops import batched_nms

from tests.toy import CountsForwards, ToyNeck, toy_config

STRIDES = (8, 16)


class _Backbone(nn.Module):
    """Features of stride 8, and in the last channel how bright a cell is."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.Dropout2d(0.1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 15, 3, 2, 1),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bright = nn.functional.avg_pool2d(inputs.mean(dim=1, keepdim=True), 8)
        return torch.cat([0.3 * self.stages(inputs), bright.relu()], dim=1)


class _Neck(nn.Module):
    """The maps of ``ToyNeck`` with the brightness as a ninth channel."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = ToyNeck()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bright = x[:, -1:], nn.functional.avg_pool2d(x[:, -1:], 2, ceil_mode=True)
        maps = zip(self.maps(x), bright)
        return tuple(torch.cat([0.1 * own, one], dim=1) for own, one in maps)


class _Head(CountsForwards):
    """Convolutions for the classes, and a shared one for the distances to the sides."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cls = nn.ModuleList(
            nn.Conv2d(9, num_classes, 3, padding=1) for _ in STRIDES
        )
        self.reg = nn.Conv2d(9, 4, 3, padding=1)
        self.test_cfg = dict(score_thr=0.2, iou_thr=0.3, max_per_img=6)
        self.num_forwards = 0
        self.fail_at: int | None = None
        self.fail_with: BaseException = RuntimeError("the head failed")
        for conv, bias in zip(self.cls, (-3.0, -2.0)):
            nn.init.normal_(conv.weight, 0, 0.02)
            nn.init.constant_(conv.bias, bias)
            with torch.no_grad():
                # Most of all a place that is bright all around, so its centre.
                for label, row in enumerate(conv.weight):
                    row[-1] = 0.12
                    row[-1, 1, 1] = 0.5 - 0.1 * label

    def forward(self, maps: tuple) -> tuple[list, list]:
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise self.fail_with
        scores = [conv(level) for conv, level in zip(self.cls, maps)]
        return scores, [self.reg(level) for level in maps]

    def predict(self, scores: list, sides: list, sample: DetDataSample) -> InstanceData:
        """Boxes ``(N, 4)`` in the original image, the highest score first."""
        boxes, raw = [], []
        for score, side, stride in zip(scores, sides, STRIDES):
            rows, columns = torch.meshgrid(
                *(torch.arange(n) * stride + stride / 2 for n in score.shape[1:]),
                indexing="ij",
            )
            reach = stride * (1.5 + 0.5 * side.tanh().flatten(1).t())
            centres = torch.stack([columns, rows], dim=-1).reshape(-1, 2).to(reach)
            boxes.append(
                torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], dim=1)
            )
            raw.append(score.flatten(1).t().sigmoid())
        all_boxes, all_scores = torch.cat(boxes), torch.cat(raw)
        places, labels = (all_scores > self.test_cfg["score_thr"]).nonzero().unbind(1)
        found, kept = all_boxes[places], all_scores[places, labels]
        keep = batched_nms(
            found.detach().float(),
            kept.detach().float(),
            labels,
            self.test_cfg["iou_thr"],
        )[: int(self.test_cfg["max_per_img"])]
        meta = sample.metainfo
        pad = meta.get("pad_param", (0, 0, 0, 0))
        offset = found.new_tensor([pad[2], pad[0]] * 2)
        scale = found.new_tensor(meta["scale_factor"] * 2)
        return InstanceData(
            bboxes=(found[keep] - offset) / scale,
            scores=kept[keep],
            labels=labels[keep],
        )


@MODELS.register_module()
class ToyBoxDetector(BaseModel):
    """Finds bright squares.

    Args:
        num_classes (int): The first class likes squares best.
    """

    def __init__(self, data_preprocessor: dict, num_classes: int = 1) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = _Backbone()
        self.neck = _Neck()
        self.unused = nn.Conv2d(3, 3, 1)
        self.bbox_head = _Head(num_classes)

    def forward(
        self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor"
    ) -> Any:
        scores, sides = self.bbox_head(self.neck(self.backbone(inputs)))
        if mode == "loss":
            target = nn.functional.avg_pool2d(inputs.mean(dim=1, keepdim=True), 8)
            return dict(
                loss=(scores[0] - 2 * target).square().mean()
                + sum(side.square().mean() for side in sides)
            )
        if mode == "tensor":
            return scores
        for i, sample in enumerate(data_samples):
            sample.pred_instances = self.bbox_head.predict(
                [s[i].float() for s in scores], [s[i].float() for s in sides], sample
            )
        return data_samples


def box_config(*args: Any, num_classes: int = 1, **options: Any) -> Config:
    """As ``toy_config``, with the ``ToyBoxDetector``; two classes are not measured."""
    cfg = toy_config(*args, **options)
    cfg.model = dict(
        type="ToyBoxDetector",
        num_classes=num_classes,
        data_preprocessor=cfg.model.data_preprocessor,
    )
    if num_classes > 1:
        names = ("square", "lamp", "sun")[:num_classes]
        for mode in ("val", "test"):
            dataset = cfg[f"{mode}_dataloader"].dataset
            dataset.metainfo = dict(classes=names, palette=[(220, 20, 60)] * 3)
            cfg[f"{mode}_evaluator"] = []
    return cfg


def box_detector(
    folder: Path, toy_data: Path, num_classes: int = 1, **options: Any
) -> nn.Module:
    """A ``ToyBoxDetector`` that carries its config, for the Python API."""
    cfg = box_config(folder, [], data_root=toy_data, num_classes=num_classes, **options)
    cfg.custom_imports = dict(imports=["mmyolo.datasets"], allow_failed_imports=False)
    torch.manual_seed(0)
    detector = MODELS.build(copy.deepcopy(cfg.model)).eval()
    detector.cfg = cfg
    return detector
