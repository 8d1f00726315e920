"""What ``BoxAMVisHook`` logs of its maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner

from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.diagnosis.matching import box_iou
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.hooks import base
from mmyolo_vis_hooks.metrics.metric import METRICS, register_metric
from mmyolo_vis_hooks.metrics.pointing_game import energy_inside
from tests.test_hooks.helpers import box_spy, logged, ran_test, vis_hooks
from tests.test_hooks.test_loops import teacher_student
from tests.toy_boxes import box_config


def measured(work_dir: Path, toy_data: Path, **options: Any) -> Runner:
    options = dict(metrics=["energy"], num_images=3) | options
    return ran_test(work_dir, toy_data, box_spy(**options))


@pytest.mark.parametrize("alignment", ["resize", "letterbox", "network"])
def test_the_energy_is_that_of_each_box_by_itself(tmp_path, toy_data, alignment):
    """Measured on the original image here, on the network's input by the hook."""
    runner = measured(tmp_path, toy_data, alignment=alignment)
    (hook,) = vis_hooks(runner)
    dataset = runner.test_dataloader.dataset
    by_id = {info["img_id"]: info for info in map(dataset.get_data_info, range(6))}
    energies = []
    for sample in hook.samples:
        (found,) = by_id[int(sample.image_id.split("_")[0])]["instances"]
        truth = np.array([found["bbox"]], np.float32)
        if alignment == "network":
            (metainfo,) = [sample.look.metainfo]
            scale, pad = metainfo["scale_factor"], metainfo["pad_param"]
            truth = truth * np.array(scale * 2) + np.array([pad[2], pad[0]] * 2)
        boxes = sample.detections.boxes_xyxy
        hit = False
        for explanation in sample.explanations:
            box = boxes[explanation.index]
            # The best detection takes the object, the others are measured on their box.
            takes = not hit and box_iou(box[None], truth)[0, 0] >= 0.5
            hit |= takes
            saliency = box_saliency(explanation, sample.frame, box)
            energies.append(energy_inside(saliency, truth[0] if takes else box))
    assert len(energies) > 3
    assert logged(runner, "boxam")["energy_box"] == pytest.approx(
        np.mean(energies), abs=0.01
    )


def test_objects_are_left_out_where_nothing_leads_to_them(tmp_path, toy_data):
    """The pipeline moves the image and does not say so."""

    @TRANSFORMS.register_module(force=True)
    class Nudge(BaseTransform):
        def transform(self, results: dict) -> dict:
            return results | dict(img=np.roll(results["img"], 4, axis=1))

    geometry = (dict(type="mmdet.Resize", scale_factor=1.0), dict(type="Nudge"))
    hook = box_spy(metrics=["energy"], alignment="network")
    runner = ran_test(tmp_path, toy_data, hook, geometry=geometry)
    (hook,) = vis_hooks(runner)
    energies = [
        energy_inside(box_saliency(e, sample.frame, box), box)
        for sample in hook.samples
        for e in sample.explanations
        for box in [sample.detections.boxes_xyxy[e.index]]
    ]
    assert len(energies) > 3
    energy = logged(runner, "boxam")["energy_box"]
    assert energy == pytest.approx(np.mean(energies), abs=1e-5)


def test_images_are_asked_as_many_at_once_as_the_hook_may(tmp_path, toy_data):
    hook = box_spy(metrics=["inside"], num_images=1, topk=1, batch_size=3)
    cfg = box_config(tmp_path, [hook], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    sizes = []
    count = lambda module, args: sizes.append(len(args[0]))  # noqa: E731
    runner.model.backbone.register_forward_pre_hook(count)
    runner.test()
    assert max(sizes) == 3


def test_a_metric_of_ones_own_logs_its_numbers(tmp_path, toy_data):
    @register_metric("spread", summary="standard deviation of the map")
    def spread(saliency, subject):
        return dict(spread=saliency.std(), rows=saliency.sum(axis=1))

    try:
        runner = measured(tmp_path, toy_data, metrics=["spread"], num_images=1)
    finally:
        del METRICS["spread"]
    assert set(logged(runner, "boxam")) == {"spread"}


def test_images_that_two_ranks_met_are_counted_once(tmp_path, toy_data, monkeypatch):
    alone = logged(measured(tmp_path / "alone", toy_data), "boxam")
    gather = base.all_gather_object
    monkeypatch.setattr(base, "all_gather_object", lambda own: 2 * gather(own))
    assert logged(measured(tmp_path / "both", toy_data), "boxam") == alone != {}


def test_scalars_stand_beside_the_metrics_of_the_runs_that_are_drawn(
    tmp_path, toy_data
):
    metrics = ["energy", "inside", "sparsity"]
    hook = box_spy(metrics=metrics, interval=2, num_images=1, topk=1)
    cfg = box_config(tmp_path, [hook], data_root=toy_data, max_epochs=3)
    Runner.from_cfg(cfg).train()
    (path,) = tmp_path.rglob("vis_data/scalars.json")
    lines = list(map(json.loads, path.read_text().splitlines()))
    validations = [line for line in lines if "coco/bbox_mAP" in line]
    assert [line["step"] for line in validations] == [1, 2, 3]
    ours = [{k for k in line if k.startswith("boxam/")} for line in validations]
    names = {"energy_box", "inside", "inside_ins", "inside_del", "sparsity"}
    assert ours == [{f"boxam/{n}" for n in names}, set(), ours[0]]
    assert validations[0]["boxam/inside"] != validations[2]["boxam/inside"]


def test_each_pass_of_a_loop_is_measured_by_itself(tmp_path, toy_data):
    hook = box_spy(metrics=["energy"], num_images=1)
    runner = teacher_student(tmp_path, toy_data, hook)
    runner.val()
    assert set(logged(runner, "boxam", "val")) == {
        "teacher/energy_box",
        "student/energy_box",
    }


def test_nothing_is_logged_that_was_not_asked_for_or_of_no_box(tmp_path, toy_data):
    assert logged(measured(tmp_path / "none", toy_data, metrics=[]), "boxam") == {}
    assert logged(measured(tmp_path / "no_box", toy_data, score_thr=1.0), "boxam") == {}


def test_what_cannot_work_is_refused_before_the_run(tmp_path, toy_data):
    hook = box_spy(metrics=["energy"], priority="VERY_LOW")
    cfg = box_config(tmp_path, [hook], data_root=toy_data)
    with pytest.raises(VisConfigError, match="priority='VERY_LOW' puts BoxSpyHook"):
        Runner.from_cfg(cfg).train()
    for wrong in (["energie"], 3, [None]):
        cfg = box_config(tmp_path, [box_spy(metrics=wrong)], data_root=toy_data)
        with pytest.raises(VisConfigError, match="metrics"):
            Runner.from_cfg(cfg)
