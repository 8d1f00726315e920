"""Writes a page that shows all pictures of a run, with filters, in any browser."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import re
import tempfile
import threading
import uuid
from base64 import b64encode
from collections import Counter
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from ..errors import PublishError, VisConfigError
from ..render.boxes import Color, class_color, contrast_color
from ..render.heatmap import colormap_lut, validate_overlay_options

_PAGE = "index.html"
_ASSETS = "index_files"
_TEMPLATE = "index_template.html"
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_NAME = re.compile(r"[\w-]+")
# Levels are looked up in the colour map, which makes a small error a visible one.
_LEVELS_QUALITY = 95
_PICTURE_QUALITY = 88
# Values at equal distances between level 0 and 255; straight lines join them.
_FADING_SHARE = "0 1 1"
_UNIFORM_SHARE = "1 1"


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


class HtmlPage:
    """A page ``index.html`` with its pictures in ``index_files`` beside it.

    It needs no server and no network. Maps are stored without colours, and the
    browser lays them over the image with the share that the reader chooses, so the
    blend is that of the pictures: uniform for feature maps, and for activation
    maps on the grey image and fading out below half of the maximum.

    Args:
        folder (str | Path): Where the page goes; made if it is missing. Files of
            an earlier page are overwritten by new ones of the same name, and
            nothing else is touched.
        title (str): Heading of the page; any text.
        colormap (str | int): See
            :func:`~mmyolo_vis_hooks.render.heatmap.colormap_lut`.
        fade (bool): True, for activation maps: the image is drawn grey, and level
            ``v`` has the share ``min(v / 255 / 0.5, 1) * strength``. False, for
            feature maps: the image keeps its colours, and every level has the
            share ``strength``.
        alpha (float): Strength at first, 0 to 1. Defaults to 0.6.

    Raises:
        VisConfigError: If an option can never work.
        PublishError: If the folder cannot be written to.

    Examples:
        >>> import tempfile
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
        self.folder = Path(folder)
        self.title = title
        self.fade = fade
        self.alpha = float(alpha)
        self._lut = colormap_lut(colormap)[:, 0]
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._records: list[dict[str, Any]] = []
        try:
            for needed in (self.folder, self.folder / _ASSETS):
                needed.mkdir(parents=True, exist_ok=True)
                # A folder that takes nothing shows now, not after the last image.
                with tempfile.TemporaryFile(dir=needed):
                    pass
        except OSError as error:
            raise PublishError(
                f"folder={str(self.folder)!r} cannot be written to ({error}); name a "
                "folder of your own with free space"
            ) from error

    def __len__(self) -> int:
        """Number of images that were added."""
        return len(self._records)

    def add(self, entry: PageEntry) -> None:
        """Write the pictures of one image; the arrays are not kept.

        Threads may call this at the same time.

        Args:
            entry (PageEntry): The image.

        Raises:
            VisConfigError: If a field of the entry can never work.
            PublishError: If a file was not written whole; the entry is then not on
                the page.
        """
        _check(entry)
        with self._lock:
            if entry.name in self._names:
                raise VisConfigError(
                    f"name={entry.name!r} is on the page already; give each entry "
                    "another name"
                )
            self._names.add(entry.name)
        try:
            assets = self.folder / _ASSETS
            # A name holds no dot, so the files of two entries cannot collide.
            _write_whole(
                assets / f"{entry.name}.image.jpg",
                _jpeg(entry.image_rgb, entry.name),
            )
            for i, panel in enumerate(entry.panels):
                _write_whole(
                    assets / f"{entry.name}.{i}.jpg", _jpeg(panel.levels, entry.name)
                )
        except BaseException:
            with self._lock:
                self._names.discard(entry.name)
            raise
        with self._lock:
            self._records.append(_record(entry))

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
        path = self.folder / _PAGE
        # A title made from a file name that is no text may hold half characters.
        _write_whole(path, page.encode("utf-8", "xmlcharrefreplace"))
        return path

    def _json(self, records: list[dict[str, Any]]) -> str:
        """All that the page's script needs, safe inside a script element."""
        counts = Counter(box[0] for record in records for box in record["boxes"])
        # The first colours are the easiest to tell apart: for the commonest classes.
        names = sorted(counts, key=lambda name: (-counts[name], name))
        labels = []
        for i, name in enumerate(names):
            color = class_color(i)
            labels.append(
                {
                    "name": name,
                    "count": counts[name],
                    "fill": _css(color),
                    "ink": _css(contrast_color(color)),
                }
            )
        place = {name: i for i, name in enumerate(names)}
        entries = [
            {**record, "boxes": [[place[box[0]], *box[1:]] for box in record["boxes"]]}
            for record in records
        ]
        data = {
            "title": self.title,
            "fade": self.fade,
            "alpha": self.alpha,
            "assets": _ASSETS,
            "bar": _data_url(self._lut[None]),
            "labels": labels,
            "entries": entries,
        }
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
        # Neither '</script' nor '<!--' may end the element early.
        return text.replace("<", "\\u003c")


def _css(color: Color) -> str:
    red, green, blue = color
    return f"rgb({red} {green} {blue})"


def _check(entry: PageEntry) -> None:
    if not _NAME.fullmatch(entry.name):
        raise VisConfigError(
            f"name={entry.name!r} is not safe in file names; use letters, digits, '_' "
            "and '-'"
        )
    _check_picture("image_rgb", entry.image_rgb, (3,))
    if min(entry.image_hw) < 1:
        raise VisConfigError(
            f"image_hw={entry.image_hw!r} is no size; give the height and width of "
            "the original image in pixels"
        )
    if entry.picture and (
        PurePath(entry.picture).is_absolute() or entry.picture.startswith(("/", "\\"))
    ):
        raise VisConfigError(
            f"picture={entry.picture!r} is an absolute path; give it relative to the "
            "page's folder, so that the folder can be moved"
        )
    for i, panel in enumerate(entry.panels):
        _check_picture(f"panels[{i}].levels", panel.levels, (2, 3))
        if panel.box is not None and not 0 <= panel.box < len(entry.boxes):
            raise VisConfigError(
                f"panels[{i}].box={panel.box!r} is none of the {len(entry.boxes)} "
                "boxes of the entry; give an index into boxes, or None"
            )


def _check_picture(name: str, array: np.ndarray, num_dims: tuple[int, ...]) -> None:
    if (
        array.dtype != np.uint8
        or array.ndim not in num_dims
        or array.size == 0
        or (array.ndim == 3 and array.shape[2] != 3)
    ):
        wanted = " or ".join("(h, w)" if n == 2 else "(h, w, 3)" for n in num_dims)
        raise VisConfigError(
            f"{name} has the shape {array.shape} and the type {array.dtype}; give a "
            f"uint8 array of the shape {wanted}"
        )


def _record(entry: PageEntry) -> dict[str, Any]:
    """What the page needs to know of an entry, without its arrays."""
    panels = []
    for panel in entry.panels:
        record: dict[str, Any] = {"title": panel.title, "note": panel.note}
        if panel.box is not None:
            record["box"] = int(panel.box)
        if panel.levels.ndim == 3:
            record["size"] = [panel.levels.shape[1], panel.levels.shape[0]]
        panels.append(record)
    height, width = entry.image_hw
    return {
        "name": entry.name,
        "title": entry.title,
        "size": [int(width), int(height)],
        "boxes": [
            [box.label, _score(box.score), _outline(box.xyxy, entry.image_hw)]
            for box in entry.boxes
        ],
        "panels": panels,
        "href": _href(entry.picture),
        "note": entry.note,
        "order": int(entry.order),
    }


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


def _sort_key(record: dict[str, Any]) -> tuple[int, list[tuple[int, int, str]], str]:
    name = record["name"]
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
    return record["order"], parts, name


def _jpeg(picture: np.ndarray, name: str) -> bytes:
    """Encode ``(h, w)`` levels or an ``(h, w, 3)`` RGB picture."""
    quality = _LEVELS_QUALITY
    if picture.ndim == 3:
        picture = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2BGR)
        quality = _PICTURE_QUALITY
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    try:
        done, data = cv2.imencode(".jpg", picture, options)
    except cv2.error as error:
        raise PublishError(_not_encoded(picture, name)) from error
    if not done:
        raise PublishError(_not_encoded(picture, name))
    return data.tobytes()


def _not_encoded(picture: np.ndarray, name: str) -> str:
    height, width = picture.shape[:2]
    return (
        f"a picture of {name!r} with {width}x{height} pixels cannot be stored as JPEG; "
        "make it smaller"
    )


def _data_url(image_rgb: np.ndarray) -> str:
    done, data = cv2.imencode(".png", np.ascontiguousarray(image_rgb[..., ::-1]))
    if not done:
        raise PublishError("the colour bar cannot be stored as PNG; repair OpenCV")
    return f"data:image/png;base64,{b64encode(data.tobytes()).decode()}"


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        written = part.stat().st_size
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError):
            raise
        raise PublishError(
            f"{path} was not written ({error}); look at the free space and the "
            "permissions of its folder"
        ) from error
