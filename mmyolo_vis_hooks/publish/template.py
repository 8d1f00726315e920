"""Fills the templates of pages: what they share, colour filters, and safe data."""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any

import numpy as np

from ..render.boxes import Color, contrast_color

# Values at equal distances between level 0 and 255; straight lines join them.
FADING_SHARE = "0 1 1"
UNIFORM_SHARE = "1 1"
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_GREY = """\
  <filter id="grey" x="0" y="0" width="1" height="1" color-interpolation-filters="sRGB">
    <feColorMatrix type="matrix" values="{row} {row} {row} 0 0 0 1 0"/>
  </filter>
""".format(row=".299 .587 .114 0 0")
# The red channel of a stored map is its level.
_COLOURS = """\
  <filter id="{id}" x="0" y="0" width="1" height="1" color-interpolation-filters="sRGB">
    <feColorMatrix in="SourceGraphic" type="matrix" values="0 0 0 0 0  0 0 0 0 0  0 0 0 0 0  1 0 0 0 0" result="levels"/>
    <feComponentTransfer in="levels" result="share">
      <feFuncA type="table" tableValues="{share}"/>
    </feComponentTransfer>
    <feComponentTransfer in="SourceGraphic" result="heat">
      <feFuncR type="table" tableValues="{red}"/>
      <feFuncG type="table" tableValues="{green}"/>
      <feFuncB type="table" tableValues="{blue}"/>
    </feComponentTransfer>
    <feComposite in="heat" in2="share" operator="in"/>
  </filter>
"""  # noqa: E501


def fill_page(
    template: str, title: str, filters: dict[str, tuple[np.ndarray, str]], data: Any
) -> bytes:
    """Make a page that needs no server and no network.

    Args:
        template (str): File of this folder that goes on after ``common_head.html``, in
            its style, with the slots ``title``, ``filters``, ``common`` and ``data``.
        title (str): Any text.
        filters (dict): By the id that CSS calls it: ``(256, 3)`` uint8 RGB that levels
            are shown in, and the share of the blend that they have, as above.
        data (Any): What the page's script reads, as JSON takes it.
    """
    folder = resources.files("mmyolo_vis_hooks.publish")

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    slots = {
        "title": html.escape(title),
        "style": read("common.css"),
        "common": read("common.js"),
        "filters": _filters(filters),
        "data": _safe_json(data),
    }
    # One pass: what is put in may itself look like a slot.
    page = _SLOT.sub(lambda m: slots[m[1]], read("common_head.html") + read(template))
    # A title made from a file name that is no text may hold half characters.
    return page.encode("utf-8", "xmlcharrefreplace")


def label(name: str, color: Color, count: int | None = None) -> dict[str, Any]:
    """A name with its colours, as the pages' scripts take it."""
    return {
        "name": name,
        "count": count,
        "fill": _css(color),
        "ink": _css(contrast_color(color)),
    }


def outline(box_xyxy: np.ndarray, image_hw: tuple[int, int]) -> list[float] | None:
    """Left, top, width and height in percent of the image, or None if unseen."""
    if not np.isfinite(box_xyxy).all():
        return None
    sizes = np.array(image_hw[::-1] * 2)
    corners = np.asarray(box_xyxy, float) / sizes * 100
    x1, y1, x2, y2 = np.clip(corners, 0, 100).tolist()
    if x2 <= x1 or y2 <= y1:
        return None
    return [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]


def _filters(filters: dict[str, tuple[np.ndarray, str]]) -> str:
    made = _GREY
    for name, (lut, share) in filters.items():
        channels = (" ".join(f"{v / 255:.4g}" for v in channel) for channel in lut.T)
        colors = dict(zip(("red", "green", "blue"), channels))
        made += _COLOURS.format(id=name, share=share, **colors)
    hidden = 'width="0" height="0" style="position:absolute" aria-hidden="true"'
    return f'<svg {hidden} focusable="false">\n{made}</svg>'


def _safe_json(data: Any) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Neither '</script' nor '<!--' may end the element early.
    return text.replace("<", "\\u003c")


def _css(color: Color) -> str:
    red, green, blue = color
    return f"rgb({red} {green} {blue})"
