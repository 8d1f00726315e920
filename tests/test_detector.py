"""Detectors, weights and test pipelines of configs, right and wrong ones."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from torch import nn

from mmyolo_vis_hooks.checkpoint import CheckpointError
from mmyolo_vis_hooks.data.resize import network_stride
from mmyolo_vis_hooks.detector import (
    build_detector,
    build_pipeline,
    check_device,
    classes_and_palette,
    default_scope,
    load_weights,
    read_config,
    read_dataset,
)
from mmyolo_vis_hooks.errors import VisConfigError
from tests.toy import META_KEYS, ToyDetector, make_pipeline

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


@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(test_dataloader=None, val_dataloader=None, test_pipeline=None),
        dict(test_dataloader=dict(batch_size=1)),
        dict(test_dataloader=dict(dataset=dict(type="CocoDataset"))),
        dict(test_dataloader=dict(dataset=dict(type="CocoDataset", pipeline=[]))),
        dict(test_dataloader=dict(dataset=dict(type="ConcatDataset", datasets=[]))),
        dict(train_pipeline=make_pipeline(FASTER), tta_pipeline=make_pipeline(FASTER)),
    ],
)
def test_a_config_without_test_pipeline(config):
    with pytest.raises(VisConfigError, match=r"no test pipeline.*add test_dataloader"):
        read_dataset(Config(config))


def test_where_the_pipeline_comes_from():
    def named(name: str) -> dict:
        return dict(type="CocoDataset", pipeline=[dict(type=name)])

    everything = dict(
        test_dataloader=dict(dataset=named("test")),
        val_dataloader=dict(dataset=named("val")),
        train_dataloader=dict(dataset=named("train")),
        test_pipeline=[dict(type="alone")],
        tta_pipeline=[dict(type="augmented")],
        tta_model=dict(type="DetTTAModel"),
    )
    found = []
    for missing in ((), ("test_dataloader",), ("test_dataloader", "val_dataloader")):
        config = {k: v for k, v in everything.items() if k not in missing}
        (step,) = read_dataset(Config(config)).pipeline
        found.append(step["type"])
    assert found == ["test", "val", "alone"]


def test_a_loader_that_is_none_or_a_list_counts_as_missing():
    dataset = dict(type="CocoDataset", pipeline=[dict(type="val")])
    for loader in (None, [dict(dataset=dataset)]):
        config = Config(
            dict(test_dataloader=loader, val_dataloader=dict(dataset=dataset))
        )
        assert read_dataset(config).pipeline[0]["type"] == "val"


LEAF = dict(
    type="CocoDataset",
    pipeline=[dict(type="LoadImageFromFile")],
    metainfo=dict(classes=("square",), palette=[(1, 2, 3)]),
    batch_shapes_cfg=dict(type="BatchShapePolicy", size_divisor=64),
)


@pytest.mark.parametrize(
    "dataset",
    [
        LEAF,
        dict(type="RepeatDataset", times=2, dataset=LEAF),
        dict(type="ConcatDataset", datasets=[LEAF, dict(type="Other")]),
        dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=[LEAF])),
        dict(type="ClassBalancedDataset", dataset=dict(type="X", dataset=LEAF)),
    ],
)
def test_wrapped_datasets(dataset):
    info = read_dataset(config_of(dataset))
    assert info.pipeline == LEAF["pipeline"]
    assert info.metainfo["classes"] == ("square",)
    assert info.metainfo["palette"] == [(1, 2, 3)]
    assert info.batch_shapes_cfg["size_divisor"] == 64


@pytest.mark.parametrize("kind", ["CocoDataset", "mmdet.CocoDataset", CocoDataset])
@pytest.mark.parametrize("others", [dict(default_scope="mmdet"), {}])
def test_the_class_of_the_dataset_names_the_classes(kind, others):
    dataset = dict(LEAF, type=kind, metainfo=None)
    info = read_dataset(Config(dict(test_dataloader=dict(dataset=dataset), **others)))
    assert len(info.metainfo["classes"]) == len(info.metainfo["palette"]) == 80
    assert info.metainfo["classes"][0] == "person"
    dataset["metainfo"] = dict(classes=("a", "b"))
    info = read_dataset(config_of(dataset))
    assert info.metainfo["classes"] == ("a", "b")
    assert len(info.metainfo["palette"]) == 80
    assert CocoDataset.METAINFO["classes"][0] == "person"


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py", 80),
        ("mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py", 80),
        ("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", 80),
        ("mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py", 20),
    ],
)
def test_real_configs_name_their_classes(name, num_classes):
    info = read_dataset(get_config(name))
    assert len(info.metainfo["classes"]) == num_classes


@pytest.mark.parametrize("kind", ["NobodyKnowsIt", None])
def test_a_dataset_that_is_not_registered_names_nothing(kind):
    dataset = dict(type=kind, pipeline=[dict(type="LoadImageFromFile")])
    assert read_dataset(config_of(dataset)).metainfo == {}


def test_no_file_of_the_dataset_is_read():
    dataset = dict(LEAF, data_root="nowhere/", ann_file="missing.json")
    assert read_dataset(config_of(dataset)).pipeline == LEAF["pipeline"]


@pytest.mark.parametrize(
    ("metainfos", "expected"),
    [
        ([], ((), None)),
        ([{}, {}], ((), None)),
        ([dict(classes=("a",), palette=[(1, 2, 3)])], (("a",), [(1, 2, 3)])),
        ([{}, dict(CLASSES=["a", "b"])], (("a", "b"), None)),
        (
            [dict(classes=("of", "weights")), dict(classes=("of config",))],
            (("of", "weights"), None),
        ),
        ([dict(palette=[(1, 2, 3)]), dict(classes="one")], (("one",), None)),
    ],
)
def test_the_first_that_names_classes_counts(metainfos, expected):
    assert classes_and_palette(*metainfos) == expected


# ---------------------------------------------------------------------- build_pipeline


def test_the_stride_of_large_networks_counts():
    config = get_config("mmyolo::yolov5/yolov5_s-p6-v62_syncbn_fast_8xb16-300e_coco.py")
    info = read_dataset(config)
    pipeline = build_pipeline(config, info)
    for image_hw in ((480, 640), (427, 640)):
        loaded = pipeline.load(np.zeros((*image_hw, 3), np.uint8))
        resized = pipeline.resize_only(
            loaded, divisor=1, stride=network_stride(toy(), info)
        )
        size_hw = resized.pack(loaded)["inputs"].shape[1:]
        assert tuple(size_hw) in ((960, 1280), (832, 1280))


# ------------------------------------------- read_config, check_device, build_detector

YOLOV8 = "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"


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


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:x", "gpu"])
def test_what_is_no_device(device):
    with pytest.raises(VisConfigError, match="is no device; use 'cpu'"):
        check_device(device)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda:7", "'cuda:7'.*this machine has no CUDA device; use 'cpu'"),
        (2, "cuda:2", "this machine has cuda:0, cuda:1; use one of them"),
        (2, "cuda", ""),
        (2, "cuda:1", ""),
    ],
)
def test_a_gpu_must_be_there(monkeypatch, count, device, message):
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


def test_the_scope_is_that_of_the_config():
    for config, scope in (({"default_scope": "mmyolo"}, "mmyolo"), ({}, "mmdet")):
        with default_scope(Config(config)):
            assert DefaultScope.get_current_instance().scope_name == scope


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

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") is None:
            for key in [k for k in state_dict if k.startswith(f"{prefix}old.")]:
                state_dict[key.replace("old.", "cls.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


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
