"""A failure while drawing is logged and counted, and the run goes on."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend

from mmyolo_vis_hooks.attribution.attribute import BoxMapper
from tests.test_hooks.helpers import box_spy, log_of, pictures, spy, vis_hooks
from tests.test_hooks.test_nothing_changes import hooks_left
from tests.toy import toy_config, write_dataset
from tests.toy_boxes import box_config

ALIGNMENTS = ("resize", "letterbox", "network")


def hook(**options) -> dict:
    return dict(spy(), type="FeatMapVisHook", on_error="log", **options)


def failures(runner: Runner) -> int:
    return vis_hooks(runner)[0]._policy.num_failures


@VISBACKENDS.register_module()
class RaisingBackend(LocalVisBackend):
    """Refuses every picture of every second image."""

    def add_image(self, name, image, step=0, **kwargs):
        if "3_image" in name:
            raise ConnectionError("the tracking server is gone")
        super().add_image(name, image, step)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_raising_backend(tmp_path, toy_data, alignment):
    cfg = toy_config(
        tmp_path,
        [hook(image_indices=[0, 2, 4], alignment=alignment)],
        data_root=toy_data,
        vis_backends=(dict(type="RaisingBackend"),),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert (tmp_path / "epoch_2.pth").exists()
    assert sorted(pictures(tmp_path)) == sorted(
        f"val.featmap.{i}_image_{e}.png" for i in (1, 5) for e in (1, 2)
    )
    assert failures(runner) == 2
    log = log_of(tmp_path)
    assert log.count("Traceback (most recent call last)") == 1
    assert "2 visualization step(s) failed: 2 x ConnectionError" in log
    assert hooks_left(runner.model) == []


def test_raise_ends_the_run_and_leaves_no_hook(tmp_path, toy_data):
    cfg = toy_config(
        tmp_path,
        [spy(image_indices=[2], alignment="letterbox")],
        data_root=toy_data,
        vis_backends=(dict(type="RaisingBackend"),),
    )
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ConnectionError):
        runner.train()
    assert hooks_left(runner.model) == []


@pytest.mark.parametrize("kind", ["truncated", "gone", "text"])
def test_image_that_breaks_between_loading_and_drawing(tmp_path, kind):
    """The loop has its pixels already; the file is damaged when we read it."""
    data_root = tmp_path / "data"
    write_dataset(data_root, extension="jpg")

    @HOOKS.register_module(force=True)
    class DamageHook(Hook):
        priority = "VERY_HIGH"

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            path = data_root / "folder2" / "image.jpg"
            if outputs[0].img_id == 3 and path.exists():
                content = path.read_bytes()
                if kind == "gone":
                    path.unlink()
                elif kind == "truncated":
                    path.write_bytes(content[:40])
                else:
                    path.write_bytes(b"no image at all")

        def after_val_epoch(self, runner, metrics=None):
            write_dataset(data_root, extension="jpg")  # the loop needs it again

    cfg = toy_config(
        tmp_path / "work",
        [dict(type="DamageHook"), hook(image_indices=[0, 2], alignment="letterbox")],
        data_root=data_root,
        batch_size=1,
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert sorted(pictures(tmp_path / "work")) == [
        "val.featmap.1_image_1.png",
        "val.featmap.1_image_2.png",
    ]
    assert failures(runner) == 2
    assert "folder2" in log_of(tmp_path / "work")


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

    cfg = toy_config(
        tmp_path,
        [dict(type="LimitHook", priority="VERY_HIGH"), hook(num_images=3)],
        data_root=toy_data,
    )
    runner = Runner.from_cfg(cfg)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        runner.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = pictures(tmp_path)  # all that is there decodes
    assert [name for name in found if name.endswith("_2.png")] == [
        f"val.featmap.{i}_image_2.png" for i in (1, 3, 6)
    ]
    lost = 3 - sum(name.endswith("_1.png") for name in found)
    assert lost > 0
    assert failures(runner) == lost
    assert "look at the free space" in log_of(tmp_path)
    assert (tmp_path / "epoch_2.pth").exists()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_layer_whose_output_is_no_map(tmp_path, toy_data, alignment):
    """It shows in the forward only, and the forward must go on."""
    cfg = toy_config(
        tmp_path, [hook(alignment=alignment, num_images=2)], data_root=toy_data
    )
    runner = Runner.from_cfg(cfg)
    runner.model.neck.register_forward_hook(
        lambda module, args, output: (output[0], output[1][:, 0, 0, 0])
    )
    own = vis_hooks(runner)[0]
    layers = ("neck.out_layers[0]", "head", "neck.shared")
    own.options = replace(own.options, target_layers=layers)

    def broken_select(tensor, keep):
        raise torch.cuda.OutOfMemoryError("no memory left")

    import mmyolo_vis_hooks.network.recorder as recorder

    original = recorder._select
    recorder._select = broken_select
    try:
        metrics = runner.test()
    finally:
        recorder._select = original
    assert metrics["coco/bbox_mAP"] > 0
    assert failures(runner) == 2
    assert "no memory left" in log_of(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("a layer failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_nothing_stays_attached_after_a_failing_forward(
    tmp_path, toy_data, alignment, error
):
    """Ctrl-C and a failing layer in the loop's own forward."""
    cfg = toy_config(
        tmp_path, [hook(num_images=-1, alignment=alignment)], data_root=toy_data
    )
    runner = Runner.from_cfg(cfg)
    runner.model.fail_at = 3 + 1  # three iterations of training, then validation
    runner.model.fail_with = error
    with pytest.raises(type(error)):
        runner.train()
    assert hooks_left(runner.model) == []


def test_failing_layer_in_our_own_forward_ends_nothing(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [hook(num_images=2)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.model.fail_at = 2  # the loop's first forward, then ours
    metrics = runner.test()
    assert metrics["coco/bbox_mAP"] > 0
    assert failures(runner) == 1
    assert len(pictures(tmp_path)) == 1
    assert hooks_left(runner.model) == []


def test_ctrl_c_in_our_own_forward_ends_the_run_in_order(tmp_path, toy_data):
    cfg = toy_config(tmp_path, [hook(num_images=2)], data_root=toy_data)
    runner = Runner.from_cfg(cfg)
    runner.model.fail_at = 2
    runner.model.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runner.test()
    assert hooks_left(runner.model) == []


METHODS = ("boxam", "ablationcam", "scorecam", "drise")


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
    hook = box_spy(**options)
    cfg = box_config(work_dir, [hook], data_root=toy_data, batch_size=1)
    runner = Runner.from_cfg(cfg)
    for parameter in runner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    runner.model.neck.requires_grad_(False)
    return runner


def calls_of_the_head(work_dir, toy_data, **options) -> tuple[int, int]:
    """How often a test calls the head: in the trial, and until the first picture."""
    runner = explaining_runner(work_dir, toy_data, **options)
    (vis_hook,) = vis_hooks(runner)
    counts = []
    original = vis_hook._draw_batch

    def draw_batch(*args):
        counts.append(runner.model.bbox_head.num_calls)
        original(*args)
        counts.append(runner.model.bbox_head.num_calls)

    vis_hook._draw_batch = draw_batch
    runner.test()
    return counts[0], counts[1]


@pytest.mark.parametrize("error", [RuntimeError("a layer failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("method", METHODS)
def test_an_explanation_that_is_cut_off_anywhere_leaves_nothing(
    tmp_path, toy_data, method, error
):
    before, after = calls_of_the_head(tmp_path / "calls", toy_data, method=method)
    assert after > before
    calls = range(before + 1, after + 1)
    for call in sorted({*calls[:3], calls[len(calls) // 2], calls[-1]}):
        runner = explaining_runner(tmp_path / f"{call}", toy_data, method=method)
        model = runner.model
        model.bbox_head.fail_at, model.bbox_head.fail_with = call, error
        model.eval()
        state = state_of(model)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                runner.test()
        else:
            runner.test()
        assert model.bbox_head.num_calls >= call
        assert hooks_left(model) == []
        assert state_of(model) == state
        assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no memory"),
        NotImplementedError("no such operator"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_failing_explanation_is_counted_and_the_run_goes_on(
    tmp_path, toy_data, monkeypatch, alignment, error
):
    explain = BoxMapper.explain
    calls = []

    def failing(self, inputs, metainfo):
        calls.append(metainfo["img_id"])
        if len(calls) in (1, 3):
            raise error
        return explain(self, inputs, metainfo)

    monkeypatch.setattr(BoxMapper, "explain", failing)
    runner = explaining_runner(tmp_path, toy_data, alignment=alignment, num_images=4)
    metrics = runner.test()
    assert metrics["coco/bbox_mAP"] > 0.05
    assert len(calls) == 4
    assert failures(runner) == 2
    assert len(pictures(tmp_path)) == 2
    log = log_of(tmp_path)
    assert log.count("Traceback (most recent call last)") == 1
    assert str(error) in log
    assert "2 visualization step(s) failed: 2 x" in log
    assert hooks_left(runner.model) == []


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_failing_explanation_ends_the_run_on_demand(
    tmp_path, toy_data, monkeypatch, alignment
):
    def failing(self, inputs, metainfo):
        raise torch.cuda.OutOfMemoryError("no memory left")

    monkeypatch.setattr(BoxMapper, "explain", failing)
    runner = explaining_runner(
        tmp_path, toy_data, alignment=alignment, on_error="raise"
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        runner.test()
    assert hooks_left(runner.model) == []


def test_the_picture_of_a_broken_backend_is_lost_alone(tmp_path, toy_data):
    cfg = box_config(
        tmp_path,
        [box_spy(image_indices=[0, 2, 4], on_error="log")],
        data_root=toy_data,
        vis_backends=(dict(type="RaisingBackend"),),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert sorted(pictures(tmp_path)) == sorted(
        f"val.boxam.{i}_image_{e}.png" for i in (1, 5) for e in (1, 2)
    )
    assert failures(runner) == 2


def test_nothing_is_written_beside_the_images(tmp_path, toy_data):
    before = set(Path(toy_data).rglob("*"))
    cfg = toy_config(tmp_path, [hook(num_images=2)], data_root=toy_data)
    Runner.from_cfg(cfg).test()
    assert set(Path(toy_data).rglob("*")) == before
