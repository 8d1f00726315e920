"""Colours maps and lays them over an image."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import cv2
import numpy as np

from ..errors import VisConfigError

_OPENCV_PREFIX = "COLORMAP_"
# Rounding errors of a mean over channels stay below this share of a level.
_UNDECIDED = 0.01
_SMALL_STEP = 4
_FULL_SHARE_FROM = np.float32(0.5)


def colormap_lut(colormap: str | int = "jet") -> np.ndarray:
    """Look up a colour map by name.

    A name that both libraries know means OpenCV's map.

    Args:
        colormap (str | int): An OpenCV name (``'jet'``, ``'COLORMAP_VIRIDIS'``)
            or constant (``cv2.COLORMAP_JET``), or a matplotlib name
            (``'magma_r'``, ``'Blues'``). Defaults to ``'jet'``.

    Returns:
        np.ndarray: ``(256, 1, 3)`` uint8, RGB, read-only.

    Raises:
        VisConfigError: If nobody knows the colour map.
    """
    if isinstance(colormap, bool) or not isinstance(colormap, (str, Integral)):
        raise VisConfigError(
            f"colormap={colormap!r} is neither a name nor an OpenCV constant; set a "
            "name such as 'jet' or 'viridis'"
        )
    return _colormap_lut(colormap if isinstance(colormap, str) else int(colormap))


@lru_cache(maxsize=32)
def _colormap_lut(colormap: str | int) -> np.ndarray:
    known = {
        name[len(_OPENCV_PREFIX) :].lower(): getattr(cv2, name)
        for name in dir(cv2)
        if name.startswith(_OPENCV_PREFIX)
    }
    if isinstance(colormap, int) and colormap not in known.values():
        raise VisConfigError(
            f"colormap={colormap} is no OpenCV constant; they are 0 to "
            f"{max(known.values())}, or set a name such as 'jet'"
        )
    plain = str(colormap).lower().removeprefix(_OPENCV_PREFIX.lower())
    constant = colormap if isinstance(colormap, int) else known.get(plain)
    if constant is not None:
        levels = np.arange(256, dtype=np.uint8)[:, None]
        lut = cv2.applyColorMap(levels, constant)[..., ::-1].copy()
    else:
        lut = _matplotlib_lut(str(colormap), known)
    lut.flags.writeable = False
    return lut


def _matplotlib_lut(colormap: str, others: Iterable[str]) -> np.ndarray:
    # Only its own names cost the import.
    import matplotlib

    maps = matplotlib.colormaps
    names = {name.lower(): name for name in maps}
    name = colormap if colormap in maps else names.get(colormap.lower())
    if name is None:
        plain = colormap.lower().removeprefix(_OPENCV_PREFIX.lower())
        near = difflib.get_close_matches(plain, [*others, *names], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise VisConfigError(
            f"colormap={colormap!r} is unknown; {hint}Set a name of OpenCV, such as "
            "'jet', or of matplotlib, such as 'magma_r'"
        )
    colors = maps[name](np.linspace(0.0, 1.0, 256), bytes=True)
    return np.ascontiguousarray(colors[:, None, :3])


def validate_overlay_options(alpha: Any, colormap: Any) -> None:
    """Check the options of an overlay.

    Args:
        alpha (float): Share of the heat map in the blend, 0 to 1.
        colormap (str | int): See :func:`colormap_lut`.

    Raises:
        VisConfigError: If a value can never work.
    """
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, Real)
        or not 0.0 <= float(alpha) <= 1.0
    ):
        raise VisConfigError(
            f"alpha={alpha!r} is no share; set a number from 0 (only the image) to 1 "
            "(only the heat map)"
        )
    colormap_lut(colormap)


def stretch_to_levels(values: np.ndarray) -> np.ndarray:
    """Stretch values to 0..255; a constant map becomes 0 everywhere.

    Args:
        values (np.ndarray): ``(H, W)`` or ``(H, W, 3)``, floating point, finite.

    Returns:
        np.ndarray: Same shape and dtype. The level is what is left when the
        fraction is cut off.
    """
    # Not dtype=cv2.CV_8U: that rounds, and MMEngine cuts.
    stretched = np.empty_like(values)
    cv2.normalize(values, stretched, 0, 255, cv2.NORM_MINMAX)
    return stretched


def heat_levels(values: np.ndarray) -> np.ndarray:
    """The levels that :func:`color_heatmap` gives colours.

    Args:
        values (np.ndarray): ``(H, W)`` or ``(3, H, W)``, floating point, finite.

    Returns:
        np.ndarray: ``(H, W)`` uint8.
    """
    if values.ndim == 2:
        return stretch_to_levels(values).astype(np.uint8)
    picture_bgr = stretch_to_levels(np.ascontiguousarray(values.transpose(1, 2, 0)))
    return cv2.cvtColor(picture_bgr.astype(np.uint8), cv2.COLOR_BGR2GRAY)


def color_heatmap(
    values: np.ndarray, colormap: str | int = "jet", *, soft_steps: bool = False
) -> np.ndarray:
    """Turn a map into colours, its minimum to the first and maximum to the last.

    Args:
        values (np.ndarray): ``(H, W)`` or ``(3, H, W)``, floating point, finite.
            Three channels are stretched together and become the grey of a BGR
            picture, as in MMEngine.
        colormap (str | int): See :func:`colormap_lut`. Defaults to ``'jet'``.
        soft_steps (bool): Where rounding errors decide between two levels whose
            colours lie far apart, take the colour between them. OpenCV's JET has
            one such step. Only for ``(H, W)``. Defaults to False.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB.
    """
    if values.ndim == 3:
        values = np.ascontiguousarray(values.transpose(1, 2, 0))
        soft_steps = False
    lut = colormap_lut(colormap)
    stretched = stretch_to_levels(values)
    heat_rgb = cv2.applyColorMap(stretched.astype(np.uint8), lut)
    if soft_steps:
        for level in _wide_steps(lut):
            undecided = cv2.inRange(stretched, level - _UNDECIDED, level + _UNDECIDED)
            between = lut[level - 1 : level + 1, 0].mean(axis=0)
            heat_rgb[undecided > 0] = between.astype(np.uint8)
    return heat_rgb


def _wide_steps(lut: np.ndarray) -> list[int]:
    """Levels whose colour is far from the one before, if these are exceptions."""
    steps = np.abs(np.diff(lut[:, 0].astype(int), axis=0)).max(axis=1)
    levels = (np.flatnonzero(steps > _SMALL_STEP) + 1).tolist()
    return levels if len(levels) < 8 else []


def overlay_heatmap(
    values: np.ndarray,
    image_rgb: np.ndarray,
    *,
    alpha: float = 0.5,
    colormap: str | int = "jet",
    soft_steps: bool = False,
) -> np.ndarray:
    """Blend a map in colours with an image of the same size.

    Args:
        values (np.ndarray): ``(H, W)`` or ``(3, H, W)``, floating point, finite.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        alpha (float): Share of the heat map, 0 to 1. Defaults to 0.5.
        colormap (str | int): See :func:`colormap_lut`. Defaults to ``'jet'``.
        soft_steps (bool): See :func:`color_heatmap`. Defaults to False.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB.

    Examples:
        >>> values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
        >>> overlay_heatmap(values, np.zeros((3, 4, 3), np.uint8)).shape
        (3, 4, 3)
    """
    heat_rgb = color_heatmap(values, colormap, soft_steps=soft_steps)
    return cv2.addWeighted(image_rgb, 1 - alpha, heat_rgb, alpha, 0)


def fade_heatmap(
    saliency: np.ndarray,
    image_rgb: np.ndarray,
    *,
    alpha: float = 0.6,
    colormap: str | int = "plasma",
) -> np.ndarray:
    """Lay a map on the grey image: none of its own colours is taken for heat.

    The colours have the share ``alpha`` of the blend from half of the maximum on,
    and below it fade out in proportion: what has no influence is left as it is.

    Args:
        saliency (np.ndarray): ``(H, W)`` float32, 0 to 1.
        image_rgb (np.ndarray): ``(H, W, 3)`` uint8, RGB. It is not modified.
        alpha (float): Greatest share of the colours, 0 to 1. Defaults to 0.6.
        colormap (str | int): See :func:`colormap_lut`. Defaults to ``'plasma'``.

    Returns:
        np.ndarray: ``(H, W, 3)`` uint8, RGB.
    """
    grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY)
    levels = np.rint(saliency * 255).astype(np.uint8)
    heat_rgb = cv2.applyColorMap(levels, colormap_lut(colormap))
    share = np.minimum(saliency / _FULL_SHARE_FROM, 1) * np.float32(alpha)
    base = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB).astype(np.float32)
    blended = base + (heat_rgb.astype(np.float32) - base) * cv2.merge([share] * 3)
    return cv2.convertScaleAbs(blended)
