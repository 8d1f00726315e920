"""How the pixels of an image lie in the network's input and in its feature maps.

Coordinates are continuous: pixel ``i`` covers ``[i, i + 1)``. The *image frame* is the
picture that is drawn on, the *network frame* the padded tensor that the network got.
Every supported pipeline scales along the axes and then pads, so one scale and one
offset per axis lead from the one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .errors import VisConfigError


@dataclass(frozen=True)
class AxisSampling:
    """Linear interpolation of ``size`` image pixels from the cells of one axis.

    Attributes:
        lower: ``(size,)`` int64, the cell on the near side of each pixel centre.
        upper: ``(size,)`` int64, the cell on its far side.
        upper_weight: ``(size,)`` float64, the share of the far cell.
    """

    lower: np.ndarray
    upper: np.ndarray
    upper_weight: np.ndarray

    @property
    def cells(self) -> slice:
        """The cells on the image, also those that lie between two of its pixels."""
        last = self.upper[-1] if self.upper_weight[-1] else self.lower[-1]
        return slice(int(self.lower[0]), int(last) + 1)

    def cell_weights(self, num_cells: int) -> np.ndarray:
        """``(num_cells,)`` float64: what each cell counts in the sum of all pixels."""
        weights = np.zeros(num_cells)
        np.add.at(weights, self.lower, 1.0 - self.upper_weight)
        np.add.at(weights, self.upper, self.upper_weight)
        return weights


@dataclass(frozen=True)
class FrameTransform:
    """Places an image frame in the network frame.

    Attributes:
        image_hw: Height and width of the image, pixels.
        network_hw: Height and width of the network's input tensor, pixels.
        scale_xy: Network pixels per image pixel, horizontally and vertically.
        offset_xy: Network position of the image's left and top edge, pixels.
    """

    image_hw: tuple[int, int]
    network_hw: tuple[int, int]
    scale_xy: tuple[float, float]
    offset_xy: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def identity(cls, network_hw: tuple[int, int]) -> FrameTransform:
        """The frame of a picture that is the network's input itself."""
        return cls(network_hw, network_hw, (1.0, 1.0))

    @classmethod
    def stretch(
        cls, image_hw: tuple[int, int], network_hw: tuple[int, int]
    ) -> FrameTransform:
        """An image that fills the whole network input."""
        scale = (network_hw[1] / image_hw[1], network_hw[0] / image_hw[0])
        return cls(image_hw, network_hw, scale)

    @classmethod
    def from_metainfo(
        cls, metainfo: Mapping[str, Any], image_hw: tuple[int, int] | None = None
    ) -> FrameTransform:
        """Read the transform off the metainfo that a test pipeline packed.

        Args:
            metainfo (Mapping): ``ori_shape``, ``img_shape`` and
                ``batch_input_shape`` as (H, W); ``scale_factor`` as (w, h)
                and, from MMYOLO's ``LetterResize``, ``pad_param`` as
                (top, bottom, left, right).
            image_hw (tuple, optional): Size of the original image, where
                ``ori_shape`` was not packed.

        Raises:
            VisConfigError: If the pipeline did not pack what is needed, or the
                image was flipped.
        """
        if metainfo.get("flip"):
            raise VisConfigError(
                "the network saw this image flipped "
                f"(flip_direction={metainfo.get('flip_direction')!r}); use "
                "alignment='resize', which never flips"
            )
        img_shape = metainfo.get("img_shape")
        image_hw = _size(metainfo.get("ori_shape", image_hw), "ori_shape")
        network_hw = _size(metainfo.get("batch_input_shape", img_shape), "img_shape")
        pad_param = metainfo.get("pad_param")
        scale_factor = metainfo.get("scale_factor")
        if scale_factor is None:
            if pad_param is not None or img_shape is None:
                raise _missing("scale_factor")
            scale_factor = (img_shape[1] / image_hw[1], img_shape[0] / image_hw[0])
        offset = (0.0, 0.0) if pad_param is None else (pad_param[2], pad_param[0])
        return cls(
            image_hw,
            network_hw,
            (float(scale_factor[0]), float(scale_factor[1])),
            (float(offset[0]), float(offset[1])),
        )

    def resized(self, image_hw: tuple[int, int]) -> FrameTransform:
        """The frame of the same image at another size."""
        scale_x, scale_y = self.scale_xy
        scale = (
            scale_x * self.image_hw[1] / image_hw[1],
            scale_y * self.image_hw[0] / image_hw[0],
        )
        return replace(self, image_hw=image_hw, scale_xy=scale)

    def boxes_to_network(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """``(N, 4)`` float32: boxes of the image in pixels of the network's input."""
        scale = np.array(self.scale_xy * 2, dtype=np.float32)
        offset = np.array(self.offset_xy * 2, dtype=np.float32)
        return np.asarray(boxes_xyxy, dtype=np.float32) * scale + offset

    def points_to_image(self, points_xy: np.ndarray) -> np.ndarray:
        """``(N, 2)`` float32: places in the network's input in pixels of the image."""
        scale = np.array(self.scale_xy, dtype=np.float32)
        offset = np.array(self.offset_xy, dtype=np.float32)
        return (np.asarray(points_xy, dtype=np.float32) - offset) / scale

    def axis_samplings(
        self, map_hw: tuple[int, ...]
    ) -> tuple[AxisSampling, AxisSampling]:
        """Where the image's rows and columns lie in the cells of a feature map.

        Pixels outside the outermost cell centres take the outermost cell, as
        ``F.interpolate(align_corners=False)`` does.
        """
        cells_hw = cells_per_pixel(map_hw, self.network_hw)
        samplings = []
        for axis in (0, 1):
            scale = self.scale_xy[1 - axis] * cells_hw[axis]
            offset = self.offset_xy[1 - axis] * cells_hw[axis]
            position = (np.arange(self.image_hw[axis]) + 0.5) * scale + offset - 0.5
            position = np.clip(position, 0.0, map_hw[axis] - 1)
            lower = np.floor(position).astype(np.int64)
            upper = np.minimum(lower + 1, map_hw[axis] - 1)
            samplings.append(AxisSampling(lower, upper, position - lower))
        return samplings[0], samplings[1]

    def resample(self, maps: torch.Tensor) -> torch.Tensor:
        """Interpolate maps at the centres of the image's pixels.

        ``(K, h, w)`` floating point, cells over the network frame, become
        ``(K, H, W)``, same dtype and device, over the image frame.
        """
        map_hw = maps.shape[1:]
        cells_hw = cells_per_pixel(map_hw, self.network_hw)
        if self.offset_xy == (0.0, 0.0) and all(
            math.isclose(
                self.image_hw[axis] * self.scale_xy[1 - axis] * cells_hw[axis],
                map_hw[axis],
                rel_tol=1e-9,
            )
            for axis in (0, 1)
        ):  # the cells divide the image evenly
            return F.interpolate(
                maps[None], self.image_hw, mode="bilinear", align_corners=False
            )[0]
        rows, columns = self.axis_samplings(map_hw)
        return _lerp(_lerp(maps, rows, dim=1), columns, dim=2)


def box_cells(
    box_xyxy: np.ndarray, size_hw: Sequence[int], num_rows: int
) -> np.ndarray:
    """Which cell of a grid on a box each pixel lies in, by its centre.

    Args:
        box_xyxy (np.ndarray): ``(4,)``, pixels.
        size_hw (Sequence[int]): Height and width of the image.
        num_rows (int): Rows of the grid, which has as many columns.

    Returns:
        np.ndarray: ``(H, W)`` int, row by row from 0; -1 outside of the box.
    """
    x1, y1, x2, y2 = np.asarray(box_xyxy, np.float64)
    rows, columns = (
        np.floor((np.arange(size) + 0.5 - low) / max(high - low, 1e-6) * num_rows)
        for size, low, high in ((size_hw[0], y1, y2), (size_hw[1], x1, x2))
    )
    inside = [(numbers >= 0) & (numbers < num_rows) for numbers in (rows, columns)]
    cells = rows[:, None] * num_rows + columns
    return np.where(inside[0][:, None] & inside[1], cells, -1).astype(int)


def cells_per_pixel(
    map_hw: tuple[int, ...], network_hw: tuple[int, int]
) -> tuple[float, float]:
    """Size of a network pixel in cells of a feature map, per axis.

    Padded convolutions round up: 1333 pixels at stride 32 give 42 cells, which
    cover 1344 pixels. Those without padding round down, and leave the last pixels
    out. Where both axes fit one power-of-two stride, that stride is the truth;
    elsewhere the map is taken to cover the input exactly.
    """
    stride = 2 ** max(0, round(math.log2(network_hw[1] / map_hw[1])))
    sizes = zip(network_hw, map_hw)
    if all(n // stride <= m <= math.ceil(n / stride) for n, m in sizes):
        return 1.0 / stride, 1.0 / stride
    return map_hw[0] / network_hw[0], map_hw[1] / network_hw[1]


def _size(shape: Any, key: str) -> tuple[int, int]:
    if shape is None:
        raise _missing(key)
    return int(shape[0]), int(shape[1])


def _missing(key: str) -> VisConfigError:
    return VisConfigError(
        f"{key!r} is not packed by the test pipeline; add it to the meta_keys of "
        "PackDetInputs"
    )


def _lerp(maps: torch.Tensor, sampling: AxisSampling, dim: int) -> torch.Tensor:
    device = maps.device
    lower = maps.index_select(dim, torch.from_numpy(sampling.lower).to(device))
    upper = maps.index_select(dim, torch.from_numpy(sampling.upper).to(device))
    shape = [1] * maps.ndim
    shape[dim] = -1
    weight = torch.from_numpy(sampling.upper_weight).to(maps).reshape(shape)
    return torch.lerp(lower, upper, weight)
