"""``eval_boxam.py`` on a data set of one photo."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS

import eval_boxam
from _common import ToolError
from _evaluation import Evaluation, read_method
from _peers import PEERS, mmyolo_demo
from _quality_report import Case, main_value
from mmyolo_vis_hooks import load
from mmyolo_vis_hooks.detector import read_config
from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.metrics.metric import METRICS
from mmyolo_vis_hooks.options import BoxAMOptions
from tests.toy_boxes import box_config

CALL = ("--methods", "boxam", "--num-pictures", 1, "--num-detections", 3)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, toy_data) -> tuple[Path, Path]:
    """Config and weights of the toy; every other square has an outline."""
    folder = tmp_path_factory.mktemp("scene")
    content = json.loads((toy_data / "annotations.json").read_text())
    for own in content["annotations"][::2]:
        x, y, width, height = own["bbox"]
        right, bottom = x + width, y + height
        own["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
    (folder / "objects.json").write_text(json.dumps(content))
    cfg = box_config(folder, [], data_root=toy_data)
    cfg.val_dataloader.dataset.ann_file = str(folder / "objects.json")
    cfg.custom_imports = dict(
        imports=["mmyolo.datasets", "tests.toy_boxes"], allow_failed_imports=False
    )
    cfg.dump(folder / "toy.py")
    torch.manual_seed(0)
    torch.save(MODELS.build(cfg.model).state_dict(), folder / "toy.pth")
    return folder / "toy.py", folder / "toy.pth"


@pytest.fixture
def words(scene, tmp_path) -> list[Any]:
    return [*scene, "--device", "cpu", "--out-dir", tmp_path / "maps"]


def evaluated(scene: tuple[Path, Path], *methods: str, **options: Any) -> Evaluation:
    config, weights = scene
    options = dict(split="val", device="cpu", score_thr=0.3, per_image=1) | options
    return Evaluation(read_config(str(config)), str(weights), list(methods), **options)


def test_tables_curves_and_cases(run, words, tmp_path, capsys):
    call = [*words, *CALL, "--metrics", "energy", "inside"]
    assert run(eval_boxam, *call) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "maps"
    for name in ("Gaussian", "uniform box", "random", "true outline", "boxam"):
        assert name in printed
    assert "(of " in printed  # not all have an outline
    table = json.loads((out / "table.json").read_text())
    values = {(v["map"], v["value"]): v for v in table["values"] if v["size"] == "all"}
    count = values["boxam", "inside"]["count"]
    assert count >= 2
    # Of those whose outline is known, which here is the true box; it went through the
    # pipeline on another way.
    assert 0 < values["boxam", "energy_mask"]["count"] < count
    assert values["true outline", "energy_mask"]["mean"] == 1
    assert values["true outline", "energy_box"]["mean"] > 0.98
    inside = values["boxam", "inside"]
    assert inside["difference"] == pytest.approx(
        inside["mean"] - values["Gaussian", "inside"]["mean"], abs=1e-4
    )
    # A forward with a graph; the median leaves out what the first image took.
    assert table["costs"]["boxam"]["forwards"] == 1
    assert table["costs"]["boxam"]["ms"] > 0
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert len(rows) == len(table["values"])
    assert "| boxam |" in (out / "table.md").read_text()
    pictures = sorted(p.name for p in out.iterdir() if p.suffix in (".png", ".jpg"))
    assert [p.split("_")[0] for p in pictures] == [
        "best",
        "budget.png",
        "curves.png",
        "worst",
    ]
    for name in pictures:
        assert cv2.imread(str(out / name)).std() > 5

    # Nothing is measured again, and the last line may have been cut off.
    kept = out / "images.jsonl"
    before = kept.read_text()
    kept.write_text(before + '["cut off", [{"size"')
    assert run(eval_boxam, *call, "--against", "boxam", "--sanity") == 0
    assert kept.read_text() == before
    printed = capsys.readouterr().out
    assert "minus boxam" in printed
    assert "all random" in printed
    line = (out / "sanity.md").read_text().splitlines()[-1].split("|")
    assert line[1].strip() == "boxam"
    assert -1 <= float(line[2]) <= 1
    assert run(eval_boxam, *words, *CALL, "--metrics", "energy") == 2
    assert "other weights, settings" in capsys.readouterr().err


OWN = """
from mmyolo_vis_hooks.metrics.metric import register_metric

@register_metric('peak', summary='the greatest value')
def peak(saliency, subject):
    return {'peak': saliency.max()}
"""


def test_a_metric_that_the_config_registers(run, words, tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(OWN)
    config, *others = words
    imports = ["mmyolo.datasets", "tests.toy_boxes", "own_metrics"]
    own = tmp_path / "own.py"
    own.write_text(
        f"_base_ = {str(config)!r}\ncustom_imports = dict(imports={imports})"
    )
    monkeypatch.syspath_prepend(tmp_path)
    call = ("--methods", "boxam", "--metrics", "peak", "--num-pictures", 0)
    with mock.patch.dict(METRICS):
        assert run(eval_boxam, own, *others, *call, "--num-detections", 1) == 0
    table = json.loads((tmp_path / "maps" / "table.json").read_text())
    found = {(v["map"], v["value"]): v["mean"] for v in table["values"]}
    assert found["boxam", "peak"] == 1


def test_halves_have_no_image_in_common(run, words, tmp_path):
    def images(*call: Any) -> set[str]:
        out = tmp_path / "-".join(map(str, call))
        call = (*words, "--metrics", "energy", "--methods", "boxam", *call)
        assert run(eval_boxam, *call, "--out-dir", out, "--num-pictures", 0) == 0
        lines = (out / "images.jsonl").read_text().splitlines()[1:]
        return {json.loads(line)[0] for line in lines}

    even, odd = images("--half", "even"), images("--half", "odd")
    assert len(even) == len(odd) == 3
    assert not even & odd
    assert len(images("--num-detections", 1)) < 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--num-detections", 0), "--num-detections 0"),
        (("--per-image", 0), "--per-image 0"),
        (("--num-pictures", -1), "--num-pictures -1"),
        (("--score-thr", 2), "--score-thr 2.0"),
        (("--against", "gaussian"), "--against gaussian: use one of boxam"),
        (("--methods", "boxam:stps=4"), "'stps=4' is no option"),
        (("--methods", "boxcam"), "did you mean 'boxam'"),
        (("--metrics", "energi"), "did you mean 'energy'"),
        (("--score-thr", 1), "no detection hits an object"),
    ],
)
def test_what_cannot_work_is_refused(mistake, words, wrong, message):
    alone = wrong != ("--score-thr", 1)
    assert message in mistake(eval_boxam, *words, *wrong, alone=alone)


def test_methods_have_options():
    options = dict(num_masks=30, smooth=0.5, target="score")
    written = "drise:num_masks=30,smooth=0.5,target=score"
    assert read_method(written) == ("drise", options)
    assert read_method("search:cells=4,at_once=2")[1] == dict(cells=4, at_once=2)
    for wrong in ("search:layers=2", "ultralytics:topk=1", "boxam:method=odam"):
        with pytest.raises(ToolError, match="is no option of"):
            read_method(wrong)
    for wrong in ("search:at_once=0", "search:cells=a", "ridge:num_masks=2.5"):
        with pytest.raises(VisConfigError, match="use a whole number from"):
            read_method(wrong)


def test_forwards_of_replays_and_of_the_search_are_counted(scene):
    methods = ["drise:num_masks=20", "search", "ridge:num_masks=16"]
    evaluation = evaluated(scene, *methods)
    for name in list(evaluation.images)[:2]:  # in the first, replays are tried
        picture, explained = evaluation.explain(name)
    assert picture.shape == (128, 128, 3)
    (own,) = explained
    assert own.title.startswith("square 0.")
    assert own.costs["drise:num_masks=20"]["forwards"] == 22  # with a graph, a trace
    assert own.costs["search"]["forwards"] == 462
    assert len(np.unique(own.maps["search"])) == 37
    assert own.costs["ridge:num_masks=16"]["forwards"] == 16
    rows = eval_boxam.check_sanity(evaluation, [], methods).rows
    assert rows == [[method, "", "", "no check"] for method in methods]


def test_detections_are_scored_at_their_own_anchors(scene):
    evaluation = evaluated(scene, "boxam", score="own")
    look, (index,) = evaluation.find(next(iter(evaluation.images)))
    _, (own,) = evaluation.explain(next(iter(evaluation.images)))
    shown = np.ones((2, *look.inputs.shape[-2:]), bool)
    shown[1, :, : int(own.subject.box_xyxy[[0, 2]].mean())] = False
    kept = torch.where(torch.from_numpy(shown[:, None]), look.inputs, 0)
    black = evaluation.detector.data_preprocessor
    kept = kept - ~torch.from_numpy(shown[:, None]) * (black.mean / black.std)
    with torch.no_grad():
        levels = evaluation.detector(kept, mode="tensor")
    whole, half = torch.cat([level.flatten(1) for level in levels], 1).sigmoid()
    place = (whole - look.predictions.scores[index]).abs().argmin()
    expected = [1.0, float(half[place] / whole[place])]
    assert own.subject.score(shown, "black") == pytest.approx(expected, rel=1e-4)
    assert expected[1] < 0.9


def test_detections_are_scored_by_their_class_vectors(scene):
    evaluation = evaluated(scene, "boxam", score="cosine")
    _, (own,) = evaluation.explain(next(iter(evaluation.images)))
    x1, y1, x2, y2 = own.subject.box_xyxy.astype(int)
    shown = np.ones((3, 128, 128), bool)
    shown[1, y1:y2, x1:x2] = False
    shown[2, y1:y2, (x1 + x2) // 2 : x2] = False
    whole, gone, half = own.subject.score(shown, "black")
    assert whole == pytest.approx(1)
    assert gone == 0
    # Of one class: what is left of it is the overlap, whatever it scores.
    assert 0.3 < half < 1


def test_boxes_that_are_too_small_have_no_main_value():
    case = Case("a", 0, 2.0, {"boxam": {"ms": 1.0, "forwards": 1}})
    assert main_value([case], ["inside"]) is None


def test_the_demo_of_mmyolo_is_for_its_detectors_alone(mistake, words):
    said = mistake(eval_boxam, *words, "--methods", "mmyolo_demo", alone=False)
    assert "MMYOLO's detectors only" in said


def test_the_demo_of_mmyolo_has_a_loss_for_each_box():
    root = Path(__file__).resolve().parents[2]
    weights = root / "docs" / "weights" / "yolox_nano_coco.pth"
    config = root / "configs" / "examples" / "yolox_nano_coco.py"
    detector = load(config, weights, device="cpu")
    inputs = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    metainfo = dict(batch_input_shape=(96, 128), img_shape=(96, 128))
    before = copy.deepcopy(detector.state_dict())
    boxes = np.array([[10.0, 10, 60, 80], [70.0, 20, 120, 60]])
    one, other = (mmyolo_demo(detector, inputs, metainfo, box, 3) for box in boxes)
    assert one.shape == other.shape == (96, 128)
    assert one.min() >= 0
    assert one.max() > 0
    assert not np.array_equal(one, other)
    assert not detector.training
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(own.grad is None for own in detector.parameters())


def test_peers_are_options_of_explain():
    options = BoxAMOptions(**PEERS["ultralytics"])
    assert (options.method, options.target, options.fusion) == (
        "layercam", "logit", "max",
    )  # fmt: skip
