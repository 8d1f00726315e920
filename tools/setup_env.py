#!/usr/bin/env python
"""Makes the virtual environment that the Makefile works in, and checks it.

    python tools/setup_env.py [--venv .venv] [--torch "torch==2.1.2 torchvision"]

It runs under any Python 3.9 to 3.12 with nothing installed. A finished
environment is recognised within a second by a stamp in its folder. An install
that was interrupted leaves no stamp: the next call goes on where it stopped.
A working pair of torch and torchvision that is already there is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcv_builder.cache import file_lock
from mmcv_builder.children import call, pip, run_json, run_logged
from mmcv_builder.messages import BuildError, exit_code, say
from mmcv_builder.registry import pip_failed
from mmcv_builder.versions import MMCV_VERSION

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("build", "runtime", "tools", "dev")
DISK_NEEDED = 2_000_000_000
DISK_FOR_CUDA = 9_000_000_000

PAIR_PROBE = """
import json, torch
torch_version = torch.__version__
try:
    import torchvision
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    print(json.dumps(dict(torch=torch_version, torchvision=torchvision.__version__)))
except (ImportError, RuntimeError, AttributeError) as error:
    print(json.dumps(dict(torch=torch_version, broken=str(error))))
"""

INVENTORY = """
import glob, json, os, sys
from importlib import metadata, util
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = None
mmcv = util.find_spec('mmcv')
folders = list(mmcv.submodule_search_locations) if mmcv else []
missing = [n for n in ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmyolo',
                       'mmyolo_vis_hooks') if util.find_spec(n) is None]
if not any(glob.glob(os.path.join(folder, '_ext.*')) for folder in folders):
    missing.append('mmcv._ext')
print(json.dumps(dict(python=sys.version, versions=versions, missing=missing)))
"""

IMPORTS = """
import json
import cv2, mmcv.ops, mmdet.apis, mmengine, mmyolo.models, numpy, PIL, pytest
import pytorch_grad_cam, rich, sklearn, tensorboard, torch, torchvision, wandb
print(json.dumps({}))
"""


class Environment:
    """A virtual environment and the note in its folder on how far it is.

    The note's ``state`` is 'creating', 'installing' or 'ready'; ``owned`` says
    that this program made the folder and may empty it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        windows = os.name == "nt"
        self.python = folder / ("Scripts/python.exe" if windows else "bin/python")
        self._note = folder / ".mmyolo_vis_hooks.json"
        self.lock = folder / ".mmyolo_vis_hooks.lock"
        self.own_files = (self._note.name, self.lock.name)

    def note(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._note.read_text()))
        except (OSError, ValueError):
            return {}

    def write_note(self, **values: Any) -> None:
        partial = self._note.with_suffix(".new")
        partial.write_text(json.dumps({**self.note(), **values}, indent=1))
        os.replace(partial, self._note)

    def has_pip(self) -> bool:
        command = [str(self.python), "-m", "pip", "--version"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False

    def version(self) -> str:
        return str(self.inventory()["python"].split()[0])

    def pip(self, what: str, *arguments: str) -> None:
        """Run pip: with its own bars on a terminal, else with its telling lines.

        Args:
            what (str): What is installed, for the error message.
        """
        command = pip(*arguments, python=self.python)
        log = self.folder / "install.log"
        if sys.stdout.isatty():
            if call(command):
                raise BuildError(
                    f"pip could not get {what}: see above.",
                    "Check the network and pip's settings (`pip config list`), then "
                    "run this again.",
                )
            return
        with log.open("a") as file:
            try:
                run_logged(command, file, on_line=show_pip_line)
            except subprocess.CalledProcessError as error:
                raise pip_failed(error, what, log) from error

    def inventory(self) -> dict[str, Any]:
        """Versions of everything that was asked for; cheap, imports nothing."""
        return run_json(INVENTORY, *requirement_names(), python=self.python)


def show_pip_line(line: str) -> None:
    telling = ("Downloading", "Installing collected", "Successfully", "ERROR")
    if line.strip().startswith(telling):
        say(f"  {line.strip()}"[:200])


def requirement_names() -> list[str]:
    lines = []
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        lines += path.read_text().splitlines()
    matches = (re.match(r"[A-Za-z][\w.-]*", line) for line in lines)
    return sorted({match.group(0) for match in matches if match} | {"mmcv"})


def requirements_key() -> str:
    """Changes whenever another content of the environment is asked for."""
    digest = hashlib.sha256(f"{ROOT} {MMCV_VERSION}".encode())
    for path in [*sorted((ROOT / "requirements").glob("*.txt")), ROOT / "setup.cfg"]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def check_python(version: str, remedy: str) -> None:
    if not (3, 9) <= tuple(int(n) for n in version.split(".")[:2]) <= (3, 12):
        raise BuildError(
            f"Python {version} is not supported.", f"Use Python 3.9 to 3.12: {remedy}"
        )


def is_ready(env: Environment, torch: str | None) -> bool:
    note = env.note()
    if note.get("state") != "ready" or note.get("key") != requirements_key():
        return False
    if torch is not None and torch != note.get("torch"):
        return False
    return env.inventory() == note.get("inventory")


# --------------------------------------------------------------------------
# The steps


def provide_venv(env: Environment) -> None:
    """Create the virtual environment, or take the one that is there."""
    folder, note = env.folder, env.note()
    if note.get("state") != "creating" and env.has_pip():
        return
    content = [path for path in folder.iterdir() if path.name not in env.own_files]
    if content and not note.get("owned"):
        remedy = "Name another folder with VENV=."
        if env.python.exists():
            remedy = f"Give it pip ({env.python} -m ensurepip). {remedy}"
        raise BuildError(f"{folder} is no virtual environment with pip.", remedy)
    if importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise BuildError(
            f"{sys.executable} has no ensurepip, so it cannot make a virtual "
            "environment.",
            f"Install it (Debian and Ubuntu: apt install python{version}-venv) and "
            "run this again, or choose another interpreter with PYTHON=.",
        )
    say(f"Creating {folder} with Python {sys.version.split()[0]}")
    env.write_note(owned=True, state="creating")
    for path in content:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True
    )
    if made.returncode or not env.has_pip():
        raise BuildError(
            f"python -m venv {folder} failed: {(made.stdout + made.stderr).strip()}",
            "",
        )


def remove_leftovers(env: Environment) -> None:
    """Forget packages that an interrupted pip left half-written.

    pip takes a package with a metadata folder for installed; the list of its
    files is the last thing that it writes there.
    """
    code = "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))"
    purelib = Path(run_json(code, python=env.python)["purelib"])
    for folder in purelib.glob("*.dist-info"):
        if not ((folder / "RECORD").exists() and (folder / "INSTALLER").exists()):
            say(f"Removing what an interrupted install left: {folder.name}")
            shutil.rmtree(folder)
    for folder in purelib.glob("~*"):  # pip's name for what it was to remove
        shutil.rmtree(folder, ignore_errors=True)


def check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_NEEDED:
        raise BuildError(
            f"Only {free / 1e9:.1f} GB are free in {folder}.",
            f"The environment needs {DISK_NEEDED / 1e9:.0f} GB with a CPU build of "
            f"torch and {DISK_FOR_CUDA / 1e9:.0f} GB with a CUDA build: free some "
            "space or name another folder with VENV=.",
        )
    if free < DISK_FOR_CUDA:
        say(
            f"warning: {free / 1e9:.1f} GB are free in {folder}; a CUDA build of torch "
            f"needs up to {DISK_FOR_CUDA / 1e9:.0f} GB, a CPU build 2 GB."
        )


def provide_torch(env: Environment, request: str | None) -> dict[str, str]:
    """Install torch and torchvision as a pair, or keep the one that works.

    Returns:
        dict: The versions of both as pip names them.
    """
    found = run_json(PAIR_PROBE, python=env.python)
    if request is None and "torchvision" in found:
        say(f"Keeping torch {found['torch']}, torchvision {found['torchvision']}")
    else:
        wanted = shlex.split(request or f"-r {ROOT / 'requirements' / 'torch.txt'}")
        remove = []
        if "error" in found:
            remove = ["torch", "torchvision"]  # missing, or does not import
        elif "broken" in found:
            remove = ["torchvision"]
            say(f"torchvision does not fit torch {found['torch']}: {found['broken']}")
            wanted = [f"torch=={pair_versions(env)['torch']}", "torchvision"]
            wanted = shlex.split(request) if request else wanted
        installed = [name for name, number in pair_versions(env).items() if number]
        remove = [name for name in remove if name in installed]
        if remove:
            env.pip("rid of the old pair", "uninstall", "-y", *remove)
        if "torch" not in installed:
            check_disk(env.folder)
        env.pip("torch and torchvision", "install", *wanted)
        found = run_json(PAIR_PROBE, python=env.python)
    problem = found.get("error") or found.get("broken")
    if problem:
        raise BuildError(
            f"torch and torchvision do not work together: {problem}.",
            "Name a pair that fits, for example "
            'TORCH="torch==2.1.2 torchvision==0.16.2".',
        )
    if int(found["torch"].split(".")[0]) < 2:
        raise BuildError(
            f"torch {found['torch']} is too old: 2.0 or newer is needed.",
            'Ask for a newer one: TORCH="torch torchvision" and pip\'s --upgrade.',
        )
    return {name: str(number) for name, number in pair_versions(env).items()}


def pair_versions(env: Environment) -> dict[str, str | None]:
    versions = run_json(INVENTORY, "torch", "torchvision", python=env.python)
    return dict(versions["versions"])


def provide_packages(env: Environment, pair: dict[str, str]) -> None:
    """Everything but mmcv, with torch held where it is."""
    lines = [f"{name}=={number}" for name, number in pair.items()]
    major, minor = (int(n) for n in pair["torch"].split(".")[:2])
    if (major, minor) < (2, 3):
        lines.append("numpy<2")  # torch was compiled against NumPy 1
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(lines) + "\n")
        arguments = ["-c", str(constraints)]
        for name in REQUIREMENTS:
            arguments += ["-r", str(ROOT / "requirements" / f"{name}.txt")]
        env.pip("the packages in requirements/", "install", *arguments)


def provide_opencv(env: Environment) -> None:
    """Swap OpenCV's files for the headless ones where its libraries are missing.

    Both distributions share the folder cv2; MMEngine asks for opencv-python, which
    needs libGL, and a server has none.
    """
    probe = "import json, cv2; print(json.dumps({}))"
    problem = run_json(probe, python=env.python).get("error")
    if problem is None:
        return
    say(f"opencv-python does not import ({problem}): taking the headless build")
    versions = run_json(INVENTORY, "opencv-python", python=env.python)["versions"]
    wanted = f"opencv-python-headless=={versions['opencv-python']}"
    options = ["--force-reinstall", "--no-deps"]
    env.pip(wanted, "install", *options, wanted)
    problem = run_json(probe, python=env.python).get("error")
    if problem is not None:
        raise BuildError(f"OpenCV does not import: {problem}.", "")


def install(env: Environment, torch: str | None) -> None:
    start = time.monotonic()
    interrupted = env.note().get("state") == "installing"
    provide_venv(env)
    check_python(env.version(), f"make PYTHON=..., or another VENV than {env.folder}")
    env.write_note(state="installing")
    if interrupted and env.note().get("owned"):
        remove_leftovers(env)
    say("1/4 torch and torchvision")
    pair = provide_torch(env, torch)
    say("2/4 MMEngine, MMDetection, MMYOLO, tools and tests")
    provide_packages(env, pair)
    provide_opencv(env)
    say("3/4 mmcv with compiled ops")
    if call([str(env.python), str(ROOT / "tools" / "build_mmcv.py")]):
        raise BuildError("mmcv could not be built: see above.", "")
    say("4/4 this package")
    options = ["--no-deps", "--no-build-isolation"]
    env.pip("this package", "install", *options, "-e", str(ROOT))
    problem = run_json(IMPORTS, python=env.python).get("error")
    if problem is not None:
        raise BuildError(
            f"Everything is installed, but does not import: {problem}.",
            f"Remove {env.folder} and run this again.",
        )
    inventory = env.inventory()
    if inventory.get("missing") != []:
        raise BuildError(
            f"The environment is not whole: {inventory}.",
            f"Remove {env.folder} and run this again.",
        )
    env.write_note(
        state="ready", key=requirements_key(), inventory=inventory, torch=torch
    )
    say(f"{env.folder} is ready after {time.monotonic() - start:.0f} s")


def run(args: argparse.Namespace) -> None:
    check_python(sys.version.split()[0], "make PYTHON=python3.12 ...")
    env = Environment(args.venv.expanduser().absolute())
    torch = args.torch.strip() or None
    if is_ready(env, torch):
        return
    env.folder.mkdir(parents=True, exist_ok=True)
    with file_lock(env.lock, f"Another process installs into {env.folder}"):
        if not is_ready(env, torch):
            install(env, torch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make the virtual environment for this checkout, or check it."
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument(
        "--torch",
        default="",
        metavar="ARGS",
        help="what to ask pip for instead of the newest torch and torchvision; "
        "without it, a pair that is already there is kept",
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
