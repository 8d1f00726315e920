from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from mmyolo_vis_hooks.render import text as text_module
from mmyolo_vis_hooks.render.text import (
    clean_text,
    draw_text,
    is_drawable,
    line_height,
    shorten_text,
    text_width,
    wrap_text,
)

TITLE = "neck.bottom_up_blocks[1].blocks[0].final_conv.activate (call 2)"


def ink(text: str, xy=(0, 0), shape=(60, 400), **options) -> np.ndarray:
    canvas = np.full((*shape, 3), 255, dtype=np.uint8)
    draw_text(canvas, text, xy, **{"size": 20, "color": (0, 0, 0), **options})
    return 255 - canvas


@pytest.fixture
def fonts(monkeypatch):
    """Gives the machine other fonts, besides the shipped one."""

    def clear() -> None:
        text_module._undrawable.clear()
        for value in vars(text_module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()

    def install(*paths: str) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths))
        clear()

    yield install
    monkeypatch.undo()
    clear()


class TestDraw:
    def test_lines_share_height_and_baseline(self):
        x, xg = ink("x"), ink("xg")
        width = text_width("x", 20) - 1
        assert np.array_equal(x[:, :width], xg[:, :width])
        assert not ink("Äß{}g")[line_height(20) :].any()

    @pytest.mark.parametrize("text", ["Ω", "→", "naïve café"])
    def test_unicode_is_drawn(self, text):
        assert is_drawable(text)
        assert not np.array_equal(ink(text), ink("?" * len(text)))

    def test_bold_and_colour(self):
        assert ink("neck", bold=True).sum() > ink("neck").sum()
        drawn = 255 - ink("I", size=30, color=(200, 10, 30))
        assert (drawn == (200, 10, 30)).all(axis=2).any()

    def test_width_holds_all_of_the_ink(self):
        for text in ("WAV", "fj", TITLE, "1.0"):
            columns = np.nonzero(ink(text, shape=(40, 900)).any(axis=(0, 2)))[0]
            assert 0 <= text_width(text, 20) - 1 - columns.max() <= 3

    def test_control_characters_become_spaces(self):
        assert clean_text("a\nb\tc\x00") == "a b c "
        assert np.array_equal(ink("a\nb"), ink("a b"))

    @pytest.mark.parametrize("xy", [(-5, -5), (190, 50), (-500, 3), (3, 500)])
    def test_cut_off_at_the_edge(self, xy):
        full = ink("channel: 7", (xy[0] + 550, xy[1] + 550), (1200, 1200))
        cut = ink("channel: 7", xy, (60, 200))
        assert np.array_equal(cut, full[550:610, 550:750])


class TestFonts:
    def test_a_missing_font_is_said_once(self, fonts, caplog, monkeypatch):
        fonts()
        lines = []
        monkeypatch.setattr(text_module, "print_log", lambda *a, **k: lines.append(a))
        assert not is_drawable("狗")
        assert not is_drawable("猫")
        [(text,)] = lines
        assert "'狗'" in text
        assert "fonts-noto-cjk" in text
        # What can be read stays.
        assert np.array_equal(ink("狗 12"), ink("? 12"))

    def test_an_installed_font_is_used(self, fonts, tmp_path):
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        shipped, other = (
            set(FT2Font(str(folder / name)).get_charmap())
            for name in ("DejaVuSans.ttf", "STIXGeneral.ttf")
        )
        only = chr(min(c for c in other - shipped if chr(c).isprintable()))
        fonts()
        assert not is_drawable(only)
        broken, path = tmp_path / "wqy.ttf", tmp_path / "NotoSansCJK.ttf"
        broken.write_bytes(b"no font")
        path.write_bytes((folder / "STIXGeneral.ttf").read_bytes())
        fonts(str(broken), str(path))
        assert is_drawable(only)
        assert not np.array_equal(ink(only), ink("?"))


@pytest.mark.parametrize("text", [TITLE, "a" * 70, "64 x 20 cells · -0.5 to 3.25"])
def test_wrapping_loses_nothing_and_every_line_fits(text):
    for width in (30, 100, text_width("64 x 20 cells", 14), 400):
        lines = wrap_text(text, width, 14)
        assert all(text_width(line, 14) <= width for line in lines)
        kept = "".join(lines).replace(" ", "").replace("·", "")
        assert kept == text.replace(" ", "").replace("·", "")
        assert not any("·" in (line[0], line[-1]) for line in lines)


def test_lines_end_after_punctuation_but_not_in_numbers():
    lines = wrap_text("neck.blocks[0].conv", text_width("neck.blocks[0].c", 14), 14)
    assert lines == ["neck.blocks[0].", "conv"]
    for width in range(60, 200, 7):
        lines = wrap_text("values -0.278 to -3.125e-05", width, 12)
        assert not any(line.endswith(("-", "0.", "3.")) for line in lines)
    room = text_width("map at neck[2]", 14)
    assert wrap_text("map at neck[2], 5%", room, 14) == ["map at", "neck[2], 5%"]
    assert wrap_text("", 100, 14) == []
    assert wrap_text("abc", 1, 14) == ["a", "b", "c"]


def test_shorten():
    for width in range(0, 120, 5):
        assert text_width(shorten_text("potted plant", width, 14), 14) <= width
    assert shorten_text("cat", 100, 14) == "cat"
    assert shorten_text("potted plant", 60, 14).endswith("…")
