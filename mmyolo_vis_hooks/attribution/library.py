"""pytorch-grad-cam as a source of weightings.

Its classes never see the detector, but activations and gradients taken elsewhere. It is
imported when a method of it is first asked for: that takes seconds.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch

from ..errors import VisConfigError
from ..network.state import preserve_rng_state


def require_class(library_class: str, method: str, since: str) -> None:
    """A ``VisConfigError`` if pytorch-grad-cam is missing, or too old for a method."""
    try:
        library = importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise VisConfigError(
            f"method={method!r} needs pytorch-grad-cam, which does not import "
            f'({error}); run: pip install "grad-cam>={since}"'
        ) from error
    if not hasattr(library, library_class):
        raise VisConfigError(
            f"method={method!r} needs {library_class} of grad-cam {since} or newer, "
            "which the installed one does not have; run: pip install "
            f'"grad-cam>={since}"'
        )


def cam_image(library_class: str, *tensors: torch.Tensor) -> torch.Tensor:
    """The library's maps ``(K, h, w)`` of activations and gradients."""
    # Not a layer of torch.nn: initialising one draws global random numbers.
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])
    library = importlib.import_module("pytorch_grad_cam")
    cam = getattr(library, library_class)(model=model, target_layers=[])
    activations, *rest = (tensor.cpu().numpy() for tensor in tensors)
    gradients = rest[0] if rest else None
    maps = cam.get_cam_image(None, None, None, activations, gradients, False)
    return torch.from_numpy(maps).to(tensors[0].device)


def imputed(image: torch.Tensor, shown: np.ndarray) -> torch.Tensor:
    """An image ``(C, H, W)`` whose hidden pixels are like their neighbours.

    Each is about the mean of what lies around it, with some noise (Rong et al. 2022,
    "A Consistent and Efficient Evaluation Strategy for Attribution Methods").

    Args:
        image (Tensor): The whole image.
        shown (np.ndarray): ``(H, W)`` bool.
    """
    if shown.all():
        return image
    if not shown.any():  # no neighbour has a value
        return image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    library = importlib.import_module("pytorch_grad_cam.metrics.road")
    with preserve_rng_state():  # a seed is that of all devices
        torch.manual_seed(0)
        given = image.float().cpu(), torch.from_numpy(shown).float()
        return library.NoisyLinearImputer()(*given).to(image)
