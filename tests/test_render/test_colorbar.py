from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.render.colorbar import ColorScale, colorbar
from mmyolo_vis_hooks.render.heatmap import colormap_lut


def test_colours_run_from_the_bottom_to_the_top():
    bar = colorbar(256, ColorScale("viridis"))
    # The outermost pixels are the frame.
    assert np.array_equal(bar[1:-1, 5], colormap_lut("viridis")[254:0:-1, 0])
    assert np.array_equal(bar[1:-1, 1], bar[1:-1, 7])


def tick_rows(bar: np.ndarray) -> list[int]:
    """Rows of the ticks, just right of the bar."""
    edge = int(np.argmax((bar[bar.shape[0] // 3] == 255).all(axis=1)))
    return np.flatnonzero((bar[:, edge] != 255).any(axis=1)).tolist()


@pytest.mark.parametrize(
    ("height", "rows"), [(300, [0, 150, 299]), (32, [0, 31]), (20, []), (1, [])]
)
def test_only_ticks_that_fit(height, rows):
    bar = colorbar(height, ColorScale())
    assert bar.shape[0] == height
    if height > 1:
        assert tick_rows(bar) == rows


def test_values_and_ends_are_written():
    bars = [colorbar(300, ColorScale(low=low)) for low in (0.0, 0.5)]
    assert bars[0].shape != bars[1].shape or not np.array_equal(*bars)
    assert tick_rows(colorbar(300, ColorScale(low=None, high=None))) == [0, 299]


def test_the_label_reads_upwards_beside_the_ticks_where_it_fits():
    plain, labelled = (
        colorbar(300, ColorScale(label=label)) for label in ("", "............WWWW")
    )
    width = plain.shape[1]
    assert np.array_equal(labelled[:, :width], plain)
    ink = labelled[:, width:, 0] < 160
    rows = np.nonzero(ink)[0]
    assert abs((rows.min() + rows.max()) / 2 - 150) < 5
    assert ink[:150].sum() > 1.5 * ink[150:].sum() > 0
    short = colorbar(60, ColorScale(label="share of the map's maximum"))
    assert (short[:, colorbar(60, ColorScale()).shape[1] :] == 255).all()
