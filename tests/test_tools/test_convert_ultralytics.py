"""Checkpoints of Ultralytics become MMYOLO's, and compute the same.

The networks are built here from the published layouts of YOLOv5-n and YOLOv8-n, and
pickled as modules of packages that are gone when they are converted.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import convert_ultralytics as tool
from mmyolo_vis_hooks.detector import build_detector, load_weights, read_config
from mmyolo_vis_hooks.errors import CheckpointError

V5 = "mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py"
V8 = "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"
CLASSES = ("cat", "dog", "cow", "hen")
OPTIONS = ["--cfg-options", "model.bbox_head.head_module.num_classes=4"]
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]]
ANCHORS += [[116, 90, 156, 198, 373, 326]]


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3)
        self.act = nn.SiLU()

    def forward(self, x: Any) -> Any:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c: int, k: int, add: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c, k), Conv(c, c, 3), add

    def forward(self, x: Any) -> Any:
        return self.cv2(self.cv1(x)) + (x if self.add else 0)


class C3(nn.Module):
    def __init__(self, c1: int, c2: int, n: int, add: bool = True) -> None:
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2, self.cv3 = Conv(c1, c), Conv(c1, c), Conv(2 * c, c2)
        self.m = nn.Sequential(*(Bottleneck(c, 1, add) for _ in range(n)))

    def forward(self, x: Any) -> Any:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int, add: bool = True) -> None:
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, c2), Conv((2 + n) * c, c2)
        self.m = nn.ModuleList(Bottleneck(c, 3, add) for _ in range(n))

    def forward(self, x: Any) -> Any:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c // 2), Conv(2 * c, c)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Any) -> Any:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.m(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Concat(nn.Module):
    def __init__(self, other: int) -> None:
        super().__init__()
        self.f = other


class Detect(nn.Module):
    """YOLOv5's head has `m` and anchors in cells, YOLOv8's `cv2`, `cv3` and `dfl`."""

    def __init__(self, version: int, f: tuple, nc: int) -> None:
        super().__init__()
        self.f, widths = f, (64, 128, 256)
        if version == 5:
            strides = torch.tensor([8, 16, 32]).view(3, 1, 1)
            anchors = torch.tensor(ANCHORS).view(3, 3, 2) / strides
            self.register_buffer("anchors", anchors)
            self.m = nn.ModuleList(nn.Conv2d(c, 3 * (5 + nc), 1) for c in widths)
            return
        for name, hidden, out in (("cv2", 64, 64), ("cv3", max(64, nc), nc)):
            branches = [
                [Conv(c, hidden, 3), Conv(hidden, hidden, 3), nn.Conv2d(hidden, out, 1)]
                for c in widths
            ]
            setattr(self, name, nn.ModuleList(nn.Sequential(*b) for b in branches))
        self.dfl = nn.Module()
        self.dfl.conv = nn.Conv2d(16, 1, 1, bias=False)

    def forward(self, maps: list) -> list:
        branches = [self.m] if hasattr(self, "m") else [self.cv2, self.cv3]
        return [[b[i](x) for b in branches] for i, x in enumerate(maps)]


class DetectionModel(nn.Module):
    def __init__(self, version: int, nc: int) -> None:
        super().__init__()
        block = C3 if version == 5 else C2f
        layers: list[nn.Module] = [Conv(3, 16, 6 if version == 5 else 3, 2)]
        for c, n in ((32, 1), (64, 2), (128, 3 if version == 5 else 2), (256, 1)):
            layers += [Conv(c // 2, c, 3, 2), block(c, c, n)]
        layers += [SPPF(256)]
        up = nn.Upsample(scale_factor=2)
        if version == 5:
            layers += [Conv(256, 128), up, Concat(6), C3(256, 128, 1, False)]
            layers += [Conv(128, 64), up, Concat(4), C3(128, 64, 1, False)]
            layers += [Conv(64, 64, 3, 2), Concat(14), C3(128, 128, 1, False)]
            layers += [Conv(128, 128, 3, 2), Concat(10), C3(256, 256, 1, False)]
            layers += [Detect(5, (17, 20, 23), nc)]
        else:
            layers += [up, Concat(6), C2f(384, 128, 1, False)]
            layers += [up, Concat(4), C2f(192, 64, 1, False)]
            layers += [Conv(64, 64, 3, 2), Concat(12), C2f(192, 128, 1, False)]
            layers += [Conv(128, 128, 3, 2), Concat(9), C2f(384, 256, 1, False)]
            layers += [Detect(8, (15, 18, 21), nc)]
        self.model = nn.Sequential(*layers)
        names = CLASSES[:nc]
        self.names = list(names) if version == 5 else dict(enumerate(names))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.1, 0.4)

    def forward(self, x: Any) -> Any:
        seen: list[Any] = []
        for layer in self.model:
            if isinstance(layer, Concat):
                x = torch.cat([x, seen[layer.f]], 1)
            elif isinstance(layer, Detect):
                x = layer([seen[i] for i in layer.f])
            else:
                x = layer(x)
            seen.append(x)
        return x


def save(path: Path, version: int, ema: Any, model: Any = None) -> str:
    """Save models as the trainings of Ultralytics do, in half precision."""
    place = "models.yolo" if version == 5 else "ultralytics.nn.tasks"
    module = ModuleType(place)
    for kind in (Conv, Bottleneck, C3, C2f, SPPF, Concat, Detect, DetectionModel):
        kind.__module__ = place
        setattr(module, kind.__name__, kind)
    parents = [place.rsplit(".", n)[0] for n in range(1, place.count(".") + 1)]
    with pytest.MonkeyPatch.context() as patch:
        for name in parents:
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, place, module)
        content = dict(epoch=-1, model=model, ema=ema, optimizer=None, date="2024")
        torch.save(content, path)
    assert place not in sys.modules
    return str(path)


def network(version: int, nc: int = 4) -> DetectionModel:
    torch.manual_seed(version)
    return DetectionModel(version, nc).eval().half()


@pytest.mark.parametrize(("version", "config"), [(5, V5), (8, V8)])
def test_the_converted_network_computes_the_same(
    tmp_path: Path, run: Any, version: int, config: str
) -> None:
    model, out = network(version), tmp_path / "out.pth"
    if version == 5:  # a training that goes on: the averaged weights count
        source = save(tmp_path / "in.pt", version, model, DetectionModel(5, 4).half())
    else:
        source = save(tmp_path / "in.pt", version, None, model)
    assert run(tool, source, out, "--config", config, *OPTIONS) == 0

    settings = read_config(config)
    settings.model.bbox_head.head_module.num_classes = 4
    detector: Any = build_detector(settings, "cpu")
    assert load_weights(detector, out) == dict(classes=CLASSES)
    image = torch.rand(1, 3, 64, 96)
    head = detector.bbox_head.head_module
    with torch.no_grad():
        expected = model.float()(image)
        maps = detector.neck(detector.backbone(image))
        branches = ["convs_pred"] if version == 5 else ["reg_preds", "cls_preds"]
        for level, outputs in enumerate(expected):
            for name, output in zip(branches, outputs):
                actual = getattr(head, name)[level](maps[level])
                assert output.std() > 1e-2
                torch.testing.assert_close(actual, output, rtol=0, atol=1e-4)
    saved = torch.load(out)
    assert all(v.dtype != torch.float16 for v in saved["state_dict"].values())


def spoiled(version: int) -> DetectionModel:
    model = network(version)
    if version == 5:
        model.model[24].anchors *= 1.1
    else:
        model.model[22].proto = Conv(64, 32)
    return model


@pytest.mark.parametrize(
    ("version", "model", "config", "options", "message"),
    [
        (5, network(5), V5, [], "4 classes, the config 80: set num_classes"),
        (5, network(5), V8, OPTIONS, r"YOLOv5\) .*missing neck.* unknown backbone"),
        (5, spoiled(5), V5, OPTIONS, r"other anchors.*base_sizes=\[\[\(11\.0, 14\.3\)"),
        (8, spoiled(8), V8, OPTIONS, r"parts that MMYOLO does not: model\.22\.proto"),
        (8, nn.Conv2d(3, 4, 1), V8, [], "neither a YOLOv5 .* nor a YOLOv8 detector"),
        (8, {"w": torch.ones(1)}, V8, [], "no checkpoint of Ultralytics"),
    ],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, mistake, version, model, config, options, message
) -> None:
    source, out = save(tmp_path / "in.pt", version, model), tmp_path / "out.pth"
    if isinstance(model, DetectionModel):  # whoever loads it is told what to do
        command = f"python tools/convert_ultralytics.py {source} OUT.pth --config"
        with pytest.raises(CheckpointError) as caught:
            load_weights(nn.Conv2d(3, 4, 1), source)
        assert command in str(caught.value)
    line = mistake(tool, source, out, "--config", config, *options)
    assert re.search(message, line), line
    assert not out.exists()


def test_places_that_cannot_be_written(tmp_path, mistake) -> None:
    source = save(tmp_path / "in.pt", 8, network(8))
    refused = mistake(tool, source, source, "--config", V8)
    assert "OUT is the same file as IN" in refused
    nowhere = tmp_path / "no" / "out.pth"
    assert "there is no folder" in mistake(tool, source, nowhere, "--config", V8)
    gone = mistake(tool, tmp_path / "none.pt", source, "--config", V8)
    assert "there is no checkpoint" in gone
    full = mistake(tool, source, tmp_path, "--config", V8, *OPTIONS)
    assert "was not written" in full
