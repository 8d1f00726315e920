from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmyolo_vis_hooks import featmap as feature_map_module
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError
from mmyolo_vis_hooks.featmap import (
    ValueRange,
    reduce_feature_map,
    validate_reduction_options,
)
from mmyolo_vis_hooks.geometry import FrameTransform


def random_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stretched(feature_map: torch.Tensor, image_hw=(64, 96)) -> FrameTransform:
    return FrameTransform.stretch(image_hw, tuple(feature_map.shape[1:]))


def reduced_of(feature_map: torch.Tensor, image_hw=(64, 96), **options):
    return reduce_feature_map(feature_map, stretched(feature_map, image_hw), **options)


def channels_after_upsampling(feature_map, image_hw, k):
    """What draw_featmap does: upsample all, sum, topk."""
    upsampled = F.interpolate(
        feature_map[None], image_hw, mode="bilinear", align_corners=False
    )[0]
    return tuple(torch.topk(upsampled.sum((1, 2)), k).indices.tolist())


# 100x200 within 64x64: 16 rows of padding above and below.
LETTERBOX = FrameTransform((100, 200), (64, 64), (0.32, 0.32), (0.0, 16.0))


class TestReductions:
    def test_by_hand(self):
        feature_map = torch.tensor([[[5.0, -9.0]], [[1.0, 1.0]], [[-3.0, 3.0]]])
        reduced = reduced_of(feature_map, channel_reduction="squeeze_mean")
        assert reduced.maps.tolist() == [[[1.0, pytest.approx(-5 / 3)]]]
        assert reduced.channels == ()
        assert reduced.shape == (3, 1, 2)
        reduced = reduced_of(feature_map, channel_reduction="select_max")
        assert reduced.channels == (1,)
        assert torch.equal(reduced.maps, feature_map[1:2])

    def test_topk_is_sorted_by_activity(self):
        feature_map = torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None, None].expand(4, 2, 3)
        reduced = reduced_of(feature_map, channel_reduction=None, topk=3)
        assert reduced.channels == (1, 3, 2)
        assert reduced.maps[:, 0, 0].tolist() == [4.0, 3.0, 2.0]
        assert [r.low for r in reduced.value_ranges] == [4.0, 3.0, 2.0]
        assert reduced.value_range == ValueRange(2.0, 4.0)
        # More than there are: all of them.
        options = dict(channel_reduction=None, topk=20, arrangement=(4, 5))
        assert sorted(reduced_of(feature_map, **options).channels) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("shape", "image_hw"),
        [
            ((33, 13, 17), (427, 640)),
            ((40, 5, 9), (33, 20)),
            ((16, 30, 40), (21, 17)),
            ((8, 1, 1), (50, 70)),
        ],
    )
    @pytest.mark.parametrize("chunk", [2**20, 300])
    def test_channels_are_those_after_upsampling(
        self, shape, image_hw, chunk, monkeypatch
    ):
        monkeypatch.setattr(feature_map_module, "_MAX_CELLS_AT_ONCE", chunk)
        options = dict(channel_reduction=None, topk=8, arrangement=(2, 4))
        for seed in range(3):
            feature_map = random_map(*shape, seed=seed)
            expected = channels_after_upsampling(feature_map, image_hw, 8)
            assert reduced_of(feature_map, image_hw, **options).channels == expected

    def test_cells_weigh_as_after_upsampling(self):
        # Five pixels from four cells: 1.3 * 1.3 for a corner, 1.2 * 1.2 inside.
        feature_map = torch.zeros(2, 4, 4)
        feature_map[0, 0, 0] = 1.0
        feature_map[1, 1, 1] = 1.1
        assert reduced_of(feature_map, (5, 5)).channels == (0,)
        # The single pixel of the image takes the middle cell only.
        feature_map = torch.zeros(2, 1, 9)
        feature_map[0, 0, [0, 8]] = 9.0
        feature_map[1, 0, 4] = 1.0
        assert reduced_of(feature_map, (1, 1)).channels == (1,)

    def test_ties_are_broken_as_in_torch_topk(self):
        feature_map = torch.zeros(20, 6, 6)
        feature_map[7] = feature_map[13] = random_map(6, 6).abs()
        options = dict(channel_reduction=None, topk=9, arrangement=(3, 3))
        expected = channels_after_upsampling(feature_map, (64, 96), 9)
        assert reduced_of(feature_map, **options).channels == expected

    def test_padding_does_not_count(self):
        feature_map = torch.zeros(2, 8, 8)
        feature_map[0, 0] = 100.0  # only in the padding
        feature_map[1, 4, 4] = 1.0
        feature_map[1, 7, 7] = -50.0
        reduced = reduce_feature_map(feature_map, LETTERBOX)
        assert reduced.channels == (1,)
        assert reduced.value_range == ValueRange(0.0, 1.0)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_picture_is_one_tile(self, channels):
        feature_map = random_map(channels, 4, 5)
        reduced = reduced_of(feature_map, channel_reduction=None, topk=-1)
        assert reduced.is_image
        assert torch.equal(reduced.maps, feature_map)
        assert len(reduced.value_ranges) == 1
        (tile,) = reduced.resampled_tiles(stretched(feature_map))
        assert tile.shape == ((64, 96) if channels == 1 else (3, 64, 96))


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("reduction", ["squeeze_mean", "select_max"])
    def test_half_precision_is_summed_in_single(self, dtype, reduction):
        # The sum over channels or pixels exceeds the largest half.
        feature_map = (random_map(6, 40, 40).abs() * 3e4).to(dtype)
        reduced, expected = (
            reduced_of(f, (640, 640), channel_reduction=reduction)
            for f in (feature_map, feature_map.float())
        )
        assert reduced.maps.dtype == torch.float32
        assert torch.isfinite(reduced.maps).all()
        torch.testing.assert_close(reduced.maps, expected.maps)
        assert reduced.channels == expected.channels

    def test_autocast_does_not_change_the_choice(self):
        feature_map = torch.ones(300, 8, 8)
        feature_map += torch.arange(300)[:, None, None] * 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert reduced_of(feature_map).channels == (299,)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
    def test_other_types(self, dtype):
        feature_map = (random_map(4, 5, 6) > 0).to(dtype)
        reduced = reduced_of(feature_map, channel_reduction="squeeze_mean")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        torch.testing.assert_close(reduced.maps[0], feature_map.to(wide).mean(0))

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    def test_non_finite_becomes_the_minimum_and_is_counted(self, bad):
        reduced = reduced_of(torch.tensor([[[4.0, 2.0], [bad, 3.0]]]))
        assert reduced.maps.tolist() == [[[4.0, 2.0], [2.0, 3.0]]]
        assert reduced.value_range == ValueRange(2.0, 4.0, 1)
        assert "1 NaN or inf" in str(reduced.value_range)

    def test_nothing_finite(self):
        feature_map = torch.full((3, 2, 2), math.nan)
        reduced = reduced_of(feature_map, channel_reduction="squeeze_mean")
        assert not reduced.maps.any()
        assert str(reduced.value_range) == "no finite value (4 NaN or inf)"
        (tile,) = reduced.resampled_tiles(stretched(feature_map))
        assert (tile == 0).all()

    def test_broken_channel_is_shown_unless_it_is_off_the_image(self):
        feature_map = random_map(5, 8, 8)
        feature_map[3, 4, 4] = math.nan
        feature_map[2, 0, 0] = math.inf  # in the padding
        reduced = reduce_feature_map(
            feature_map, LETTERBOX, channel_reduction=None, topk=5, arrangement=(1, 5)
        )
        assert reduced.channels[0] == 3
        assert [r.num_non_finite for r in reduced.value_ranges] == [1, 0, 0, 0, 0]
        assert torch.isfinite(reduced.maps).all()

    def test_constant_map_stays_constant(self):
        frame = FrameTransform.stretch((7, 9), (1, 1))
        reduced = reduce_feature_map(torch.full((4, 1, 1), 0.3), frame)
        # Interpolation alone leaves rounding errors here.
        assert len(frame.resample(reduced.maps).unique()) > 1
        (tile,) = reduced.resampled_tiles(frame)
        assert tile.min() == tile.max()
        assert str(reduced.value_range) == "constant 0.3"

    @pytest.mark.parametrize("reduction", ["squeeze_mean", "select_max", None])
    def test_input_is_left_alone(self, reduction):
        feature_map = random_map(3, 4, 4).requires_grad_()
        before = feature_map.detach().clone()
        reduced = reduced_of(feature_map, channel_reduction=reduction, topk=-1)
        assert not reduced.maps.requires_grad
        reduced.maps.fill_(7)
        assert torch.equal(feature_map, before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("reduction", ["squeeze_mean", "select_max", None])
    def test_device_does_not_matter(self, reduction):
        feature_map = random_map(32, 20, 20)
        there = reduced_of(feature_map.cuda(), channel_reduction=reduction)
        here = reduced_of(feature_map, channel_reduction=reduction)
        assert there.maps.device.type == "cpu"
        assert there.channels == here.channels
        torch.testing.assert_close(there.maps, here.maps)


class TestErrors:
    @pytest.mark.parametrize(
        ("feature_map", "part"),
        [
            (torch.zeros(4, 4), r"\(C, h, w\)"),
            (torch.zeros(3, 0, 4), r"\(C, h, w\)"),
            (torch.zeros(1, 2, 2, dtype=torch.complex64), "complex64"),
            ([1.0], "list"),
        ],
    )
    def test_no_feature_map(self, feature_map, part):
        with pytest.raises(FeatureShapeError, match=part):
            reduce_feature_map(feature_map, FrameTransform.identity((64, 64)))

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("squeze_mean", 4, (2, 2)), ["channel_reduction", "'squeeze_mean'"]),
            (("None", 4, (2, 2)), ["channel_reduction", "without quotation marks"]),
            ((3, 4, (2, 2)), ["channel_reduction=3", "select_max"]),
            ((None, 2.5, (2, 2)), ["topk=2.5", "-1"]),
            ((None, True, (2, 2)), ["topk=True"]),
            ((None, -1, (2, 2)), ["topk=-1", "has 9", "squeeze_mean"]),
            ((None, 5, (2, 2)), ["topk=5", "(2, 2)", "4 places", "(2, 3)"]),
            ((None, 4, (2,)), ["arrangement=(2,)", "(rows, columns)"]),
            ((None, 4, (2, 0)), ["arrangement=(2, 0)"]),
            (("select_max", 4, "22"), ["arrangement='22'"]),
        ],
    )
    def test_options(self, options, parts):
        names = ("channel_reduction", "topk", "arrangement")
        with pytest.raises(VisConfigError) as caught:
            reduced_of(random_map(9, 4, 4), **dict(zip(names, options)))
        for part in parts:
            assert part in str(caught.value)

    def test_topk_is_not_looked_at_where_it_is_not_used(self):
        validate_reduction_options("select_max", 20, (2, 2))
