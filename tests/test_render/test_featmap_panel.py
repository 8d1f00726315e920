from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmengine.visualization import Visualizer

from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError
from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.network.nested import OutputKey
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.records import Activation, Detections, VisSample
from mmyolo_vis_hooks.render import featmap_panel as panel_module
from mmyolo_vis_hooks.render import montage as montage_module
from mmyolo_vis_hooks.render.colorbar import ColorScale
from mmyolo_vis_hooks.render.featmap_panel import FeatMapPanel, overlay_feature_map
from tests.test_render.pictures import contains, photo, pixels_of, plain

CASES = [
    # feature map, image
    ((64, 20, 20), (640, 640)),
    ((33, 13, 17), (427, 640)),
    ((7, 40, 30), (33, 21)),
    ((20, 1, 20), (101, 333)),
]


def featmap_panel(class_names=(), palette=None, max_cell_size=1024, **options):
    options = {"channel_reduction": "select_max", **options}
    return FeatMapPanel(FeatMapOptions(**options), class_names, palette, max_cell_size)


def random_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mmengine_overlay(feature_map, image_rgb, **options) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Visualizer.draw_featmap(feature_map, image_rgb, **options)


def differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.abs(first.astype(int) - second.astype(int))


def ours(feature_map, image_rgb, frame=None, **options) -> np.ndarray:
    options = FeatMapOptions(**{"channel_reduction": "select_max", **options})
    return overlay_feature_map(feature_map, image_rgb, options, frame)


def compared(feature_map, image_rgb, **options) -> np.ndarray:
    """How far our picture is from MMEngine's."""
    theirs = mmengine_overlay(feature_map, image_rgb, **options)
    return differences(ours(feature_map, image_rgb, **options), theirs)


class TestOverlayEqualsMMEngine:
    @pytest.mark.parametrize(("shape", "image_hw"), CASES)
    @pytest.mark.parametrize(
        ("dtype", "alpha"), [(torch.float32, 0.2), (torch.float64, 0.8)]
    )
    def test_select_max_is_identical(self, shape, image_hw, dtype, alpha):
        feature_map, image_rgb = random_map(*shape).to(dtype), photo(*image_hw)
        options = dict(channel_reduction="select_max", alpha=alpha)
        assert not compared(feature_map, image_rgb, **options).any()

    @pytest.mark.parametrize(("shape", "image_hw"), CASES)
    def test_squeeze_mean_is_within_two_grey_levels(self, shape, image_hw):
        options = dict(channel_reduction="squeeze_mean")
        difference = compared(random_map(*shape), photo(*image_hw), **options)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.01

    def test_squeeze_mean_at_the_widest_step_of_jet(self):
        # Levels 158 and 159 lie 5 apart. With 0, 255 and 159 +- rounding errors, a
        # third of the pixels may fall on either side.
        feature_map = torch.zeros(8, 1, 3000)
        feature_map[:, :, 1000:2000] = 255.0
        around = torch.linspace(158.9999, 159.0001, 1000)
        feature_map[:, :, 2000:] = around + random_map(8, 1, 1000) * 0.5
        feature_map[:, :, 2000:] += around - feature_map[:, :, 2000:].mean(0)
        options = dict(channel_reduction="squeeze_mean")
        assert compared(feature_map, photo(2, 4501), **options).max() <= 2

    @pytest.mark.parametrize("channels", [1, 3])
    def test_picture_is_identical(self, channels):
        options = dict(channel_reduction=None, topk=-1)
        given = random_map(channels, 9, 11), photo(64, 80)
        assert not compared(*given, **options).any()

    def test_where_mmengine_shows_rounding_errors_or_nothing(self):
        look = dict(alpha=1, colormap="viridis")
        constant = ours(torch.full((4, 1, 1), 0.3), photo(30, 41), **look)
        assert (constant == (68, 1, 84)).all()  # its first colour
        feature_map = torch.full((1, 8, 8), 1.0)
        feature_map[0, 0, 0] = 0.0
        feature_map[0, 7, 7] = float("inf")
        drawn = ours(feature_map, photo(80, 80), alpha=1)
        assert drawn[0, 0].tolist() == drawn[79, 79].tolist() == [0, 0, 128]


def sample(
    image_hw=(240, 330), layers=("backbone", "neck"), channels=8, seed=0
) -> VisSample:
    activations = tuple(
        Activation(layer, random_map(channels, 6, 7, seed=seed + i))
        for i, layer in enumerate(layers)
    )
    return VisSample(
        image_id="000000000139",
        image_rgb=photo(*image_hw),
        frame=FrameTransform.stretch(image_hw, (192, 224)),
        activations=activations,
        detections=Detections(
            np.array([[20, 60, 150, 200], [160, 70, 300, 210]], dtype=np.float32),
            np.array([0.9, 0.4], dtype=np.float32),
            np.array([0, 1]),
        ),
    )


def one_map(feature_map: torch.Tensor, image_rgb, frame=None) -> VisSample:
    frame = frame or FrameTransform.stretch(
        image_rgb.shape[:2], tuple(feature_map.shape[1:])
    )
    activations = (Activation("neck", feature_map),)
    return VisSample("a", image_rgb, frame, Detections(), activations)


@pytest.fixture
def cells(monkeypatch):
    """The cells of the panels that the test draws, all of which must be there."""
    seen = []

    def spy(given, *args, **options):
        seen.append([replace(c, note=c.note.replace("\u00a0", " ")) for c in given])
        panel = montage_module.montage(given, *args, **options)
        assert panel.dtype == np.uint8
        assert all(contains(panel, cell.image_rgb) for cell in given)
        return panel

    monkeypatch.setattr(panel_module, "montage", spy)
    return seen


class TestPanel:
    def test_one_cell_per_layer_with_its_caption_and_overlay(self, cells):
        given = replace(sample(), note="one channel, grey")
        featmap_panel()(given)
        (row,) = cells
        assert [cell.title for cell in row] == ["000000000139", "backbone", "neck"]
        overview = "330 x 240 px · one channel, grey · 2 boxes with score > 0.3"
        assert row[0].note == overview
        for cell, activation in zip(row[1:], given.activations):
            assert cell.note.startswith("8 channels of 7 x 6 cells · channel ")
            channel = int(cell.note.split("channel ")[1].split(" ")[0])
            low, high = map(float, activation.feature_map[channel].aminmax())
            assert cell.note.endswith(f"values {low:.3g} to {high:.3g}")
            assert cell.scale == ColorScale("jet", low, high)
            # At this size nothing is resized.
            expected = ours(activation.feature_map, given.image_rgb)
            assert np.array_equal(cell.image_rgb, expected)

    def test_a_title_for_each_output_and_call(self, cells):
        feature_map = random_map(8, 6, 7)
        outputs = tuple(
            Activation(OutputKey("neck", call, (level,)).title, feature_map)
            for call, level in ((0, 0), (0, 1), (1, 0))
        )
        featmap_panel()(replace(sample(), activations=outputs))
        titles = [cell.title for cell in cells[0][1:]]
        assert titles == ["neck[0]", "neck[1]", "neck[0] (call 2)"]

    def test_topk_is_a_block_of_the_arrangement(self, cells):
        given = sample(image_hw=(240, 320))
        featmap_panel(channel_reduction=None, topk=5, arrangement=(2, 3))(given)
        assert "top 5 channels" in cells[0][1].note
        # Tiles have a range each.
        assert cells[0][1].scale == ColorScale("jet", None, None)
        image, *blocks = (cell.image_rgb for cell in cells[0])
        # Tiles of 240x320 with gaps of 4.
        assert {block.shape for block in blocks} == {(484, 968, 3)}
        assert (blocks[0][-1, -1] < 255).all()  # the place without a tile
        assert image.shape[:2] == (480, 640)
        # Each tile is what its channel looks like alone.
        activation = given.activations[0].feature_map
        upsampled = torch.nn.functional.interpolate(
            activation[None], (240, 320), mode="bilinear", align_corners=False
        )[0]
        chosen = torch.topk(upsampled.sum((1, 2)), 5).indices.tolist()
        for place, channel in enumerate(chosen):
            row, column = divmod(place, 3)
            tile = blocks[0][row * 244 :, column * 324 :][:240, :320]
            alone = mmengine_overlay(
                activation[channel : channel + 1],
                given.image_rgb,
                channel_reduction="select_max",
            )
            # Its label is in the first rows.
            assert np.array_equal(tile[40:], alone[40:])
            assert not np.array_equal(tile, alone)

    def test_captions_of_other_reductions(self, cells):
        featmap_panel(channel_reduction="squeeze_mean")(sample())
        assert "mean of channels" in cells[0][1].note
        featmap_panel(channel_reduction=None, topk=-1)(sample(channels=3))
        assert "3 channels of 7 x 6 cells · as a picture · values" in cells[1][1].note
        featmap_panel()(one_map(torch.full((4, 3, 3), 0.3), photo(240, 330)))
        assert cells[2][1].scale is None

    @pytest.mark.parametrize(
        ("image_hw", "cell_hw"), [((1500, 2000), (768, 1024)), ((96, 48), (320, 160))]
    )
    def test_cell_size(self, cells, image_hw, cell_hw):
        given = sample(image_hw)
        featmap_panel(alpha=1)(given)
        assert {cell.image_rgb.shape[:2] for cell in cells[0]} == {cell_hw}
        # A large image looks like its reduced overlay.
        full = ours(given.activations[0].feature_map, given.image_rgb, alpha=1)
        if image_hw > cell_hw:
            reduced = montage_module.resize_image(full, cell_hw)
            assert differences(cells[0][1].image_rgb, reduced).max() <= 8

    @pytest.mark.parametrize(
        ("count", "image_hw", "map_hw", "width"),
        [
            (4, (300, 400), (288, 384), 4),
            (6, (300, 400), (288, 384), 5),
            (7, (1500, 2000), (384, 512), 6),
            (12, (640, 320), (384, 192), 8),
        ],
    )
    def test_many_maps_stand_beside_the_image(
        self, cells, count, image_hw, map_hw, width
    ):
        """They are half as high as it; a column of the picture is a map's width."""
        layers = [f"neck[{number}]" for number in range(count)]
        panel = featmap_panel()(sample(image_hw, layers))
        (first,), maps = cells
        assert first.image_rgb.shape[:2] == tuple(2 * side for side in map_hw)
        assert {cell.image_rgb.shape[:2] for cell in maps} == {map_hw}
        assert [cell.title for cell in maps] == layers
        for cell in (first, *maps):
            assert contains(panel, cell.image_rgb)
        assert 0 < panel.shape[1] - width * map_hw[1] < 300
        assert (panel[-1] == 255).all()

    def test_channel_is_chosen_at_the_size_of_the_image(self, cells):
        # Five pixels from four cells weigh a corner by 1.3 * 1.3 and an inner cell
        # by 1.2 * 1.2; the 320 pixels of the drawing weigh all cells the same.
        feature_map = torch.zeros(2, 4, 4)
        feature_map[0, 0, 0] = 1.0
        feature_map[1, 1, 1] = 1.1
        featmap_panel()(one_map(feature_map, photo(5, 5)))
        assert "channel 0" in cells[0][1].note

    def test_boxes_follow_the_resized_image(self, cells):
        box = np.array([[30, 40, 90, 80]], np.float32)
        found = Detections(box, np.array([0.9], np.float32), np.array([0]))
        given = replace(sample((100, 120)), detections=found)
        featmap_panel(palette=[(255, 0, 0)])(given)
        red = pixels_of(cells[0][0].image_rgb, (255, 0, 0))
        columns = np.nonzero(red[120:].any(axis=0))[0]  # below the label
        assert (columns.min(), columns.max() + 1) == (80, 240)

    def test_letterbox_map_lies_on_the_object(self, cells):
        # 40x80 in a 64x64 input, padded by 16 rows above and below.
        feature_map = torch.zeros(1, 8, 8)
        feature_map[0, 4, 5] = 1.0
        feature_map[0, [0, 7]] = 50.0  # only in the padding
        frame = FrameTransform((40, 80), (64, 64), (0.8, 0.8), (0.0, 16.0))
        image_rgb = plain(40, 80, 0)
        featmap_panel(alpha=1)(one_map(feature_map, image_rgb, frame))
        alone = ours(feature_map, image_rgb, frame, alpha=1)
        # Cell centre: network pixel (36, 44), image (25, 55), cell four times that.
        for heat, scale in ((cells[0][1].image_rgb, 4), (alone, 1)):
            rows, columns = np.nonzero(pixels_of(heat, (128, 0, 0)))
            assert abs(rows.mean() + 0.5 - 25 * scale) < scale
            assert abs(columns.mean() + 0.5 - 55 * scale) < scale
            assert (heat[0, 0] == (0, 0, 128)).all()

    def test_errors_name_the_layer_or_the_option(self):
        panel = featmap_panel(channel_reduction=None, topk=-1)
        with pytest.raises(VisConfigError, match=r"layer .backbone.: .*has 8"):
            panel(sample())
        flat = Activation("head.fc", torch.zeros(8))
        with pytest.raises(FeatureShapeError, match=r"head\.fc.*\(8,\)"):
            featmap_panel()(replace(sample(), activations=(flat,)))
        wide = featmap_panel(channel_reduction=None, topk=4, arrangement=(1, 1024))
        with pytest.raises(VisConfigError, match=r"arrangement=\(1, 1024\)"):
            wide(sample())
