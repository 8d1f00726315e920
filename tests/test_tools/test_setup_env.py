"""Making and recognising the environment; pip and torch are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import setup_env
from mmcv_builder import BuildError
from setup_env import Environment

ROOT = Path(__file__).resolve().parents[2]
PAIR = {"torch": "2.9.0", "torchvision": "0.24.0"}


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    """A folder that looks like a finished virtual environment."""
    env = Environment(tmp_path / "venv")
    env.python.parent.mkdir(parents=True)
    env.python.touch()
    for name in ("pip-23.2", "torch-2.9.0"):
        folder = env.folder / "lib" / "python3.11" / "site-packages"
        (folder / f"{name}.dist-info").mkdir(parents=True)
        (folder / f"{name}.dist-info" / "RECORD").touch()
    return env


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that pip is given."""
    commands: list[list[str]] = []
    monkeypatch.setattr(
        Environment, "pip", lambda self, problem, *rest: commands.append([*rest])
    )
    return commands


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the environment's Python answers, in order."""

    def answer(*answers: dict[str, str]) -> None:
        rest = [dict(one) for one in answers]
        monkeypatch.setattr(setup_env, "ask", lambda *_, **__: rest.pop(0))

    return answer


# -- the stamp ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["none", "more", "gone", "wishes", "torch", "unfinished", "half", "python"],
)
def test_a_stamp_is_believed_while_all_is_there(
    change: str, env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_env.write_stamp(env, "")
    [torch] = env.installed("torch-*")
    if change == "more":
        torch.with_name("jupyter-1.0.dist-info").mkdir()
    elif change == "gone":
        torch.rename(torch.with_name("torch-2.8.0.dist-info"))
    elif change == "wishes":
        monkeypatch.setattr(setup_env, "ROOT", env.folder)
        (env.folder / "setup.cfg").touch()
    elif change == "unfinished":
        env.stamp.write_text("{}")
    elif change == "half":
        env.stamp.write_text('{"key": ')
    elif change == "python":
        env.python.unlink()
    request = "torch==2.8.0 torchvision" if change == "torch" else ""
    assert env.is_ready(request) == (change in ("none", "more"))


def test_an_interrupted_install_is_never_taken_for_a_finished_one(
    env: Environment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stops the install at each of its steps in turn, then lets it finish."""
    stop_at = ""

    def step(name: str, result: Any = None) -> Callable[..., Any]:
        def do(*_: Any, **__: Any) -> Any:
            if name == stop_at:
                raise KeyboardInterrupt
            return result

        return do

    steps = {"provide_torch": [], "provide_packages": None, "run": None, "ask": {}}
    for name, result in steps.items():
        monkeypatch.setattr(setup_env, name, step(name, result))
    monkeypatch.setattr(Environment, "pip", step("pip"))
    arguments = ["--venv", str(env.folder)]
    for stop_at in [*steps, "pip"]:  # noqa: B007
        setup_env.write_stamp(env, "torch==2.8.0")  # of an older, other install
        assert setup_env.main([*arguments, "--torch", "torch==2.9.0"]) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert not env.is_ready("")
    stop_at = ""
    assert setup_env.main(arguments) == 0
    assert "is ready after" in capsys.readouterr().out
    assert setup_env.main(arguments) == 0
    assert capsys.readouterr().out == ""


# -- the virtual environment ---------------------------------------------------


def test_an_environment_is_made_and_a_half_made_one_mended(tmp_path: Path) -> None:
    env = Environment(tmp_path / "venv")
    env.folder.mkdir()
    setup_env.provide_venv(env)
    [info] = env.installed("pip-*.dist-info")
    (info / "RECORD").unlink()
    (info.parent / "~orch").mkdir()
    setup_env.provide_venv(env)
    assert (info / "RECORD").exists()
    assert not env.installed("~*")
    command = [str(env.python), "-m", "pip", "--version"]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BuildError, match=r"is no virtual environment.*VENV="):
        setup_env.provide_venv(Environment(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# -- what is installed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "request_", "commands"),
    [
        (PAIR, "", []),
        (
            {"error": "No module named 'torch'"},
            "",
            [
                ["uninstall", "-y", "torch", "torchvision"],
                ["install", "-r", str(ROOT / "requirements/torch.txt")],
            ],
        ),
        (
            {"torch": "2.9.0", "error": "operator torchvision::nms does not exist"},
            "",
            [
                ["uninstall", "-y", "torchvision"],
                ["install", "torch==2.9.0", "torchvision"],
            ],
        ),
        (
            PAIR,
            "torch==2.4.1 torchvision==0.19.1",
            [["install", "torch==2.4.1", "torchvision==0.19.1"]],
        ),
    ],
)
def test_torch_and_torchvision_are_a_pair(
    found: dict[str, str],
    request_: str,
    commands: list[list[str]],
    env: Environment,
    pip: list[list[str]],
    answer: Callable[..., None],
) -> None:
    answer(found, PAIR)
    held = setup_env.provide_torch(env, request_)
    assert held == ["torch==2.9.0", "torchvision==0.24.0"]
    assert pip == commands


def test_a_pair_that_stays_broken_and_a_full_disk(
    env: Environment,
    pip: list[list[str]],
    answer: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = {"torch": "2.9.0", "error": "operator torchvision::nms does not exist"}
    answer(broken, broken)
    with pytest.raises(BuildError, match=r"nms does not exist.*TORCH="):
        setup_env.provide_torch(env, "")
    pip.clear()
    usage = namedtuple("usage", "free")(1e9)
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: usage)
    answer({"error": "No module named 'torch'"})
    with pytest.raises(BuildError, match=r"Only 1\.0 GB.*9 GB with a CUDA"):
        setup_env.provide_torch(env, "")
    assert pip == []


def test_an_old_torch_keeps_its_numpy(
    env: Environment, answer: Callable[..., None]
) -> None:
    answer({"torch": "2.2.2", "torchvision": "0.17.2"})
    assert setup_env.provide_torch(env, "")[-1] == "numpy<2"


def test_opencv_without_libgl_becomes_headless(
    env: Environment, pip: list[list[str]], answer: Callable[..., None]
) -> None:
    [torch] = env.installed("torch-*")
    torch.with_name("opencv_python-4.11.0.86.dist-info").mkdir()
    answer({})
    setup_env.provide_packages(env, ["torch==2.9.0"])
    answer({"error": "ImportError: libGL.so.1"})
    setup_env.provide_packages(env, ["torch==2.9.0"])
    assert [command[:2] for command in pip[:2]] == [["install", "torch==2.9.0"]] * 2
    [headless] = pip[2:]
    assert headless[-2:] == ["--no-deps", "opencv-python-headless==4.11.0.86"]


# -- the Makefile ------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    ours = ("VENV", "PYTHON", "TORCH", "MAKEFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("target", "runs"),
    [("demo", "tools/demo.py"), ("test", "-m pytest"), ("type", "-m mypy")],
)
def test_targets_install_first(target: str, runs: str) -> None:
    done = make("-n", target, "VENV=/some/venv", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    install = f'"{sys.executable}" tools/setup_env.py --venv "/some/venv"'
    assert 0 < done.stdout.index(install) < done.stdout.index(f'python" {runs}')


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), str(tmp_path / "none")):
        done = make("install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert "error: Python 3.10 to 3.14" in done.stderr
        assert not (tmp_path / "venv").exists()


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY"))
    listed = make("help").stdout
    assert all(f"make {target} " in listed for target in phony.split()[1:])
