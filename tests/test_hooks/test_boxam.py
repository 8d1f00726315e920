"""Options, alignment and pictures of the hook on a real Runner."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn

from mmyolo_vis_hooks import BoxAMVisHook
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.render import boxam_panel as boxam_explainer
from tests.families import build_family
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_featmap import GEOMETRIES
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy import LETTERBOX, make_pipeline
from tests.toy_boxes import box_config

ALIGNMENTS = ("resize", "letterbox", "network")


@MODELS.register_module()
def small_detector(family: str, test_cfg: dict | None = None) -> nn.Module:
    """A real detector for a config; it is nobody else's."""
    detector = copy.deepcopy(build_family(family).detector)
    for module in detector.modules():
        if isinstance(getattr(module, "test_cfg", None), dict):
            module.test_cfg.update(test_cfg or {})
    return detector


def family_config(*args: Any, family: str, test_cfg: dict | None = None, **options):
    cfg = box_config(*args, **options)
    cfg.model = dict(type="small_detector", family=family, test_cfg=test_cfg)
    cfg.test_evaluator = []
    return cfg


def run_test(tmp_path, toy_data, model=None, num_classes=1, **options):
    """One test run; gives the runner and the samples that were drawn."""
    cfg = box_config(
        tmp_path, [box_spy(**options)], data_root=toy_data, num_classes=num_classes
    )
    runner = Runner.from_cfg(cfg)
    runner.test()
    return runner, vis_hooks(runner)[0].samples


@pytest.fixture
def captions(monkeypatch):
    """Titles and notes of all cells that are drawn."""
    found: list[tuple[str, str]] = []
    original = boxam_explainer.Cell

    def cell(image, title="", note=""):
        if title or note:
            found.append((title, note.replace("\u00a0", " ")))
        return original(image, title, note)

    monkeypatch.setattr(boxam_explainer, "Cell", cell)
    return found


def warped_to(sample, explanation, smooth=0.0) -> np.ndarray:
    """The map of a box over the drawn image."""
    box = sample.detections.boxes_xyxy[explanation.index]
    return box_saliency(explanation, sample.frame, box, smooth=smooth)


# Options.


def test_registered_in_the_root_registry():
    assert HOOKS.get("BoxAMVisHook") is BoxAMVisHook


def test_all_defaults_work(tmp_path, toy_data):
    cfg = box_config(tmp_path, [dict(type="BoxAMVisHook")], data_root=toy_data)
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 4


class Untouched:
    """Counts what a run must not do before everything is checked."""

    def __init__(self, runner, monkeypatch):
        self.loaded = self.loops = 0

        def count(name, original):
            def counted(*args, **kwargs):
                setattr(self, name, getattr(self, name) + 1)
                return original(*args, **kwargs)

            return counted

        monkeypatch.setattr(
            runner, "load_or_resume", count("loaded", runner.load_or_resume)
        )
        for loop in ("train", "val", "test"):
            built = getattr(runner, f"{loop}_loop")
            monkeypatch.setattr(built, "run", count("loops", built.run))


@pytest.mark.parametrize("run", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_layers=["nekc"]), "near matches: neck"),
        (dict(target_layers=["unused"]), "unused did not run.*choose a layer"),
        (dict(classes=["sqare"]), "classes.*'sqare'.*did you mean 'square'"),
        (dict(classes=[3]), "classes.*3 is no class.*'square'"),
        (dict(image_indices=[6]), "6 images"),
        (dict(target="objectness"), "target='objectness'.*'score' or 'logit'"),
        (dict(target_layers=["bbox_head.cls"]), None),
    ],
)
def test_what_does_not_fit_fails_before_the_run(
    tmp_path, toy_data, monkeypatch, run, options, message
):
    cfg = box_config(tmp_path, [box_spy(**options)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    untouched = Untouched(runner, monkeypatch)
    if message is None:  # the layers of the head run, so this is fine
        getattr(runner, run)()
        assert pictures(tmp_path)
        return
    with pytest.raises(VisError, match=f"(?s){message}"):
        getattr(runner, run)()
    assert (untouched.loaded, untouched.loops) == (0, 0)


@pytest.mark.parametrize("family", ["yolov8", "retinanet", "rtmdet", "faster_rcnn"])
def test_objectness_of_heads_that_have_none(tmp_path, toy_data, family):
    hook = box_spy(target="objectness")
    cfg = family_config(tmp_path, [hook], data_root=toy_data, family=family)
    with pytest.raises(
        VisConfigError, match=r"target='objectness'.*'score' or 'logit'"
    ):
        Runner.from_cfg(cfg).test()


@pytest.mark.parametrize("family", ["yolov5", "yolox", "fcos"])
def test_objectness_of_heads_that_have_one(tmp_path, toy_data, family, captions):
    hook = box_spy(target="objectness", num_images=1, score_thr=0.0)
    cfg = family_config(tmp_path, [hook], data_root=toy_data, family=family)
    Runner.from_cfg(cfg).test()
    notes = [note for _, note in captions if note.startswith("boxam · objectness · ")]
    assert any("map 0 to" in note for note in notes)


@pytest.mark.parametrize("family", ["yolov8", "retinanet"])
def test_soft_nms_is_refused_with_the_reason(tmp_path, toy_data, family):
    cfg = family_config(
        tmp_path,
        [box_spy()],
        data_root=toy_data,
        family=family,
        test_cfg=dict(nms=dict(type="soft_nms", iou_threshold=0.5)),
    )
    with pytest.raises(VisError, match=r"soft-NMS.*method='drise'"):
        Runner.from_cfg(cfg).test()


def test_drise_works_with_soft_nms(tmp_path, toy_data):
    hook = box_spy(method="drise", num_masks=24, num_images=1, score_thr=0.0, topk=2)
    cfg = family_config(
        tmp_path,
        [hook],
        data_root=toy_data,
        family="yolov8",
        test_cfg=dict(nms=dict(type="soft_nms", iou_threshold=0.5)),
    )
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 1


def test_draw_false_does_nothing(tmp_path, toy_data):
    hook = box_spy(draw=False, target_layers=["no.such.layer"], classes=["nothing"])
    runner = Runner.from_cfg(box_config(tmp_path, [hook], data_root=toy_data))
    runner.test()
    assert runner.model.bbox_head.num_calls == 3
    assert pictures(tmp_path) == {}


def test_a_trial_that_fails_by_itself_does_not_end_the_run(tmp_path, toy_data):
    """Noise is no image: what a detector makes of it is not the user's mistake."""
    for on_error in ("log", "raise"):
        hook = box_spy(on_error=on_error, num_images=2)
        cfg = box_config(tmp_path / on_error, [hook], data_root=toy_data)
        runner = Runner.from_cfg(cfg)
        runner.model.bbox_head.fail_at = 1
        if on_error == "raise":
            with pytest.raises(RuntimeError, match="the head failed"):
                runner.test()
        else:
            runner.test()
            assert len(pictures(tmp_path / on_error)) == 2
            assert "the head failed" in log_of(tmp_path / on_error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e6])
@pytest.mark.parametrize("target", ["score", "logit", "x1"])
def test_weights_that_are_not_there_yet_do_not_end_the_run(
    tmp_path, toy_data, target, value
):
    """What a checkpoint will fill may hold anything, and saturate every score."""
    hook = box_spy(target=target, num_images=1)
    runner = Runner.from_cfg(box_config(tmp_path, [hook], data_root=toy_data))
    torch.save(dict(state_dict=runner.model.state_dict()), tmp_path / "w.pth")
    with torch.no_grad():
        runner.model.neck.maps.shared.weight.fill_(value)
        for conv in runner.model.bbox_head.cls:
            conv.bias.fill_(value)
    runner._load_from = str(tmp_path / "w.pth")
    runner.test()
    assert len(pictures(tmp_path)) == 1
    assert hooks_left(runner.model) == []


# Which boxes.


def test_topk_takes_the_highest_scores(tmp_path, toy_data):
    everything = run_test(tmp_path / "all", toy_data, topk=-1, num_images=-1)[1]
    two = run_test(tmp_path / "two", toy_data, topk=2, num_images=-1)[1]
    assert max(len(s.explanations) for s in everything) > 2
    for sample, short in zip(everything, two):
        indices = [e.index for e in sample.explanations]
        scores = sample.detections.scores
        assert sorted(indices) == list(range(len(scores)))
        assert (np.diff(scores[indices]) <= 0).all()
        assert [e.index for e in short.explanations] == indices[:2]


def test_score_thr_and_what_the_captions_say(tmp_path, toy_data, captions):
    _, samples = run_test(tmp_path, toy_data, score_thr=0.4, num_images=-1)
    for sample, (title, note) in zip(
        samples, [c for c in captions if c[0].endswith("_image")]
    ):
        kept = np.flatnonzero(sample.detections.scores > 0.4)
        assert sorted(e.index for e in sample.explanations) == kept.tolist()
        assert title == sample.image_id
        if len(kept):
            assert f"with score > 0.4 · {len(kept)} explained" in note
        else:
            assert note.endswith("no boxes with score > 0.4")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (["lamp"], {1}),
        ("lamp", {1}),
        ([1], {1}),
        (1, {1}),
        (["square", 1], {0, 1}),
        (None, {0, 1}),
    ],
)
def test_classes_by_name_and_index(tmp_path, toy_data, classes, labels):
    _, samples = run_test(
        tmp_path, toy_data, num_classes=2, classes=classes, num_images=-1, topk=-1
    )
    found = {int(s.detections.labels[e.index]) for s in samples for e in s.explanations}
    assert found == labels
    # The others are drawn, but not explained.
    assert {int(label) for s in samples for label in s.detections.labels} == {0, 1}


@pytest.mark.parametrize("method", ["boxam", "drise"])
def test_an_image_without_detections_is_published_and_says_so(
    tmp_path, toy_data, captions, method
):
    _, samples = run_test(tmp_path, toy_data, score_thr=0.999, method=method)
    assert len(pictures(tmp_path)) == 4
    assert [s.explanations for s in samples] == [()] * 4
    assert len(captions) == 4
    assert all("no boxes with score > 0.999" in note for _, note in captions)


def test_a_detector_that_finds_nothing_at_all(tmp_path, toy_data, captions):
    cfg = box_config(tmp_path, [box_spy()], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.model.bbox_head.test_cfg["score_thr"] = 0.9999
    cfg = runner.test()
    assert len(pictures(tmp_path)) == 4
    assert all("no boxes with score > 0.2" in note for _, note in captions)
    assert runner.model.bbox_head.test_cfg["score_thr"] == 0.9999


# Where the maps lie.


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_maps_lie_on_their_objects(tmp_path, toy_data, alignment, geometry, batch_size):
    """The map's centre of mass is at most one cell off the square's."""
    hook = box_spy(alignment=alignment, num_images=-1, topk=1, score_thr=0.0)
    cfg = box_config(
        tmp_path,
        [hook],
        data_root=toy_data,
        geometry=GEOMETRIES[geometry],
        batch_size=batch_size,
    )
    runner = Runner.from_cfg(cfg)
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == 6
    for sample in samples:
        (explanation,) = sample.explanations
        (layer_map,) = explanation.maps
        heat = warped_to(sample, explanation)
        assert heat.shape == sample.image_rgb.shape[:2]
        bright = sample.image_rgb.mean(axis=2) > 180  # 114 is padding
        rows, columns = np.indices(heat.shape)
        centre = [(heat * axis).sum() / heat.sum() for axis in (rows, columns)]
        truth = [np.nonzero(bright)[axis].mean() for axis in (0, 1)]
        peak = np.unravel_index(heat.argmax(), heat.shape)
        assert bright[peak], sample.image_id
        for axis in (0, 1):
            cell = sample.frame.network_hw[axis] / layer_map.saliency.shape[axis]
            cell /= sample.frame.scale_xy[1 - axis]
            # A stretched square has more than one cell that is bright all around.
            half = np.ptp(np.nonzero(bright)[axis]) / 2
            reach = max(cell, half - cell)
            assert abs(centre[axis] - truth[axis]) <= reach, (sample.image_id, axis)
    assert len(pictures(tmp_path)) == 6


@pytest.mark.parametrize("alignment", ["letterbox", "network"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_explained_detections_are_those_of_the_loop(
    tmp_path, toy_data, alignment, batch_size
):
    kept = {}
    hook = box_spy(alignment=alignment, num_images=-1)
    cfg = box_config(tmp_path, [hook], data_root=toy_data, batch_size=batch_size)
    cfg.test_evaluator = []
    runner = Runner.from_cfg(cfg)
    runner.test_loop.evaluator.process = lambda data_samples, data_batch: kept.update(
        {sample.img_id: sample for sample in data_samples}
    )
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == len(kept) == 6
    for sample in samples:
        own = kept[int(sample.image_id.split("_")[0])]
        boxes = own.pred_instances.bboxes.numpy()
        if alignment == "network":
            top, _, left, _ = own.pad_param
            boxes = boxes * (own.scale_factor * 2) + (left, top, left, top)
        found = sample.detections
        assert len(found) > 0
        np.testing.assert_allclose(found.scores, own.pred_instances.scores, atol=1e-6)
        np.testing.assert_array_equal(found.labels, own.pred_instances.labels)
        np.testing.assert_allclose(found.boxes_xyxy, boxes, atol=1e-3)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_the_loop_does_no_more_forwards_than_are_needed(tmp_path, toy_data, alignment):
    runner, _ = run_test(
        tmp_path, toy_data, alignment=alignment, target_layers=["neck"], topk=3
    )
    # The trial, the loop's own, and one for each of the four images.
    assert runner.model.bbox_head.num_calls == 1 + 3 + 4


def test_override_runs_the_loop_on_the_resize_only_pipeline(tmp_path, toy_data):
    hook = box_spy(override_loop_pipeline=True, num_images=-1)
    cfg = box_config(tmp_path, [hook], data_root=toy_data, batch_size=1)
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 6
    assert "metrics are of that pipeline" in log_of(tmp_path)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_repeated_and_concatenated_datasets(tmp_path, toy_data, alignment):
    cfg = box_config(
        tmp_path, [box_spy(alignment=alignment, num_images=-1)], data_root=toy_data
    )
    inner = cfg.val_dataloader.dataset
    cfg.test_dataloader.dataset = dict(
        type="ConcatDataset", datasets=[inner, dict(inner, indices=[1, 2])]
    )
    cfg.test_evaluator = []
    Runner.from_cfg(cfg).test()
    assert len(pictures(tmp_path)) == 6


@MODELS.register_module()
class ToyBoxTTA(BaseTTAModel):
    """Gives the predictions of the first view."""

    def merge_preds(self, data_samples_list):
        return [samples[0] for samples in data_samples_list]


@pytest.mark.parametrize("flip_first", [True, False])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_test_time_augmentation(tmp_path, toy_data, alignment, flip_first):
    """As ``tools/test.py --tta`` builds it: the unflipped view is explained."""
    hook = box_spy(alignment=alignment, num_images=-1, topk=1, score_thr=0.0)
    cfg = box_config(tmp_path, [hook], data_root=toy_data)
    flips = [dict(type="mmdet.RandomFlip", prob=p) for p in (0.0, 1.0)]
    pipeline = make_pipeline()
    cfg.test_dataloader.dataset.pipeline = [
        pipeline[0],
        dict(
            type="TestTimeAug",
            transforms=[
                [dict(type="Compose", transforms=list(LETTERBOX))],
                flips[::-1] if flip_first else flips,
                [pipeline[-2]],
                [pipeline[-1]],
            ],
        ),
    ]
    cfg.model = dict(type="ToyBoxTTA", module=cfg.model)
    runner = Runner.from_cfg(cfg)
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == 6
    for sample in samples:
        (explanation,) = sample.explanations
        heat = warped_to(sample, explanation)
        bright = sample.image_rgb.mean(axis=2) > 180
        assert bright[np.unravel_index(heat.argmax(), heat.shape)]
        x1, y1, x2, y2 = sample.detections.boxes_xyxy[explanation.index]
        assert bright[int((y1 + y2) / 2), int((x1 + x2) / 2)]


# Methods and layers.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws(tmp_path, toy_data, captions, method):
    _, samples = run_test(
        tmp_path, toy_data, method=method, image_indices=[3], topk=3, num_masks=64
    )
    (sample,) = samples
    assert len(sample.explanations) == 3
    for explanation in sample.explanations:
        assert explanation.warning == ""
        (layer_map,) = explanation.maps
        saliency = layer_map.saliency
        assert np.isfinite(saliency).all()
        assert saliency.min() >= 0
        assert saliency.max() > 1.2 * saliency.min()
    notes = [note for title, note in captions if title.startswith("square")]
    assert len(notes) == 3
    assert all(note.startswith(f"{method} · score · ") for note in notes)
    shared = "not of the box alone" in notes[0]
    assert shared == (method in ("eigencam", "fem", "kpcacam"))


@pytest.mark.parametrize("target", ["score", "logit", "x1", "y1", "x2", "y2"])
def test_every_target_draws(tmp_path, toy_data, target, captions):
    _, samples = run_test(tmp_path, toy_data, target=target, image_indices=[3])
    shown = [e for s in samples for e in s.explanations if e.maps]
    assert shown
    assert any(f"boxam · {target} · neck[" in note for _, note in captions)


def test_the_default_map_is_the_slow_reference(tmp_path, toy_data):
    """relu(sum_c relu(g) * A) by plain autograd, at the level that made the box."""
    runner, samples = run_test(
        tmp_path, toy_data, image_indices=[2], alignment="letterbox", batch_size=1
    )
    model = runner.model.eval()
    (sample,) = samples
    data = runner.test_dataloader.dataset[2]
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    maps = [
        m.detach().requires_grad_() for m in model.neck(model.backbone(batch["inputs"]))
    ]
    scores, sides = model.bbox_head(maps)
    found = model.bbox_head.predict(
        [s[0] for s in scores], [s[0] for s in sides], batch["data_samples"][0]
    )
    assert len(sample.explanations) >= 3
    levels = set()
    for explanation in sample.explanations:
        gradients = torch.autograd.grad(
            found.scores[explanation.index], maps, retain_graph=True, allow_unused=True
        )
        (layer_map,) = explanation.maps
        level = int(layer_map.layer[-2])
        levels.add(level)
        expected = (gradients[level].relu() * maps[level]).sum(dim=1)[0].relu()
        expected = expected.detach().numpy()
        np.testing.assert_allclose(
            layer_map.saliency, expected, atol=1e-5 * expected.max()
        )
    assert levels == {0, 1}


@pytest.fixture(scope="module")
def picture_of(tmp_path_factory, toy_data):
    """The picture of an image with some options, each made once."""
    found: dict[str, np.ndarray] = {}

    def get(**options) -> np.ndarray:
        key = repr(sorted(options.items()))
        if key not in found:
            work_dir = tmp_path_factory.mktemp("picture")
            run_test(work_dir, toy_data, **dict(dict(image_indices=[3]), **options))
            (found[key],) = pictures(work_dir).values()
        return found[key]

    return get


def test_a_picture_can_be_repeated(tmp_path, toy_data, picture_of):
    run_test(tmp_path, toy_data, image_indices=[3])
    np.testing.assert_array_equal(*pictures(tmp_path).values(), picture_of())


@pytest.mark.parametrize(
    "options",
    [
        dict(smooth=0.4),
        dict(smooth=0.0),
        dict(norm_in_bbox=True),
        dict(alpha=0.2),
        dict(colormap="jet"),
        dict(eigen_smooth=True),
        dict(aug_smooth=True),
        dict(max_shape=4),
        dict(max_shape=(4, 8)),
        dict(scope="class"),
        dict(scope="image"),
        dict(topk=1),
        dict(score_thr=0.5),
        dict(target="logit"),
        dict(method="gradcam"),
        dict(target_layers="backbone"),
    ],
    ids=str,
)
def test_the_option_shows_in_the_picture(picture_of, options):
    assert differ(picture_of(**options), picture_of())


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape != other.shape or bool((one != other).mean() > 1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ablationcam", dict(ratio_channels_to_ablate=0.3)),
        ("drise", dict(num_masks=32)),
    ],
)
def test_options_of_the_methods_that_perturb(picture_of, method, options):
    basic = dict(method=method, num_masks=64)
    assert differ(picture_of(**{**basic, **options}), picture_of(**basic))


@pytest.mark.parametrize("method", ["ablationcam", "scorecam", "drise"])
def test_the_batch_size_changes_nothing(tmp_path, toy_data, method):
    maps = []
    for batch_size in (1, 5):
        _, samples = run_test(
            tmp_path / str(batch_size),
            toy_data,
            image_indices=[3],
            method=method,
            batch_size=batch_size,
            num_masks=32,
        )
        maps.append([e.maps[0].saliency for e in samples[0].explanations])
    for one, five in zip(*maps):
        np.testing.assert_allclose(one, five, atol=1e-4 * one.max())


@pytest.mark.parametrize(
    ("method", "smooth"), [("boxam", 0.1), ("layercam", 0.0), ("gradcam", 0.0)]
)
def test_smoothing_by_default_is_that_of_the_method(picture_of, method, smooth):
    implicit, explicit = (
        picture_of(method=method, **options) for options in ({}, dict(smooth=smooth))
    )
    np.testing.assert_array_equal(implicit, explicit)


def test_the_neck_is_where_the_boxes_of_this_detector_are_made(picture_of):
    np.testing.assert_array_equal(picture_of(target_layers=["neck"]), picture_of())


def test_scope_says_what_has_a_panel(tmp_path, toy_data, captions):
    titles = {}
    for scope in ("box", "class", "image"):
        captions.clear()
        run_test(
            tmp_path / scope,
            toy_data,
            num_classes=2,
            scope=scope,
            image_indices=[3],
            topk=5,
        )
        titles[scope] = [title for title, _ in captions]
    assert {titles[scope][0] for scope in titles} == {"4_image"}
    assert {t for own in titles.values() for t in own if "explained" in t} == {
        "5 explained boxes"
    }
    assert len(titles["box"]) == 2 + 5
    by_class = [t.split(" (")[0] for t in titles["class"] if "(" in t]
    assert sorted(by_class) == ["lamp", "square"]
    assert len(titles["image"]) == 2


@pytest.mark.parametrize("fusion", ["max", "mean", "sum", "product"])
@pytest.mark.parametrize("normalize_layers", [True, False])
def test_several_layers_are_fused(
    tmp_path, toy_data, captions, fusion, normalize_layers
):
    layers = ["backbone", "neck.maps.out_layers[0]", "neck"]
    _, samples = run_test(
        tmp_path,
        toy_data,
        target_layers=layers,
        fusion=fusion,
        normalize_layers=normalize_layers,
        image_indices=[3],
        topk=1,
        method="gradcam",
    )
    (explanation,) = samples[0].explanations
    assert [m.layer for m in explanation.maps] == [
        "backbone",
        "neck.maps.out_layers[0]",
        "neck[0]",
    ]
    each = "normalised " if normalize_layers else ""
    assert any(f"{fusion} of {each}backbone 16x16, " in note for _, note in captions)


def test_fusions_differ_in_the_picture(picture_of):
    drawn = [
        picture_of(fusion=fusion, target_layers=["backbone", "neck"])
        for fusion in ("max", "mean", "product")
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert differ(drawn[one], drawn[other])


def test_a_layer_without_influence_gives_a_warning_and_names_the_layer_that_has(
    tmp_path, toy_data, captions
):
    """Boxes of the first level know nothing of the second level's maps."""
    _, samples = run_test(
        tmp_path, toy_data, target_layers=["neck.maps.out_layers[1]"], num_images=-1
    )
    blank = [e for s in samples for e in s.explanations if not e.maps]
    assert blank
    warning = (
        "neck.maps.out_layers[1]: no influence on this box; it was made at neck[0]"
    )
    assert {e.warning for e in blank} == {warning}
    assert warning in log_of(tmp_path)
    assert sum(note.endswith(warning) for _, note in captions) == len(blank)
    assert len(pictures(tmp_path)) == 6
    assert any(e.maps for s in samples for e in s.explanations)


@pytest.mark.parametrize("target", ["score", "logit"])
def test_a_saturated_box_gets_a_warning_and_the_others_their_maps(
    tmp_path, toy_data, captions, target
):
    hook = box_spy(target=target, image_indices=[3], topk=-1)
    runner = Runner.from_cfg(box_config(tmp_path, [hook], data_root=toy_data))
    # Only bright places are certain to the last digit of a float32.
    torch.nn.init.constant_(runner.model.bbox_head.cls[0].bias, 15.0)
    runner.model.bbox_head.test_cfg["max_per_img"] = 40
    runner.test()
    (sample,) = vis_hooks(runner)[0].samples
    scores = sample.detections.scores
    saturated = {e.index for e in sample.explanations if scores[e.index] == 1}
    assert 0 < len(saturated) < len(scores)
    for explanation in sample.explanations:
        assert ("saturated" in explanation.warning) == (explanation.index in saturated)
    assert any(e.maps for e in sample.explanations)
    notes = [note for title, note in captions if title.startswith("square")]
    assert sum("saturated" in note for note in notes) == len(saturated)


def test_a_blank_product_is_explained(tmp_path, toy_data, captions):
    """Two maps that have no cell in common."""
    hook = box_spy(
        target_layers=["neck", "backbone"], fusion="product", image_indices=[3], topk=1
    )
    runner = Runner.from_cfg(box_config(tmp_path, [hook], data_root=toy_data))
    (vis_hook,) = vis_hooks(runner)
    original = vis_hook.build_panel

    def build(class_names, palette):
        explain = original(class_names, palette)

        def explain_changed(sample):
            for i, layer_map in enumerate(sample.explanations[0].maps):
                layer_map.saliency[:] = 0
                layer_map.saliency[i * 8 : i * 8 + 1] = 1
            return explain(sample)

        return explain_changed

    vis_hook.build_panel = build
    runner.test()
    notes = [note for title, note in captions if title.startswith("square")]
    assert len(notes) == 1
    assert notes[0].endswith("the product of the layers is zero on the image")


def test_many_boxes_in_one_picture(tmp_path, toy_data, captions):
    hook = box_spy(topk=-1, score_thr=0.0, image_indices=[5])
    runner = Runner.from_cfg(box_config(tmp_path, [hook], data_root=toy_data))
    runner.model.bbox_head.test_cfg.update(max_per_img=60, score_thr=0.02, iou_thr=0.9)
    runner.test()
    (sample,) = vis_hooks(runner)[0].samples
    assert len(sample.explanations) == 60
    assert sum(title.startswith("square") for title, _ in captions) == 60
    (picture,) = pictures(tmp_path).values()
    assert max(picture.shape) < 8000


def test_three_hooks_and_a_second_test(tmp_path, toy_data):
    hooks = [
        spy(num_images=1),
        box_spy(num_images=1),
        box_spy(num_images=1, alignment="letterbox"),
    ]
    runner = Runner.from_cfg(box_config(tmp_path, hooks, data_root=toy_data))
    runner.test()
    runner.test()
    assert sorted(pictures(tmp_path)) == sorted(
        f"test.{name}.1_image_{run}.png"
        for name in ("boxam", "boxam_2", "featmap")
        for run in (0, 1)
    )


def test_interval_and_step(tmp_path, toy_data):
    cfg = box_config(
        tmp_path, [box_spy(num_images=1, interval=2)], data_root=toy_data, max_epochs=3
    )
    Runner.from_cfg(cfg).train()
    assert sorted(pictures(tmp_path)) == [
        "val.boxam.1_image_1.png",
        "val.boxam.1_image_3.png",
    ]
