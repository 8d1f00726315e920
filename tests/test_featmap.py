"""Which channels are chosen, and what is left of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmyolo_vis_hooks.errors import FeatureShapeError
from mmyolo_vis_hooks.featmap import ReducedMaps, ValueRange, reduce_feature_map
from mmyolo_vis_hooks.geometry import FrameTransform

# 100x200 within 64x64: 16 rows of padding above and below.
LETTERBOX = FrameTransform((100, 200), (64, 64), (0.32, 0.32), (0.0, 16.0))


def random_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stretched(feature_map: torch.Tensor, image_hw=(64, 96)) -> FrameTransform:
    return FrameTransform.stretch(image_hw, tuple(feature_map.shape[1:]))


def reduced(feature_map: torch.Tensor, image_hw=(64, 96), **options) -> ReducedMaps:
    return reduce_feature_map(feature_map, stretched(feature_map, image_hw), **options)


def after_upsampling(feature_map, image_hw, k) -> tuple[int, ...]:
    """What draw_featmap does: upsample all, sum, topk."""
    upsampled = F.interpolate(
        feature_map[None], image_hw, mode="bilinear", align_corners=False
    )[0]
    return tuple(torch.topk(upsampled.sum((1, 2)), k).indices.tolist())


class TestReductions:
    def test_by_hand(self):
        feature_map = torch.tensor([[[5.0, -9.0]], [[1.0, 1.0]], [[-3.0, 3.0]]])
        mean = reduced(feature_map, channel_reduction="squeeze_mean")
        assert mean.maps.tolist() == [[[1.0, pytest.approx(-5 / 3)]]]
        assert mean.channels == ()
        largest = reduced(feature_map)
        assert largest.channels == (1,)
        assert torch.equal(largest.maps, feature_map[1:2])

    def test_topk_is_sorted_by_activity(self):
        feature_map = torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None, None].expand(4, 2, 3)
        top = reduced(feature_map, channel_reduction=None, topk=3)
        assert top.channels == (1, 3, 2)
        assert top.maps[:, 0, 0].tolist() == [4.0, 3.0, 2.0]
        assert [r.low for r in top.value_ranges] == [4.0, 3.0, 2.0]
        assert top.value_range == ValueRange(2.0, 4.0)
        # More than there are: all of them.
        assert len(reduced(feature_map, channel_reduction=None, topk=9).channels) == 4

    @pytest.mark.parametrize(
        ("shape", "image_hw"),
        [
            ((33, 13, 17), (427, 640)),
            ((40, 5, 9), (33, 20)),
            ((16, 30, 40), (21, 17)),
            ((8, 1, 1), (50, 70)),
        ],
    )
    def test_channels_are_those_after_upsampling(self, shape, image_hw):
        for seed in range(3):
            feature_map = random_map(*shape, seed=seed)
            found = reduced(feature_map, image_hw, channel_reduction=None, topk=8)
            assert found.channels == after_upsampling(feature_map, image_hw, 8)
        ties = torch.zeros(20, 6, 6)
        ties[7] = ties[13] = random_map(6, 6).abs()
        found = reduced(ties, channel_reduction=None, topk=9)
        assert found.channels == after_upsampling(ties, (64, 96), 9)

    def test_padding_does_not_count(self):
        feature_map = torch.zeros(2, 8, 8)
        feature_map[0, 0] = 100.0  # only in the padding
        feature_map[1, 4, 4] = 1.0
        feature_map[1, 7, 7] = -50.0
        found = reduce_feature_map(feature_map, LETTERBOX)
        assert found.channels == (1,)
        assert found.value_range == ValueRange(0.0, 1.0)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["squeeze_mean", "select_max"])
    def test_half_precision_is_summed_in_single(self, dtype, reduction):
        # The sum over channels or pixels exceeds the largest half.
        feature_map = (random_map(6, 40, 40).abs() * 3e4).to(dtype)
        found, expected = (
            reduced(f, (640, 640), channel_reduction=reduction)
            for f in (feature_map, feature_map.float())
        )
        assert found.maps.dtype == torch.float32
        torch.testing.assert_close(found.maps, expected.maps)
        assert found.channels == expected.channels

    def test_autocast_does_not_change_the_choice(self):
        feature_map = torch.ones(300, 8, 8)
        feature_map += torch.arange(300)[:, None, None] * 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert reduced(feature_map).channels == (299,)

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    def test_non_finite_becomes_the_minimum_and_is_counted(self, bad):
        found = reduced(torch.tensor([[[4.0, 2.0], [bad, 3.0]]]))
        assert found.maps.tolist() == [[[4.0, 2.0], [2.0, 3.0]]]
        assert found.value_range == ValueRange(2.0, 4.0, 1)
        assert str(found.value_range) == "values 2 to 4 (1 NaN or inf)"
        nothing = reduced(torch.full((3, 2, 2), bad), channel_reduction="squeeze_mean")
        assert not nothing.maps.any()
        assert str(nothing.value_range) == "no finite value (4 NaN or inf)"

    def test_broken_channel_is_shown_unless_it_is_off_the_image(self):
        feature_map = random_map(5, 8, 8)
        feature_map[3, 4, 4] = math.nan
        feature_map[2, 0, 0] = math.inf  # in the padding
        options = dict(channel_reduction=None, topk=5)
        found = reduce_feature_map(feature_map, LETTERBOX, **options)
        assert found.channels[0] == 3
        assert [r.num_non_finite for r in found.value_ranges] == [1, 0, 0, 0, 0]
        assert torch.isfinite(found.maps).all()

    def test_values_between_the_pixels_of_a_small_image_count(self):
        feature_map = torch.zeros(1, 80, 80)
        feature_map[0, 11, 11] = 3
        found = reduced(feature_map, (8, 8), channel_reduction="squeeze_mean")
        assert found.value_range == ValueRange(0.0, 3.0)

    def test_constant_map_stays_constant(self):
        frame = FrameTransform.stretch((7, 9), (1, 1))
        found = reduce_feature_map(torch.full((4, 1, 1), 0.3), frame)
        # Interpolation alone leaves rounding errors here.
        assert len(frame.resample(found.maps).unique()) > 1
        (tile,) = found.resampled_tiles(frame)
        assert tile.min() == tile.max()
        assert str(found.value_range) == "constant 0.3"

    @pytest.mark.parametrize("reduction", ["squeeze_mean", "select_max", None])
    def test_input_is_left_alone_on_any_device(self, reduction):
        feature_map = random_map(3, 4, 4).requires_grad_()
        before = feature_map.detach().clone()
        found = reduced(feature_map, channel_reduction=reduction, topk=-1)
        assert not found.maps.requires_grad
        if torch.cuda.is_available():
            there = reduced(feature_map.cuda(), channel_reduction=reduction, topk=-1)
            assert there.channels == found.channels
            torch.testing.assert_close(there.maps, found.maps)
        found.maps.fill_(7)
        assert torch.equal(feature_map, before)


@pytest.mark.parametrize(
    ("feature_map", "part"),
    [
        (torch.zeros(4, 4), r"shape \(4, 4\).* real \(C, h, w\)"),
        (torch.zeros(3, 0, 4), r"shape \(3, 0, 4\)"),
        (torch.zeros(1, 2, 2, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_is_no_feature_map(feature_map, part):
    with pytest.raises(FeatureShapeError, match=part):
        reduce_feature_map(feature_map, FrameTransform.identity((64, 64)))
