"""Making and recognising the environment; pip and torch are replaced."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmcv_builder.messages import BuildError

ROOT = Path(__file__).resolve().parents[2]
Usage = namedtuple("Usage", "free")


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/setup_env.py with requirement files of its own."""
    path = ROOT / "tools" / "setup_env.py"
    spec = importlib.util.spec_from_file_location("setup_env", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "root"
    (root / "requirements").mkdir(parents=True)
    for name in ("build", "runtime", "tools", "dev", "torch"):
        (root / "requirements" / f"{name}.txt").write_text(f"# {name}\npip>=1\n")
    (root / "setup.cfg").write_text("[options]\n")
    monkeypatch.setattr(module, "ROOT", root)
    return module


class FakeEnvironment:
    """Records what pip is asked for; ``answers`` are the children's, in order."""

    def __init__(
        self, module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        self.env = module.Environment(folder)
        self.commands: list[list[str]] = []
        self.constraints = ""
        self.answers: list[dict[str, Any]] = []
        self.versions: dict[str, str | None] = {"torch": None, "torchvision": None}
        monkeypatch.setattr(module.Environment, "pip", self.pip)
        monkeypatch.setattr(module, "run_json", self.run_json)

    def pip(self, what: str, *arguments: str) -> None:
        self.commands.append(list(arguments))
        if "-c" in arguments:
            path = Path(arguments[arguments.index("-c") + 1])
            self.constraints = path.read_text()

    def run_json(self, code: str, *names: str, **_: Any) -> dict[str, Any]:
        if "metadata.version" in code:
            return {"versions": {name: self.versions.get(name) for name in names}}
        return self.answers.pop(0)


@pytest.fixture
def fake(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> FakeEnvironment:
    (tmp_path / "venv").mkdir()
    fake = FakeEnvironment(setup_env, monkeypatch, tmp_path / "venv")
    # Bound methods take the environment first.
    monkeypatch.setattr(
        setup_env.Environment, "pip", lambda _, *arguments: fake.pip(*arguments)
    )
    return fake


# -- the stamp ---------------------------------------------------------------


@pytest.fixture
def ready(setup_env: ModuleType, tmp_path: Path) -> Any:
    """An environment that is this interpreter's, with a stamp."""
    env = setup_env.Environment(tmp_path / "venv")
    env.python.parent.mkdir(parents=True)
    env.python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    env.python.chmod(0o755)
    env.write_note(
        owned=True,
        state="ready",
        key=setup_env.requirements_key(),
        inventory=env.inventory(),
        torch=None,
    )
    return env


def test_a_stamp_is_believed(setup_env: ModuleType, ready: Any) -> None:
    assert setup_env.is_ready(ready, None)
    assert ready.inventory()["versions"]["pip"]


@pytest.mark.parametrize(
    "change", ["requirement", "setup", "state", "package", "torch", "note", "python"]
)
def test_what_makes_a_stamp_invalid(
    change: str, setup_env: ModuleType, ready: Any
) -> None:
    request = None
    if change == "requirement":
        path = setup_env.ROOT / "requirements" / "dev.txt"
        path.write_text(path.read_text().replace(">=1", ">=2"))
    elif change == "setup":
        (setup_env.ROOT / "setup.cfg").write_text("[options]\nx = 1\n")
    elif change == "state":
        ready.write_note(state="installing")
    elif change == "package":
        inventory = ready.note()["inventory"]
        inventory["versions"]["pip"] = "0.1"
        ready.write_note(inventory=inventory)
    elif change == "torch":
        request = "torch==2.1.2"
    elif change == "note":
        (ready.folder / ".mmyolo_vis_hooks.json").write_text("{half")
    else:
        ready.python.unlink()
    assert not setup_env.is_ready(ready, request)


def test_a_second_call_is_quick_and_silent(tmp_path: Path) -> None:
    """The program itself, on this checkout and this interpreter's packages."""
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "from pathlib import Path\nimport setup_env\n"
        f"env = setup_env.Environment(Path({str(tmp_path)!r}))\n"
        "env.python.parent.mkdir()\n"
        f"env.python.write_text('#!/bin/sh\\nexec {sys.executable} \"$@\"\\n')\n"
        "env.python.chmod(0o755)\n"
        "key, inventory = setup_env.requirements_key(), env.inventory()\n"
        "assert inventory['versions']['mmdet'], inventory\n"
        "assert 'mmcv._ext' not in inventory['missing']\n"
        "env.write_note(state='ready', key=key, inventory=inventory, torch=None)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    command = [sys.executable, "tools/setup_env.py", "--venv", str(tmp_path)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 5


def test_an_interrupted_install_is_never_taken_for_a_finished_one(
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stops the install at each of its steps in turn, then lets it finish."""
    steps = ["provide_venv", "provide_torch", "provide_packages", "provide_opencv"]
    steps += ["call", "pip", "imports"]
    stop_at: list[str] = []
    cleaned: list[int] = []

    def step(name: str, answer: Any = None) -> Any:
        if name in stop_at:
            raise KeyboardInterrupt
        return answer

    full = {"python": "3.11.7 (x)", "versions": {}, "missing": []}
    cls = setup_env.Environment
    for name in steps[:4]:
        monkeypatch.setattr(setup_env, name, lambda *_, n=name: step(n))
    monkeypatch.setattr(setup_env, "call", lambda *_: step("call", 0))
    monkeypatch.setattr(setup_env, "run_json", lambda *_, **__: step("imports", {}))
    monkeypatch.setattr(setup_env, "remove_leftovers", lambda _: cleaned.append(1))
    monkeypatch.setattr(cls, "pip", lambda *_: step("pip"))
    monkeypatch.setattr(cls, "inventory", lambda _: full)
    folder = tmp_path / "venv"
    for name in steps:
        stop_at[:] = [name]
        assert setup_env.main(["--venv", str(folder)]) == 130
        assert "run the same command again" in capsys.readouterr().err
        assert not setup_env.is_ready(cls(folder), None)
        cls(folder).write_note(owned=True)
    assert len(cleaned) == len(steps) - 2  # not before the venv is there
    stop_at.clear()
    assert setup_env.main(["--venv", str(folder)]) == 0
    assert "is ready after" in capsys.readouterr().out
    assert setup_env.main(["--venv", str(folder)]) == 0
    assert capsys.readouterr().out == ""


# -- the virtual environment ---------------------------------------------------


def test_a_real_environment_is_made_and_a_half_made_one_made_anew(
    setup_env: ModuleType, tmp_path: Path
) -> None:
    env = setup_env.Environment(tmp_path / "venv")
    env.folder.mkdir()
    env.write_note(owned=True, state="creating")
    (env.folder / "bin").mkdir()
    env.python.write_text("half a python")
    setup_env.provide_venv(env)
    assert env.has_pip()
    env.write_note(state="installing")
    marker = env.folder / "marker"
    marker.touch()
    setup_env.provide_venv(env)
    assert marker.exists()  # a whole one is left as it is


def test_a_folder_of_somebody_else_is_never_emptied(
    setup_env: ModuleType, tmp_path: Path
) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    with pytest.raises(BuildError, match=r"no virtual environment with pip.*VENV="):
        setup_env.provide_venv(setup_env.Environment(tmp_path))
    assert thesis.read_text() == "mine"


def test_a_python_without_ensurepip(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Debian's python3 without python3-venv."""
    env = setup_env.Environment(tmp_path / "venv")
    env.folder.mkdir()
    monkeypatch.setattr(setup_env.importlib.util, "find_spec", lambda _: None)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with pytest.raises(BuildError, match=f"apt install python{version}-venv"):
        setup_env.provide_venv(env)


def test_an_unsupported_python(setup_env: ModuleType) -> None:
    for version in ("3.9.18", "3.12.1"):
        setup_env.check_python(version, "")
    for version in ("2.7.18", "3.8.18", "3.13.0"):
        with pytest.raises(BuildError, match=rf"Python {version} is not supported"):
            setup_env.check_python(version, "make PYTHON=python3.12")


def test_leftovers_of_an_interrupted_pip(
    setup_env: ModuleType, fake: FakeEnvironment, tmp_path: Path
) -> None:
    whole, half, old = (
        tmp_path / name for name in ("a-1.dist-info", "b-1.dist-info", "~orch")
    )
    for folder in (whole, half, old):
        folder.mkdir()
        (folder / "METADATA").touch()
    for name in ("RECORD", "INSTALLER"):
        (whole / name).touch()
    fake.answers = [{"purelib": str(tmp_path)}]
    setup_env.remove_leftovers(fake.env)
    assert whole.exists()
    assert not half.exists()
    assert not old.exists()


# -- torch and torchvision -----------------------------------------------------

PAIR = {"torch": "2.9.0+cu128", "torchvision": "0.24.0"}


def test_a_working_pair_is_kept(setup_env: ModuleType, fake: FakeEnvironment) -> None:
    fake.answers = [PAIR]
    fake.versions = {"torch": "2.9.0", "torchvision": "0.24.0"}
    assert setup_env.provide_torch(fake.env, None) == fake.versions
    assert fake.commands == []


def test_a_missing_pair_is_asked_for_in_one_command(
    setup_env: ModuleType, fake: FakeEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: Usage(1e11))
    fake.answers = [{"error": "No module named 'torch'"}, PAIR]
    setup_env.provide_torch(fake.env, None)
    requirements = setup_env.ROOT / "requirements" / "torch.txt"
    assert fake.commands == [["install", "-r", str(requirements)]]
    real = (ROOT / "requirements" / "torch.txt").read_text()
    assert "torch>=2.0" in real
    assert "torchvision>=" in real


def test_torchvision_that_does_not_fit_is_replaced_and_torch_stays(
    setup_env: ModuleType, fake: FakeEnvironment
) -> None:
    broken = {"torch": "2.9.0", "broken": "operator torchvision::nms does not exist"}
    fake.answers = [broken, PAIR]
    fake.versions = {"torch": "2.9.0", "torchvision": "0.20.0"}
    setup_env.provide_torch(fake.env, None)
    assert fake.commands == [
        ["uninstall", "-y", "torchvision"],
        ["install", "torch==2.9.0", "torchvision"],
    ]


def test_a_pair_that_was_asked_for(
    setup_env: ModuleType, fake: FakeEnvironment
) -> None:
    fake.answers = [PAIR, PAIR]
    fake.versions = {"torch": "2.9.0", "torchvision": "0.24.0"}
    setup_env.provide_torch(fake.env, "torch==2.1.2 torchvision==0.16.2")
    assert fake.commands == [["install", "torch==2.1.2", "torchvision==0.16.2"]]


def test_a_pair_that_stays_broken_ends_with_words(
    setup_env: ModuleType, fake: FakeEnvironment
) -> None:
    broken = {"torch": "2.9.0", "broken": "operator torchvision::nms does not exist"}
    fake.answers = [broken, broken]
    fake.versions = {"torch": "2.9.0", "torchvision": "0.20.0"}
    with pytest.raises(BuildError, match=r"nms does not exist.*TORCH="):
        setup_env.provide_torch(fake.env, None)


def test_too_little_disk(
    setup_env: ModuleType,
    fake: FakeEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.answers = [{"error": "No module named 'torch'"}]
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: Usage(1e9))
    with pytest.raises(BuildError, match=r"Only 1\.0 GB.*9 GB with a CUDA build"):
        setup_env.provide_torch(fake.env, None)
    assert fake.commands == []
    monkeypatch.setattr(setup_env.shutil, "disk_usage", lambda _: Usage(5e9))
    setup_env.check_disk(fake.env.folder)
    assert "warning: 5.0 GB are free" in capsys.readouterr().out


# -- everything else -------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch", "numpy"), [("2.1.2+cu121", True), ("2.2.0", True), ("2.3.0", False)]
)
def test_packages_hold_torch_and_its_numpy(
    torch: str, numpy: bool, setup_env: ModuleType, fake: FakeEnvironment
) -> None:
    setup_env.provide_packages(fake.env, {"torch": torch, "torchvision": "0.16.2"})
    lines = fake.constraints.splitlines()
    assert lines[:2] == [f"torch=={torch}", "torchvision==0.16.2"]
    assert ("numpy<2" in lines) == numpy
    [command] = fake.commands
    files = [Path(a).name for a, b in zip(command[1:], command) if b == "-r"]
    assert files == ["build.txt", "runtime.txt", "tools.txt", "dev.txt"]


def test_opencv_without_libgl_becomes_headless(
    setup_env: ModuleType, fake: FakeEnvironment
) -> None:
    fake.versions = {"opencv-python": "4.11.0.86"}
    fake.answers = [{}]
    setup_env.provide_opencv(fake.env)
    assert fake.commands == []
    fake.answers = [{"error": "ImportError: libGL.so.1"}, {}]
    setup_env.provide_opencv(fake.env)
    [command] = fake.commands
    assert command[-1] == "opencv-python-headless==4.11.0.86"
    assert "--no-deps" in command


def test_requirement_files_name_no_mmcv_and_pin_what_mmengine_needs() -> None:
    texts = {p.name: p.read_text() for p in (ROOT / "requirements").glob("*.txt")}
    lines = [line for text in texts.values() for line in text.splitlines()]
    assert not [line for line in lines if line.startswith("mmcv")]
    assert "setuptools>=64,<81" in texts["build.txt"].splitlines()
    assert "file: requirements/runtime.txt" in (ROOT / "setup.cfg").read_text()


# -- the Makefile ------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("VENV", "PYTHON", "TORCH")}
    env.pop("MAKEFLAGS", None)
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=env
    )


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("demo", "tools/demo.py"),
        ("test", "-m pytest"),
        ("lint", "-m ruff format --check ."),
        ("type", "-m mypy"),
        ("hooks", "-m pre_commit install"),
    ],
)
def test_targets_install_first(target: str, runs: str) -> None:
    done = make("-n", target, "VENV=/some/venv", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    install = f'"{sys.executable}" tools/setup_env.py --venv "/some/venv"'
    assert install in done.stdout
    command = f'"/some/venv/bin/python" {runs}'
    assert done.stdout.index(install) < done.stdout.index(command)


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), str(tmp_path / "none")):
        done = make("install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert "error: Python 3.9 to 3.12" in done.stderr
        assert "python3-venv" in done.stderr
        assert not (tmp_path / "venv").exists()


def test_make_help_lists_every_target() -> None:
    done = make("help")
    text = (ROOT / "Makefile").read_text()
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY"))
    for target in phony.split()[1:]:
        assert f"make {target} " in done.stdout
