"""Options, alignment and pictures of the hook on a real Runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

from mmyolo_vis_hooks import BoxAMVisHook
from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.errors import VisError
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_featmap import GEOMETRIES
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy import LETTERBOX, make_pipeline
from tests.toy_boxes import box_config

ALIGNMENTS = ("resize", "letterbox", "network")


def run_test(tmp_path, toy_data, model=None, num_classes=1, **options):
    """One test run; gives the runner and the samples that were drawn."""
    cfg = box_config(
        tmp_path, [box_spy(**options)], data_root=toy_data, num_classes=num_classes
    )
    runner = Runner.from_cfg(cfg)
    runner.test()
    return runner, vis_hooks(runner)[0].samples


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


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("train", dict(target_layers=["nekc"]), "near matches: neck"),
        ("val", dict(target_layers=["nekc"]), "near matches: neck"),
        ("test", dict(target_layers=["unused"]), "unused did not run.*choose a layer"),
        ("test", dict(classes=["sqare"]), "classes.*'sqare'.*did you mean 'square'"),
        ("test", dict(classes=[3]), "classes.*3 is no class.*'square'"),
        ("test", dict(image_indices=[6]), "6 images"),
        ("test", dict(target="objectness"), "target='objectness'.*'score' or 'logit'"),
        ("test", dict(target_layers=["bbox_head.cls"]), None),
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


@pytest.mark.parametrize(
    ("target", "value"), [("score", float("nan")), ("logit", 1e6), ("x1", -1e6)]
)
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


# Where the maps lie.


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("geometry", list(GEOMETRIES)[:2])
def test_maps_lie_on_their_objects(tmp_path, toy_data, alignment, geometry):
    """The map's centre of mass is at most one cell off the square's."""
    hook = box_spy(alignment=alignment, num_images=-1, topk=1, score_thr=0.0)
    cfg = box_config(
        tmp_path,
        [hook],
        data_root=toy_data,
        geometry=GEOMETRIES[geometry],
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
def test_the_explained_detections_are_those_of_the_loop(tmp_path, toy_data, alignment):
    kept = {}
    hook = box_spy(alignment=alignment, num_images=-1)
    cfg = box_config(tmp_path, [hook], data_root=toy_data)
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


@pytest.mark.parametrize("alignment", ["resize", "letterbox"])
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


@pytest.mark.parametrize(
    ("alignment", "flip_first"),
    [("resize", True), ("letterbox", True), ("network", False)],
)
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
