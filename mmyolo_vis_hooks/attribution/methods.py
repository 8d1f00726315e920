"""Turns activations and gradients into maps: method name -> weighting.

The weighting is pytorch-grad-cam's. Its classes are made for a model of their own
without target layers, so that they place no hook and never see the detector, and are
then asked for ``get_cam_image`` with activations and gradients that were taken
elsewhere. It is imported on first use: it takes seconds, and the package works
without it.

Words: ``A`` is the activation and ``g`` the gradient of the target with respect to
it, both per channel ``c`` and cell; ``relu`` cuts off what is negative. Every map is
rectified at the end, after the sum over channels.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..errors import FeatureShapeError, VisConfigError, VisError

# KernelPCA fills a matrix of cells x cells: 400 MB in float32.
_MAX_KERNEL_CELLS = 10_000
_MAX_VALUES_AT_ONCE = 2**20


@dataclass(frozen=True)
class CamMethod:
    """What a method needs and what its map means.

    Attributes:
        name: As users write it.
        kind: ``'gradient'`` weighs activations by gradients of the target,
            ``'activation'`` looks at activations alone, ``'ablation'`` takes channels
            away, ``'masking'`` shows the network the image through its channels, and
            ``'black_box'`` needs no layer at all.
        summary: What the map shows, one sentence.
        formula: Plain text, with the words of this module's docstring.
        library_class: Name in pytorch-grad-cam; empty if nothing of it is needed.
        since: First release of grad-cam that has the class.
        second_order: Needs a gradient that itself has a graph.
        elementwise: Without ``eigen_smooth``, a cell of the map depends on the
            activations and gradients of that cell only, so that the map of a crop
            is the crop of the map.
        default_smooth: Standard deviation of the Gaussian that is laid over the map,
            in units of the square root of the box's area; 0 for none.
        box_specific: False if all boxes of an image share one map.
        takes_eigen_smooth: Whether there are weighted channels to project.
    """

    name: str
    kind: str
    summary: str
    formula: str
    library_class: str = ""
    since: str = "1.5"
    second_order: bool = False
    elementwise: bool = False
    default_smooth: float = 0.0
    box_specific: bool = True
    takes_eigen_smooth: bool = True

    @property
    def uses_gradients(self) -> bool:
        """Whether the target must be differentiated."""
        return self.kind == "gradient"


_METHODS = (
    CamMethod(
        "boxam",
        "gradient",
        "LayerCAM at the level that made the box, smoothed at the scale of the box.",
        "relu(sum_c relu(g) * A), then a Gaussian with sigma = 0.1 * sqrt(box area)",
        library_class="LayerCAM",
        elementwise=True,
        default_smooth=0.1,
    ),
    CamMethod(
        "gradcam",
        "gradient",
        "Gradient times activation per cell, so that each box has a map of its own; "
        "the same as hirescam.",
        "relu(sum_c g * A)",
        library_class="HiResCAM",
        elementwise=True,
    ),
    CamMethod(
        "gradcam++",
        "gradient",
        "Grad-CAM++ whose weights are not summed over the cells of the map.",
        "relu(sum_c relu(g) * alpha * A), alpha = g^2 / (2 g^2 + S_c g^3), S_c = the "
        "sum of A over the whole map",
        library_class="GradCAMPlusPlus",
    ),
    CamMethod(
        "gradcam_averaged",
        "gradient",
        "Grad-CAM of the paper: one weight per channel, the gradient's mean over the "
        "map.",
        "relu(sum_c mean(g) * A)",
        library_class="GradCAM",
    ),
    CamMethod(
        "gradcam++_averaged",
        "gradient",
        "Grad-CAM++ of the paper: one weight per channel.",
        "relu(sum_c w_c * A), w_c = sum of relu(g) * alpha over the map, alpha as for "
        "gradcam++",
        library_class="GradCAMPlusPlus",
    ),
    CamMethod(
        "hirescam",
        "gradient",
        "HiResCAM: what each cell adds to the target, to first order.",
        "relu(sum_c g * A)",
        library_class="HiResCAM",
        elementwise=True,
    ),
    CamMethod(
        "layercam",
        "gradient",
        "LayerCAM: only gradients that raise the target count.",
        "relu(sum_c relu(g) * A)",
        library_class="LayerCAM",
        elementwise=True,
    ),
    CamMethod(
        "xgradcam",
        "gradient",
        "XGrad-CAM: the mean of the gradients, weighed by the activations.",
        "relu(sum_c w_c * A), w_c = sum(g * A) / sum(A), both over the map",
        library_class="XGradCAM",
    ),
    CamMethod(
        "gradcamelementwise",
        "gradient",
        "Gradient times activation, each channel rectified before the sum.",
        "sum_c relu(g * A)",
        library_class="GradCAMElementWise",
        elementwise=True,
    ),
    CamMethod(
        "eigencam",
        "activation",
        "Eigen-CAM: the strongest pattern in the activations, the same for all boxes.",
        "relu(first principal component over the channels of A)",
        library_class="EigenCAM",
        box_specific=False,
        takes_eigen_smooth=False,
    ),
    CamMethod(
        "eigengradcam",
        "gradient",
        "Eigen-CAM of gradient times activation, which is specific to the box.",
        "relu(first principal component over the channels of g * A)",
        library_class="EigenGradCAM",
        takes_eigen_smooth=False,
    ),
    CamMethod(
        "fem",
        "activation",
        "FEM: channels weighed by how often they are unusually active, the same for "
        "all boxes.",
        "relu(sum_c w_c * A), w_c = share of cells with A > mean + 2 standard "
        "deviations",
        library_class="FEM",
        since="1.5.5",
        box_specific=False,
        takes_eigen_smooth=False,
    ),
    CamMethod(
        "kpcacam",
        "activation",
        "KPCA-CAM: Eigen-CAM with a sigmoid kernel, the same for all boxes.",
        "relu(first kernel principal component over the channels of A)",
        library_class="KPCA_CAM",
        since="1.5.4",
        box_specific=False,
        takes_eigen_smooth=False,
    ),
    CamMethod(
        "shapleycam",
        "gradient",
        "ShapleyCAM: Grad-CAM with the second-order term of the target.",
        "relu(sum_c mean(g - H A / 2) * A), H = second derivative of the target",
        library_class="ShapleyCAM",
        since="1.5.5",
        second_order=True,
    ),
    CamMethod(
        "ablationcam",
        "ablation",
        "Ablation-CAM: channels weighed by what the target loses without them.",
        "relu(sum_c w_c * A), w_c = (y - y_c) / |y|, y_c = target without channel c",
        library_class="AblationLayer",
    ),
    CamMethod(
        "scorecam",
        "masking",
        "Score-CAM: channels weighed by the target's value when only what lies under "
        "the channel is shown.",
        "relu(sum_c w_c * A), w = softmax over channels of the target on the image "
        "times the normalised channel",
        library_class="HiResCAM",
    ),
    CamMethod(
        "odam",
        "gradient",
        "ODAM: gradient times activation per cell, without the paper's optional "
        "smoothing of the gradient.",
        "relu(sum_c g * A)",
        library_class="HiResCAM",
        elementwise=True,
    ),
    CamMethod(
        "odam_combined",
        "gradient",
        "ODAM of the class score and of the four box sides, combined by their maximum.",
        "max over targets t of relu(sum_c g_t * A) / its maximum",
        library_class="HiResCAM",
        elementwise=True,
    ),
    CamMethod(
        "drise",
        "black_box",
        "D-RISE: which random masks of the image leave the detection as it was.",
        "sum_i s_i * M_i / (N * keep), s_i = best IoU * [same class] * score among the "
        "detections on the image times mask M_i",
        takes_eigen_smooth=False,
    ),
)

METHODS: dict[str, CamMethod] = {method.name: method for method in _METHODS}


def caption_of(method: str, target: str) -> str:
    """What pictures say of a method and a target: ``'boxam · score'``."""
    shared = "" if method_of(method).box_specific else " · not of the box alone"
    return f"{method} · {target}{shared}"


def method_of(name: Any) -> CamMethod:
    """Look up a method by name.

    Args:
        name (str): One of ``METHODS``.

    Raises:
        VisConfigError: If the name is unknown, or the installed grad-cam is missing
            or too old for it.
    """
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name).lower(), METHODS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise VisConfigError(
            f"method={name!r} is unknown; {hint}Choose one of {', '.join(METHODS)}"
        )
    method = METHODS[name]
    if method.library_class:
        _library_class(method)
    return method


def validate(name: Any, *, eigen_smooth: Any = False) -> CamMethod:
    """Check a method and the options of its weighting.

    Args:
        name (str): One of ``METHODS``.
        eigen_smooth (bool): See :func:`weigh`.

    Raises:
        VisConfigError: As :func:`method_of`, or if ``eigen_smooth`` is no bool or
            has no meaning for the method.
    """
    method = method_of(name)
    if not isinstance(eigen_smooth, bool):
        raise VisConfigError(
            f"eigen_smooth={eigen_smooth!r} is no truth value; set True or False"
        )
    if eigen_smooth and not method.takes_eigen_smooth:
        takers = ", ".join(m.name for m in _METHODS if m.takes_eigen_smooth)
        raise VisConfigError(
            f"eigen_smooth=True has no meaning for method={name!r}, which has no "
            f"weighted channels; leave it out, or choose one of {takers}"
        )
    return method


def weigh(
    name: str,
    activations: torch.Tensor,
    gradients: torch.Tensor | None,
    *,
    eigen_smooth: bool = False,
) -> np.ndarray:
    """Maps of the methods that need activations and gradients only.

    Departures from the library, all of them for detectors:

    - ``gradcam`` does not average the gradient, so it is HiResCAM, and ``gradcam++``
      does not sum its weights.
    - Grad-CAM++ adds 1e-6 to the denominator of alpha (eq. 19), more than the small
      gradients of a detection are. Here each gradient is divided by its size and the
      channel's sum multiplied by it. That leaves alpha as it is, but makes the 1e-6
      relative. So alpha tends to 1/2 for small gradients, and the map to half of
      LayerCAM's. The paper explains exp(y) by the gradient of y; no target is made
      a logarithm for it here.
    - Grad-CAM++ assumes activations behind a ReLU. Where the sum of a channel is
      negative (SiLU), alpha would have a pole; it is 1/2 there.
    - The sign of a principal component is arbitrary in the library. Here it is so
      that the map agrees with the sum of the weighted channels, and for ``eigencam``
      that the largest deviation is positive (Seg-Eigen-CAM, eq. 13), which is
      ``kpcacam``'s rule in scikit-learn too.

    Args:
        name (str): A method of the kind ``'gradient'`` or ``'activation'``, but for
            ``shapleycam`` :func:`weigh_second_order`.
        activations (Tensor): ``(K, C, h, w)``, any real dtype and device; K boxes
            that share activations may be an expanded tensor.
        gradients (Tensor, optional): The target's gradient per box, of the same
            shape; None where the method uses none.
        eigen_smooth (bool): Take the first principal component of the weighted
            channels instead of their sum. Defaults to False.

    Returns:
        np.ndarray: ``(K, h, w)`` float32, finite and not negative; all zero where
        the gradient is. Computed in float32 on the CPU.

    Raises:
        VisConfigError: If the method is unknown, not available, of another kind, or
            does not take ``eigen_smooth``.
        FeatureShapeError: If the shapes are wrong.
        VisError: If an input has NaN or infinities, or the result would have.
    """
    method = validate(name, eigen_smooth=eigen_smooth)
    if method.kind not in ("gradient", "activation") or method.second_order:
        raise VisConfigError(
            f"method={name!r} needs more than activations and gradients; use "
            + ("weigh_second_order" if method.second_order else "weigh_channels")
        )
    values = _array(activations, "activations")
    slopes = None
    if method.uses_gradients:
        if gradients is None:
            raise FeatureShapeError(
                f"gradients=None, but method={name!r} weighs by them; pass a tensor of "
                f"the activations' shape {values.shape}"
            )
        slopes = _array(gradients, "gradients")
        if slopes.shape != values.shape:
            raise FeatureShapeError(
                f"gradients has the shape {slopes.shape}, but activations "
                f"{values.shape}; they must be equal"
            )
    maps = np.zeros((values.shape[0], *values.shape[2:]), dtype=np.float32)
    with np.errstate(all="ignore"):
        # One call costs more than the sums of a few crops.
        together = method.elementwise and not eigen_smooth
        if together and values.size <= _MAX_VALUES_AT_ONCE:
            return _rectified(_ask(method, values, slopes), name)
        for index, value in enumerate(values):
            slope = None if slopes is None else slopes[index]
            maps[index] = _map(method, value, slope, eigen_smooth)
    return _rectified(maps, name)


def weigh_channels(
    activations: torch.Tensor,
    weights: np.ndarray | torch.Tensor,
    *,
    eigen_smooth: bool = False,
) -> np.ndarray:
    """Maps of the methods that have one weight per channel: relu(sum_c w_c * A).

    Args:
        activations (Tensor): ``(C, h, w)``, any real dtype and device.
        weights (np.ndarray | Tensor): ``(K, C)``, per box.
        eigen_smooth (bool): As in :func:`weigh`. Defaults to False.

    Returns:
        np.ndarray: ``(K, h, w)`` float32, finite and not negative.

    Raises:
        FeatureShapeError: If the shapes do not fit.
        VisError: If an input has NaN or infinities, or the result would have.
    """
    weights = torch.as_tensor(weights)
    if activations.ndim != 3 or weights.ndim != 2 or len(activations) != len(weights.T):
        raise FeatureShapeError(
            f"weights has the shape {tuple(weights.shape)} and activations "
            f"{tuple(activations.shape)}; pass (K, C) and (C, h, w)"
        )
    shape = (len(weights), *activations.shape)
    # With the same gradient in all cells, HiResCAM's map is the weighted sum.
    gradients = weights[:, :, None, None].expand(shape)
    return weigh(
        "hirescam", activations.expand(shape), gradients, eigen_smooth=eigen_smooth
    )


def weigh_second_order(
    activations: torch.Tensor, gradients: torch.Tensor, *, eigen_smooth: bool = False
) -> np.ndarray:
    """ShapleyCAM's map of one box.

    The library frees the graph behind the gradient, forward pass included: each box
    needs its own pass from the activations to the target.

    Args:
        activations (Tensor): ``(1, C, h, w)``, the very tensor that the target was
            differentiated with respect to.
        gradients (Tensor): The same shape, made with ``create_graph=True``. A
            gradient without a graph belongs to a target that is linear in the
            activations; its second derivative is zero.
        eigen_smooth (bool): As in :func:`weigh`. Defaults to False.

    Returns:
        np.ndarray: ``(1, h, w)`` float32, finite and not negative.

    Raises:
        VisConfigError: If the installed grad-cam has no ShapleyCAM.
        FeatureShapeError: If the shapes are wrong.
        VisError: If the activations have no graph, an input has NaN or infinities,
            or the result would have.
    """
    method = validate("shapleycam", eigen_smooth=eigen_smooth)
    if activations.ndim != 4 or len(activations) != 1:
        raise FeatureShapeError(
            f"activations has the shape {tuple(activations.shape)}; pass (1, C, h, w)"
        )
    if gradients.shape != activations.shape:
        raise FeatureShapeError(
            f"gradients has the shape {tuple(gradients.shape)}, but activations "
            f"{tuple(activations.shape)}; they must be equal"
        )
    if not activations.requires_grad:
        raise VisError(
            "activations have no graph, but shapleycam differentiates the gradient "
            "once more; take both with gradients enabled and create_graph=True"
        )
    _array(activations, "activations")
    _array(gradients, "gradients")
    with torch.enable_grad():
        # The library cannot differentiate a gradient that has no graph.
        gradients = gradients + 0.0 * activations
    cam = _library_cam(_library_class(method))
    weights = cam.get_cam_weights(None, None, None, activations, gradients)
    return weigh_channels(activations.detach()[0], weights, eigen_smooth=eigen_smooth)


def channels_to_ablate(activations: torch.Tensor, ratio: float) -> list[int]:
    """Which channels AblationCAM takes away.

    grad-cam ranks channels by how much of them lies where the strongest pattern of
    the activations is, and takes ``ratio`` of them from the top of the ranking *and*
    as many from its bottom; so 0.5 takes them all. Departures: at least one is taken
    from each end, none comes twice, and channels that are the same in all cells,
    which it cannot rank, are left out.

    Args:
        activations (Tensor): ``(C, h, w)``, any real dtype and device.
        ratio (float): Above 0; 1 takes all channels.

    Returns:
        list[int]: Distinct indices, those from the top first.

    Raises:
        VisConfigError: If ``ratio`` is out of range, or grad-cam is missing.
        FeatureShapeError: If the shape is wrong.
        VisError: If the activations have NaN or infinities.
    """
    validate_ratio(ratio)
    values = _array(activations[None], "activations")[0]
    varying = np.flatnonzero(np.ptp(values, axis=(1, 2)) > 0)
    if ratio == 1 or not len(varying):
        return list(range(len(values)))
    count = max(1, int(len(values) * ratio))
    if count >= len(varying):
        return [int(channel) for channel in varying]

    class Layer(_library_class(METHODS["ablationcam"])):  # type: ignore[misc]
        def objectiveness_mask_from_svd(
            self, activations: np.ndarray, threshold: float = 0.01
        ) -> np.ndarray:
            # The library's would need a matrix of cells x cells.
            projection = np.abs(_principal_component(activations))
            projection = projection - projection.min()
            return projection > threshold * projection.max()

    # Half a channel more: int(n * ratio) must not lose one to rounding.
    share = (count + 0.5) / len(varying)
    chosen = Layer().activations_to_be_ablated(values[varying], share)
    return [int(varying[index]) for index in dict.fromkeys(chosen.tolist())]


def validate_ratio(ratio: Any) -> None:
    """Check the share of channels to ablate.

    Raises:
        VisConfigError: If it is no number above 0 and at most 1.
    """
    if (
        isinstance(ratio, bool)
        or not isinstance(ratio, Real)
        or not 0 < float(ratio) <= 1
    ):
        raise VisConfigError(
            f"ratio_channels_to_ablate={ratio!r} is no share; set a number above 0, "
            "at most 1 (all channels)"
        )


def ablation_weights(score: float, ablated_scores: np.ndarray) -> np.ndarray:
    """Weights of Ablation-CAM (Desai and Ramaswamy 2020, eq. 3): (y - y_c) / y.

    Departure: divided by ``|y|``, so that a channel whose loss lowers the target has
    a positive weight for negative targets (logits) too. The difference is not divided
    where the target is 0.

    Args:
        score (float): The target on the whole layer.
        ablated_scores (np.ndarray): ``(n,)``, the target without each channel.

    Returns:
        np.ndarray: ``(n,)`` float32. A channel that was not ablated has the weight 0.

    Raises:
        VisError: If a score is NaN or infinite.
    """
    scores = np.asarray(ablated_scores, dtype=np.float64)
    _require_finite(np.append(scores, score), "the scores")
    return ((score - scores) / (abs(score) or 1.0)).astype(np.float32)


def score_weights(scores: np.ndarray) -> np.ndarray:
    """Weights of Score-CAM as the library has them: softmax over the channels.

    Args:
        scores (np.ndarray): ``(..., C)``, the target on the image behind each
            channel.

    Returns:
        np.ndarray: ``(..., C)`` float32; sums to 1 over the channels.

    Raises:
        VisError: If a score is NaN or infinite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _require_finite(scores, "the scores")
    return torch.softmax(torch.from_numpy(scores), dim=-1).numpy().astype(np.float32)


def _map(
    method: CamMethod, values: np.ndarray, slopes: np.ndarray | None, smooth: bool
) -> np.ndarray:
    """Map of one box before it is rectified: ``(C, h, w)`` twice -> ``(h, w)``."""
    if method.name == "eigencam":
        projection = _principal_component(values)
        largest = projection.flat[np.abs(projection).argmax()]
        return -projection if largest < 0 else projection
    if method.name == "kpcacam":
        return _kernel_component(method, values)
    if slopes is None:
        return _ask(method, values[None], None)[0]
    if method.name == "eigengradcam":
        return _projected(values * slopes)
    if method.name.startswith("gradcam++"):
        slopes = _plus_plus(method, values, slopes)
        method = METHODS["hirescam"]
    if smooth:
        # A channel is an image of its own here: the library has no other way to
        # hand out the channels it has weighed.
        return _projected(_ask(method, values[:, None], slopes[:, None]))
    return _ask(method, values[None], slopes[None])[0]


def _plus_plus(method: CamMethod, values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Weights of Grad-CAM++, relu(g) * alpha, ``(C, h, w)``.

    A cell is an image of two cells for the library: one of activation 1 with the
    gradient, and one without gradient that completes the sum of the channel.
    """
    # alpha has poles where the gradient is negative, and counts nothing there.
    places = np.nonzero(slopes > 0)
    sizes = slopes[places]
    sums = np.maximum(values.sum(axis=(1, 2), dtype=np.float64), 0.0)[places[0]]
    images = np.ones((len(sizes), 1, 1, 2), dtype=np.float32)
    images[:, 0, 0, 1] = sums * sizes - 1.0
    gradients = np.zeros_like(images)
    gradients[..., 0] = 1.0
    weights = np.zeros_like(slopes)
    weights[places] = _ask(method, images, gradients)[:, 0, 0] * sizes
    if method.name == "gradcam++":
        return weights
    return np.broadcast_to(weights.sum(axis=(1, 2), keepdims=True), weights.shape)


def _projected(weighted: np.ndarray) -> np.ndarray:
    """First principal component that agrees with the sum of the channels."""
    projection = _principal_component(weighted)
    return -projection if np.sum(projection * weighted.sum(axis=0)) < 0 else projection


def _principal_component(values: np.ndarray) -> np.ndarray:
    """First principal component over the channels, ``(C, h, w)`` -> ``(h, w)``.

    The library's decomposition fills a matrix of cells x cells: 7.6 s and 160 MB for
    an 80 x 80 map of 256 channels. It is therefore given the triangular factor of the
    map instead, which has the same principal directions with one row per channel, and
    once more with the opposite sign, because the library subtracts the mean.
    """
    channels, height, width = values.shape
    rows = values.reshape(channels, -1).T
    rows = rows - rows.mean(axis=0)
    basis = None
    if len(rows) > 2 * channels:
        basis, factor = np.linalg.qr(rows)
        rows = np.concatenate([factor, -factor])
    method = METHODS["eigencam"]
    projection = _ask(method, rows.T[None, :, None], None)[0, 0]
    if basis is not None:
        projection = basis @ projection[:channels]
    return projection.reshape(height, width)


def _kernel_component(method: CamMethod, values: np.ndarray) -> np.ndarray:
    cells = values.shape[1] * values.shape[2]
    if cells > _MAX_KERNEL_CELLS:
        raise VisError(
            f"method='kpcacam' needs a matrix of cells x cells, and a layer with "
            f"{values.shape[1]} x {values.shape[2]} cells is too large; choose a layer "
            f"with at most {_MAX_KERNEL_CELLS} cells, or method='eigencam'"
        )
    if not np.ptp(values, axis=(1, 2)).any():
        return np.zeros(values.shape[1:], dtype=np.float32)
    with _numpy_random_state():
        return _ask(method, values[None], None)[0]


@contextlib.contextmanager
def _numpy_random_state() -> Iterator[None]:
    """scikit-learn starts its iteration from NumPy's global random numbers."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def _ask(
    method: CamMethod, values: np.ndarray, slopes: np.ndarray | None
) -> np.ndarray:
    """The library's map, ``(B, C, h, w)`` twice -> ``(B, h, w)``."""
    cam = _library_cam(_library_class(method))
    return cam.get_cam_image(None, None, None, values, slopes, False)


def _library_cam(library_class: Any) -> Any:
    """An instance that places no hook and has a model of its own.

    Not a layer of torch.nn: initialising one draws global random numbers.
    """
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1))])
    return library_class(model=model, target_layers=[])


def _library_class(method: CamMethod) -> Any:
    try:
        library = importlib.import_module("pytorch_grad_cam")
    except ImportError as error:
        raise VisConfigError(
            f"method={method.name!r} needs pytorch-grad-cam, which does not import "
            f'({error}); run: pip install "grad-cam>={method.since}"'
        ) from error
    found = getattr(library, method.library_class, None)
    if found is None:
        raise VisConfigError(
            f"method={method.name!r} needs {method.library_class} of grad-cam "
            f"{method.since} or newer, which the installed one does not have; run: "
            f'pip install "grad-cam>={method.since}"'
        )
    return found


def _array(tensor: torch.Tensor, argument: str) -> np.ndarray:
    if tensor.ndim != 4 or tensor.numel() == 0:
        raise FeatureShapeError(
            f"{argument} has the shape {tuple(tensor.shape)}; only a non-empty "
            "(K, C, h, w) can be weighed"
        )
    array = tensor.detach().to("cpu", torch.float32).numpy()
    _require_finite(array, argument)
    return array


def _require_finite(array: np.ndarray, what: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise VisError(
            f"{what}: {array.size - np.count_nonzero(finite)} of {array.size} values "
            "are NaN or infinite, so there is nothing to weigh; look for a model that "
            "has diverged or overflows in half precision"
        )


def _rectified(maps: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(maps).all():
        raise VisError(
            f"method={name!r} gives no finite map for these activations and gradients; "
            "choose another method, such as 'boxam'"
        )
    return np.maximum(maps, 0.0)
