"""Options, alignment and pictures of the hook on a real Runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmyolo_vis_hooks.errors import VisError
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy_boxes import box_config

CHANNELS = dict(channel_reduction=None)


@pytest.mark.parametrize(
    ("run", "hook", "message"),
    [
        ("train", box_spy(target_layers=["nekc"]), "near matches: neck"),
        ("val", box_spy(image_indices=[6]), "6 images"),
        ("test", box_spy(target_layers=["unused"]), "unused did not run.*choose a lay"),
        ("test", box_spy(classes=["sqare"]), "classes.*'sqare'.*did you mean 'square'"),
        ("test", box_spy(classes=[3]), "classes.*3 is no class.*'square'"),
        ("test", box_spy(target="objectness"), "target='objectness'.*'score' or 'logi"),
        ("train", spy(target_layers=["unused"]), "unused did not run.*choose a layer"),
        ("val", spy(topk=-1, **CHANNELS), "'backbone'.*topk=-1.* has 16; set channel_"),
        ("test", spy(arrangement=(1, 999), **CHANNELS), r"\(1, 999\).*at most 268 mil"),
    ],
)
def test_what_does_not_fit_fails_before_the_run(
    tmp_path, toy_data, monkeypatch, run, hook, message
):
    cfg = box_config(tmp_path, [dict(hook, on_error="log")], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    begun = []
    monkeypatch.setattr(runner, "load_or_resume", lambda: begun.append("loading"))
    for loop in (runner.train_loop, runner.val_loop, runner.test_loop):
        monkeypatch.setattr(loop, "run", lambda: begun.append("the loop"))
    with pytest.raises(VisError, match=f"(?s){message}"):
        getattr(runner, run)()
    assert begun == []


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


@pytest.mark.parametrize("alignment", ["resize", "letterbox", "network"])
def test_the_explained_detections_are_those_of_the_loop(tmp_path, toy_data, alignment):
    """With no more forwards than are needed."""
    kept = {}
    hook = box_spy(alignment=alignment, num_images=-1, target_layers=["neck"], topk=3)
    cfg = box_config(tmp_path, [hook], data_root=toy_data)
    cfg.test_evaluator = []
    runner = Runner.from_cfg(cfg)
    runner.test_loop.evaluator.process = lambda data_samples, data_batch: kept.update(
        {sample.img_id: sample for sample in data_samples}
    )
    runner.test()
    samples = vis_hooks(runner)[0].samples
    assert len(samples) == len(kept) == 6
    # The trial, the loop's own, one for each image, and once whether padding counts.
    padding = 0 if alignment == "resize" else 2
    assert runner.model.bbox_head.num_forwards == 1 + 3 + 6 + padding
    for sample in samples if alignment != "resize" else ():
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
