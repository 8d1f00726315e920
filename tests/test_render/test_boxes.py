from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.records import Detections
from mmyolo_vis_hooks.render.boxes import (
    class_color,
    contrast_color,
    draw_detections,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def detections(*boxes, scores=None, labels=None) -> Detections:
    count = len(boxes)
    return Detections(
        np.array(boxes, dtype=np.float32).reshape(count, 4),
        np.array(scores or [0.9] * count, dtype=np.float32),
        np.array(labels or [0] * count, dtype=np.int64),
    )


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def pixels_of(image: np.ndarray, color) -> np.ndarray:
    return (image == color).all(axis=2)


class TestBoxes:
    def test_outline_by_hand(self):
        drawn = draw_detections(
            grey(), detections([20, 40, 60, 90]), palette=[RED], line_width=1
        )
        red = pixels_of(drawn, RED)
        # A pixel i covers [i, i + 1): the last column of the box is 59.
        assert red[40:90, 20].all()
        assert red[40:90, 59].all()
        assert red[40, 20:60].all()
        assert red[89, 20:60].all()
        assert not red[90:].any()
        assert not red[40:, 60:].any()  # the label stands above row 40
        assert not red[45:85, 25:55].any()

    def test_line_width(self):
        drawn = draw_detections(
            grey(), detections([20, 40, 60, 90]), palette=[RED], line_width=3
        )
        red = pixels_of(drawn, RED)
        assert red[60, 20:23].all()
        assert not red[60, 19]
        assert not red[60, 23]

    def test_line_grows_with_the_image(self):
        widths = []
        for size in (100, 1000, 3000):
            drawn = draw_detections(
                grey(size, size),
                detections([10, size // 4, size - 10, size - 10]),
                palette=[RED],
            )
            widths.append(int(pixels_of(drawn, RED)[size // 2, : size // 2].sum()))
        assert widths == sorted(set(widths))

    def test_input_is_left_alone(self):
        photo = grey()
        drawn = draw_detections(photo, detections([20, 40, 60, 90]))
        assert np.array_equal(photo, grey())
        assert not np.shares_memory(drawn, photo)

    def test_no_detections(self):
        photo = grey()
        drawn = draw_detections(photo, Detections())
        assert np.array_equal(drawn, photo)
        assert not np.shares_memory(drawn, photo)

    def test_read_only_and_non_contiguous_images(self):
        photo = grey()[:, ::-1]
        photo.flags.writeable = False
        drawn = draw_detections(photo, detections([20, 40, 60, 90]), palette=[RED])
        assert pixels_of(drawn, RED).any()

    def test_box_beyond_the_edge_shows_its_border(self):
        drawn = draw_detections(
            grey(), detections([-50, -50, 500, 500]), palette=[RED], line_width=2
        )
        red = pixels_of(drawn, RED)
        assert red[-2:].all()
        assert red[:, -2:].all()

    @pytest.mark.parametrize(
        "box",
        [
            [-30, 10, -5, 50],
            [200, 10, 300, 50],
            [10, 130, 50, 150],
            [np.nan, 10, 50, 50],
            [10, 10, np.inf, 50],
        ],
    )
    def test_boxes_off_the_image_are_left_out(self, box):
        assert np.array_equal(draw_detections(grey(), detections(box)), grey())

    @pytest.mark.parametrize("box", [[30, 30, 30, 30], [159.7, 119.7, 160, 120]])
    def test_tiny_boxes_are_seen(self, box):
        drawn = draw_detections(grey(), detections(box), palette=[RED])
        assert pixels_of(drawn, RED).any()

    def test_higher_score_lies_on_top(self):
        boxes = [20, 40, 60, 90], [20, 40, 60, 90]
        for scores, top in (([0.9, 0.4], RED), ([0.4, 0.9], GREEN)):
            drawn = draw_detections(
                grey(),
                detections(*boxes, scores=scores, labels=[0, 1]),
                palette=[RED, GREEN],
            )
            assert tuple(drawn[70, 20]) == top


class TestLabels:
    @pytest.mark.parametrize(
        "box", [[0, 0, 159, 119], [150, 0, 160, 8], [0, 110, 8, 120], [100, 3, 159, 9]]
    )
    def test_label_is_whole_and_inside(self, box):
        # The same label drawn far from any edge has the same number of ink pixels.
        options = dict(class_names=["dog"], palette=[(255, 255, 0)], line_width=1)
        drawn = draw_detections(grey(), detections(box), font_size=12, **options)
        roomy = draw_detections(
            grey(400, 400), detections([150, 150, 151, 151]), font_size=12, **options
        )
        near_black = [(image < 60).all(axis=2).sum() for image in (drawn, roomy)]
        if box == [0, 0, 159, 119]:
            near_black[0] -= (drawn[1:-1, [1, -2]] < 60).all(axis=2).sum()
            assert near_black[0] >= near_black[1]
        else:
            assert near_black[0] >= near_black[1] > 10

    def test_name_and_score(self):
        without = draw_detections(grey(), detections([20, 40, 60, 90], labels=[3]))
        named = draw_detections(
            grey(), detections([20, 40, 60, 90], labels=[3]), class_names=list("abcd")
        )
        other_score = draw_detections(
            grey(), detections([20, 40, 60, 90], labels=[3], scores=[0.5])
        )
        assert not np.array_equal(without, named)
        assert not np.array_equal(without, other_score)

    def test_label_without_name_is_drawn_as_number(self):
        plain = draw_detections(grey(), detections([20, 40, 60, 90], labels=[3]))
        short_list = draw_detections(
            grey(), detections([20, 40, 60, 90], labels=[3]), class_names=["dog"]
        )
        assert np.array_equal(plain, short_list)

    def test_unicode_and_very_long_names(self):
        names = ["chien écossais", "x" * 300, "a\nb", "\U0001f415" * 3]
        drawn = draw_detections(
            grey(),
            detections(*[[20, 20, 60, 90]] * 4, labels=[0, 1, 2, 3]),
            class_names=names,
        )
        assert drawn.shape == (120, 160, 3)

    def test_labels_of_stacked_boxes_do_not_hide_each_other(self):
        boxes = [[100, 150, 300, 250]] * 3
        palette = [RED, GREEN, BLUE]
        options = dict(
            palette=palette,
            class_names=["aaaa", "bbbb", "cccc"],
            line_width=1,
            font_size=30,
        )
        drawn = draw_detections(
            grey(400, 400), detections(*boxes, labels=[0, 1, 2]), **options
        )
        # The outlines of 600 pixels hide each other, the chips must not.
        for i, color in enumerate(palette):
            alone = draw_detections(
                grey(400, 400), detections(boxes[0], labels=[i]), **options
            )
            chip = pixels_of(alone, color).sum() - 600
            assert chip > 2000
            assert pixels_of(drawn, color).sum() > 0.9 * chip

    @pytest.mark.parametrize("shape", [(3, 3), (1, 50), (50, 1), (8, 400)])
    def test_tiny_images(self, shape):
        drawn = draw_detections(grey(*shape), detections([0, 0, 3, 3]))
        assert drawn.shape == (*shape, 3)


class TestColors:
    def test_palette_starts_over(self):
        assert class_color(4, [RED, GREEN, BLUE]) == GREEN
        assert class_color(1, np.array([RED, GREEN])) == GREEN
        assert class_color(2, []) == class_color(2)

    def test_own_colors_differ(self):
        colors = [class_color(i) for i in range(80)]
        assert len(set(colors)) == 80
        first = np.array(colors[:12], dtype=int)
        distance = np.abs(first[:, None] - first[None]).sum(axis=2)
        assert distance[~np.eye(12, dtype=bool)].min() > 60

    @pytest.mark.parametrize(
        ("color", "ink"),
        [
            ((255, 255, 255), (0, 0, 0)),
            ((255, 255, 0), (0, 0, 0)),
            ((0, 0, 0), (255, 255, 255)),
            ((0, 0, 160), (255, 255, 255)),
        ],
    )
    def test_text_contrasts(self, color, ink):
        assert contrast_color(color) == ink
