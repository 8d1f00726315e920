"""What is found, and why the rest is not, when threshold and NMS move."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from mmyolo_vis_hooks.data.alignment import PlacedImage, own_placement
from mmyolo_vis_hooks.detector import build_pipeline, read_dataset
from mmyolo_vis_hooks.diagnosis.candidates import Closing
from mmyolo_vis_hooks.diagnosis.live import LiveDetector
from mmyolo_vis_hooks.diagnosis.look import Look
from mmyolo_vis_hooks.diagnosis.place import Considered, considered_at
from mmyolo_vis_hooks.errors import VisError
from mmyolo_vis_hooks.options import BoxAMOptions, DiagnosisOptions

from .test_diagnose import CLOSE, COCO, NAMES, OFF, PHOTO, Scripted, coco_detector
from .test_matching import SQUARE, detections, truth

BEHIND = (10, 22, 50, 62)  # IoU 28/52 with SQUARE
FAR = (60, 60, 90, 90)
CENTRE = (30, 30)


def look_at(detector: nn.Module, *objects: tuple, known: bool = True) -> Look:
    live = LiveDetector(detector, NAMES, logging.getLogger("test"))
    loaded: Any = SimpleNamespace(image_rgb=np.zeros((100, 100, 3), np.uint8))
    pipeline = SimpleNamespace(pack=lambda _: {})
    placement: Any = SimpleNamespace(pipeline=pipeline, proven=False, reason="a toy")
    return live.look(
        PlacedImage("image", loaded, placement), truth(*objects) if known else None
    )


def considered(
    look: Look, point: tuple = CENTRE, score_thr: float = 0.3, **settings: Any
) -> list[Considered]:
    options = DiagnosisOptions(score_thr=score_thr)
    diagnosis = look.diagnose(options, settings.pop("nms", None))
    return considered_at(point, diagnosis, options, **settings)


def test_nothing_runs_when_threshold_and_nms_move():
    """Two dogs of which one hides the other, and a weak cat."""
    detector = Scripted((SQUARE, 0.9, 0), (BEHIND, 0.7, 0), (FAR, 0, 0.2), nms=0.5)
    objects = (SQUARE, 0), (BEHIND, 0), (FAR, 1)
    look = look_at(detector, *objects)
    detector.rows = None

    def missed(score_thr: float, nms: float | None = None) -> list[str]:
        found = look.diagnose(DiagnosisOptions(score_thr=score_thr), nms)
        return [own.mechanism for own in found.missed]

    assert missed(0.3) == ["suppressed", "below threshold"]
    assert missed(0.3, 0.6) == ["below threshold"]
    assert missed(0.1) == ["suppressed"]
    assert missed(0.1, 0.6) == []
    assert missed(0.95, 0.6) == ["below threshold"] * 3


def test_a_lower_threshold_than_the_detectors_own():
    look = look_at(Scripted((SQUARE, 0.2, 0), score_thr=0.25), (SQUARE, 0))
    assert len(look.final) == 0
    assert len(look.diagnose(DiagnosisOptions(score_thr=0.1)).matches.hits) == 1


def test_what_was_considered_at_a_place():
    detector = Scripted(
        (SQUARE, 0.9, 0.12), (BEHIND, 0.7, 0), (OFF, 0, 0.4), (FAR, 0, 0.8), nms=0.5
    )
    look = look_at(detector, (SQUARE, 0), (FAR, 0))
    assert [(own.fate, own.why) for own in considered(look, (30, 35))] == [
        ("detected", "found, IoU 1.00"),
        (
            "suppressed",
            "suppressed by 'dog' 0.90, IoU 0.54 · IoU 0.54 with the object 'dog'",
        ),
        ("detected", "false positive, both: greatest IoU with any object 0.33"),
        (
            "below threshold",
            "below the threshold of 0.30 · IoU 1.00 with the object 'dog'",
        ),
    ]
    # Their boxes are those that hold the place.
    assert [own.fate for own in considered(look, (30, 60))] == [
        "suppressed",
        "detected",
    ]
    (cat,) = considered(look, (75, 75))
    assert cat.why == "false positive, confused: IoU 1.00 with 'dog'"
    assert considered(look, (95, 5)) == []
    (best, _), (second, third) = considered(look, label=0), considered(look, label=1)
    assert (best.detection, second.detection, third.detection) == (0, 2, None)
    assert len(considered(look, most=1)) == 1
    # With a weaker NMS the suppressed one is a detection like any other.
    fates = [own.fate for own in considered(look, (30, 35), nms=0.6)]
    assert fates == ["detected", "detected", "detected", "below threshold"]


def test_a_badly_placed_candidate_and_one_beyond_the_limit():
    look = look_at(Scripted((OFF, 0.2, 0), (FAR, 0, 0.2)), (SQUARE, 0))
    (off,) = considered(look, (30, 40))
    on = "badly placed, IoU 0.33 with the object 'dog'"
    assert off.why == f"below the threshold of 0.30 · {on}"
    (far,) = considered(look, (75, 75))
    assert far.why == "below the threshold of 0.30 · on no object"
    detector = Scripted((SQUARE, 0.9, 0), (FAR, 0.7, 0), max_per_img=1)
    (far,) = considered(look_at(detector, (FAR, 0)), (75, 75))
    assert (far.fate, far.detection) == ("beyond the limit", None)


def test_candidates_of_one_place_are_counted():
    look = look_at(
        Scripted((SQUARE, 0.9, 0), (CLOSE, 0.6, 0), ((10, 11, 50, 51), 0.2, 0)),
        (SQUARE, 0),
    )
    (dog,) = considered(look)
    assert (dog.candidate, dog.alike) == (0, 2)


def test_without_objects_nothing_is_an_error():
    look = look_at(Scripted((SQUARE, 0.9, 0), (CLOSE, 0, 0.2)), known=False)
    found = look.diagnose(DiagnosisOptions())
    assert len(found.detections) == 1
    assert (found.missed, found.false_positives) == ((), ())
    dog, cat = considered(look)
    assert (dog.why, cat.why) == ("a detection", "below the threshold of 0.30")


@pytest.mark.parametrize(
    ("settings", "kept", "scores"),
    [
        (dict(nms=dict(type="nms", iou_threshold=0.5)), [0, 2, 3], [0.9, 0.8, 0.3]),
        (dict(nms=dict(type="nms", iou_thr=0.6)), [0, 2, 1, 3], [0.9, 0.8, 0.7, 0.3]),
        (
            dict(nms=dict(type="nms", iou_threshold=0.6), max_per_img=2),
            [0, 2],
            [0.9, 0.8],
        ),
        # Linear: 0.7 * (1 - 28/52).
        (
            dict(nms=dict(type="soft_nms", iou_threshold=0.5, min_score=0.05)),
            [0, 2, 1, 3],
            [0.9, 0.8, 0.7 * 24 / 52, 0.3],
        ),
        # Of the two classes of a box the better one.
        (
            dict(nms=dict(type="nms", iou_threshold=0.6), multi_label=False),
            [0, 2, 1],
            [0.9, 0.8, 0.7],
        ),
        (
            dict(nms=dict(type="nms", iou_threshold=0.5, class_agnostic=True)),
            [0, 2],
            [0.9, 0.8],
        ),
    ],
)
def test_which_candidates_a_detector_keeps(settings, kept, scores):
    rows = (SQUARE, 0.9, 0), (BEHIND, 0.7, 0), (FAR, 0.8, 0), (SQUARE, 0.3, 1)
    indices, found = Closing(**settings).keep(detections(*rows))
    assert indices.tolist() == kept
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_a_picture_that_is_not_proven_has_no_maps():
    detector = Scripted((SQUARE, 0.9, 0))
    look = look_at(detector)
    live = LiveDetector(detector, NAMES, logging.getLogger("test"))
    with pytest.raises(VisError, match="a toy"):
        live.explain(look, 0, BoxAMOptions())


def test_candidates_of_a_real_detector_are_explained_by_any_method():
    """Beside the cat there is a sink of 0.07; the cup is a candidate like any other."""
    detector = coco_detector()
    config = detector.cfg
    pipeline = build_pipeline(config, read_dataset(config))
    loaded = pipeline.load(str(PHOTO))
    placement = own_placement(pipeline, [loaded], detector)
    live = LiveDetector(detector, COCO, logging.getLogger("test"))
    look = live.look(PlacedImage("photo", loaded, placement))
    options = DiagnosisOptions()
    diagnosis = look.diagnose(options)
    (sink,) = considered_at((550, 200), diagnosis, options)
    assert COCO[look.candidates.labels[sink.candidate]] == "sink"
    assert sink.why == "below the threshold of 0.30"
    cup = considered_at((850, 100), diagnosis, options, label=COCO.index("cup"))[0]
    for method, target in (("boxam", "score"), ("layercam", "logit")):
        own = live.explain(
            look, cup.candidate, BoxAMOptions(method=method, target=target)
        )
        row, column = np.unravel_index(own.saliency.argmax(), own.saliency.shape)
        assert 770 < column < 1025
        assert 15 < row < 300
    with pytest.raises(VisError, match=r"neck\.nothing"):
        live.explain(look, 0, BoxAMOptions(target_layers=("neck.nothing",)))
