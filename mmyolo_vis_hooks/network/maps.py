"""Finds the maps of an image in what layers put out: tensors, and folded tokens."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import FeatureShapeError
from .nested import OutputIndex, flatten_tensors

# Strides at which vision transformers and pyramids put out token sequences.
_TOKEN_STRIDES = (2, 4, 8, 16, 32, 64, 128)


def image_tensors(
    output: Any, batch_size: int, layer: str
) -> list[tuple[OutputIndex, torch.Tensor]]:
    """The tensors in a layer's output that may hold a map for each image.

    Args:
        output: What the layer gave, nested as it likes.
        batch_size (int): Number of images in the batch.
        layer (str): Path of the layer, for the message.

    Returns:
        list: Index and ``(B, C, h, w)`` or ``(B, N, C)`` of each.

    Raises:
        FeatureShapeError: If there is none, or one has another batch size.
    """
    tensors = [
        (index, tensor)
        for index, tensor in flatten_tensors(output)
        if tensor.ndim >= 3 and tensor.is_floating_point()
    ]
    for _, tensor in tensors:
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


def spatial_maps(
    tensor: torch.Tensor, network_hw: tuple[int, int], layer: str
) -> list[torch.Tensor]:
    """Give one image's output as feature maps ``(C, h, w)``.

    Args:
        tensor (Tensor): ``(C, h, w)``, or tokens ``(N, C)`` where ``N`` cells of
            one or several pyramid levels follow one another row by row, possibly
            after a class token.
        network_hw (tuple): Height and width of the network's input, pixels.
        layer (str): Path of the layer, for the message.

    Raises:
        FeatureShapeError: If the tokens fit no grid over the input.
    """
    if tensor.ndim == 3:
        return [tensor]
    slices = token_slices(tensor, network_hw, layer)
    return [
        tensor[start : start + h * w].t().reshape(-1, h, w) for start, h, w in slices
    ]


def token_slices(
    tokens: torch.Tensor, network_hw: tuple[int, int], layer: str
) -> list[tuple[int, int, int]]:
    """First token, rows and columns of each map in tokens ``(N, C)``.

    The arguments and errors are those of :func:`spatial_maps`.
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
