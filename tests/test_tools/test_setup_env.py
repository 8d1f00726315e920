"""Making and recognising the environment; pip and torch are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import setup_env
from mmcv_builder import BuildError
from setup_env import Environment

ROOT = Path(__file__).resolve().parents[2]
PAIR = {"torch": "2.9.0", "torchvision": "0.24.0"}
UNFIT = {"torch": "2.9.0", "error": "operator torchvision::nms does not exist"}
NO_TORCH = {"error": "No module named 'torch'"}


class Fake(Environment):
    """A finished environment whose pip only notes what it is asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.commands: list[str] = []
        self.answers: list[dict[str, str]] = []
        monkeypatch.setattr(setup_env, "ask", lambda *_, **__: self.answers.pop(0))
        self.python.parent.mkdir(parents=True)
        self.python.touch()
        for name in ("pip-23.2", "torch-2.9.0", "opencv_python-4.11.0.86"):
            info = f"lib/python3.11/site-packages/{name}.dist-info"
            (folder / info).mkdir(parents=True)
            (folder / info / "RECORD").touch()

    def pip(self, problem: str, *arguments: str) -> None:
        self.commands.append(" ".join(arguments))


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path / "venv", monkeypatch)


def test_a_stamp_is_believed_while_all_is_there(
    env: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.finish("")
    assert env.is_ready("")
    assert not env.is_ready("torch==2.8.0 torchvision")
    [torch] = env.installed("torch-*")
    torch.with_name("jupyter-1.0.dist-info").mkdir()
    assert env.is_ready("")
    older = torch.rename(torch.with_name("torch-2.8.0.dist-info"))
    assert not env.is_ready("")
    older.rename(torch)
    with monkeypatch.context() as changed:
        (env.folder / "setup.cfg").touch()  # another wish than the checkout's
        changed.setattr(setup_env, "ROOT", env.folder)
        assert not env.is_ready("")
    assert env.is_ready("")
    env.python.unlink()
    assert not env.is_ready("")
    env.stamp.write_text('{"key": ')  # the disk was full
    assert not env.is_ready("")


def test_an_interrupted_install_is_never_taken_for_a_finished_one(
    env: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops the install at each of its steps in turn, then lets it finish."""
    steps = {"provide_torch": [], "provide_packages": None, "run": None, "ask": {}}
    stop_at = {""}

    def step(name: str) -> Any:
        if name in stop_at:
            raise KeyboardInterrupt
        return steps[name]

    for name in steps:
        monkeypatch.setattr(setup_env, name, lambda *_, n=name, **__: step(n))
    arguments = ["--venv", str(env.folder)]
    for name in steps:
        stop_at = {name}
        env.finish("torch==2.8.0")  # of an older install
        assert setup_env.main([*arguments, "--torch", "torch==2.9.0"]) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert not env.is_ready("")
    stop_at = set()
    assert setup_env.main(arguments) == 0
    assert "is ready after" in capsys.readouterr().out
    assert setup_env.main(arguments) == 0
    assert capsys.readouterr().out == ""


def test_a_half_made_environment_is_mended(tmp_path: Path) -> None:
    env = Environment(tmp_path / "venv")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = env.folder / "lib" / version / "site-packages"
    for half in ("pip-1.0.dist-info", "~orch"):
        (site / half).mkdir(parents=True)
    env.stamp.write_text("{}")
    setup_env.provide_venv(env)
    [info] = env.installed("pip-*.dist-info")
    assert (info / "RECORD").exists()
    assert not env.installed("~*")
    subprocess.run([str(env.python), "-m", "pip", "--version"], check=True)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BuildError, match=r"is no virtual environment.*VENV="):
        setup_env.provide_venv(Environment(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("found", "request_", "commands"),
    [
        (PAIR, "", ""),
        (PAIR, "torch==2.4.1 torchvision", "install torch==2.4.1 torchvision"),
        (UNFIT, "", "uninstall -y torchvision, install torch==2.9.0 torchvision"),
        (NO_TORCH, "", f"uninstall -y torch torchvision, install -r {ROOT}/require"),
    ],
)
def test_torch_and_torchvision_are_a_pair(
    found: dict[str, str], request_: str, commands: str, env: Fake
) -> None:
    env.answers = [found, PAIR]
    held = setup_env.provide_torch(env, request_)
    assert held == ["torch==2.9.0", "torchvision==0.24.0"]
    assert ", ".join(env.commands).startswith(commands)
    assert bool(env.commands) == bool(commands)


def test_no_pair_an_old_pair_and_no_disk(
    env: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    env.answers = [UNFIT, UNFIT]
    with pytest.raises(BuildError, match=r"nms does not exist.*TORCH="):
        setup_env.provide_torch(env, "")
    env.answers = [{"torch": "2.2.2", "torchvision": "0.17.2"}]
    assert setup_env.provide_torch(env, "")[-1] == "numpy<2"
    usage = namedtuple("usage", "free")(1e9)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: usage)
    env.answers, env.commands = [NO_TORCH], []
    with pytest.raises(BuildError, match=r"Only 1\.0 GB.*9 GB with a CUDA"):
        setup_env.provide_torch(env, "")
    assert env.commands == []


def test_opencv_without_libgl_becomes_headless(env: Fake) -> None:
    env.answers = [{}]
    setup_env.provide_packages(env, ["torch==2.9.0"])
    assert env.commands[0].startswith("install torch==2.9.0 --requirement=")
    env.answers = [{"error": "ImportError: libGL.so.1"}]
    setup_env.provide_packages(env, ["torch==2.9.0"])
    assert len(env.commands) == 3
    assert env.commands[2].endswith("--no-deps opencv-python-headless==4.11.0.86")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    ours = ("VENV", "PYTHON", "TORCH", "MAKEFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_a_target_installs_first(tmp_path: Path) -> None:
    said = make("-n", "demo", "VENV=/venv", f"PYTHON={sys.executable}").stdout
    install = said.index(f'"{sys.executable}" tools/setup_env.py --venv "/venv"')
    assert install < said.index('"/venv/bin/python" tools/demo.py')


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    done = make("install", f"PYTHON={tmp_path}/none", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "error: Python 3.10 to 3.14 with the venv module is needed" in done.stderr
    assert not (tmp_path / "venv").exists()
