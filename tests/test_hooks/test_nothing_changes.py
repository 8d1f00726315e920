"""A run with the hook is bit by bit the run without it."""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import TRANSFORMS, BaseTransform
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend
from torch import nn
from torch._dynamo.utils import counters

from mmyolo_vis_hooks import BoxAMVisHook
from mmyolo_vis_hooks.publish import publisher
from tests.test_hooks.helpers import (
    box_spy,
    end_workers,
    log_of,
    pictures,
    spy,
    vis_hooks,
)
from tests.toy import LETTERBOX, toy_config
from tests.toy_boxes import box_config

ALIGNMENTS = ("resize", "letterbox", "network")

VARIANTS = dict(
    plain={},
    ema=dict(custom=[dict(type="EMAHook", ema_type="ExponentialMovingAverage",
                          momentum=0.1, priority=49)]),
    workers=dict(num_workers=1),
    amp=dict(
        optim_wrapper=dict(
            type="CpuAmpOptimWrapper",
            optimizer=dict(type="SGD", lr=0.01, momentum=0.9),
        ),
        val_cfg=dict(fp16=True),
    ),
)  # fmt: skip


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU; MMEngine's own wrapper demands a GPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


@HOOKS.register_module()
class WatchHook(Hook):
    """Notes the state of the model around every validation, after all hooks."""

    priority = "LOWEST"

    def __init__(self):
        self.notes = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._note(runner)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self._note(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.notes.append(outputs["loss"].item())

    def _note(self, runner):
        model = runner.model
        self.notes.append(
            (
                [m.training for m in model.modules()],
                [p.requires_grad for p in model.parameters()],
                [None if p.grad is None else p.grad.sum().item()
                 for p in model.parameters()],
                [buffer.double().sum().item() for buffer in model.buffers()],
                torch.get_rng_state().sum().item(),
                np.random.get_state()[1:3],
                hash(random.getstate()),
            )
        )  # fmt: skip


def hooks_left(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or "val_step" in vars(module)
        or "test_step" in vars(module)
    ]


@TRANSFORMS.register_module()
class DrawNumbers(BaseTransform):
    """Draws random numbers, as a flip does also where it never flips."""

    def transform(self, results):
        random.random()
        np.random.rand()
        torch.rand(())
        return results


def train(work_dir, toy_data, *vis_hooks, custom=(), before=None, **options):
    options["geometry"] = (*LETTERBOX, dict(type="DrawNumbers"))
    hooks = [dict(type="WatchHook"), *custom, *vis_hooks]
    cfg = box_config(work_dir, hooks, data_root=toy_data, **options)
    runner = Runner.from_cfg(cfg)
    if before is not None:
        before(runner)
    runner.train()
    if options.get("num_workers"):
        end_workers(runner)
    (watch,) = [h for h in runner.hooks if isinstance(h, WatchHook)]
    checkpoint = torch.load(work_dir / "epoch_2.pth", weights_only=False)
    metrics = [
        {k: v for k, v in json.loads(line).items() if "time" not in k}
        for path in work_dir.rglob("vis_data/scalars.json")
        for line in path.read_text().splitlines()
    ]
    return runner, watch.notes, checkpoint, metrics


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(np.all(a == b))


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory, toy_data):
    """Each variant without a hook, run once."""
    found = {}

    def get(variant):
        if variant not in found:
            work_dir = tmp_path_factory.mktemp(f"plain_{variant}")
            found[variant] = train(work_dir, toy_data, **VARIANTS[variant])
        return found[variant]

    return get


def assert_same_run(runner, notes, checkpoint, metrics, plain_run):
    _, plain_notes, plain_checkpoint, plain_metrics = plain_run
    assert hooks_left(runner.model) == []
    assert same(notes, plain_notes)
    for key in ("state_dict", "optimizer", "ema_state_dict"):
        assert same(checkpoint.get(key, {}), plain_checkpoint.get(key, {})), key
    assert metrics[-1]["coco/bbox_mAP"] > 0.05
    assert metrics == plain_metrics


def both(alignment: str) -> list[dict]:
    options = dict(alignment=alignment, num_images=3)
    return [spy(**options), box_spy(**options)]


ERRORS = [dict(type="ErrorVisHook", on_error="raise", num_images=2, score_thr=0.2)]
MEASURED = [box_spy(num_images=2, topk=1, metrics=["energy", "inside"])]
WAYS = [
    dict(method="drise", num_masks=16),
    dict(method="ablationcam"),
    dict(method="evidence"),
    dict(method="shapleycam", aug_smooth=True),
]


@pytest.mark.parametrize(
    ("variant", "hooks", "logs"),
    [
        *(("plain", both(alignment), "") for alignment in ALIGNMENTS),
        *(("plain", [box_spy(num_images=2, **options)], "") for options in WAYS),
        ("ema", both("resize"), ""),
        ("workers", both("letterbox"), ""),
        ("amp", both("network"), ""),
        ("amp", both("resize"), ""),
        ("ema", ERRORS, "errors/hits"),
        ("amp", ERRORS, "errors/hits"),
        ("amp", MEASURED, "boxam/inside"),
    ],
)
def test_training_is_bit_identical(
    tmp_path, toy_data, plain_runs, variant, hooks, logs
):
    runner, notes, checkpoint, metrics = train(
        tmp_path, toy_data, *hooks, **VARIANTS[variant]
    )
    # The hooks did draw, explain and log.
    assert len(pictures(tmp_path)) == 2 * sum(hook["num_images"] for hook in hooks)
    for hook in vis_hooks(runner):
        if isinstance(hook, BoxAMVisHook):
            assert any(e.maps for s in hook.samples for e in s.explanations)
    assert not logs or logs in metrics[-1]
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(("errors/", "boxam/"))}
        for line in metrics
    ]
    assert_same_run(runner, notes, checkpoint, metrics, plain_runs(variant))


@VISBACKENDS.register_module()
class SlowBackend(BaseVisBackend):
    """Takes its time for the first picture."""

    experiment = None
    count = 0

    def _init_env(self):
        pass

    def add_image(self, name, image, step=0, **kwargs):
        self.count += 1
        if self.count == 1:
            time.sleep(0.5)


@VISBACKENDS.register_module()
class DyingBackend(SlowBackend):
    """Loses its server after three pictures."""

    def add_image(self, name, image, step=0, **kwargs):
        self.count += 1
        if self.count > 3:
            raise BrokenPipeError(32, "Broken pipe")


def fail_to_draw(runner: Runner) -> None:
    for hook in vis_hooks(runner):
        hook.build_panel = lambda class_names, palette: lambda sample: 1 / 0


def forbid_pictures(runner: Runner) -> None:
    # Not by its mode: whoever may do anything can write to it all the same.
    (Path(runner.log_dir) / "vis_data" / "vis_image").write_text("no folder")


FAULTS = {
    "a backend that hangs": ("SlowBackend", None, 8, "waiting for SlowBackend"),
    "a backend that dies": ("DyingBackend", None, 8, "2 x BrokenPipeError"),
    "a panel": (None, fail_to_draw, 0, "x ZeroDivisionError"),
    "the folder": (None, forbid_pictures, 0, "4 x PublishError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_changes_a_training(
    tmp_path, toy_data, plain_runs, monkeypatch, fault
):
    backend, break_something, num_pictures, says = FAULTS[fault]
    monkeypatch.setattr(publisher, "PATIENCE", 0.05)
    names = [backend] * (backend is not None) + ["LocalVisBackend"]
    options = dict(num_images=2, on_error="log")
    runner, *found = train(
        tmp_path,
        toy_data,
        spy(**options),
        box_spy(**options),
        vis_backends=[dict(type=name) for name in names],
        before=break_something,
    )
    assert len(pictures(tmp_path)) == num_pictures
    assert says in log_of(tmp_path)
    assert_same_run(runner, *found, plain_runs("plain"))


def compile_parts(runner: Runner) -> None:
    torch._dynamo.reset()
    counters.clear()
    for part in (runner.model.backbone, runner.model.neck):
        part.compile(backend="eager")


INSIDE = dict(target_layers=["backbone.stages[3]", "neck.maps"], num_images=3)


def test_layers_inside_compiled_parts_are_drawn(tmp_path, toy_data):
    """By a forward of our own: the loop's is neither seen into nor compiled anew."""
    drawn = []
    for compiled in (False, True):
        hooks = [spy(alignment=a, name=a, **INSIDE) for a in ALIGNMENTS[1:]]
        work_dir = tmp_path / str(compiled)
        cfg = box_config(work_dir, hooks, data_root=toy_data, batch_size=1)
        runner = Runner.from_cfg(cfg)
        if compiled:
            compile_parts(runner)
        runner.test()
        drawn.append(pictures(work_dir))
    assert len(drawn[0]) == 6
    assert same(*drawn)
    assert counters["frames"] == {"total": 2, "ok": 2}  # as without hooks


@pytest.mark.nightly
def test_compiled_parts_are_trained_as_without_hooks(tmp_path, toy_data):
    options = dict(toy_data=toy_data, before=compile_parts)
    plain = train(tmp_path / "plain", **options)
    frames = dict(counters["frames"])
    hooks = [spy(alignment="letterbox", **INSIDE), box_spy(alignment="letterbox")]
    runner, *found = train(
        tmp_path / "drawn", options.pop("toy_data"), *hooks, **options
    )
    assert len(pictures(tmp_path / "drawn")) == 6 + 8
    assert_same_run(runner, *found, plain)
    assert counters["frames"] == frames


def test_persistent_workers_keep_the_loops_own_pipeline(tmp_path, toy_data):
    hook = spy(num_images=-1, target_layers=["brightness"])
    cfg = toy_config(
        tmp_path, [hook, dict(type="ShapeHook")], data_root=toy_data, num_workers=2
    )
    assert cfg.val_dataloader.persistent_workers
    runner = Runner.from_cfg(cfg)
    runner.train()
    end_workers(runner)
    (shapes,) = [h for h in runner.hooks if isinstance(h, ShapeHook)]
    assert shapes.seen == {(128, 128)}  # letterboxed, in both validations
    assert len(pictures(tmp_path)) == 12


@HOOKS.register_module()
class ShapeHook(Hook):
    """Notes the shapes of the images that the loop's pipeline gives."""

    def __init__(self):
        self.seen = set()

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen |= {tuple(image.shape[1:]) for image in data_batch["inputs"]}


def test_ema_weights_are_explained(tmp_path, toy_data):
    """The map is that of the averaged weights, not of the training's."""
    cfg = box_config(
        tmp_path,
        [dict(type="EMAHook", momentum=0.5, priority=49), box_spy(num_images=1)],
        data_root=toy_data,
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)),
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    (hook,) = vis_hooks(runner)
    drawn = hook.samples[-1]
    checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    ema_hook = next(h for h in runner.hooks if type(h).__name__ == "EMAHook")
    for name in ("before_val_epoch", "after_val_epoch"):
        setattr(ema_hook, name, lambda *args, **kwargs: None)

    def explained_with(state_dict):
        runner.model.load_state_dict(state_dict)
        hook.samples.clear()
        runner.val()
        return hook.samples[0]

    trained = {
        key.replace("module.", ""): value
        for key, value in checkpoint["ema_state_dict"].items()
        if key != "steps"
    }
    again = explained_with(checkpoint["state_dict"])
    other = explained_with(trained)
    assert drawn.explanations[0].maps
    for sample, is_same in ((again, True), (other, False)):
        scores = sample.detections.scores
        assert np.array_equal(scores, drawn.detections.scores) == is_same
        found, expected = (s.explanations[0].maps[0] for s in (sample, drawn))
        assert np.array_equal(found.saliency, expected.saliency) == is_same


def test_the_forward_runs_under_the_loops_autocast(tmp_path, toy_data):
    dtypes = {}
    for fp16 in (False, True):
        cfg = toy_config(
            tmp_path / str(fp16),
            [spy(num_images=1)],
            data_root=toy_data,
            test_cfg=dict(fp16=fp16),
        )
        runner = Runner.from_cfg(cfg)
        runner.test()
        sample = vis_hooks(runner)[0].samples[0]
        dtypes[fp16] = sample.activations[0].feature_map.dtype
        assert len(pictures(tmp_path / str(fp16))) == 1
    assert dtypes[False] == torch.float32
    assert dtypes[True] in (torch.bfloat16, torch.float16)
