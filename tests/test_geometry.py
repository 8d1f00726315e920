from __future__ import annotations

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
        ((41, 62), (333, 500), (1 / 8, 1 / 8)),
        # No power of two gives 10 cells from 100 pixels: they divide it evenly.
        ((10, 10), (100, 100), (0.1, 0.1)),
        ((100, 100), (50, 50), (2.0, 2.0)),
    ],
)
def test_cells_per_pixel(map_hw, network_hw, expected):
    assert cells_per_pixel(map_hw, network_hw) == pytest.approx(expected)


class TestResample:
    @pytest.mark.parametrize(
        ("map_hw", "network_hw", "image_hw"),
        [((13, 17), (13, 17), (33, 50)), ((10, 16), (100, 133), (7, 9))],
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

    def test_a_map_that_leaves_the_last_pixels_out(self):
        image = torch.zeros(1, 1, 93, 125)
        image[..., 56:64, 104:112] = 1
        maps = F.avg_pool2d(image, 8)[0]
        found = FrameTransform.identity((93, 125)).resample(maps)[0]
        assert found.shape == (93, 125)
        rows, columns = (found == found.max()).nonzero(as_tuple=True)
        assert (float(rows.float().mean()), float(columns.float().mean())) == (
            59.5,
            107.5,
        )

    def test_input_that_is_no_multiple_of_the_stride(self):
        # 100 pixels at stride 8 give 13 cells, which cover 104 pixels.
        maps = random_maps(2, 13, 13)
        expected = upsampled(maps, (104, 104))[:, :100, :100]
        found = FrameTransform.identity((100, 100)).resample(maps)
        torch.testing.assert_close(found, expected)


class TestFromMetainfo:
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
