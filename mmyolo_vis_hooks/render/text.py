"""Draws Unicode text into images: OpenCV's own fonts only know ASCII."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_FONT_SIZE = 7

# Families with wide coverage on Linux, Windows and macOS, tried in this order for
# characters that the shipped font lacks.
_FALLBACK_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
    "Malgun Gothic",
    "Noto Sans",
)
_BREAK_AFTER = frozenset(" ./_-,:;)]·")


def clean_text(text: str) -> str:
    """Replace line breaks and control characters by spaces."""
    return "".join(" " if unicodedata.category(c)[0] == "C" else c for c in str(text))


@lru_cache(maxsize=1)
def _shipped_font_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@lru_cache(maxsize=64)
def _glyphs(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=1)
def _fallback_paths() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    return tuple(installed[name] for name in _FALLBACK_FAMILIES if name in installed)


@lru_cache(maxsize=4096)
def _font_path(text: str, bold: bool) -> str | None:
    """The first font that has every character of the text."""
    needed = {ord(char) for char in text}
    shipped = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = str(_shipped_font_folder() / shipped)
    if needed <= _glyphs(path):
        return path
    return next((p for p in _fallback_paths() if needed <= _glyphs(p)), None)


def is_drawable(text: str) -> bool:
    """Whether a font on this machine has every character of the text."""
    return _font_path(clean_text(text), False) is not None


@lru_cache(maxsize=256)
def _load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _font(text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    path = _font_path(text, bold) or _font_path("", bold)
    assert path is not None
    return _load_font(path, size)


@lru_cache(maxsize=2048)
def text_mask(text: str, size: int, bold: bool = False) -> np.ndarray:
    """Render one line of text.

    Args:
        text (str): One line; control characters become spaces. A character that
            no font has is drawn as an empty box.
        size (int): Font size, pixels.
        bold (bool): Defaults to False.

    Returns:
        np.ndarray: ``(line height, width)`` uint8 coverage, read-only. Lines of
        one size have one height and one baseline.
    """
    text = clean_text(text)
    font = _font(text, size, bold)
    left, top, right, bottom = font.getbbox(text)
    # A stack of accents may rise above the line.
    shift_x, shift_y = max(0, -int(left)), max(0, -int(top))
    width = max(1, int(right) + shift_x)
    height = max(line_height(size), int(bottom) + shift_y)
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).text((shift_x, shift_y), text, font=font, fill=255)
    mask = np.array(canvas)
    mask.flags.writeable = False
    return mask


@lru_cache(maxsize=256)
def line_height(size: int) -> int:
    """Height of a line of text, pixels."""
    ascent, descent = _font("", size, False).getmetrics()
    return int(ascent + descent)


def text_width(text: str, size: int, bold: bool = False) -> int:
    """Width of a line of text, pixels."""
    return text_mask(text, size, bold).shape[1] if text else 0


def draw_text(
    image_rgb: np.ndarray,
    text: str,
    xy: tuple[int, int],
    *,
    size: int,
    color: tuple[int, int, int],
    bold: bool = False,
    paper: tuple[int, int, int] | None = None,
) -> None:
    """Draw one line into an image, in place; what leaves the image is cut off.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. **Modified.**
        text (str): One line.
        xy (tuple): Left and top edge of the line, pixels.
        size (int): Font size, pixels.
        color (tuple): RGB, 0 to 255.
        bold (bool): Defaults to False.
        paper (tuple, optional): RGB behind the text where that is one colour,
            which is faster. Defaults to None, whatever the image holds.
    """
    if not text:
        return
    mask = text_mask(text, size, bold)
    x, y = xy
    height, width = image_rgb.shape[:2]
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = min(x + mask.shape[1], width), min(y + mask.shape[0], height)
    if x1 >= x2 or y1 >= y2:
        return
    mask = mask[y1 - y : y2 - y, x1 - x : x2 - x]
    ink = np.asarray(color, dtype=np.uint16)
    if paper is not None:
        share = np.arange(256, dtype=np.uint16)[:, None]
        shades = (np.asarray(paper, np.uint16) * (255 - share) + ink * share) // 255
        image_rgb[y1:y2, x1:x2] = shades.astype(np.uint8)[mask]
        return
    region = image_rgb[y1:y2, x1:x2]
    share = mask[..., None].astype(np.uint16)
    region[:] = (region * (255 - share) + ink * share) // 255


def wrap_text(text: str, max_width: int, size: int, bold: bool = False) -> list[str]:
    """Break a text into lines, after punctuation where there is some.

    Args:
        text (str): The text.
        max_width (int): Greatest width of a line, pixels.
        size (int): Font size, pixels.
        bold (bool): Defaults to False.

    Returns:
        list[str]: Lines that are not wider than ``max_width``, unless a single
        character is.
    """
    lines: list[str] = []
    rest = clean_text(text).strip()
    while rest:
        if text_width(rest, size, bold) <= max_width:
            lines.append(rest)
            break
        fits = _longest_prefix(rest, max_width, size, bold)
        cut = max((i + 1 for i in range(fits) if _breaks_after(rest, i)), default=fits)
        # A break far to the left leaves more of a gap than a split word does.
        cut = cut if cut > fits // 3 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _breaks_after(text: str, index: int) -> bool:
    """Whether a line may end after a character: not within a number."""
    if text[index] not in _BREAK_AFTER:
        return False
    before, after = text[max(0, index - 1) : index], text[index + 1 : index + 2]
    if text[index] == "-":
        return before not in ("", " ")
    return not (text[index] in ".," and before.isdigit() and after.isdigit())


def shorten_text(text: str, max_width: int, size: int, bold: bool = False) -> str:
    """Cut a text that is too wide and end it with an ellipsis."""
    text = clean_text(text)
    if text_width(text, size, bold) <= max_width:
        return text
    room = max_width - text_width("…", size, bold)
    if room <= 0:
        return ""
    return text[: _longest_prefix(text, room, size, bold, least=0)].rstrip() + "…"


def _longest_prefix(
    text: str, max_width: int, size: int, bold: bool, least: int = 1
) -> int:
    """Number of leading characters that fit, ``least`` or more."""
    low, high = least, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if text_width(text[:middle], size, bold) <= max_width:
            low = middle
        else:
            high = middle - 1
    return low
