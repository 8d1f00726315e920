"""Methods that look at activations alone: all boxes of an image share their map."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import VisError
from ..network.state import preserve_rng_state
from .library import cam_image
from .methods import principal_component, register_method

# KernelPCA fills a matrix of cells x cells: 400 MB in float32.
_MAX_KERNEL_CELLS = 10_000


@register_method(
    "eigencam",
    kind="activation",
    summary="Eigen-CAM: the strongest pattern in the activations, the same for all "
    "boxes.",
    formula="relu(first principal component over the channels of A)",
    box_specific=False,
    takes_eigen_smooth=False,
)
def eigencam(activations: torch.Tensor) -> torch.Tensor:
    """The sign is such that the largest deviation is positive (Seg-Eigen-CAM, eq. 13),
    which is ``kpcacam``'s rule in scikit-learn too."""
    component = principal_component(activations)
    cells = component.flatten(1)
    largest = cells.gather(1, cells.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest[..., None] < 0, -component, component)


@register_method(
    "fem",
    kind="activation",
    summary="FEM: channels weighed by how often they are unusually active, the same "
    "for all boxes.",
    formula="relu(sum_c w_c * A), w_c = share of cells with A > mean + 2 standard "
    "deviations",
    box_specific=False,
    takes_eigen_smooth=False,
    library_class="FEM",
    since="1.5.5",
)
def fem(activations: torch.Tensor) -> torch.Tensor:
    return cam_image("FEM", activations)


@register_method(
    "kpcacam",
    kind="activation",
    summary="KPCA-CAM: Eigen-CAM with a sigmoid kernel, the same for all boxes.",
    formula="relu(first kernel principal component over the channels of A)",
    box_specific=False,
    takes_eigen_smooth=False,
    library_class="KPCA_CAM",
    since="1.5.4",
)
def kpcacam(activations: torch.Tensor) -> torch.Tensor:
    height, width = activations.shape[-2:]
    if height * width > _MAX_KERNEL_CELLS:
        raise VisError(
            f"method='kpcacam' needs a matrix of cells x cells, and a layer with "
            f"{height} x {width} cells is too large; choose a layer with at most "
            f"{_MAX_KERNEL_CELLS} cells, or method='eigencam'"
        )
    if not bool((activations != activations[..., :1, :1]).any()):
        return torch.zeros_like(activations[:, 0])
    with preserve_rng_state():
        # scikit-learn starts its iteration from NumPy's global random numbers.
        np.random.seed(0)
        return cam_image("KPCA_CAM", activations)
