"""What a page shows of one image."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import numpy as np

from ..errors import VisConfigError

_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class PageBox:
    """One detection.

    Attributes:
        label: Name of its class.
        score: 0 to 1.
        xyxy: Corners in pixels of the original image. A box that lies outside it
            or is not finite has no outline.
    """

    label: str
    score: float
    xyxy: tuple[float, float, float, float]


@dataclass(frozen=True)
class PagePanel:
    """One picture beside the image.

    Attributes:
        title: First line of the caption.
        note: Second line of the caption, or ''.
        levels: ``(h, w)`` uint8, a map over the whole image in any size: 0 is the
            first colour, 255 the last. Or ``(h, w, 3)`` uint8, RGB: a picture of
            its own, on which nothing is laid.
        box: Which of the entry's boxes the panel explains; None where it belongs
            to the image, as a layer does or the map of all boxes.
    """

    title: str
    note: str
    levels: np.ndarray
    box: int | None = None


@dataclass(frozen=True)
class PageEntry:
    """One image with everything that is shown of it.

    Attributes:
        name: Unique on the page; letters, digits, ``_`` and ``-``.
        title: Heading; any text.
        image_rgb: ``(h, w, 3)`` uint8, RGB, in the size in which it is stored.
        image_hw: Height and width of the original image, pixels.
        boxes: Detections, whether or not a panel explains them.
        panels: In the order in which they are shown.
        picture: Path of the finished picture, relative to the page's folder; ''
            where there is none to link to.
        note: Text below the heading, or ''.
        order: Place on the page; equal ones are sorted by name, numbers in it by
            their value.

    Raises:
        VisConfigError: If a field can never work.
    """

    name: str
    title: str
    image_rgb: np.ndarray
    image_hw: tuple[int, int]
    boxes: tuple[PageBox, ...]
    panels: tuple[PagePanel, ...]
    picture: str = ""
    note: str = ""
    order: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise VisConfigError(
                f"name={self.name!r} is not safe in file names; use letters, digits, "
                "'_' and '-'"
            )
        if min(self.image_hw) < 1:
            raise VisConfigError(
                f"image_hw={self.image_hw!r} is no size; give the height and width of "
                "the original image in pixels"
            )
        if self.picture.startswith(("/", "\\")) or PurePath(self.picture).is_absolute():
            raise VisConfigError(
                f"picture={self.picture!r} is an absolute path; give it relative to "
                "the page's folder, so that the folder can be moved"
            )
        _check_picture("image_rgb", self.image_rgb, (3,))
        for i, panel in enumerate(self.panels):
            _check_picture(f"panels[{i}].levels", panel.levels, (2, 3))
            if panel.box is not None and not 0 <= panel.box < len(self.boxes):
                raise VisConfigError(
                    f"panels[{i}].box={panel.box!r} is none of the {len(self.boxes)} "
                    "boxes of the entry; give an index into boxes, or None"
                )

    def record(self) -> dict[str, Any]:
        """What the page's script needs to know, without the arrays."""
        height, width = self.image_hw
        return {
            "name": self.name,
            "title": self.title,
            "size": [int(width), int(height)],
            "boxes": [
                [box.label, _score(box.score), _outline(box.xyxy, self.image_hw)]
                for box in self.boxes
            ],
            "panels": [_panel_record(panel) for panel in self.panels],
            "href": _href(self.picture),
            "note": self.note,
            "order": int(self.order),
        }


def _check_picture(name: str, array: np.ndarray, num_dims: tuple[int, ...]) -> None:
    fits = array.ndim in num_dims and (array.ndim == 2 or array.shape[2] == 3)
    if not fits or array.dtype != np.uint8 or array.size == 0:
        wanted = " or ".join("(h, w)" if n == 2 else "(h, w, 3)" for n in num_dims)
        raise VisConfigError(
            f"{name} has the shape {array.shape} and the type {array.dtype}; give a "
            f"uint8 array of the shape {wanted}"
        )


def _panel_record(panel: PagePanel) -> dict[str, Any]:
    record: dict[str, Any] = {"title": panel.title, "note": panel.note}
    if panel.box is not None:
        record["box"] = int(panel.box)
    if panel.levels.ndim == 3:
        record["size"] = [panel.levels.shape[1], panel.levels.shape[0]]
    return record


def _score(score: float) -> float | None:
    return round(float(score), 5) if math.isfinite(score) else None


def _outline(
    xyxy: tuple[float, float, float, float], image_hw: tuple[int, int]
) -> list[float] | None:
    """Left, top, width and height in percent of the image, or None if unseen."""
    if not all(map(math.isfinite, xyxy)):
        return None
    height, width = image_hw
    x1, x2 = (min(max(float(x) / width * 100, 0.0), 100.0) for x in xyxy[::2])
    y1, y2 = (min(max(float(y) / height * 100, 0.0), 100.0) for y in xyxy[1::2])
    if x2 <= x1 or y2 <= y1:
        return None
    return [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]


def _href(picture: str) -> str:
    # Quoted, a path is never a scheme, a query or a fragment.
    parts = PurePath(picture).as_posix() if picture else ""
    return quote(parts, safe="/", errors="surrogateescape")
