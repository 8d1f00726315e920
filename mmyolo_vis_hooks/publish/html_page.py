"""Writes a page that shows all pictures of a run, with filters, in any browser."""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import numpy as np

from ..records import Sample
from ..render.boxes import Color, class_color, class_name, contrast_color
from ..render.heatmap import colormap_lut
from ..render.montage import cell_size_hw, resize_image
from .files import OwnFiles, encode

_PAGE = "index.html"
_ASSETS = "index_files"
_TEMPLATE = "index_template.html"
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_IMAGE_SIZE = 960
# Levels are looked up in the colour map, which makes a small error a visible one.
_LEVELS_QUALITY = 95
_IMAGE_QUALITY = 88
_PICTURE_QUALITY = 92
# Values at equal distances between level 0 and 255; straight lines join them.
_FADING_SHARE = "0 1 1"
_UNIFORM_SHARE = "1 1"


def open_folder(folder: str | Path) -> OwnFiles:
    """Make sure that a page can be written to a folder.

    Raises:
        PublishError: If the folder cannot be written to, or holds an ``index.html`` of
            somebody else's.
    """
    files = OwnFiles(Path(folder), _ASSETS)
    files.check_free(_PAGE)
    return files


class HtmlPage:
    """A page ``index.html`` with its pictures in ``index_files`` beside it.

    It needs no server and no network. Maps are stored without colours, and the
    browser lays them over the image with the share that the reader chooses, so the
    blend is that of the pictures: uniform for feature maps, and for activation
    maps on the grey image and fading out below half of the maximum.

    Args:
        folder (str | Path): Where the page goes; made if it is missing. Files of
            earlier pages are replaced by new ones of the same name, and nothing else
            is touched.
        title (str): Heading of the page; any text.
        colormap (str | int): See :func:`colormap_lut`.
        fade (bool): True, for activation maps: level ``v`` has the share
            ``min(v / 255 / 0.5, 1) * strength``. False, for feature maps: every level
            has the share ``strength``.
        alpha (float): Strength at first, 0 to 1.

    Attributes:
        files (OwnFiles): Writes what shall lie beside the page.

    Raises:
        PublishError: As :func:`open_folder`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        title: str,
        colormap: str | int,
        fade: bool,
        alpha: float,
    ) -> None:
        self.title = title
        self.fade = fade
        self.alpha = alpha
        self.files = open_folder(folder)
        self._lut = colormap_lut(colormap)[:, 0]
        self._records: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Number of images that were added."""
        return len(self._records)

    def add(
        self,
        sample: Sample,
        panel: Any,
        *,
        name: str,
        title: str,
        order: int,
        picture: str = "",
    ) -> None:
        """Write the pictures of one image; the arrays are not kept.

        Threads may call this at the same time.

        Args:
            sample: The image and its maps.
            panel: What draws it; says which boxes are shown, and gives the maps.
            name (str): Unique on the page; letters, digits, ``_`` and ``-``.
            title (str): Heading; any text.
            order (int): Place on the page; equal ones are sorted by name, numbers in
                it by their value.
            picture (str): Path of the finished picture, relative to the page's folder;
                '' where there is none to link to.

        Raises:
            PublishError: If a file was not written whole; the image is then not on
                the page.
        """
        found, thr = sample.detections, panel.options.score_thr
        shown = np.flatnonzero(found.scores > thr).tolist()
        image_h, image_w = sample.image_rgb.shape[:2]
        size_hw = cell_size_hw((image_h, image_w), _IMAGE_SIZE, 1)
        image_rgb = resize_image(sample.image_rgb, size_hw)
        self._write_asset(f"{name}.image", image_rgb, _IMAGE_QUALITY)
        panels = []
        for i, overlay in enumerate(panel.overlay_maps(sample)):
            self._write_asset(f"{name}.{i}", overlay.levels, _LEVELS_QUALITY)
            panels.append({"title": overlay.title, "note": overlay.note})
            if overlay.detection in shown:
                panels[-1]["box"] = shown.index(overlay.detection)
        no_box = "" if shown else f"no box with score > {thr:g}"
        boxes = [
            [
                class_name(int(found.labels[i]), panel.class_names),
                round(float(found.scores[i]), 5),
                _outline(found.boxes_xyxy[i], (image_h, image_w)),
            ]
            for i in shown
        ]
        # Quoted, a path is never a scheme, a query or a fragment.
        href = PurePath(picture).as_posix() if picture else ""
        record = {
            "name": name,
            "title": title,
            "size": [image_w, image_h],
            "boxes": boxes,
            "panels": panels,
            "href": quote(href, errors="surrogateescape"),
            "note": " · ".join(part for part in (no_box, sample.note) if part),
            "order": order,
        }
        self._records.append(record)

    def write_picture(self, name: str, image_rgb: np.ndarray) -> Path:
        """Write the finished picture of an image beside the page.

        Raises:
            PublishError: If it cannot be written, or would replace somebody's file.
        """
        jpeg = encode(".jpg", image_rgb, _PICTURE_QUALITY)
        return self.files.write(f"{name}.jpg", jpeg)

    def write(self) -> Path:
        """Write the page with all images that were added so far.

        Whoever opens it while it is written gets the one before.

        Raises:
            PublishError: If it was not written whole; the one before is still there.
        """
        template = resources.files("mmyolo_vis_hooks.publish") / _TEMPLATE
        colors = [" ".join(f"{v / 255:.4g}" for v in c) for c in self._lut.T]
        slots = {
            "title": html.escape(self.title),
            **dict(zip(("red", "green", "blue"), colors)),
            "share": _FADING_SHARE if self.fade else _UNIFORM_SHARE,
            "data": self._json(sorted(self._records, key=_sort_key)),
        }
        # One pass: what is put in may itself look like a slot.
        page = _SLOT.sub(lambda m: slots[m[1]], template.read_text(encoding="utf-8"))
        # A title made from a file name that is no text may hold half characters.
        path = self.files.write(_PAGE, page.encode("utf-8", "xmlcharrefreplace"))
        self.files.close()
        return path

    def _write_asset(self, name: str, picture: np.ndarray, quality: int) -> None:
        # A name holds no dot, so the files of two images cannot collide.
        self.files.write(f"{_ASSETS}/{name}.jpg", encode(".jpg", picture, quality))

    def _json(self, records: Sequence[dict[str, Any]]) -> str:
        """All that the page's script needs, safe inside a script element."""
        counts = Counter(box[0] for record in records for box in record["boxes"])
        # The first colours are the easiest to tell apart: for the commonest classes.
        names = sorted(counts, key=lambda name: (-counts[name], name))
        place = {name: i for i, name in enumerate(names)}
        bar = b64encode(encode(".png", self._lut[None])).decode()
        data = {
            "title": self.title,
            "fade": self.fade,
            "alpha": self.alpha,
            "assets": _ASSETS,
            "bar": f"data:image/png;base64,{bar}",
            "labels": [_label(i, name, counts[name]) for i, name in enumerate(names)],
            "entries": [
                {**record, "boxes": [[place[b[0]], *b[1:]] for b in record["boxes"]]}
                for record in records
            ],
        }
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        # Neither '</script' nor '<!--' may end the element early.
        return text.replace("<", "\\u003c")


def _label(index: int, name: str, count: int) -> dict[str, Any]:
    color = class_color(index)
    ink = contrast_color(color)
    return {"name": name, "count": count, "fill": _css(color), "ink": _css(ink)}


def _css(color: Color) -> str:
    red, green, blue = color
    return f"rgb({red} {green} {blue})"


def _outline(box_xyxy: np.ndarray, image_hw: tuple[int, int]) -> list[float] | None:
    """Left, top, width and height in percent of the image, or None if unseen."""
    if not np.isfinite(box_xyxy).all():
        return None
    sizes = np.array(image_hw[::-1] * 2)
    x1, y1, x2, y2 = np.clip(box_xyxy.astype(float) / sizes * 100, 0, 100).tolist()
    if x2 <= x1 or y2 <= y1:
        return None
    return [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]


def _sort_key(record: dict[str, Any]) -> tuple[int, list[tuple[int, int, str]], str]:
    name = record["name"]
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
    return record["order"], parts, name
