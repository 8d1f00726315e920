"""``ErrorVisHook`` on the toy that finds bright squares."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import DATASETS, LOOPS, MODELS
from mmengine.runner import Runner, loops

from mmyolo_vis_hooks import diagnose
from mmyolo_vis_hooks.diagnosis.result import Diagnosis
from mmyolo_vis_hooks.errors import VisConfigError, VisError
from mmyolo_vis_hooks.hooks import base, errors
from mmyolo_vis_hooks.hooks.vis_loop import VisLoop
from tests.test_hooks.helpers import log_of, logged, pictures, ran_test
from tests.test_hooks.test_featmap import augmented
from tests.test_hooks.test_loops import teacher_student
from tests.toy import SIZES
from tests.toy_boxes import ToyBoxDetector, box_config


def hook(**options: Any) -> dict:
    return dict(dict(type="ErrorVisHook", on_error="raise", num_images=2), **options)


def looked_at(work_dir: Path, toy_data: Path, **options: Any) -> Runner:
    return ran_test(work_dir, toy_data, hook(**options))


def by_itself(runner: Runner, **options: Any) -> dict[str, Diagnosis]:
    """What the Python API says of each image, by its id."""
    dataset = DATASETS.build(runner.cfg.test_dataloader.dataset)
    infos = list(map(dataset.get_data_info, range(len(dataset))))
    given = ([info[key] for info in infos] for key in ("img_path", "instances"))
    found = diagnose(runner.model, *given, config=runner.cfg, **options)
    return {str(info["img_id"]): own for info, own in zip(infos, found)}


def test_the_counts_are_those_of_each_image_by_itself(tmp_path, toy_data):
    """The mechanisms of what is missed, too, and whatever is drawn."""
    runner = looked_at(tmp_path, toy_data, mechanisms="all", score_thr=0.6)
    found = by_itself(runner, score_thr=0.6, topk=0).values()
    counts = logged(runner, "errors")
    for name in (name for name in counts if name.startswith("missed/")):
        own = [m.mechanism for diagnosis in found for m in diagnosis.missed]
        assert counts[name] == own.count(name.split("/")[1].replace("_", " "))
    assert counts["hits"] == sum(len(own.matches.hits) for own in found)
    assert counts["missed"] == sum(len(own.missed) for own in found)
    kinds = [false.kind for own in found for false in own.false_positives]
    for kind in ("confused", "badly placed", "both", "duplicate", "background"):
        assert counts[f"false/{kind.replace(' ', '_')}"] == kinds.count(kind)
    assert counts["false_alarms"] == len(kinds) > 0
    assert len(pictures(tmp_path)) == 2


def test_images_that_two_ranks_met_are_counted_once(tmp_path, toy_data, monkeypatch):
    alone = logged(looked_at(tmp_path / "alone", toy_data), "errors")
    gather = base.all_gather_object
    monkeypatch.setattr(base, "all_gather_object", lambda own: 2 * gather(own))
    assert logged(looked_at(tmp_path / "both", toy_data), "errors") == alone


def test_the_scalars_stand_beside_the_metrics_at_their_step(tmp_path, toy_data):
    cfg = box_config(tmp_path, [hook(interval=2)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.train()
    (path,) = tmp_path.rglob("vis_data/scalars.json")
    lines = list(map(json.loads, path.read_text().splitlines()))
    validations = [line for line in lines if "coco/bbox_mAP" in line]
    assert [line["step"] for line in validations] == [1, 2]
    for line in validations:  # whatever is drawn
        assert line["errors/hits"] + line["errors/missed"] == len(SIZES)
        assert 0 <= line["errors/dap/missed"] <= 1
        # Nobody asked why.
        assert not any(name.startswith("errors/missed/") for name in line)
    ours = [
        {k: v for k, v in line.items() if k.startswith("errors/")}
        for line in validations
    ]
    assert ours[0] != ours[1]  # each of its own weights
    assert all("val.errors." in name for name in pictures(tmp_path))
    assert len(pictures(tmp_path)) == 2  # of the first validation alone


def test_the_share_of_evidence_inside_is_that_of_the_drawn_images(tmp_path, toy_data):
    runner = looked_at(tmp_path, toy_data, num_images=-1)
    (name,) = runner.test_dataloader.dataset.metainfo["classes"]
    share = logged(runner, "errors")[f"energy_inside/{name}"]
    shares = []
    for own in by_itself(runner).values():
        for hit in own.found:
            x1, y1, x2, y2 = (int(v) for v in own.truth.boxes_xyxy[hit.record.truth])
            saliency = hit.map.saliency
            shares.append(float(saliency[y1:y2, x1:x2].sum() / saliency.sum()))
    assert share == pytest.approx(sum(shares) / len(shares), abs=1e-4)
    assert 0.1 < share < 1


def test_the_log_says_when_the_evidence_leaves_the_objects(
    tmp_path, toy_data, monkeypatch
):
    given = []

    def update(self: Any, shares: dict, ap: float) -> list[str]:
        given.append((shares, ap))
        return ["it falls"]

    monkeypatch.setattr(errors.EnergyWatch, "update", update)
    looked_at(tmp_path, toy_data)
    ((shares, ap),) = given
    assert {name for name, _ in shares.values()} == {"square"}
    assert 0 < ap <= 1
    (log,) = tmp_path.rglob("*.log")
    assert "errors: it falls" in log.read_text()


@MODELS.register_module()
class HalvingTTA(BaseTTAModel):
    """Finds half as much as the detector alone, in another order."""

    def merge_preds(self, data_samples_list: list) -> list:
        merged = [samples[0] for samples in data_samples_list]
        for sample in merged:
            number = len(sample.pred_instances)
            order = torch.arange(number).flip(0)[: (number + 1) // 2]
            sample.pred_instances = sample.pred_instances[order]
        return merged


@pytest.mark.parametrize("select", ["fixed", "worst"])
def test_pictures_show_what_the_loop_found_each_box_with_its_own_map(
    tmp_path, toy_data, monkeypatch, select
):
    drawn, draw = [], Diagnosis.draw
    shown = lambda own: drawn.append(own) or draw(own)  # noqa: E731
    monkeypatch.setattr(Diagnosis, "draw", shown)
    options = dict(select=select, num_images=-1, score_thr=0.3, topk=-1)
    plain = box_config(tmp_path, [hook(**options)], data_root=toy_data)
    cfg = augmented(copy.deepcopy(plain), flip_first=False)
    cfg.model.type = "HalvingTTA"
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    runner.test()
    counts = logged(runner, "errors")
    assert counts["false_alarms"] == sum(len(own.false_positives) for own in drawn) > 0
    assert counts["missed"] == sum(len(own.missed) for own in drawn)
    detector = SimpleNamespace(model=runner.model.module, cfg=plain)
    everything = by_itself(detector, score_thr=0.3, topk=-1)
    num_maps = 0
    for own in drawn:
        alone = everything[own.image_id.removesuffix("_image")]
        boxes = [*alone.found, *alone.false_positives]
        for box in [*own.found, *own.false_positives]:
            (same,) = (b for b in boxes if np.allclose(b.box_xyxy, box.box_xyxy))
            assert (box.map is None) == (same.map is None)
            if box.map is not None:
                num_maps += 1
                np.testing.assert_allclose(
                    box.map.saliency, same.map.saliency, atol=1e-5
                )
    assert num_maps > len(drawn)


@pytest.mark.parametrize("num_images", [1, 2, -1])
def test_the_worst_are_those_that_lose_most(tmp_path, toy_data, num_images):
    options = dict(select="worst", score_thr=0.6)
    runner = looked_at(tmp_path, toy_data, **options, num_images=num_images)
    lost = {}
    for name, own in by_itself(runner, score_thr=0.6, topk=0).items():
        costs = [1.0 for _ in own.missed] + [f.score for f in own.false_positives]
        lost[name] = sum(costs)  # of one class
    worst = sorted((name for name in lost if lost[name]), key=lambda n: -lost[n])
    expected = worst[: None if num_images < 0 else num_images]
    drawn = [name.split(".")[2].split("_")[0] for name in pictures(tmp_path)]
    assert sorted(drawn) == sorted(expected)


def test_of_two_ranks_the_first_that_met_an_image_draws_it(
    tmp_path, toy_data, monkeypatch
):
    options = dict(select="worst", num_images=-1, score_thr=0.6)
    looked_at(tmp_path / "alone", toy_data, **options)
    alone = pictures(tmp_path / "alone")
    for name in ("first", "second"):
        monkeypatch.setattr(errors, "get_rank", lambda name=name: int(name != "first"))
        monkeypatch.setattr(errors, "all_gather_object", lambda own: [own, own])
        looked_at(tmp_path / name, toy_data, **options)
        assert len(pictures(tmp_path / name)) == (len(alone) if name == "first" else 0)


def test_what_cannot_be_found_out_of_missed_objects_leaves_the_counts(
    tmp_path, toy_data, monkeypatch
):
    """As of a loop that does not call what is recorded."""
    plain = logged(looked_at(tmp_path / "plain", toy_data, score_thr=0.6), "errors")
    monkeypatch.setattr(VisLoop, "_record_next_step", lambda *_: None)
    options = dict(score_thr=0.6, select="worst", on_error="log", mechanisms="all")
    counts = logged(looked_at(tmp_path / "all", toy_data, **options), "errors")
    reasons = {k: v for k, v in counts.items() if k.startswith("missed/")}
    assert sum(reasons.values()) == 0 < counts["missed"]
    others = counts.items() - reasons.items()
    assert {k: v for k, v in others if "energy" not in k}.items() <= plain.items()
    assert "Could not find out why objects of 1_image are missed" in log_of(tmp_path)


def test_worst_images_that_cannot_be_chosen_do_not_end_the_run(
    tmp_path, toy_data, monkeypatch
):
    monkeypatch.setattr(errors, "ap_lost", lambda images: 1 / 0)
    runner = looked_at(tmp_path, toy_data, select="worst", on_error="log")
    assert logged(runner, "errors")["hits"] > 0
    assert "errors: Could not choose the worst images" in log_of(tmp_path)


@LOOPS.register_module()
class ShortLoop(loops.TestLoop):
    """Ends after the first batch."""

    def run(self) -> None:
        self.runner.call_hook("before_test_epoch")
        self.run_iter(0, next(iter(self.dataloader)))
        self.runner.call_hook("after_test_epoch", metrics={})


def test_images_that_are_not_counted_are_named(tmp_path, toy_data):
    cfg = box_config(tmp_path, [hook(select="worst")], data_root=toy_data, batch_size=4)
    cfg.test_cfg = dict(type="ShortLoop")
    Runner.from_cfg(cfg).test()
    gap = "2 of the 6 images of the test loop are not counted: 5_image, 6_image"
    assert gap in log_of(tmp_path)
    assert not pictures(tmp_path)
    assert "so no picture is drawn; leave select='fixed'" in log_of(tmp_path)


@MODELS.register_module()
class ToySegmentor(ToyBoxDetector):
    """Gives no boxes, as panoptic detectors do."""

    def forward(
        self, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor"
    ) -> Any:
        output = super().forward(inputs, data_samples, mode)
        if mode == "predict":
            for sample in output:
                del sample.pred_instances
        return output


def test_without_boxes_nothing_is_called_missed(tmp_path, toy_data):
    cfg = box_config(tmp_path, [hook(on_error="log")], data_root=toy_data)
    cfg.model.type, cfg.test_evaluator = "ToySegmentor", []
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert logged(runner, "errors")["missed"] == 0
    assert "6 of the 6 images of the test loop are not counted" in log_of(tmp_path)
    assert "ToySegmentor gives no bboxes, scores, labels" in log_of(tmp_path)
    with pytest.raises(VisError, match="ToySegmentor gives no bboxes"):
        by_itself(runner)


def test_no_count_of_an_earlier_run_is_logged_again(tmp_path, toy_data, monkeypatch):
    runner = looked_at(tmp_path, toy_data, on_error="log")
    assert logged(runner, "errors")

    def fail(*_):
        raise RuntimeError("cannot count")

    monkeypatch.setattr(errors.ErrorVisHook, "_log", fail)
    runner.test()
    assert logged(runner, "errors") == {}


def test_each_pass_of_a_loop_is_counted_by_itself(tmp_path, toy_data):
    runner = teacher_student(tmp_path, toy_data, hook(num_images=1))
    runner.val()
    counts = logged(runner, "errors", "val")
    for part in ("teacher", "student"):
        assert counts[f"{part}/hits"] + counts[f"{part}/missed"] == len(SIZES)
    assert "hits" not in counts
    names = {name.split(".")[2] for name in pictures(tmp_path)}
    assert names == {"1_image_teacher_0", "1_image_student_0"}


def test_what_cannot_work_is_refused_before_the_run(tmp_path, toy_data, monkeypatch):
    def runner(**options: Any) -> Runner:
        cfg = box_config(tmp_path, [hook(**options)], data_root=toy_data)
        return Runner.from_cfg(cfg)

    with pytest.raises(VisConfigError, match="override_loop_pipeline=True"):
        runner(override_loop_pipeline=True)
    with pytest.raises(VisConfigError, match="select='worst' and image_indices"):
        runner(select="worst", image_indices=[0])
    with pytest.raises(VisConfigError, match="priority='LOW' puts ErrorVisHook behind"):
        runner(priority="LOW").test()
    with monkeypatch.context() as patch:
        patch.setattr(errors, "all_gather_object", lambda number: [number, 0])
        with pytest.raises(VisConfigError, match="has none for one of the ranks"):
            runner(select="worst").test()
    plain = runner()
    dataset = plain.test_dataloader.dataset
    get = dataset.get_data_info
    without = lambda i: {k: v for k, v in get(i).items() if k != "instances"}  # noqa: E731
    dataset.get_data_info = without
    with pytest.raises(VisConfigError, match="has no annotated objects"):
        plain.test()
