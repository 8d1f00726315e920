"""Draws places with weights, such as those that a query sampled."""

from __future__ import annotations

import cv2
import numpy as np

_FILL, _EDGE = (255, 255, 255), (20, 24, 28)
_SHIFT = 4  # OpenCV takes sixteenths of a pixel
_LARGEST = 0.009  # radius, of the longest side


def draw_points(image_rgb: np.ndarray, points: np.ndarray, most: int = 64) -> None:
    """Draw white discs whose area is their weight, in place.

    Args:
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8.
        points (np.ndarray): ``(n, 3)``: x and y in pixels of the image, and the weight.
        most (int): Only so many are drawn, those of the largest weight.
    """
    order = np.argsort(-points[:, 2], kind="stable")[:most]
    largest = _LARGEST * max(image_rgb.shape[:2])
    for x, y, weight in points[order[::-1]]:
        radius = max(1.0, largest * np.sqrt(weight / max(points[order[0], 2], 1e-12)))
        centre = [round((value - 0.5) * 2**_SHIFT) for value in (x, y)]
        for grown, color in ((1.0, _EDGE), (0.0, _FILL)):
            size = round((radius + grown) * 2**_SHIFT)
            cv2.circle(image_rgb, centre, size, color, -1, cv2.LINE_AA, _SHIFT)
