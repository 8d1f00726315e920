"""What several tests of programs need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
CONFIG = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"


def write_small(path: Any, seed: int = 0, hw: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Write a small image of soft spots; gives it as OpenCV has it."""
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = cv2.resize(spots, hw[::-1], interpolation=cv2.INTER_CUBIC)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image
