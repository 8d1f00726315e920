from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.render import montage as montage_module
from mmyolo_vis_hooks.render.colorbar import ColorScale, colorbar
from mmyolo_vis_hooks.render.montage import (
    Cell,
    cell_size_hw,
    grid_columns,
    montage,
    resize_image,
    tile_block,
)
from tests.test_render.pictures import pixels_of, plain

LONG_TITLE = "neck.bottom_up_blocks[1].blocks[0].final_conv.activate (call 2)"
NOTE = "(256, 20, 20) · channel 255 · values -0.123 to 12.3"


def color_of(index: int) -> tuple[int, int, int]:
    return (40 + 30 * index, 255 - 30 * index, 77)


def positions(panel: np.ndarray, color) -> tuple[int, int, int, int]:
    """Bounding box (x1, y1, x2, y2) of a colour and its area must agree."""
    rows, columns = np.nonzero(pixels_of(panel, color))
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (box[2] - box[0]) * (box[3] - box[1])
    return tuple(int(v) for v in box)


def test_captions_of_a_wide_grid_are_larger_where_columns_have_room():
    def picture_top(columns: int, width: int) -> int:
        cells = [Cell(plain(90, width, color_of(0)), "title")] * columns
        panel = montage(cells, columns, gutter=9)
        return np.nonzero(pixels_of(panel, color_of(0)))[0].min()

    assert picture_top(4, 500) > picture_top(1, 500) == picture_top(8, 200)


@pytest.mark.parametrize(
    ("image_hw", "expected"),
    [
        ((480, 640), (480, 640)),
        ((3000, 4000), (768, 1024)),
        ((8, 4), (320, 160)),
        ((5, 4000), (1, 1024)),
    ],
)
def test_longest_side_is_clamped(image_hw, expected):
    assert cell_size_hw(image_hw) == expected
    # The maximum wins over the minimum.
    assert max(cell_size_hw(image_hw, max_cell_size=128)) == 128


def test_resizing():
    photo = np.zeros((6, 6, 3), dtype=np.uint8)
    photo[::3] = 240
    # Shrinking averages all that it replaces.
    assert resize_image(photo, (2, 2)).tolist() == [[[80] * 3] * 2] * 2
    assert (resize_image(plain(3, 4, 90), (30, 40)) == 90).all()


@pytest.mark.parametrize(
    ("count", "cell_hw", "columns"),
    [
        (1, (1, 1), 1),
        (2, (1, 1), 2),
        (3, (2, 3), 3),
        (4, (1, 1), 2),
        (4, (16, 9), 4),
        (4, (20, 1024), 1),
        (5, (3, 4), 3),
        (7, (1, 2), 4),
        (13, (3, 4), 5),
    ],
)
def test_a_grid_suits_a_screen(count, cell_hw, columns):
    assert grid_columns(count, cell_hw) == columns


class TestMontage:
    @pytest.mark.parametrize("columns", [None, 3])
    def test_every_cell_is_there_in_order_and_size(self, columns):
        sizes = [(100, 300), (250, 50), (10, 10), (400, 210), (30, 500)]
        cells = [Cell(plain(*s, color_of(i)), "layer") for i, s in enumerate(sizes)]
        panel = montage(cells, columns)
        boxes = [positions(panel, color_of(i)) for i in range(5)]
        assert [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in boxes] == sizes
        corners = [(y, x) for x, y, *_ in boxes]
        assert corners == sorted(corners)
        assert corners[0][0] == corners[2][0] < corners[3][0] == corners[4][0]
        assert corners[0][1] == corners[3][1]
        for edge in (panel[:8], panel[-8:], panel[:, :8], panel[:, -8:]):
            assert (edge == 255).all()

    @pytest.mark.parametrize("width", [1, 100, 700])
    def test_captions_are_complete(self, width, monkeypatch):
        drawn = []
        original = montage_module.draw_text

        def spy(canvas, text, xy, *, size, color, bold=False):
            before = canvas.copy()
            original(canvas, text, xy, size=size, color=color, bold=bold)
            roomy = np.full((200, 4000, 3), 255, dtype=np.uint8)
            original(roomy, text, (50, 50), size=size, color=color, bold=bold)
            # All the ink that the text has is inside this caption.
            assert (canvas != before).sum() == (roomy != 255).sum() > 0
            drawn.append(text)

        monkeypatch.setattr(montage_module, "draw_text", spy)
        montage([Cell(plain(300, width, (0, 0, 0)), LONG_TITLE, NOTE)])
        # A separator at the end of a line is left out.
        expected, found = (
            text.replace(" ", "").replace("·", "")
            for text in (LONG_TITLE + NOTE, "".join(drawn))
        )
        assert found == expected

    def test_captions_stand_on_their_picture_and_in_their_column(self):
        cells = [
            Cell(plain(200, 220, color_of(0)), LONG_TITLE, NOTE),
            Cell(plain(200, 220, color_of(1)), "neck"),
        ]
        panel = montage(cells, 2)
        left, right = (positions(panel, color_of(i)) for i in range(2))
        assert left[1] == right[1]
        ink = (panel != 255).any(axis=2)
        assert not ink[:, left[2] : right[0]].any()
        for x1, y1, x2, _ in (left, right):
            rows = np.flatnonzero(ink[:y1, x1:x2].any(axis=1))
            assert 0 < y1 - rows.max() < 20

    def test_a_picture_that_nobody_could_open_is_refused(self):
        with pytest.raises(VisConfigError, match="65500 on a side"):
            montage([Cell(plain(9, 400, 0))] * 200, 200)

    @pytest.mark.parametrize("count", [2, 3, 4])
    @pytest.mark.parametrize("highs", [(2.0, 2.0, 2.0), (1.0, 2.0, 3.0)])
    def test_one_bar_in_a_row_beside_its_last_picture(self, count, highs):
        cells = [Cell(plain(120, 210, color_of(0)), "image")]
        for i, high in enumerate(highs, 1):
            scale = ColorScale("viridis", 0.0, high)
            cells.append(Cell(plain(120, 210, color_of(i)), "map", "", scale))
        panel = montage(cells[:count], 2)
        for place in {1, count - 1}:
            scale = cells[place].scale
            if place == 3 and highs[1] != highs[2]:  # one for two ranges has no numbers
                scale = ColorScale("viridis", None, None)
            bar = colorbar(120, scale)
            _, y, x, _ = positions(panel, color_of(place))
            found = panel[y : y + 120, x + 8 : x + 8 + bar.shape[1]]
            assert np.array_equal(found, bar)
        if count == 4:  # nothing between the two of the second row
            _, y, x, _ = positions(panel, color_of(2))
            right = positions(panel, color_of(3))[0]
            assert (panel[y : y + 120, x:right] == 255).all()


class TestTileBlock:
    @pytest.mark.parametrize("size", [(8, 8), (320, 320), (40, 900)])
    def test_label_is_in_its_tile(self, size):
        tiles = [plain(*size, (90, 90, 90)) for _ in range(2)]
        one, two = (
            tile_block(tiles, [f"channel: {channel}", "1"], (1, 2), gap=0)
            for channel in (1, 2)
        )
        width = size[1]
        assert np.array_equal(one[:, width:], two[:, width:])
        assert (one[:, :width] > 200).any()
        assert width < 100 or not np.array_equal(one, two)

    def test_one_that_nobody_could_open_is_refused(self):
        with pytest.raises(VisConfigError, match=r"arrangement=\(1000, 1000\).*268"):
            tile_block([plain(9, 20, 0)], ["1"], (1000, 1000), gap=4)
