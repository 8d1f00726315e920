"""Writes pictures whole or not at all."""

from __future__ import annotations

import os

import cv2
import numpy as np

from ..errors import PublishError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_JPEG_QUALITY = 92


def write_image(file: str, image_rgb: np.ndarray) -> None:
    """Write a picture whole or not at all.

    Args:
        file (str): Its suffix says the format.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB.

    Raises:
        PublishError: If it cannot be written.
    """
    suffix = os.path.splitext(file)[1].lower()
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if "jp" in suffix else []
    whole, content = cv2.imencode(suffix, image_rgb[..., ::-1], options)
    if not whole:
        raise PublishError(f"OpenCV cannot write a picture of {suffix}: {file}")
    temporary = f"{file}.part"
    try:
        with open(temporary, "wb") as opened:
            opened.write(content.tobytes())
        os.replace(temporary, file)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise PublishError(f"cannot write {file}: {error.strerror}") from error
