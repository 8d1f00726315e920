from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.render import montage as montage_module
from mmyolo_vis_hooks.render.colorbar import ColorScale, colorbar
from mmyolo_vis_hooks.render.montage import (
    Cell,
    cell_size_hw,
    grid_arrangement,
    montage,
    resize_image,
    tile_block,
)

LONG_TITLE = "neck.bottom_up_blocks[1].blocks[0].final_conv.activate (call 2)"
NOTE = "(256, 20, 20) · channel 255 · values -0.123 to 12.3"


def plain(height: int, width: int, color) -> np.ndarray:
    return np.full((height, width, 3), color, dtype=np.uint8)


def color_of(index: int) -> tuple[int, int, int]:
    return (40 + 30 * index, 255 - 30 * index, 77)


def positions(panel: np.ndarray, color) -> tuple[int, int, int, int]:
    """Bounding box (x1, y1, x2, y2) of a colour and its area must agree."""
    rows, columns = np.nonzero((panel == color).all(axis=2))
    box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (box[2] - box[0]) * (box[3] - box[1])
    return tuple(int(v) for v in box)


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
    assert resize_image(photo, (6, 6)) is photo
    # Shrinking averages all that it replaces.
    assert resize_image(photo, (2, 2)).tolist() == [[[80] * 3] * 2] * 2
    assert (resize_image(plain(3, 4, 90), (30, 40)) == 90).all()


class TestArrangement:
    @pytest.mark.parametrize(
        ("count", "cell_hw", "expected"),
        [
            (1, (1, 1), (1, 1)),
            (2, (1, 1), (1, 2)),
            (3, (2, 3), (1, 3)),
            (4, (1, 1), (2, 2)),
            (4, (16, 9), (1, 4)),
            (4, (20, 1024), (4, 1)),
            (5, (3, 4), (2, 3)),
            (7, (1, 2), (2, 4)),
            (13, (3, 4), (3, 5)),
        ],
    )
    def test_suits_a_screen(self, count, cell_hw, expected):
        assert grid_arrangement(count, cell_hw) == expected

    @pytest.mark.parametrize("cell_hw", [(1, 2), (3, 4), (1, 1), (4, 3)])
    def test_every_cell_has_a_place_and_none_is_alone(self, cell_hw):
        for count in range(1, 60):
            rows, columns = grid_arrangement(count, cell_hw)
            assert rows * columns >= count > (rows - 1) * columns
            assert count < 3 or columns == 1 or count % columns != 1


class TestMontage:
    def test_every_cell_is_there_in_order(self):
        for count in range(1, 8):
            pictures = [plain(60, 210, color_of(i)) for i in range(count)]
            panel = montage([Cell(p, f"layer {i}") for i, p in enumerate(pictures)])
            boxes = [positions(panel, color_of(i)) for i in range(count)]
            assert all((b[2] - b[0], b[3] - b[1]) == (210, 60) for b in boxes)
            corners = [(y, x) for x, y, *_ in boxes]
            assert corners == sorted(corners)
            for edge in (panel[:8], panel[-8:], panel[:, :8], panel[:, -8:]):
                assert (edge == 255).all()

    def test_five_in_two_rows_of_three(self):
        cells = [Cell(plain(200, 300, color_of(i)), NOTE) for i in range(5)]
        panel = montage(cells, (2, 3))
        boxes = [positions(panel, color_of(i)) for i in range(5)]
        assert len({box[1] for box in boxes[:3]}) == 1
        assert len({box[1] for box in boxes[3:]}) == 1
        assert boxes[3][0] == boxes[0][0]
        assert boxes[4][1] > boxes[1][3]

    def test_unequal_sizes_do_not_overlap(self):
        sizes = [(100, 300), (250, 50), (10, 10), (400, 210), (30, 500)]
        pictures = [plain(*size, color_of(i)) for i, size in enumerate(sizes)]
        panel = montage([Cell(picture, "layer", NOTE) for picture in pictures])
        for i, (height, width) in enumerate(sizes):
            x1, y1, x2, y2 = positions(panel, color_of(i))
            assert (y2 - y1, x2 - x1) == (height, width)
            assert (pictures[i] == color_of(i)).all()

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
        panel = montage(cells, (1, 2))
        left, right = (positions(panel, color_of(i)) for i in range(2))
        assert left[1] == right[1]
        ink = (panel != 255).any(axis=2)
        assert not ink[:, left[2] : right[0]].any()
        for x1, y1, x2, _ in (left, right):
            rows = np.flatnonzero(ink[:y1, x1:x2].any(axis=1))
            assert 0 < y1 - rows.max() < 20

    def test_without_captions(self):
        panel = montage([Cell(plain(100, 240, (0, 0, 255)))])
        assert panel.shape == (116, 256, 3)

    def test_errors(self):
        with pytest.raises(ValueError, match="at least one"):
            montage([])
        with pytest.raises(ValueError, match="do not fit"):
            montage([Cell(plain(9, 9, 0))] * 5, (2, 2))
        with pytest.raises(VisConfigError, match="65500 on a side"):
            montage([Cell(plain(9, 400, 0))] * 200, (1, 200))

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_one_bar_in_a_row_beside_its_last_picture(self, count):
        scale = ColorScale("viridis", 0.0, 2.0)
        cells = [Cell(plain(120, 210, color_of(0)), "image")]
        cells += [
            Cell(plain(120, 210, color_of(i)), "map", "", scale) for i in (1, 2, 3)
        ]
        panel = montage(cells[:count], (2, 2))
        bar = colorbar(120, scale)
        for place in {1, count - 1}:
            _, y, x, _ = positions(panel, color_of(place))
            found = panel[y : y + 120, x + 8 : x + 8 + bar.shape[1]]
            assert np.array_equal(found, bar)
        if count == 4:  # nothing between the two of the second row
            _, y, x, _ = positions(panel, color_of(2))
            assert (
                panel[y : y + 120, x : positions(panel, color_of(3))[0]] == 255
            ).all()

    def test_a_bar_for_different_ranges_has_no_numbers(self):
        cells = [
            Cell(plain(120, 210, color_of(i)), scale=ColorScale("jet", 0.0, high))
            for i, high in enumerate((1.0, 2.0))
        ]
        panel = montage(cells, (1, 2))
        _, y, x, _ = positions(panel, color_of(1))
        bar = colorbar(120, ColorScale("jet", None, None))
        assert np.array_equal(panel[y : y + 120, x + 8 : x + 8 + bar.shape[1]], bar)


class TestTileBlock:
    def test_tiles_by_rows(self):
        tiles = [plain(60, 80, color_of(i)) for i in range(5)]
        block = tile_block(tiles, [""] * 5, (2, 3), gap=4)
        assert block.shape == (124, 248, 3)
        for i in range(5):
            x1, y1, _, _ = positions(block, color_of(i))
            assert (x1, y1) == (i % 3 * 84, i // 3 * 64)
        # The empty place is neither white nor a picture.
        assert len(np.unique(block[64:, 168:].reshape(-1, 3), axis=0)) == 1

    @pytest.mark.parametrize("size", [(8, 8), (320, 320), (40, 900)])
    def test_label_is_in_its_tile(self, size):
        tiles = [plain(*size, (90, 90, 90)) for _ in range(2)]
        one, two = (
            tile_block(tiles, [f"channel: {channel}", ""], (1, 2), gap=0)
            for channel in (1, 2)
        )
        width = size[1]
        assert (one[:, width:] == 90).all()
        assert (one[:, :width] > 200).any()
        assert width < 100 or not np.array_equal(one, two)
        assert (tiles[0] == 90).all()

    def test_too_many_or_too_large(self):
        with pytest.raises(ValueError, match="do not fit"):
            tile_block([plain(9, 9, 0)] * 5, [""] * 5, (2, 2))
        with pytest.raises(VisConfigError, match=r"arrangement=\(1000, 1000\).*268"):
            tile_block([plain(9, 20, 0)], [""], (1000, 1000), gap=4)
