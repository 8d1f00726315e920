"""Detectors, weights and test pipelines of configs, right and wrong ones."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import TRANSFORMS
from torch import nn

from mmyolo_vis_hooks.checkpoint import CheckpointError
from mmyolo_vis_hooks.detector import (
    DatasetInfo,
    build_detector,
    build_pipeline,
    check_device,
    classes_and_palette,
    load_weights,
    read_config,
    read_dataset,
)
from mmyolo_vis_hooks.errors import UnsupportedPipelineError, VisConfigError
from tests.toy import META_KEYS, ToyDetector, make_pipeline

YOLOV8 = "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"
FASTER = (dict(type="Resize", scale=(128, 96), keep_ratio=True),)
PACK = dict(type="PackDetInputs", meta_keys=META_KEYS)
PREPROCESSOR = dict(
    type="mmdet.DetDataPreprocessor",
    mean=[0.0, 0.0, 0.0],
    std=[255.0, 255.0, 255.0],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)


def toy() -> ToyDetector:
    torch.manual_seed(0)
    return ToyDetector(PREPROCESSOR).eval()


def config_of(dataset: Any) -> Config:
    return Config(dict(test_dataloader=dict(dataset=dataset), default_scope="mmdet"))


# ------------------------------------------------------------------------ read_dataset

LEAF = dict(
    type="CocoDataset",
    pipeline=[dict(type="LoadImageFromFile")],
    metainfo=dict(classes=("square",), palette=[(1, 2, 3)]),
    batch_shapes_cfg=dict(type="BatchShapePolicy", size_divisor=64),
    # Nobody reads the files of the data set.
    data_root="nowhere/",
    ann_file="missing.json",
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(test_dataloader=None, val_dataloader=None, test_pipeline=None),
        dict(test_dataloader=dict(dataset=dict(type="CocoDataset", pipeline=[]))),
        dict(test_dataloader=dict(dataset=dict(type="ConcatDataset", datasets=[]))),
        dict(train_pipeline=make_pipeline(FASTER), tta_pipeline=make_pipeline(FASTER)),
    ],
)
def test_a_config_without_test_pipeline(config):
    with pytest.raises(VisConfigError, match=r"no test pipeline.*add test_dataloader"):
        read_dataset(Config(config))


@pytest.mark.parametrize(
    ("test_loader", "val_loader", "found"),
    [("test", "val", "test"), (None, "val", "val"), ([], "val", "val"), (None,) * 3],
)
def test_where_the_pipeline_comes_from(test_loader, val_loader, found):
    def loader(name):
        dataset = dict(type="CocoDataset", pipeline=[dict(type=name)])
        return dict(dataset=dataset) if isinstance(name, str) else name

    config = dict(
        test_dataloader=loader(test_loader),
        val_dataloader=loader(val_loader),
        train_dataloader=loader("train"),
        test_pipeline=[dict(type=None)],
        tta_pipeline=[dict(type="augmented")],
    )
    assert read_dataset(Config(config)).pipeline[0]["type"] == found


@pytest.mark.parametrize(
    "dataset",
    [
        LEAF,
        dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=[LEAF])),
        dict(type="ConcatDataset", datasets=[LEAF, dict(type="Other")]),
    ],
)
def test_wrapped_datasets(dataset):
    info = read_dataset(config_of(dataset))
    assert info.pipeline == LEAF["pipeline"]
    assert info.metainfo["classes"] == ("square",)
    assert info.metainfo["palette"] == [(1, 2, 3)]
    assert info.batch_shapes_cfg["size_divisor"] == 64


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("CocoDataset", 80), ("mmdet.CocoDataset", 80), (CocoDataset, 80), ("Other", 0)],
)
@pytest.mark.parametrize("others", [dict(default_scope="mmdet"), {}])
def test_the_class_of_the_dataset_names_the_classes(kind, classes, others):
    dataset = dict(LEAF, type=kind, metainfo=None)
    config = Config(dict(test_dataloader=dict(dataset=dataset), **others))
    for key in ("classes", "palette"):
        assert len(read_dataset(config).metainfo.get(key, ())) == classes
    config.test_dataloader.dataset.metainfo = dict(classes=("a", "b"))
    assert read_dataset(config).metainfo["classes"] == ("a", "b")
    assert CocoDataset.METAINFO["classes"][0] == "person"


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        (YOLOV8, 80),
        ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", 80),
        ("mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py", 20),
    ],
)
def test_real_configs_name_their_classes(name, num_classes):
    assert len(read_dataset(read_config(name)).metainfo["classes"]) == num_classes


@pytest.mark.parametrize(
    ("metainfos", "expected"),
    [
        ([{}, {}], ((), None)),
        ([{}, dict(CLASSES=["a", "b"])], (("a", "b"), None)),
        (
            [dict(classes=("of", "weights")), LEAF["metainfo"]],
            (("of", "weights"), None),
        ),
        ([dict(palette=[(1, 2, 3)]), dict(classes="one")], (("one",), None)),
        ([LEAF["metainfo"]], (("square",), [(1, 2, 3)])),
    ],
)
def test_the_first_that_names_classes_counts(metainfos, expected):
    assert classes_and_palette(*metainfos) == expected


# ---------------------------------------------------------------------- build_pipeline


class Swirl(BaseTransform):
    """Moves pixels in a way that nobody has described."""

    def transform(self, results: dict) -> dict:
        results["img"] = np.ascontiguousarray(np.roll(results["img"], 7, axis=1))
        return results


class SeesDtype(BaseTransform):
    def transform(self, results: dict) -> dict:
        results["img_path"] = str(results["img"].dtype)
        return results


class LoadPoints(BaseTransform):
    """A loader of annotations that insists on its file."""

    def transform(self, results: dict) -> dict:
        raise FileNotFoundError(results["points_path"])


@pytest.fixture(autouse=True, scope="module")
def registered():
    steps = {f"Toy{step.__name__}": step for step in (Swirl, SeesDtype)}
    steps["LoadToyPoints"] = LoadPoints
    for name, step in steps.items():
        TRANSFORMS.register_module(name=name, module=step)
    yield
    for name in steps:
        del TRANSFORMS.module_dict[name]


def run(steps: list[dict], alignment: str, image: Any = None) -> dict:
    config = config_of(dict(type="CocoDataset", pipeline=steps))
    pipeline = build_pipeline(config, read_dataset(config), toy(), alignment)
    if image is None:
        image = np.full((70, 131, 3), 90, np.uint8)
    return pipeline(dict(img=image, img_id=3, img_path="a.png", instances=[]))


@pytest.mark.parametrize("alignment", ["resize", "letterbox", "network"])
@pytest.mark.parametrize(
    "steps",
    [
        [],
        [dict(type="Resize", scale=(128, 96), keep_ratio=True), PACK],
        [dict(type="LoadAnnotations", with_bbox=True), PACK],
    ],
)
def test_a_pipeline_that_loads_no_image(steps, alignment):
    config = config_of(dict(type="CocoDataset", pipeline=[PACK]))
    info = DatasetInfo({}, steps, None)
    with pytest.raises(VisConfigError, match="no step that loads an image") as caught:
        build_pipeline(config, info, toy(), alignment)
    for step in steps:
        assert step["type"] in str(caught.value)


@pytest.mark.parametrize(
    ("alignment", "size_hw"),
    [("resize", (64, 128)), ("letterbox", (68, 128)), ("network", (68, 128))],
)
def test_the_image_takes_the_place_of_the_file(alignment, size_hw):
    data = run(make_pipeline(FASTER), alignment)
    assert tuple(data["inputs"].shape) == (3, *size_hw)
    assert (data["inputs"] == 90).all()
    sample = data["data_samples"]
    assert sample.ori_shape == (70, 131)
    assert sample.img_id == 3
    assert "gt_instances" not in sample or len(sample.gt_instances) == 0


@pytest.mark.parametrize("alignment", ["resize", "letterbox", "network"])
def test_loaders_of_annotations_are_left_out(alignment):
    steps = make_pipeline(FASTER)
    steps[1:1] = [
        dict(type="LoadToyPoints"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True, with_seg=True),
        dict(type="LoadEmptyAnnotations", with_bbox=True),
    ]
    assert run(steps, alignment)["inputs"].shape[0] == 3


@pytest.mark.parametrize("alignment", ["resize", "network"])
@pytest.mark.parametrize(("to_float32", "dtype"), [(True, "float32"), (False, "uint8")])
def test_the_type_of_the_pixels_is_kept(alignment, to_float32, dtype):
    steps = [
        dict(type="LoadImageFromFile", to_float32=to_float32),
        dict(type="ToySeesDtype"),
        *FASTER,
        PACK,
    ]
    assert run(steps, alignment)["data_samples"].img_path == dtype


def test_a_step_that_moves_pixels_in_an_unknown_way():
    steps = make_pipeline(FASTER)
    steps.insert(2, dict(type="ToySwirl"))
    with pytest.raises(UnsupportedPipelineError, match=r"'Swirl'.*alignment='network'"):
        run(steps, "resize")
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, :10] = 255
    data = run(steps, "network", image)
    assert (data["inputs"][:, :, 7:17] == 255).all()
    assert (data["inputs"][:, :, :7] == 0).all()


def test_of_test_time_augmentation_the_first_view_is_taken():
    flips = [dict(type="RandomFlip", prob=p) for p in (0.0, 1.0)]
    steps = [
        dict(type="LoadImageFromFile"),
        dict(type="TestTimeAug", transforms=[list(FASTER), flips, [PACK]]),
    ]
    for alignment in ("resize", "letterbox"):
        data = run(steps, alignment)
        assert not data["data_samples"].metainfo.get("flip")
        assert data["inputs"].shape[0] == 3


def test_the_stride_of_large_networks_counts():
    config = get_config("mmyolo::yolov5/yolov5_s-p6-v62_syncbn_fast_8xb16-300e_coco.py")
    info = read_dataset(config)
    pipeline = build_pipeline(config, info, toy(), "resize")
    data = pipeline(dict(img=np.zeros((480, 640, 3), np.uint8), img_id=0, img_path="a"))
    assert tuple(data["inputs"].shape[1:]) == (960, 1280)
    data = pipeline(dict(img=np.zeros((427, 640, 3), np.uint8), img_id=0, img_path="a"))
    assert all(n % 64 == 0 for n in data["inputs"].shape[1:])


# ------------------------------------------- read_config, check_device, build_detector


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.py", "there is no config file gone.py"),
        ("nobody::gone.py", "cannot be read"),
        ("mmyolo::gone.py", "cannot be read"),
        ("broken.py", "broken.py cannot be read"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("a = = 1\n")
    with pytest.raises(VisConfigError, match=message):
        read_config(name)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "gpu", "'gpu' is no device; use 'cpu'"),
        (0, "", "'' is no device"),
        (0, "cuda:7", "'cuda:7'.*this machine has no CUDA device; use 'cpu'"),
        (2, "cuda:2", "this machine has cuda:0, cuda:1; use one of them"),
        (2, "cuda", ""),
        (2, "cuda:1", ""),
    ],
)
def test_a_device_must_be_there(monkeypatch, count, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if not message:
        assert check_device(device) == torch.device(device)
        return
    with pytest.raises(VisConfigError, match=message):
        check_device(device)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "no model=dict"),
        ("yolov8", "no model=dict"),
        (dict(type="NobodyKnowsIt"), "'NobodyKnowsIt' cannot be built"),
    ],
)
def test_configs_without_a_model(model, message):
    with pytest.raises(VisConfigError, match=message):
        build_detector(Config(dict(model=model)), "cpu")


def test_a_detector_of_mmyolo_on_the_cpu():
    detector = build_detector(YOLOV8, "cpu")
    assert type(detector).__name__ == "YOLODetector"
    assert not detector.training
    kinds = {type(module).__name__ for module in detector.modules()}
    assert not any("SyncBatchNorm" in kind for kind in kinds)


# ------------------------------------------------------------------------ load_weights


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return ToyDetector(PREPROCESSOR).state_dict()


def same(detector: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    own = detector.state_dict()
    return all(torch.equal(own[key], weights[key]) for key in own)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged about checkpoints."""
    found: list[str] = []
    monkeypatch.setattr(
        "mmyolo_vis_hooks.checkpoint.print_log", lambda text, **_: found.append(text)
    )
    return found


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_that_fit(tmp_path, said, prefix, wrapped):
    weights = other_weights()
    # Older checkpoints have no counters, and the mean of the preprocessor.
    content: Any = {
        prefix + key: value for key, value in weights.items() if "num_b" not in key
    }
    content["data_preprocessor.mean"] = torch.zeros(3)
    metainfo = dict(classes=("square",), palette=[(1, 2, 3)])
    if wrapped:
        content = dict(state_dict=content, meta=dict(dataset_meta=metainfo))
    detector = toy()
    assert not same(detector, weights)
    found = load_weights(detector, save(tmp_path / "a.pth", content))
    assert same(detector, weights)
    assert found == (metainfo if wrapped else {})
    assert said == []
    assert not detector.training


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        (None, {}),
        (dict(dataset_meta=None), {}),
        (dict(dataset_meta=dict(CLASSES=("a",))), dict(classes=("a",))),
        (dict(CLASSES=("a", "b")), dict(classes=("a", "b"), palette=None)),
        (
            dict(CLASSES=("old",), dataset_meta=dict(classes=("new",))),
            dict(classes=("new",)),
        ),
    ],
)
def test_classes_that_weights_name(tmp_path, meta, expected):
    content = dict(state_dict=other_weights(), meta=meta)
    assert load_weights(toy(), save(tmp_path / "a.pth", content)) == expected


def test_weights_that_fit_in_part_are_counted(tmp_path, said):
    weights = other_weights()
    kept = {k.replace("neck.shared", "fpn"): v for k, v in weights.items()}
    kept["head.weight"] = torch.zeros(3, 8, 1, 1)
    del kept["backbone.1.running_var"]
    detector = toy()
    path = save(tmp_path / "a.pth", dict(state_dict=kept))
    load_weights(detector, path)
    assert said == [
        f"{path}: 14 of 18 weights fit; missing backbone.1.running_var, "
        "neck.shared.weight, neck.shared.bias; shapes head.weight (3, 8, 1, 1) "
        "instead of (1, 8, 1, 1); unknown fpn.weight, fpn.bias"
    ]
    own = detector.state_dict()
    assert torch.equal(own["head.bias"], weights["head.bias"])
    assert torch.equal(own["head.weight"], toy().state_dict()["head.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({f"a.{k}": v for k, v in other_weights().items()}, "0 of 18 weights fit"),
        (dict(state_dict=[torch.zeros(3)]), "holds no weights"),
        (dict(state_dict=None), "holds no weights"),
        (dict(state_dict={}), "holds no weights"),
        (torch.zeros(3), "holds no weights"),
        ("text", "holds no weights"),
    ],
)
def test_what_holds_no_weights_of_the_detector(tmp_path, content, message):
    detector = toy()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"a\.pth .*{message}"):
        load_weights(detector, save(tmp_path / "a.pth", content))
    assert same(detector, before)


class Versioned(nn.Module):
    """Renames its weights unless they are of its version, as heads of MMDetection."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict, prefix, metadata, *others):
        for key in [k for k in state_dict if k.startswith(f"{prefix}old.")]:
            if metadata.get("version") is None:
                state_dict[key.replace("old.", "cls.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("versioned", [True, False])
def test_modules_are_told_the_version_of_their_weights(
    tmp_path, said, prefix, versioned
):
    saved: nn.Module = Versioned()
    weights = saved.state_dict()
    content: Any = OrderedDict((f"{prefix}old.{k[4:]}", v) for k, v in weights.items())
    if versioned:
        saved = nn.ModuleDict(dict(module=saved)) if prefix else saved
        content = saved.state_dict()
    detector = Versioned()
    load_weights(detector, save(tmp_path / "a.pth", dict(state_dict=content)))
    assert same(detector, weights)
    assert said == []
