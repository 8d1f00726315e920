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
from tests.test_render.pictures import pixels_of, plain

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def detections(*boxes, scores=None, labels=None) -> Detections:
    count = len(boxes)
    return Detections(
        np.array(boxes, dtype=np.float32).reshape(count, 4),
        np.array(scores or [0.9] * count, dtype=np.float32),
        np.array(labels or [0] * count, dtype=np.int64),
    )


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return plain(height, width, 100)


def opened(mask: np.ndarray, size: int) -> np.ndarray:
    """Without what is thinner, as lines are."""
    kernel = np.ones((size, size), np.uint8)
    return cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)


BOX = [20, 40, 60, 90]


class TestBoxes:
    @pytest.mark.parametrize(("size", "width"), [(160, 1), (840, 3), (2800, 10)])
    def test_outline_by_hand(self, size, width):
        photo = grey(size, size)[:, ::-1]
        photo.flags.writeable = False
        drawn = draw_detections(photo, detections(BOX), palette=[RED])
        red = pixels_of(drawn, RED)
        # A pixel i covers [i, i + 1): the last column of the box is 59.
        outline = np.zeros((size, size), bool)
        outline[40:90, 20:60] = True
        outline[40 + width : 90 - width, 20 + width : 60 - width] = False
        below = slice(40 + width, None)  # the label stands above
        assert np.array_equal(red[below], outline[below])

    def test_box_beyond_the_edge_shows_its_border(self):
        box = [-50, -50, 500, 500]
        red = pixels_of(draw_detections(grey(), detections(box), palette=[RED]), RED)
        assert red[-1].all()
        assert red[:, -1].all()

    @pytest.mark.parametrize(
        "box", [[-30, 10, -5, 50], [10, 130, 50, 150], [np.nan, 10, 50, 50]]
    )
    def test_boxes_off_the_image_are_left_out(self, box):
        assert np.array_equal(draw_detections(grey(), detections(box)), grey())
        drawn = grey()
        outline_boxes(drawn, [np.array(box)])
        assert np.array_equal(drawn, grey())

    def test_higher_score_lies_on_top(self):
        for scores, top in (([0.9, 0.4], RED), ([0.4, 0.9], GREEN)):
            found = detections(BOX, BOX, scores=scores, labels=[0, 1])
            drawn = draw_detections(grey(), found, palette=[RED, GREEN])
            assert tuple(drawn[70, 20]) == top

    def test_bare_outlines(self):
        drawn = grey()
        outline_boxes(drawn, [np.array([20, 30, 60, 70])])
        assert pixels_of(drawn, (255, 255, 255))[30:70, 20].all()
        assert pixels_of(drawn, (0, 0, 0))[30:70, 19].all()


class TestLabels:
    @pytest.mark.parametrize(
        "box", [[150, 0, 160, 8], [0, 110, 8, 120], [100, 3, 159, 9]]
    )
    def test_label_is_whole_and_inside(self, box):
        # The same label drawn far from any edge has the same number of ink pixels.
        options = dict(class_names=["dog"], palette=[(255, 255, 0)])
        ink, roomy = (
            (draw_detections(grey(), detections(b), **options) < 60).all(axis=2).sum()
            for b in (box, [80, 60, 81, 61])
        )
        assert ink >= roomy > 10

    def test_name_score_and_number_are_written(self):
        given = detections(BOX, labels=[3])
        plain = draw_detections(grey(), given)
        for found, options in (
            (given, dict(class_names=list("abcd"))),
            (given, dict(numbers={0: 2})),
            (detections(BOX, labels=[3], scores=[0.5]), {}),
        ):
            assert not np.array_equal(plain, draw_detections(grey(), found, **options))
        # A label without a name is a number; other boxes' numbers are not this one's.
        for options in (dict(class_names=["dog"]), dict(numbers={1: 2})):
            assert np.array_equal(plain, draw_detections(grey(), given, **options))

    @pytest.mark.parametrize("shape", [(3, 3), (50, 1), (8, 400)])
    def test_any_name_on_any_image(self, shape):
        names = ["chien écossais", "x" * 300, "a\nb", "\U0001f415" * 3]
        found = detections(*[[0, 0, 3, 3]] * 4, labels=[0, 1, 2, 3])
        drawn = draw_detections(grey(*shape), found, class_names=names)
        assert drawn.shape == (*shape, 3)

    @pytest.mark.parametrize(("x2", "widest"), [(60, 320), (560, 540)])
    def test_a_long_name_leaves_half_of_the_image_or_stays_in_its_box(self, x2, widest):
        found = detections([20, 200, x2, 300])
        given = dict(class_names=["long name " * 20], palette=[RED])
        drawn = draw_detections(plain(480, 640, 100), found, **given)
        above = np.nonzero(pixels_of(drawn[:200], RED))[1]
        assert 0.8 * widest < np.ptp(above) + 1 <= widest


class TestPlaces:
    @staticmethod
    def chips(count: int) -> list[int]:
        """Pixels of the labels of boxes that lie on each other, a class each."""
        palette = np.random.default_rng(0).integers(90, 250, (count, 3))
        drawn = draw_detections(
            np.zeros((600, 600, 3), np.uint8),
            detections(
                *[[150, 250, 450, 350]] * count,
                scores=np.linspace(0.9, 0.1, count).tolist(),
                labels=list(range(count)),
            ),
            palette=[tuple(color) for color in palette],
            class_names=[f"label {i}" for i in range(count)],
        )
        return [int(opened(pixels_of(drawn, color), 3).sum()) for color in palette]

    def test_labels_do_not_hide_each_other_and_are_rather_dropped(self):
        [alone] = self.chips(1)
        assert alone > 500
        assert all(count > 0.6 * alone for count in self.chips(8))
        counts = self.chips(20)
        shown = [count > 0.6 * alone for count in counts]
        assert sum(shown) >= 8
        assert shown == sorted(shown, reverse=True)
        assert all(count < 0.1 * alone for count in counts[sum(shown) :])

    def test_a_label_does_not_cover_small_boxes(self):
        small = [[x, 180, x + 30, 197] for x in range(100, 500, 40)]
        # The usual place, above on the left, would hide them.
        drawn = draw_detections(
            np.zeros((600, 600, 3), np.uint8),
            detections(
                *[[100, 200, 500, 400], *small],
                scores=[0.9] + [0.5] * len(small),
                labels=[0] + [1] * len(small),
            ),
            palette=[RED, GREEN],
            faint=range(1, 11),
            class_names=["aaaa", "bbbb"],
        )
        assert not pixels_of(drawn, RED)[175:200].any()
        # The label lies below the line: no line is so wide a part of these rows.
        assert (pixels_of(drawn, RED)[202:300].sum(axis=1) > 20).sum() > 8

    def test_a_crowd_keeps_its_picture(self):
        corners = np.random.default_rng(0).uniform(0, 560, (300, 2))
        boxes = np.hstack([corners, corners + 40]).tolist()
        photo = np.zeros((600, 600, 3), np.uint8)
        drawn = draw_detections(photo, detections(*boxes), palette=[RED])
        mask = pixels_of(drawn, RED).astype(np.uint8)
        chips = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        assert 0.02 < opened(chips, 9).mean() < 0.3

    def test_faint_boxes_are_thinner_paler_and_below(self):
        box = [20, 40, 100, 100]
        options = dict(palette=[RED, GREEN], faint=[0])
        found = detections(box, box, scores=[0.9, 0.4], labels=[0, 1])
        photo = grey(840, 840)
        assert tuple(draw_detections(photo, found, **options)[70, 20]) == GREEN
        alone = draw_detections(photo, detections(box), **options)
        assert pixels_of(alone, RED)[70, :60].sum() == 1
        assert pixels_of(alone, (255, 127, 127)).sum() > 200


def test_a_palette_starts_over_and_own_colors_differ():
    assert class_color(4, [RED, GREEN, BLUE]) == GREEN
    assert class_color(1, np.array([RED, GREEN])) == GREEN
    assert class_color(2, []) == class_color(2)
    colors = [class_color(i) for i in range(80)]
    assert len(set(colors)) == 80
    first = np.array(colors[:12], dtype=int)
    distance = np.abs(first[:, None] - first[None]).sum(axis=2)
    assert distance[~np.eye(12, dtype=bool)].min() > 60


def test_text_contrasts():
    for color in ((255, 255, 255), (255, 255, 0)):
        assert contrast_color(color) == (0, 0, 0)
    for color in ((0, 0, 0), (0, 0, 160)):
        assert contrast_color(color) == (255, 255, 255)
