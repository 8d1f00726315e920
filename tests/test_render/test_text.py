from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.render import text as text_module
from mmyolo_vis_hooks.render.text import (
    clean_text,
    draw_text,
    is_drawable,
    line_height,
    shorten_text,
    text_mask,
    text_width,
    wrap_text,
)

TITLE = "neck.bottom_up_blocks[1].blocks[0].final_conv.activate (call 2)"


def white(height: int = 60, width: int = 200) -> np.ndarray:
    return np.full((height, width, 3), 255, dtype=np.uint8)


class TestMask:
    def test_lines_share_height_and_baseline(self):
        heights = {text_mask(t, 16).shape[0] for t in ("a", "Ag", "...", "Äß{}")}
        assert heights == {line_height(16)}
        # 'x' and 'xg' have their x in the same rows.
        x, xg = text_mask("x", 16), text_mask("xg", 16)
        width = x.shape[1] - 1
        assert np.array_equal(x[:, :width], xg[:, :width])

    @pytest.mark.parametrize("text", ["é", "Ω", "ж", "→", "naïve café"])
    def test_unicode_is_drawn(self, text):
        assert is_drawable(text)
        assert text_mask(text, 16).any()
        assert not np.array_equal(text_mask(text, 16), text_mask("\uffff", 16))

    def test_bold_is_heavier(self):
        regular, bold = text_mask("neck", 20), text_mask("neck", 20, True)
        assert bold.astype(int).sum() > regular.astype(int).sum()

    def test_line_breaks_become_spaces(self):
        assert clean_text("a\nb\tc\x00") == "a b c "
        assert text_mask("a\nb", 16).shape == text_mask("a b", 16).shape

    def test_missing_glyphs(self, monkeypatch):
        monkeypatch.setattr(text_module, "_fallback_paths", tuple)
        text_module._font_path.cache_clear()
        try:
            assert not is_drawable("狗")
            assert text_mask("狗", 16).any()
        finally:
            text_module._font_path.cache_clear()

    def test_fallback_font_is_used(self, monkeypatch):
        # A bold face stands in for an installed font with more characters.
        fallback = str(text_module._shipped_font_folder() / "STIXGeneral.ttf")
        only = next(iter(text_module._glyphs(fallback) - _dejavu_glyphs()))
        monkeypatch.setattr(text_module, "_fallback_paths", lambda: (fallback,))
        text_module._font_path.cache_clear()
        try:
            assert text_module._font_path(chr(only), False) == fallback
            assert is_drawable(chr(only))
        finally:
            text_module._font_path.cache_clear()


def _dejavu_glyphs() -> frozenset[int]:
    folder = text_module._shipped_font_folder()
    return text_module._glyphs(str(folder / "DejaVuSans.ttf"))


class TestDraw:
    def test_ink_has_the_colour(self):
        canvas = white()
        draw_text(canvas, "I", (10, 10), size=30, color=(200, 10, 30))
        assert (canvas == (200, 10, 30)).all(axis=2).any()
        mask = text_mask("I", 30)
        untouched = np.ones(canvas.shape[:2], dtype=bool)
        untouched[10 : 10 + mask.shape[0], 10 : 10 + mask.shape[1]] = False
        assert (canvas[untouched] == 255).all()

    def test_known_paper_gives_the_same_pixels(self):
        canvases = [np.full((60, 200, 3), (12, 200, 90), np.uint8) for _ in range(2)]
        for canvas, paper in zip(canvases, (None, (12, 200, 90))):
            draw_text(
                canvas, "dog 0.87", (9, 7), size=20, color=(250, 3, 4), paper=paper
            )
        assert np.array_equal(*canvases)
        assert (canvases[0] == (250, 3, 4)).all(axis=2).any()

    @pytest.mark.parametrize("xy", [(-5, -5), (190, 50), (-500, 3), (3, 500)])
    def test_cut_off_at_the_edge(self, xy):
        canvas = white()
        draw_text(canvas, "channel: 7", xy, size=16, color=(0, 0, 0))
        full = np.full((1200, 1200, 3), 255, dtype=np.uint8)
        draw_text(
            full, "channel: 7", (xy[0] + 550, xy[1] + 550), size=16, color=(0,) * 3
        )
        assert np.array_equal(canvas, full[550:610, 550:750])


class TestWrap:
    @pytest.mark.parametrize("width", [30, 60, 100, 200, 400])
    @pytest.mark.parametrize("text", [TITLE, "a" * 70, "(64, 20, 20) · -0.5 to 3.25"])
    def test_nothing_is_lost_and_every_line_fits(self, text, width):
        lines = wrap_text(text, width, 14)
        assert all(text_width(line, 14) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")

    def test_breaks_after_punctuation(self):
        lines = wrap_text("neck.blocks[0].conv", text_width("neck.blocks[0].c", 14), 14)
        assert lines == ["neck.blocks[0].", "conv"]

    def test_does_not_break_numbers(self):
        for width in range(60, 200, 7):
            lines = wrap_text("values -0.278 to -3.125", width, 14)
            assert not any(line.endswith(("-", "0.", "3.")) for line in lines)

    def test_short_and_empty(self):
        assert wrap_text("neck", 100, 14) == ["neck"]
        assert wrap_text("", 100, 14) == []

    def test_narrower_than_a_character(self):
        assert wrap_text("abc", 1, 14) == ["a", "b", "c"]


class TestShorten:
    def test_fits(self):
        for width in range(0, 120, 5):
            short = shorten_text("potted plant", width, 14)
            assert text_width(short, 14) <= width
        assert shorten_text("cat", 100, 14) == "cat"
        assert shorten_text("potted plant", 60, 14).endswith("…")
