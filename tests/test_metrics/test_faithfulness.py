"""Insertion and deletion by hand, on images of which the score is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmyolo_vis_hooks.attribution.blackbox import vector_similarities
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.metrics.baselines import BASELINES
from mmyolo_vis_hooks.metrics.faithfulness import (
    area_under,
    blurred,
    curves_of,
    ranks_of,
    subjects_of,
)
from mmyolo_vis_hooks.metrics.metric import METRICS, Metric, Subject
from mmyolo_vis_hooks.metrics.pointing_game import box_region
from mmyolo_vis_hooks.records import Detections

SIZE = (20, 24)
BOX = np.array([4.0, 4.0, 16.0, 12.0])  # 96 pixels


def pixels_that_count(*places: tuple[int, int]) -> np.ndarray:
    counts = np.zeros(SIZE, bool)
    counts[tuple(np.transpose(places))] = True
    return counts


def subject_that_lives_on(counts: np.ndarray, asked: list | None = None) -> Subject:
    """Its score is the share of some pixels that are shown."""

    def score(shown: np.ndarray, neutral: str) -> np.ndarray:
        if asked is not None:
            asked.append((shown.copy(), neutral))
        return (shown & counts).sum((1, 2)) / counts.sum()

    return Subject(BOX, score=score)


def test_curves_by_hand():
    region = np.array([[True, True, False], [True, True, False]])
    ranks = np.array([[5, 1, 0], [2, 4, 3]])  # in the region: 3, 0, 1, 2
    weights = np.array([[1.0, 4.0, 2.0], [2.0, 1.0, 0.0]])

    def score(shown: np.ndarray) -> np.ndarray:
        assert shown[:, :, 2].all()  # what is around it stays
        return (shown * weights).sum((1, 2)) / 10

    shares = np.linspace(0, 1, 5)
    inserted, deleted = curves_of(ranks, region, shares, score)
    np.testing.assert_allclose(inserted, [0.2, 0.6, 0.8, 0.9, 1.0])
    np.testing.assert_allclose(deleted, [1.0, 0.6, 0.4, 0.3, 0.2])
    assert area_under(inserted, shares) == pytest.approx(0.725)
    assert area_under(deleted, shares) == pytest.approx(0.475)
    # Over shares that grow quadratically.
    assert area_under(np.array([0.0, 1.0, 1.0]), np.array([0.0, 0.25, 1.0])) == 0.875


def test_ties_are_broken_by_the_distance_from_the_box():
    saliency = np.zeros(SIZE)
    saliency[0, 0] = 1.0
    saliency[5, 5] = -1.0
    ranks = ranks_of(saliency, BOX)
    assert sorted(ranks.ravel()) == list(range(saliency.size))
    assert ranks[0, 0] == 0
    assert ranks[5, 5] == saliency.size - 1  # what speaks against it comes last
    inside = box_region(BOX, SIZE)
    inside[5, 5] = False
    assert set(ranks[inside]) == set(range(1, 96))  # the other 95 of the box
    next_to_it, far = ranks[8, 16], ranks[8, 23]  # half a pixel, 7.5 pixels
    assert 96 <= next_to_it < far
    # Within the box neither rows nor what is central come first.
    assert not (np.diff(ranks[inside]) > 0).all()
    assert abs(np.nonzero(inside & (ranks <= 48))[0].mean() - 7.5) < 3


@pytest.mark.parametrize("name", ["inside", "inside_black", "inside_road"])
def test_what_is_inside_by_hand(name):
    """The eight pixels that count are ranked first, last, and shown second."""
    counts = np.zeros(SIZE, bool)
    counts[4, 4:12] = True  # 8 pixels, one of the 12 steps
    asked: list = []
    subject = subject_that_lives_on(counts, asked)
    values = METRICS[name].function(counts.astype(float), subject)
    assert values[f"{name}_ins"] == pytest.approx(1 - 0.5 / 12)
    assert values[f"{name}_del"] == pytest.approx(0.5 / 12)
    assert values[name] == pytest.approx(11 / 12)
    assert values[f"{name}_ins_curve"].tolist() == [0.0, *[1.0] * 12]
    against = METRICS[name].function(-counts.astype(float), subject)
    assert against[name] == pytest.approx(-11 / 12)
    shown, neutral = asked[0]
    assert len(shown) == 23  # eleven steps each way, and all of the box
    assert neutral == name.partition("_")[2] or "blur"
    outside = ~box_region(BOX, SIZE)
    assert shown[:, outside].all()
    assert sorted(96 - (~s).sum() for s in shown) == sorted(
        [0, *2 * list(range(8, 96, 8))]
    )


def test_over_the_image_by_hand():
    counts = pixels_that_count((0, 0))
    asked: list = []
    subject = subject_that_lives_on(counts, asked)
    values = METRICS["image"].function(counts.astype(float), subject)
    # It is there after the first of 16 quadratic steps.
    assert values["image_ins"] == pytest.approx(1 - 0.5 / 256)
    assert values["image_del"] == pytest.approx(0.5 / 256)
    total = SIZE[0] * SIZE[1]
    assert [s.sum() for s in asked[0][0][:16]] == [
        round(total * (k / 16) ** 2) for k in range(16)
    ]
    values = METRICS["vps"].function(counts.astype(float), subject)
    assert values["vps"] == pytest.approx(1 - 1 / 49)
    assert len(values["vps_ins_curve"]) == 50
    assert asked[1][1] == "black"


def test_iou_times_the_cosine_of_class_vectors_by_hand():
    box = [0.0, 0.0, 10.0, 10.0]
    wanted = _detections([box, box, [50, 50, 60, 60]], [0.6, 0.8, 0.5], [1, 3, 0])
    every = range(3)
    # Half of the box has both classes, all of it the second alone.
    half = [0.0, 0.0, 10.0, 5.0]
    found = _detections([half, half, box], [0.3, 0.4, 0.1], [1, 3, 3])
    # On the box 1 * cos((0.6, 0.8), (0, 1)), more than 0.5 * 1 on half of it.
    likeness = vector_similarities(wanted, every, found)
    np.testing.assert_allclose(likeness, [0.8, 0.8, 0.0], rtol=1e-6)
    likeness = vector_similarities(wanted, every, found.take([0, 1]))
    np.testing.assert_allclose(likeness, [0.5, 0.5, 0.0], rtol=1e-6)
    assert vector_similarities(wanted, every, wanted) == pytest.approx([1, 1, 1])
    assert not vector_similarities(wanted, every, Detections()).any()
    # What else lies there counts, whichever are asked for.
    assert vector_similarities(wanted, [2, 0], found) == pytest.approx([0, 0.8])


def _detections(boxes, scores, labels) -> Detections:
    return Detections(np.float32(boxes), np.float32(scores), np.array(labels))


def test_what_cannot_be_measured_has_no_value():
    tiny = Subject(np.array([2.0, 2.0, 4.0, 4.0]), score=lambda *_: 1 / 0)
    assert METRICS["inside"].function(np.ones(SIZE), tiny) == {}
    assert METRICS["image"].function(np.ones(SIZE), Subject(BOX)) == {}


def test_metrics_are_means_and_forget():
    metric = Metric("energy")
    first, second = np.zeros(SIZE), np.ones(SIZE)
    first[5, 5] = 2.0
    mask = np.zeros(SIZE, bool)
    mask[5, 5] = True
    assert metric.update(first, Subject(BOX, mask=mask)) == {
        "energy_box": 1.0,
        "energy_mask": 1.0,
    }
    metric.update(second, Subject(BOX))
    assert metric.compute() == {"energy_box": 0.6, "energy_mask": 1.0}
    metric.reset()
    assert metric.compute() == {}
    with pytest.raises(VisConfigError, match="did you mean 'energy'"):
        Metric("energie")


def test_truth_goes_before_what_was_found_and_negatives_count_nothing():
    saliency = np.zeros(SIZE)
    saliency[5, 5], saliency[0, 0] = 3.0, -9.0
    away = Subject(BOX, truth_xyxy=np.array([0.0, 0.0, 2.0, 2.0]))
    for name in ("pointing", "energy"):
        found = METRICS[name].function(saliency, Subject(BOX))
        assert found == {f"{name}_box": 1.0}
        assert METRICS[name].function(saliency, away) == {f"{name}_box": 0.0}


def test_sparsity_by_hand():
    of = lambda *row: METRICS["sparsity"].function(np.array([row]), Subject(BOX))  # noqa: E731
    assert of(1.0, 1.0, 1.0, 1.0)["sparsity"] == pytest.approx(0)
    assert of(0.0, 0.0, 0.0, 5.0)["sparsity"] == pytest.approx(0.75)  # 1 - 1/n
    assert of(1.0, 3.0)["sparsity"] == pytest.approx(0.25)
    assert of(0.0, 0.0)["sparsity"] == 0.0


def test_baselines_by_hand():
    mask = np.zeros(SIZE, bool)
    mask[6:8, 6:8] = True
    subject = Subject(BOX, mask=mask)
    maps = {name: make(subject, SIZE) for name, make in BASELINES.items()}
    assert maps["uniform box"].sum() == 96
    # The box is 12 wide and 8 high: its middle is (10, 8), the sigmas are 3 and 2.
    assert maps["Gaussian"][8, 12] == pytest.approx(
        np.exp(-((2.5 / 3) ** 2) / 2 - (0.5 / 2) ** 2 / 2)
    )
    outline = maps["true outline"]
    assert outline[~mask].max() == 0
    assert outline[mask].min() > 1
    assert BASELINES["true outline"](Subject(BOX), SIZE) is None
    again = BASELINES["random"](subject, SIZE)
    np.testing.assert_array_equal(maps["random"], again)
    assert (
        abs(np.corrcoef(again.ravel(), ranks_of(np.zeros(SIZE), BOX).ravel())[0, 1])
        < 0.3
    )


class TestSubjects:
    """Of an image at half size on the left of the network's input."""

    metainfo = dict(
        ori_shape=(40, 40), img_shape=(20, 20), scale_factor=(0.5, 0.5),
        batch_input_shape=(20, 24),
    )  # fmt: skip

    def make(self, score, preprocessor=None, batch_size=8):
        inputs = torch.full((1, 3, *SIZE), 100.0)
        inputs[..., 12:] = 10.0
        found = InstanceData(
            bboxes=torch.tensor([[8.0, 8, 32, 24], [0, 0, 8, 8]]),
            scores=torch.tensor([0.5, 0.8]),
            labels=torch.tensor([0, 1]),
        )
        detector = SimpleNamespace(data_preprocessor=preprocessor)
        return inputs, subjects_of(
            detector, inputs, self.metainfo, found, [1, 0],
            score=score, batch_size=batch_size,
        )  # fmt: skip

    def test_boxes_lie_in_the_input_and_scores_are_shares(self):
        sizes = []

        def score(images: torch.Tensor) -> torch.Tensor:
            sizes.append(len(images))
            first = images[:, 0, 5, 5] / 200
            return torch.stack([first, images[:, 0, 0, 0] / 100], dim=1)

        _, (small, large) = self.make(score, batch_size=2)
        assert large.box_xyxy.tolist() == BOX.tolist()
        assert small.box_xyxy.tolist() == [0, 0, 4, 4]
        shown = np.ones((3, *SIZE), bool)
        shown[1, 5, 5] = shown[2, 0, 0] = False
        assert small.score(shown, "black").tolist() == [1, 0, 1]
        assert large.score(shown, "black").tolist() == [1, 1, 0]
        assert sizes == [2, 1, 1, 2, 1]  # the image itself once

    def test_neutral_images(self):
        inputs, _ = self.make(lambda images: images[:, 0, 0, :2])
        soft = blurred(inputs)
        assert soft.shape == inputs.shape
        assert 10 < float(soft.min()) < float(soft.max()) < 100
        statistics = SimpleNamespace(
            _enable_normalize=True,
            mean=torch.tensor([10.0, 20, 30]).view(3, 1, 1),
            std=torch.tensor([2.0, 4, 5]).view(3, 1, 1),
        )
        for preprocessor, black in ((None, [0, 0, 0]), (statistics, [-5, -5, -6])):
            seen = []
            score = lambda images: seen.append(images) or torch.ones(len(images), 2)  # noqa: E731,B023
            _, (subject, _) = self.make(score, preprocessor)
            subject.score(np.zeros((1, *SIZE), bool), "black")
            assert seen[0][0, :, 3, 3].tolist() == black

    def test_hidden_pixels_are_like_their_neighbours(self):
        seen = []

        def score(images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return torch.ones(len(images), 2)

        inputs, (subject, _) = self.make(score)
        shown = np.ones((3, *SIZE), bool)
        shown[0, 3:8, 2:9] = False  # all around it is 100
        shown[1, 5, 11:13] = False  # between 100 and 10
        shown[2] = False
        state = torch.get_rng_state()
        subject.score(shown, "road")
        assert torch.equal(torch.get_rng_state(), state)
        (images,) = (own for own in seen if len(own) == 3)
        even, edge, none = images
        assert (even[:, 3:8, 2:9] - 100).abs().max() < 0.1
        assert 10 < float(edge[0, 5, 12]) < float(edge[0, 5, 11]) < 100
        assert none[0].unique().tolist() == [float(inputs[0, 0].mean())]
        changed = (images != inputs).any(dim=1)
        assert not (changed & torch.from_numpy(shown)).any()

    def test_a_box_that_the_image_itself_does_not_score_has_no_value(self):
        _, (subject, _) = self.make(lambda images: images.new_zeros(len(images), 2))
        for name in ("inside", "image"):
            assert METRICS[name].function(np.ones(SIZE), subject) == {}
