"""``featmap_vis_demo.py``, ``boxam_vis_demo.py`` and ``list_layers.py`` as a whole.

Most run in this process, where one takes a second; a few are started as users do.
"""

from __future__ import annotations

import functools
import http.server
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.visualization import Visualizer

from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from mmyolo_vis_hooks.detector import build_detector, load_weights
from mmyolo_vis_hooks.options import FeatMapOptions
from mmyolo_vis_hooks.render.featmap_panel import overlay_feature_map
from tests.test_tools.loading import TOOLS, load_tool

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "coco128" / "yolox_nano_coco128.py"

import _vis_demo  # noqa: E402

featmap_tool = load_tool("featmap_vis_demo")
boxam_tool = load_tool("boxam_vis_demo")
layers_tool = load_tool("list_layers")

real_data = pytest.mark.real_data

# Measured in the picture by hand, pixels.
DOG_XYXY = (131, 220, 312, 541)
FOUND = ["bicycle", "dog", "car", "truck", "potted plant"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A current folder in which every file is one that the test knows of."""
    monkeypatch.chdir(tmp_path)
    # Loggers of earlier tests write to a stdout that is closed by now.
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a tool in this process, as its script would; gives its status."""

    def call(tool: ModuleType, *args: Any) -> int:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, args)])
        runner = getattr(tool, "run_demo", None) or tool.run_tool
        try:
            runner(tool.main)
        except SystemExit as stopped:
            return 0 if stopped.code is None else int(stopped.code)
        return 0

    return call


@pytest.fixture
def real(shared_dir: Path) -> SimpleNamespace:
    """The COCO detector and the picture of a dog before a bicycle."""
    image = shared_dir / "data" / "dog.jpg"
    weights = shared_dir / "weights" / "yolox_nano_coco.pth"
    detector = CONFIG, weights
    return SimpleNamespace(
        image=image, weights=weights, detector=detector, image_rgb=read_rgb(image)
    )


@pytest.fixture
def drawn(run, real) -> Callable[..., SimpleNamespace]:
    """Run a tool on the dog; gives the picture, its cells and what the page knows."""

    def draw(tool: ModuleType, *args: Any) -> SimpleNamespace:
        # On a GPU the last bits are others.
        out = ["--device", "cpu", "--out-dir", "out", "--out-file", "picture.png"]
        assert run(tool, real.image, *real.detector, *args, *out) == 0
        assert sorted(os.listdir()) == ["out", "picture.png"]
        assert sorted(os.listdir("out")) == ["index.html", "index_files"]
        (entry,), labels = read_page("out")
        return SimpleNamespace(
            cells=find_cells(read_rgb("picture.png")),
            size=entry["size"],
            entry=entry,
            titles=[panel["title"] for panel in entry["panels"]],
            notes=[panel["note"] for panel in entry["panels"]],
            boxes=[(labels[box[0]], box[1]) for box in entry["boxes"]],
            xyxy=[to_xyxy(box[2], entry["size"]) for box in entry["boxes"]],
            maps=[read_grey(p) for p in panel_files("out", entry)],
        )

    return draw


def read_rgb(path: Any) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    return image[..., ::-1]


def read_grey(path: Any) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image.ndim == 2, "maps have no colours"
    return image


def read_page(folder: Any) -> tuple[list[dict], list[str]]:
    """The images that a page lists, and the names of its classes."""
    text = (Path(folder) / "index.html").read_text(encoding="utf-8")
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    (data,) = re.findall(pattern, text, re.S)
    page = json.loads(data)
    for entry in page["entries"]:
        base = Path(folder) / "index_files" / f"{entry['name']}.image.jpg"
        assert base.is_file()
        assert read_rgb(Path(folder) / unquote(entry["href"])).std() > 5
    return page["entries"], [label["name"] for label in page["labels"]]


def panel_files(folder: Any, entry: dict) -> list[Path]:
    assets = Path(folder) / "index_files"
    return [assets / f"{entry['name']}.{i}.jpg" for i in range(len(entry["panels"]))]


def to_xyxy(outline: Sequence[float], size_wh: Sequence[int]) -> np.ndarray:
    """Pixels of the image, from the page's percentages."""
    left, top, width, height = outline
    corners = np.array([left, top, left + width, top + height])
    return corners / 100 * np.array([*size_wh, *size_wh])


def find_cells(picture: np.ndarray) -> list[np.ndarray]:
    """What lies on the white ground of a montage, by rows.

    Letters and colour bars are too small; white within a picture counts as its own.
    """
    mask = (picture != 255).any(axis=2).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    places = [cv2.boundingRect(outline) for outline in outlines]
    places = sorted((y, x, h, w) for x, y, w, h in places if w >= 120 and h >= 60)
    return [picture[y : y + h, x : x + w] for y, x, h, w in places]


def differs(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance of two pictures of the same size, grey levels."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def has_peak_inside(map_: np.ndarray, xyxy: Sequence[float], size_wh: Any) -> bool:
    y, x = np.unravel_index(np.argmax(map_), map_.shape)
    return bool(inside(xyxy, size_wh, map_.shape)[y, x])


def inside(xyxy: Sequence[float], size_wh: Sequence[int], shape: Any) -> np.ndarray:
    """Which cells of a map over the whole image have their centre in a box."""
    height, width = shape
    x = (np.arange(width) + 0.5) * size_wh[0] / width
    y = (np.arange(height) + 0.5) * size_wh[1] / height
    columns = (x > xyxy[0]) & (x < xyxy[2])
    rows = (y > xyxy[1]) & (y < xyxy[3])
    return rows[:, None] & columns


# ----------------------------------------------------- feature maps, as in the guide


def network_maps(real: SimpleNamespace) -> list[torch.Tensor]:
    """What backbone and neck put out for the dog, without any of the tools."""
    config = Config.fromfile(CONFIG)
    detector: Any = build_detector(config, torch.device("cpu"))
    load_weights(detector, str(real.weights))
    # 768 x 576 in 416 x 416, then to whole cells of 32 pixels.
    image = cv2.resize(real.image_rgb, (416, 320), interpolation=cv2.INTER_AREA)
    preprocessor = config.model.data_preprocessor
    mean, std = np.float32(preprocessor.mean), np.float32(preprocessor.std)
    inputs = torch.from_numpy((image - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        backbone = detector.backbone(inputs)
        return [level[0] for level in (*backbone, *detector.neck(backbone))]


@real_data
def test_all_outputs_of_layers_are_drawn(drawn, real):
    words = ("--target-layers", "backbone", "neck", "--channel-reduction", "select_max")
    run = drawn(featmap_tool, *words)
    layers = [f"{layer}[{i}]" for layer in ("backbone", "neck") for i in range(3)]
    assert run.titles == layers
    image, *maps = run.cells
    assert [cell.shape for cell in run.cells] == [(576, 768, 3)] * 7
    assert sorted({name for name, _ in run.boxes}) == sorted(FOUND)
    # The image has boxes drawn on it, but is the image.
    assert 0 < differs(image, real.image_rgb) < 12
    options = FeatMapOptions(channel_reduction="select_max")
    for cell, level in zip(maps, network_maps(real)):
        assert differs(cell, overlay_feature_map(level, real.image_rgb, options)) < 0.1
        assert differs(cell, real.image_rgb) > 20
    assert differs(maps[0], maps[1]) > 5


@real_data
@pytest.mark.parametrize("alignment", ["letterbox", "network"])
def test_alignments(drawn, real, alignment):
    words = ("--target-layers", "neck", "--score-thr", "0.7", "--alignment", alignment)
    run = drawn(featmap_tool, *words)
    names = [name for name, _ in run.boxes]
    assert names == ["dog", "bicycle"]
    for note, cells in zip(run.notes, (52, 26, 13)):
        words = note.replace("\u00a0", " ")
        assert words.startswith(f"64 channels of {cells} x {cells} cells")
    image = run.cells[0]
    if alignment == "letterbox":
        assert run.size == [768, 576]
        assert [cell.shape for cell in run.cells] == [(576, 768, 3)] * 4
        assert 0 < differs(image, real.image_rgb) < 12
    else:
        assert run.size == [416, 416]
        assert [cell.shape for cell in run.cells] == [(416, 416, 3)] * 4
        assert (image[316:] == 114).all()
        assert 0 < differs(image[:312], cv2.resize(real.image_rgb, (416, 312))) < 15
    # On the page, the dog is where it is in the picture.
    assert (
        np.abs(
            run.xyxy[names.index("dog")] - np.array(DOG_XYXY) * run.size[0] / 768
        ).max()
        < 30
    )


@real_data
def test_score_thr_and_cfg_options_say_which_boxes_there_are(drawn):
    option = ("--cfg-options", "model.test_cfg.score_thr=0.5")
    run = drawn(featmap_tool, "--target-layers", "neck", "--score-thr", "0.1", *option)
    assert [name for name, _ in run.boxes] == ["bicycle", "dog", "car"]


# ------------------------------------------------------- boxes, as in the guide


@real_data
def test_each_box_has_a_map_with_its_peak_inside(drawn, real):
    run = drawn(boxam_tool)
    assert [name for name, _ in run.boxes] == FOUND
    titles = [f"{name} {score:.2f}" for name, score in run.boxes]
    assert run.titles == ["5 explained boxes", *titles]
    assert [panel.get("box") for panel in run.entry["panels"]] == [None, 0, 1, 2, 3, 4]
    # The image and the joint map above, a panel per box below.
    assert len(run.cells) == 7
    assert [cell.shape for cell in run.cells[:2]] == [(576, 768, 3)] * 2
    assert 0 < differs(run.cells[0], real.image_rgb) < 12
    assert differs(run.cells[1], run.cells[0]) > 20
    dog = FOUND.index("dog")
    for xyxy, map_ in zip([*run.xyxy, DOG_XYXY], [*run.maps[1:], run.maps[1 + dog]]):
        assert has_peak_inside(map_, xyxy, run.size)
        weights = map_.astype(float)
        share = weights[inside(xyxy, run.size, map_.shape)].sum() / weights.sum()
        assert share > 0.5
    assert np.abs(run.xyxy[dog] - DOG_XYXY).max() < 30
    assert differs(np.maximum.reduce(run.maps[1:]), run.maps[0]) < 2


@real_data
def test_classes_topk_scopes_and_shapes(drawn):
    run = drawn(boxam_tool, "--topk", "2", "--max-shape", "10", "10")
    assert [title.split()[0] for title in run.titles] == ["2", "bicycle", "dog"]
    notes = [note.replace("\u00a0", " ") for note in run.notes[1:]]
    assert all("10 x 10 cells" in note for note in notes)
    # All boxes are drawn nevertheless.
    assert len(run.boxes) == 5
    words = ("--method", "odam", "--classes", "dog", "2", "--scope", "class")
    run = drawn(boxam_tool, *words)
    assert run.titles == ["2 explained boxes", "dog (1 box)", "car (1 box)"]
    assert all(note.startswith("odam") for note in run.notes)


@real_data
def test_the_defaults_of_the_guide_look_at_the_last_layer_only(drawn):
    run = drawn(
        boxam_tool, "--method", "gradcam", "--target-layers", "neck.out_convs[2]"
    )
    silent = {name for name, m in zip(FOUND, run.maps[1:]) if m.max() <= 250}
    assert silent == {"dog", "car", "potted plant"}
    for name, note in zip(FOUND, run.notes[1:]):
        assert ("no influence on this box; it was made at" in note) == (name in silent)
    assert has_peak_inside(run.maps[1], run.xyxy[0], run.size)


OWN = """
from mmyolo_vis_hooks.attribution.methods import register_method
from mmyolo_vis_hooks.attribution.targets import register_target

@register_method("mycam", kind="gradient", summary="", formula="")
def mycam(activations, gradients):
    return (gradients * activations).amax(1)

@register_target("double", summary="twice the score")
def double(boxes):
    return boxes.scores * 2
"""


@real_data
def test_methods_and_targets_that_the_config_registers(
    drawn, real, tmp_path_factory, monkeypatch
):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_methods.py").write_text(OWN)
    config = folder / "config.py"
    imports = "custom_imports = dict(imports=['own_methods'])"
    config.write_text(f"_base_ = [{str(CONFIG)!r}]\n{imports}\n")
    monkeypatch.syspath_prepend(folder)
    for registry, name in ((METHODS, "mycam"), (TARGETS, "double")):
        monkeypatch.setitem(registry, name, None)  # gone again after the test
        del registry[name]
    real.detector = config, real.weights
    run = drawn(boxam_tool, "--method", "mycam", "--target", "double", "--topk", "1")
    assert run.notes[1].startswith("mycam")
    assert "double" in run.notes[1]


# ---------------------------------------------------------------- sources of images


def write_small(path: Any, seed: int = 0, hw: tuple[int, int] = (60, 80)) -> np.ndarray:
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    image = cv2.resize(spots, hw[::-1], interpolation=cv2.INTER_CUBIC)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image


@real_data
def test_images_folders_and_videos_have_names_of_their_own(run, real, capsys):
    files = ("a.png", "a.jpg", "sub/a.jpg", "sub/deep/B b.JPG", "sub_a.bmp")
    for seed, file in enumerate(files):
        write_small(f"in/{file}", seed)
    Path("in/notes.txt").write_text("no image")
    Path("in/.hidden").mkdir()
    frame = write_small("other/A.jpg", 9)
    before = {p: p.read_bytes() for p in Path("in").rglob("*.*") if p.is_file()}
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 60))
    for number in range(3):
        writer.write(np.roll(frame, 20 * number, axis=1))
    writer.release()
    status = run(
        *(featmap_tool, "in", "other/A.jpg", real.image, "clip.avi", *real.detector),
        *("--target-layers", "neck", "--out-dir", "out"),
    )
    assert status == 0
    entries, _ = read_page("out")
    names = [entry["name"] for entry in entries]
    assert names == [
        *("a", "a-2", "sub_a", "sub_a-2", "sub_deep_B_b", "A-3", "dog"),
        *("clip_000000", "clip_000001", "clip_000002"),
    ]
    titles = [entry["title"] for entry in entries][-4:]
    assert titles == [str(real.image), *(f"clip.avi frame {n}" for n in range(3))]
    pictures = [f"{name}.jpg" for name in names]
    assert sorted(os.listdir("out")) == sorted([*pictures, "index.html", "index_files"])
    assert len({Path("out", name).read_bytes() for name in pictures}) == len(names)
    # Inputs are as they were, and nothing lies beside them.
    assert sorted(os.listdir()) == ["clip.avi", "in", "other", "out"]
    assert before == {p: p.read_bytes() for p in Path("in").rglob("*.*") if p.is_file()}
    assert "10 pictures in out; open out/index.html" in capsys.readouterr().err
    # What the first run wrote into the folder is no image of the second.
    shutil.move("out", "in/out")
    again = ("--target-layers", "neck", "--out-dir", "in/out")
    assert run(featmap_tool, "in", *real.detector, *again) == 0
    assert len(read_page("in/out")[0]) == len(files)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A folder and its address."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


@real_data
def test_images_and_weights_at_an_address(
    run, real, server, capsys, tmp_path, monkeypatch
):
    folder, address = server
    shutil.copy(real.image, folder / "a dog.jpg")
    shutil.copy(real.weights, folder / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    image, weights = f"{address}/{quote('a dog.jpg')}", f"{address}/weights.pth"
    assert run(featmap_tool, image, CONFIG, weights, "--out-dir", "out") == 0
    (entry,), labels = read_page("out")
    assert (entry["name"], entry["title"]) == ("a_dog", image)
    assert sorted(labels) == sorted(FOUND)
    gone = f"{address}/gone"
    for args in ((gone + ".jpg", *real.detector), (real.image, CONFIG, gone + ".pth")):
        message = mistake(run, capsys, featmap_tool, *args)
        assert gone in message
        assert "404" in message


# ------------------------------------------------------------ what lies there already


@real_data
def test_nothing_is_overwritten_that_was_an_input(run, real, capsys, no_network):
    shutil.copy(real.image, "dog.jpg")
    content = Path("dog.jpg").read_bytes()
    for image in ("dog.jpg", "."):
        args = (image, *real.detector, "--out-dir", ".")
        assert "give another folder" in mistake(run, capsys, featmap_tool, *args)
    args = ("dog.jpg", *real.detector, "--out-file", "./dog.jpg")
    assert "is the image itself" in mistake(run, capsys, featmap_tool, *args)
    assert os.listdir() == ["dog.jpg"]
    assert Path("dog.jpg").read_bytes() == content


@real_data
def test_no_file_of_the_user_is_overwritten(run, real, capsys):
    """The same command replaces its own pictures, and nothing else, ever."""
    write_small("photos/sub/cat.png")
    write_small("photos/cat.jpg", 1)
    photo, ours = Path("photos/cat.jpg").read_bytes(), b""
    command = (featmap_tool, "photos/sub", *real.detector, "--out-dir", "photos")
    for strength in ("0.5", "1.0"):
        before = ours
        assert run(*command, "--alpha", strength) == 0
        left = ["cat-2.jpg", "cat.jpg", "index.html", "index_files", "sub"]
        assert sorted(os.listdir("photos")) == left
        ours = Path("photos/cat-2.jpg").read_bytes()
        assert ours != before
    assert Path("photos/cat.jpg").read_bytes() == photo
    Path("photos/index.html").write_text("my home page")
    assert "index.html is not of an earlier run" in mistake(run, capsys, *command)
    assert Path("photos/cat-2.jpg").read_bytes() == ours


# --------------------------------------------------------- windows, previews, layers


@real_data
def test_show_opens_a_window_per_picture_and_writes_nothing(run, real, monkeypatch):
    shown: dict[str, np.ndarray] = {}
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "tkagg")
    monkeypatch.setattr(
        Visualizer, "show", lambda _, image, win_name: shown.update({win_name: image})
    )
    write_small("small.png")
    options = ("--target-layers", "neck", "--show")
    assert run(featmap_tool, real.image, "small.png", *real.detector, *options) == 0
    assert os.listdir() == ["small.png"]
    assert list(shown) == [str(real.image), "small.png"]
    assert [len(find_cells(picture)) for picture in shown.values()] == [4, 4]
    assert differs(find_cells(shown[str(real.image)])[0], real.image_rgb) < 12


def rows_of(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Of a printed tree: channels, height, width and stride of each layer's maps."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    pattern = re.compile(
        r"^\s*(?:(?P<path>[a-z_][\w.\[\]]*)\s+\w+)?"
        r"\s+(\d+) x (\d+) x (\d+)\s+(\d+)(?:\s|$)"
    )
    path = ""
    for line in text.splitlines():
        if match := pattern.match(line):
            path = match["path"] or path
            rows.setdefault(path, []).append(tuple(map(int, match.groups()[1:])))
    return rows


def pyramid(channels: Sequence[int], height: int, width: int) -> list[tuple[int, ...]]:
    """What layers with strides 8, 16 and 32 put out."""
    strides = (8, 16, 32)
    return [(c, height // s, width // s, s) for c, s in zip(channels, strides)]


@real_data
def test_the_preview_needs_no_weights(run, real, capsys):
    assert run(boxam_tool, real.image, CONFIG, "none.pth", "--preview-model") == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert rows["neck.out_convs[2]"] == [(64, 10, 13, 32)]
    assert "network input 320 x 416" in text
    assert "--target-layers backbone" in text
    assert os.listdir() == []


def test_list_layers(run, capsys):
    def listed(*args: Any) -> dict[str, list[tuple[int, ...]]]:
        assert run(layers_tool, CONFIG, *args) == 0
        return rows_of(capsys.readouterr().out)

    rows = listed()
    # 480 x 640 in 416 x 416, then to whole cells of 32 pixels.
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert "backbone.stage1[0].depthwise_conv" not in rows
    rows = listed("--size", "640", "480", "--depth", "1")
    assert rows["neck"] == pyramid((64, 64, 64), 416, 320)
    assert set(rows) == {"backbone", "neck", "bbox_head"}
    write_small("tall.png", hw=(90, 30))
    option = "test_dataloader.dataset.pipeline.1.scale=(192, 192)"
    rows = listed(*("--img", "tall.png", "--cfg-options", option, "--depth", "4"))
    assert rows["backbone"] == pyramid((64, 128, 256), 192, 64)
    assert rows["backbone.stage1[0].depthwise_conv"] == [(16, 48, 16, 4)]


# ------------------------------------------------------------------ mistakes, in a line


def mistake(run: Callable, capsys: pytest.CaptureFixture, *args: Any) -> str:
    """The one line of an error, which must be the whole of stderr."""
    capsys.readouterr()
    assert run(*args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a detector is built."""
    monkeypatch.setattr(
        _vis_demo, "build_detector", lambda *_: pytest.fail("a detector was built")
    )


@pytest.fixture
def files(tmp_path_factory) -> Path:
    """Outside the current folder: a small image, and files that are no such thing."""
    folder = tmp_path_factory.mktemp("files")
    write_small(folder / "small.png")
    (folder / "fake.pth").write_bytes(b"no weights")  # as whoever reads it finds out
    (folder / "text.jpg").write_text("no image")
    (folder / "nothing").mkdir()
    (folder / "folder.jpg").mkdir()
    for name, text in CONFIGS.items():
        (folder / name).write_text(text + "\n")
    return folder


CONFIGS = {
    "broken.py": "a = = 1",
    "empty.py": "model = dict(type='YOLODetector')",
    "lazy.py": "from mmdet.models.gone import Nothing\nmodel = dict(type=Nothing)\n"
    "test_pipeline = [dict(type='LoadImageFromFile')]",
    "fails.py": "raise RuntimeError('two\\nlines')",
    "step.py": "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Nope')]\n"
    "model = dict(type='mmdet.FCOS')",
}


def test_mistakes_show_before_the_network_is_built(
    run, capsys, files, monkeypatch, no_network
):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    small, fake = files / "small.png", files / "fake.pth"

    def fails(
        *words: Any,
        img: Any = small,
        config: Any = CONFIG,
        weights: Any = fake,
        tool: ModuleType = featmap_tool,
    ) -> str:
        return mistake(run, capsys, tool, img, config, weights, *words)

    assert "gone.jpg" in fails(img="gone.jpg")
    assert "text.jpg is no image" in fails(img=files / "text.jpg")
    assert "nothing holds no image" in fails(img=files / "nothing")
    assert "no config file gone.py" in fails(config="gone.py")
    assert "broken.py cannot be read" in fails(config=files / "broken.py")
    assert "yolov5/gone.py" in fails(config="mmyolo::yolov5/gone.py")
    assert "no test pipeline" in fails(config=files / "empty.py")
    assert "no checkpoint gone.pth" in fails(weights="gone.pth")
    assert "cuda:99" in fails("--device", "cuda:99")
    assert "--show opens windows, and this machine has no display" in fails("--show")
    assert "jett" in fails("--colormap", "jett")
    # Root may write anywhere, but not below a file.
    below = fake / "below"
    for option in (("--out-dir", below), ("--out-file", below / "x.jpg")):
        assert f"cannot write to the folder {below}" in fails(*option)
    assert "its suffix must say the format" in fails("--out-file", "picture.tmp")
    assert "is a folder" in fails("--out-file", files / "folder.jpg")
    channels = ("--channel-reduction", "None", "--topk", "5", "--arrangement", "2", "2")
    assert "topk=5" in fails(*channels)
    message = fails("--method", "ablationcamm", tool=boxam_tool)
    assert "did you mean 'ablationcam'" in message
    two = (featmap_tool, small, small, CONFIG, fake, "--out-file", "x.jpg")
    assert "there are 2" in mistake(run, capsys, *two)
    assert os.listdir() == []


def test_layers_are_looked_at_before_the_weights(run, capsys, files):
    args = (boxam_tool, files / "small.png", CONFIG, files / "fake.pth")
    message = mistake(run, capsys, *args, "--target-layers", "backbone.stage5")
    assert "'backbone.stage5' is not a layer" in message
    assert "near matches: backbone.stage4" in message
    assert "fake.pth" in mistake(run, capsys, *args)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lazy.py", "gone"),
        ("fails.py", "two lines"),
        # The model comes first in one program, the pipeline in the other.
        ("step.py", "FCOS|Nope"),
    ],
)
def test_whatever_a_config_raises_is_one_line(run, capsys, files, name, reason):
    path = files / name
    args = (path,), (files / "small.png", path, files / "fake.pth")
    for tool, words in zip((layers_tool, boxam_tool), args):
        message = mistake(run, capsys, tool, *words)
        assert re.search(reason, message)
        assert str(path) in message or "model=" in message


def test_mistakes_of_list_layers(run, capsys, monkeypatch):
    for words, part in (
        ("none.py", "no config file none.py"),
        (f"{CONFIG} --size 0 5", "--size"),
        (f"{CONFIG} --depth 0", "--depth 0"),
        ("nope::yolov8/a.py", "after '::' comes a path"),
        (f"{CONFIG} --cfg-options test_pipeline.99.scale=1", "does not fit the config"),
        (f"{CONFIG} --cfg-options model.type=Nope", "model='Nope' cannot be built"),
    ):
        assert part in mistake(run, capsys, layers_tool, *words.split())
    monkeypatch.setenv("MMYOLO_VIS_TRACEBACK", "1")
    assert run(layers_tool, "none.py") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_weights_of_another_architecture(run, capsys, files):
    weights = build_detector(CONFIG, "cpu").state_dict()
    other = files / "other.pth"
    torch.save({f"other.{key}": value for key, value in weights.items()}, other)
    message = mistake(run, capsys, featmap_tool, files / "small.png", CONFIG, other)
    assert f"{other} is of another architecture than the config: 0 of 538" in message


@real_data
def test_an_option_that_suits_no_image_is_said_once(run, real, capsys):
    write_small("in/a.png")
    write_small("in/b.png", 1)
    channels = ("--channel-reduction", "None", "--topk", "-1", "--out-dir", "out")
    assert run(featmap_tool, "in", *real.detector, *channels) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: layer 'backbone[0]': topk=-1")
    assert not Path("out/index.html").exists()


@real_data
def test_a_corrupt_image_stops_no_other(run, real, capsys):
    for seed, name in enumerate("abd"):
        write_small(f"in/{name}.png", seed)
    Path("in/c.png").write_bytes(Path("in/a.png").read_bytes()[:60])
    Path("in/0.png").write_bytes(b"")
    assert run(boxam_tool, "in", *real.detector, "--out-dir", "out") == 1
    assert [entry["name"] for entry in read_page("out")[0]] == ["a", "b", "d"]
    pictures = ["a.jpg", "b.jpg", "d.jpg"]
    assert sorted(os.listdir("out")) == [*pictures, "index.html", "index_files"]
    lines = capsys.readouterr().err.splitlines()
    assert "in/0.png" in lines[-3]
    assert lines[-2].startswith("error: in/c.png is no image")
    assert lines[-1] == "error: 2 of 5 images could not be drawn"
    assert "3 pictures in out; open out/index.html" in lines


# ---------------------------------------------------------------- as users start them


def start(script: str, *args: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TOOLS / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@real_data
def test_the_first_command_of_the_guide(real):
    process = start(
        "featmap_vis_demo.py", real.image, *real.detector, "--target-layers", "backbone"
    )
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    # No warning of a library, and no line of its log.
    assert out == ""
    assert error == "1 picture in ./output; open ./output/index.html\n"
    assert os.listdir() == ["output"]
    assert sorted(os.listdir("output")) == ["dog.jpg", "index.html", "index_files"]
    (entry,), labels = read_page("output")
    titles = [panel["title"] for panel in entry["panels"]]
    assert titles == [f"backbone[{i}]" for i in range(3)]
    assert sorted(labels) == sorted(FOUND)


@real_data
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent there")
def test_ctrl_c_leaves_what_was_made(real):
    many = 400
    Path("in").mkdir()
    write_small("in/000.png")
    for number in range(1, many):
        os.link("in/000.png", f"in/{number:03d}.png")
    process = start("boxam_vis_demo.py", "in", *real.detector, "--out-dir", "out")
    deadline = time.monotonic() + 60
    while len(list(Path("out").glob("*.jpg"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - pressed < 15
    assert process.returncode == 130
    assert "Traceback" not in out + error
    assert error.splitlines()[-1] == "interrupted"
    made = sorted(path.stem for path in Path("out").glob("*.jpg"))
    assert 3 <= len(made) < many
    assert f"{len(made)} pictures in out" in error
    assert [entry["name"] for entry in read_page("out")[0]] == made
    assert sorted(os.listdir("out")) == [
        *(f"{name}.jpg" for name in made),
        *("index.html", "index_files"),
    ]
