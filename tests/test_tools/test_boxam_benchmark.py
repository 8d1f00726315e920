from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmarks" / "boxam.py"

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
    command += ["--size", "128", "--parts", "gradients", "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    completed = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    assert completed.returncode == 0, completed.stderr
    assert "plain forward" in completed.stdout
    plain, *records = json.loads(figures.read_text())
    assert plain["ratio"] == 1
    assert [record["goal"] for record in records] == [1.2, 1.5, 2.0]
    assert all(record["ratio"] > 0 for record in records)


def test_both_sides_explain_the_same_boxes(benchmark_module, scene):
    chosen = benchmark_module.mixed_boxes(scene, 6)
    own = benchmark_module.attributor(scene, method="layercam")
    ours = benchmark_module.explain(own, scene, chosen)
    assert [e.index for e in ours] == chosen
    assert len({e.layer for e in ours}) == 3
    theirs = benchmark_module.backward_per_box(scene, chosen)
    assert len(theirs) == 6
    assert all(max(float(m.max()) for m in maps) > 0 for maps in theirs)


def test_ablation_and_masks(benchmark_module, scene):
    one_layer = replace(scene, ablated=("neck.top_down_layers.1",))
    (ablation,) = benchmark_module.measure_ablation("yolov5_s", one_layer, 1)
    assert ablation.goal == 100
    assert ablation.ratio > 0
    (masks,) = benchmark_module.measure_drise("yolov5_s", scene, 1)
    assert masks.ours.endswith("masks/s")
    assert masks.ratio > 0


def test_jobs_take_turns(benchmark_module):
    order = []
    seconds = benchmark_module.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2
    )
    assert order == ["a", "b"] * 3
    assert [len(own) for own in seconds.values()] == [2, 2]
    # The machine was ten times slower in the second round.
    assert benchmark_module.ratio((2.0, 20.0, 2.0), (1.0, 10.0, 1.0)) == 2


@pytest.mark.parametrize(
    ("ratio", "at_most", "verdict"),
    [
        (1.4, True, "<= 1.5: reached"),
        (1.6, True, "<= 1.5: NOT reached"),
        (1.6, False, ">= 1.5: reached"),
        (1.4, False, ">= 1.5: NOT reached"),
    ],
)
def test_verdict(benchmark_module, ratio, at_most, verdict):
    figure = benchmark_module.Figure("d", "j", "", "", ratio, 1.5, at_most)
    assert figure.verdict == verdict
