from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "benchmarks" / "featmap.py"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc and sets Linux limits"
)


@pytest.fixture(scope="module")
def benchmark_module():
    # A script finds the modules beside it.
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("featmap_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(SCRIPT.parent))


def test_both_sides_are_measured_and_compared(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--sizes", "320x256", "--channels", "64"]
    command += ["--reductions", "select_max", "--repeats", "2", "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    completed = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    assert completed.returncode == 0, completed.stderr
    assert "320x256" in completed.stdout
    (record,) = json.loads(figures.read_text())
    assert record["pictures"] == "identical"
    assert record["ours"]["runs"] == 2
    assert record["mmengine"]["runs"] == 1
    assert 0 < record["ours"]["seconds"] < 5
    # Upsampling 64 channels takes 21 MB; ours never holds that much.
    assert record["mmengine"]["peak_bytes"] > 320 * 256 * 64 * 4 * 0.9
    assert record["ours"]["peak_bytes"] < 320 * 256 * 64 * 4 / 2


def test_memory_limit_stops_a_child(benchmark_module, tmp_path):
    job = benchmark_module.Job(
        side=benchmark_module.MMENGINE,
        size_wh=(640, 640),
        channels=256,
        reduction="select_max",
        repeats=1,
        threads=1,
        limit_bytes=200_000_000,
    )
    assert job.upsampled_bytes > 2 * job.limit_bytes
    result = benchmark_module.run_child(job, tmp_path / "picture.npy")
    assert "out of memory" in result.error
    assert not (tmp_path / "picture.npy").exists()


def test_what_does_not_fit_is_not_tried(benchmark_module, tmp_path, monkeypatch):
    job = benchmark_module.Job(
        side=benchmark_module.OURS,
        size_wh=(4000, 3000),
        channels=512,
        reduction="select_max",
        repeats=1,
        threads=1,
        limit_bytes=10**9,
    )
    assert job.map_hw == (94, 125)
    tried = []

    def fake(given, path):
        tried.append(given.side)
        return benchmark_module.Result(0.1, 1, 1000)

    monkeypatch.setattr(benchmark_module, "run_child", fake)
    ours, theirs, _ = benchmark_module.measure_pair(job, tmp_path)
    assert tried == [benchmark_module.OURS]
    assert ours.seconds == 0.1
    # 512 channels of 12 megapixels, 4 bytes each.
    assert theirs.error == "needs 24.58 GB"


def test_compare(benchmark_module, tmp_path):
    first, second = tmp_path / "a.npy", tmp_path / "b.npy"
    picture = np.full((2, 2, 3), 100, np.uint8)
    np.save(first, picture)
    assert benchmark_module.compare(first, second) == "-"
    np.save(second, picture)
    assert benchmark_module.compare(first, second) == "identical"
    picture[0, 0] = 98
    np.save(second, picture)
    assert benchmark_module.compare(first, second) == "within 2"


def test_target_line(benchmark_module):
    job = benchmark_module.Job(
        benchmark_module.OURS, (1920, 1080), 512, "select_max", 1, 1, 1
    )
    ours = benchmark_module.Result(0.01, 1, 30_000_000)
    theirs = benchmark_module.Result(2.0, 1, 4_270_000_000)
    line = benchmark_module.target_line(job, ours, theirs)
    assert line.startswith("1080p/512 select_max: 200x faster, 4.24 GB less")
    assert line.endswith(": reached")
    slow = replace(ours, seconds=0.05)
    assert benchmark_module.target_line(job, slow, theirs).endswith("NOT reached")
    other = replace(job, channels=128)
    assert benchmark_module.target_line(other, ours, theirs) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("1080p", (1920, 1080)), ("640x480", (640, 480))]
)
def test_parse_size(benchmark_module, text, expected):
    assert benchmark_module.parse_size(text) == expected


@pytest.mark.parametrize("text", ["640", "axb", "0x3"])
def test_bad_size(benchmark_module, text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        benchmark_module.parse_size(text)
