"""Detectors, weights and test pipelines of configs, right and wrong ones."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from torch import nn

from mmyolo_vis_hooks.detector import (
    build_detector,
    check_device,
    classes_and_palette,
    load_weights,
    read_dataset,
)
from mmyolo_vis_hooks.errors import CheckpointError, VisConfigError
from tests.toy import ToyDetector

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
    for config in (
        dict(test_dataloader=None, val_dataloader=None, test_pipeline=None),
        dict(test_dataloader=[dict(dataset=dict(type="CocoDataset"))]),
        dict(test_dataloader=dict(dataset=dict(type="ConcatDataset", datasets=[]))),
        dict(train_pipeline=[dict(type="x")], tta_pipeline=[dict(type="x")]),
    ):
        with pytest.raises(VisConfigError, match=r"no test pipeline.*add test_data"):
            read_dataset(Config(config))


LEAF = dict(
    type="CocoDataset",
    pipeline=[dict(type="LoadImageFromFile")],
    metainfo=dict(classes=("square",), palette=[(1, 2, 3)]),
    data_root="nowhere/",
    ann_file="missing.json",
    batch_shapes_cfg=dict(type="BatchShapePolicy", size_divisor=64),
)


@pytest.mark.parametrize(
    "dataset",
    [
        LEAF,
        dict(type="ConcatDataset", datasets=[LEAF, dict(type="Other")]),
        dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=[LEAF])),
    ],
)
def test_wrapped_datasets(dataset):
    info = read_dataset(config_of(dataset))
    assert info.pipeline == LEAF["pipeline"]
    assert info.metainfo["classes"] == ("square",)
    assert info.metainfo["palette"] == [(1, 2, 3)]
    assert info.batch_shapes_cfg["size_divisor"] == 64


@pytest.mark.parametrize("kind", ["CocoDataset", "mmdet.CocoDataset", CocoDataset])
def test_the_class_of_the_dataset_names_the_classes(kind):
    dataset = dict(LEAF, type=kind, metainfo=None)
    info = read_dataset(Config(dict(test_dataloader=dict(dataset=dataset))))
    assert len(info.metainfo["classes"]) == len(info.metainfo["palette"]) == 80
    assert info.metainfo["classes"][0] == "person"
    dataset["metainfo"] = dict(classes=("a", "b"))
    info = read_dataset(config_of(dataset))
    assert info.metainfo["classes"] == ("a", "b")
    assert len(info.metainfo["palette"]) == 80
    for unknown in ("NobodyKnowsIt", None):
        nameless = dict(LEAF, type=unknown, metainfo=None)
        assert read_dataset(config_of(nameless)).metainfo == {}


@pytest.mark.parametrize(
    ("metainfos", "expected"),
    [
        ([], ((), None)),
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


YOLOV8 = "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (0, "cuda:7", "'cuda:7'.*this machine has no CUDA device; use 'cpu'"),
        (2, "cuda:2", "this machine has cuda:0, cuda:1; use one of them"),
        (2, "cuda:x", "is no device; use 'cpu'"),
        (0, "nonsense", "is no device; use 'cpu'"),
        (0, "meta", "this torch has none"),
        (0, "xpu", "is not there: this torch has none; use 'cpu'"),
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


def test_a_detector_of_mmyolo_on_the_cpu():
    detector = build_detector(YOLOV8, "cpu")
    assert type(detector).__name__ == "YOLODetector"
    assert not detector.training
    kinds = {type(module).__name__ for module in detector.modules()}
    assert not any("SyncBatchNorm" in kind for kind in kinds)
    for model, message in (
        (None, "no model=dict"),
        (dict(type="No"), "'No' cannot be"),
    ):
        with pytest.raises(VisConfigError, match=message):
            build_detector(Config(dict(model=model)), "cpu")


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return ToyDetector(PREPROCESSOR).state_dict()


def same(detector: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    own = detector.state_dict()
    return all(torch.equal(own[key], weights[key]) for key in own)


@pytest.mark.parametrize(("prefix", "wrapped"), [("module.", True), ("", False)])
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
        ("a note", {}),
        (dict(dataset_meta=["a"]), {}),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({f"a.{k}": v for k, v in other_weights().items()}, "0 of 18 weights fit"),
        (dict(state_dict=[torch.zeros(3)]), "holds no weights"),
        (dict(state_dict={}), "holds no weights"),
        (torch.zeros(3), "holds no weights"),
        (dict(model=other_weights()), "holds no weights.*; save those of 'model'"),
        (
            {k: v.to("meta") for k, v in other_weights().items()},
            "holds no weights",
        ),
    ],
)
def test_what_holds_no_weights_of_the_detector(tmp_path, content, message):
    detector = toy()
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"a\.pth .*{message}"):
        load_weights(detector, save(tmp_path / "a.pth", content))
    assert same(detector, before)


def test_tensors_of_no_plain_values_are_not_read(tmp_path, said):
    weights = other_weights()
    key = "backbone.0.weight"
    weights[key] = weights[key].to_sparse()
    load_weights(toy(), save(tmp_path / "a.pth", weights))
    assert [line.partition(": ")[2] for line in said] == [
        f"17 of 18 weights fit; missing {key}"
    ]


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


def test_modules_are_told_the_version_of_their_weights(tmp_path, said):
    weights = Versioned().state_dict()
    old = OrderedDict((f"module.old.{key[4:]}", v) for key, v in weights.items())
    own = Versioned()
    new = nn.ModuleDict(dict(module=own)).state_dict()
    for content, expected in ((old, weights), (new, own.state_dict())):
        detector = Versioned()
        load_weights(detector, save(tmp_path / "a.pth", dict(state_dict=content)))
        assert same(detector, expected)
    assert said == []
