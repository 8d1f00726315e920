"""A failure while drawing is logged and counted, and the run goes on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend, Visualizer
from PIL import Image

from mmyolo_vis_hooks.attribution.attribute import BoxAttributor
from mmyolo_vis_hooks.errors import VisConfigError
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy import toy_config, write_dataset
from tests.toy_boxes import box_config

ROOT = Path(__file__).resolve().parents[2]


def hook(**options) -> dict:
    return dict(spy(), type="FeatMapVisHook", on_error="log", **options)


def failures(work_dir: Path) -> list[int]:
    """What the closing lines of the runs below a folder count."""
    found = re.findall(r"(\d+) visualization step\(s\) failed", log_of(work_dir))
    return [int(count) for count in found]


@VISBACKENDS.register_module()
class RaisingBackend(LocalVisBackend):
    """Refuses every picture of every second image."""

    def add_image(self, name, image, step=0, **kwargs):
        if "3_image" in name:
            raise ConnectionError("the tracking server is gone")
        super().add_image(name, image, step)


# ---------------------------------------------------------------------- publishing


def test_a_raising_backend_loses_its_picture_alone(tmp_path, toy_data):
    """Of two hooks, each says in a line of its own what it lost."""
    chosen = dict(image_indices=[0, 2, 4], on_error="log")
    hooks = [spy(alignment="letterbox", **chosen), box_spy(**chosen)]
    backends = (dict(type="RaisingBackend"),)
    cfg = box_config(tmp_path, hooks, data_root=toy_data, vis_backends=backends)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert (tmp_path / "epoch_2.pth").exists()
    assert sorted(pictures(tmp_path)) == sorted(
        f"val.{name}.{i}_image_{e}.png"
        for name in ("boxam", "featmap")
        for i in (1, 5)
        for e in (1, 2)
    )
    assert failures(tmp_path) == [2, 2]
    log = log_of(tmp_path)
    for name in ("featmap", "boxam"):
        assert f"{name}: Could not publish val/{name}/3_image through Raising" in log
        assert f"{name}: 2 visualization step(s) failed: 2 x ConnectionError" in log
    assert log.count("Traceback (most recent call last)") == 2
    assert hooks_left(runner.model) == []


def test_a_folder_that_takes_no_picture_is_said_in_one_line(tmp_path, toy_data):
    """Not by its mode: whoever may do anything can write to it all the same."""
    cfg = toy_config(tmp_path, [hook(num_images=3)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    folder = Path(runner.log_dir) / "vis_data" / "vis_image"
    folder.write_text("a file where the folder should be")
    runner.test()
    log = log_of(tmp_path)
    assert log.count("Could not publish") == 1
    (line,) = [line for line in log.splitlines() if "Could not publish" in line]
    assert f"LocalVisBackend did not write {folder}" in line
    assert "permissions of the work dir" in line
    assert failures(tmp_path) == [3]
    assert "Traceback" not in log


@pytest.mark.nightly
def test_a_work_dir_that_takes_nothing_new(tmp_path, toy_data):
    command = [sys.executable, "-m", "tests.read_only_run", str(tmp_path / "work")]
    command.append(str(toy_data))
    if os.geteuid() == 0:  # who may do anything has to give that up
        powers = "-dac_override,-dac_read_search"
        given_up = [f"--bounding-set={powers}", f"--inh-caps={powers}"]
        able = shutil.which("setpriv") and not subprocess.call(
            ["setpriv", *given_up, "true"], stderr=subprocess.DEVNULL
        )
        if not able:
            pytest.skip("needs a setpriv that may give up powers")
        command = ["setpriv", *given_up, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for folder in (tmp_path / "work").rglob("*"):
        if folder.is_dir():
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mAP 0." in done.stdout
    assert failures(tmp_path) == [2, 2]
    assert "permissions of the work dir" in log_of(tmp_path)
    assert pictures(tmp_path) == {}


def test_full_disk(tmp_path, toy_data):
    """With a file-size limit the pictures cannot be written whole."""

    @HOOKS.register_module(force=True)
    class LimitHook(Hook):
        """The disk is full during the first validation only."""

        def before_val_epoch(self, runner):
            if runner.epoch == 1:
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))

        def after_val_epoch(self, runner, metrics=None):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    hooks = [dict(type="LimitHook", priority="VERY_HIGH"), hook(num_images=3)]
    cfg = toy_config(tmp_path, hooks, data_root=toy_data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        Runner.from_cfg(cfg).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = pictures(tmp_path)  # all that is there decodes
    assert [name for name in found if name.endswith("_2.png")] == [
        f"val.featmap.{i}_image_2.png" for i in (1, 3, 6)
    ]
    lost = 3 - sum(name.endswith("_1.png") for name in found)
    assert lost > 0
    assert failures(tmp_path) == [lost]
    assert "look at the free space" in log_of(tmp_path)
    assert (tmp_path / "epoch_2.pth").exists()


@pytest.mark.parametrize(
    ("display", "backend", "says"),
    [("", "tkagg", "this machine has no display"), (":7", "agg", "draws with 'agg'")],
)
def test_show_without_a_window_is_refused(
    tmp_path, toy_data, monkeypatch, display, backend, says
):
    """It would wait for ever for a key that nobody can press."""
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(matplotlib, "get_backend", lambda: backend)
    cfg = box_config(tmp_path, [box_spy(show=True)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(VisConfigError, match=f"show=True .*{says}.*leave show=False"):
        runner.test()


def test_show_opens_windows_and_publishes_nothing(tmp_path, toy_data, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "tkagg")
    shown = []
    monkeypatch.setattr(
        Visualizer, "show", lambda self, image, **options: shown.append(options)
    )
    options = dict(show=True, num_images=2, wait_time=0.5)
    cfg = toy_config(tmp_path, [spy(**options)], data_root=toy_data)
    Runner.from_cfg(cfg).test()
    assert shown == [
        dict(win_name=f"test/featmap/{i}_image", wait_time=0.5) for i in (1, 6)
    ]
    assert pictures(tmp_path) == {}


def test_the_hook_of_mmdetection_may_draw_beside(tmp_path, toy_data):
    cfg = box_config(tmp_path, [spy(num_images=2)], data_root=toy_data)
    cfg.visualizer.type = "mmdet.DetLocalVisualizer"
    cfg.default_hooks.visualization = dict(
        type="mmdet.DetVisualizationHook", draw=True, test_out_dir="boxes", score_thr=0
    )
    Runner.from_cfg(cfg).test()
    assert len(list(tmp_path.glob("*/boxes/*.png"))) == 1  # files of one name
    names = [f"test.featmap.{i}_image_0.png" for i in (1, 6)]
    assert set(names) <= {path.name for path in tmp_path.rglob("*.png")}


# ------------------------------------------------------------------------- drawing


def test_image_that_breaks_between_loading_and_drawing(tmp_path):
    """The loop has its pixels already; the file is damaged when we read it."""
    data_root = tmp_path / "data"
    write_dataset(data_root, extension="jpg")

    @HOOKS.register_module(force=True)
    class DamageHook(Hook):
        priority = "VERY_HIGH"

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            path = data_root / "folder2" / "image.jpg"
            if outputs[0].img_id == 3:
                path.unlink() if runner.epoch == 1 else path.write_bytes(b"no image")

        def after_val_epoch(self, runner, metrics=None):
            write_dataset(data_root, extension="jpg")  # the loop needs it again

    cfg = toy_config(
        tmp_path / "work",
        [dict(type="DamageHook"), hook(image_indices=[0, 2], alignment="letterbox")],
        data_root=data_root,
        batch_size=1,
    )
    Runner.from_cfg(cfg).train()
    assert sorted(pictures(tmp_path / "work")) == [
        "val.featmap.1_image_1.png",
        "val.featmap.1_image_2.png",
    ]
    assert failures(tmp_path / "work") == [2]
    assert "folder2" in log_of(tmp_path / "work")


def test_failing_layer_in_our_own_forward_ends_nothing(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [hook(num_images=2)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.model.fail_at = 3  # the trial, the loop's first forward, then ours
    assert runner.test()["coco/bbox_mAP"] > 0
    assert failures(tmp_path) == [1]
    assert len(pictures(tmp_path)) == 1
    assert hooks_left(runner.model) == []
    # Ctrl-C there ends the run, in order.
    runner.model.num_forwards, runner.model.fail_with = 0, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runner.test()
    assert hooks_left(runner.model) == []


def state_of(model) -> tuple:
    """What an explanation may have changed and must put back."""
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        [{k: v for k, v in vars(m).items() if callable(v)} for m in model.modules()],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.overrides._len_torch_function_stack(),
    )


def explaining_runner(work_dir, toy_data, **options) -> Runner:
    """A model with gradients, some of whose parameters need none."""
    options = dict(dict(num_images=2, num_masks=16, on_error="log"), **options)
    cfg = box_config(work_dir, [box_spy(**options)], data_root=toy_data, batch_size=1)
    runner = Runner.from_cfg(cfg)
    for parameter in runner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    runner.model.neck.requires_grad_(False)
    return runner


@pytest.mark.parametrize(
    "method",
    [
        "boxam",
        "ablationcam",
        "drise",
        pytest.param("evidence", marks=pytest.mark.nightly),
    ],
)
def test_an_explanation_that_is_cut_off_anywhere_leaves_nothing(
    tmp_path, toy_data, monkeypatch, method
):
    """By a failing layer and by Ctrl-C, in the head's first, second, … call."""
    runner = explaining_runner(tmp_path, toy_data, method=method)
    head = runner.model.bbox_head
    runner.test()  # with the trial before the run
    head.num_forwards = 0
    (vis_hook,) = vis_hooks(runner)
    after_iter, counts = vis_hook.after_test_iter, []

    def count_calls(*args, **kwargs):
        counts.append(head.num_forwards)
        after_iter(*args, **kwargs)
        counts.append(head.num_forwards)

    with monkeypatch.context() as patch:
        patch.setattr(vis_hook, "after_test_iter", count_calls)
        runner.test()
    before, after, *_ = counts
    assert after > before
    runner.model.eval()
    state = state_of(runner.model)
    calls = range(before + 1, after + 1)
    errors = (RuntimeError("a layer failed"), KeyboardInterrupt())
    for call in sorted({*calls[:3], calls[len(calls) // 2], calls[-1]}):
        for error in errors:
            head.num_forwards, head.fail_at, head.fail_with = 0, call, error
            try:
                runner.test()
            except KeyboardInterrupt:
                assert error is errors[1]
            assert head.num_forwards >= call
            assert hooks_left(runner.model) == []
            assert state_of(runner.model) == state
            assert all(bool((p.grad == 1).all()) for p in runner.model.parameters())


@pytest.mark.parametrize(
    ("alignment", "error"),
    [
        ("resize", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ("letterbox", torch.cuda.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_a_failing_explanation_is_counted_and_the_run_goes_on(
    tmp_path, toy_data, monkeypatch, alignment, error
):
    explain, calls = BoxAttributor.explain, []

    def failing(self, inputs, metainfo):
        calls.append(metainfo["img_id"])
        if len(calls) in (1, 3):
            raise error
        return explain(self, inputs, metainfo)

    monkeypatch.setattr(BoxAttributor, "explain", failing)
    runner = explaining_runner(tmp_path, toy_data, alignment=alignment, num_images=4)
    before = set(Path(toy_data).rglob("*"))
    assert runner.test()["coco/bbox_mAP"] > 0.05
    assert len(calls) == 4
    assert failures(tmp_path) == [2]
    assert len(pictures(tmp_path)) == 2
    log = log_of(tmp_path)
    assert log.count("Traceback (most recent call last)") == 1
    assert f"2 x {type(error).__name__}: {error}" in log
    assert hooks_left(runner.model) == []
    # Nothing is written beside the images.
    assert set(Path(toy_data).rglob("*")) == before
    vis_hooks(runner)[0]._policy.on_error = "raise"
    calls.clear()
    with pytest.raises(type(error)):
        runner.test()
    assert hooks_left(runner.model) == []


# ------------------------------------------------------------ what is odd, not wrong


def fill(value: float):
    def change(runner: Runner) -> None:
        with torch.no_grad():
            for parameter in runner.model.parameters():
                parameter.fill_(value)

    return change


def find_nothing(runner: Runner) -> None:
    runner.model.bbox_head.test_cfg["score_thr"] = 1.0


@pytest.mark.parametrize(
    ("sizes", "change"),
    [
        (None, fill(float("nan"))),
        (None, fill(float("inf"))),
        (None, find_nothing),
        (((1, 1), (1, 60), (60, 1)), find_nothing),
        pytest.param(((6000, 8000),), None, marks=pytest.mark.nightly),
    ],
    ids=["nan", "inf", "no boxes", "one pixel", "8000x6000"],
)
@pytest.mark.parametrize("alignment", ["resize", "letterbox"])
def test_odd_weights_and_images_are_drawn(tmp_path, toy_data, alignment, sizes, change):
    data_root = toy_data if sizes is None else tmp_path / "data"
    if sizes is not None:
        write_dataset(data_root, sizes)
    options = dict(num_images=3, alignment=alignment, on_error="raise")
    hooks = [spy(**options), box_spy(**options)]
    cfg = box_config(tmp_path / "work", hooks, data_root=data_root, batch_size=1)
    cfg.test_evaluator = []
    runner = Runner.from_cfg(cfg)
    if change is not None:
        change(runner)
    runner.test()
    assert len(pictures(tmp_path / "work")) == 2 * len(sizes or "123")


def test_files_of_every_kind_are_drawn_as_they_look(tmp_path):
    """Grey, 16 bits, a palette, and a photograph that lies on its side."""
    data_root = tmp_path / "data"
    write_dataset(data_root, ((96, 160), (160, 96), (70, 131), (64, 170)))
    files = sorted(data_root.glob("*/image.png"))
    grey, deep, few, turned = (Image.open(file).convert("L") for file in files)
    grey.save(files[0])
    Image.fromarray(np.asarray(deep).astype(np.uint16) * 257).save(files[1])
    few = few.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    few.save(files[2])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    on_its_side = turned.convert("RGB").rotate(90, expand=True)
    on_its_side.save(files[3], "JPEG", quality=95, exif=exif)
    options = dict(num_images=-1, alignment="resize")
    hooks = [spy(**options), box_spy(**options)]
    cfg = box_config(tmp_path / "work", hooks, data_root=data_root, batch_size=1)
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert len(pictures(tmp_path / "work")) == 2 * 4
    for own in vis_hooks(runner):
        for sample, file in zip(own.samples, (grey, deep, few, turned), strict=True):
            expected = np.asarray(file.convert("RGB")).astype(int)
            assert sample.image_rgb.shape == expected.shape
            difference = np.abs(sample.image_rgb - expected)
            assert np.percentile(difference, 95) < 12, sample.image_id


@pytest.mark.parametrize(
    "scenarios",
    [
        [("SIGINT", "drawing"), ("SIGTERM", "writing")],
        pytest.param(
            [("SIGTERM", "drawing"), ("SIGINT", "writing"), ("SIGKILL", "writing")],
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_signal_ends_a_training_and_leaves_what_was_written(
    tmp_path, toy_data, scenarios
):
    """Also inside the backend's own write: a file that has its name is whole."""
    runs = []
    for name, where in scenarios:
        command = [sys.executable, "-m", "tests.interrupted_run"]
        command += [str(tmp_path / name), str(toy_data), name, where]
        runs.append(subprocess.Popen(command, cwd=ROOT))
    for (name, where), run in zip(scenarios, runs):
        assert run.wait(120) == -signal.Signals[name]
        written = [(1, 1), (1, 2), (6, 1)]
        parts = list((tmp_path / name).rglob("vis_image/.*"))
        if where == "writing" and name != "SIGKILL":
            written.append((6, 2))  # what was begun is ended
        assert len(parts) == (name == "SIGKILL")
        for part in parts:
            part.unlink()
        assert sorted(pictures(tmp_path / name)) == [
            f"val.featmap.{i}_image_{epoch}.png" for i, epoch in written
        ]
        for epoch in (1, 2):
            torch.load(tmp_path / name / f"epoch_{epoch}.pth", weights_only=False)
        kinds = {path.suffix for path in (tmp_path / name).rglob("*.*")}
        assert kinds == {".pth", ".png", ".py", ".json", ".log"}
