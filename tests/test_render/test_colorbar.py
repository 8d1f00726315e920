from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.render import colorbar as colorbar_module
from mmyolo_vis_hooks.render.colorbar import colorbar
from mmyolo_vis_hooks.render.heatmap import colormap_lut
from mmyolo_vis_hooks.render.text import line_height


@pytest.fixture
def texts(monkeypatch):
    """Texts of the ticks, and the rows of their middles."""
    seen = []

    def spy(image, text, xy, **options):
        assert xy[1] >= 0
        assert xy[1] + line_height(options["size"]) <= image.shape[0]
        seen.append((text, xy[1] + line_height(options["size"]) / 2))
        return draw_text(image, text, xy, **options)

    draw_text = colorbar_module.draw_text
    monkeypatch.setattr(colorbar_module, "draw_text", spy)
    return seen


@pytest.mark.parametrize("colormap", ["plasma", "viridis", "magma_r"])
def test_colours_run_from_the_bottom_to_the_top(colormap):
    lut = colormap_lut(colormap)[:, 0]
    bar = colorbar(256, colormap=colormap, bar_width=11)
    # The outermost pixels are the frame.
    assert np.array_equal(bar[1:-1, 5], lut[254:0:-1])
    assert np.array_equal(bar[1:-1, 1], bar[1:-1, 9])
    assert (bar[:, 15:17] == 255).all()


def test_ticks_stand_at_their_values(texts):
    bar = colorbar(300, low=0, high=0.5, font_size=12)
    assert bar.shape[0] == 300
    assert bar.dtype == np.uint8
    assert [text for text, _ in texts] == ["0.5", "0.25", "0"]
    assert abs(texts[1][1] - 150) <= 1
    assert texts[0][1] < 12 < 288 < texts[2][1]


@pytest.mark.parametrize(("lines", "count"), [(3.1, 3), (2.1, 2), (1.9, 0), (0.1, 0)])
def test_only_ticks_that_fit(texts, lines, count):
    bar = colorbar(round(lines * line_height(12)), font_size=12)
    assert len(texts) == count
    if count:
        assert [texts[0][0], texts[-1][0]] == ["1", "0"]
    assert bar.shape[1] == colorbar(400, font_size=12, bar_width=7).shape[1]


def test_label_stands_beside_the_ticks_where_it_fits():
    plain = colorbar(300, font_size=12)
    labelled = colorbar(300, font_size=12, label="share of the map's maximum")
    width = plain.shape[1]
    assert labelled.shape[1] == width + line_height(12)
    assert np.array_equal(labelled[:, :width], plain)
    rows = np.flatnonzero((labelled[:, width:] < 200).any(axis=(1, 2)))
    assert rows.min() > 20
    assert abs((rows.min() + rows.max()) / 2 - 150) < 5
    short = colorbar(60, font_size=12, label="share of the map's maximum")
    assert (short[:, width:] == 255).all()


def test_the_label_reads_upwards():
    # An 'L' turned to the left has its foot at the right and its stem below.
    ink = colorbar(200, font_size=40, label="L")[:, -line_height(40) :, 0] < 128
    rows, columns = np.nonzero(ink)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert ink[-2].mean() > 0.9
    assert ink[:, -2].mean() > 0.9
    assert not ink[: ink.shape[0] // 2, : ink.shape[1] // 2].any()


def test_unknown_colormap():
    with pytest.raises(VisConfigError, match=r"colormap='plasm'.*'plasma'"):
        colorbar(100, colormap="plasm")
