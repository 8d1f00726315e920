"""What several tests of programs need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.datasets import CocoDataset

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
NANO = ROOT / "configs" / "examples" / "yolox_nano_coco.py"
WEIGHTS = ROOT / "docs" / "weights" / "yolox_nano_coco.pth"
PHOTO = ROOT / "docs" / "images" / "cat.jpg"  # 1200 x 400
NAMES = CocoDataset.METAINFO["classes"]
# What is annotated in the photo of the cat; its cup is missing.
OBJECTS = {
    "cat": (8, 5, 512, 385),
    "dining table": (605, 5, 1120, 395),
    "spoon": (940, 225, 1045, 325),
}
CONFIG = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"


def write_small(path: Any, seed: int = 0, hw: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Write a small image of soft spots; gives it as OpenCV has it."""
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = cv2.resize(spots, hw[::-1], interpolation=cv2.INTER_CUBIC)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image


def photo_settings(folder: Path, num_images: int = 1) -> list[str]:
    """Settings of a config: a data set of the photo of the cat alone."""
    images = [
        dict(id=i, file_name="cat.jpg", width=1200, height=400)
        for i in range(1, num_images + 1)
    ]
    boxes = [
        dict(
            image_id=image["id"],
            category_id=NAMES.index(name),
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0,
        )
        for image in images
        for name, (x1, y1, x2, y2) in OBJECTS.items()
    ]
    content = dict(
        images=images,
        annotations=[dict(id=i, **box) for i, box in enumerate(boxes, 1)],
        categories=[dict(id=i, name=name) for i, name in enumerate(NAMES)],
    )
    (folder / "objects.json").write_text(json.dumps(content))
    data = {
        "data_root": "",
        "ann_file": str(folder / "objects.json"),
        "data_prefix.img": str(PHOTO.parent),
    }
    return [f"val_dataloader.dataset.{name}={v}" for name, v in data.items()]
