"""Turns samples into entries of a page of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..records import BoxSample, VisSample
from ..render.boxes import class_name
from ..render.montage import cell_size_hw, resize_image
from .html_page import PageBox, PageEntry, PagePanel

_PAGE_IMAGE_SIZE = 960


def page_entry(
    sample: BoxSample | VisSample,
    panel: Any,
    class_names: Sequence[str],
    picture: str = "",
    order: int = 0,
    title: str | None = None,
) -> PageEntry:
    """A sample as a page of results shows it.

    Args:
        sample: The image and its maps.
        panel: What draws it; says which boxes are shown.
        class_names (Sequence[str]): May be empty.
        picture (str): Path of the finished picture, relative to the page.
        order (int): Place on the page.
        title (str, optional): Heading. Defaults to the image's name.
    """
    found = sample.detections
    shown = np.flatnonzero(found.scores > panel.options.score_thr).tolist()
    boxes = tuple(
        PageBox(
            class_name(int(found.labels[i]), class_names),
            float(found.scores[i]),
            _four(found.boxes_xyxy[i]),
        )
        for i in shown
    )
    places: dict[int | None, int] = {index: n for n, index in enumerate(shown)}
    image_h, image_w = sample.image_rgb.shape[:2]
    size_hw = cell_size_hw((image_h, image_w), _PAGE_IMAGE_SIZE, 1)
    none = "" if boxes else f"no box with score > {panel.options.score_thr:g}"
    return PageEntry(
        name=sample.image_id,
        title=title or sample.image_id,
        image_rgb=resize_image(sample.image_rgb, size_hw),
        image_hw=(image_h, image_w),
        boxes=boxes,
        panels=tuple(
            PagePanel(m.title, m.note, m.levels, places.get(m.detection))
            for m in panel.overlay_maps(sample)
        ),
        picture=picture,
        note=" · ".join(part for part in (none, sample.note) if part),
        order=order,
    )


def _four(box_xyxy: np.ndarray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box_xyxy.tolist()
    return x1, y1, x2, y2
