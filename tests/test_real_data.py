"""The COCO detector on real images: what it scores and what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.metrics.pointing_game import energy_inside, pointing_hit

from .test_hooks.helpers import box_spy, pictures, spy, vis_hooks

CONFIG = Path(__file__).parents[1] / "configs" / "coco128" / "yolox_nano_coco128.py"


def run(
    shared_dir: Path, work_dir: Path, *hooks: dict, fp16: bool = False
) -> tuple[dict, Runner]:
    """The metrics of a test with some hooks, without its times."""
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
    assert config.custom_hooks.pop().type == "FeatMapVisHook"
    config.custom_hooks += hooks
    runner = Runner.from_cfg(config)
    metrics = runner.test()
    return {k: v for k, v in metrics.items() if "time" not in k}, runner


@pytest.mark.real_data
def test_hooks_change_no_metric_and_maps_point_at_their_boxes(
    shared_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("MMVIS_SHARED", str(shared_dir))
    metrics, _ = run(shared_dir, tmp_path / "plain")
    assert metrics["coco/bbox_mAP"] == pytest.approx(0.343, abs=5e-4)
    assert metrics["coco/bbox_mAP_50"] == pytest.approx(0.510, abs=5e-4)
    assert pictures(tmp_path / "plain") == {}

    indices = [0, 1, 2, 40, 127]
    maps = spy(image_indices=indices, score_thr=0.3)
    boxes = box_spy(num_images=16, score_thr=0.3, topk=3)
    hooked, runner = run(shared_dir, tmp_path / "hooked", maps, boxes)
    assert hooked == metrics
    drawn = pictures(tmp_path / "hooked")
    assert len(drawn) == len(indices) + 16
    dataset = runner.test_dataloader.dataset
    for index in indices:
        name = Path(dataset.get_data_info(index)["img_path"]).stem
        assert sum("featmap" in file and name in file for file in drawn) == 1
    for file, picture in drawn.items():
        assert picture.std() > 20, file
    hits, energies = [], []
    for sample in vis_hooks(runner)[1].samples:
        for explanation in sample.explanations:
            assert explanation.maps, explanation.warning
            box_xyxy = sample.detections.boxes_xyxy[explanation.index]
            heat = box_saliency(explanation, sample.frame, box_xyxy)
            hits.append(pointing_hit(heat, box_xyxy))
            energies.append(energy_inside(heat, box_xyxy))
    assert len(hits) > 25
    assert np.mean(hits) > 0.95
    assert np.mean(energies) > 0.7
