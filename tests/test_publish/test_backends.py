"""Every backend keeps every picture: N sent is N found by its own reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from mmengine.runner import Runner

from mmyolo_vis_hooks.publish.backends import adapter_for
from tests import trackers
from tests.test_hooks.helpers import box_spy, log_of, spy
from tests.toy_boxes import box_config

# What each needs to work without an account, and what it is read with.
BACKENDS: dict[str, dict[str, Any]] = {
    "local": dict(type="LocalVisBackend"),
    "tensorboard": dict(type="TensorboardVisBackend"),
    "wandb": dict(type="WandbVisBackend", init_kwargs=dict(mode="offline")),
    "dvclive": dict(
        type="DVCLiveVisBackend",
        init_kwargs=dict(save_dvc_exp=False, cache_images=False),
    ),
    "mlflow": dict(type="MLflowVisBackend", tracking_uri="sqlite:///mlflow.db"),
    "neptune": dict(type="NeptuneVisBackend"),
    "clearml": dict(
        type="ClearMLVisBackend",
        init_kwargs=dict(
            project_name="toy",
            task_name="toy",
            # Its own forks hang in a process that has threads already.
            auto_connect_frameworks=dict(detect_repository=False, pytorch=False),
            auto_resource_monitoring=False,
        ),
    ),
    "aim": dict(
        type="AimVisBackend", init_kwargs=dict(repo=".", capture_terminal_logs=False)
    ),
    "swanlab": dict(type="SwanlabVisBackend", init_kwargs=dict(mode="local")),
}


@pytest.fixture
def backend(request, tmp_path, monkeypatch) -> str:
    """A tracker that is installed, and that finds nothing of its user's."""
    name = request.param
    package = None
    if name != "local":
        package = pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in dict(
        WANDB_SILENT="true", DVC_NO_ANALYTICS="1", MLFLOW_DISABLE_TELEMETRY="true"
    ).items():
        monkeypatch.setenv(variable, value)
    if name == "clearml":
        monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path))
        package.Task.set_offline(True)
    if name == "swanlab":
        import_module("swanlab.integration.mmengine")
    return name


# What these keep in a training and a test is tested in test_publisher.py, too.
AGAIN = ("tensorboard", "wandb")


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in AGAIN else ())
        for name in BACKENDS
    ],
    indirect=True,
)
def test_all_that_is_sent_is_found(backend, tmp_path, toy_data):
    """Each mode, hook, image and step, beside the scalars of MMEngine."""
    cfg = box_config(
        tmp_path / "work" / "run",
        [box_spy(image_indices=[0, 2]), spy(image_indices=[0])],
        data_root=toy_data,
        vis_backends=(BACKENDS[backend],),
        max_epochs=3,
        log_level="INFO",
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    # MMEngine has closed the backends, and these go on.
    runner.test()
    runner.val()
    if backend == "swanlab":
        sys.modules["swanlab"].finish()  # its backend's close does nothing

    reader: Callable[[Path], trackers.Kept] = getattr(trackers, backend)
    found: dict[str, list[int]] = {}
    for tag, step, picture in reader(tmp_path):
        found.setdefault(tag, []).append(step)
        # As some keep it: JPEG, WebP.
        assert picture.width > picture.height > 90
    images = ("boxam/1_image", "boxam/3_image", "featmap/1_image")
    expected = {f"val/{image}": [1, 2, 3, 4] for image in images}
    expected |= {f"test/{image}": [0] for image in images}
    if backend == "wandb":  # it draws boxes by itself, too
        expected |= {f"{tag}/boxes": steps for tag, steps in expected.items()}
    assert {tag: sorted(steps) for tag, steps in found.items()} == expected
    log = log_of(tmp_path / "work")
    assert log.count("Neptune shut its service down") == (backend == "neptune")
    assert "DVCLiveVisBackend: there is no" not in log  # its options are right
    for name, counts in (("boxam", (6, 2, 2)), ("featmap", (3, 1, 1))):
        for count in counts:
            assert f"{name}: {count} picture(s) published" in log


TAG = "val/boxam/7_x"


def stand_in(kind: str, **attributes: Any) -> Any:
    """A backend of a kind that is not installed, which takes every call."""
    return type(kind, (MagicMock,), {})(**attributes)


def test_how_each_tracker_is_told_the_step():
    """What the readers above find, where the trackers are missing."""
    image = np.zeros((4, 5, 3), np.uint8)

    def sent_to(kind: str) -> Any:
        backend = stand_in(kind, _init_kwargs=None)
        assert adapter_for(backend).add(TAG, image, 3)
        return backend

    mlflow = sent_to("MLflowVisBackend").experiment
    mlflow.log_image.assert_called_once_with(image, key=TAG, step=3, synchronous=True)
    dvclive = sent_to("DVCLiveVisBackend")
    dvclive.add_image.assert_called_once_with(f"{TAG}/3", image, 3)
    neptune = sent_to("NeptuneVisBackend").experiment
    neptune.__getitem__.assert_called_once_with(TAG)
    assert neptune[TAG].append.call_args.kwargs == {"step": 3}
    clearml = sent_to("ClearMLVisBackend").experiment.Logger.current_logger()
    clearml.report_image.assert_called_once_with(
        "val/boxam", "7_x", iteration=3, image=image, max_image_history=-1
    )


def test_how_each_tracker_goes_on_after_it_was_closed():
    def reopened(kind: str, **attributes: Any) -> Any:
        backend = stand_in(kind, _env_initialized=True, **attributes)
        adapter = adapter_for(backend)
        adapter.add(TAG, np.zeros((4, 5, 3), np.uint8), 3)
        backend.experiment.active_run.return_value = None
        adapter.reopen()
        return backend

    own = dict(_init_kwargs=dict(project="toy"))
    mlflow = reopened("MLflowVisBackend").experiment
    (run,) = mlflow.start_run.call_args_list
    assert set(run.kwargs) == {"run_id"}
    unused = stand_in("MLflowVisBackend")  # by a training without validation
    adapter = adapter_for(unused)
    unused.experiment.active_run.return_value = None
    adapter.reopen()
    opened = unused._mlflow.active_run.return_value.info.run_id
    unused.experiment.start_run.assert_called_once_with(run_id=opened)
    for kind, going_on in {
        "DVCLiveVisBackend": {"resume": True},
        "ClearMLVisBackend": {"reuse_last_task_id": False},
        "AimVisBackend": {"run_hash": "abc"},
        "NeptuneVisBackend": {},
    }.items():
        backend = reopened(kind, **own, _aim_run=SimpleNamespace(hash="abc"))
        assert backend._env_initialized is False
        assert backend._init_kwargs == {"project": "toy", **going_on}
        own = dict(_init_kwargs=dict(project="toy"))


def test_notices_before_the_run():
    """Only of what the user can change."""

    def notice(kind: str, repository: str | None = None, cache_images: bool = True):
        live = SimpleNamespace(_dvc_repo=repository)
        options = dict(cache_images=cache_images)
        return adapter_for(stand_in(kind, _dvclive=live, _init_kwargs=options)).notice()

    outside = notice("DVCLiveVisBackend")
    assert "dict(save_dvc_exp=False, cache_images=False)" in outside
    assert notice("DVCLiveVisBackend", "a repository") == ""
    assert notice("DVCLiveVisBackend", cache_images=False) == ""
    assert "March 2026" in notice("NeptuneVisBackend")
    assert notice("AimVisBackend") == notice("SwanlabVisBackend") == ""
