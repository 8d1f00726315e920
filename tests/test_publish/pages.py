"""Pages of results with known boxes and maps."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.publish.html_page import HtmlPage
from mmyolo_vis_hooks.records import Detections, OverlayMap, Sample

HOSTILE = '<b>"x"</b>.jpg</script><script>window.broken=1</script><!-- {{data}} &amp;'
COLOR = (200, 60, 30)
DOG = ("dog", 0.9, (64, 48, 320, 240))


def smooth_levels(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).uniform(0, 1, (5, 6)).astype(np.float32)
    grown = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.normalize(grown, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def plain(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), COLOR, np.uint8)


def new_page(folder: Path, **changes: Any) -> HtmlPage:
    options = dict(title="Maps", colormap="jet", fade=True, alpha=0.6)
    return HtmlPage(folder, **{**options, **changes})


def add(
    page: HtmlPage,
    name: str = "a",
    *,
    boxes: Sequence[tuple] = (DOG,),
    maps: Sequence[OverlayMap] | None = None,
    image_rgb: np.ndarray | None = None,
    note: str = "",
    score_thr: float = 0.0,
    **texts: Any,
) -> None:
    """Add an image with boxes (class, score, x1 y1 x2 y2) to a page."""
    image_rgb = plain(480, 640) if image_rgb is None else image_rgb
    maps = [OverlayMap("map", "boxam", smooth_levels(), 0)] if maps is None else maps
    names = sorted({label for label, _, _ in boxes})
    found = Detections(
        np.array([box for _, _, box in boxes], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in boxes], np.float32),
        np.array([names.index(label) for label, _, _ in boxes], np.int64),
    )
    frame = FrameTransform.identity(image_rgb.shape[:2])
    panel = SimpleNamespace(
        options=SimpleNamespace(score_thr=score_thr),
        class_names=names,
        overlay_maps=lambda sample: maps,
    )
    texts = {"name": name, "title": f"{name}.jpg", "order": 0, **texts}
    page.add(Sample(name, image_rgb, frame, found, note=note), panel, **texts)


def data_of(path: Path) -> dict[str, Any]:
    """What the page's script is given."""
    text = path.read_text(encoding="utf-8")
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    [data] = re.findall(pattern, text, re.DOTALL)
    return json.loads(data)
