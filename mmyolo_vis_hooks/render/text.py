"""Writes Unicode text into images with Pillow: OpenCV's own fonts only know ASCII.

Sizes and widths are in pixels.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from mmengine.logging import print_log
from PIL import Image, ImageDraw, ImageFont

# Files of fonts with wide coverage on Linux, Windows and macOS.
_WIDE_FONTS = re.compile(
    r"cjk|han-?sans|wqy|droidsansfallback|msyh|simhei|pingfang|hiragino|malgun"
    r"|arial ?unicode|unifont|notosans-regular",
    re.I,
)
# A line may end after these, but not within a number, nor before a full stop or comma.
_BREAKS = re.compile(
    r"(?<=[ _/:;)\]·])(?![.,])|(?<=\D[.,])|(?<=[.,])(?=\D)|(?<=[^\W\d]-)(?=[^\W\d])"
)

_undrawable: set[str] = set()


def clean_text(text: str) -> str:
    """Replace line breaks and control characters by spaces."""
    return "".join(" " if unicodedata.category(c)[0] == "C" else c for c in str(text))


def is_drawable(text: str) -> bool:
    """Whether a font on this machine has every character; the log says once if not."""
    if _font_path(clean_text(text), False) is not None:
        return True
    if not _undrawable:
        print_log(
            f"No font on this machine can write {text!r}: class names are drawn as "
            "numbers then, other characters as '?'. A font that has them helps; on "
            "Debian and Ubuntu: apt install fonts-noto-cjk",
            logger="current",
            level=logging.WARNING,
        )
    _undrawable.add(str(text))
    return False


@lru_cache(maxsize=64)
def _glyphs(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except RuntimeError:  # FreeType's, of a file that it cannot read
        return frozenset()


@lru_cache(maxsize=1)
def _wide_fonts() -> tuple[str, ...]:
    # Not the fontManager: its list is as old as its cache.
    from matplotlib import font_manager

    paths = sorted(font_manager.findSystemFonts())
    return tuple(p for p in paths if _WIDE_FONTS.search(Path(p).name))


@lru_cache(maxsize=2)
def _shipped_font(bold: bool) -> str:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@lru_cache(maxsize=4096)
def _font_path(text: str, bold: bool) -> str | None:
    """The first font that has every character of the text."""
    needed = {ord(char) for char in text}
    if needed <= _glyphs(_shipped_font(bold)):
        return _shipped_font(bold)
    return next((path for path in _wide_fonts() if needed <= _glyphs(path)), None)


@lru_cache(maxsize=256)
def _load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=4096)
def _font_for(text: str, size: int, bold: bool) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text as it can be written, and the font for it."""
    text = clean_text(text)
    path = _font_path(text, bold) or _font_path(text, False)
    if path is None:
        is_drawable(text)  # says so
        path = _shipped_font(False)
        text = "".join(c if ord(c) in _glyphs(path) else "?" for c in text)
    return text, _load_font(path, size)


def line_height(size: int) -> int:
    """Height of a line of text."""
    return sum(_font_for("", size, False)[1].getmetrics())


@lru_cache(maxsize=4096)
def text_width(text: str, size: int, bold: bool = False) -> int:
    """Width of a line of text."""
    text, font = _font_for(text, size, bold)
    return math.ceil(max(font.getlength(text), font.getbbox(text)[2])) if text else 0


def draw_text(
    image_rgb: np.ndarray,
    text: str,
    xy: tuple[int, int],
    *,
    size: int,
    color: tuple[int, int, int],
    bold: bool = False,
) -> None:
    """Draw one line into an RGB image, in place; what leaves the image is cut off.

    ``xy`` is its left and top edge. A character that no font has becomes ``'?'``.
    """
    x, y = xy
    left, top = max(x, 0), max(y, 0)
    right, bottom = x + text_width(text, size, bold), y + line_height(size)
    region = image_rgb[top : max(top, bottom), left : max(left, right)]
    if not region.size:
        return
    text, font = _font_for(text, size, bold)
    # All fonts on one baseline.
    baseline = y + _font_for("", size, False)[1].getmetrics()[0]
    canvas = Image.fromarray(np.ascontiguousarray(region))
    place = x - left, baseline - top
    ImageDraw.Draw(canvas).text(place, text, font=font, fill=color, anchor="ls")
    region[:] = np.asarray(canvas)


def wrap_text(text: str, max_width: int, size: int, bold: bool = False) -> list[str]:
    """Break a text into lines, after punctuation where there is some.

    No line is wider than ``max_width``, unless a single character is. A separating
    ``·`` at an end of a line is left out.
    """
    text = clean_text(text).strip()
    if text.strip(" ·") and text_width(text, size, bold) <= max_width:
        return [text]  # most captions, and a tenth of the time
    lines = [""]
    for piece in _BREAKS.split(text):
        whole = text_width(piece.rstrip(), size, bold) <= max_width
        for part in [piece] if whole else piece:
            longer = (lines[-1] + part).rstrip()
            if lines[-1] and text_width(longer, size, bold) > max_width:
                lines.append("")
            lines[-1] += part
    lines = [line.strip().removeprefix("· ") for line in lines if line.strip(" ·")]
    return [line.removesuffix(" ·") for line in lines[:-1]] + lines[-1:]


def shorten_text(text: str, max_width: int, size: int) -> str:
    """Cut a text that is too wide and end it with an ellipsis."""
    text = clean_text(text)
    if text_width(text, size) <= max_width:
        return text
    while text and text_width(text + "…", size) > max_width:
        text = text[:-1].rstrip()
    return text + "…" if text else ""
