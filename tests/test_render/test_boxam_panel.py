from __future__ import annotations

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
from tests.test_render.pictures import contains, is_grey, photo, pixels_of, plain

NAMES = ["cat", "dog", "car"]
BOXES = [[64, 80, 224, 240], [320, 160, 560, 400], [480, 40, 600, 100]]
GREY = plain(480, 640, 90)


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
    explanations = []
    for index, box in enumerate(frame.boxes_to_network(boxes_xyxy)):
        if index in silent:
            warning = "neck[2] has no influence on this box; neck[0] has"
            explanations.append(BoxExplanation(index, (), warning))
        else:
            centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            layer = LayerMap("neck[1]", bump(centre, 20.0))
            explanations.append(BoxExplanation(index, (layer,)))
    scores = np.linspace(0.9, 0.5, len(boxes_xyxy), dtype=np.float32)
    found = Detections(boxes_xyxy, scores, np.array(labels, np.int64))
    return BoxSample("000000000139", image_rgb, frame, found, tuple(explanations))


def many(count: int, image_rgb=None) -> BoxSample:
    return sample(image_rgb, [BOXES[i % 3] for i in range(count)], [0] * count)


def boxam_panel(class_names=(), palette=None, max_cell_size=1024, **options):
    return BoxAMPanel(BoxAMOptions(**options), class_names, palette, max_cell_size)


def with_maps(given: BoxSample, *maps: np.ndarray, warning: str = "") -> BoxSample:
    """The sample with the first box only, explained by these maps."""
    layers = tuple(LayerMap(f"neck[{i}]", m) for i, m in enumerate(maps))
    return replace(given, explanations=(BoxExplanation(0, layers, warning),))


@pytest.fixture
def draw(monkeypatch):
    """Draws a sample and gives the cells of the picture, those above first."""

    def draw(given: BoxSample, *, located: bool = True, **options):
        cells, draw.columns = [], []

        def spy(given_cells, columns=None, **layout):
            cells.extend(given_cells)
            draw.columns.append(columns)
            return montage_module.montage(given_cells, columns, **layout)

        with monkeypatch.context() as patch:
            patch.setattr(panel_module, "montage", spy)
            draw.panel = boxam_panel(**{"class_names": NAMES, **options})(given)
        assert draw.panel.dtype == np.uint8
        assert not located or all(contains(draw.panel, c.image_rgb) for c in cells)
        return [replace(c, note=c.note.replace("\u00a0", " ")) for c in cells]

    return draw


def peak_mask(picture: np.ndarray, tolerance: int, colormap: str = "plasma"):
    """Where the picture has the colour of the largest value."""
    peak = colormap_lut(colormap)[255, 0].astype(int)
    return (np.abs(picture.astype(int) - peak) <= tolerance).all(axis=2)


def centre_xy(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return columns.mean() + 0.5, rows.mean() + 0.5


class TestCaptions:
    def test_boxes(self, draw):
        cells = draw(sample())
        titles = [cell.title for cell in cells]
        assert titles[:2] == ["000000000139", "3 explained boxes"]
        assert titles[2:] == ["dog 0.90", "cat 0.70", "dog 0.50"]
        assert cells[0].note == (
            "640 x 480 px · 3 boxes with score > 0.3 · 3 explained"
        )
        high = sample().explanations[1].maps[0].saliency.max()
        assert cells[3].note == (
            f"boxam · score · tells where · neck[1] 26 x 26 cells · map 0 to {high:.3g}"
        )
        assert cells[0].scale is None
        assert {(c.scale.low, c.scale.high) for c in cells[1:]} == {(0.0, 1.0)}
        assert draw(sample(labels=(7, 0, 1)))[2].title == "class 7 0.90"
        nameless = draw(sample(), class_names=())[0]
        assert not np.array_equal(cells[0].image_rgb, nameless.image_rgb)

    def test_classes_and_image(self, draw):
        given = sample(silent=[2])
        cells = draw(given, scope="class")
        assert [cell.title for cell in cells[2:]] == ["dog (2 boxes)", "cat (1 box)"]
        assert "1 of 2 boxes without influence · neck[2] has no" in cells[2].note
        assert len(draw(given, scope="image")) == 2

    def test_what_would_show_the_same_twice_is_left_out(self, draw):
        first, second = draw(sample(boxes=BOXES[:1], labels=[2]))
        assert (first.title, second.title) == ("000000000139", "car 0.90")
        assert first.image_rgb.shape == second.image_rgb.shape
        cells = draw(sample(labels=(1, 1, 1)), scope="class")
        assert [cell.title for cell in cells] == ["000000000139", "dog (3 boxes)"]

    def test_boxes_that_are_written_alike_have_numbers(self, draw):
        given = sample(labels=(1, 1, 0))
        scores = np.array([0.701, 0.699, 0.70], np.float32)
        given = replace(given, detections=replace(given.detections, scores=scores))
        titles = ["dog 0.70 #1", "dog 0.70 #2", "cat 0.70"]
        assert [cell.title for cell in draw(given)[2:]] == titles
        maps = boxam_panel(class_names=NAMES).overlay_maps(given)
        assert [overlay.title for overlay in maps[1:]] == titles
        # An unexplained twin counts where it is drawn.
        given = replace(given, explanations=given.explanations[1:])
        assert draw(given)[2].title == "dog 0.70 #1"
        assert draw(given, score_thr=0.8)[2].title == "dog 0.70"

    def test_unexplained_boxes_are_thin(self, draw):
        given = sample()
        given = replace(given, explanations=given.explanations[:1])
        cells = draw(given, palette=[(255, 0, 0), (0, 255, 0)])
        assert cells[0].note.endswith("1 explained, the others thin")
        middle = cells[0].image_rgb[200:201]
        assert pixels_of(middle, (0, 255, 0))[0, 60:80].sum() == 2
        assert pixels_of(middle, (255, 0, 0))[0, 310:330].sum() == 1

    def test_layers_ranges_and_notes(self, draw):
        maps = bump((90, 140), 20, stride=8), 3 * bump((90, 140), 9)
        given = with_maps(sample(), *maps, warning="grows with the seed")
        cells = draw(replace(given, note="16 bits, stretched"))
        assert cells[0].note.startswith("640 x 480 px · 16 bits, stretched · 3 boxes")
        assert cells[1].note == (
            "boxam · score · tells where · sum of neck[0] 52 x 52 cells, neck[1] 26 x "
            f"26 cells · maps 0 to {maps[1].max():.3g} · grows with the seed"
        )
        assert not is_grey(cells[1].image_rgb).all()
        low = np.linspace(0.5, 2, 169, dtype=np.float32).reshape(13, 13)
        assert draw(with_maps(sample(), low))[1].note.endswith("map 0.5 to 2")
        low[0, 0] = 1e-4  # what three digits of the high do not show
        assert draw(with_maps(sample(), low))[1].note.endswith("map 0 to 2")

    @pytest.mark.parametrize(
        ("score_thr", "parts"),
        [
            (0.6, "2 boxes with score > 0.6 · 3 explained"),
            (0.95, "no boxes with score > 0.95 · 3 explained"),
            (1, "3 boxes explained"),
        ],
    )
    def test_score_thr(self, draw, score_thr, parts):
        first = draw(sample(), score_thr=score_thr)[0]
        assert first.note == f"640 x 480 px · {parts}"
        changed = (first.image_rgb != sample().image_rgb).any(axis=2)
        assert changed[200:240, 64:224].any() == (score_thr < 0.9)
        assert not changed[40:100, 480:600].any()

    def test_nothing_to_explain(self, draw):
        [cell] = draw(sample(boxes=[], labels=[]))
        assert cell.note == "640 x 480 px · no boxes with score > 0.3"
        assert np.array_equal(cell.image_rgb, photo(480, 640))
        [cell] = draw(replace(sample(), explanations=()))
        assert cell.note.endswith("3 boxes with score > 0.3 · none explained")


class TestHeat:
    def test_full_alpha_is_the_colour_of_the_bar_and_far_away_is_grey(self, draw):
        picture = draw(sample(), alpha=1, scope="image", colormap="viridis")[
            1
        ].image_rgb
        close = peak_mask(picture, 3, "viridis")
        for x1, y1, x2, y2 in BOXES:
            x, y = centre_xy(close[y1:y2, x1:x2])
            assert (x, y) == pytest.approx(((x2 - x1) / 2, (y2 - y1) / 2), abs=5)
        grey = cv2.cvtColor(photo(480, 640), cv2.COLOR_RGB2GRAY)
        assert np.array_equal(picture[440:, :60], np.dstack([grey[440:, :60]] * 3))

    def test_class_panel_shows_its_boxes_only(self, draw):
        dog, cat = (cell.image_rgb for cell in draw(sample(), scope="class")[2:])
        scale = 480 / dog.shape[0]
        for picture, shown in ((dog, {0, 2}), (cat, {1})):
            for index, (x1, y1, x2, y2) in enumerate(BOXES):
                y, x = round((y1 + y2) / 2 / scale), round((x1 + x2) / 2 / scale)
                assert is_grey(picture)[y, x] == (index not in shown)

    def test_norm_in_bbox_is_grey_outside(self, draw):
        given = with_maps(sample(), np.ones((13, 13), np.float32))
        cell = draw(given, norm_in_bbox=True, scope="image")[1]
        assert "inside its box divided by its maximum there" in cell.note
        coloured = ~is_grey(cell.image_rgb)
        rows, columns = np.nonzero(coloured)
        assert (rows.min(), rows.max() + 1) == pytest.approx((80, 240), abs=3)
        assert (columns.min(), columns.max() + 1) == pytest.approx((64, 224), abs=3)
        assert coloured[90:230, 74:214].mean() > 0.95

    def test_a_letterbox_is_taken_off(self, draw):
        # 240x640 within 416x416: scale 0.65, 130 rows of padding above.
        frame = FrameTransform((240, 640), (416, 416), (0.65, 0.65), (0.0, 130.0))
        given = with_maps(sample(), bump((100, 200), 12))
        given = replace(given, image_rgb=plain(240, 640, 90), frame=frame)
        picture = draw(given, alpha=1, scope="image")[1].image_rgb
        expected = 100 / 0.65, (200 - 130) / 0.65
        assert centre_xy(peak_mask(picture, 6)) == pytest.approx(expected, abs=8)
        padding = np.zeros((26, 26), np.float32)
        padding[2] = 1.0
        cell = draw(with_maps(given, padding))[1]
        assert cell.note.endswith("zero on the image; its heat lies in the padding")

    def test_each_option_reaches_the_map(self, draw):
        given = with_maps(sample(), bump((60, 100), 20), 5 * bump((130, 180), 20))
        changes = [{}, dict(normalize_layers=True), dict(smooth=0.5), dict(alpha=0.3)]
        changes += [dict(fusion="max"), dict(fusion="product"), dict(colormap="jet")]
        cells = [draw(given, scope="image", **options)[1] for options in changes]
        assert len({cell.image_rgb.tobytes() for cell in cells}) == 7


class TestWithoutInfluence:
    def test_the_crop_and_the_warning(self, draw):
        cells = draw(sample(silent=[1]))
        assert "1 of 3 boxes without influence" in cells[1].note
        panel = cells[3]
        assert panel.title == "cat 0.70"
        assert panel.note.endswith("neck[2] has no influence on this box; neck[0] has")
        assert is_grey(panel.image_rgb).all()
        assert panel.image_rgb.std() > 20
        assert panel.scale is None
        # The others are as they would be without it.
        assert np.array_equal(cells[2].image_rgb, draw(sample())[2].image_rgb)

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
                (np.eye(13), np.eye(13, k=6)),
                dict(fusion="product", smooth=0),
                "the product of the layers is zero on the image",
            ),
        ],
    )
    def test_the_reason_where_none_is_given(self, draw, maps, options, part):
        maps = [np.where(m > 1e-6, m, 0).astype(np.float32) for m in maps]
        cell = draw(with_maps(sample(), *maps), **options)[1]
        assert cell.note.endswith(part)
        assert is_grey(cell.image_rgb).all()
        joint = draw(with_maps(sample(), *maps), scope="image", **options)[1]
        assert joint.note.endswith("without influence")


class TestWindow:
    def test_by_hand(self):
        # Twice as high as the box, and as wide as the image's 4 to 3 ask for.
        window = crop_window(np.array([200, 200, 260, 290], np.float32), (480, 640))
        assert window == (110, 155, 350, 335)
        # Moved into the image.
        window = crop_window(np.array([0, 390, 60, 480]), (480, 640))
        assert window == (0, 300, 240, 480)
        # Small objects are enlarged no further.
        x1, y1, x2, y2 = crop_window(np.array([300, 200, 304, 204]), (480, 640))
        assert (x2 - x1, y2 - y1) == (154, 115)
        assert (x1 + x2) / 2 == pytest.approx(302, abs=1)

    def test_outline_and_heat_are_where_the_box_is(self, draw):
        given = sample(GREY, [[200, 200, 260, 290], *BOXES[1:]])
        panel = draw(given, located=False, alpha=0)[2].image_rgb
        rows, columns = np.nonzero(pixels_of(panel, (255, 255, 255)))
        scale = panel.shape[0] / 180
        edges = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        expected = np.array([90, 150, 45, 135]) * scale
        assert edges == pytest.approx(expected, abs=1)
        panel = draw(given, located=False, alpha=1)[2].image_rgb
        x, y = centre_xy(peak_mask(panel, 4))
        assert (x, y) == pytest.approx((120 * scale, 90 * scale), abs=3)

    def test_the_only_panel_shows_all_that_is_strong(self, draw):
        # On the box, and 400 pixels right of it.
        far = bump((416 * 0.9, 416 / 3), 10) + bump((416 * 0.225, 416 / 3), 10)
        second = draw(with_maps(sample(GREY), far), alpha=1)[1]
        columns = np.flatnonzero(peak_mask(second.image_rgb, 12).any(axis=0))
        assert np.diff(columns).max() > 200


class TestLayout:
    def test_panels_are_in_line_with_the_pictures_above(self):
        given = many(8, plain(480, 640, 0))
        black = pixels_of(boxam_panel(alpha=0, score_thr=1)(given), (0, 0, 0))
        lefts, rights = zip(
            *[np.flatnonzero(row)[[0, -1]] for row in black if row.mean() > 0.6]
        )
        assert len(set(lefts)) == 1
        assert max(rights) - min(rights) < 8

    @pytest.mark.parametrize("image_hw", [(1, 1), (30, 900), (900, 30), (2000, 3000)])
    def test_any_image_and_number(self, image_hw):
        scale = np.array([image_hw[1] / 640, image_hw[0] / 480] * 2)
        for count, scope in ((0, "box"), (1, "class"), (2, "image"), (13, "box")):
            boxes = [np.array(BOXES[i % 3]) * scale for i in range(count)]
            given = sample(photo(*image_hw), boxes, [i % 3 for i in range(count)])
            assert boxam_panel(scope=scope)(given).shape[1] < 2 * 1024 + 300

    @pytest.mark.parametrize("max_cell_size", [64, 300])
    def test_no_picture_is_larger_than_allowed(self, draw, max_cell_size):
        for count in (1, 3, 20):
            given = many(count, photo(768, 1024))
            for cell in draw(given, located=False, max_cell_size=max_cell_size):
                assert max(cell.image_rgb.shape) <= max_cell_size

    def test_a_hundred_boxes_and_a_small_image(self, draw):
        corners = np.random.default_rng(0).uniform(0, 400, (100, 2))
        boxes = np.hstack([corners, corners + 40])
        boxes[7] = np.nan
        cells = draw(sample(boxes=boxes, labels=[0] * 100), located=False)
        assert len(cells) == 102
        assert cells[0].image_rgb.shape == (768, 1024, 3)
        assert min(cell.image_rgb.shape[1] for cell in cells[2:]) >= 200
        assert draw.panel.shape[0] * draw.panel.shape[1] < 12e6
        first = draw(sample(photo(48, 64), boxes=[[5, 5, 20, 30]], labels=[0]))[0]
        assert first.image_rgb.shape == (480, 640, 3)


@pytest.mark.parametrize("scope", ["box", "class", "image"])
def test_sample_is_left_alone(scope):
    given = sample(silent=[1])
    arrays = [given.image_rgb, given.detections.boxes_xyxy, given.detections.scores]
    arrays += [m.saliency for e in given.explanations for m in e.maps]
    for array in arrays:
        array.flags.writeable = False
    boxam_panel(scope=scope, norm_in_bbox=True)(given)


def test_signed_maps_are_red_for_and_blue_against(draw):
    """White is nothing: zero keeps its colour whatever a map's ends are."""
    against = bump((93.6, 138.7), 20.0)
    given = with_maps(sample(GREY), against * 0.5 - np.roll(against, 8, axis=1))
    _, second = draw(given, method="evidence", alpha=1.0)
    assert second.scale.colormap == "bwr"
    assert (second.scale.low, second.scale.high) == (-1, 1)
    assert "evidence · score · tells what · red for, blue against" in second.note
    assert "-0.0" in second.note
    ranked = draw(given, method="evidence", cells=5)[1].note
    assert "tells what · red counts more than most of the box, blue less" in ranked
    red, _, blue = second.image_rgb.astype(int).transpose(2, 0, 1)
    row, column = np.unravel_index((blue - red).argmax(), red.shape)
    assert blue[row, column] - red[row, column] > 240
    # Half as strong, for the box, elsewhere.
    other = (red - blue).max()
    assert 110 < other < 140
    (joint, own) = boxam_panel(method="evidence").overlay_maps(given)
    assert own.levels.min() == 0
    assert 185 < own.levels.max() < 197
    assert np.array_equal(joint.levels, own.levels)
    assert np.median(own.levels) == 128
    assert not boxam_panel(method="evidence").fades
    positive = boxam_panel(method="evidence", signed=False)
    assert (positive.fades, positive.colormap) == (True, "plasma")


def test_of_signed_maps_the_larger_in_size_is_joined():
    one, other = bump((93.6, 138.7), 20.0), bump((312, 208), 20.0)
    given = sample(GREY)
    explanations = (
        BoxExplanation(0, (LayerMap("image", -one),)),
        BoxExplanation(1, (LayerMap("image", other),)),
    )
    panel = boxam_panel(method="evidence", smooth=0.0)
    joint, first, second = panel.overlay_maps(replace(given, explanations=explanations))
    assert joint.levels.min() == first.levels.min() == 0
    assert joint.levels.max() == second.levels.max() == 255
