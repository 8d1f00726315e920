"""Discs at places, as large as their weight."""

from __future__ import annotations

import numpy as np

from mmyolo_vis_hooks.geometry import FrameTransform
from mmyolo_vis_hooks.render.points import draw_points


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


def test_places_of_the_input_are_those_of_boxes_put_back():
    frame = FrameTransform((100, 200), (64, 128), (0.5, 0.6), (8.0, 4.0))
    boxes = np.array([[10, 20, 50, 60]], np.float32)
    network = frame.boxes_to_network(boxes)
    np.testing.assert_allclose(
        frame.points_to_image(network.reshape(2, 2)), boxes.reshape(2, 2), atol=1e-5
    )
