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

from mmyolo_vis_hooks.detector import build_detector, load_weights
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
    return SimpleNamespace(
        image=image,
        weights=weights,
        # In the order of the command line.
        all=(image, CONFIG, weights),
        detector=(CONFIG, weights),
        image_rgb=read_rgb(image),
    )


@pytest.fixture
def drawn(run, real) -> Callable[..., SimpleNamespace]:
    """Run a tool on the dog; gives the picture, its cells and what the page knows."""

    def draw(tool: ModuleType, *args: Any) -> SimpleNamespace:
        # On a GPU the last bits are others.
        out = ["--device", "cpu", "--out-dir", "out", "--out-file", "picture.png"]
        assert run(tool, *real.all, *args, *out) == 0
        assert sorted(os.listdir()) == ["out", "picture.png"]
        assert sorted(os.listdir("out")) == ["index.html", "index_files"]
        picture = read_rgb("picture.png")
        (entry,), labels = read_page("out")
        return SimpleNamespace(
            picture=picture,
            cells=find_cells(picture),
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
    assert image is not None, path
    assert image.ndim == 2, "maps have no colours"
    return image


def read_page(folder: Any) -> tuple[list[dict], list[str]]:
    """The images that a page lists, and the names of its classes."""
    text = (Path(folder) / "index.html").read_text(encoding="utf-8")
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    (data,) = re.findall(pattern, text, re.S)
    page = json.loads(data)
    assert page["assets"] == "index_files"
    for entry in page["entries"]:
        base = Path(folder) / "index_files" / f"{entry['name']}.image.jpg"
        assert base.is_file()
        picture = Path(folder) / unquote(entry["href"])
        assert read_rgb(picture).std() > 5
    return page["entries"], [label["name"] for label in page["labels"]]


def panel_files(folder: Any, entry: dict) -> list[Path]:
    assets = Path(folder) / "index_files"
    return [assets / f"{entry['name']}.{i}.jpg" for i in range(len(entry["panels"]))]


def to_xyxy(outline: Sequence[float], size_wh: Sequence[int]) -> np.ndarray:
    """Pixels of the image, from the page's percentages."""
    left, top, width, height = outline
    corners = np.array([left, top, left + width, top + height])
    return corners / 100 * np.array([*size_wh, *size_wh])


def sizes(note: str) -> tuple[int, ...]:
    """Channels, width and height that the caption of a feature map gives."""
    return tuple(map(int, re.findall(r"\d+", note.split(" · ")[0])))


def find_places(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of what lies on the white ground of a montage.

    By rows; letters and colour bars are too small. White within a picture counts as
    its own.
    """
    mask = (picture != 255).any(axis=2).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    places = [cv2.boundingRect(outline) for outline in outlines]
    return sorted((y, x, h, w) for x, y, w, h in places if w >= 120 and h >= 60)


def find_cells(picture: np.ndarray) -> list[np.ndarray]:
    """The pictures of a montage, by rows."""
    return [picture[y : y + h, x : x + w] for y, x, h, w in find_places(picture)]


def differs(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance of two pictures of the same size, grey levels."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def peak_xy(map_: np.ndarray, size_wh: Sequence[int]) -> tuple[float, float]:
    y, x = np.unravel_index(np.argmax(map_), map_.shape)
    height, width = map_.shape
    return (x + 0.5) * size_wh[0] / width, (y + 0.5) * size_wh[1] / height


def inside(xyxy: Sequence[float], size_wh: Sequence[int], shape: Any) -> np.ndarray:
    """Which cells of a map over the whole image have their centre in a box."""
    height, width = shape
    x = (np.arange(width) + 0.5) * size_wh[0] / width
    y = (np.arange(height) + 0.5) * size_wh[1] / height
    columns = (x > xyxy[0]) & (x < xyxy[2])
    rows = (y > xyxy[1]) & (y < xyxy[3])
    return rows[:, None] & columns


# ----------------------------------------------------- feature maps, as in the guide


@functools.lru_cache
def network_maps(shared_dir: Path) -> dict[str, list[torch.Tensor]]:
    """What backbone and neck put out for the dog, without any of the tools."""
    config = Config.fromfile(CONFIG)
    detector: Any = build_detector(config, torch.device("cpu"))
    load_weights(detector, str(shared_dir / "weights" / "yolox_nano_coco.pth"))
    image_bgr = cv2.imread(str(shared_dir / "data" / "dog.jpg"))
    # 768 x 576 in 416 x 416, then to whole cells of 32 pixels.
    image = cv2.resize(image_bgr, (416, 320), interpolation=cv2.INTER_AREA)
    mean, std = (np.array(v, np.float32) for v in _normalisation(config))
    inputs = (image[..., ::-1].astype(np.float32) - mean) / std
    with torch.no_grad():
        backbone = detector.backbone(torch.from_numpy(inputs).permute(2, 0, 1)[None])
        neck = detector.neck(backbone)
    maps = {"backbone": backbone, "neck": neck}
    return {name: [level[0] for level in levels] for name, levels in maps.items()}


def _normalisation(config: Config) -> tuple[Any, Any]:
    preprocessor = config.model.data_preprocessor
    return preprocessor.mean, preprocessor.std


@real_data
@pytest.mark.parametrize(
    ("layer", "reduction"), [("backbone", "select_max"), ("neck", "squeeze_mean")]
)
def test_all_outputs_of_a_layer_are_drawn(drawn, real, shared_dir, layer, reduction):
    run = drawn(
        featmap_tool, "--target-layers", layer, "--channel-reduction", reduction
    )
    assert run.titles == [f"{layer}[{i}]" for i in range(3)]
    image, *maps = run.cells
    assert [cell.shape for cell in run.cells] == [(576, 768, 3)] * 4
    assert sorted({name for name, _ in run.boxes}) == sorted(FOUND)
    # The image has boxes drawn on it, but is the image.
    assert 0 < differs(image, real.image_rgb) < 12
    for cell, level in zip(maps, network_maps(shared_dir)[layer]):
        expected = overlay_feature_map(
            level, real.image_rgb, channel_reduction=reduction
        )
        assert differs(cell, expected) < 0.1
        assert differs(cell, real.image_rgb) > 20
    assert differs(maps[0], maps[1]) > 5


@real_data
@pytest.mark.parametrize("alignment", ["letterbox", "network"])
def test_alignments(drawn, real, alignment):
    run = drawn(featmap_tool, "--target-layers", "neck", "--alignment", alignment)
    assert {name for name, _ in run.boxes} >= {"bicycle", "dog"}
    assert [sizes(note) for note in run.notes] == [
        (64, 52, 52),
        (64, 26, 26),
        (64, 13, 13),
    ]
    if alignment == "letterbox":
        assert run.entry["size"] == [768, 576]
        assert [cell.shape for cell in run.cells] == [(576, 768, 3)] * 4
        assert 0 < differs(run.cells[0], real.image_rgb) < 12
    else:
        assert run.entry["size"] == [416, 416]
        assert [cell.shape for cell in run.cells] == [(416, 416, 3)] * 4
        assert (run.cells[0][316:] == 114).all()
        small = cv2.resize(real.image_rgb, (416, 312))
        assert 0 < differs(run.cells[0][:312], small) < 15
    # On the page, the dog is where it is in the picture.
    scale = np.array([768 / 768, 1.0]) if alignment == "letterbox" else 416 / 768
    dog = run.xyxy[[name for name, _ in run.boxes].index("dog")]
    expected = np.array(DOG_XYXY) * np.resize(scale, 4)
    assert np.abs(dog - expected).max() < 30


@real_data
def test_score_thr_and_cfg_options_say_which_boxes_there_are(drawn):
    few = drawn(featmap_tool, "--target-layers", "neck", "--score-thr", "0.8")
    assert [name for name, _ in few.boxes] == ["bicycle", "dog"]
    assert all(score > 0.8 for _, score in few.boxes)
    many = drawn(featmap_tool, "--target-layers", "neck", "--score-thr", "0.1")
    assert len(many.boxes) > len(FOUND)
    assert all(score > 0.1 for _, score in many.boxes)
    option = ("--cfg-options", "model.test_cfg.score_thr=0.5")
    cut = drawn(featmap_tool, "--target-layers", "neck", "--score-thr", "0.1", *option)
    assert [name for name, _ in cut.boxes] == ["bicycle", "dog", "car"]


# ------------------------------------------------------- boxes, as in the guide


@real_data
def test_each_box_has_a_map_with_its_peak_inside(drawn, real):
    run = drawn(boxam_tool)
    assert [name for name, _ in run.boxes] == FOUND
    scores = [score for _, score in run.boxes]
    assert scores == sorted(scores, reverse=True)
    titles = [f"{name} {score:.2f}" for name, score in run.boxes]
    assert run.titles == ["5 explained boxes", *titles]
    assert [panel.get("box") for panel in run.entry["panels"]] == [None, 0, 1, 2, 3, 4]
    # The image and the joint map above, a panel per box below.
    assert len(run.cells) == 7
    assert [cell.shape for cell in run.cells[:2]] == [(576, 768, 3)] * 2
    assert 0 < differs(run.cells[0], real.image_rgb) < 12
    assert differs(run.cells[1], run.cells[0]) > 20
    size = run.entry["size"]
    for xyxy, map_ in zip(run.xyxy, run.maps[1:]):
        x, y = peak_xy(map_, size)
        assert xyxy[0] < x < xyxy[2]
        assert xyxy[1] < y < xyxy[3]
        weights = map_.astype(float)
        share = weights[inside(xyxy, size, map_.shape)].sum() / weights.sum()
        assert share > 0.5
    x, y = peak_xy(run.maps[1 + FOUND.index("dog")], size)
    assert DOG_XYXY[0] < x < DOG_XYXY[2]
    assert DOG_XYXY[1] < y < DOG_XYXY[3]
    assert np.abs(run.xyxy[FOUND.index("dog")] - DOG_XYXY).max() < 30
    joint = np.maximum.reduce(run.maps[1:])
    assert differs(joint, run.maps[0]) < 2


@real_data
def test_classes_topk_scopes_and_shapes(drawn):
    run = drawn(boxam_tool, "--topk", "2", "--max-shape", "10", "10")
    assert [title.split()[0] for title in run.titles] == ["2", "bicycle", "dog"]
    notes = [note.replace("\u00a0", " ") for note in run.notes[1:]]
    assert ["10 x 10 cells" in note for note in notes] == [True, True]
    # All boxes are drawn nevertheless.
    assert len(run.boxes) == 5
    run = drawn(boxam_tool, "--classes", "dog", "2", "--scope", "class")
    assert run.titles == ["2 explained boxes", "dog (1 box)", "car (1 box)"]
    run = drawn(boxam_tool, "--method", "odam", "--classes", "16", "--scope", "image")
    assert run.titles == ["1 explained box"]
    assert all(note.startswith("odam") for note in run.notes)


@real_data
def test_the_defaults_of_the_guide_look_at_the_last_layer_only(drawn):
    run = drawn(
        boxam_tool, "--method", "gradcam", "--target-layers", "neck.out_convs[2]"
    )
    assert len(run.titles) == 6
    levels = [map_.max() for map_ in run.maps[1:]]
    has_heat = dict(zip(FOUND, [level > 250 for level in levels]))
    silent = {name for name, heat in has_heat.items() if not heat}
    assert silent == {"dog", "car", "potted plant"}
    for name, note in zip(FOUND, run.notes[1:]):
        assert ("no influence on this box; it was made at" in note) == (name in silent)
    x, y = peak_xy(run.maps[1], run.entry["size"])
    bicycle = run.xyxy[0]
    assert bicycle[0] < x < bicycle[2]
    assert bicycle[1] < y < bicycle[3]


@real_data
def test_an_image_without_boxes_is_drawn_and_says_so(drawn):
    run = drawn(boxam_tool, "--score-thr", "0.99")
    assert run.boxes == []
    assert run.titles == []
    assert "0.99" in run.entry["note"]
    assert len(run.cells) == 1


# ---------------------------------------------------------------- sources of images


def small_image(seed: int = 0, hw: tuple[int, int] = (60, 80)) -> np.ndarray:
    spots = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return cv2.resize(spots, hw[::-1], interpolation=cv2.INTER_CUBIC)


def write_small(path: Any, seed: int = 0) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), small_image(seed))


@real_data
def test_images_folders_and_videos_have_names_of_their_own(run, real, capsys):
    paths = [
        "in/a.png",
        "in/a.jpg",
        "in/sub/a.jpg",
        "in/sub/deep/B b.JPG",
        "in/sub_a.bmp",
    ]
    for seed, path in enumerate(paths):
        write_small(path, seed)
    Path("in/notes.txt").write_text("no image")
    (Path("in") / ".hidden").mkdir()
    write_small("other/A.jpg", 9)
    before = {
        path: path.read_bytes() for path in Path("in").rglob("*.*") if path.is_file()
    }
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5, (80, 60))
    for seed in range(3):
        writer.write(small_image(seed))
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
    assert [entry["title"] for entry in entries][-4:] == [
        str(real.image),
        *(f"clip.avi frame {number}" for number in range(3)),
    ]
    assert len({name.lower() for name in names}) == len(names)
    pictures = [f"{name}.jpg" for name in names]
    assert sorted(os.listdir("out")) == sorted([*pictures, "index.html", "index_files"])
    contents = {Path("out", picture).read_bytes() for picture in pictures}
    assert len(contents) == len(names)
    # Inputs are as they were, and nothing lies beside them.
    assert sorted(os.listdir()) == ["clip.avi", "in", "other", "out"]
    assert before == {p: p.read_bytes() for p in Path("in").rglob("*.*") if p.is_file()}
    assert (
        f"{len(names)} pictures in out; open out/index.html" in capsys.readouterr().err
    )
    # What the first run wrote into the folder is no image of the second.
    shutil.move("out", "in/out")
    again = ("--target-layers", "neck", "--out-dir", "in/out")
    assert run(featmap_tool, "in", *real.detector, *again) == 0
    assert len(read_page("in/out")[0]) == len(paths)


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
    message = mistake(run, capsys, featmap_tool, gone + ".jpg", *real.detector)
    assert f"{gone}.jpg" in message
    assert "404" in message
    message = mistake(run, capsys, featmap_tool, real.image, CONFIG, gone + ".pth")
    assert f"{gone}.pth cannot be read" in message
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
    photo = Path("photos/cat.jpg").read_bytes()
    command = (featmap_tool, "photos/sub", *real.detector, "--out-dir", "photos")
    for strength in ("0.5", "1.0"):
        before = {p.name: p.read_bytes() for p in Path("photos").glob("*.jpg")}
        assert run(*command, "--alpha", strength) == 0
        assert sorted(os.listdir("photos")) == [
            *("cat-2.jpg", "cat.jpg", "index.html", "index_files", "sub")
        ]
        ours = Path("photos/cat-2.jpg").read_bytes()
        assert ours != before.get("cat-2.jpg")
        assert [entry["href"] for entry in read_page("photos")[0]] == ["cat-2.jpg"]
    assert Path("photos/cat.jpg").read_bytes() == photo
    Path("photos/index.html").write_text("my home page")
    assert "index.html is not of an earlier run" in mistake(run, capsys, *command)
    assert Path("photos/cat-2.jpg").read_bytes() == ours


# --------------------------------------------------------- windows, previews, layers


@real_data
def test_show_opens_a_window_per_picture_and_writes_nothing(run, real, monkeypatch):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "tkagg")
    monkeypatch.setattr(
        Visualizer, "show", lambda self, *args, **kwargs: shown.append((args, kwargs))
    )
    write_small("small.png")
    options = ("--target-layers", "neck", "--show")
    assert run(featmap_tool, real.image, "small.png", *real.detector, *options) == 0
    assert os.listdir() == ["small.png"]
    assert [kwargs["win_name"] for _, kwargs in shown] == [str(real.image), "small.png"]
    pictures = [args[0] for args, _ in shown]
    assert [len(find_cells(picture)) for picture in pictures] == [4, 4]
    assert differs(find_cells(pictures[0])[0], real.image_rgb) < 12


def rows_of(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Of a printed tree: channels, height, width and stride of each layer's maps."""
    rows: dict[str, list[tuple[int, ...]]] = {}
    pattern = re.compile(
        r"^\s*(?:(?P<path>[a-z_][\w.\[\]]*)\s+\w+)?"
        r"\s+(\d+) x (\d+) x (\d+)\s+(\d+)(?:\s|$)"
    )
    path = ""
    for line in text.splitlines():
        match = pattern.match(line)
        if match:
            path = match["path"] or path
            rows.setdefault(path, []).append(tuple(map(int, match.groups()[1:])))
    return rows


def pyramid(channels: Sequence[int], height: int, width: int) -> list[tuple[int, ...]]:
    """What layers with strides 8, 16 and 32 put out."""
    strides = (8, 16, 32)
    return [(c, height // s, width // s, s) for c, s in zip(channels, strides)]


@real_data
def test_the_preview_needs_no_weights(run, real, capsys):
    args = (real.image, CONFIG, "none.pth", "--preview-model")
    assert run(boxam_tool, *args) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert rows["neck.out_convs[2]"] == [(64, 10, 13, 32)]
    assert "network input 320 x 416" in text
    assert "--target-layers backbone" in text
    assert run(featmap_tool, *args, "--alignment", "letterbox") == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["neck"] == pyramid((64, 64, 64), 416, 416)
    assert os.listdir() == []


def test_list_layers(run, capsys):
    assert run(layers_tool, CONFIG) == 0
    rows = rows_of(capsys.readouterr().out)
    # 480 x 640 in 416 x 416, then to whole cells of 32 pixels.
    assert rows["backbone"] == pyramid((64, 128, 256), 320, 416)
    assert rows["backbone.stage1[0]"] == [(32, 80, 104, 4)]
    assert "backbone.stage1[0].depthwise_conv" not in rows
    assert run(layers_tool, CONFIG, "--size", "640", "480", "--depth", "1") == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["neck"] == pyramid((64, 64, 64), 416, 320)
    assert set(rows) == {"backbone", "neck", "bbox_head"}
    assert run(layers_tool, CONFIG, "--depth", "4", "--all") == 0
    text = capsys.readouterr().out
    assert rows_of(text)["backbone.stage1[0].depthwise_conv"] == [(16, 80, 104, 4)]
    assert "data_preprocessor" in text
    write_small("tall.png")
    assert cv2.imwrite("tall.png", small_image(hw=(90, 30)))
    option = "test_dataloader.dataset.pipeline.1.scale=(192, 192)"
    assert run(layers_tool, CONFIG, "--img", "tall.png", "--cfg-options", option) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["backbone"] == pyramid((64, 128, 256), 192, 64)


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

    def build(*args: Any) -> Any:
        pytest.fail("a detector was built")

    monkeypatch.setattr(_vis_demo, "build_detector", build)


@pytest.fixture
def pixel(tmp_path_factory) -> Path:
    """A small image outside the current folder."""
    path = tmp_path_factory.mktemp("images") / "small.png"
    write_small(path)
    return path


@pytest.fixture
def fake_weights(tmp_path_factory) -> Path:
    """A file that is there; to be told from weights, it must be read."""
    path = tmp_path_factory.mktemp("weights") / "fake.pth"
    path.write_bytes(b"no weights")
    return path


CONFIGS = {
    "broken.py": "a = = 1",
    "empty.py": "model = dict(type='YOLODetector')",
    "typo.py": "from mmengine.config import read_base\n"
    "with read_base():\n    from mmyolo.configs.rtmdet.gone import *",
    "lazy.py": "from mmdet.models.gone import Nothing\nmodel = dict(type=Nothing)\n"
    "test_pipeline = [dict(type='LoadImageFromFile')]",
    "fails.py": "raise RuntimeError('two\\nlines')",
    "step.py": "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Nope')]\n"
    "model = dict(type='mmdet.FCOS')",
}


def test_mistakes_show_before_the_network_is_built(
    run, capsys, pixel, fake_weights, tmp_path_factory, monkeypatch
):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    other = tmp_path_factory.mktemp("other")
    (other / "text.jpg").write_text("no image")
    (other / "nothing").mkdir()
    (other / "folder.jpg").mkdir()
    (other / "video.mp4").write_text("no video")
    for name, text in CONFIGS.items():
        (other / name).write_text(text + "\n")

    def fails(
        *words: Any,
        img: Any = pixel,
        config: Any = CONFIG,
        weights: Any = fake_weights,
        tool: ModuleType = featmap_tool,
    ) -> str:
        return mistake(run, capsys, tool, img, config, weights, *words)

    # In this order; all but the last fail before there is a network.
    assert "gone.jpg" in fails(img="gone.jpg")
    assert "text.jpg is no image" in fails(img=other / "text.jpg")
    assert "nothing holds no image" in fails(img=other / "nothing")
    assert "video.mp4 is no video" in fails(img=other / "video.mp4")
    assert "no config file gone.py" in fails(config="gone.py")
    assert "broken.py cannot be read" in fails(config=other / "broken.py")
    assert "yolov5/gone.py" in fails(config="mmyolo::yolov5/gone.py")
    assert "no test pipeline" in fails(config=other / "empty.py")
    assert "no checkpoint gone.pth" in fails(weights="gone.pth")
    assert "cuda:99" in fails("--device", "cuda:99")
    assert "'gpu'" in fails("--device", "gpu")
    assert "--show opens windows, and this machine has no display" in fails("--show")
    assert "alpha=2.0" in fails("--alpha", "2")
    assert "score_thr=7.0" in fails("--score-thr", "7")
    assert "jett" in fails("--colormap", "jett")
    # Root may write anywhere, but not below a file.
    below = fake_weights / "below"
    for option in (("--out-dir", below), ("--out-file", below / "x.jpg")):
        assert f"cannot write to the folder {below}" in fails(*option)
    assert "its suffix must say the format" in fails("--out-file", "picture.tmp")
    assert "is a folder" in fails("--out-file", other / "folder.jpg")
    channels = ("--channel-reduction", "None", "--topk", "5", "--arrangement", "2", "2")
    message = fails(*channels)
    assert "topk=5" in message
    assert "arrangement=(2, 2)" in message
    message = fails("--method", "ablationcamm", tool=boxam_tool)
    assert "did you mean 'ablationcam'" in message
    drise = ("--method", "drise", "--target-layers", "neck")
    assert "looks at no layer" in fails(*drise, tool=boxam_tool)
    assert "topk=-3" in fails("--topk", "-3", tool=boxam_tool)
    assert "batch_size=0" in fails("--batch-size", "0", tool=boxam_tool)
    assert os.listdir() == []
    # The layers are looked at before the weights, which would fail.
    message = fails("--target-layers", "backbone.stage5", tool=boxam_tool)
    assert "'backbone.stage5' is not a layer" in message
    assert "near matches: backbone.stage4" in message
    assert str(fake_weights) in fails()
    two = (featmap_tool, pixel, pixel, CONFIG, fake_weights, "--out-file", "x.jpg")
    message = mistake(run, capsys, *two)
    assert "there are 2" in message
    assert "--out-dir" in message


@pytest.mark.parametrize("name", ["typo.py", "lazy.py", "fails.py", "step.py"])
def test_whatever_a_config_raises_is_one_line_in_every_program(
    run, capsys, pixel, fake_weights, tmp_path_factory, name
):
    path = tmp_path_factory.mktemp("configs") / name
    path.write_text(CONFIGS[name] + "\n")
    said = [
        mistake(run, capsys, layers_tool, path),
        *(
            mistake(run, capsys, tool, pixel, path, fake_weights)
            for tool in (featmap_tool, boxam_tool)
        ),
    ]
    reasons = {"typo.py": "gone", "lazy.py": "gone", "fails.py": "two lines"}
    for message in said:
        # What comes first in step.py is the model here and the pipeline there.
        assert re.search(reasons.get(name, "FCOS|Nope"), message)
        assert str(path) in message or "model=" in message


def test_mistakes_of_list_layers(run, capsys, monkeypatch):
    def fails(*args: Any) -> str:
        return mistake(run, capsys, layers_tool, *args)

    assert "no config file none.py" in fails("none.py")
    assert "--size" in fails(CONFIG, "--size", "0", "5")
    assert "--depth 0" in fails(CONFIG, "--depth", "0")
    assert "gone.jpg" in fails(CONFIG, "--img", "gone.jpg")
    assert "after '::' comes a path" in fails("nope::yolov8/a.py")
    settings = (CONFIG, "--cfg-options")
    message = fails(*settings, "test_pipeline.99.scale=1")
    assert "--cfg-options does not fit the config" in message
    assert "model='Nope' cannot be built" in fails(*settings, "model.type=Nope")
    assert run(layers_tool, *settings, "word") == 2
    assert "takes KEY=VALUE, not 'word'" in capsys.readouterr().err
    monkeypatch.setenv("MMYOLO_VIS_TRACEBACK", "1")
    assert run(layers_tool, "none.py") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_weights_of_another_architecture(
    run, capsys, pixel, tmp_path_factory, monkeypatch
):
    folder = tmp_path_factory.mktemp("other_weights")
    weights = build_detector(CONFIG, "cpu").state_dict()
    other = folder / "other.pth"
    torch.save({f"other.{key}": value for key, value in weights.items()}, other)
    message = mistake(run, capsys, featmap_tool, pixel, CONFIG, other)
    assert f"{other} is of another architecture than the config: 0 of 538" in message
    assert "missing backbone." in message

    said: list[str] = []
    monkeypatch.setattr(
        "mmyolo_vis_hooks.checkpoint.print_log", lambda text, **_: said.append(text)
    )
    config = Config.fromfile(CONFIG)
    config.model.bbox_head.head_module.num_classes = 3
    torch.save(build_detector(config, "cpu").state_dict(), folder / "three_classes.pth")
    args = (pixel, CONFIG, folder / "three_classes.pth", "--out-dir", folder / "out")
    assert run(featmap_tool, *args) == 0
    [line] = said
    assert "532 of 538 weights fit; shapes" in line
    assert "multi_level_conv_cls.0.weight (3, 64, 1, 1) instead of (80," in line


@real_data
def test_an_option_that_suits_no_image_is_said_once(run, real, capsys):
    write_small("in/a.png")
    write_small("in/b.png", 1)
    channels = ("--channel-reduction", "None", "--topk", "-1", "--out-dir", "out")
    assert run(featmap_tool, "in", *real.detector, *channels) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: layer 'backbone[0]': topk=-1")
    assert not Path("out/index.html").exists()


@real_data
def test_a_corrupt_image_stops_no_other(run, real, capsys):
    for seed, name in enumerate("abd"):
        write_small(f"in/{name}.png", seed)
    Path("in/c.png").write_bytes(Path("in/a.png").read_bytes()[:60])
    Path("in/0.png").write_bytes(b"")
    assert run(boxam_tool, "in", *real.detector, "--out-dir", "out") == 1
    entries, _ = read_page("out")
    assert [entry["name"] for entry in entries] == ["a", "b", "d"]
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
    process = start("featmap_vis_demo.py", *real.all, "--target-layers", "backbone")
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
