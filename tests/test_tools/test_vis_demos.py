"""``featmap_vis_demo.py``, ``boxam_vis_demo.py`` and ``list_layers.py`` as a whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import unquote

import cv2
import matplotlib
import numpy as np
import pytest
from mmengine.visualization import Visualizer

import boxam_vis_demo as boxam_tool
import featmap_vis_demo as featmap_tool
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from tests.test_publish.pages import data_of
from tests.test_tools.helpers import CONFIG, TOOLS, write_small

real_data = pytest.mark.real_data

# Measured in the picture by hand, pixels.
DOG_XYXY = (131, 220, 312, 541)
FOUND = ["bicycle", "dog", "car", "truck", "potted plant"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A current folder in which every file is one that the test knows of."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def real(shared_dir: Path) -> SimpleNamespace:
    """The COCO detector and the picture of a dog before a bicycle."""
    image = shared_dir / "data" / "dog.jpg"
    weights = shared_dir / "weights" / "yolox_nano_coco.pth"
    detector, image_rgb = (CONFIG, weights), read_rgb(image)
    return SimpleNamespace(
        image=image, weights=weights, detector=detector, image_rgb=image_rgb
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
            notes=[p["note"].replace("\u00a0", " ") for p in entry["panels"]],
            boxes=[(labels[box[0]], box[1]) for box in entry["boxes"]],
            xyxy=[to_xyxy(box[2], entry["size"]) for box in entry["boxes"]],
            maps=[
                read_grey(f"out/index_files/{entry['name']}.{i}.jpg")
                for i in range(len(entry["panels"]))
            ],
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
    page = data_of(Path(folder) / "index.html")
    for entry in page["entries"]:
        base = Path(folder) / "index_files" / f"{entry['name']}.image.jpg"
        assert base.is_file()
        assert read_rgb(Path(folder) / unquote(entry["href"])).std() > 5
    return page["entries"], [label["name"] for label in page["labels"]]


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


def inside(map_: np.ndarray, xyxy: Sequence[float], size_wh: Sequence[int]) -> Any:
    """Which cells of a map over the whole image have their centre in a box."""
    height, width = map_.shape
    x = (np.arange(width) + 0.5) * size_wh[0] / width
    y = (np.arange(height) + 0.5) * size_wh[1] / height
    columns = (x > xyxy[0]) & (x < xyxy[2])
    rows = (y > xyxy[1]) & (y < xyxy[3])
    return rows[:, None] & columns


@real_data
@pytest.mark.parametrize("alignment", ["letterbox", "network"])
def test_alignments(drawn, real, alignment):
    words = ("--target-layers", "neck", "--score-thr", "0.1", "--alignment", alignment)
    setting = ("--cfg-options", "model.test_cfg.score_thr=0.7")
    run = drawn(featmap_tool, *words, *setting)
    names = [name for name, _ in run.boxes]
    assert names == ["dog", "bicycle"]
    for note, cells in zip(run.notes, (52, 26, 13)):
        assert note.startswith(f"64 channels of {cells} x {cells} cells")
    image = run.cells[0]
    size = [768, 576] if alignment == "letterbox" else [416, 416]
    assert run.size == size
    assert [cell.shape for cell in run.cells] == [(*size[::-1], 3)] * 4
    if alignment == "letterbox":
        assert 0 < differs(image, real.image_rgb) < 12
    else:
        assert (image[316:] == 114).all()
        assert 0 < differs(image[:312], cv2.resize(real.image_rgb, (416, 312))) < 15
    # On the page, the dog is where it is in the picture.
    dog_xyxy = np.array(DOG_XYXY) * run.size[0] / 768
    assert np.abs(run.xyxy[names.index("dog")] - dog_xyxy).max() < 30


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
        within = map_[inside(map_, xyxy, run.size)].astype(float)
        assert within.max() == map_.max()
        assert within.sum() / map_.sum(dtype=float) > 0.5
    assert np.abs(run.xyxy[dog] - DOG_XYXY).max() < 30
    assert differs(np.maximum.reduce(run.maps[1:]), run.maps[0]) < 2


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
    real.detector = config, real.weights
    words = ("--method", "mycam", "--target", "double", "--topk", "1")
    with mock.patch.dict(METHODS), mock.patch.dict(TARGETS):
        run = drawn(boxam_tool, *words)
    assert run.notes[1].startswith("mycam")
    assert "double" in run.notes[1]


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


@real_data
def test_nothing_is_overwritten_that_was_an_input(run, real, mistake):
    shutil.copy(real.image, "dog.jpg")
    content = Path("dog.jpg").read_bytes()
    for image in ("dog.jpg", "."):
        args = (image, *real.detector, "--out-dir", ".")
        assert "give another folder" in mistake(featmap_tool, *args)
    for image in ("dog.jpg", "."):
        args = (image, *real.detector, "--out-file", "./dog.jpg")
        assert "is the image itself" in mistake(featmap_tool, *args)
    assert os.listdir() == ["dog.jpg"]
    assert Path("dog.jpg").read_bytes() == content


@real_data
def test_no_file_of_the_user_is_overwritten(run, real, mistake):
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
    assert "index.html is not of an earlier run" in mistake(*command)
    assert Path("photos/cat-2.jpg").read_bytes() == ours


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
        "index.html",
        "index_files",
    ]
