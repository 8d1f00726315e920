from __future__ import annotations

import importlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from mmyolo_vis_hooks.attribution import methods as cam_methods
from mmyolo_vis_hooks.attribution.methods import (
    METHODS,
    ablation_weights,
    channels_to_ablate,
    method_of,
    score_weights,
    validate,
    validate_ratio,
    weigh,
    weigh_channels,
    weigh_second_order,
)
from mmyolo_vis_hooks.errors import FeatureShapeError, VisConfigError, VisError

grad_cam = pytest.importorskip("pytorch_grad_cam")

FIRST_ORDER = [m.name for m in METHODS.values() if m.uses_gradients]
FIRST_ORDER.remove("shapleycam")
ACTIVATION_ONLY = ["eigencam", "fem", "kpcacam"]
WEIGHED = FIRST_ORDER + ACTIVATION_ONLY

# Two channels of two by two cells.
A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[2.0, 0.0], [1.0, 1.0]]]])
G = torch.tensor([[[[1.0, -1.0], [0.5, 0.0]], [[-1.0, 2.0], [1.0, 2.0]]]])


def skip_if_too_old(name: str) -> None:
    if not hasattr(grad_cam, METHODS[name].library_class):
        pytest.skip(f"the installed grad-cam has no {METHODS[name].library_class}")


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
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            # 1 * 1, 2 * 0, 0.5 * 3 + 1 * 1, 2 * 1
            ("boxam", [[1.0, 0.0], [2.5, 2.0]]),
            ("layercam", [[1.0, 0.0], [2.5, 2.0]]),
            # 1 - 2, -2 + 0, 1.5 + 1, 0 + 2
            ("gradcam", [[0.0, 0.0], [2.5, 2.0]]),
            ("hirescam", [[0.0, 0.0], [2.5, 2.0]]),
            ("odam", [[0.0, 0.0], [2.5, 2.0]]),
            ("odam_combined", [[0.0, 0.0], [2.5, 2.0]]),
            ("gradcamelementwise", [[1.0, 0.0], [2.5, 2.0]]),
            # The means of the gradients are 1/8 and 1.
            ("gradcam_averaged", [[2.125, 0.25], [1.375, 1.5]]),
            # sum(g * A) / sum(A): 0.5 / 10 and 1 / 4.
            ("xgradcam", [[0.55, 0.1], [0.4, 0.45]]),
            # The sums are 10 and 4, so alpha is 1/12 and 1/7 in the first channel,
            # 1/10, 1/6 and 1/10 in the second.
            ("gradcam++", [[1 / 12, 0.0], [1.5 / 7 + 1 / 6, 0.2]]),
        ],
    )
    def test_elements_and_means(self, name, expected):
        np.testing.assert_allclose(weigh(name, A, G)[0], expected, rtol=1e-5)

    def test_gradcam_plus_plus_averaged(self):
        first, second = 1 / 12 + 0.5 / 7, 2 / 10 + 1 / 6 + 2 / 10
        expected = first * A[0, 0].numpy() + second * A[0, 1].numpy()
        np.testing.assert_allclose(
            weigh("gradcam++_averaged", A, G)[0], expected, rtol=1e-5
        )

    def test_eigencam(self):
        # One channel varies along (-1, 0, 1) and the other by half of it, so the
        # first component has the length sqrt(1 + 1/4); its sign is that of +4.
        activations = torch.tensor([[[[0.0, 1.0, -1.0, 4.0]], [[0.0, 0.5, -0.5, 2.0]]]])
        expected = (np.array([0.0, 1.0, -1.0, 4.0]) - 1.0) * np.sqrt(1.25)
        np.testing.assert_allclose(
            weigh("eigencam", activations, None)[0, 0],
            np.maximum(expected, 0),
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            weigh("eigencam", -activations, None)[0, 0],
            np.maximum(expected, 0),
            rtol=1e-5,
        )

    def test_eigengradcam_keeps_the_sign_of_the_evidence(self):
        activations = torch.ones(1, 2, 1, 4)
        gradients = torch.tensor([[[[0.0, 1.0, 1.0, -4.0]], [[0.0, 0.5, 0.5, -2.0]]]])
        expected = (np.array([0.0, 1.0, 1.0, -4.0]) + 0.5) * np.sqrt(1.25)
        np.testing.assert_allclose(
            weigh("eigengradcam", activations, gradients)[0, 0],
            np.maximum(expected, 0),
            rtol=1e-5,
        )

    def test_fem(self):
        skip_if_too_old("fem")
        # Nine zeros and a ten: mean 1, standard deviation 3, so a tenth is unusual.
        activations = torch.zeros(1, 2, 2, 5)
        activations[0, 0, 1, 2] = 10.0
        activations[0, 1] = 7.0
        expected = np.zeros((2, 5))
        expected[1, 2] = 1.0
        np.testing.assert_allclose(weigh("fem", activations, None)[0], expected)

    def test_shapleycam(self):
        skip_if_too_old("shapleycam")
        activations = A.clone().requires_grad_()
        # y = sum of w A^2: g = 2 w A and H A = 2 w A, so g - H A / 2 = w A.
        target = (torch.tensor([1.0, -1.0])[:, None, None] * activations**2).sum()
        [gradients] = torch.autograd.grad(target, activations, create_graph=True)
        # The means of A are 2.5 and 1.
        expected = np.maximum(2.5 * A[0, 0].numpy() - A[0, 1].numpy(), 0)
        saliency = weigh_second_order(activations, gradients)
        assert saliency.shape == (1, 2, 2)
        np.testing.assert_allclose(saliency[0], expected, rtol=1e-5)

    def test_weights_of_channels(self):
        weights = np.array([[1.0, -1.0], [-1.0, 0.0], [0.0, 2.0]])
        expected = [
            [[0.0, 2.0], [2.0, 3.0]],
            [[0.0, 0.0], [0.0, 0.0]],
            [[4.0, 0.0], [2.0, 2.0]],
        ]
        assert weigh_channels(A[0], weights).tolist() == expected
        assert weigh_channels(A[0], torch.from_numpy(weights)).tolist() == expected


class TestFormulas:
    @pytest.mark.parametrize("name", WEIGHED)
    @pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 3, 9, 9), (1, 40, 3, 4)])
    def test_equals_the_papers(self, name, shape):
        skip_if_too_old(name)
        activations, gradients = random_pair(*shape, seed=3)
        maps = weigh(name, activations, gradients)
        assert maps.shape == (shape[0], *shape[2:])
        assert maps.dtype == np.float32
        for saliency, a, g in zip(maps, activations, gradients):
            expected = from_the_papers(name, a.double().numpy(), g.double().numpy())
            assert_same_map(saliency, expected, 1e-4)

    @pytest.mark.parametrize(
        ("name", "library_class"),
        [
            ("boxam", "LayerCAM"),
            ("gradcam", "HiResCAM"),
            ("gradcam_averaged", "GradCAM"),
            ("gradcam++_averaged", "GradCAMPlusPlus"),
            ("xgradcam", "XGradCAM"),
            ("gradcamelementwise", "GradCAMElementWise"),
        ],
    )
    @pytest.mark.parametrize("eigen_smooth", [False, True])
    def test_equals_the_library_on_a_model_of_its_own(
        self, name, library_class, eigen_smooth, capsys
    ):
        activations, gradients = random_pair(1, 6, 5, 5, seed=1)
        activations = activations.abs()  # as behind a ReLU
        gradients = gradients * 100  # far from the library's epsilon
        library = getattr(grad_cam, library_class)(torch.nn.Linear(1, 1), [])
        theirs = library.get_cam_image(
            None, None, None, activations.numpy(), gradients.numpy(), eigen_smooth
        )[0]
        capsys.readouterr()
        ours = weigh(name, activations, gradients, eigen_smooth=eigen_smooth)[0]
        if eigen_smooth:  # the library's sign is arbitrary
            theirs = theirs * np.sign((ours * theirs).sum())
        assert_same_map(ours, np.maximum(theirs, 0), 1e-4)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("name", ["eigencam", "eigengradcam", "layercam"])
    def test_large_maps_have_the_same_principal_component(self, name):
        activations, gradients = random_pair(1, 4, 30, 31)
        gradients = gradients.abs()
        smooth = name == "layercam"
        maps = weigh(name, activations, gradients, eigen_smooth=smooth)
        a, g = activations[0].double().numpy(), gradients[0].double().numpy()
        expected = (
            from_the_papers(name, a, g) if name == "eigencam" else agreeing(g * a)
        )
        assert_same_map(maps[0], expected, 1e-4)

    @pytest.mark.parametrize(
        "name", [m.name for m in METHODS.values() if m.elementwise]
    )
    def test_the_map_of_a_crop_is_the_crop_of_the_map(self, name):
        activations, gradients = random_pair(2, 5, 8, 9)
        crop = (..., slice(2, 6), slice(3, 8))
        np.testing.assert_array_equal(
            weigh(name, activations[crop], gradients[crop]),
            weigh(name, activations, gradients)[crop],
        )

    @pytest.mark.parametrize("name", ["gradcam++", "xgradcam", "gradcam_averaged"])
    def test_other_methods_need_the_whole_map(self, name):
        assert not METHODS[name].elementwise
        activations, gradients = random_pair(1, 5, 8, 9)
        crop = (..., slice(2, 6), slice(3, 8))
        part = weigh(name, activations[crop], gradients[crop])
        assert not np.allclose(part, weigh(name, activations, gradients)[crop])

    def test_weights_of_channels_with_eigen_smooth(self):
        activations, _ = random_pair(1, 5, 6, 7)
        weights = np.array([[1.0, -0.5, 0.2, 0.0, 2.0]])
        expected = agreeing(weights[0][:, None, None] * activations[0].double().numpy())
        maps = weigh_channels(activations[0], weights, eigen_smooth=True)
        assert_same_map(maps[0], expected, 1e-4)


class TestGradCamPlusPlus:
    def test_alpha_does_not_drown_in_the_library_s_epsilon(self):
        activations, gradients = random_pair(1, 6, 5, 5)
        for name in ("gradcam++", "gradcam++_averaged"):
            for scale in (1e3, 1.0, 1e-4, 1e-8):
                a = activations[0].double().numpy()
                g = scale * gradients[0].double().numpy()
                maps = weigh(name, activations, gradients * scale)
                assert_same_map(maps[0], from_the_papers(name, a, g), 1e-4)

    def test_tiny_gradients_give_half_of_layercam(self):
        activations, gradients = random_pair(1, 6, 5, 5)
        gradients = gradients * 1e-8
        half = weigh("layercam", activations, gradients) / 2
        assert_same_map(weigh("gradcam++", activations, gradients), half, 1e-4)

    def test_no_pole_where_activations_are_negative(self):
        # The sum is -2, and 2 g^2 - 2 g^3 is zero for g = 1.
        activations = torch.tensor([[[[-3.0, 1.0]]]])
        gradients = torch.ones(1, 1, 1, 2)
        maps = weigh("gradcam++", activations, gradients)
        np.testing.assert_allclose(maps, [[[0.0, 0.5]]], rtol=1e-5)
        averaged = weigh("gradcam++_averaged", activations, gradients)
        np.testing.assert_allclose(averaged, [[[0.0, 1.0]]], rtol=1e-5)

    def test_no_pole_where_the_gradient_is_negative(self):
        # 2 g^2 + 2 g^3 is zero for g = -1.
        activations = torch.tensor([[[[1.0, 1.0]]]])
        gradients = torch.tensor([[[[-1.0, 1.0]]]])
        np.testing.assert_allclose(
            weigh("gradcam++", activations, gradients), [[[0.0, 0.25]]], rtol=1e-5
        )
        np.testing.assert_allclose(
            weigh("gradcam++_averaged", activations, gradients),
            [[[0.25, 0.25]]],
            rtol=1e-5,
        )


class TestEveryMethod:
    @pytest.mark.parametrize("name", WEIGHED)
    def test_rectified_and_finite(self, name):
        skip_if_too_old(name)
        activations, gradients = random_pair(3, 6, 5, 5, seed=5)
        maps = weigh(name, activations, gradients)
        assert np.isfinite(maps).all()
        assert (maps >= 0).all()
        assert (maps.reshape(3, -1).max(axis=1) > 0).all()

    @pytest.mark.parametrize("name", WEIGHED)
    def test_boxes_do_not_see_each_other(self, name):
        skip_if_too_old(name)
        activations, gradients = random_pair(3, 6, 5, 5, seed=7)
        maps = weigh(name, activations, gradients)
        for index in range(3):
            one = slice(index, index + 1)
            alone = weigh(name, activations[one], gradients[one])
            np.testing.assert_array_equal(maps[one], alone)

    @pytest.mark.parametrize("name", WEIGHED)
    def test_tiny_gradients_are_not_blank(self, name):
        skip_if_too_old(name)
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
        skip_if_too_old(name)
        activations = torch.arange(1.0, 4.0)[None, :, None, None].expand(1, 3, 16, 16)
        maps = weigh(name, activations, torch.ones_like(activations))
        assert not maps.any()

    @pytest.mark.parametrize("name", WEIGHED)
    def test_a_single_cell(self, name):
        skip_if_too_old(name)
        activations, gradients = random_pair(2, 6, 1, 1)
        assert np.isfinite(weigh(name, activations, gradients)).all()

    @pytest.mark.parametrize("name", WEIGHED)
    def test_inputs_random_numbers_and_modes_are_untouched(self, name):
        skip_if_too_old(name)
        activations, gradients = random_pair(1, 6, 16, 16)
        kept = activations.clone(), gradients.clone()
        numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
        weigh(name, activations, gradients)
        assert torch.equal(activations, kept[0])
        assert torch.equal(gradients, kept[1])
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.random.get_state()[2] == numpy_state[2]
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state[1])

    def test_kpcacam_is_the_same_every_time(self):
        skip_if_too_old("kpcacam")
        activations, _ = random_pair(1, 6, 16, 16)  # large enough for a random start
        first = weigh("kpcacam", activations, None)
        np.random.seed(1)
        np.testing.assert_array_equal(weigh("kpcacam", activations, None), first)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        activations, gradients = (t.to(dtype) for t in random_pair(1, 6, 5, 5))
        maps = weigh("boxam", activations, gradients)
        assert maps.dtype == np.float32
        expected = weigh("boxam", activations.float(), gradients.float())
        np.testing.assert_array_equal(maps, expected)

    def test_shared_activations(self):
        activations, gradients = random_pair(3, 6, 5, 5)
        shared = activations[:1].expand(3, -1, -1, -1)
        for name in ("boxam", "gradcam++", "xgradcam"):
            np.testing.assert_array_equal(
                weigh(name, shared, gradients), weigh(name, shared.clone(), gradients)
            )

    def test_tensors_with_a_graph(self):
        activations, gradients = random_pair(1, 6, 5, 5)
        maps = weigh("boxam", activations.requires_grad_(), gradients * activations)
        assert maps.max() > 0


class TestShapleyCam:
    @pytest.fixture(autouse=True)
    def _available(self):
        skip_if_too_old("shapleycam")

    def test_equals_the_formula_through_a_network(self):
        torch.manual_seed(0)
        head = torch.nn.Sequential(
            torch.nn.Conv2d(4, 6, 3, padding=1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(6, 1, 3),
        ).double()

        def score(tensor):
            return head(tensor)[0, 0, 1, 1].sigmoid()

        values, _ = random_pair(1, 4, 6, 6)
        values = values.double()
        activations = values.clone().requires_grad_()
        target = score(activations)
        [gradients] = torch.autograd.grad(target, activations, create_graph=True)
        saliency = weigh_second_order(activations, gradients)

        hessian = torch.autograd.functional.hessian(score, values)
        product = hessian.reshape(values.numel(), -1) @ values.flatten()
        weights = (gradients.detach() - product.view_as(values) / 2).mean((0, 2, 3))
        expected = (weights[:, None, None] * values[0]).sum(0).clamp(min=0).numpy()
        assert_same_map(saliency[0], expected)
        assert all(parameter.grad is None for parameter in head.parameters())
        assert head.training

    @pytest.mark.parametrize("eigen_smooth", [False, True])
    def test_linear_target_is_averaged_gradcam(self, eigen_smooth):
        values, slopes = random_pair(1, 4, 6, 6)
        activations = values.clone().requires_grad_()
        [gradients] = torch.autograd.grad(
            (activations * slopes).sum(), activations, create_graph=True
        )
        assert not gradients.requires_grad
        np.testing.assert_allclose(
            weigh_second_order(activations, gradients, eigen_smooth=eigen_smooth),
            weigh("gradcam_averaged", values, slopes, eigen_smooth=eigen_smooth),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_without_gradients_enabled(self):
        activations = A.clone().requires_grad_()
        [gradients] = torch.autograd.grad(
            (activations**2).sum(), activations, create_graph=True
        )
        with torch.no_grad():
            assert weigh_second_order(activations, gradients).max() > 0

    def test_what_is_refused(self):
        with pytest.raises(VisError, match="create_graph=True"):
            weigh_second_order(A, G)
        two = A.repeat(2, 1, 1, 1).requires_grad_()
        with pytest.raises(FeatureShapeError, match=r"pass \(1, C, h, w\)"):
            weigh_second_order(two, two)
        with pytest.raises(FeatureShapeError, match="gradients has the shape"):
            weigh_second_order(A.clone().requires_grad_(), G[:, :1])
        with pytest.raises(VisConfigError, match="use weigh_second_order"):
            weigh("shapleycam", A, G)


class TestChannelsToAblate:
    def test_all(self):
        activations, _ = random_pair(1, 7, 5, 5)
        assert channels_to_ablate(activations[0], 1) == list(range(7))
        assert channels_to_ablate(activations[0], 1.0) == list(range(7))

    def test_a_share_from_both_ends(self):
        # The first component is that of the strong channel 0. The third cell is
        # nearest to its mean, and the only one that is not looked at.
        activations = torch.tensor(
            [
                [[0.0, 18.0, 9.0, 18.0, 0.0, 9.4]],  # 45.4 of 54.4
                [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]],  # 2 of 3
                [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]],  # all
                [[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]],  # nothing
            ]
        )
        assert channels_to_ablate(activations, 0.25) == [2, 3]
        assert channels_to_ablate(activations, 0.5) == [2, 0, 3, 1]
        assert channels_to_ablate(activations, 0.75) == [2, 0, 1, 3]

    @pytest.mark.parametrize("ratio", [0.01, 0.1, 0.29, 0.5, 0.7, 0.99])
    def test_each_once_and_as_many_as_the_ratio_says(self, ratio):
        activations, _ = random_pair(1, 100, 6, 6)
        chosen = channels_to_ablate(activations[0], ratio)
        assert len(chosen) == min(100, 2 * max(1, int(100 * ratio)))
        assert len(set(chosen)) == len(chosen)
        assert all(type(channel) is int for channel in chosen)

    def test_same_channels_as_the_library(self):
        activations, _ = random_pair(1, 20, 9, 9)
        theirs = grad_cam.AblationLayer().activations_to_be_ablated(
            activations[0].numpy(), 0.25
        )
        assert channels_to_ablate(activations[0], 0.25) == theirs.tolist()

    @pytest.mark.filterwarnings("error")
    def test_channels_that_are_the_same_everywhere_are_left_out(self):
        activations, _ = random_pair(1, 10, 5, 5)
        activations = activations[0]
        activations[[2, 5]] = 3.0
        assert set(channels_to_ablate(activations, 0.9)) == {0, 1, 3, 4, 6, 7, 8, 9}
        assert not {2, 5} & set(channels_to_ablate(activations, 0.2))
        assert channels_to_ablate(torch.ones(3, 4, 4), 0.5) == [0, 1, 2]

    @pytest.mark.parametrize("ratio", [0, -0.1, 1.1, True, "0.5", None, float("nan")])
    def test_ratio_is_checked(self, ratio):
        with pytest.raises(VisConfigError, match="ratio_channels_to_ablate="):
            validate_ratio(ratio)
        with pytest.raises(VisConfigError, match="ratio_channels_to_ablate="):
            channels_to_ablate(A[0], ratio)


class TestWeights:
    def test_ablation_by_hand(self):
        weights = ablation_weights(0.8, np.array([0.4, 0.8, 1.0]))
        np.testing.assert_allclose(weights, [0.5, 0.0, -0.25], rtol=1e-6, atol=1e-8)
        assert weights.dtype == np.float32

    def test_ablation_of_a_negative_target_keeps_the_sign(self):
        np.testing.assert_allclose(
            ablation_weights(-2.0, np.array([-3.0, -1.0])), [0.5, -0.5]
        )

    def test_ablation_of_a_target_that_is_zero(self):
        assert ablation_weights(0.0, np.array([-1.0, 2.0])).tolist() == [1.0, -2.0]

    def test_score_by_hand(self):
        weights = score_weights(np.log([[1.0, 3.0], [2.0, 2.0]]))
        np.testing.assert_allclose(weights, [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
        assert weights.dtype == np.float32

    def test_not_finite(self):
        for call in (
            lambda: ablation_weights(float("nan"), np.ones(2)),
            lambda: ablation_weights(1.0, np.array([1.0, np.inf])),
            lambda: score_weights(np.array([1.0, np.nan])),
        ):
            with pytest.raises(VisError, match="NaN or infinite"):
                call()


class TestNames:
    def test_table(self):
        assert all(method.name == name for name, method in METHODS.items())
        assert next(iter(METHODS)) == "boxam"
        assert {m.name for m in METHODS.values() if not m.box_specific} == {
            "eigencam",
            "fem",
            "kpcacam",
        }
        assert {m.name: m.default_smooth for m in METHODS.values()} == {
            name: 0.1 if name == "boxam" else 0.0 for name in METHODS
        }
        assert [m.name for m in METHODS.values() if m.second_order] == ["shapleycam"]
        kinds = {m.kind for m in METHODS.values()}
        assert kinds == {"gradient", "activation", "ablation", "masking", "black_box"}

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_is_there_and_described(self, name):
        skip_if_too_old(name) if METHODS[name].library_class else None
        method = method_of(name)
        assert method.summary.endswith(".")
        assert method.formula
        assert method.takes_eigen_smooth or name in (
            *ACTIVATION_ONLY,
            "eigengradcam",
            "drise",
        )

    @pytest.mark.parametrize(
        ("name", "near"),
        [("gradcam+", "gradcam"), ("LayerCAM", "layercam"), ("box-am", "boxam")],
    )
    def test_near_matches(self, name, near):
        with pytest.raises(VisConfigError, match=f"did you mean .*'{near}'"):
            method_of(name)

    @pytest.mark.parametrize("name", [None, 3, "zzz"])
    def test_unknown(self, name):
        with pytest.raises(VisConfigError, match="is unknown; Choose one of boxam, "):
            method_of(name)

    def test_eigen_smooth_is_checked(self):
        assert validate("boxam", eigen_smooth=True).name == "boxam"
        with pytest.raises(VisConfigError, match="eigen_smooth='yes'"):
            validate("boxam", eigen_smooth="yes")
        for name in ("eigencam", "drise", "eigengradcam"):
            with pytest.raises(
                VisConfigError, match="eigen_smooth=True has no meaning"
            ):
                validate(name, eigen_smooth=True)


class TestInputs:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("which", [0, 1])
    def test_not_finite(self, value, which):
        pair = [A.clone(), G.clone()]
        pair[which][0, 0, 0, 0] = value
        argument = ("activations", "gradients")[which]
        with pytest.raises(VisError, match=f"{argument}: 1 of 8 values are NaN"):
            weigh("boxam", *pair)

    def test_a_map_that_is_not_finite_is_refused(self):
        huge = torch.full((1, 2, 2, 2), 3e38)
        with pytest.raises(VisError, match="method='layercam' gives no finite map"):
            weigh("layercam", huge, huge)

    def test_shapes(self):
        with pytest.raises(FeatureShapeError, match="activations has the shape"):
            weigh("boxam", A[0], G[0])
        with pytest.raises(FeatureShapeError, match="activations has the shape"):
            weigh("boxam", A[:0], G[:0])
        with pytest.raises(FeatureShapeError, match="they must be equal"):
            weigh("boxam", A, G[..., :1])
        with pytest.raises(FeatureShapeError, match="gradients=None"):
            weigh("boxam", A, None)
        with pytest.raises(FeatureShapeError, match=r"pass \(K, C\)"):
            weigh_channels(A[0], np.ones(2))
        with pytest.raises(FeatureShapeError, match=r"pass \(K, C\)"):
            weigh_channels(A[0], np.ones((1, 3)))

    @pytest.mark.parametrize("name", ["ablationcam", "scorecam", "drise"])
    def test_methods_of_another_kind(self, name):
        with pytest.raises(VisConfigError, match="needs more than activations"):
            weigh(name, A, G)

    def test_kernels_that_would_fill_the_memory(self):
        skip_if_too_old("kpcacam")
        with pytest.raises(VisError, match="at most 10000 cells"):
            weigh("kpcacam", torch.zeros(1, 1, 101, 100), None)


class TestLibrary:
    def test_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
        message = r'does not import .*run: pip install "grad-cam>=1.5"'
        with pytest.raises(VisConfigError, match=message):
            method_of("boxam")
        with pytest.raises(VisConfigError, match=message):
            weigh("boxam", A, G)
        assert method_of("drise").kind == "black_box"  # needs none of it

    @pytest.mark.parametrize("name", ["fem", "kpcacam", "shapleycam"])
    def test_too_old(self, name, monkeypatch):
        method = METHODS[name]
        old = types.ModuleType("pytorch_grad_cam")
        for attribute in ("LayerCAM", "HiResCAM"):
            setattr(old, attribute, getattr(grad_cam, attribute))
        monkeypatch.setitem(sys.modules, "pytorch_grad_cam", old)
        message = f"needs {method.library_class} of grad-cam {method.since} or newer"
        with pytest.raises(VisConfigError, match=message):
            method_of(name)
        np.testing.assert_allclose(weigh("boxam", A, G)[0, 0, 0], 1.0)

    def test_its_classes_place_no_hooks(self, monkeypatch):
        made = []
        cam_of = cam_methods._library_cam

        def remember(library_class):
            made.append(cam_of(library_class))
            return made[-1]

        monkeypatch.setattr(cam_methods, "_library_cam", remember)
        for name in FIRST_ORDER:
            weigh(name, A, G)
        assert len(made) >= len(FIRST_ORDER)
        for cam in made:
            assert cam.target_layers == []
            assert cam.activations_and_grads.handles == []

    def test_is_imported_on_first_use(self):
        importlib.import_module("mmyolo_vis_hooks.attribution.methods")
        code = (
            "import sys, mmyolo_vis_hooks.attribution.methods as c; "
            "assert c.METHODS; assert 'pytorch_grad_cam' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
