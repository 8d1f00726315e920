"""Means, differences and intervals by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmyolo_vis_hooks.metrics.comparison import Comparison


def compared(comparison: Comparison) -> dict:
    return {(r.map, r.value, r.size): r for r in comparison.compute()}


def test_means_and_paired_differences_by_size():
    comparison = Comparison("box")
    comparison.update("a", 48.0, {"cam": {"e": 0.5}, "box": {"e": 0.25}})
    comparison.update("a", 160.0, {"cam": {"e": 0.75}, "box": {"e": 0.5}})
    comparison.update("b", 160.1, {"cam": {"e": 1.0}, "box": {"e": 0.75}})
    comparison.update("b", 50.0, {"cam": {}, "box": {"e": 0.5}})
    found = compared(comparison)
    cam = found["cam", "e", "all"]
    assert (cam.count, cam.mean) == (3, 0.75)  # of those that have a value
    assert (cam.difference, cam.difference_low, cam.difference_high) == (0.25,) * 3
    assert cam.is_clear
    assert cam.low == pytest.approx(0.625)  # of the first image alone
    assert cam.high == 1.0
    box = found["box", "e", "all"]
    assert (box.count, box.mean, box.difference) == (4, 0.5, 0.0)
    assert not box.is_clear
    alone = found["cam", "e", "< 48 px"]
    assert (alone.mean, alone.difference) == (0.5, 0.25)
    assert np.isnan([alone.low, alone.high, alone.difference_low]).all()
    assert not alone.is_clear  # of one image
    assert found["cam", "e", "48 to 160 px"].count == 1
    assert found["box", "e", "48 to 160 px"].count == 2
    assert found["cam", "e", "> 160 px"].mean == 1.0
    comparison.reset()
    assert comparison.compute() == []


def test_the_interval_is_that_of_a_mean_of_images():
    rng = np.random.default_rng(0)
    comparison = Comparison("none")
    values = rng.normal(2.0, 1.0, 400)
    for number, value in enumerate(values):  # four alike of each of 400 images
        for _ in range(4):
            comparison.update(str(number), 100.0, {"cam": {"e": float(value)}})
    own = compared(comparison)["cam", "e", "all"]
    half = 1.96 * values.std() / 20
    assert own.mean - own.low == pytest.approx(half, rel=0.1)
    assert own.high - own.mean == pytest.approx(half, rel=0.1)
    assert np.isnan(own.difference)
    assert not own.is_clear
