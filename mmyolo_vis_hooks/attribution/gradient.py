"""Methods that weigh activations by gradients of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..records import BoxExplanation, LayerMap
from .library import cam_image
from .methods import agreeing_component, register_method

_SPACE = (2, 3)


@register_method(
    "layercam",
    kind="gradient",
    summary="LayerCAM: only gradients that raise the target count.",
    formula="relu(sum_c relu(g) * A)",
    elementwise=True,
)
@register_method(
    "boxam",
    kind="gradient",
    summary="LayerCAM at the level that made the box, smoothed at the scale of the "
    "box.",
    formula="relu(sum_c relu(g) * A), then a Gaussian with sigma = 0.1 * sqrt(box "
    "area)",
    elementwise=True,
    default_smooth=0.1,
    tells="tells where",
)
def layercam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.relu() * activations).sum(1)


@register_method(
    "odam_combined",
    kind="gradient",
    summary="ODAM of the class score and of the four box sides, combined by their "
    "maximum.",
    formula="max over targets t of relu(sum_c g_t * A) / its maximum",
    elementwise=True,
    targets=("score", "x1", "y1", "x2", "y2"),
)
@register_method(
    "odam",
    kind="gradient",
    summary="ODAM: gradient times activation per cell, without the paper's optional "
    "smoothing of the gradient.",
    formula="relu(sum_c g * A)",
    elementwise=True,
)
@register_method(
    "hirescam",
    kind="gradient",
    summary="HiResCAM: what each cell adds to the target, to first order.",
    formula="relu(sum_c g * A)",
    elementwise=True,
)
@register_method(
    "gradcam",
    kind="gradient",
    summary="Gradient times activation per cell, so that each box has a map of its "
    "own; the same as hirescam.",
    formula="relu(sum_c g * A)",
    elementwise=True,
)
def hirescam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients * activations).sum(1)


@register_method(
    "gradcamelementwise",
    kind="gradient",
    summary="Gradient times activation, each channel rectified before the sum.",
    formula="sum_c relu(g * A)",
    elementwise=True,
)
def gradcamelementwise(
    activations: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    return (gradients * activations).relu().sum(1)


def _plus_plus(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """relu(g) * alpha of Grad-CAM++ (eq. 19), with g^2 cancelled from the fraction.

    The library adds 1e-6 to the denominator, more than the gradients of a detection
    are. Where the sum of a channel is negative (SiLU), alpha would have a pole; it is
    1/2 there.
    """
    sums = activations.sum(_SPACE, keepdim=True).relu()
    return gradients.relu() / (2 + sums * gradients.relu())


@register_method(
    "gradcam++",
    kind="gradient",
    summary="Grad-CAM++ whose weights are not summed over the cells of the map.",
    formula="relu(sum_c relu(g) * alpha * A), alpha = g^2 / (2 g^2 + S_c g^3), S_c = "
    "the sum of A over the whole map",
)
def gradcam_plus_plus(
    activations: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    return (_plus_plus(activations, gradients) * activations).sum(1)


@register_method(
    "gradcam++_averaged",
    kind="gradient",
    summary="Grad-CAM++ of the paper: one weight per channel.",
    formula="relu(sum_c w_c * A), w_c = sum of relu(g) * alpha over the map, alpha as "
    "for gradcam++",
)
def gradcam_plus_plus_averaged(
    activations: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    weights = _plus_plus(activations, gradients).sum(_SPACE, keepdim=True)
    return (weights * activations).sum(1)


@register_method(
    "ssgradcam++",
    kind="gradient",
    summary="SSGrad-CAM++: Grad-CAM++ of the paper, kept to where the box reacts.",
    formula="relu(sum_c w_c * s * A), w_c as for gradcam++_averaged, s = |g| / its "
    "maximum over the map",
)
def ssgradcam_plus_plus(
    activations: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    weights = _plus_plus(activations, gradients).sum(_SPACE, keepdim=True)
    sizes = gradients.abs()
    largest = sizes.amax(_SPACE, keepdim=True)
    sensitivity = sizes / torch.where(largest > 0, largest, 1)
    return (weights * sensitivity * activations).sum(1)


@register_method(
    "gradcam_averaged",
    kind="gradient",
    summary="Grad-CAM of the paper: one weight per channel, the gradient's mean over "
    "the map.",
    formula="relu(sum_c mean(g) * A)",
    library_class="GradCAM",
)
def gradcam_averaged(
    activations: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    return cam_image("GradCAM", activations, gradients)


@register_method(
    "xgradcam",
    kind="gradient",
    summary="XGrad-CAM: the mean of the gradients, weighed by the activations.",
    formula="relu(sum_c w_c * A), w_c = sum(g * A) / sum(A), both over the map",
    library_class="XGradCAM",
)
def xgradcam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return cam_image("XGradCAM", activations, gradients)


@register_method(
    "eigengradcam",
    kind="gradient",
    summary="Eigen-CAM of gradient times activation, which is specific to the box.",
    formula="relu(first principal component over the channels of g * A)",
    takes_eigen_smooth=False,
)
def eigengradcam(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return agreeing_component(gradients * activations)


@register_method(
    "shapleycam",
    kind="gradient",
    summary="ShapleyCAM: Grad-CAM with the second-order term of the target.",
    formula="relu(sum_c mean(g - H A / 2) * A), H = second derivative of the target",
    second_order=True,
)
def shapleycam(
    activations: torch.Tensor, gradients: torch.Tensor, products: torch.Tensor
) -> torch.Tensor:
    """The library frees the graph of the forward, which the next box needs too."""
    weights = (gradients - products / 2).mean(_SPACE, keepdim=True)
    return (weights * activations).sum(1)


def joined_targets(rounds: Sequence[BoxExplanation]) -> BoxExplanation:
    """The greatest of the normalised maps of several targets."""
    if len(rounds) == 1:
        return rounds[0]
    layers: dict[str, list[np.ndarray]] = {}
    for layer_map in (m for own in rounds for m in own.maps):
        peak = layer_map.saliency.max()
        layers.setdefault(layer_map.layer, []).append(layer_map.saliency / peak)
    maps = tuple(LayerMap(layer, np.maximum.reduce(m)) for layer, m in layers.items())
    return replace(rounds[0], maps=maps)
