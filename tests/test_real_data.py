"""The COCO detector on real images: what it scores and what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.metrics.pointing_game import energy_inside, pointing_hit

from .test_hooks.helpers import box_spy, pictures, vis_hooks

CONFIG = Path(__file__).parents[1] / "configs" / "coco128" / "yolox_nano_coco128.py"


def run(
    shared_dir: Path,
    work_dir: Path,
    hook: dict | None = None,
    *,
    fp16: bool = False,
    **hook_options,
) -> tuple[dict, Runner]:
    config = Config.fromfile(CONFIG)
    config.update(
        work_dir=str(work_dir),
        load_from=str(shared_dir / "weights" / "yolox_nano_coco.pth"),
        log_level="WARNING",
        experiment_name=str(work_dir),
    )
    # MMEngine keeps one instance per name for the whole process.
    config.visualizer.name = str(work_dir)
    config.test_cfg.update(fp16=fp16)
    config.test_dataloader.update(num_workers=0, persistent_workers=False)
    if hook is not None:
        config.custom_hooks[-1] = hook
    elif hook_options:
        config.custom_hooks[-1].update(on_error="raise", **hook_options)
    else:
        assert config.custom_hooks.pop().type == "FeatMapVisHook"
    runner = Runner.from_cfg(config)
    return runner.test(), runner


@pytest.fixture(scope="module")
def plain(shared_dir, tmp_path_factory):
    """The metrics without a hook, and where the run was."""
    work_dir = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMVIS_SHARED", str(shared_dir))
        return without_times(run(shared_dir, work_dir)[0]), work_dir


def without_times(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if k not in ("time", "data_time")}


@pytest.mark.real_data
def test_the_metrics_are_those_of_the_detector_with_and_without_hook(
    shared_dir, tmp_path, monkeypatch, plain
):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    metrics, work_dir = plain
    assert metrics["coco/bbox_mAP"] == pytest.approx(0.343, abs=5e-4)
    assert metrics["coco/bbox_mAP_50"] == pytest.approx(0.510, abs=5e-4)
    assert pictures(work_dir) == {}

    indices = [0, 1, 2, 40, 127]
    hooked, runner = run(shared_dir, tmp_path / "hooked", image_indices=indices)
    assert without_times(hooked) == metrics
    drawn = pictures(tmp_path / "hooked")
    dataset = runner.test_dataloader.dataset
    names = [Path(dataset.get_data_info(i)["img_path"]).stem for i in indices]
    assert len(drawn) == len(indices)
    for name in names:
        assert sum(name in file for file in drawn) == 1, (name, sorted(drawn))
    for file, picture in drawn.items():
        assert picture.std() > 20, file


@pytest.mark.real_data
def test_explanations_change_no_metric_and_point_at_their_boxes(
    shared_dir, tmp_path, monkeypatch, plain
):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    hook = box_spy(num_images=16, score_thr=0.3, topk=3)
    hooked, runner = run(shared_dir, tmp_path, hook)
    assert without_times(hooked) == plain[0]
    assert len(pictures(tmp_path)) == 16
    hits, energies = [], []
    for sample in vis_hooks(runner)[0].samples:
        for explanation in sample.explanations:
            assert explanation.maps, explanation.warning
            box_xyxy = sample.detections.boxes_xyxy[explanation.index]
            heat = box_saliency(explanation, sample.frame, box_xyxy)
            hits.append(pointing_hit(heat, box_xyxy))
            energies.append(energy_inside(heat, box_xyxy))
    assert len(hits) > 25
    assert np.mean(hits) > 0.95
    assert np.mean(energies) > 0.7
