"""Writes a page that shows all pictures of a run, with filters, in any browser."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import numpy as np

from ..records import Sample
from ..render.boxes import class_color, class_name
from ..render.heatmap import colormap_lut
from ..render.montage import cell_size_hw, resize_image
from .files import OwnFiles, encode
from .template import FADING_SHARE, UNIFORM_SHARE, fill_page, label, outline

_PAGE = "index.html"
_ASSETS = "index_files"
_TEMPLATE = "index_template.html"
_IMAGE_SIZE = 960
# Levels are looked up in the colour map, which makes a small error a visible one.
_LEVELS_QUALITY = 95
_IMAGE_QUALITY = 88
_PICTURE_QUALITY = 92


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
            order (int): Place on the page.
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
                outline(found.boxes_xyxy[i], (image_h, image_w)),
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
        share = FADING_SHARE if self.fade else UNIFORM_SHARE
        data = self._data(sorted(self._records, key=itemgetter("order")))
        page = fill_page(_TEMPLATE, self.title, {"colours": (self._lut, share)}, data)
        path = self.files.write(_PAGE, page)
        self.files.close()
        return path

    def _write_asset(self, name: str, picture: np.ndarray, quality: int) -> None:
        # A name holds no dot, so the files of two images cannot collide.
        self.files.write(f"{_ASSETS}/{name}.jpg", encode(".jpg", picture, quality))

    def _data(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """All that the page's script needs."""
        counts = Counter(box[0] for record in records for box in record["boxes"])
        # The first colours are the easiest to tell apart: for the commonest classes.
        names = sorted(counts, key=lambda name: (-counts[name], name))
        place = {name: i for i, name in enumerate(names)}
        bar = b64encode(encode(".png", self._lut[None])).decode()
        return {
            "title": self.title,
            "fade": self.fade,
            "alpha": self.alpha,
            "assets": _ASSETS,
            "bar": f"data:image/png;base64,{bar}",
            "labels": [
                label(name, class_color(i), counts[name])
                for i, name in enumerate(names)
            ],
            "entries": [
                {**record, "boxes": [[place[b[0]], *b[1:]] for b in record["boxes"]]}
                for record in records
            ],
        }
