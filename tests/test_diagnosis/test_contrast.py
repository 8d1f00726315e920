"""What tells two classes of one box apart: maps of raw scores at one anchor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mmyolo_vis_hooks import diagnose
from mmyolo_vis_hooks.attribution.saliency import box_sigma, render_saliency
from mmyolo_vis_hooks.geometry import FrameTransform
from tests.toy_boxes import box_detector

NAMES = ("square", "lamp")


@pytest.fixture(scope="module")
def detector(tmp_path_factory, toy_data) -> nn.Module:
    return box_detector(tmp_path_factory.mktemp("toy"), toy_data, num_classes=2)


def bright_square() -> np.ndarray:
    image = np.full((128, 128, 3), 20, np.uint8)
    image[32:80, 32:80] = 250
    return image


def test_the_difference_is_that_of_the_weights_times_the_activations(detector):
    """The class scores are a 3x3 convolution: what each cell adds is known by hand."""
    image = bright_square()
    nothing = dict(boxes_xyxy=np.zeros((0, 4)), labels=[])
    scores = diagnose(detector, image, nothing, topk=0).detections.scores
    options = dict(score_thr=scores[:2].mean())  # a single box
    (false,) = diagnose(detector, image, nothing, **options).false_positives
    assert (false.class_name, false.contrast) == ("square", None)
    truth = dict(boxes_xyxy=[false.box_xyxy], labels=[1])
    found = diagnose(detector, image, truth, **options)
    (confused,) = found.false_positives
    (missed,) = found.missed
    assert missed.mechanism == "confused"
    contrast = confused.contrast
    assert contrast is missed.contrast
    assert (contrast.given_name, contrast.right_name) == NAMES
    assert repr(contrast) == "ClassContrast(lamp against square at neck[1])"

    kept = {}
    head = detector.bbox_head
    handle = head.register_forward_pre_hook(lambda _, args: kept.update(maps=args[0]))
    with handle:
        diagnose(detector, image, truth, topk=0, **options)
    (features,) = kept["maps"][1].detach()
    x1, y1, x2, y2 = confused.box_xyxy
    row, column = int((y1 + y2) / 2 // 16), int((x1 + x2) / 2 // 16)
    kernels = head.cls[1].weight.detach()
    maps = torch.zeros(2, *features.shape[1:])
    for label, i, j in np.ndindex(2, 3, 3):
        y, x = row + i - 1, column + j - 1
        maps[label, y, x] = (kernels[label, :, i, j] * features[:, y, x]).sum()
    frame = FrameTransform.stretch((128, 128), (128, 128))
    sigma = box_sigma(confused.box_xyxy, 0.1)

    def drawn(values: torch.Tensor) -> np.ndarray:
        return render_saliency(values.numpy(), frame, sigma_px=sigma)

    difference = drawn(maps[1] - maps[0])
    assert contrast.difference.min() < -0.05
    np.testing.assert_allclose(contrast.difference, difference, atol=1e-5)
    given, right = (drawn(own.relu()) for own in maps)
    peak = max(given.max(), right.max())
    np.testing.assert_allclose(contrast.given, given / peak, atol=1e-5)
    np.testing.assert_allclose(contrast.right, right / peak, atol=1e-5)
    assert contrast.given.max() == pytest.approx(1)

    # Three panels: what speaks for one, for the other, and a difference in blue.
    picture = found.draw().astype(int)
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    assert ((blue - red > 80) & (abs(red - green) < 30)).sum() > 100
    # They are shown together or not at all, beside the one panel of what is missed.
    one, three, four = (found.draw(max_panels=n) for n in (1, 3, 4))
    assert np.array_equal(three, one)
    assert np.array_equal(four, picture)
    plain = diagnose(detector, image, truth, topk=0, **options)
    assert (plain.false_positives[0].contrast, plain.missed[0].contrast) == (None, None)
    assert picture.shape[0] > plain.draw().shape[0]
