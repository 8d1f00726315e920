"""pytorch-grad-cam as a source of weightings.

Its classes never see the detector, but activations and gradients taken elsewhere. It is
imported when a method of it is first asked for: that takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ..errors import VisConfigError


def class_of(library_class: str, method: str, since: str) -> Any:
    """A class of pytorch-grad-cam; a ``VisConfigError`` if it is missing or too old."""
    try:
        library = importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise VisConfigError(
            f"method={method!r} needs pytorch-grad-cam, which does not import "
            f'({error}); run: pip install "grad-cam>={since}"'
        ) from error
    found = getattr(library, library_class, None)
    if found is None:
        raise VisConfigError(
            f"method={method!r} needs {library_class} of grad-cam {since} or newer, "
            "which the installed one does not have; run: pip install "
            f'"grad-cam>={since}"'
        )
    return found


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
