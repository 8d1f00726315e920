from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from mmyolo_vis_hooks.attribution import methods
from mmyolo_vis_hooks.attribution.methods import METHODS, register_method, validate
from mmyolo_vis_hooks.attribution.perturb import ablationcam
from mmyolo_vis_hooks.attribution.targets import ChosenBoxes, register_target
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError

pytest.importorskip("pytorch_grad_cam")

FIRST_ORDER = [
    m.name for m in METHODS.values() if m.kind == "gradient" and not m.second_order
]
ACTIVATION_ONLY = [m.name for m in METHODS.values() if m.kind == "activation"]
WEIGHED = FIRST_ORDER + ACTIVATION_ONLY


def weigh(
    name: str, activations: torch.Tensor, *derivatives: torch.Tensor, **options: bool
) -> np.ndarray:
    given = derivatives if METHODS[name].kind == "gradient" else ()
    return methods.weigh(name, activations, *given, **options).numpy()


# Two channels of two by two cells.
A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[2.0, 0.0], [1.0, 1.0]]]])
G = torch.tensor([[[[1.0, -1.0], [0.5, 0.0]], [[-1.0, 2.0], [1.0, 2.0]]]])


def random_pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as behind a SiLU (some negative), gradients of both signs."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.nn.functional.silu(torch.randn(*shape, generator=generator) * 3)
    return activations, torch.randn(*shape, generator=generator) * 0.1


def principal_component(channels: np.ndarray) -> np.ndarray:
    """By the eigenvectors of the covariance, without any sign."""
    flat = channels.reshape(len(channels), -1).astype(np.float64)
    centred = flat - flat.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    return (vectors[:, -1] @ centred).reshape(channels.shape[1:])


def agreeing(channels: np.ndarray) -> np.ndarray:
    projection = principal_component(channels)
    sign = np.sign((projection * channels.sum(axis=0)).sum())
    return np.maximum(sign * projection, 0)


def plus_plus_alpha(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Eq. 19 of Grad-CAM++ where the gradient is positive, 0 elsewhere."""
    sums = np.maximum(a.sum(axis=(1, 2), keepdims=True), 0)
    with np.errstate(all="ignore"):
        return np.where(g > 0, g**2 / (2 * g**2 + sums * g**3), 0)


def from_the_papers(name: str, a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Maps of one box in float64: ``(C, h, w)`` twice -> ``(h, w)``."""
    relu_g = np.maximum(g, 0)

    def channels(weights):
        return np.maximum((weights[:, None, None] * a).sum(axis=0), 0)

    if name in ("boxam", "layercam"):
        return np.maximum((relu_g * a).sum(axis=0), 0)
    if name in ("gradcam", "hirescam", "odam", "odam_combined"):
        return np.maximum((g * a).sum(axis=0), 0)
    if name == "gradcam++":
        return np.maximum((relu_g * plus_plus_alpha(a, g) * a).sum(axis=0), 0)
    if name == "gradcam++_averaged":
        return channels((relu_g * plus_plus_alpha(a, g)).sum(axis=(1, 2)))
    if name == "ssgradcam++":
        weights = (relu_g * plus_plus_alpha(a, g)).sum(axis=(1, 2), keepdims=True)
        sensitivity = np.abs(g) / np.abs(g).max(axis=(1, 2), keepdims=True)
        return np.maximum((weights * sensitivity * a).sum(axis=0), 0)
    if name == "gradcam_averaged":
        return channels(g.mean(axis=(1, 2)))
    if name == "xgradcam":
        return channels((g * a).sum(axis=(1, 2)) / a.sum(axis=(1, 2)))
    if name == "gradcamelementwise":
        return np.maximum(g * a, 0).sum(axis=0)
    if name == "eigengradcam":
        return agreeing(g * a)
    if name == "eigencam":
        projection = principal_component(a)
        extreme = projection.flat[np.abs(projection).argmax()]
        return np.maximum(np.sign(extreme) * projection, 0)
    if name == "fem":
        mean = a.mean(axis=(1, 2), keepdims=True)
        unusual = a > mean + 2 * a.std(axis=(1, 2), keepdims=True)
        return channels(unusual.mean(axis=(1, 2)))
    if name == "kpcacam":
        rows = a.reshape(len(a), -1).T
        rows = rows - rows.mean(axis=0)
        kernel = np.tanh(rows @ rows.T / rows.shape[1] + 1)
        centre = np.eye(len(kernel)) - 1 / len(kernel)
        values, vectors = np.linalg.eigh(centre @ kernel @ centre)
        vector = vectors[:, -1] * np.sqrt(values[-1])
        vector *= np.sign(vector[np.abs(vector).argmax()])
        return np.maximum(vector, 0).reshape(a.shape[1:])
    raise AssertionError(name)


def assert_same_map(actual: np.ndarray, expected: np.ndarray, rel=1e-5) -> None:
    """To a share of the map's maximum, which must not be blank."""
    assert expected.max() > 0
    assert np.abs(actual - expected).max() <= rel * expected.max()


class TestByHand:
    def test_shapleycam(self):
        # y = sum of w A^2: g = 2 w A and H A = 2 w A, so g - H A / 2 = w A.
        slopes = 2 * torch.tensor([1.0, -1.0])[:, None, None] * A
        # The means of A are 2.5 and 1.
        expected = np.maximum(2.5 * A[0, 0].numpy() - A[0, 1].numpy(), 0)
        found = weigh("shapleycam", A, slopes, slopes)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_ablation_is_by_the_size_of_the_target(self):
        # What each channel adds to three targets: -2, 4 and 0 in all.
        parts = torch.tensor([[1.0, 3.0, 1.0], [-3.0, 1.0, -1.0]]).double()
        layer: Any = types.SimpleNamespace(
            activations=A[0],
            ratio=1.0,
            scores=lambda: parts.sum(0),
            scores_times=lambda factors: factors.double() @ parts,
        )
        expected = [[0.5, -1.5], [0.75, 0.25], [1.0, -1.0]]
        assert ablationcam(layer).tolist() == expected


class TestFormulas:
    @pytest.mark.parametrize("name", WEIGHED)
    @pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 40, 3, 4)])
    def test_equals_the_papers(self, name, shape):
        activations, gradients = random_pair(*shape, seed=3)
        maps = weigh(name, activations, gradients)
        assert maps.shape == (shape[0], *shape[2:])
        assert maps.dtype == np.float32
        for saliency, a, g in zip(maps, activations, gradients):
            expected = from_the_papers(name, a.double().numpy(), g.double().numpy())
            assert_same_map(saliency, expected, 1e-4)

    @pytest.mark.parametrize("name", ["layercam", "gradcam_averaged"])
    def test_eigen_smooth(self, name):
        activations, gradients = random_pair(1, 6, 5, 7)
        a, g = activations[0].double().numpy(), gradients[0].double().numpy()
        weights = np.maximum(g, 0)
        if name == "gradcam_averaged":
            weights = g.mean(axis=(1, 2), keepdims=True)
        maps = weigh(name, activations, gradients, eigen_smooth=True)
        assert_same_map(maps[0], agreeing(weights * a), 1e-4)
        if name == "gradcam_averaged":
            channels = torch.from_numpy(weights[None, :, 0, 0]).float()
            found = methods.weigh_channels(activations[0], channels, eigen_smooth=True)
            assert_same_map(found[0].numpy(), agreeing(weights * a), 1e-4)

    @pytest.mark.parametrize("name", FIRST_ORDER)
    def test_elementwise_methods_need_no_more_than_a_crop(self, name):
        activations, gradients = random_pair(2, 5, 8, 9)
        crop = (..., slice(2, 6), slice(3, 8))
        part = weigh(name, activations[crop], gradients[crop])
        whole = weigh(name, activations, gradients)[crop]
        assert np.allclose(part, whole, rtol=1e-5) == METHODS[name].elementwise


class TestGradCamPlusPlus:
    def test_alpha_does_not_drown_in_the_library_s_epsilon(self):
        activations, gradients = random_pair(1, 6, 5, 5)
        for name in ("gradcam++", "gradcam++_averaged"):
            for scale in (1e3, 1.0, 1e-4, 1e-8):
                a = activations[0].double().numpy()
                g = scale * gradients[0].double().numpy()
                maps = weigh(name, activations, gradients * scale)
                assert_same_map(maps[0], from_the_papers(name, a, g), 1e-4)

    @pytest.mark.parametrize(
        ("activations", "gradients", "whole", "averaged"),
        [
            # The sum is -2, and 2 g^2 - 2 g^3 is zero for g = 1.
            ([-3.0, 1.0], [1.0, 1.0], [0.0, 0.5], [0.0, 1.0]),
            # 2 g^2 + 2 g^3 is zero for g = -1.
            ([1.0, 1.0], [-1.0, 1.0], [0.0, 0.25], [0.25, 0.25]),
        ],
    )
    def test_there_is_no_pole(self, activations, gradients, whole, averaged):
        given = [
            torch.tensor(values)[None, None, None]
            for values in (activations, gradients)
        ]
        for name, expected in (("gradcam++", whole), ("gradcam++_averaged", averaged)):
            np.testing.assert_allclose(weigh(name, *given), [[expected]], rtol=1e-5)


class TestEveryMethod:
    @pytest.mark.parametrize("name", WEIGHED)
    def test_tiny_gradients_are_not_blank(self, name):
        activations, gradients = random_pair(1, 6, 5, 5)
        maps = weigh(name, activations, gradients)
        tiny = weigh(name, activations, gradients * 1e-8)
        assert tiny.max() > 0
        if "++" in name:  # the map's shape depends on the size of the gradient
            return
        assert_same_map(tiny / tiny.max(), maps / maps.max(), 1e-3)

    @pytest.mark.parametrize("name", FIRST_ORDER)
    @pytest.mark.filterwarnings("error")
    def test_no_gradient_gives_a_blank_map_and_no_warning(self, name):
        activations, gradients = random_pair(1, 6, 5, 5)
        zero = torch.zeros_like(gradients)
        for eigen_smooth in {False, METHODS[name].takes_eigen_smooth}:
            maps = weigh(name, activations, zero, eigen_smooth=eigen_smooth)
            assert not maps.any()

    @pytest.mark.parametrize("name", [*ACTIVATION_ONLY, "eigengradcam"])
    @pytest.mark.filterwarnings("error")
    def test_the_same_in_all_cells_gives_a_blank_map(self, name):
        activations = torch.arange(1.0, 4.0)[None, :, None, None].expand(1, 3, 16, 16)
        maps = weigh(name, activations, torch.ones_like(activations))
        assert not maps.any()

    def test_other_dtypes(self):
        activations, gradients = (t.bfloat16() for t in random_pair(1, 6, 5, 5))
        maps = weigh("boxam", activations, gradients)
        assert maps.dtype == np.float32
        expected = weigh("boxam", activations.float(), gradients.float())
        np.testing.assert_array_equal(maps, expected)


class TestRefusals:
    def test_shapes(self):
        for wrong in (torch.ones(1, 2, 2, 3), torch.ones(2, 2, 2)):
            with pytest.raises(FeatureShapeError, match="must be equal"):
                weigh("boxam", A, wrong)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("name", ["boxam", "eigencam", "fem"])
    def test_what_is_not_finite(self, name, value):
        wrong = A.clone()
        wrong[0, 1, 0, 1] = value
        with pytest.raises(VisError, match="1 of 8 values are NaN or infinite"):
            weigh(name, wrong, G)

    def test_large_maps_of_kpcacam(self):
        with pytest.raises(VisError, match=r"200 x 60 cells.*'eigencam'"):
            weigh("kpcacam", torch.rand(1, 2, 200, 60))

    def test_a_library_that_is_missing_or_old(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_grad_cam", types.ModuleType("old"))
        with pytest.raises(VisConfigError, match=r"needs FEM.*grad-cam>=1.5.5"):
            validate("fem")
        monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
        with pytest.raises(VisConfigError, match=r"does not import.*pip install"):
            validate("xgradcam")
        assert validate("boxam").default_smooth == 0.1


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_function_but_a_cell_may_be_run_again():
    """Of methods and targets alike; the registries are restored afterwards."""

    def cell(factor: float) -> None:
        @register_method("mine", kind="gradient", summary="", formula="")
        def mine(activations: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
            return factor * gradients.sum(1)

        @register_target("own", summary="")
        def own(boxes: ChosenBoxes) -> torch.Tensor:
            return factor * boxes.scores

    cell(1.0)
    cell(2.0)
    ones = torch.ones(1, 3, 2, 2)
    assert METHODS["mine"].function(ones, ones).max() == 6

    def other(*_: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 2, 2)

    for register, name in (
        (register_method("mine", kind="gradient", summary="", formula=""), "mine"),
        (register_method("boxam", kind="gradient", summary="", formula=""), "boxam"),
        (register_target("own", summary=""), "own"),
        (register_target("x1", summary=""), "x1"),
    ):
        with pytest.raises(VisConfigError, match=f"={name!r} is registered already"):
            register(other)
    assert METHODS["mine"].function(ones, ones).max() == 6
    for name in (3, "", None):
        with pytest.raises(VisConfigError, match=f"method={name!r} cannot work"):
            register_method(name, kind="gradient", summary="", formula="")(other)
