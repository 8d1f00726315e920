"""The registry of methods, and the way from activations and gradients to maps.

A method is a short function with a decorator; the modules that ``__init__.py`` imports
hold those of the package. Yours may stand in any script that runs before the hook or
the API is asked for it:

    @register_method('mycam', kind='gradient', summary='Mine.', formula='...')
    def mycam(activations, gradients):
        return (gradients.relu() * activations).sum(1)

Words of the formulas: ``A`` is the activation and ``g`` the gradient of the target with
respect to it, both per channel ``c`` and cell; ``relu`` cuts off what is negative.
Every map but a signed one is rectified at the end, after the sum over channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..declare import one_of, register_once
from ..errors import FeatureShapeError, VisConfigError, VisError
from . import library

KINDS = (
    "gradient",
    "activation",
    "ablation",
    "masking",
    "pixels",
    "attention",
    "black_box",
)


@dataclass(frozen=True)
class CamMethod:
    """What a method needs and what its map means.

    Attributes:
        kind: ``'gradient'``: the function is given activations ``(K, C, h, w)`` and
            the target's gradients, alike, and gives maps ``(K, h, w)``.
            ``'activation'``: the same without gradients, once for all boxes.
            ``'ablation'`` and ``'masking'``: it is given a ``PerturbedLayer`` and gives
            the weight of each channel, ``(K, C)``. ``'pixels'``: it is given a
            ``PixelPath`` and gives signed maps of the input, ``(K, H, W)``.
            ``'attention'``: it is given the attention weights of each box's query in
            all layers of the decoder, ``(layers, K, h, w)``, and gives ``(K, h, w)``.
            ``'black_box'``: it is given a ``MaskedImage`` and gives such maps that
            are not negative.
        function: Tensors in, tensor out, all on the tensors' own device.
        summary: What the map shows, one sentence.
        formula: Plain text, with the words of this module's docstring.
        default_smooth: Standard deviation of the Gaussian that is laid over the map,
            in units of the square root of the box's area; 0 for none.
        elementwise: A cell of the map depends on the activations and gradients of
            that cell only.
        second_order: The function is given a third tensor, the product of the
            target's second derivative with the activations.
        box_specific: False if all boxes of an image share one map.
        takes_eigen_smooth: Whether there are weighted channels to project.
        targets: If not empty, the method joins the normalised maps of these targets
            by their maximum.
        tells: What question a map answers, for captions: ``'tells where'``, or ``''``.
        library_class: Name in pytorch-grad-cam; empty if nothing of it is needed.
        since: First release of grad-cam that has the class.
    """

    name: str
    kind: str
    function: Callable[..., torch.Tensor]
    summary: str
    formula: str
    default_smooth: float = 0.0
    elementwise: bool = False
    second_order: bool = False
    box_specific: bool = True
    takes_eigen_smooth: bool = True
    targets: tuple[str, ...] = ()
    tells: str = ""
    library_class: str = ""
    since: str = "1.5"


METHODS: dict[str, CamMethod] = {}


def register_method(
    name: str, *, kind: str, summary: str, formula: str, **properties: Any
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Make a function a method that can be asked for by name.

    Args:
        name (str): As users will write it.
        kind, summary, formula, properties: See :class:`CamMethod`.

    Raises:
        VisConfigError: If there is no such kind, or the name belongs to another
            function; a cell of a notebook may be run again.
    """
    one_of("kind", kind, KINDS)

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        method = CamMethod(name, kind, function, summary, formula, **properties)
        register_once(METHODS, "method", method)
        return function

    return register


def caption_of(method: str, target: str) -> str:
    """What pictures say of a method and a target: ``'odam · score'``."""
    shown = validate(method)
    shared = "" if shown.box_specific else " · not of the box alone"
    tells = f" · {shown.tells}" if shown.tells else ""
    return f"{method} · {target}{tells}{shared}"


def validate(name: Any, *, eigen_smooth: bool = False) -> CamMethod:
    """Look up a method, and check the option of its weighting.

    Args:
        name (str): One of ``METHODS``.
        eigen_smooth (bool): See :func:`weigh`.

    Raises:
        VisConfigError: If the name is unknown, the installed grad-cam is missing or
            too old for it, or ``eigen_smooth`` has no meaning for the method.
    """
    method = METHODS[one_of("method", name, METHODS)]
    if method.library_class:
        library.require_class(method.library_class, name, method.since)
    if eigen_smooth and not method.takes_eigen_smooth:
        takers = ", ".join(m.name for m in METHODS.values() if m.takes_eigen_smooth)
        raise VisConfigError(
            f"eigen_smooth=True has no meaning for method={name!r}, which has no "
            f"weighted channels; leave it out, or choose one of {takers}"
        )
    return method


def weigh(
    name: str,
    activations: torch.Tensor,
    *derivatives: torch.Tensor,
    eigen_smooth: bool = False,
) -> torch.Tensor:
    """Maps of a method of the kind ``'gradient'`` or ``'activation'``.

    Args:
        name (str): The method.
        activations (Tensor): ``(K, C, h, w)``, any real dtype.
        derivatives (Tensor): What else the method needs, of the same shape: the
            target's gradient per box; for second order also the product of its second
            derivative with the activations.
        eigen_smooth (bool): Take the first principal component of the weighted
            channels instead of their sum. Defaults to False.

    Returns:
        Tensor: ``(K, h, w)`` float32, finite and not negative, on the same device.

    Raises:
        VisConfigError: As :func:`validate`.
        FeatureShapeError: If the shapes are wrong.
        VisError: If an input has NaN or infinities, or the result would have.
    """
    method = validate(name, eigen_smooth=eigen_smooth)
    given = [tensor.detach().float() for tensor in (activations, *derivatives)]
    for tensor in given:
        if tensor.ndim != 4 or not tensor.numel() or tensor.shape != activations.shape:
            shapes = ", ".join(str(tuple(t.shape)) for t in given)
            raise FeatureShapeError(
                f"activations and gradients have the shapes {shapes}; they must be "
                "equal and (K, C, h, w)"
            )
        require_finite(tensor, "an activation or gradient")
    if not eigen_smooth:
        return rectified(_called(method, given), name)
    # A channel is an image of its own here, so that any method hands out what it sums.
    channels = [
        _called(method, [tensor[k, :, None] for tensor in given])
        for k in range(len(activations))
    ]
    return rectified(agreeing_component(torch.stack(channels)), name)


def _called(method: CamMethod, given: Sequence[torch.Tensor]) -> torch.Tensor:
    versions = [tensor._version for tensor in given]
    maps = method.function(*given)
    if versions != [tensor._version for tensor in given]:
        raise VisError(
            f"method={method.name!r} changes activations or gradients in place, which "
            "other boxes share; let it work on copies, such as x.relu() for x.relu_()"
        )
    count, _, *map_hw = given[0].shape
    return shaped(maps, (count, *map_hw), f"method={method.name!r}")


def shaped(values: Any, shape: Sequence[int], giver: str) -> torch.Tensor:
    """What a registered function gave; a ``VisError`` if it is no tensor of a shape."""
    given = type(values).__name__
    if isinstance(values, torch.Tensor):
        given = f"a tensor of shape {tuple(values.shape)}"
        if tuple(values.shape) == tuple(shape):
            return values
    raise VisError(
        f"{giver} gives {given}; it must give a tensor of shape {tuple(shape)}"
    )


def weigh_channels(
    activations: torch.Tensor, weights: torch.Tensor, *, eigen_smooth: bool = False
) -> torch.Tensor:
    """Maps ``(K, h, w)`` of weights ``(K, C)`` of the channels of ``(C, h, w)``."""
    activations = activations.detach().float()
    weights = weights.to(activations)
    if not eigen_smooth:
        return rectified(torch.einsum("kc,chw->khw", weights, activations), "")
    weighted = weights[:, :, None, None] * activations
    return rectified(agreeing_component(weighted), "")


def limited(maps: torch.Tensor, limits: Sequence[int]) -> torch.Tensor:
    """Maps ``(K, C, h, w)`` of at most so many rows and columns; -1 sets no limit."""
    size = [n if most < 0 else min(n, most) for n, most in zip(maps.shape[-2:], limits)]
    if size == list(maps.shape[-2:]):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def principal_component(channels: torch.Tensor) -> torch.Tensor:
    """First principal component over the channels; its sign is arbitrary.

    ``(K, C, h, w)`` -> ``(K, h, w)`` float64, from the smaller of both covariances:
    grad-cam's decomposition takes 7.6 s for an 80 x 80 map of 256 channels.
    """
    rows = channels.double().flatten(2)
    rows = rows - rows.mean(dim=2, keepdim=True)
    if rows.shape[1] <= rows.shape[2]:
        _, vectors = torch.linalg.eigh(rows @ rows.mT)
        component = (vectors[..., -1:].mT @ rows)[:, 0]
    else:
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        component = vectors[..., -1] * values[:, -1:].clamp(min=0).sqrt()
    return component.unflatten(1, channels.shape[2:])


def agreeing_component(channels: torch.Tensor) -> torch.Tensor:
    """First principal component with the sign that agrees with the channels' sum."""
    component = principal_component(channels)
    agreement = (component * channels.sum(dim=1)).sum(dim=(1, 2), keepdim=True)
    return torch.where(agreement < 0, -component, component)


def rectified(maps: torch.Tensor, name: str) -> torch.Tensor:
    """Maps as float32 without what is negative."""
    if not bool(maps.isfinite().all()):
        raise VisError(
            f"method={name!r} gives no finite map for these activations and gradients; "
            "choose another method, such as 'boxam'"
        )
    return maps.detach().float().clamp(min=0)


def require_finite(values: torch.Tensor, what: str) -> None:
    """Refuse NaN and infinities by a ``VisError``."""
    finite = values.isfinite()
    if not bool(finite.all()):
        raise VisError(
            f"{what}: {int((~finite).sum())} of {finite.numel()} values are NaN or "
            "infinite, so there is nothing to weigh; look for a model that has "
            "diverged or overflows in half precision"
        )
