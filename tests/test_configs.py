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
from mmyolo_vis_hooks.attribution.saliency import box_saliency
from mmyolo_vis_hooks.detector import build_detector
from mmyolo_vis_hooks.network.layer_path import resolve_layers
from mmyolo_vis_hooks.network.levels import last_maps

from .test_hooks.helpers import pictures, vis_hooks

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXAMPLES = sorted(path.stem for path in (CONFIGS / "examples").glob("*_featmap.py"))
BOX_EXAMPLES = sorted(path.stem for path in (CONFIGS / "examples").glob("*_boxam.py"))
# One of each kind of detector; the others are built.
DRAWN = ("yolov8_n_featmap", "retinanet_r50_featmap")
BOX_DRAWN = (
    "yolov5_n_boxam",
    "fcos_r50_boxam",
    "mask_rcnn_r50_boxam",
    "dino_r50_boxam",
)
# What the panel of each example shows after the image.
LAYERS = {
    "yolov5_n": ["backbone[0]", "backbone[1]", "backbone[2]", 3],
    "yolov6_n": ["backbone.stage3", 3],
    "yolov7_tiny": ["backbone.stage4", 3],
    "yolov8_n": ["backbone[0]", "backbone[1]", "backbone[2]", 3],
    "yolox_tiny": ["backbone.stage4", 3],
    "rtmdet_tiny": ["backbone.stage4", 3],
    "ppyoloe_plus_s": ["backbone.stage4", 3],
    "retinanet_r50": ["backbone.layer4", 5],
    "faster_rcnn_r50": ["backbone.layer4", 5],
}


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
    # Half the size of MMDetection's images, and not 20,000 boxes of random weights
    # for the NMS.
    for transform in loader.dataset.pipeline:
        if transform.get("scale") == (1333, 800):
            transform.scale = (667, 400)
    if "nms_pre" in config.model.get("test_cfg", {}):
        config.model.test_cfg.nms_pre = 500
    return config


def detector_of(config: Config) -> Any:
    drop_downloads(config.model)
    return build_detector(config, "cpu")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_layers_of_an_example_are_in_its_detector(name):
    config = Config.fromfile(CONFIGS / "examples" / f"{name}.py")
    wanted = config.custom_hooks[-1].target_layers
    layers = resolve_layers(detector_of(config), wanted)
    *titles, _ = LAYERS[name.removesuffix("_featmap")]
    backbone = dict.fromkeys(title.split("[")[0] for title in titles)
    assert list(layers) == [*backbone, "neck"]


@pytest.mark.parametrize("name", BOX_EXAMPLES)
def test_where_a_box_example_makes_its_boxes(name):
    detector = detector_of(Config.fromfile(CONFIGS / "examples" / f"{name}.py"))
    layer = "encoder" if "detr" in name or "dino" in name else "neck"
    assert last_maps(detector).layer == layer


@pytest.mark.parametrize("name", DRAWN)
def test_the_example_draws(name, coco, tmp_path):
    config = Config.fromfile(CONFIGS / "examples" / f"{name}.py")
    hook = config.custom_hooks[-1]
    hook.update(type="SpyHook", on_error="raise")
    torch.manual_seed(0)
    runner = Runner.from_cfg(localise(config, coco, tmp_path / "run"))
    runner.test()

    *layers, num_neck_maps = LAYERS[name[: -len("_featmap")]]
    layers += [f"neck[{i}]" for i in range(num_neck_maps)]
    (spy,) = vis_hooks(runner)
    (sample,) = spy.samples
    assert [activation.title for activation in sample.activations] == layers
    for activation in sample.activations:
        mean = activation.feature_map.mean(dim=0)
        assert bool(torch.isfinite(mean).all()), activation.title
        assert float(mean.std()) > 1e-6 * float(mean.abs().max()), activation.title
    (picture,) = pictures(tmp_path / "run").values()
    assert picture.std() > 20


def shrink(config: Config) -> None:
    """A quarter of the pixels and a few boxes, whatever random weights find."""
    for transform in config.test_dataloader.dataset.pipeline:
        for key, small in (("scale", (320, 320)), ("size", (320, 320))):
            if transform.get(key) == (640, 640):
                transform[key] = small
        if transform.get("scale") == (667, 400):
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


@pytest.mark.parametrize("name", BOX_DRAWN)
def test_the_box_example_draws(name, coco, tmp_path):
    config = Config.fromfile(CONFIGS / "examples" / f"{name}.py")
    hook = config.custom_hooks[-1]
    hook.update(type="BoxSpyHook", on_error="raise", score_thr=0.0, topk=3)
    config = localise(config, coco, tmp_path / "run")
    shrink(config)
    torch.manual_seed(0)
    runner = Runner.from_cfg(config)
    settle(runner)
    runner.test()

    (spy,) = vis_hooks(runner)
    (sample,) = spy.samples
    assert len(sample.explanations) == 3
    shown = [e for e in sample.explanations if e.maps]
    assert shown, [e.warning for e in sample.explanations]
    assert all(e.maps or e.warning for e in sample.explanations)
    for explanation in shown:
        assert len(explanation.maps) == 1
        heat = box_saliency(
            explanation, sample.frame, sample.detections.boxes_xyxy[explanation.index]
        )
        assert heat.shape == sample.image_rgb.shape[:2]
        assert heat.max() == 1
        assert heat.min() < 0.5
    (picture,) = pictures(tmp_path / "run").values()
    assert picture.std() > 20


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
