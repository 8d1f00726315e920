"""Writes a page that shows all pictures of a run, with filters, in any browser."""

from __future__ import annotations

import html
import json
import re
import threading
from base64 import b64encode
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PublishError, VisConfigError
from ..render.boxes import Color, class_color, contrast_color
from ..render.heatmap import colormap_lut, validate_overlay_options
from .files import OwnFiles, encode
from .page_entry import PageBox, PageEntry, PagePanel

__all__ = ["HtmlPage", "PageBox", "PageEntry", "PagePanel"]

_PAGE = "index.html"
_ASSETS = "index_files"
_TEMPLATE = "index_template.html"
_SLOT = re.compile(r"\{\{(\w+)\}\}")
# Levels are looked up in the colour map, which makes a small error a visible one.
_LEVELS_QUALITY = 95
_PICTURE_QUALITY = 88
_FINISHED_QUALITY = 92
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
    if not files.is_free(_PAGE):
        raise PublishError(
            f"{files.folder / _PAGE} is not of an earlier run and is not overwritten; "
            "name another folder"
        )
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
        colormap (str | int): See
            :func:`~mmyolo_vis_hooks.render.heatmap.colormap_lut`.
        fade (bool): True, for activation maps: the image is drawn grey, and level
            ``v`` has the share ``min(v / 255 / 0.5, 1) * strength``. False, for
            feature maps: the image keeps its colours, and every level has the
            share ``strength``.
        alpha (float): Strength at first, 0 to 1. Defaults to 0.6.

    Attributes:
        files (OwnFiles): Writes what shall lie beside the page.

    Raises:
        VisConfigError: If an option can never work.
        PublishError: If the folder cannot be written to, or holds an ``index.html`` of
            somebody else's.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> folder = tempfile.mkdtemp()
        >>> page = HtmlPage(folder, title='Layers', colormap='jet', fade=False)
        >>> image_rgb = np.zeros((60, 80, 3), np.uint8)
        >>> levels = np.zeros((20, 20), np.uint8)
        >>> layer = PagePanel('neck[0]', '256x20x20', levels)
        >>> page.add(PageEntry('a', 'a.jpg', image_rgb, (480, 640), (), (layer,)))
        >>> page.write().name
        'index.html'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        title: str,
        colormap: str | int,
        fade: bool,
        alpha: float = 0.6,
    ) -> None:
        validate_overlay_options(alpha, colormap)
        self.title = title
        self.fade = fade
        self.alpha = float(alpha)
        self.files = open_folder(folder)
        self._lut = colormap_lut(colormap)[:, 0]
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._records: list[dict[str, Any]] = []

    def __len__(self) -> int:
        """Number of images that were added."""
        return len(self._records)

    def add(self, entry: PageEntry) -> None:
        """Write the pictures of one image; the arrays are not kept.

        Threads may call this at the same time.

        Args:
            entry (PageEntry): The image.

        Raises:
            VisConfigError: If the name is on the page already.
            PublishError: If a file was not written whole; the entry is then not on
                the page.
        """
        with self._lock:
            if entry.name in self._names:
                raise VisConfigError(
                    f"name={entry.name!r} is on the page already; give each entry "
                    "another name"
                )
            self._names.add(entry.name)
        pictures = {"image": entry.image_rgb}
        pictures.update((str(i), panel.levels) for i, panel in enumerate(entry.panels))
        try:
            for part, array in pictures.items():
                quality = _LEVELS_QUALITY if array.ndim == 2 else _PICTURE_QUALITY
                # A name holds no dot, so the files of two entries cannot collide.
                name = f"{_ASSETS}/{entry.name}.{part}.jpg"
                self.files.write(name, encode(".jpg", array, quality))
        except BaseException:
            with self._lock:
                self._names.discard(entry.name)
            raise
        with self._lock:
            self._records.append(entry.record())

    def write_picture(self, name: str, image_rgb: np.ndarray) -> Path:
        """Write the finished picture of an entry beside the page.

        Args:
            name (str): The entry's.
            image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB.

        Raises:
            PublishError: If it cannot be written, or would replace somebody's file.
        """
        jpeg = encode(".jpg", image_rgb, _FINISHED_QUALITY)
        return self.files.write(f"{name}.jpg", jpeg)

    def write(self) -> Path:
        """Write the page with all images that were added so far.

        Returns:
            Path: Of ``index.html``. Whoever opens it while it is written gets the
            one before.

        Raises:
            PublishError: If it was not written whole; the one before is then still
                there.
        """
        with self._lock:
            records = sorted(self._records, key=_sort_key)
        template = resources.files("mmyolo_vis_hooks.publish") / _TEMPLATE
        red, green, blue = (
            " ".join(f"{v / 255:.4g}" for v in channel) for channel in self._lut.T
        )
        slots = {
            "title": html.escape(self.title),
            "red": red,
            "green": green,
            "blue": blue,
            "share": _FADING_SHARE if self.fade else _UNIFORM_SHARE,
            "data": self._json(records),
        }
        # One pass: what is put in may itself look like a slot.
        page = _SLOT.sub(lambda m: slots[m[1]], template.read_text(encoding="utf-8"))
        # A title made from a file name that is no text may hold half characters.
        path = self.files.write(_PAGE, page.encode("utf-8", "xmlcharrefreplace"))
        self.files.close()
        return path

    def _json(self, records: list[dict[str, Any]]) -> str:
        """All that the page's script needs, safe inside a script element."""
        counts = Counter(box[0] for record in records for box in record["boxes"])
        # The first colours are the easiest to tell apart: for the commonest classes.
        names = sorted(counts, key=lambda name: (-counts[name], name))
        place = {name: i for i, name in enumerate(names)}
        data = {
            "title": self.title,
            "fade": self.fade,
            "alpha": self.alpha,
            "assets": _ASSETS,
            "bar": _data_url(encode(".png", self._lut[None])),
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


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _sort_key(record: dict[str, Any]) -> tuple[int, list[tuple[int, int, str]], str]:
    name = record["name"]
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
    return record["order"], parts, name
