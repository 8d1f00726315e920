from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmarks" / "boxam.py"
LAYER = "neck.top_down_layers.1"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has"
)


@pytest.fixture(scope="module")
def benchmark_module():
    # A script finds the modules beside it.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("boxam_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def scene(benchmark_module):
    return benchmark_module.yolov5_s(128)


def test_both_sides_are_measured(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--detectors", "yolov5_s", "--quick"]
    command += ["--size", "128", "--parts", "gradients"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    completed = subprocess.run(
        [*command, "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    assert "plain forward" in completed.stdout
    records = {record["job"]: record for record in json.loads(figures.read_text())}
    for level in ("P3", "P4", "P5", "all levels"):
        one, many = (r for job, r in records.items() if job.endswith(f", {level}"))
        assert (one["goal"], many["goal"]) == (1.2, 1.5)
        assert one["ratio"] > 0
        assert "forwards" in many["peers"]


def test_neither_side_does_nothing(benchmark_module, scene):
    chosen = benchmark_module.choices(scene)["all levels"][:2]
    _, ours = benchmark_module.Explainer(scene, method="boxam").explain(chosen)
    theirs = benchmark_module.WholeBackward(scene).explain(chosen)
    assert len(ours) == len(theirs) == 2
    for explanation, maps in zip(ours, theirs):
        assert max(m.saliency.max() for m in explanation.maps) > 0
        assert max(float(np.max(m)) for m in maps) > 0


def test_ablation_and_masks(benchmark_module, scene):
    one_layer = replace(scene, ablated={LAYER: 100.0})
    own, layer, ranking = benchmark_module.measure_ablation("yolov5_s", one_layer, 1)
    assert (own.goal, layer.goal) == (100, 100)
    assert min(own.ratio, layer.ratio) > 0
    assert ranking.ratio > 0.99
    (figure,) = benchmark_module.measure_drise("yolov5_s", scene, 1)
    assert figure.ours.endswith("masks/s")
    assert figure.ratio > 0


def test_peak_of_a_child(benchmark_module):
    args = benchmark_module.parse_args(["--size", "128"])
    peak = benchmark_module.run_child(
        "yolov5_s", "boxam, 20 boxes", benchmark_module.OURS, args
    )
    # At least the map of the first layer: 32 channels of 64x64 float32.
    assert 32 * 64 * 64 * 4 <= peak < 500_000_000


def test_scene_has_boxes_at_every_level(benchmark_module, scene):
    levels = benchmark_module.choices(scene)
    assert list(levels) == ["P3", "P4", "P5", "all levels"]
    assert all(0 < len(found) <= 20 for found in levels.values())
    mapper = benchmark_module.Explainer(scene, method="boxam")
    shapes = []
    for name in ("P3", "P4", "P5"):
        _, explanations = mapper.explain(levels[name])
        assert [e.index for e in explanations] == levels[name]
        shapes.append({m.saliency.shape for e in explanations for m in e.maps})
    assert shapes == [{(16, 16)}, {(8, 8)}, {(4, 4)}]


def test_ranking_is_compared_with_whole_forwards(benchmark_module, scene):
    box = benchmark_module.choices(scene)["P3"][0]
    spy = benchmark_module.AblationSpy()
    with spy.watching():
        explainer = benchmark_module.Explainer(scene, [LAYER], method="ablationcam")
        explainer.explain([box])
    (weights,) = spy.weights
    expected = benchmark_module.weights_at_anchor(scene, LAYER, box)
    assert len(spy.seconds) == 1
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(weights, expected, atol=1e-4)


def test_whole_forwards_find_the_box_again(benchmark_module, scene):
    box = benchmark_module.choices(scene)["P3"][0]
    whole = benchmark_module.WholeForwards(scene, LAYER, box)
    before = whole.activation.clone()
    found = [whole.score_without(channel) for channel in range(4)]
    assert all(0 <= score <= 2 for score in found)
    assert np.array_equal(before.numpy(), whole.activation.numpy())
    # The module computes again as before.
    again = benchmark_module.recorded_output(scene, whole._module)
    np.testing.assert_array_equal(again.numpy(), before.numpy())


def test_others_leave_the_parameters_as_they_were(benchmark_module, scene):
    levels = benchmark_module.choices(scene)
    peers = benchmark_module.WholeBackward(scene)
    found = peers.explain(levels["all levels"][:3])
    assert len(found) == 3
    assert all(maps for maps in found)
    assert all(p.requires_grad for p in scene.detector.parameters())


def test_jobs_take_turns(benchmark_module):
    order = []
    timings = benchmark_module.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2
    )
    assert order == ["a", "b"] * 3
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_ratio_is_taken_within_the_rounds(benchmark_module):
    # The machine was ten times slower in the second round.
    unit = benchmark_module.Timing((1.0, 10.0, 1.0))
    assert benchmark_module.Timing((2.0, 20.0, 2.0)).over(unit) == 2


@pytest.mark.parametrize(
    ("ratio", "at_most", "verdict"),
    [
        (1.4, True, "< 1.5: reached"),
        (1.6, True, "< 1.5: NOT reached"),
        (1.6, False, ">= 1.5: reached"),
        (1.4, False, ">= 1.5: NOT reached"),
    ],
)
def test_verdict(benchmark_module, ratio, at_most, verdict):
    figure = benchmark_module.Figure("d", "j", "", "", ratio, "", 1.5, at_most)
    assert figure.verdict == verdict
