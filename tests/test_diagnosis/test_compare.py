"""What changed between two checkpoints, in cases that are decided by hand."""

from __future__ import annotations

import pytest

from mmyolo_vis_hooks.diagnosis.compare import (
    BROKEN,
    MENDED,
    RIGHT_IN_BOTH,
    WRONG_IN_BOTH,
    Change,
    compare_image,
    summarize,
)
from mmyolo_vis_hooks.diagnosis.matching import GroundTruth
from mmyolo_vis_hooks.diagnosis.report import ImageErrors

NAMES = ["dog", "cat"]
FIRST, SECOND, THIRD = (0, 0, 50, 50), (100, 0, 150, 50), (200, 0, 250, 50)
CROWD = (300, 0, 400, 100)
NOWHERE, NEAR_IT, ELSEWHERE = (0, 200, 60, 260), (5, 200, 65, 260), (200, 200, 260, 260)
TRUTH = GroundTruth.of(
    {
        "boxes_xyxy": [FIRST, SECOND, THIRD, CROWD],
        "labels": [0, 0, 1, 1],
        "ignored": [False, False, False, True],
    }
)
COUNTS = {0: 2, 1: 1}
THRESHOLDS = {"score_thr": 0.3, "iou_thr": 0.5}


def seen(*detections: tuple, missed: tuple = ()) -> ImageErrors:
    """What was found: box, score and class; and which objects were missed, why."""
    rows = tuple((*map(float, box), score, label) for box, score, label in detections)
    kept = tuple(
        {"truth": truth, "mechanism": mechanism, "score": score, "box_xyxy": box}
        | ({"candidate": 7} if box else {})
        for truth, mechanism, score, box in missed
    )
    return ImageErrors("a", (300, 400), rows, kept)


def compare(a: ImageErrors, b: ImageErrors) -> list[Change]:
    return compare_image(a, b, TRUTH, NAMES, COUNTS, **THRESHOLDS)


@pytest.fixture
def changes() -> list[Change]:
    """The first dog is found by both, the second by B only, the cat by A only."""
    a = seen(
        (FIRST, 0.9, 0),
        (THIRD, 0.8, 1),
        (NOWHERE, 0.6, 0),
        (ELSEWHERE, 0.5, 1),
        missed=((1, "below threshold", 0.2, SECOND),),
    )
    b = seen(
        (FIRST, 0.7, 0),
        (SECOND, 0.4, 0),
        (NEAR_IT, 0.5, 0),
        (ELSEWHERE, 0.4, 0),
        missed=((2, "not seen", 0.0, None),),
    )
    return compare(a, b)


def test_objects_are_the_same_by_their_index(changes):
    first, second, third, *_ = changes
    assert (first.found_by, first.change) == ("both", RIGHT_IN_BOTH)
    assert (first.a.score, first.b.score, first.gained) == (0.9, 0.7, 0)
    assert (second.found_by, second.change) == ("only B", MENDED)
    assert second.a.kind == "missed: below threshold"
    assert second.a.why == "0.20 for 'dog', threshold 0.30"
    assert second.a.box_xyxy == second.box_xyxy == SECOND
    assert (second.b.kind, second.b.why) == ("found", "found with 0.40, IoU 1.00")
    assert second.gained == 1 / 2  # one of two dogs
    assert (third.found_by, third.change) == ("only A", BROKEN)
    assert (third.b.kind, third.b.box_xyxy) == ("missed: not seen", None)
    assert third.gained == -1
    assert [own.truth for own in changes if own.truth is not None] == [0, 1, 2]


def test_false_positives_are_the_same_by_class_and_place(changes):
    same, gone, new = changes[3:]
    assert (same.change, same.found_by, same.truth) == (WRONG_IN_BOTH, "", None)
    assert (same.a.score, same.b.score) == (0.6, 0.5)
    assert same.gained == pytest.approx((0.6 - 0.5) / 2)
    # At one place, but of another class.
    assert (gone.class_name, gone.change, gone.b.kind) == ("cat", MENDED, "nothing")
    assert (new.class_name, new.change, new.a.kind) == ("dog", BROKEN, "nothing")
    assert new.b.kind == "false: background"


def test_each_false_positive_has_one_partner():
    """Of two in B the one that lies best is the same as that of A."""
    missed = tuple((i, "not seen", 0.0, None) for i in range(3))
    a = seen((NOWHERE, 0.6, 0), missed=missed)
    b = seen((NEAR_IT, 0.9, 0), (NOWHERE, 0.5, 0), missed=missed)
    same, new = compare(a, b)[3:]
    assert (same.a.score, same.b.score, same.change) == (0.6, 0.5, WRONG_IN_BOTH)
    assert (new.b.score, new.change) == (0.9, BROKEN)


def test_the_summary_counts_what_is_mended_and_what_is_new(changes):
    summary = summarize(changes)
    assert summary["objects"] == {"both": 1, "only A": 1, "only B": 1, "neither": 0}
    assert summary["false"] == {"both": 1, "only A": 1, "only B": 1}
    kinds = {k: n for k, n in summary["kinds"].items() if any(n.values())}
    assert kinds == {
        "missed: below threshold": {"a": 1, "b": 0, "mended": 1, "new": 0},
        "missed: not seen": {"a": 0, "b": 1, "mended": 0, "new": 1},
        "false: background": {"a": 2, "b": 2, "mended": 1, "new": 1},
    }
