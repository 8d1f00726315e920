"""A detector whose candidates are known: what becomes of them when settings change."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.models.layers import multiclass_nms
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import nn

from mmyolo_vis_hooks import diagnose, load
from mmyolo_vis_hooks.data.alignment import PlacedImage
from mmyolo_vis_hooks.data.detections import detections_of
from mmyolo_vis_hooks.diagnosis.candidates import FLOOR, Closing, opened
from mmyolo_vis_hooks.diagnosis.diagnose import Diagnoser
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.network.settings import other_settings
from mmyolo_vis_hooks.options import DiagnosisOptions
from mmyolo_vis_hooks.records import Detections
from tests.families import FAMILIES, build_family

from .test_matching import SQUARE, truth

NAMES = ("dog", "cat")
CLOSE = (10, 14, 50, 54)  # IoU 36/44 with SQUARE
OFF = (10, 30, 50, 70)  # a third


class Scripted(nn.Module):
    """Puts out given boxes with given scores of two classes, by its test settings."""

    def __init__(self, *rows: tuple, **settings: Any) -> None:
        super().__init__()
        self.rows = rows
        self.bbox_head = nn.Module()
        nms = dict(type="nms", iou_threshold=settings.pop("nms", 0.6))
        self.bbox_head.test_cfg = ConfigDict(
            {"score_thr": 0.05, "nms": nms, "max_per_img": 100, **settings}
        )

    def data_preprocessor(self, data: dict, training: bool) -> dict:
        return dict(inputs=torch.zeros(1, 3, 8, 8), data_samples=[DetDataSample()])

    def forward(self, inputs: Any, samples: Any, mode: str) -> list[DetDataSample]:
        settings = self.bbox_head.test_cfg
        boxes = torch.tensor([row[0] for row in self.rows]).float()
        scores = torch.tensor([[*row[1:], 0.0] for row in self.rows])
        found, labels = multiclass_nms(
            boxes, scores, settings.score_thr, settings.nms, settings.max_per_img
        )
        instances = InstanceData(bboxes=found[:, :4], scores=found[:, 4], labels=labels)
        return [DetDataSample(pred_instances=instances)]


def look(detector: nn.Module, *objects: tuple, score_thr: float = 0.3) -> Diagnosis:
    options = DiagnosisOptions(score_thr=score_thr, topk=0)
    diagnoser = Diagnoser(detector, options, NAMES, logging.getLogger("test"))
    loaded: Any = SimpleNamespace(image_rgb=np.zeros((100, 100, 3), np.uint8))
    pipeline = SimpleNamespace(pack=lambda _: {})
    placement: Any = SimpleNamespace(pipeline=pipeline, proven=True)
    seen = diagnoser.look(PlacedImage("image", loaded, placement), truth(*objects))
    return diagnoser.diagnose(seen)


@pytest.mark.parametrize(
    ("rows", "mechanism", "why"),
    [
        (
            [(CLOSE, 0.21, 0.0)],
            "below threshold",
            "0.21 for 'dog', threshold 0.30",
        ),
        (
            [(CLOSE, 0.08, 0.7)],
            "confused",
            "found as 'cat' 0.70, IoU 0.82; 0.08 for 'dog'",
        ),
        (
            [(OFF, 0.8, 0.0)],
            "badly placed",
            "'dog' 0.80 lies on it with IoU 0.33 only; no candidate for 'dog' in its "
            "place",
        ),
        ([(CLOSE, 0.2996, 0)], "below threshold", "0.2996 for 'dog', threshold 0.3000"),
        # As high as the threshold, in the detector's own 32 bits, is not above.
        ([(CLOSE, 0.3, 0)], "below threshold", "0.30 for 'dog', threshold 0.30"),
        ([(CLOSE, 0.04, 0.0)], "not seen", "no candidate for 'dog'"),
        ([], "not seen", "no candidate for 'dog'"),
    ],
)
def test_why_an_object_was_missed(rows, mechanism, why):
    rows = [*rows, ((70, 70, 90, 90), 0.0, 0.06)]  # of no importance
    (missed,) = look(Scripted(*rows), (SQUARE, 0)).missed
    assert missed.mechanism == mechanism
    assert missed.why == why
    assert missed.class_name == "dog"
    assert tuple(missed.box_xyxy) == SQUARE


def test_an_object_whose_box_was_suppressed():
    """Two dogs of which one hides the other; a weaker NMS finds both."""
    behind = (10, 22, 50, 62)  # IoU 28/52 with the one in front
    rows = (SQUARE, 0.9, 0.0), (behind, 0.7, 0.0)
    found = look(Scripted(*rows, nms=0.5), (SQUARE, 0), (behind, 0))
    (missed,) = found.missed
    assert (missed.mechanism, missed.record.truth, missed.record.other) == (
        "suppressed",
        1,
        0,
    )
    assert missed.record.other_iou == pytest.approx(28 / 52)
    assert missed.why == "0.70 for 'dog', suppressed by 'dog' 0.90, IoU 0.54"
    assert look(Scripted(*rows, nms=0.6), (SQUARE, 0), (behind, 0)).missed == ()


BESIDE = (45, 10, 85, 50)  # IoU 5/75 with SQUARE


@pytest.mark.parametrize("other", [(60, 60, 90, 90), BESIDE])
def test_an_object_beyond_the_limit(other):
    rows = (SQUARE, 0.9, 0.0), (other, 0.7, 0.0)
    (missed,) = look(Scripted(*rows, max_per_img=1), (SQUARE, 0), (other, 0)).missed
    assert missed.mechanism == "suppressed"
    assert missed.why == "0.70 for 'dog', beyond the limit"


def test_what_hardly_overlaps_a_box_did_not_suppress_it():
    """NMS that knows no classes: the cat did, and not the dog beside it."""
    nms = dict(type="nms", iou_threshold=0.6, class_agnostic=True)
    rows = (CLOSE, 0.7, 0.0), (SQUARE, 0.0, 0.9), (BESIDE, 0.95, 0.0)
    detector = Scripted(*rows)
    detector.bbox_head.test_cfg.nms = ConfigDict(nms)
    (missed,) = look(detector, (CLOSE, 0), (BESIDE, 0)).missed
    assert missed.why == "0.70 for 'dog', suppressed by 'cat' 0.90, IoU 0.82"


def test_a_candidate_that_found_another_object_is_no_candidate():
    """Two dogs at one place, one box: the other dog was not seen by itself."""
    found = look(Scripted((SQUARE, 0.9, 0.0)), (SQUARE, 0), (CLOSE, 0))
    (missed,) = found.missed
    assert missed.record.candidate is None


def test_the_mechanism_follows_the_threshold():
    detector = Scripted((CLOSE, 0.21, 0.0))
    found = look(detector, (SQUARE, 0), score_thr=0.2)
    assert (len(found.matches.hits), found.missed) == (1, ())
    assert repr(found) == "Diagnosis(image: 1 found, 0 missed, 0 false)"


def test_above_a_low_threshold_there_are_candidates_too():
    behind, dim = (10, 22, 50, 62), (70, 70, 90, 90)
    rows = (SQUARE, 0.04, 0.0), (behind, 0.03, 0.0), (dim, 0.0005, 0.0)
    objects = (SQUARE, 0), (behind, 0)
    found = look(Scripted(*rows, nms=0.5, score_thr=0.0), *objects, score_thr=0.01)
    assert found.missed[0].why == "0.03 for 'dog', suppressed by 'dog' 0.04, IoU 0.54"
    found = look(Scripted(*rows, score_thr=0.0), *objects, score_thr=0.0)
    assert len(found.candidates) == 2  # each cell of a head has some score


def test_false_positives_say_what_they_should_have_found():
    rows = (
        (SQUARE, 0.9, 0.0),
        (CLOSE, 0.0, 0.8),
        (OFF, 0.5, 0.0),
        ((45, 10, 85, 50), 0.4, 0.0),
        ((10, 12, 50, 52), 0.35, 0.0),
    )
    found = look(Scripted(*rows, nms=0.99), (SQUARE, 0))
    assert [(false.kind, false.why) for false in found.false_positives] == [
        ("confused", "IoU 0.82 with 'dog'"),
        ("badly placed", "IoU 0.33 with 'dog'"),
        ("background", "greatest IoU with any object 0.07"),
        ("duplicate", "this 'dog' was found with 0.90, IoU 0.90"),
    ]
    assert repr(found.false_positives[0]) == (
        "FalsePositive(cat 0.80, confused: IoU 0.82 with 'dog')"
    )


def settings_of(detector: nn.Module) -> list[Any]:
    return [vars(m).get("test_cfg") for m in detector.modules()]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_opened_detector_tells_more_and_closes_again(name):
    """Final detections are among the candidates, of every family."""
    family = build_family(name)
    detector, before = family.detector, settings_of(family.detector)
    copies = [repr(settings) for settings in before]

    def found() -> Detections:
        sample = DetDataSample(metainfo=dict(family.data_samples[0].metainfo))
        with torch.no_grad():
            (output,) = detector(family.inputs, [sample], mode="predict")
        return detections_of(output)

    final = found()
    with opened(detector, floor=0.01) as was_closed:
        candidates = found()
    assert was_closed == ("detr" not in name and name != "dino")
    if was_closed:
        assert len(candidates) > len(final)
    kept = final.scores > 0.01
    apart = np.abs(final.boxes_xyxy[kept][:, None] - candidates.boxes_xyxy).max(axis=2)
    other_class = final.labels[kept][:, None] != candidates.labels
    assert (apart + 1e3 * other_class).min(axis=1).max() < 1e-3
    for old, text, new in zip(before, copies, settings_of(detector)):
        assert new is old
        assert repr(new) == text

    closing = Closing.of(detector)
    assert (closing is not None) == was_closed
    if closing is not None:
        _, own = closing.keep(candidates)
        assert rows_of(own, closing.score_thr) == rows_of(final)
        with other_settings(detector, partial(set_nms, 0.3)):
            fewer = rows_of(found())
        _, own = closing.keep(candidates, iou_thr=0.3)
        # Heads cut boxes off at the image's edge after NMS: one may differ.
        assert len(rows_of(own, closing.score_thr) ^ fewer) <= 2


def test_a_head_that_multiplies_after_its_threshold_gives_no_weaker_candidates():
    family = build_family("fcos")
    options, logger = DiagnosisOptions(topk=0), logging.getLogger("test")
    diagnoser = Diagnoser(family.detector, options, (), logger)
    metainfo = family.data_samples[0].metainfo
    found = diagnoser.candidates(Detections(), family.inputs, metainfo)
    assert len(found) > 1000
    assert found.scores.min() > FLOOR


def set_nms(iou_thr: float, settings: ConfigDict) -> None:
    settings.nms.iou_threshold = iou_thr


def rows_of(found: Detections, score_thr: float = 0.0) -> set[tuple]:
    """Classes, scores and boxes, as far as they can be compared."""
    numbers = np.column_stack(
        [found.labels, found.scores.round(3), found.boxes_xyxy.round()]
    )
    return set(map(tuple, numbers[found.scores > score_thr].tolist()))


ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "docs/images/cat.jpg"  # a cat on the left, a cup on the right
COCO = CocoDataset.METAINFO["classes"]


def coco_detector() -> nn.Module:
    return load(
        ROOT / "configs/examples/yolox_nano_coco.py",
        ROOT / "docs/weights/yolox_nano_coco.pth",
        device="cpu",
    )


def objects(*named: tuple) -> dict[str, Any]:
    return dict(
        boxes_xyxy=[box for _, box in named],
        labels=[COCO.index(name) for name, _ in named],
    )


GIVEN = (
    ("cat", (8, 5, 512, 385)),
    ("dining table", (605, 5, 1120, 395)),
    ("spoon", (940, 225, 1045, 325)),
)


def test_errors_have_maps_that_lie_on_them_and_are_drawn():
    """The table has 0.69, and the cup is left out of the ground truth."""
    detector = coco_detector()
    before = [parameter.clone() for parameter in detector.parameters()]
    found = diagnose(detector, PHOTO, objects(*GIVEN), score_thr=0.75)
    assert len(found.matches.hits) == 1
    table, spoon = found.missed
    (cup,) = found.false_positives
    assert table.why == "0.69 for 'dining table' at neck[2], threshold 0.75"
    assert (spoon.mechanism, spoon.map) == ("not seen", None)
    assert (cup.class_name, cup.kind) == ("cup", "both")
    for error, (x1, y1, x2, y2) in (
        (table, (680, 60, 1080, 390)),
        (cup, (770, 15, 1025, 275)),
    ):
        assert error.map.saliency.shape == found.image_rgb.shape[:2] == (400, 1200)
        assert error.map.saliency.max() == 1
        row, column = np.unravel_index(error.map.saliency.argmax(), (400, 1200))
        assert x1 < column < x2
        assert y1 < row < y2
        assert error.map.inside > 0.9
    assert (table.map.layer, cup.map.layer) == ("neck[2]", "neck[0]")
    for parameter, value in zip(detector.parameters(), before):
        assert torch.equal(parameter, value)

    picture = found.draw()
    amber = (np.abs(picture.astype(int) - (255, 176, 0)) < 2).all(axis=2)
    magenta = (np.abs(picture.astype(int) - (220, 38, 127)) < 2).all(axis=2)
    # The overview is as wide as the photo, with a margin and a caption.
    columns = np.nonzero(amber[:480])[1]
    assert 600 < columns.min() < 700
    assert magenta.any()
    # Lines of the panels are wide enough to show their colour.
    assert min(amber[600:].sum(), magenta[600:].sum()) > 500
    assert found._repr_jpeg_()[:2] == b"\xff\xd8"


class Swap(BaseTransform):
    """Moves pixels and tells nobody: the right half to the left."""

    def transform(self, results: dict) -> dict:
        results["img"] = np.roll(results["img"], results["img"].shape[1] // 2, axis=1)
        return results


def test_no_map_is_drawn_where_the_pipeline_moves_pixels_in_silence(caplog):
    detector = coco_detector()
    pipeline = detector.cfg.test_dataloader.dataset.pipeline
    pipeline.insert(1, dict(type=Swap))
    found = diagnose(detector, PHOTO, objects(*GIVEN), score_thr=0.3)
    assert found.note.startswith("no maps: the image and the network's input do not")
    errors = [*found.missed, *found.false_positives]
    assert errors
    assert all(error.map is None for error in errors)


def test_what_cannot_be_explained_is_diagnosed_all_the_same(monkeypatch):
    def refuse(*_: Any) -> None:
        raise VisError("the scores carry no gradients")

    monkeypatch.setattr("mmyolo_vis_hooks.diagnosis.maps.ErrorMapper.maps", refuse)
    found = diagnose(coco_detector(), PHOTO, objects(*GIVEN), score_thr=0.75)
    assert len(found.missed) == 2
    assert found.note == "no maps: the scores carry no gradients"


def test_how_many_errors_get_a_map():
    detector = coco_detector()

    def explained(topk: float) -> int:
        found = diagnose(detector, PHOTO, objects(*GIVEN), topk=topk, score_thr=0.75)
        errors = [*found.missed, *found.false_positives]
        return sum(error.map is not None for error in errors)

    assert [explained(topk) for topk in (0, 1, -1)] == [0, 1, 2]
    for wrong in (-2, 1.5):
        with pytest.raises(VisConfigError, match=f"topk={wrong}"):
            explained(wrong)


@pytest.mark.real_data
def test_a_real_detector_on_real_images(shared_dir):
    """Counted once by hand; as the threshold rises, hits become 'below threshold'."""
    detector = coco_detector()
    with DefaultScope.overwrite_default_scope("mmdet"):
        images = CocoDataset(
            data_root=str(shared_dir / "data" / "coco128"),
            ann_file="annotations/instances_train2017.json",
            data_prefix=dict(img="train2017/"),
            pipeline=[],
        )
    infos = [images.get_data_info(i) for i in range(16)]
    paths = [info["img_path"] for info in infos]
    instances = [info["instances"] for info in infos]

    def counts(**options: Any) -> Counter:
        found = diagnose(detector, paths, instances, topk=0, **options)
        mechanisms = Counter(m.mechanism for own in found for m in own.missed)
        mechanisms["found"] = sum(len(own.matches.hits) for own in found)
        return mechanisms

    usual, strict = counts(), counts(score_thr=0.6)
    assert sum(usual.values()) == sum(strict.values())
    assert strict["found"] < usual["found"]
    assert strict["below threshold"] > usual["below threshold"]
    assert strict["not seen"] >= usual["not seen"] > 0
    detector.bbox_head.test_cfg.nms.iou_threshold = 0.1
    assert counts()["suppressed"] > usual["suppressed"]
    with pytest.raises(VisConfigError, match="15 entries for 16 images"):
        diagnose(detector, paths, instances[1:])


@pytest.mark.parametrize(
    ("image", "given", "message"),
    [
        (PHOTO, objects(("cat", (512, 5, 8, 385))), "box 0 is"),
        (PHOTO, dict(boxes_xyxy=[SQUARE], labels=[80]), "label 0 is 80"),
        ([PHOTO, PHOTO], None, "NoneType cannot work with several images"),
        ([PHOTO, PHOTO], objects(*GIVEN), "dict cannot work with several images"),
    ],
)
def test_objects_that_cannot_be_are_refused(image, given, message):
    with pytest.raises(VisConfigError, match=message):
        diagnose(coco_detector(), image, given)
