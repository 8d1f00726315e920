from __future__ import annotations

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.records import Detections
from mmyolo_vis_hooks.render.boxes import (
    class_color,
    contrast_color,
    draw_detections,
    outline_boxes,
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

    @pytest.mark.parametrize("shape", [(3, 3), (1, 50), (50, 1), (8, 400)])
    def test_tiny_images(self, shape):
        drawn = draw_detections(grey(*shape), detections([0, 0, 3, 3]))
        assert drawn.shape == (*shape, 3)


def chip_rows(drawn: np.ndarray, color, width: int = 20) -> np.ndarray:
    """Rows in which a label lies: no line is so wide a part of them."""
    chip = pixels_of(drawn, color)
    return np.flatnonzero(chip.sum(axis=1) > width)


class TestPlaces:
    OPTIONS = dict(line_width=1, font_size=20, class_names=["aaaa", "bbbb", "cccc"])

    def chips(self, boxes, size=600, **options) -> list[int]:
        """Pixels of each label: a class each, drawn with and without the others."""
        palette = [
            tuple(c) for c in np.random.default_rng(0).integers(90, 250, (99, 3))
        ]
        names = [f"label {i}" for i in range(len(boxes))]
        given = dict(line_width=1, font_size=20, palette=palette, class_names=names)
        scores = np.linspace(0.9, 0.1, len(boxes)).tolist()
        labels = list(range(len(boxes)))
        drawn = draw_detections(
            np.zeros((size, size, 3), np.uint8),
            detections(*boxes, scores=scores, labels=labels),
            **given,
            **options,
        )
        # Chips are 23 rows high; lines and the edges in them are thinner.
        counts = []
        for color in palette[: len(boxes)]:
            mask = pixels_of(drawn, color).astype(np.uint8)
            kept = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
            counts.append(int(kept.sum()))
        return counts

    def test_labels_of_stacked_boxes_do_not_hide_each_other(self):
        [alone] = self.chips([[150, 250, 450, 350]])
        assert alone > 500
        counts = self.chips([[150, 250, 450, 350]] * 8)
        assert all(count > 0.6 * alone for count in counts)

    def test_a_label_is_dropped_rather_than_laid_over_another(self):
        [alone] = self.chips([[150, 250, 450, 350]])
        counts = self.chips([[150, 250, 450, 350]] * 20)
        assert sum(count > 0.6 * alone for count in counts) >= 8
        assert all(count > 0.6 * alone or count < 0.1 * alone for count in counts)
        assert counts == sorted(counts, key=lambda count: count < 0.1 * alone)

    def test_a_label_does_not_cover_small_boxes(self):
        small = [[x, 180, x + 30, 197] for x in range(100, 500, 40)]
        # The usual place, above on the left, would hide them.
        boxes = [[100, 200, 500, 400], *small]
        drawn = draw_detections(
            np.zeros((600, 600, 3), np.uint8),
            detections(
                *boxes, scores=[0.9] + [0.5] * len(small), labels=[0] + [1] * 10
            ),
            palette=[RED, GREEN],
            faint=range(1, 11),
            **self.OPTIONS,
        )
        assert not pixels_of(drawn, RED)[175:200].any()
        assert len(chip_rows(drawn[202:300], RED)) > 15

    def test_a_crowd_keeps_its_picture(self):
        corners = np.random.default_rng(0).uniform(0, 560, (300, 2))
        boxes = np.hstack([corners, corners + 40]).tolist()
        drawn = draw_detections(
            np.zeros((600, 600, 3), np.uint8),
            detections(*boxes),
            palette=[RED],
            line_width=1,
        )
        mask = pixels_of(drawn, RED).astype(np.uint8)
        chips = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        chips = cv2.morphologyEx(chips, cv2.MORPH_OPEN, np.ones((9, 9), np.uint8))
        assert 0.02 < chips.mean() < 0.3


class TestFaint:
    def test_thinner_paler_and_below(self):
        boxes = [20, 40, 100, 100], [20, 40, 100, 100]
        options = dict(palette=[RED, GREEN], line_width=3, font_size=12)
        drawn = draw_detections(
            grey(),
            detections(*boxes, scores=[0.9, 0.4], labels=[0, 1]),
            faint=[0],
            **options,
        )
        assert tuple(drawn[70, 20]) == GREEN
        alone = draw_detections(grey(), detections(boxes[0]), faint=[0], **options)
        assert pixels_of(alone, RED)[70, :60].sum() == 1
        assert pixels_of(alone, (255, 127, 127)).sum() > 200

    def test_numbers_are_on_the_labels(self):
        plain, numbered, other = (
            draw_detections(grey(), detections([20, 40, 100, 90]), numbers=numbers)
            for numbers in ({}, {0: 2}, {1: 2})
        )
        assert not np.array_equal(plain, numbered)
        assert np.array_equal(plain, other)


@pytest.mark.parametrize("box", [[np.nan, 0, 9, 9], [500, 9, 600, 40]])
def test_outlines_off_the_image_are_left_out(box):
    drawn = grey()
    outline_boxes(drawn, [np.array(box)])
    assert np.array_equal(drawn, grey())
    outline_boxes(drawn, [np.array([20, 30, 60, 70])])
    assert pixels_of(drawn, (255, 255, 255))[30:70, 20].all()
    assert pixels_of(drawn, (0, 0, 0))[30:70, 19].all()


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
