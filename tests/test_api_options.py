"""Every method, target and option does something, seen through ``explain``."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from mmengine.registry import MODELS
from torch import nn

from mmyolo_vis_hooks import explain, feature_maps
from mmyolo_vis_hooks.attribution.methods import METHODS
from tests.toy_boxes import box_detector


@pytest.fixture(scope="module")
def detector(tmp_path_factory, toy_data) -> nn.Module:
    return box_detector(tmp_path_factory.mktemp("one"), toy_data)


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory, toy_data) -> nn.Module:
    return box_detector(tmp_path_factory.mktemp("two"), toy_data, 2)


@pytest.fixture(scope="module")
def photo(toy_data) -> str:
    return str(toy_data / "folder3" / "image.png")


@pytest.fixture(scope="module")
def picture_of(detector, photo):
    """The picture with some options, each made once."""
    found: dict[str, np.ndarray] = {}

    def get(**options: Any) -> np.ndarray:
        key = repr(sorted(options.items()))
        if key not in found:
            given = {"score_thr": 0.2, "num_masks": 64, **options}
            found[key] = explain(detector, photo, **given).draw()
        return found[key]

    return get


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape != other.shape or bool((one != other).mean() > 1e-4)


@pytest.mark.parametrize(
    "method", [m.name for m in METHODS.values() if m.kind != "attention"]
)
def test_every_method_finds_where(detector, photo, method) -> None:
    result = explain(
        detector, photo, method=method, topk=3, score_thr=0.2, num_masks=64
    )
    assert len(result) == 3
    for box in result:
        assert box.note == ""
        (raw,) = box.raw_maps.values()
        assert np.isfinite(raw).all()
        assert raw.min() >= 0 or method == "evidence"
        assert raw.max() > 1.2 * raw.min()
        assert np.abs(box.saliency).max() == 1
    assert result.draw().std() > 1


@pytest.mark.parametrize(
    "options",
    [
        dict(smooth=0.4),
        dict(smooth=0.0),
        dict(norm_in_bbox=True),
        dict(alpha=0.2),
        dict(colormap="jet"),
        dict(eigen_smooth=True),
        dict(aug_smooth=True),
        dict(max_shape=4),
        dict(max_shape=(4, 8)),
        dict(scope="class"),
        dict(scope="image"),
        dict(topk=1),
        dict(score_thr=0.5),
        dict(target="logit"),
        dict(method="gradcam"),
        dict(target_layers="backbone"),
    ],
    ids=str,
)
def test_the_option_shows_in_the_picture(picture_of, options) -> None:
    assert differ(picture_of(**options), picture_of())


TWO_LAYERS = dict(target_layers=["backbone", "neck"])


@pytest.mark.parametrize(
    ("basic", "options"),
    [
        (dict(method="drise"), dict(num_masks=32)),
        (dict(method="evidence"), dict(steps=2)),
        (dict(method="evidence"), dict(masks=0)),
        (dict(method="evidence"), dict(baseline="black")),
        (dict(method="evidence"), dict(baseline="mean")),
        (dict(method="evidence"), dict(signed=False)),
        (TWO_LAYERS, dict(fusion="max")),
        (TWO_LAYERS, dict(fusion="product")),
        (TWO_LAYERS, dict(normalize_layers=True)),
    ],
    ids=str,
)
def test_the_option_shows_with_another(picture_of, basic, options) -> None:
    assert differ(picture_of(**basic, **options), picture_of(**basic))


@pytest.mark.parametrize("method", ["ablationcam", "scorecam", "drise", "evidence"])
def test_the_batch_size_changes_nothing(detector, photo, method) -> None:
    one, five = (
        explain(
            detector, photo, method=method, topk=3, num_masks=32, batch_size=size,
            score_thr=0.2,
        )
        for size in (1, 5)
    )  # fmt: skip
    for alone, together in zip(one, five):
        np.testing.assert_allclose(alone.saliency, together.saliency, atol=1e-4)


# Which boxes.


def test_the_best_boxes_above_the_threshold_are_explained(detector, photo) -> None:
    everything = explain(detector, photo, topk=-1, score_thr=0.0)
    scores = [box.score for box in everything]
    assert len(scores) == len(everything.detections) > 2
    assert scores == sorted(scores, reverse=True)
    two = explain(detector, photo, topk=2, score_thr=0.0)
    assert [box.score for box in two] == scores[:2]
    above = explain(detector, photo, topk=-1, score_thr=scores[-2])
    assert [box.score for box in above] == scores[:-2]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["lamp"], {"lamp"}),
        ("lamp", {"lamp"}),
        (1, {"lamp"}),
        (["square", 1], {"square", "lamp"}),
        (None, {"square", "lamp"}),
    ],
)
def test_classes_by_name_and_index(two_classes, photo, classes, names) -> None:
    result = explain(two_classes, photo, classes=classes, topk=-1, score_thr=0.2)
    assert {box.class_name for box in result} == names
    # The others are found and drawn, but not explained.
    assert set(result.detections.labels) == {0, 1}


@pytest.mark.parametrize("method", ["boxam", "drise", "ablationcam", "evidence"])
def test_an_image_without_detections_is_drawn(detector, photo, method) -> None:
    result = explain(detector, photo, score_thr=0.999, method=method)
    assert len(result) == 0
    assert result.draw().std() > 1
    assert repr(result).endswith("px: no box)")
    assert result.arrays()["saliency"].shape == (0, *result.image_rgb.shape[:2])


def test_a_layer_without_influence_says_where_the_box_was_made(
    detector, photo, caplog
) -> None:
    """Boxes of the first level know nothing of the second level's maps."""
    caplog.set_level(logging.WARNING)
    layer = "neck.maps.out_layers[1]"
    result = explain(detector, photo, layers=layer, score_thr=0.2, topk=-1)
    blank = [box for box in result if not box.raw_maps]
    assert blank
    note = f"{layer}: no influence on this box; it was made at neck[0]"
    assert {box.note for box in blank} == {note}
    assert all(not box.saliency.any() for box in blank)
    # One line for each box, whatever filters the logger has.
    lines = [record.msg for record in caplog.records if note in record.getMessage()]
    assert len(set(lines)) == len(blank)


@pytest.mark.parametrize("layers", [None, "neck"])
@pytest.mark.parametrize("target", ["score", "logit"])
def test_a_saturated_box_says_so_and_the_others_have_maps(
    tmp_path, toy_data, photo, target, layers
) -> None:
    own = box_detector(tmp_path, toy_data)
    # Only bright places are certain to the last digit of a float32.
    nn.init.constant_(own.bbox_head.cls[0].bias, 15.0)
    own.bbox_head.test_cfg["max_per_img"] = 40
    how = dict(target=target, layers=layers, score_thr=0.2)
    result = explain(own, photo, topk=-1, **how)
    saturated = [box for box in result if box.score == 1]
    assert 0 < len(saturated) < len(result)
    for box in result:
        assert ("saturated" in box.note) == (box.score == 1)
    assert any(box.raw_maps for box in result)
    (best,) = explain(own, photo, topk=1, **how)
    assert "saturated" in best.note


@pytest.mark.parametrize(
    "options",
    [
        dict(channel_reduction="select_max"),
        dict(channel_reduction=None),
        dict(channel_reduction=None, topk=2),
        dict(channel_reduction=None, arrangement=(1, 4)),
        dict(alpha=0.2),
        dict(colormap="viridis"),
        dict(score_thr=1),
        dict(target_layers="backbone"),
    ],
    ids=str,
)
def test_the_option_shows_in_the_picture_of_feature_maps(
    detector, photo, options
) -> None:
    basic: dict[str, Any] = dict(target_layers="neck", score_thr=0.2)
    before = feature_maps(detector, photo, **basic).draw()
    assert differ(before, feature_maps(detector, photo, **{**basic, **options}).draw())


@pytest.mark.parametrize("look", [explain, feature_maps])
def test_alignments_show_another_picture(detector, toy_data, look) -> None:
    wide = toy_data / "folder0" / "image.png"
    image_hw = (96, 160)
    by_default = look(detector, wide, score_thr=0.2)
    assert by_default.image_rgb.shape[:2] == image_hw
    assert look(detector, wide, alignment="letterbox").image_rgb.shape[:2] == image_hw
    assert look(detector, wide, alignment="network").image_rgb.shape[:2] == (128, 128)
    resized = look(detector, wide, alignment="resize", score_thr=0.2)
    np.testing.assert_array_equal(resized.draw(), by_default.draw())


def test_image_channels_choose_what_is_shown(tmp_path, toy_data) -> None:
    """Five channels go into the network, three are shown."""
    resize = dict(type="mmdet.Resize", scale=(128, 96), keep_ratio=False)
    own = box_detector(tmp_path, toy_data, geometry=(resize,))
    rng = np.random.RandomState(0)
    image = rng.randint(0, 255, (64, 96, 3)).astype(np.uint8)
    five = np.concatenate([image, image[..., :2] // 2], axis=2)
    own.data_preprocessor = MODELS.build(
        dict(
            type="mmdet.DetDataPreprocessor",
            pad_size_divisor=32,
        )
    )
    own.backbone.stages[0] = nn.Conv2d(5, 8, 3, 2, 1)
    first = feature_maps(own, five, layers="neck")
    chosen = feature_maps(own, five, layers="neck", image_channels=(4, 3, 0))
    assert (first.image_rgb != chosen.image_rgb).any()
    np.testing.assert_array_equal(chosen.image_rgb[..., 2], five[..., 0])
    assert "channels" in chosen.note
