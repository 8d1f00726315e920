"""Finds the maps of an image in what layers put out: tensors, and folded tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FeatureShapeError
from .nested import OutputKey, flatten_tensors

# Strides at which vision transformers and pyramids put out token sequences.
_TOKEN_STRIDES = (2, 4, 8, 16, 32, 64, 128)


def image_tensors(
    output: Any, batch_size: int, layer: str, call_index: int = 0
) -> dict[OutputKey, torch.Tensor]:
    """The tensors in a layer's output that may hold a map for each image.

    Args:
        output: What the layer gave, nested as it likes.
        batch_size (int): Number of images in the batch.
        layer (str): Path of the layer.
        call_index (int): Which of its calls that was.

    Returns:
        dict: ``(B, C, h, w)`` or ``(B, N, C)`` each.

    Raises:
        FeatureShapeError: If there is none, or one has another batch size.
    """
    tensors = {
        OutputKey(layer, call_index, index): tensor
        for index, tensor in flatten_tensors(output)
        if tensor.ndim >= 3 and tensor.is_floating_point()
    }
    for tensor in tensors.values():
        if tensor.shape[0] != batch_size:
            raise FeatureShapeError(
                f"target_layers: {layer} gives a tensor of shape "
                f"{tuple(tensor.shape)} for a batch of {batch_size} "
                "image(s), so it cannot be laid over an image (outputs of RoI "
                "heads and of windows are of this kind); choose another layer"
            )
    if not tensors:
        raise FeatureShapeError(
            f"target_layers: {layer} gives no feature map ((B, C, H, W) or "
            "tokens (B, H*W, C)); choose another layer"
        )
    return tensors


@dataclass(frozen=True)
class View:
    """One map within what a layer gave: the tensor itself, or a level of its tokens.

    The tensor is ``(B, C, h, w)``, or tokens ``(B, N, C)`` of which ``tokens`` names
    the first, the rows and the columns.
    """

    title: str
    key: OutputKey
    tensor: torch.Tensor
    tokens: tuple[int, int, int] | None = None

    def maps(self, values: torch.Tensor) -> torch.Tensor:
        """``(n, C, h, w)`` of values shaped as the tensor, ``(n, ...)``."""
        if self.tokens is None:
            return values
        start, h, w = self.tokens
        part = values[:, start : start + h * w]
        return part.transpose(1, 2).reshape(len(values), -1, h, w)

    @property
    def activations(self) -> torch.Tensor:
        """``(B, C, h, w)``, without a graph."""
        return self.maps(self.tensor.detach())

    def scaled(self, factors: torch.Tensor) -> torch.Tensor:
        """The tensor of an image, ``(n, ...)``, with the map's channels times factors
        ``(n, C)``."""
        value = self.tensor.detach().repeat(len(factors), *[1] * (self.tensor.ndim - 1))
        if self.tokens is None:
            return value * factors[:, :, None, None]
        start, h, w = self.tokens
        value[:, start : start + h * w] *= factors[:, None]
        return value


def views_of(
    tensors: Mapping[OutputKey, torch.Tensor], network_hw: tuple[int, int]
) -> list[View]:
    """All maps in what layers gave, as :func:`image_tensors` finds it.

    Raises:
        FeatureShapeError: If tokens fit no grid over the network's input.
    """
    views = []
    for key, tensor in tensors.items():
        if tensor.ndim == 4:
            views.append(View(key.title, key, tensor))
            continue
        slices = token_slices(tensor[0], network_hw, key.layer)
        for level, tokens in enumerate(slices):
            own = key._replace(output_index=(*key.output_index, level))
            title = own.title if len(slices) > 1 else key.title
            views.append(View(title, key, tensor, tokens))
    return views


def lies_over(tensor: torch.Tensor, network_hw: tuple[int, int]) -> bool:
    """Whether a tensor is ``(1, C, h, w)`` in the proportions of the network's input.

    Outputs for queries, ``(layers, 1, Q, C)``, are not, up to the rounding of a cell.
    """
    if tensor.ndim != 4 or len(tensor) != 1:
        return False
    (height, width), (rows, columns) = network_hw, tensor.shape[-2:]
    return abs(rows * width - columns * height) <= max(network_hw)


def token_slices(
    tokens: torch.Tensor, network_hw: tuple[int, int], layer: str
) -> list[tuple[int, int, int]]:
    """First token, rows and columns of each map in tokens ``(N, C)``.

    Cells of one or several pyramid levels follow one another row by row, possibly
    after a class token.

    Raises:
        FeatureShapeError: If they fit no grid over the network's input.
    """
    if tokens.ndim != 2:
        raise FeatureShapeError(
            f"target_layers: {layer} gives {tuple(tokens.shape)} for an image; only "
            "(C, H, W) and tokens (H*W, C) can be drawn"
        )
    grids = [
        (math.ceil(network_hw[0] / s), math.ceil(network_hw[1] / s))
        for s in _TOKEN_STRIDES
    ]
    for start in (0, 1):  # with a class token in front
        for first in range(len(grids)):
            slices, end = [], start
            for h, w in grids[first:]:
                slices.append((end, h, w))
                end += h * w
                if end == len(tokens):
                    return slices
    raise FeatureShapeError(
        f"target_layers: {layer} gives {len(tokens)} tokens, which fit no grid over "
        f"the network's input of {network_hw[0]}x{network_hw[1]} pixels"
    )
