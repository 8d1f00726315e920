from __future__ import annotations

import copy
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.records import BoxExplanation, BoxSample, Detections, LayerMap
from mmyolo_vis_hooks.render import boxam_panel as panel_module
from mmyolo_vis_hooks.render import montage as montage_module
from mmyolo_vis_hooks.render.box_layout import crop_window
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
from mmyolo_vis_hooks.render.heatmap import colormap_lut

NAMES = ["cat", "dog", "car"]
BOXES = [[64, 80, 224, 240], [320, 160, 560, 400], [480, 40, 600, 100]]


def photo(height: int, width: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def bump(centre_xy, sigma: float, network: int = 416, stride: int = 16) -> np.ndarray:
    """A Gaussian, in pixels of the network frame."""
    x, y = np.meshgrid(*[(np.arange(network // stride) + 0.5) * stride] * 2)
    distance = (x - centre_xy[0]) ** 2 + (y - centre_xy[1]) ** 2
    return (0.02 * np.exp(-distance / (2 * sigma**2))).astype(np.float32)


def sample(image_rgb=None, boxes=BOXES, labels=(1, 0, 1), silent=()) -> BoxSample:
    """Boxes with a bump in the middle of each; silent ones have no map."""
    image_rgb = photo(480, 640) if image_rgb is None else image_rgb
    frame = FrameTransform.stretch(image_rgb.shape[:2], (416, 416))
    boxes_xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes_xyxy)
    explanations = []
    for index, box in enumerate(frame.boxes_to_network(boxes_xyxy)):
        if index in silent:
            warning = "neck[2] has no influence on this box; neck[0] has"
            explanations.append(BoxExplanation(index, (), warning))
            continue
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        layer = LayerMap("neck[1]", bump(centre, 20.0))
        explanations.append(BoxExplanation(index, (layer,)))
    return BoxSample(
        "000000000139",
        image_rgb,
        frame,
        Detections(
            boxes_xyxy,
            np.linspace(0.9, 0.5, count, dtype=np.float32),
            np.array(labels, np.int64),
        ),
        tuple(explanations),
    )


def boxam_panel(class_names=(), palette=None, max_cell_size=1024, **options):
    return BoxAMPanel(BoxAMOptions(**options), class_names, palette, max_cell_size)


def with_maps(given: BoxSample, *maps: np.ndarray, warning: str = "") -> BoxSample:
    """The sample with the first box only, explained by these maps."""
    layers = tuple(LayerMap(f"neck[{i}]", m) for i, m in enumerate(maps))
    return replace(given, explanations=(BoxExplanation(0, layers, warning),))


@pytest.fixture
def draw(monkeypatch):
    """Draws a sample and gives the cells of the picture, those above first."""

    def run(given: BoxSample, *, located: bool = True, **options):
        seen = []

        def spy(cells, *args, **options):
            seen.append(list(cells))
            return montage_module.montage(cells, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(panel_module, "montage", spy)
            options = {"class_names": NAMES, **options}
            panel = boxam_panel(**options)(given)
        assert panel.dtype == np.uint8
        cells = [cell for part in seen for cell in part]
        for cell in cells if located else ():
            assert _contains(panel, cell.image_rgb)
        return cells

    return run


def plain(note: str) -> str:
    return note.replace("\u00a0", " ")


def is_grey(image_rgb: np.ndarray) -> np.ndarray:
    return (image_rgb == image_rgb[..., :1]).all(axis=2)


def _contains(panel: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture is somewhere on the panel, pixel by pixel."""
    height, width = picture.shape[:2]
    firsts = np.argwhere((panel == picture[0, 0]).all(axis=2))
    return any(
        np.array_equal(panel[y : y + height, x : x + width], picture) for y, x in firsts
    )


class TestCaptions:
    def test_boxes(self, draw):
        cells = draw(sample())
        assert [cell.title for cell in cells] == [
            "000000000139",
            "3 explained boxes",
            "dog 0.90",
            "cat 0.70",
            "dog 0.50",
        ]
        notes = [plain(cell.note) for cell in cells]
        assert notes[0] == "640 x 480 px · 3 boxes with score > 0.3 · 3 explained"
        assert notes[1] == (
            "boxam · score · each box's map divided by its maximum · "
            "the largest at each pixel"
        )
        high = sample().explanations[1].maps[0].saliency.max()
        assert (
            notes[3] == f"boxam · score · neck[1] 26 x 26 cells · map 0 to {high:.3g}"
        )

    def test_classes(self, draw):
        cells = draw(sample(silent=[2]), scope="class")
        assert [cell.title for cell in cells[2:]] == ["dog (2 boxes)", "cat (1 box)"]
        assert cells[2].note == (
            "boxam · score · the largest of their maps at each pixel · 1 of 2 boxes "
            "without influence · neck[2] has no influence on this box; neck[0] has"
        )
        assert cells[3].note == "boxam · score"

    def test_image(self, draw):
        assert len(draw(sample(), scope="image")) == 2

    def test_one_box_is_two_panels(self, draw):
        first, second = draw(sample(boxes=BOXES[:1], labels=[2]))
        assert first.title == "000000000139"
        assert second.title == "car 0.90"
        assert first.image_rgb.shape == second.image_rgb.shape
        assert second.scale is not None

    def test_one_class_is_two_panels(self, draw):
        cells = draw(sample(labels=(1, 1, 1)), scope="class")
        assert [cell.title for cell in cells] == ["000000000139", "dog (3 boxes)"]
        assert cells[1].image_rgb.shape == (480, 640, 3)

    def test_a_note_on_the_picture(self, draw):
        given = replace(sample(), note="16 bits, stretched")
        note = draw(given)[0].note
        assert note.startswith("640 x 480 px · 16 bits, stretched · 3 boxes")

    def test_boxes_that_are_written_alike_have_numbers(self, draw):
        given = sample(labels=(1, 1, 0))
        scores = np.array([0.701, 0.699, 0.70], np.float32)
        given = replace(given, detections=replace(given.detections, scores=scores))
        titles = ["dog 0.70 #1", "dog 0.70 #2", "cat 0.70"]
        cells = draw(given)
        assert [cell.title for cell in cells[2:]] == titles
        maps = boxam_panel(class_names=NAMES).overlay_maps(given)
        assert [overlay.title for overlay in maps[1:]] == titles
        # The number is on the label in the first picture, too.
        detections = replace(given.detections, scores=scores + 0.1 * (1 + np.arange(3)))
        other = draw(replace(given, detections=detections))
        assert other[2].title == "dog 0.80"
        assert not np.array_equal(other[0].image_rgb, cells[0].image_rgb)

    def test_an_unexplained_twin_counts_if_it_is_drawn(self, draw):
        given = sample(labels=(1, 1, 0))
        scores = np.full(3, 0.7, np.float32)
        given = replace(given, detections=replace(given.detections, scores=scores))
        given = replace(given, explanations=given.explanations[1:])
        assert draw(given)[2].title == "dog 0.70 #1"
        assert draw(given, score_thr=0.8)[2].title == "dog 0.70"

    def test_unexplained_boxes_are_thin(self, draw):
        given = sample()
        given = replace(given, explanations=given.explanations[:1])
        cells = draw(given, palette=[(255, 0, 0), (0, 255, 0)])
        assert cells[0].note.endswith("with score > 0.3 · 1 explained, the others thin")
        middle = cells[0].image_rgb[200]
        assert (middle == (0, 255, 0)).all(axis=1)[60:80].sum() == 2
        assert (middle == (255, 0, 0)).all(axis=1)[310:330].sum() == 1

    def test_layers(self, draw):
        given = with_maps(
            sample(), bump((90, 140), 20, stride=8), 3 * bump((90, 140), 9)
        )
        low, high = 0.0, given.explanations[0].maps[1].saliency.max()
        note = plain(draw(given)[1].note)
        assert note == (
            "boxam · score · sum of neck[0] 52 x 52 cells, "
            "neck[1] 26 x 26 cells · "
            f"maps {low:.3g} to {high:.3g}"
        )
        note = plain(draw(given, fusion="sum", normalize_layers=False)[1].note)
        assert "· sum of neck[0] 52 x 52 cells, neck[1] 26 x 26 cells ·" in note

    def test_a_low_that_shows_is_written(self, draw):
        given = with_maps(
            sample(), np.linspace(0.5, 2, 169, dtype=np.float32).reshape(13, 13)
        )
        assert plain(draw(given)[1].note).endswith("13 x 13 cells · map 0.5 to 2")

    def test_norm_in_bbox(self, draw):
        note = draw(sample(), norm_in_bbox=True)[1].note
        assert "each box's map inside its box divided by its maximum there" in note

    def test_a_warning_beside_a_map(self, draw):
        given = with_maps(sample(), bump((90, 140), 20), warning="grows with the seed")
        cells = draw(given)
        assert cells[1].note.endswith(" · grows with the seed")
        assert not is_grey(cells[1].image_rgb).all()

    def test_a_label_without_a_name(self, draw):
        assert draw(sample(labels=(7, 0, 1)))[2].title == "class 7 0.90"
        assert draw(sample(), class_names=None)[3].title == "class 0 0.70"

    @pytest.mark.parametrize(
        ("score_thr", "parts"),
        [
            (0.6, "2 boxes with score > 0.6 · 3 explained"),
            (0.95, "no boxes with score > 0.95 · 3 explained"),
            (1, "3 boxes explained"),
        ],
    )
    def test_score_thr(self, draw, score_thr, parts):
        cells = draw(sample(), score_thr=score_thr)
        assert cells[0].note == f"640 x 480 px · {parts}"
        changed = (cells[0].image_rgb != sample().image_rgb).any(axis=2)
        assert changed[200:240, 64:224].any() == (score_thr < 0.9)
        assert not changed[40:100, 480:600].any()


class TestWithoutDetections:
    @pytest.mark.parametrize("scope", ["box", "class", "image"])
    def test_the_image_with_the_statement(self, draw, scope):
        cells = draw(sample(boxes=[], labels=[]), scope=scope)
        assert [plain(c.note) for c in cells] == [
            "640 x 480 px · no boxes with score > 0.3"
        ]
        assert np.array_equal(cells[0].image_rgb, photo(480, 640))

    def test_stated_where_none_would_be_drawn(self, draw):
        [cell] = draw(sample(boxes=[], labels=[]), score_thr=1)
        assert cell.note == "640 x 480 px · no boxes explained"

    def test_boxes_that_nobody_asked_about(self, draw):
        [cell] = draw(replace(sample(), explanations=()))
        assert cell.note.endswith("3 boxes with score > 0.3 · none explained")


class TestHeat:
    def test_full_alpha_is_the_colour_of_the_bar(self, draw):
        cell = draw(sample(), alpha=1, scope="image", colormap="viridis")[1]
        peak = colormap_lut("viridis")[255, 0].astype(int)
        picture = cell.image_rgb.astype(int)
        close = (np.abs(picture - peak) <= 3).all(axis=2)
        for x1, y1, x2, y2 in BOXES:
            rows, columns = np.nonzero(close[y1:y2, x1:x2])
            assert abs(rows.mean() + 0.5 - (y2 - y1) / 2) < 5
            assert abs(columns.mean() + 0.5 - (x2 - x1) / 2) < 5

    def test_far_from_the_boxes_is_the_grey_image(self, draw):
        picture = draw(sample())[1].image_rgb
        grey = cv2.cvtColor(photo(480, 640), cv2.COLOR_RGB2GRAY)
        assert np.array_equal(picture[440:, :60], np.dstack([grey[440:, :60]] * 3))

    def test_weak_and_strong_boxes_are_equally_bright(self, draw):
        given = sample()
        weak = given.explanations[1]
        layer = replace(weak.maps[0], saliency=weak.maps[0].saliency * 1e-6)
        explanations = (given.explanations[0], replace(weak, maps=(layer,)))
        first = draw(given)[3].image_rgb
        second = draw(replace(given, explanations=explanations), scope="image")
        assert np.array_equal(
            draw(given, scope="image")[1].image_rgb[300:, :450],
            second[1].image_rgb[300:, :450],
        )
        assert not is_grey(first).all()

    def test_class_panel_shows_its_boxes_only(self, draw):
        dog, cat = (cell.image_rgb for cell in draw(sample(), scope="class")[2:])
        scale = 480 / dog.shape[0]
        for picture, shown in ((dog, {0, 2}), (cat, {1})):
            for index, box in enumerate(BOXES):
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                assert is_grey(picture)[round(y / scale), round(x / scale)] == (
                    index not in shown
                )

    def test_norm_in_bbox_is_grey_outside(self, draw):
        given = with_maps(sample(), np.ones((13, 13), np.float32))
        coloured = ~is_grey(draw(given, norm_in_bbox=True, scope="image")[1].image_rgb)
        rows, columns = np.nonzero(coloured)
        assert (rows.min(), rows.max() + 1) == pytest.approx((80, 240), abs=3)
        assert (columns.min(), columns.max() + 1) == pytest.approx((64, 224), abs=3)
        assert coloured[90:230, 74:214].mean() > 0.95

    def test_a_letterbox_is_taken_off(self, draw):
        # 240x640 within 416x416: scale 0.65, 130 rows of padding above.
        image_rgb = np.full((240, 640, 3), 90, np.uint8)
        frame = FrameTransform((240, 640), (416, 416), (0.65, 0.65), (0.0, 130.0))
        given = replace(
            with_maps(sample(), bump((100, 200), 12)), image_rgb=image_rgb, frame=frame
        )
        picture = draw(given, alpha=1, scope="image")[1].image_rgb
        peak = colormap_lut("plasma")[255, 0].astype(int)
        rows, columns = np.nonzero((np.abs(picture - peak) <= 6).all(axis=2))
        assert columns.mean() + 0.5 == pytest.approx(100 / 0.65, abs=8)
        assert rows.mean() + 0.5 == pytest.approx((200 - 130) / 0.65, abs=8)


class TestWithoutInfluence:
    def test_the_crop_and_the_warning(self, draw):
        given = sample(silent=[1])
        cells = draw(given)
        assert "1 of 3 boxes without influence" in cells[1].note
        panel = cells[3]
        assert panel.title == "cat 0.70"
        assert panel.note == (
            "boxam · score · neck[2] has no influence on this box; neck[0] has"
        )
        assert is_grey(panel.image_rgb).all()
        assert panel.image_rgb.std() > 20
        assert panel.scale is None
        # The others are as they would be without it.
        assert np.array_equal(cells[2].image_rgb, draw(sample())[2].image_rgb)
        assert panel.image_rgb.shape[1] == pytest.approx(cells[2].image_rgb.shape[1], 1)

    @pytest.mark.parametrize(
        ("maps", "options", "part"),
        [
            ((), {}, "no layer has any influence on this box"),
            ((np.zeros((13, 13)),), {}, "no layer has any influence on this box"),
            (
                (bump((400, 400), 5),),
                dict(norm_in_bbox=True, smooth=0),
                "the map is zero inside the box",
            ),
            (
                (
                    np.eye(13),
                    1 - np.minimum(1, sum(np.eye(13, k=k) for k in (-2, -1, 0, 1, 2))),
                ),
                dict(fusion="product", smooth=0),
                "the product of the layers is zero on the image",
            ),
        ],
    )
    def test_the_reason_where_none_is_given(self, draw, maps, options, part):
        maps = [np.where(m > 1e-6, m, 0).astype(np.float32) for m in maps]
        cells = draw(with_maps(sample(), *maps), **options)
        assert cells[1].note.endswith(part)
        assert is_grey(cells[1].image_rgb).all()
        joint = draw(with_maps(sample(), *maps), scope="image", **options)[1]
        assert joint.note.endswith("without influence")

    def test_heat_in_the_padding(self, draw):
        saliency = np.zeros((26, 26), np.float32)
        saliency[2] = 1.0
        frame = FrameTransform((240, 640), (416, 416), (0.65, 0.65), (0.0, 130.0))
        given = replace(
            with_maps(sample(), saliency), image_rgb=photo(240, 640), frame=frame
        )
        cells = draw(given)
        assert plain(cells[1].note).endswith(
            "map 0 to 0 · the map is zero on the image; its heat lies in the padding"
        )

    def test_a_box_that_is_not_finite(self, draw):
        given = sample(boxes=[[np.nan, 0, 10, 10], *BOXES[1:]])
        cells = draw(given)
        assert len(cells) == 5
        assert "neck[1]" in cells[2].note


class TestWindow:
    def test_by_hand(self):
        # Twice as high as the box, and as wide as the image's 4 to 3 ask for.
        box = np.array([200, 200, 260, 290], np.float32)
        assert crop_window(box, (480, 640)) == (110, 155, 350, 335)

    def test_moved_into_the_image(self):
        assert crop_window(np.array([0, 390, 60, 480]), (480, 640)) == (
            0,
            300,
            240,
            480,
        )

    def test_small_objects_are_enlarged_no_further(self):
        x1, y1, x2, y2 = crop_window(np.array([300, 200, 304, 204]), (480, 640))
        assert (x2 - x1, y2 - y1) == (154, 115)
        assert (x1 + x2) / 2 == pytest.approx(302, abs=1)

    @pytest.mark.parametrize(
        "box",
        [
            [-50, -50, 900, 900],
            [np.nan, 0, 1, 1],
            [5, 5, 5, 5],
            [700, 500, 800, 600],
            [0, 0, 640, 3],
            [639.7, 479.7, 640, 480],
        ],
    )
    @pytest.mark.parametrize("image_hw", [(480, 640), (1, 1), (2, 999), (640, 427)])
    def test_is_never_empty_nor_outside(self, box, image_hw):
        x1, y1, x2, y2 = crop_window(np.array(box, np.float32), image_hw)
        assert 0 <= x1 < x2 <= image_hw[1]
        assert 0 <= y1 < y2 <= image_hw[0]

    def test_contains_the_box(self):
        rng = np.random.default_rng(0)
        for _ in range(200):
            corners = rng.uniform(0, 1, (2, 2)) * (427, 640)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
            x1, y1, x2, y2 = crop_window(box, (640, 427))
            assert x1 <= box[0] + 1
            assert y1 <= box[1] + 1
            assert x2 >= box[2] - 1
            assert y2 >= box[3] - 1

    def test_the_outline_is_where_the_box_is(self, draw):
        image_rgb = np.full((480, 640, 3), 90, np.uint8)
        given = sample(image_rgb, boxes=[[200, 200, 260, 290], *BOXES[1:]])
        panel = draw(given, located=False, alpha=0)[2].image_rgb
        rows, columns = np.nonzero((panel == 255).all(axis=2))
        scale = panel.shape[0] / 180
        assert columns.min() == pytest.approx(90 * scale, abs=1)
        assert columns.max() == pytest.approx(150 * scale - 1, abs=1)
        assert rows.min() == pytest.approx(45 * scale, abs=1)
        assert rows.max() == pytest.approx(135 * scale - 1, abs=1)

    def test_the_only_panel_shows_all_that_is_strong(self, draw):
        given = sample(np.full((480, 640, 3), 90, np.uint8))
        # 40 pixels around the box's centre, and 400 pixels right of the box.
        far = bump((416 * 0.9, 416 / 3), 10) + bump((416 * 0.225, 416 / 3), 10)
        second = draw(with_maps(given, far), alpha=1)[1]
        peak = colormap_lut("plasma")[255, 0].astype(int)
        close = (np.abs(second.image_rgb - peak) <= 12).all(axis=2)
        columns = np.flatnonzero(close.any(axis=0))
        assert np.diff(columns).max() > 200

    def test_the_heat_is_where_the_object_is(self, draw):
        given = sample(np.full((480, 640, 3), 90, np.uint8))
        panel = draw(given, located=False, alpha=1)[2].image_rgb
        x1, y1, _, y2 = crop_window(np.array(BOXES[0]), (480, 640))
        scale = panel.shape[0] / (y2 - y1)
        peak = colormap_lut("plasma")[255, 0].astype(int)
        rows, columns = np.nonzero((np.abs(panel - peak) <= 4).all(axis=2))
        assert columns.mean() + 0.5 == pytest.approx((144 - x1) * scale, abs=3)
        assert rows.mean() + 0.5 == pytest.approx((160 - y1) * scale, abs=3)


class TestLayout:
    @pytest.mark.parametrize("count", [3, 8])
    def test_panels_are_in_line_with_the_pictures_above(self, count):
        boxes = [BOXES[i % 3] for i in range(count)]
        given = sample(np.zeros((480, 640, 3), np.uint8), boxes, [0] * count)
        black = (boxam_panel(alpha=0, score_thr=1)(given) == 0).all(axis=2)
        lefts, rights = zip(
            *[np.flatnonzero(row)[[0, -1]] for row in black if row.mean() > 0.6]
        )
        assert len(set(lefts)) == 1
        assert max(rights) - min(rights) < 8

    @pytest.mark.parametrize(("count", "columns"), [(4, 4), (5, 5), (7, 4)])
    @pytest.mark.parametrize("image_hw", [(480, 640), (427, 640)])
    def test_no_panel_is_alone_in_its_row(self, monkeypatch, image_hw, count, columns):
        seen = []
        monkeypatch.setattr(
            panel_module,
            "montage",
            lambda cells, grid, **options: (
                seen.append(grid) or montage_module.montage(cells, grid, **options)
            ),
        )
        boxes = [BOXES[i % 3] for i in range(count)]
        boxam_panel()(sample(photo(*image_hw), boxes, [0] * count))
        assert seen[1][1] == columns

    def test_a_bar_in_each_row(self, draw):
        cells = draw(sample())
        assert cells[0].scale is None
        assert cells[1].scale.label == "share of the map's maximum"
        assert {(c.scale.low, c.scale.high, c.scale.label) for c in cells[2:]} == {
            (0.0, 1.0, "")
        }

    @pytest.mark.parametrize(
        "image_hw", [(640, 427), (1, 1), (3, 5), (30, 900), (900, 30), (2000, 3000)]
    )
    @pytest.mark.parametrize("count", [0, 1, 2, 13])
    def test_any_image_and_number(self, image_hw, count):
        scale = np.array([image_hw[1] / 640, image_hw[0] / 480] * 2)
        boxes = [np.array(BOXES[i % 3]) * scale for i in range(count)]
        given = sample(photo(*image_hw), boxes, [i % 3 for i in range(count)])
        for scope in ("box", "class", "image"):
            panel = boxam_panel(scope=scope)(given)
            assert panel.ndim == 3
            assert panel.shape[1] < 2 * 1024 + 300

    @pytest.mark.parametrize("max_cell_size", [64, 300, 1024])
    def test_no_picture_is_larger_than_allowed(self, draw, max_cell_size):
        for count in (1, 3, 20):
            boxes = [BOXES[i % 3] for i in range(count)]
            given = sample(photo(768, 1024), boxes, [0] * count)
            for cell in draw(given, located=False, max_cell_size=max_cell_size):
                height, width = cell.image_rgb.shape[:2]
                assert height <= max_cell_size
                assert width <= max_cell_size

    def test_a_small_image_is_enlarged(self, draw):
        cells = draw(sample(photo(48, 64), boxes=[[5, 5, 20, 30]], labels=[0]))
        assert cells[0].image_rgb.shape == (480, 640, 3)

    def test_a_hundred_boxes(self, draw):
        rng = np.random.default_rng(0)
        corners = rng.uniform(0, 400, (100, 2))
        boxes = np.hstack([corners, corners + rng.uniform(8, 80, (100, 2))])
        given = sample(boxes=boxes, labels=rng.integers(0, 3, 100))
        cells = draw(given, located=False)
        assert len(cells) == 102
        assert cells[0].image_rgb.shape == (768, 1024, 3)
        widths = {cell.image_rgb.shape[1] for cell in cells[2:]}
        assert min(widths) >= 200
        panel = boxam_panel()(given)
        assert panel.shape[0] * panel.shape[1] < 12e6


@pytest.mark.parametrize("scope", ["box", "class", "image"])
def test_sample_is_left_alone(scope):
    given = sample(silent=[1])
    before = copy.deepcopy(given)
    boxam_panel(scope=scope, norm_in_bbox=True)(given)
    assert np.array_equal(given.image_rgb, before.image_rgb)
    assert np.array_equal(given.detections.boxes_xyxy, before.detections.boxes_xyxy)
    assert np.array_equal(given.detections.scores, before.detections.scores)
    for one, other in zip(given.explanations, before.explanations):
        for layer, copied in zip(one.maps, other.maps):
            assert np.array_equal(layer.saliency, copied.saliency)


def test_read_only_arrays_can_be_drawn():
    given = sample()
    arrays = [given.image_rgb, given.detections.boxes_xyxy, given.detections.scores]
    arrays += [m.saliency for e in given.explanations for m in e.maps]
    for array in arrays:
        array.flags.writeable = False
    boxam_panel()(given)


class TestOptions:
    def test_fusion_smooth_and_normalisation_reach_the_map(self, draw):
        given = with_maps(sample(), bump((60, 100), 20), 5 * bump((130, 180), 20))
        pictures = [
            draw(given, scope="image", **options)[1].image_rgb
            for options in (
                {},
                dict(fusion="max"),
                dict(fusion="product"),
                dict(normalize_layers=True),
                dict(smooth=0.5),
                dict(colormap="viridis"),
                dict(alpha=0.3),
            )
        ]
        for index, picture in enumerate(pictures):
            for other in pictures[:index]:
                assert not np.array_equal(picture, other)

    def test_names_and_palette_reach_the_boxes(self, draw):
        first = [
            draw(sample(), **options)[0].image_rgb
            for options in ({}, dict(class_names=None), dict(palette=[(1, 2, 3)]))
        ]
        assert not np.array_equal(first[0], first[1])
        assert not np.array_equal(first[0], first[2])


@pytest.mark.real_data
def test_a_real_image(shared_dir, draw):
    folder = shared_dir / "data" / "coco128"
    annotations = json.loads(
        (folder / "annotations" / "instances_train2017.json").read_text()
    )
    info = next(i for i in annotations["images"] if i["height"] == 480)
    boxes_xywh = np.array(
        [a["bbox"] for a in annotations["annotations"] if a["image_id"] == info["id"]]
    )
    boxes_xyxy = np.hstack([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]])
    image_rgb = cv2.imread(str(folder / "train2017" / info["file_name"]))[..., ::-1]
    given = sample(image_rgb, boxes_xyxy, [0] * len(boxes_xyxy))
    cells = draw(given)
    assert len(cells) == 2 + len(boxes_xyxy)
    for cell in cells[2:]:
        picture = cell.image_rgb.astype(int)
        assert picture.std() > 20
        colourful = picture.max(axis=2) - picture.min(axis=2) > 40
        assert 0.02 < colourful.mean() < 0.7
