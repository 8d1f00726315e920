"""Colours maps and lays them over an image.

Images are ``(H, W, 3)`` uint8, RGB, and stay as they are.
"""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral

import cv2
import numpy as np

from ..errors import VisConfigError, did_you_mean

_OPENCV_PREFIX = "colormap_"
# Rounding errors of a mean over channels stay below this share of a level.
_UNDECIDED = 0.01
_SMALL_STEP = 4
_FULL_SHARE_FROM = np.float32(0.5)

DIVERGING = "bwr"
"""Colours of signed maps: blue is against, white nothing, red for."""


def colormap_lut(colormap: str | int = "jet") -> np.ndarray:
    """Look up a colour map by name; one that both libraries have is OpenCV's.

    Args:
        colormap (str | int): An OpenCV name (``'jet'``, ``'COLORMAP_VIRIDIS'``)
            or constant (``cv2.COLORMAP_JET``), or a matplotlib name
            (``'magma_r'``, ``'Blues'``).

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
        name.lower().removeprefix(_OPENCV_PREFIX): getattr(cv2, name)
        for name in dir(cv2)
        if name.lower().startswith(_OPENCV_PREFIX)
    }
    plain = str(colormap).lower().removeprefix(_OPENCV_PREFIX)
    constant = colormap if isinstance(colormap, int) else known.get(plain)
    if constant is not None and constant in known.values():
        levels = np.arange(256, dtype=np.uint8)[:, None]
        lut = cv2.applyColorMap(levels, constant)[..., ::-1].copy()
    elif isinstance(colormap, int):
        raise VisConfigError(
            f"colormap={colormap} is no OpenCV constant; they are 0 to "
            f"{max(known.values())}, or set a name such as 'jet'"
        )
    else:
        from matplotlib import colormaps  # only its own names cost the import

        names = {name.lower(): name for name in colormaps}
        name = colormap if colormap in colormaps else names.get(plain)
        if name is None:
            remedy = "set a name of OpenCV, such as 'jet', or of matplotlib, such as "
            remedy = did_you_mean(plain, [*known, *names], f"{remedy}'magma_r'", most=3)
            raise VisConfigError(f"colormap={colormap!r} is unknown; {remedy}")
        colors = colormaps[name](np.linspace(0.0, 1.0, 256), bytes=True)
        lut = np.ascontiguousarray(colors[:, None, :3])
    lut.flags.writeable = False
    return lut


def heat_levels(values: np.ndarray) -> np.ndarray:
    """The levels that :func:`overlay_heatmap` gives colours.

    Args:
        values (np.ndarray): ``(H, W)`` or ``(3, H, W)``, floating point, finite.
            Three channels are stretched together and become the grey of a BGR
            picture, as in MMEngine.

    Returns:
        np.ndarray: ``(H, W)`` uint8; a constant map is 0 everywhere.
    """
    if values.ndim == 2:
        return _stretched(values).astype(np.uint8)
    picture_bgr = _stretched(np.ascontiguousarray(values.transpose(1, 2, 0)))
    return cv2.cvtColor(picture_bgr.astype(np.uint8), cv2.COLOR_BGR2GRAY)


def _stretched(values: np.ndarray) -> np.ndarray:
    """Values stretched to 0..255, in their own dtype."""
    # Not dtype=cv2.CV_8U: that rounds, and MMEngine cuts.
    stretched = np.empty_like(values)
    cv2.normalize(values, stretched, 0, 255, cv2.NORM_MINMAX)
    return stretched


def overlay_heatmap(
    values: np.ndarray,
    image_rgb: np.ndarray,
    *,
    alpha: float = 0.5,
    colormap: str | int = "jet",
    soft_steps: bool = False,
) -> np.ndarray:
    """Colour a map, its minimum first and maximum last, and blend it with an image.

    Args:
        values (np.ndarray): See :func:`heat_levels`.
        image_rgb (np.ndarray): Of the same size.
        alpha (float): Share of the heat map, 0 to 1.
        colormap (str | int): See :func:`colormap_lut`.
        soft_steps (bool): Where rounding errors decide between two levels whose
            colours lie far apart, take the colour between them. OpenCV's JET has
            one such step. Only for ``(H, W)``.
    """
    lut = colormap_lut(colormap)
    heat_rgb = cv2.applyColorMap(heat_levels(values), lut)
    if soft_steps:
        stretched = _stretched(values)
        steps = np.abs(np.diff(lut[:, 0].astype(int), axis=0)).max(axis=1)
        wide = (np.flatnonzero(steps > _SMALL_STEP) + 1).tolist()
        # A colour map that is made of wide steps is meant so.
        for level in wide if len(wide) < 8 else ():
            undecided = cv2.inRange(stretched, level - _UNDECIDED, level + _UNDECIDED)
            between = lut[level - 1 : level + 1, 0].mean(axis=0)
            heat_rgb[undecided > 0] = between.astype(np.uint8)
    return cv2.addWeighted(image_rgb, 1 - alpha, heat_rgb, alpha, 0)


def fade_heatmap(
    saliency: np.ndarray,
    image_rgb: np.ndarray,
    *,
    alpha: float = 0.6,
    colormap: str | int = "plasma",
) -> np.ndarray:
    """Lay a map on the grey image: none of its own colours is taken for heat.

    The colours of ``(H, W)`` float32, 0 to 1, have the share ``alpha`` of the blend
    from half of the maximum on, and below it fade out in proportion: what has no
    influence is left as it is.
    """
    grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY)
    levels = np.rint(saliency * 255).astype(np.uint8)
    heat_rgb = cv2.applyColorMap(levels, colormap_lut(colormap))
    share = np.minimum(saliency / _FULL_SHARE_FROM, 1) * np.float32(alpha)
    base = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB).astype(np.float32)
    blended = base + (heat_rgb.astype(np.float32) - base) * cv2.merge([share] * 3)
    return cv2.convertScaleAbs(blended)


def diverge_heatmap(
    values: np.ndarray,
    image_rgb: np.ndarray,
    *,
    limit: float | None = None,
    alpha: float = 0.75,
    colormap: str | int = DIVERGING,
) -> np.ndarray:
    """Lay a signed map on the grey image: red speaks for, blue against, zero is white.

    The share of the colours is the same everywhere, so that equal numbers look equal.
    Their bar is ``colorbar(height, ColorScale(DIVERGING, -limit, limit, label))``.

    Args:
        values (np.ndarray): ``(H, W)`` floating point, finite, of any sign.
        image_rgb (np.ndarray): Of the same size.
        limit (float, optional): The value of the full red, and minus that of the full
            blue; what is beyond is cut off. Defaults to None, the largest size of a
            value. Maps that shall be compared need one of all of them.
        alpha (float): Share of the colours in the blend. Defaults to 0.75.
        colormap (str | int): See :func:`colormap_lut`; its middle is zero.
    """
    limit = float(np.abs(values).max(initial=0)) if limit is None else limit
    signed = values / limit if limit else np.zeros_like(values)
    levels = np.rint(127.5 * (1 + np.clip(signed, -1, 1))).astype(np.uint8)
    heat_rgb = cv2.applyColorMap(levels, colormap_lut(colormap))
    grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY)
    base = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(base, 1 - alpha, heat_rgb, alpha, 0)
