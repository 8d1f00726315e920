"""Every config builds, and one of each kind draws a real image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.runner import Runner
from sklearn.datasets import load_sample_images

from mmyolo_vis_hooks import BoxAMVisHook, FeatMapVisHook
from mmyolo_vis_hooks.detector import build_detector
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.network.levels import last_maps
from tests.test_hooks.helpers import pictures

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


NAMES = (path.stem for path in (CONFIGS / "examples").glob("*.py"))
EXAMPLES = sorted(n for n in NAMES if n.endswith(("_featmap", "_boxam")))
# One of each kind of detector; the others are built.
DRAWN = ["yolov8_n_featmap", "yolov5_n_boxam"]
DRAWN_AT_NIGHT = ["retinanet_r50_featmap", "fcos_r50_boxam"]
DRAWN_AT_NIGHT += ["mask_rcnn_r50_boxam", "dino_r50_boxam"]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real photo with one box, as COCO has them."""
    root = tmp_path_factory.mktemp("coco")
    flower = load_sample_images().images[1]
    cv2.imwrite(str(root / "flower.jpg"), flower[..., ::-1])
    names = CocoDataset.METAINFO["classes"]
    height, width = flower.shape[:2]
    content = {
        "images": [
            {"id": 1, "file_name": "flower.jpg", "height": height, "width": width}
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": names.index("potted plant"),
                "bbox": [170, 60, 330, 320],
                "segmentation": [[170, 60, 500, 60, 500, 380, 170, 380]],
                "area": 330 * 320,
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    (root / "instances.json").write_text(json.dumps(content))
    return root


def drop_downloads(node: Any) -> None:
    """Take what would be fetched from the network out of a config."""
    if isinstance(node, dict):
        init = node.get("init_cfg")
        if isinstance(init, dict) and "checkpoint" in init:
            node["init_cfg"] = None
        for value in node.values():
            drop_downloads(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            drop_downloads(value)


def localise(config: Config, coco: Path, work_dir: Path) -> Config:
    """Let a config run on the one photo, without workers and downloads."""
    drop_downloads(config.model)
    config.load_from = None
    config.work_dir = str(work_dir)
    # MMEngine keeps one instance per name for the whole process.
    config.experiment_name = config.visualizer.name = str(work_dir)
    config.log_level = "WARNING"
    loader = config.test_dataloader
    loader.update(num_workers=0, persistent_workers=False, batch_size=1)
    loader.dataset.update(
        data_root=str(coco), ann_file="instances.json", data_prefix=dict(img="")
    )
    config.test_evaluator.ann_file = str(coco / "instances.json")
    return config


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_layers_of_an_example_are_in_its_detector(name):
    config = Config.fromfile(CONFIGS / "examples" / f"{name}.py")
    drop_downloads(config.model)
    detector = build_detector(config, "cpu")
    hook = config.custom_hooks[-1]
    if hook.type == "FeatMapVisHook":
        assert "neck" in resolve_layers(detector, hook.target_layers)
    else:
        layer = "encoder" if "detr" in name or "dino" in name else "neck"
        assert last_maps(detector).layer == layer


def shrink(config: Config) -> None:
    """A quarter of the pixels and a few boxes, whatever random weights find."""
    for transform in config.test_dataloader.dataset.pipeline:
        for key, small in (("scale", (320, 320)), ("size", (320, 320))):
            if transform.get(key) == (640, 640):
                transform[key] = small
        if transform.get("scale") == (1333, 800):
            transform.scale = (333, 200)
        if transform.get("width") == 640:
            transform.update(width=320, height=320)
    test_cfg = config.model.get("test_cfg") or {}
    for part in (test_cfg, test_cfg.get("rcnn"), test_cfg.get("rpn")):
        if part is not None:
            part.update(score_thr=0.0, max_per_img=10 if part is test_cfg else 50)
            part.nms_pre = 100
    for name in ("encoder", "decoder"):
        if name in config.model:
            config.model[name].num_layers = 2


@torch.no_grad()
def settle(runner: Runner) -> None:
    """Without it all scores of some are 1, and the logits of others constant."""
    detector = runner.model
    # It would log two lines for each parameter.
    with mock.patch.object(BaseModule, "_dump_init_info"):
        detector.init_weights()
    for name, parameter in detector.named_parameters():
        if "bbox_head" in name:
            parameter += 0.02 * torch.randn_like(parameter)
    norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    detector.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # a plain average
    detector.test_step(next(iter(runner.test_dataloader)))
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum


@pytest.mark.parametrize(
    "name",
    DRAWN + [pytest.param(n, marks=pytest.mark.nightly) for n in DRAWN_AT_NIGHT],
)
def test_an_example_draws(name, coco, tmp_path):
    config = Config.fromfile(CONFIGS / "examples" / f"{name}.py")
    shrink(localise(config, coco, tmp_path))
    config.custom_hooks[-1].update(on_error="raise", score_thr=0.0)
    torch.manual_seed(0)
    runner = Runner.from_cfg(config)
    settle(runner)
    runner.test()
    assert len(pictures(tmp_path)) == 1


WITHOUT_HOOK = CONFIGS / "examples" / "yolox_nano_coco.py"
WITH_HOOKS = sorted({*CONFIGS.rglob("*.py")} - {WITHOUT_HOOK})


@pytest.mark.parametrize("path", WITH_HOOKS, ids=lambda p: p.stem)
def test_the_hook_is_built_with_the_options_of_the_config(path):
    config = Config.fromfile(path)
    (kind,) = {"featmap_vis_hook", "boxam_vis_hook"} & set(config)
    options = dict(config[kind])
    hook = {"FeatMapVisHook": FeatMapVisHook, "BoxAMVisHook": BoxAMVisHook}[
        options.pop("type")
    ]
    assert hook(**options).run_options.on_error == "log"
    if path.parent.name == "examples":
        assert config.custom_imports.imports == ["mmyolo_vis_hooks"]
        assert config.custom_hooks[-1].type == hook.__name__
    if path.stem == "yolov8_n_featmap":  # beside the hooks of the detector
        kinds = [own.type for own in config.custom_hooks]
        assert kinds == ["EMAHook", "mmdet.PipelineSwitchHook", "FeatMapVisHook"]
    # MMEngine would hand the mark of an inherited config on to the function.
    if "train_dataloader" in config and "collate_fn" in config.train_dataloader:
        assert "_scope_" not in config.train_dataloader.collate_fn


def test_the_folder_of_real_images_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / "coco128" / "yolox_nano_coco128.py"
    monkeypatch.delenv("MMVIS_SHARED", raising=False)
    beside = CONFIGS.parent.parent / "shared" / "data" / "coco128"
    assert Path(Config.fromfile(path).val_dataloader.dataset.data_root) == beside
    monkeypatch.setenv("MMVIS_SHARED", "/a place/shared")
    config = Config.fromfile(path)
    assert config.test_dataloader.dataset.data_root == "/a place/shared/data/coco128/"
    assert config.test_evaluator.ann_file == (
        "/a place/shared/data/coco128/annotations/instances_train2017.json"
    )
