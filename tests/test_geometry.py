from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.geometry import FrameTransform, cells_per_pixel

# A 100x200 image, scaled by 0.32 to 32x64 and padded by 16 rows above and below.
LETTERBOX = FrameTransform((100, 200), (64, 64), (0.32, 0.32), (0.0, 16.0))


def upsampled(maps: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size_hw, mode="bilinear", align_corners=False)[0]


def random_maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("map_hw", "network_hw", "expected"),
    [
        ((25, 42), (800, 1333), (1 / 32, 1 / 32)),
        ((13, 13), (100, 100), (1 / 8, 1 / 8)),
        # No power of two gives 10 cells from 100 pixels: they divide it evenly.
        ((10, 10), (100, 100), (0.1, 0.1)),
        ((100, 100), (50, 50), (2.0, 2.0)),
    ],
)
def test_cells_per_pixel(map_hw, network_hw, expected):
    assert cells_per_pixel(map_hw, network_hw) == pytest.approx(expected)


def test_samplings_of_a_letterbox_by_hand():
    rows, columns = LETTERBOX.axis_samplings((8, 8))
    # Row 0 has its centre at network row 16 + 0.5 * 0.32 = 16.16, which is
    # 16.16 / 8 - 0.5 = 1.52 cells; row 99 is at 5.48.
    assert (rows.lower[0], rows.upper[0]) == (1, 2)
    assert rows.upper_weight[0] == pytest.approx(0.52)
    assert (rows.lower[99], rows.upper[99]) == (5, 6)
    assert rows.upper_weight[99] == pytest.approx(0.48)
    # Column 0 would be at -0.48: clamped to the outermost cell.
    assert (columns.lower[0], columns.upper_weight[0]) == (0, 0.0)
    assert (columns.lower[199], columns.upper[199]) == (7, 7)


@pytest.mark.parametrize(
    ("map_hw", "image_hw"), [((5, 7), (64, 96)), ((1, 1), (9, 5)), ((9, 4), (5, 11))]
)
def test_cell_weights_give_the_sum_of_the_upsampled_map(map_hw, image_hw):
    maps = random_maps(3, *map_hw).double()
    rows, columns = FrameTransform.stretch(image_hw, map_hw).axis_samplings(map_hw)
    weights = rows.cell_weights(map_hw[0]), columns.cell_weights(map_hw[1])
    sums = np.einsum("h,chw,w->c", weights[0], maps.numpy(), weights[1])
    np.testing.assert_allclose(sums, upsampled(maps, image_hw).sum((1, 2)))


class TestResample:
    @pytest.mark.parametrize(
        ("map_hw", "network_hw", "image_hw"),
        [((13, 17), (13, 17), (33, 50)), ((12, 16), (100, 133), (7, 9))],
    )
    def test_stretched_equals_interpolate(self, map_hw, network_hw, image_hw):
        maps = random_maps(2, *map_hw)
        frame = FrameTransform.stretch(image_hw, network_hw)
        assert torch.equal(frame.resample(maps), upsampled(maps, image_hw))
        # The same image at another size covers the network's input, too.
        assert torch.equal(
            frame.resized((5, 8)).resample(maps), upsampled(maps, (5, 8))
        )

    def test_letterbox_equals_upsampling_the_network_frame(self):
        # At scale 1 the image is a crop of the upsampled network frame.
        maps = random_maps(3, 8, 8)
        frame = FrameTransform((32, 64), (64, 64), (1.0, 1.0), (0.0, 16.0))
        expected = upsampled(maps, (64, 64))[:, 16:48]
        torch.testing.assert_close(frame.resample(maps), expected)

    def test_input_that_is_no_multiple_of_the_stride(self):
        # 100 pixels at stride 8 give 13 cells, which cover 104 pixels.
        maps = random_maps(2, 13, 13)
        expected = upsampled(maps, (104, 104))[:, :100, :100]
        found = FrameTransform.identity((100, 100)).resample(maps)
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("scale", [1, 3])
    def test_bright_cell_lights_the_right_pixels(self, scale):
        maps = torch.zeros(1, 8, 8)
        maps[0, 3, 6] = 1.0
        heat = LETTERBOX.resized((100 * scale, 200 * scale)).resample(maps)[0]
        row, column = divmod(int(heat.argmax()), 200 * scale)
        # The cell's centre is network pixel (28, 52): image ((28 - 16) / 0.32, ...).
        assert abs((row + 0.5) / scale - 12 / 0.32) <= 1
        assert abs((column + 0.5) / scale - 52 / 0.32) <= 1
        assert heat[: 10 * scale].max() == 0


class TestFromMetainfo:
    def test_letterbox(self):
        metainfo = dict(
            ori_shape=(100, 200),
            img_shape=(64, 64),
            batch_input_shape=(64, 96),
            scale_factor=(0.32, 0.32),
            pad_param=np.array([16, 16, 0, 0], dtype=np.float32),
        )
        expected = FrameTransform((100, 200), (64, 96), (0.32, 0.32), (0.0, 16.0))
        assert FrameTransform.from_metainfo(metainfo) == expected

    def test_without_scale_factor(self):
        frame = FrameTransform.from_metainfo({"img_shape": (64, 96)}, (32, 24))
        assert frame == FrameTransform((32, 24), (64, 96), (4.0, 2.0))

    @pytest.mark.parametrize(
        ("metainfo", "named"),
        [
            (dict(ori_shape=(4, 4), flip=True), "flip"),
            (dict(img_shape=(4, 4)), "ori_shape"),
            (dict(ori_shape=(4, 4)), "img_shape"),
            (
                dict(ori_shape=(4, 4), img_shape=(4, 4), pad_param=[0] * 4),
                "scale_factor",
            ),
        ],
    )
    def test_missing_key_is_named(self, metainfo, named):
        with pytest.raises(VisConfigError, match=named):
            FrameTransform.from_metainfo(metainfo)


def test_boxes_to_network():
    boxes = LETTERBOX.boxes_to_network(np.array([[0, 0, 200, 100]]))
    np.testing.assert_allclose(boxes, [[0, 16, 64, 48]], rtol=1e-6)
