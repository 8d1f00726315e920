"""Hits and false alarms of scenes that can be matched by hand, and TIDE's counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tidecv.data import Data
from tidecv.quantify import TIDE, TIDERun

from mmyolo_vis_hooks.diagnosis.cost import SIZES, ErrorCost, average_precision
from mmyolo_vis_hooks.diagnosis.matching import FALSE_KINDS, GroundTruth, match
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.records import Detections

# TIDE's names of the kinds.
TIDES = dict(zip(FALSE_KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg")))


def detections(*rows: tuple) -> Detections:
    """Rows of box, score, label."""
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int64),
    )


def truth(*rows: tuple) -> GroundTruth:
    """Rows of box, label and, if need be, whether it is ignored."""
    return GroundTruth.of(
        [
            dict(bbox=box, bbox_label=label, ignore_flag=int(bool(rest)))
            for box, label, *rest in rows
        ]
    )


SQUARE = (10, 10, 50, 50)


def test_on_a_crowd_of_its_class_a_detection_is_excused():
    crowd = (0, 0, 100, 100)
    inside = (10, 10, 20, 20)
    found = match(
        detections((inside, 0.9, 0), (inside, 0.8, 1)), truth((crowd, 0, "ignored"))
    )
    assert found.excused == (0,)
    assert [alarm.kind for alarm in found.false_alarms] == ["background"]
    assert found.missed == ()
    half = truth(((10, 10, 30, 50), 0, "ignored"))
    assert match(detections((SQUARE, 0.9, 0)), half).excused == (0,)


def test_on_an_ignored_region_of_no_class_all_are_excused():
    region = (0, 0, 100, 100)  # which CrowdHuman labels -1
    found = match(
        detections((SQUARE, 0.9, 0), (SQUARE, 0.8, 1)), truth((region, -1, "ignored"))
    )
    assert found.excused == (0, 1)
    assert found.false_alarms == found.missed == ()


def test_boxes_without_numbers_lie_on_nothing():
    nowhere = (np.nan,) * 4
    found = match(
        detections((nowhere, 0.9, 0), (SQUARE, 0.8, 0)),
        truth((nowhere, 0), (SQUARE, 0)),
    )
    assert [(hit.detection, hit.truth) for hit in found.hits] == [(1, 1)]
    assert [(own.kind, own.iou) for own in found.false_alarms] == [("background", 0)]


@pytest.mark.parametrize(
    "given",
    [
        [dict(box=SQUARE)],
        dict(boxes_xyxy=[SQUARE]),
        dict(boxes_xyxy=[SQUARE], labels=[0, 1]),
        3,
        [dict(bbox=(1, 2, 3), bbox_label=0)],
        dict(boxes_xyxy=[SQUARE], labels=[0.5]),
        dict(boxes_xyxy=[SQUARE], labels=["dog"]),
    ],
)
def test_ground_truth_that_is_none_is_refused(given):
    with pytest.raises(VisConfigError, match="ground_truth"):
        GroundTruth.of(given)


def test_other_outlines_are_other_objects():
    one, other, none = (
        GroundTruth.of([dict(bbox=[0, 0, 9, 9], bbox_label=0) | own])
        for own in (
            dict(mask=[[0, 0, 9, 0, 9, 9]]),
            dict(mask=[[0, 0, 9, 9, 0, 9]]),
            {},
        )
    )
    assert len({one.parts(), other.parts(), none.parts()}) == 3


def test_ground_truth_of_torch_and_of_mmdetection():
    boxes = torch.tensor([SQUARE], dtype=torch.float32, requires_grad=True)
    for given in (boxes, HorizontalBoxes(boxes)):
        own = GroundTruth.of(dict(boxes_xyxy=given, labels=torch.tensor([3])))
        assert own.boxes_xyxy.tolist() == [list(SQUARE)]
        assert own.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ((50, 10, 20, 40), 0, r"box 1 is \[50\.0, 10\.0, 20\.0, 40\.0\]: give x1"),
        ((10, 10, 10, 50), 0, "box 1"),
        ((10, 10, np.nan, 50), 0, "box 1"),
        (SQUARE, 2, r"label 1 is 2: .* 0 to 1$"),
        (SQUARE, -1, "label 1 is -1"),
    ],
)
def test_objects_that_nothing_could_hit_are_named(box, label, message):
    with pytest.raises(VisConfigError, match=message):
        truth((SQUARE, 1), (box, label)).check(num_classes=2)
    truth((SQUARE, 1), (box, label, "ignored")).check(num_classes=2)
    truth((SQUARE, 7)).check(num_classes=0)


def test_average_precision_by_hand():
    # At half of the recall the precision is 1, then 2 of 3.
    points = [(0.9, True), (0.8, False), (0.7, True)]
    assert average_precision(points, 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision([], 1) == 0
    assert average_precision([(0.5, False)], 0) == 0


def test_of_equal_scores_the_first_detection_counts_first():
    """As COCO's evaluation has it; a hit is no better for being one."""
    far = (60, 60, 90, 90)
    objects = truth((SQUARE, 0))
    for boxes, ap in (((SQUARE, far), 1.0), ((far, SQUARE), 0.5)):
        found = detections(*((box, 0.5, 0) for box in boxes))
        cost = ErrorCost()
        cost.update(match(found, objects), found, objects)
        assert cost.total().ap == pytest.approx(ap)


def random_scenes(seed: int, share: float) -> list[tuple[Detections, GroundTruth]]:
    """Objects, and detections that are theirs, moved, renamed, doubled or invented."""
    random = np.random.default_rng(seed)
    scenes = []
    for _ in range(30):
        corners = random.uniform(0, 150, (random.integers(1, 6), 2))
        boxes = np.concatenate([corners, corners + random.uniform(20, 60, 2)], axis=1)
        labels = random.integers(0, 4, len(boxes))
        rows = []
        for box, label in zip(boxes, labels):
            for _ in range(random.integers(0, 4)):
                moved = box + random.choice([2, 8, 15, 40]) * random.normal(size=4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 5)
                named = label if random.random() < 0.7 else random.integers(0, 4)
                rows.append((moved, random.random(), named))
        ignored = random.random(len(boxes)) < share
        objects = [
            (b, int(c), *(["ignored"] if i else ()))
            for b, c, i in zip(boxes, labels, ignored)
        ]
        scenes.append((detections(*rows), truth(*objects)))
    return scenes


@pytest.mark.parametrize(("seed", "share"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.1)])
def test_counts_and_costs_are_those_of_tide(seed, share):
    """Its own code, which counts and mends detections on ignored objects, too."""
    cost = ErrorCost()
    objects, found = Data("objects"), Data("found")

    def xywh(box: np.ndarray) -> list[float]:
        return [*map(float, box[:2]), *map(float, box[2:] - box[:2])]

    scenes = random_scenes(seed, share)
    # Of a fifth class no object is found, and nothing is detected.
    scenes.append((detections(), truth((SQUARE, 4), (SQUARE, 0))))
    for image, (own, things) in enumerate(scenes):
        cost.update(match(own, things), own, things)
        objects.add_image(image, str(image))
        for label in range(5):
            objects.add_class(label, str(label))
        for box, label, ignored in zip(
            things.boxes_xyxy, things.labels, things.ignored
        ):
            add = objects.add_ignore_region if ignored else objects.add_ground_truth
            add(image, int(label), xywh(box))
        for box, score, label in zip(own.boxes_xyxy, own.scores, own.labels):
            found.add_detection(image, int(label), float(score), xywh(box))
    run = TIDERun(objects, found, 0.5, 0.1, TIDE.BOX, 100)
    ours = cost.compute()
    gains = {kind.short_name: gain for kind, gain in run.fix_main_errors().items()}
    for kind, errors in run.error_dict.items():
        name = kind.short_name
        if name == "Miss":
            continue
        (own_kind,) = (k for k, theirs in TIDES.items() if theirs == name)
        counted = [error for error in errors if error.pred["used"] is not None]
        assert ours["false"][own_kind] == len(counted) > 0
        if not share:
            assert 100 * ours["dap"][own_kind] == pytest.approx(gains[name], abs=1e-9)
    assert 100 * ours["ap"]["ap"] == pytest.approx(run.ap)
    if not share:
        assert 100 * ours["dap"]["missed"] == pytest.approx(gains["Miss"], abs=1e-9)
    assert ours["counts"]["missed"] == sum(map(len, run.false_negatives.values()))


def coco_aps(scenes: list[tuple[Detections, GroundTruth]]) -> dict[str, float]:
    """COCO's own AP at an IoU of 0.5, by size, of boxes."""

    def rows(boxes: np.ndarray, labels: np.ndarray, image: int) -> list[dict]:
        sides = boxes[:, 2:] - boxes[:, :2]
        return [
            dict(image_id=image, category_id=int(label), bbox=[*box[:2], *wh])
            | dict(area=float(wh.prod()), iscrowd=0)
            for box, label, wh in zip(boxes.astype(float), labels, sides.astype(float))
        ]

    objects, found = COCO(), COCO()
    annotations, results = [], []
    for image, (own, things) in enumerate(scenes, 1):
        annotations += rows(things.boxes_xyxy, things.labels, image)
        results += [
            row | dict(score=float(score))
            for row, score in zip(rows(own.boxes_xyxy, own.labels, image), own.scores)
        ]
    images = [dict(id=image) for image in range(1, len(scenes) + 1)]
    for data, boxes in ((objects, annotations), (found, results)):
        boxes = [dict(id=number, **box) for number, box in enumerate(boxes, 1)]
        categories = [dict(id=label) for label in range(5)]
        data.dataset = dict(images=images, annotations=boxes, categories=categories)
        data.createIndex()
    run = COCOeval(objects, found, "bbox")
    run.params.iouThrs = np.array([0.5])
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"][0, :, :, :, 2]  # recall, class, size
    of_size = dict(zip(run.params.areaRngLbl, precision.transpose(2, 0, 1)))
    return {
        size: float(of_size[size][:, (of_size[size] >= 0).all(axis=0)].mean())
        for size in SIZES
        if (of_size[size] >= 0).any()
    }


def mended(
    scene: tuple[Detections, GroundTruth], kind: str
) -> tuple[Detections, GroundTruth]:
    """A scene whose detections of a kind are put right, or are gone."""
    own, things = scene
    matches = match(own, things)
    rows = [*zip(own.boxes_xyxy, own.scores, own.labels)]
    for alarm in matches.false_alarms:  # the best score first
        if alarm.kind != kind:
            continue
        rows[alarm.detection] = None
        lies = [a for a in matches.false_alarms if a.truth == alarm.truth]
        if kind in ("confused", "badly placed") and alarm.truth in matches.missed:
            first = next(a for a in lies if a.kind in ("confused", "badly placed"))
            if first is alarm:
                box, label = things.boxes_xyxy[alarm.truth], things.labels[alarm.truth]
                rows[alarm.detection] = (box, own.scores[alarm.detection], label)
    return detections(*filter(None, rows)), things


def test_where_nothing_is_found_all_was_lost_by_missing():
    cost = ErrorCost()
    assert cost.total().dap["missed"] == 0.0
    things = truth((SQUARE, 0), (SQUARE, 1))
    cost.update(match(detections(), things), detections(), things)
    assert cost.total().dap == {**cost.by_class()[1].dap, "missed": 1.0}


def test_costs_by_size_are_what_coco_says_of_mended_detections():
    scenes = []
    for own, things in random_scenes(5, 0.0):
        for factor in (0.5, 1, 4):
            boxes = own.boxes_xyxy * factor, things.boxes_xyxy * factor
            grown = Detections(boxes[0], own.scores, own.labels)
            scenes.append((grown, replace(things, boxes_xyxy=boxes[1])))
    cost = ErrorCost()
    for own, things in scenes:
        cost.update(match(own, things), own, things)
    before = coco_aps(scenes)
    by_size = {size: cost.total(size) for size in SIZES}
    for size, ap in before.items():
        assert by_size[size].ap == pytest.approx(ap, abs=1e-9)
    for kind in FALSE_KINDS:
        after = coco_aps([mended(scene, kind) for scene in scenes])
        for size in SIZES:
            gain = max(after[size] - before[size], 0)
            assert by_size[size].dap[kind] == pytest.approx(gain, abs=1e-9)
