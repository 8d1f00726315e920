"""What several tests of programs need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.datasets import CocoDataset

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
NANO = ROOT / "configs" / "examples" / "yolox_nano_coco.py"
WEIGHTS = ROOT / "docs" / "weights" / "yolox_nano_coco.pth"
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
