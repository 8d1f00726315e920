"""A detector, a data set and a Runner config small enough for unit tests.

The detector is a real one in miniature: it is trained by MMEngine, normalises
and pads like the others, and finds bright squares on a dark ground.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import nn

_RUN_NUMBERS = itertools.count()
# (height, width): portrait, landscape, and sides that 32 does not divide.
SIZES = ((96, 160), (160, 96), (70, 131), (128, 128), (64, 170), (100, 60))
SQUARE = 24


class ToyNeck(nn.Module):
    """Gives two maps and calls one shared convolution on both."""

    def __init__(self) -> None:
        super().__init__()
        self.out_layers = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)])
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = nn.functional.max_pool2d(x, 2, ceil_mode=True)
        maps = [layer(level) for layer, level in zip(self.out_layers, (x, pooled))]
        return self.shared(maps[0]), self.shared(maps[1])


class Brightness(nn.Module):
    """Mean of the channels on the grid of stride 8: a map that is known by hand."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(inputs.mean(dim=1, keepdim=True), 8)


class CountsForwards(nn.Module):
    """Counts in a list: attributes are put back after an explanation."""

    @property
    def num_forwards(self) -> int:
        return self._count[0]

    @num_forwards.setter
    def num_forwards(self, count: int) -> None:
        vars(self).setdefault("_count", [0])[0] = count


@MODELS.register_module()
class ToyDetector(CountsForwards, BaseModel):
    """Finds the brightest place.

    Args:
        fail_at (int, optional): Raise in the forward with this number.
    """

    def __init__(self, data_preprocessor: dict, fail_at: int | None = None) -> None:
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.Dropout2d(0.1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, 2, 1),
        )
        self.neck = ToyNeck()
        self.head = nn.Conv2d(8, 1, 1)
        self.brightness = Brightness()
        self.fail_at = fail_at
        self.num_forwards = 0
        self.fail_with: BaseException = RuntimeError("a layer failed")

    def forward(
        self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor"
    ) -> Any:
        self.num_forwards += 1
        maps = self.neck(self.backbone(inputs))
        if self.fail_at == self.num_forwards:
            raise self.fail_with
        brightness = self.brightness(inputs)
        # So bright places win from the start, and the metrics say something.
        heat = self.head(maps[0]) + 3 * nn.functional.avg_pool2d(brightness, 3, 1, 1)
        if mode == "loss":
            return dict(loss=(heat - 2 * brightness).square().mean())
        if mode == "tensor":
            return heat
        return [
            self._predict(heat[i, 0], sample) for i, sample in enumerate(data_samples)
        ]

    def _predict(self, heat: torch.Tensor, sample: DetDataSample) -> DetDataSample:
        row, column = divmod(int(heat.argmax()), heat.shape[1])
        x, y = column * 8 + 4, row * 8 + 4
        meta = sample.metainfo
        pad = meta.get("pad_param", np.zeros(4))
        scale = np.array(meta["scale_factor"] * 2)
        box = np.array([x - 12, y - 12, x + 12, y + 12]) - np.array(
            [pad[2], pad[0]] * 2
        )
        sample.pred_instances = InstanceData(
            bboxes=torch.as_tensor(box / scale, dtype=torch.float32)[None],
            scores=heat.max().sigmoid()[None],
            labels=torch.zeros(1, dtype=torch.long),
        )
        return sample


def write_dataset(root: Path, sizes: tuple = SIZES, extension: str = "png") -> Path:
    """Write images with one off-centre bright square each, and a COCO file.

    All files have the same name in folders of their own, so that nothing can
    rely on unique file names.
    """
    images, annotations = [], []
    rng = np.random.RandomState(0)
    for i, (height, width) in enumerate(sizes):
        image = rng.randint(0, 40, (height, width, 3)).astype(np.uint8)
        x, y = (6, 8) if i % 2 else (width - SQUARE - 6, height - SQUARE - 8)
        image[y : y + SQUARE, x : x + SQUARE] = 230
        path = root / f"folder{i}" / f"image.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
        images.append(
            dict(
                id=i + 1,
                file_name=f"folder{i}/image.{extension}",
                height=height,
                width=width,
            )
        )
        annotations.append(
            dict(
                id=i + 1,
                image_id=i + 1,
                category_id=1,
                bbox=[x, y, SQUARE, SQUARE],
                area=SQUARE * SQUARE,
                iscrowd=0,
            )
        )
    path = root / "annotations.json"
    categories = [dict(id=1, name="square")]
    path.write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return path


LETTERBOX = (
    dict(type="mmyolo.YOLOv5KeepRatioResize", scale=(128, 128)),
    dict(type="mmyolo.LetterResize", scale=(128, 128), allow_scale_up=True),
)
META_KEYS = (
    "img_id",
    "img_path",
    "ori_shape",
    "img_shape",
    "scale_factor",
    "pad_param",
    "flip",
    "flip_direction",
)


def make_pipeline(geometry: tuple = LETTERBOX) -> list[dict]:
    """A test pipeline around the given geometric steps."""
    return [
        dict(type="LoadImageFromFile"),
        *geometry,
        dict(type="mmdet.LoadAnnotations", with_bbox=True),
        dict(type="mmdet.PackDetInputs", meta_keys=META_KEYS),
    ]


def toy_config(
    work_dir: Path,
    hooks: list[dict],
    *,
    data_root: Path,
    max_epochs: int = 2,
    num_workers: int = 0,
    batch_size: int = 2,
    geometry: tuple = LETTERBOX,
    vis_backends: tuple = (dict(type="LocalVisBackend"),),
    **overrides: Any,
) -> Config:
    """A config for ``Runner.from_cfg`` that trains, validates and tests the toy."""
    dataset = dict(
        type="mmdet.CocoDataset",
        data_root=str(data_root),
        ann_file="annotations.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("square",), palette=[(220, 20, 60)]),
        test_mode=True,
        pipeline=make_pipeline(geometry),
    )
    workers = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
    evaluation_loader = dict(
        dataset=dataset,
        batch_size=batch_size,
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
        **workers,
    )
    train_loader = dict(
        dataset=dict(
            dataset, test_mode=False, pipeline=make_pipeline(geometry), filter_cfg=None
        ),
        batch_size=batch_size,
        sampler=dict(type="DefaultSampler", shuffle=True),
        collate_fn=dict(type="pseudo_collate"),
        **workers,
    )
    evaluator = dict(
        type="mmdet.CocoMetric",
        ann_file=str(data_root / "annotations.json"),
        metric="bbox",
    )
    cfg = dict(
        default_scope="mmengine",
        model=dict(
            type="ToyDetector",
            data_preprocessor=dict(
                type="mmdet.DetDataPreprocessor",
                mean=[60.0, 50.0, 40.0],
                std=[50.0, 60.0, 70.0],
                bgr_to_rgb=True,
                pad_size_divisor=32,
            ),
        ),
        work_dir=str(work_dir),
        train_dataloader=train_loader,
        val_dataloader=evaluation_loader,
        test_dataloader=evaluation_loader,
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs, val_interval=1),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(
            type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9)
        ),
        custom_hooks=hooks,
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=-1),
            logger=dict(type="LoggerHook", interval=1),
        ),
        visualizer=dict(
            type="Visualizer", vis_backends=[dict(b) for b in vis_backends]
        ),
        randomness=dict(seed=0),
        log_level="WARNING",
        # MMEngine keeps visualizers and loggers of one name for ever.
        experiment_name=f"toy_{next(_RUN_NUMBERS)}",
    )
    cfg.update(overrides)
    return Config(cfg)
