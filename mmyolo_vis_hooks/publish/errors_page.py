"""Writes a page of errors: each with its picture, its reason and its maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..render.boxes import Color
from ..render.heatmap import DIVERGING, colormap_lut
from ..render.montage import cell_size_hw, resize_image
from ..render.panel import MAX_OVERLAY_SIZE
from .files import OwnFiles, encode
from .template import FADING_SHARE, UNIFORM_SHARE, fill_page, label, outline

PAGE, ASSETS = "index.html", "index_files"
_TEMPLATE = "errors_template.html"
_GREY = (120, 130, 145)
_IMAGE_SIZE, _IMAGE_QUALITY, _MAP_QUALITY = 1280, 82, 90


@dataclass(frozen=True)
class PageMap:
    """A map that was stored for a page.

    Attributes:
        asset: Part of the file's name; '' where there is no map.
        title: What it is of.
        note: Layer, or a number that goes with it; why there is no map.
        signed: Whether the middle level is zero, and those below are negative.
    """

    asset: str
    title: str
    note: str = ""
    signed: bool = False


@dataclass(frozen=True)
class PageError:
    """What the page shows in one place.

    Attributes:
        image: Name of its image.
        title: In a few words.
        why: In a sentence.
        groups: Its value of each group that the page can be filtered by.
        score: 0 to 1.
        lost: What it costs; the page begins with the greatest.
        boxes: Role and ``(4,)`` x1, y1, x2, y2 in pixels of the image; the first is the
            one that it is about.
        maps: Laid over the image.
    """

    image: str
    title: str
    why: str
    groups: tuple[str, ...]
    score: float
    lost: float
    boxes: tuple[tuple[str, Sequence[float]], ...]
    maps: tuple[PageMap, ...] = ()


class PageImages:
    """Writes the images and maps of a page, which outlive an interrupted call.

    Args:
        files (OwnFiles): Of the page's folder.
    """

    def __init__(self, files: OwnFiles) -> None:
        self._files = files

    def write_image(self, name: str, image_rgb: np.ndarray) -> None:
        """Write an image, ``(H, W, 3)`` uint8 RGB; name: letters, digits, _ and -."""
        size_hw = cell_size_hw(image_rgb.shape[:2], _IMAGE_SIZE, 1)
        jpeg = encode(".jpg", resize_image(image_rgb, size_hw), _IMAGE_QUALITY)
        self._files.write(f"{ASSETS}/{name}.image.jpg", jpeg)

    def write_map(self, name: str, page_map: PageMap, values: np.ndarray) -> None:
        """Write a map of an image, ``(H, W)`` of 0 to 1, or of -1 to 1 if signed."""
        size_hw = cell_size_hw(values.shape[:2], MAX_OVERLAY_SIZE, 1)
        small = resize_image(values, size_hw)
        scaled = (small + 1) * 127.5 if page_map.signed else small * 255
        levels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
        asset = f"{ASSETS}/{name}.{page_map.asset}.jpg"
        self._files.write(asset, encode(".jpg", levels, _MAP_QUALITY))


def write_errors_page(
    files: OwnFiles,
    errors: Sequence[PageError],
    *,
    title: str,
    lead: str,
    noun: tuple[str, str],
    order: str,
    columns: int,
    images: Mapping[str, tuple[int, int]],
    pictures: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    roles: Mapping[str, Color],
    colors: Mapping[str, Color],
) -> Path:
    """Write ``index.html``, which builds what one looks at, however many errors.

    Args:
        files (OwnFiles): Of the folder, with the images and maps in it.
        errors (Sequence[PageError]): In any order.
        title (str): Heading, any text.
        lead (str): A sentence below it.
        noun (tuple[str, str]): What is counted, one and many.
        columns (int): Pictures side by side in each place, the image itself first.
        order (str): What the first order, by ``lost``, is called.
        images (Mapping): Height and width of each image in pixels.
        pictures (Mapping): Path of an image's finished picture, where there is one.
        groups (Mapping): What one can filter by, and its values in their order.
        roles (Mapping): Colours of the boxes, by what they are.
        colors (Mapping): Colours of values of the first group.

    Raises:
        PublishError: If it was not written whole, or would replace somebody's page.
    """
    place = {name: i for i, name in enumerate(images)}
    role_place = {role: i for i, role in enumerate(roles)}
    values, counts = [], []
    for i, names in enumerate(groups.values()):
        counts.append(Counter(error.groups[i] for error in errors))
        known = [name for name in names if counts[i][name]]
        values.append({name: n for n, name in enumerate(known)})

    def entry(error: PageError) -> list[Any]:
        image_hw = images[error.image]
        boxes = [
            [role_place[role], outline(np.asarray(box), image_hw)]
            for role, box in error.boxes
        ]
        return [
            place[error.image],
            [own_values[v] for own_values, v in zip(values, error.groups)],
            round(error.score, 4),
            float(f"{error.lost:.4g}"),
            error.title,
            error.why,
            [box for box in boxes if box[1]],
            outline(_window([box for _, box in error.boxes], image_hw), image_hw),
            [list(asdict(page_map).values()) for page_map in error.maps],
        ]

    data = {
        "lead": lead,
        "noun": noun,
        "order": order,
        "columns": columns,
        "assets": ASSETS,
        "images": [
            [name, width, height, quote(pictures.get(name, ""))]
            for name, (height, width) in images.items()
        ],
        "roles": [label(role, color) for role, color in roles.items()],
        "groups": [
            {
                "name": name,
                "values": [
                    {"name": value, "count": n[value]}
                    if i
                    else label(value, colors.get(value, _GREY), n[value])
                    for value in own_values
                ],
            }
            for i, (name, own_values, n) in enumerate(zip(groups, values, counts))
        ],
        "entries": [entry(error) for error in errors],
    }
    filters = {
        "colours": (colormap_lut("plasma")[:, 0], FADING_SHARE),
        "signed": (colormap_lut(DIVERGING)[:, 0], UNIFORM_SHARE),
    }
    path = files.write(PAGE, fill_page(_TEMPLATE, title, filters, data))
    files.close()
    return path


def _window(boxes: Sequence[Sequence[float]], image_hw: tuple[int, int]) -> np.ndarray:
    """``(4,)`` x1, y1, x2, y2 of a part, 4 by 3 if it can be, that shows boxes."""
    # Of weights that diverged, numbers may be none.
    corners = np.nan_to_num(np.array(boxes, float)).reshape(-1, 2)
    image_wh = np.array(image_hw[::-1], float)
    low, high = np.clip([corners.min(axis=0), corners.max(axis=0)], 0, image_wh)
    box_w, box_h = high - low
    image_w, image_h = image_wh
    width = min(image_w, max(2 * box_w, 2.7 * box_h, 0.25 * image_wh.max()))
    height = min(image_h, max(0.75 * width, 1.2 * box_h))
    size = np.array([width, height])
    start = np.clip((low + high - size) / 2, 0, image_wh - size)
    return np.concatenate([start, start + size])
