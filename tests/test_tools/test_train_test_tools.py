"""``train.py``, ``test.py`` and their shell scripts, on a few images of digits."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict

import train as train_tool
from _common import ToolError, check_mlflow
from digits_dataset import DigitsOptions, make_dataset
from mmyolo_vis_hooks.checkpoint import load_checkpoint_safely
from tests.test_hooks.helpers import pictures
from tests.test_tools.helpers import ROOT, TOOLS

CONFIG = ROOT / "configs" / "demo" / "yolov8_n_digits.py"
NO_HOOKS = "custom_hooks=[]"  # what they do is not the point, and takes time

# Not by its name: `test` is one of Python's packages.
spec: Any = importlib.util.spec_from_file_location("test_tool", TOOLS / "test.py")
test_tool: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_tool)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tools") / "digits"
    return make_dataset(root, DigitsOptions(num_train=8, num_val=4))


def options(digits: Path, work_dir: Path, *more: str) -> list[str]:
    """Command line that runs the demo's config on few images for one epoch."""
    # MMEngine keeps one logger and one visualizer per name for the whole process.
    name = f"{work_dir.parent.name}_{work_dir.name}"
    settings = [f"visualizer.name={name}", f"experiment_name={name}"]
    for split in ("train", "val", "test"):
        settings += [
            f"{split}_dataloader.dataset.data_root={digits}/",
            f"{split}_dataloader.num_workers=0",
            f"{split}_dataloader.persistent_workers=False",
            f"{split}_dataloader.batch_size=4",
        ]
    for split in ("val", "test"):
        settings += [f"{split}_evaluator.ann_file={digits}/annotations/val.json"]
    settings += ["train_cfg.max_epochs=1", "default_hooks.checkpoint.interval=1"]
    settings += ["param_scheduler=None", "default_hooks.logger.interval=1"]
    return ["--work-dir", str(work_dir), "--cfg-options", *settings, *more]


def losses(work_dir: Path) -> list[float]:
    (log,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> Path:
    """Work dir of one epoch that the script trained, as a user starts it."""
    work_dir = tmp_path_factory.mktemp("trained") / "run"
    command = [sys.executable, str(TOOLS / "train.py"), str(CONFIG)]
    done = subprocess.run(
        [*command, *options(digits, work_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=work_dir.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work_dir


# By the hooks of the demo's config.
DRAWN = {"boxam": 4, "errors": 1, "featmap": 4}


def drawn_by_hook(work_dir: Path, mode: str) -> dict[str, int]:
    """Number of pictures by the name of the hook; all are of one mode."""
    names = [name.split(".") for name in pictures(work_dir)]
    assert {own[0] for own in names} == {mode}
    return dict(sorted(Counter(own[1] for own in names).items()))


def test_train_leaves_checkpoint_log_and_pictures(trained):
    checkpoint = load_checkpoint_safely(trained / "epoch_1.pth")
    assert checkpoint["meta"]["epoch"] == 1
    assert checkpoint["meta"]["iter"] == 2
    assert checkpoint["meta"]["dataset_meta"]["classes"] == tuple("0123456789")
    assert len(losses(trained)) == 2
    assert drawn_by_hook(trained, "val") == DRAWN


def test_test_writes_predictions_pictures_and_results(digits, trained, tmp_path, run):
    out, folder = tmp_path / "predictions.pkl", tmp_path / "run"
    words = ("--out", out, "--show-dir", "boxes", "--deploy", *options(digits, folder))
    assert run(test_tool, CONFIG, trained / "epoch_1.pth", *words) == 0
    predictions = pickle.loads(out.read_bytes())
    assert [p["img_id"] for p in predictions] == [1, 2, 3, 4]
    assert set(predictions[0]["pred_instances"]) == {"bboxes", "scores", "labels"}
    (metrics,) = folder.glob("*/*.json")
    assert "coco/bbox_mAP_50" in json.loads(metrics.read_text())
    shown = sorted(path.name for path in folder.glob("*/boxes/*.png"))
    assert shown == [f"val_{i:04d}.png" for i in range(4)]
    assert drawn_by_hook(folder, "test") == DRAWN


def test_tta_runs_the_views_of_the_config(digits, trained, tmp_path, run):
    out = tmp_path / "predictions.pkl"
    words = ("--tta", "--out", out, "--json-prefix", tmp_path / "results")
    words = (*words, *options(digits, tmp_path / "run"))
    assert run(test_tool, CONFIG, trained / "epoch_1.pth", *words) == 0
    assert len(pickle.loads(out.read_bytes())) == 4
    results = json.loads((tmp_path / "results.bbox.json").read_text())
    assert {result["image_id"] for result in results} <= {1, 2, 3, 4}
    assert drawn_by_hook(tmp_path / "run", "test") == DRAWN


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have AmpOptimWrapper")
def test_amp_trains_on_the_cpu(digits, trained, tmp_path, run):
    words = ("--amp", *options(digits, tmp_path / "amp", NO_HOOKS))
    assert run(train_tool, CONFIG, *words) == 0
    amp, plain = losses(tmp_path / "amp"), losses(trained)
    assert amp == pytest.approx(plain, rel=0.05)
    assert amp != plain
    weights = load_checkpoint_safely(tmp_path / "amp" / "epoch_1.pth")["state_dict"]
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights.values())


def test_resume_continues_where_the_training_stopped(digits, trained, tmp_path, run):
    words = options(digits, tmp_path / "run", "train_cfg.max_epochs=2")
    weights = trained / "epoch_1.pth"
    assert run(train_tool, CONFIG, "--resume", weights, *words) == 0
    again = load_checkpoint_safely(tmp_path / "run" / "epoch_2.pth")
    assert again["meta"]["epoch"] == 2
    assert again["meta"]["iter"] == 4
    assert len(losses(tmp_path / "run")) == 2
    # The pictures' steps go on, too.
    assert {name.rpartition("_")[2] for name in pictures(tmp_path / "run")} == {"2.png"}


def test_what_the_command_line_says_is_in_the_config(run, monkeypatch):
    started = []

    def build(config: Config) -> ConfigDict:
        started.append(config)
        return ConfigDict(train=lambda: None)

    monkeypatch.setattr(train_tool, "build_runner", build)
    assert run(train_tool, CONFIG, "--cfg-options", "randomness.seed=7") == 0
    assert run(train_tool, CONFIG, "--resume", "--work-dir", "somewhere") == 0
    first, second = started
    assert first.work_dir == os.path.join("work_dirs", "yolov8_n_digits")
    assert (first.randomness.seed, first.launcher) == (7, "none")
    # Without a value, --resume takes the last checkpoint.
    assert (second.resume, second.load_from) == (True, None)
    assert second.work_dir == "somewhere"


def test_auto_scale_lr_is_switched_on():
    config = Config({"auto_scale_lr": {"base_batch_size": 16}})
    train_tool.use_auto_scale_lr(config)
    assert config.auto_scale_lr.enable is True
    with pytest.raises(ToolError, match="base_batch_size"):
        train_tool.use_auto_scale_lr(Config({}))


def test_amp_chooses_the_wrapper_of_the_device(monkeypatch):
    def wrapper(device: str, **options: Any) -> dict:
        monkeypatch.setattr(train_tool, "get_device", lambda: device)
        config = Config({"optim_wrapper": options})
        train_tool.use_amp(config)
        return dict(config.optim_wrapper)

    plain = {"type": "OptimWrapper"}
    amp = {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}
    assert wrapper("cuda", **plain) == amp
    assert wrapper("cpu", **plain) == {"type": "CPUAmpOptimWrapper"}
    assert wrapper("cpu", **amp) == {"type": "CPUAmpOptimWrapper"}
    half = {"type": "AmpOptimWrapper", "loss_scale": 512.0}
    assert wrapper("cuda", **half) == half
    with pytest.raises(ToolError, match="DeepSpeedOptimWrapper"):
        wrapper("cuda", type="DeepSpeedOptimWrapper")


def test_tta_gives_detectors_without_a_tta_pipeline_the_mirror_image():
    config = Config.fromfile(
        ROOT / "configs" / "examples" / "faster_rcnn_r50_featmap.py"
    )
    steps = len(config.test_dataloader.dataset.pipeline)
    test_tool.use_tta(config)
    assert config.model.type == "mmdet.DetTTAModel"
    assert config.model.module.type == "FasterRCNN"
    pipeline = config.test_dataloader.dataset.pipeline
    assert len(pipeline) == steps
    flips, (pack,) = pipeline[-1].transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0]
    assert {"flip", "flip_direction", "scale_factor"} <= set(pack.meta_keys)


def test_mistakes_are_named_in_one_line(
    digits, trained, tmp_path, mistake, monkeypatch
):
    train = partial(mistake, train_tool, alone=False)
    test = partial(mistake, test_tool, alone=False)
    weights = trained / "epoch_1.pth"
    assert "no config file none.py" in train("none.py")
    (tmp_path / "wrong.py").write_text("a = = 1\n")
    assert "wrong.py cannot be read" in train(tmp_path / "wrong.py")
    (tmp_path / "empty.py").write_text("a = 1\n")
    assert "no train_dataloader" in train(tmp_path / "empty.py")
    assert "no test_dataloader" in test(tmp_path / "empty.py", weights)
    assert "there is no checkpoint gone.pth" in test(CONFIG, "gone.pth")
    assert "call it .pkl, not a.json" in test(CONFIG, weights, "--out", "a.json")
    nowhere = tmp_path / "empty.py" / "sub"  # below a file
    for option in ("--out", "--json-prefix"):
        words = (CONFIG, weights, option, nowhere / "a.pkl")
        assert f"cannot write to the folder {nowhere}" in test(*words)
    refused = train(CONFIG, "--work-dir", nowhere)
    assert f"cannot write to the folder {nowhere}" in refused
    assert "base_batch_size" in train(CONFIG, "--auto-scale-lr")
    resume = CONFIG, "--resume"
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    whole = load_checkpoint_safely(weights)["state_dict"]
    torch.save({"state_dict": whole}, tmp_path / "weights.pth")
    run = options(digits, tmp_path / "run", NO_HOOKS)
    none_fits = "0 of 297 weights fit"
    assert none_fits in test(CONFIG, tmp_path / "other.pth", *run)
    assert none_fits in train(*resume, tmp_path / "other.pth", *run)
    not_a_state = "not the state of a training"
    assert not_a_state in train(*resume, tmp_path / "weights.pth", *run)
    upper = "train_dataloader.dataset.metainfo.CLASSES=a"
    assert "CLASSES" in train(CONFIG, "--cfg-options", upper)
    (tmp_path / "typo.py").write_text(
        "from mmengine.config import read_base\n"
        "with read_base():\n    from mmyolo.configs.gone import *\n"
    )
    assert "typo.py cannot be read" in train(tmp_path / "typo.py")
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    if sys.platform == "linux":
        assert "no display; use --show-dir" in test(CONFIG, weights, "--show")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        # With the Runner, with the loops, before the run, with the optimizer.
        ("custom_hooks.1.intervall=2", "'intervall'"),
        ("train_dataloader.dataset.ann_file=gone.json", "No such file .*gone.json"),
        ("custom_hooks.1.target_layers=['nek']", "nek.*neck"),
        ("optim_wrapper.optimizer.lrr=1", "TypeError: .*lrr"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(
    digits, tmp_path, mistake, setting, says
):
    run = options(digits, tmp_path / "run", setting)
    assert re.search(says, mistake(train_tool, CONFIG, *run, alone=False))


def test_a_bug_at_run_time_keeps_its_traceback(
    digits, trained, tmp_path, run, monkeypatch
):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("a bug in the user's own head")

    monkeypatch.setattr("mmyolo.models.YOLOv8Head.predict", fail)
    words = options(digits, tmp_path / "run", NO_HOOKS)
    with pytest.raises(KeyError, match="own head"):
        run(test_tool, CONFIG, trained / "epoch_1.pth", *words)


def shell(script: str, *args: object, **env: str) -> subprocess.CompletedProcess:
    """Run a script with `echo` in place of Python, unless `env` names another."""
    return subprocess.run(
        [str(TOOLS / script), *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": "echo", "OMP_NUM_THREADS": "1", **env},
    )


def test_shell_scripts_start_a_process_per_gpu():
    words = shell("dist_train.sh", "a b.py", "4", "--amp").stdout.split()
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert {"--nproc_per_node=4", "--nnodes=1", "--master_port=29500"} <= set(words)
    script = str(TOOLS / "train.py")
    assert words[-6:] == [script, "a", "b.py", "--launcher", "pytorch", "--amp"]
    done = shell("dist_test.sh", "c.py", "w.pth", "2", "--out", "r.pkl", PORT="7")
    words = done.stdout.split()
    assert {"--nproc_per_node=2", "--master_port=7"} <= set(words)
    script = str(TOOLS / "test.py")
    assert words[-7:-2] == [script, "c.py", "w.pth", "--launcher", "pytorch"]
    for script in ("dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"):
        done = shell(script)
        assert done.returncode == 2
        assert "usage:" in done.stderr


@pytest.mark.parametrize("script", ["dist_train.sh", "slurm_test.sh"])
def test_shell_scripts_find_their_folder_where_cd_prints_it(script, srun):
    """As it does of a relative folder that it found through CDPATH."""
    env = {**os.environ, "CDPATH": ".", "PYTHON": "echo", "GPUS": "1"}
    command = ["bash", f"{TOOLS.name}/{script}", "a", "b", "c", "d"]
    run = partial(subprocess.run, capture_output=True, text=True, cwd=TOOLS.parent)
    words = run(command, env=env).stdout.split()
    assert {str(TOOLS / "train.py"), str(TOOLS / "test.py")} & {*words}


SRUN = """#!{python}
import os, subprocess, sys
print(*sys.argv[1:])
at = sys.argv.index("-u") - 1
ranks = range(int(os.environ["GPUS"]))
job = dict(SLURM_NTASKS=str(len(ranks)), SLURM_NODELIST="n1", MASTER_ADDR="localhost")
tasks = []
for rank in map(str, ranks):
    env = dict(os.environ, **job, SLURM_PROCID=rank, SLURM_LOCALID=rank)
    tasks.append(subprocess.Popen(sys.argv[at:], env=env))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def srun(tmp_path, monkeypatch) -> None:
    """A stand-in for Slurm that starts its tasks on this machine."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "srun"
    path.write_text(SRUN.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


def test_slurm_is_asked_for_a_task_per_gpu(srun):
    job = ("gpus", "a job", "c.py")
    done = shell("slurm_train.sh", *job, "out", "--amp", GPUS="16", SRUN_ARGS="-x n1")
    asked, *tasks = done.stdout.splitlines()
    words = "--partition=gpus --job-name=a job --ntasks=16 --ntasks-per-node=8"
    words += " --gres=gpu:8 --cpus-per-task=5 --kill-on-bad-exit=1 -x n1 echo -u"
    end = "c.py --work-dir out --amp --launcher slurm"
    assert asked == f"{words} {TOOLS / 'train.py'} {end}"
    assert len(tasks) == 16
    asked, *_ = shell("slurm_test.sh", *job, "w.pth", GPUS="2").stdout.splitlines()
    assert "--ntasks=2 --ntasks-per-node=2 --gres=gpu:2 " in asked
    assert asked.endswith(f"{TOOLS / 'test.py'} c.py w.pth --launcher slurm")


def assert_ran_on_two_ranks(done: subprocess.CompletedProcess, work_dir, mode) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert drawn_by_hook(work_dir, mode) == DRAWN
    (log,) = work_dir.glob("*/*.log")
    assert "Distributed launcher" in log.read_text()
    assert "GPU number: 2" in log.read_text()


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have NCCL")
def test_without_a_gpu_a_training_runs_on_two_processes(digits, tmp_path):
    work_dir = tmp_path / "run"
    words = (CONFIG, 2, *options(digits, work_dir))
    done = shell("dist_train.sh", *words, PYTHON=sys.executable, PORT=free_port())
    assert_ran_on_two_ranks(done, work_dir, "val")
    assert len(losses(work_dir)) == 1  # two batches, one for each
    assert (work_dir / "epoch_1.pth").exists()


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have NCCL")
def test_without_a_gpu_slurm_tests_on_two_processes(digits, trained, tmp_path, srun):
    work_dir, weights = tmp_path / "run", trained / "epoch_1.pth"
    words = ("cpus", "job", CONFIG, weights, *options(digits, work_dir))
    ranks = dict(GPUS="2", MASTER_PORT=free_port())
    done = shell("slurm_test.sh", *words, PYTHON=sys.executable, **ranks)
    assert_ran_on_two_ranks(done, work_dir, "test")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def test_mlflow_in_plain_files_is_refused_before_the_runner(monkeypatch):
    """MLflow would end the run while the Runner is built, where no hook is yet."""
    backend = dict(type="MLflowVisBackend")
    config = Config(dict(visualizer=dict(vis_backends=[backend])))
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setattr("_common.metadata.version", lambda name: "3.12.9")
    check_mlflow(config)
    monkeypatch.setattr("_common.metadata.version", lambda name: "3.13.0")
    with pytest.raises(ToolError, match=r"MLflow 3\.13\.0 .*tracking_uri='sqlite:///"):
        check_mlflow(config)
    config.visualizer.vis_backends[0].tracking_uri = "sqlite:///mlflow.db"
    check_mlflow(config)
