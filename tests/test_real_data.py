"""The COCO detector on real images: what it scores and what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from .test_hooks.helpers import pictures

CONFIG = Path(__file__).parents[1] / "configs" / "coco128" / "yolox_nano_coco128.py"


def run(shared_dir: Path, work_dir: Path, **hook_options) -> tuple[dict, Runner]:
    config = Config.fromfile(CONFIG)
    config.update(
        work_dir=str(work_dir),
        load_from=str(shared_dir / "weights" / "yolox_nano_coco.pth"),
        log_level="WARNING",
        experiment_name=str(work_dir),
    )
    # MMEngine keeps one instance per name for the whole process.
    config.visualizer.name = str(work_dir)
    config.test_dataloader.update(num_workers=0, persistent_workers=False)
    if hook_options:
        config.custom_hooks[-1].update(on_error="raise", **hook_options)
    else:
        assert config.custom_hooks.pop().type == "FeatMapVisHook"
    runner = Runner.from_cfg(config)
    return runner.test(), runner


@pytest.mark.real_data
def test_the_metrics_are_those_of_the_detector_with_and_without_hook(
    shared_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    plain, _ = run(shared_dir, tmp_path / "plain")
    assert plain["coco/bbox_mAP"] == pytest.approx(0.343, abs=5e-4)
    assert plain["coco/bbox_mAP_50"] == pytest.approx(0.510, abs=5e-4)
    assert pictures(tmp_path / "plain") == {}

    indices = [0, 1, 2, 40, 127]
    hooked, runner = run(shared_dir, tmp_path / "hooked", image_indices=indices)
    times = {"time", "data_time"}
    assert {k: v for k, v in hooked.items() if k not in times} == {
        k: v for k, v in plain.items() if k not in times
    }
    drawn = pictures(tmp_path / "hooked")
    dataset = runner.test_dataloader.dataset
    names = [Path(dataset.get_data_info(i)["img_path"]).stem for i in indices]
    assert len(drawn) == len(indices)
    for name in names:
        assert sum(name in file for file in drawn) == 1, (name, sorted(drawn))
    for file, picture in drawn.items():
        assert picture.std() > 20, file
