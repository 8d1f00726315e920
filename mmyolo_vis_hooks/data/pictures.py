"""Turns what a pipeline loads, and what a network is given, into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import VisConfigError

# Few pixels, such as a lamp or a dead sensor cell, must not decide the contrast.
_PERCENTILES = (1, 99)
_MAX_SAMPLED = 1_000_000


def picture_of(
    image: np.ndarray, channels: Sequence[int] | None = None
) -> tuple[np.ndarray, str]:
    """Make a picture for the eye of an image as pipelines hold it.

    Three channels of 8 bits are shown as they are, also where they were made floats;
    one is shown grey; of more the first three are blue, green and red. What has more
    than 8 bits is stretched between percentiles.

    Args:
        image (np.ndarray): ``(H, W)`` or ``(H, W, C)``, any real dtype, BGR.
        channels (Sequence[int], optional): The three that are shown as red, green and
            blue.

    Raises:
        VisConfigError: If ``channels`` names one that is not there.

    Returns:
        tuple: ``(H, W, 3)`` uint8, RGB, and what was done, empty if nothing.
    """
    stack = image[..., None] if image.ndim == 2 else image
    num_channels = stack.shape[2]
    shown, notes = _choose(num_channels, channels)
    pixels = stack[..., shown]
    if not _has_8_bits(pixels):
        # Bands of their own kind have ranges of their own; colours have one.
        axes = (0, 1) if num_channels > 3 else (0, 1, 2)
        pixels, low, high = _stretched(pixels, axes)
        notes.append(f"{low:.4g} to {high:.4g} shown as black to white")
    pixels = np.nan_to_num(pixels).round().astype(np.uint8)
    if len(shown) == 1:
        pixels = pixels.repeat(3, axis=2)
    return np.ascontiguousarray(pixels), ", ".join(notes)


def network_picture(
    inputs: torch.Tensor, preprocessor: Any, channels: Sequence[int] | None = None
) -> tuple[np.ndarray, str]:
    """Turn one network input ``(C, H, W)`` back into a picture.

    Returns:
        tuple: As of :func:`picture_of`.
    """
    image = inputs.detach().float()
    # A pipeline's own normalising leaves small numbers; nobody knows how it was.
    darkest_white = 16.0
    if getattr(preprocessor, "_enable_normalize", False):
        darkest_white = 1.1
        mean, std = preprocessor.mean.to(image), preprocessor.std.to(image)
        image = image * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    if getattr(preprocessor, "_channel_conversion", False) and len(image) == 3:
        image = image.flip(0)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    # Scaling and normalising leave no whole numbers of what had 8 bits.
    if pixels.min() > -1 and darkest_white < pixels.max() < 256:
        pixels = pixels.round().clip(0, 255)
    return picture_of(pixels, channels)


def _choose(
    num_channels: int, channels: Sequence[int] | None
) -> tuple[list[int], list[str]]:
    if channels is None and num_channels < 3:
        return [0], ["one channel" if num_channels == 1 else "channel 0 of 2"]
    shown = list(channels or (2, 1, 0))
    if max(shown) >= num_channels:
        raise VisConfigError(
            f"image_channels={shown} cannot work: the images have {num_channels} "
            "channels, counted from 0; name those that there are"
        )
    if shown == [2, 1, 0] and num_channels == 3:
        return shown, []
    names = ", ".join(map(str, shown))
    return shown, [f"channels {names} of {num_channels} as red, green, blue"]


def _has_8_bits(pixels: np.ndarray) -> bool:
    if pixels.dtype == np.uint8:
        return True
    if not np.issubdtype(pixels.dtype, np.floating) or not np.isfinite(pixels).all():
        return False
    if pixels.min() < 0 or not 1 < pixels.max() <= 255:
        return False
    return bool((pixels == np.rint(pixels)).all())


def _stretched(
    pixels: np.ndarray, axes: tuple[int, ...]
) -> tuple[np.ndarray, float, float]:
    values = pixels.astype(np.float32)
    values[~np.isfinite(values)] = np.nan
    step = max(1, int((values[..., 0].size / _MAX_SAMPLED) ** 0.5))
    sampled = values[::step, ::step]
    if np.isnan(sampled).all():
        return np.zeros_like(values), 0.0, 0.0
    low, high = np.nanpercentile(sampled, _PERCENTILES, axis=axes, keepdims=True)
    span = np.maximum(high - low, 1e-12)
    stretched = ((values - low) * (255 / span)).clip(0, 255)
    return stretched, float(np.nanmin(low)), float(np.nanmax(high))
