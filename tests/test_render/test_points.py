"""Discs at places, as large as their weight."""

from __future__ import annotations

import numpy as np

from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.options import BoxAMOptions
from mmyolo_vis_hooks.records import BoxExplanation, BoxSample, Detections, LayerMap
from mmyolo_vis_hooks.render.boxam_panel import BoxAMPanel
from mmyolo_vis_hooks.render.points import draw_points
from mmyolo_vis_hooks.results import Explanations


def test_the_area_of_a_disc_is_its_weight():
    image = np.full((1000, 1000, 3), 90, np.uint8)
    draw_points(image, np.array([[200, 300, 4], [700, 300, 1], [5, 5, 0.1]]), most=2)
    white = (image == 255).all(axis=2)
    assert not (image[:20, :20] != 90).any()
    large, small = white[:, :450], white[:, 450:]
    for part, centre in ((large, 200), (small, 700 - 450)):
        rows, columns = np.nonzero(part)
        assert abs(rows.mean() + 0.5 - 300) < 0.3
        assert abs(columns.mean() + 0.5 - centre) < 0.3
    assert 3 < large.sum() / small.sum() < 5


def test_points_of_a_result_lie_on_the_image():
    """The image is halved and moved by 8 and 4 pixels in the network's input."""
    frame = FrameTransform((100, 200), (64, 128), (0.5, 0.5), (8.0, 4.0))
    image = np.zeros((100, 200, 3), np.uint8)
    box = np.array([[40, 20, 120, 80]], np.float32)
    found = Detections(box, np.array([0.9], np.float32), np.array([0]))
    points = np.array([[8 + 30, 4 + 20, 1.0]], np.float32)  # 60 and 40 of the image
    maps = (LayerMap("decoder attention", np.zeros((8, 16), np.float32)),)
    without, with_points = (
        BoxSample("a", image, frame, found, (BoxExplanation(0, maps, points=own),))
        for own in (None, points)
    )
    panel = BoxAMPanel(BoxAMOptions(), ("dog",))
    (explanation,) = Explanations(with_points, panel)
    np.testing.assert_allclose(explanation.points, [[60, 40, 1.0]], atol=1e-5)
    assert Explanations(without, panel)[0].points is None
    one, other = panel(without), panel(with_points)
    height = min(len(one), len(other))
    changed = (one[-height:] != other[-height:]).any(axis=2)
    assert (other[-height:][changed] == 255).any()
