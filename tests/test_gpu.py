"""On a GPU: the maps of the processor, the run's own metrics, no memory kept."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from mmyolo_vis_hooks import diagnose, explain, feature_maps, load
from mmyolo_vis_hooks.attribution.methods import METHODS
from tests.families import FAMILIES, Family, build_family
from tests.test_attribution import helpers
from tests.test_hooks.helpers import box_spy, log_of, pictures, vis_hooks
from tests.test_real_data import CONFIG, run

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

# Each asks something else of the device: graphs, parts, masks, whole forwards.
SLOW = ("ablationcam", "scorecam", "drise", "evidence")
# Steps of the network are rounded otherwise, and some maps add up many of them.
TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions with the processor's precision, to be compared with it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(family: Family) -> Family:
    detector = copy.deepcopy(family.detector).cuda()
    head = getattr(detector, "bbox_head", None)
    if hasattr(head, "featmap_sizes"):  # where MMYOLO keeps its priors, as they lie
        head.featmap_sizes = [torch.empty(1)] * len(head.featmap_sizes)
    return dataclasses.replace(family, detector=detector, inputs=family.inputs.cuda())


def agree(family: Family, layers: list[str] | None = None, **options) -> int:
    """How many maps are those of the processor."""
    # Of a changed image, rounding may propose other regions.
    regions_move = family.name == "faster_rcnn" and options.get("method") == "evidence"
    (plain, expected), (predictions, found) = (
        helpers.explain(own, layers, topk=3, **options)
        for own in (family, on_gpu(family))
    )
    assert predictions.scores.is_cuda
    torch.testing.assert_close(
        predictions.scores.cpu(), plain.scores, atol=1e-4, rtol=1e-4
    )
    compared = 0
    for one, other in zip(found, expected, strict=True):
        assert (one.index, one.warning) == (other.index, other.warning)
        for mine, theirs in zip(one.maps, other.maps, strict=True):
            assert mine.layer == theirs.layer
            if regions_move:
                pair = mine.saliency.ravel(), theirs.saliency.ravel()
                assert np.corrcoef(*pair)[0, 1] > 0.9
            else:
                largest = np.abs(theirs.saliency).max()
                gap = np.abs(mine.saliency - theirs.saliency).max()
                assert gap <= TOLERANCE * largest, (one.index, mine.layer)
            compared += 1
    return compared


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_the_maps_of_the_processor(name):
    assert agree(build_family(name)) > 0


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in (*SLOW, "attention")]
)
def test_each_method_gives_the_maps_of_the_processor(name):
    family = build_family("yolox")
    if METHODS[name].kind == "activation":
        assert agree(family, ["neck"], method=name) > 0
    else:
        assert agree(family, method=name) > 0


@pytest.mark.parametrize("method", SLOW)
@pytest.mark.parametrize("name", ["yolox", "rtmdet", "faster_rcnn", "dino"])
def test_methods_that_change_what_the_network_sees(name, method):
    if name == "dino" and method in ("scorecam", "ablationcam"):
        pytest.skip("the processor takes long")
    options = dict(num_masks=32) if method == "drise" else {}
    assert agree(build_family(name), method=method, **options) > 0


def test_cells_of_boxes():
    assert agree(build_family("yolox"), method="evidence", cells=3) > 0


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "dino"])
def test_attention_of_decoders(name):
    assert agree(build_family(name), method="attention") > 0


@pytest.mark.parametrize("target", ["logit", "x1", "y2"])
def test_other_targets(target):
    assert agree(build_family("rtmdet"), target=target) > 0


def test_targets_that_are_masks():
    assert agree(build_family("mask_rcnn"), target="mask") > 0


def test_nothing_stays_in_the_memory_of_the_gpu():
    family = on_gpu(build_family("yolox"))
    own = helpers.attributor(family, method="boxam", topk=6)
    given = family.inputs, family.data_samples[0].metainfo
    held = []
    for _ in range(4):
        own.explain(*given)
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[3]


@pytest.mark.parametrize("half", [False, True])
def test_a_test_run_keeps_its_metrics_and_explains_every_box(
    shared_dir, tmp_path, monkeypatch, half
):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    plain, _ = run(shared_dir, tmp_path / "plain", fp16=half)
    assert plain["coco/bbox_mAP"] == pytest.approx(0.343, abs=3e-3)
    hook = box_spy(num_images=32, score_thr=0.3, topk=3)
    hooked, runner = run(shared_dir, tmp_path / "on", hook, fp16=half)
    assert hooked == plain
    assert len(pictures(tmp_path / "on")) == 32
    assert next(runner.model.parameters()).is_cuda
    for sample in vis_hooks(runner)[0].samples:
        assert all(one.maps for one in sample.explanations)
    assert "failed" not in log_of(tmp_path / "on")


def test_the_api_runs_where_the_detector_is(shared_dir, monkeypatch):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    weights = str(shared_dir / "weights" / "yolox_nano_coco.pth")
    detector, slow = (load(CONFIG, weights, device=d) for d in ("cuda:0", "cpu"))
    image = next((shared_dir / "data/coco128/train2017").glob("*.jpg"))
    found, expected = (explain(own, image, topk=2) for own in (detector, slow))
    assert [one.class_name for one in found] == [one.class_name for one in expected]
    for one, other in zip(found, expected):
        assert np.abs(one.saliency - other.saliency).max() < 5e-3
    maps = feature_maps(detector, image, layers=["neck"])
    assert maps.draw().std() > 1
    truth = dict(boxes_xyxy=[found[0].box_xyxy], labels=[found[0].label])
    assert diagnose(detector, image, truth).matches.hits
