"""Images that are decoded already, made what the loader of a pipeline would give."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch

from ..errors import VisConfigError

# Of Pillow: palettes, inks and the like are no colours that a network knows.
_PLAIN_MODES = {"P": None, "PA": None, "1": "L", "CMYK": "RGB", "YCbCr": "RGB"}
_PLAIN_MODES.update({"LAB": "RGB", "HSV": "RGB", "RGBX": "RGB", "LA": "RGBA"})
_CV_DTYPES = ("uint8", "uint16", "int16", "float32", "float64")


def array_bgr(image: Any) -> np.ndarray:
    """Read a decoded image, of NumPy, torch or Pillow; three channels are RGB.

    Returns:
        np.ndarray: ``(H, W)`` or ``(H, W, C)``, in a dtype of OpenCV; three channels
        are in the order BGR, those of a transparent image of Pillow BGRA.

    Raises:
        VisConfigError: If it is none.
    """
    image = _plain(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    array = np.asarray(image)
    if array.ndim == 0:
        raise VisConfigError(
            f"an image of type {type(image).__name__} cannot work: use a path, an "
            "address, an array, a Pillow image, or a list of them"
        )
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "uif":
        raise VisConfigError(
            f"an image of shape {array.shape} and {array.dtype} cannot work: use "
            "(H, W, 3) RGB, (H, W) or (H, W, C) numbers, a Pillow image or a path"
        )
    # OpenCV takes no note of another order of bytes, as of FITS files.
    native = array.dtype.name if array.dtype.name in _CV_DTYPES else "float32"
    array = array.astype(native, copy=False)
    if array.ndim == 3 and array.shape[2] == 3:
        array = array[..., ::-1]
    elif getattr(image, "mode", None) == "RGBA":
        array = array[..., [2, 1, 0, 3]]
    return np.ascontiguousarray(array)


def as_decoded(image: Any, color_type: str, to_float32: bool) -> np.ndarray:
    """Make a decoded image what ``LoadImageFromFile`` gives of a file.

    Args:
        image: As of :func:`array_bgr`.
        color_type (str): Of the loader. ``'unchanged'`` takes any number of channels
            and of bits; else there are 8 bits, and no transparency.
        to_float32 (bool): Of the loader.

    Raises:
        VisConfigError: If the loader never gives the like.
    """
    image = _plain(image)
    if color_type != "unchanged" and getattr(image, "mode", None) == "RGBA":
        image = image.convert("RGB")
    array = array_bgr(image)
    channels = num_channels(array)
    if color_type != "unchanged" and channels > 4 and array.shape[0] == 3:
        raise VisConfigError(
            f"an image of shape {array.shape} cannot work: move the channels to the end"
        )
    # Bands, which a network takes that no file of colours suits.
    if color_type != "unchanged" and channels in (1, 3, 4):
        grey = "grayscale" in color_type
        array = _with_channels(_of_8_bits(array), grey=grey)
    return array.astype(np.float32) if to_float32 else array


def _plain(image: Any) -> Any:
    mode = getattr(image, "mode", None)
    return image.convert(_PLAIN_MODES[mode]) if mode in _PLAIN_MODES else image


def num_channels(image: np.ndarray) -> int:
    """Channels of an image ``(H, W)`` or ``(H, W, C)``."""
    return 1 if image.ndim == 2 else image.shape[2]


def _with_channels(array: np.ndarray, *, grey: bool) -> np.ndarray:
    channels = num_channels(array)
    if channels == 1:
        single = array.reshape(array.shape[:2])
        return single if grey else np.repeat(single[..., None], 3, axis=2)
    if channels == 4:  # RGBA
        array = np.ascontiguousarray(array[..., 2::-1])
    return cv2.cvtColor(array, cv2.COLOR_BGR2GRAY) if grey else array


def _of_8_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):  # NaN is not, either
        remedy = "scale it to 0 to 255"
    elif array.dtype.kind == "f" and 0 < high <= 1:
        remedy = "multiply it by 255"
    else:
        whole = np.array_equal(array, np.rint(array))
        return array.astype(np.uint8 if whole else np.float32)
    raise VisConfigError(
        f"an image of {array.dtype} from {low:.4g} to {high:.4g} cannot work: the test "
        f"pipeline loads values of 0 to 255; {remedy}"
    )
