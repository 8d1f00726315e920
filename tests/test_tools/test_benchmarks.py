"""The benchmarks run, and measure both sides of what they compare."""

from __future__ import annotations

import sys
from unittest import mock

import boxam
import featmap
import numpy as np
import pytest
import vis_demo

from mmyolo_vis_hooks.attribution.methods import METHODS

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="read /proc, which only Linux has"
)


@pytest.fixture(scope="module")
def scene():
    return boxam.yolov5_s("cpu", 128)


def test_boxes_are_of_all_levels(scene):
    chosen = boxam.mixed_boxes(scene, 6)
    ours = boxam.explain(boxam.attributor(scene, method="layercam"), scene, chosen)
    assert [e.index for e in ours] == chosen
    assert len({e.layer for e in ours}) == 3


def test_explanations_are_measured(scene, monkeypatch):
    counts = boxam.measure_gradients(scene, 1)
    assert [row[5].split(":")[0] for row in counts] == ["<= 1.2", "<= 1.5", "<= 2"]
    monkeypatch.setattr(scene, "ablated", ("neck.top_down_layers.1",))
    with mock.patch.dict(METHODS):  # it registers one that keeps time
        (ablation,) = boxam.measure_ablation(scene, 1)
    assert ablation[5].startswith(">= 100")
    for row in (*counts, ablation):
        assert float(row[4]) > 0


def test_both_sides_draw_the_same():
    setting = ((320, 256), 64, "select_max", 1)
    sides = (featmap.OURS, featmap.MMENGINE)
    ours, theirs = (featmap.measure(side, *setting)[2] for side in sides)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.nightly
def test_memory_is_measured_in_a_process_of_its_own():
    setting = ((320, 256), 64, "select_max", 1)
    sides = (featmap.OURS, featmap.MMENGINE)
    ours, theirs = (featmap.in_a_process(side, *setting)[1] for side in sides)
    # Upsampling 64 channels takes 21 MB; ours never holds that much.
    all_channels = 320 * 256 * 64 * 4
    assert ours < all_channels / 2
    assert theirs > all_channels * 0.9


def test_what_does_not_fit_is_not_tried(monkeypatch):
    picture, tried = np.full((2, 2, 3), 100, np.uint8), []

    def fake(side, *setting):
        tried.append(side)
        slow = side == featmap.MMENGINE
        return (2.0, 4_270_000_000, picture - 2) if slow else (0.01, 10**7, picture)

    monkeypatch.setattr(featmap, "in_a_process", fake)
    monkeypatch.setattr(featmap, "available_bytes", lambda: 6e9)
    full_hd = featmap.row_of((1920, 1080), 512, "select_max", 5)
    assert full_hd[7:] == ["200x", "4.26 GB", "within 2", "100x, 4.00 GB: reached"]
    assert tried == [featmap.OURS, featmap.MMENGINE]
    # 512 channels of 12 megapixels, 4 bytes each.
    assert "needs 24.58 GB" in featmap.row_of((4000, 3000), 512, "select_max", 5)
    assert tried[2:] == [featmap.OURS]


@pytest.mark.nightly
@pytest.mark.real_data
def test_a_demo_is_measured_beside_a_plain_loop(shared_dir, monkeypatch):
    row = vis_demo.speed_of("featmap_vis_demo", 2, 1)
    assert row[4].endswith("of its speed")
    assert row[5].startswith(">= 0.8")
    sizes = vis_demo.watch_memory("featmap_vis_demo", 4)
    assert len(sizes) >= 4
    assert min(sizes) > 1e8
