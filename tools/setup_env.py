#!/usr/bin/env python
"""Makes the virtual environment that the Makefile works in, and checks it.

A stamp in its folder lists what was installed; an interrupted install leaves it empty,
and the next call goes on. A pair of torch and torchvision that works is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcv_builder import BuildError, ask, locked, pip, run, run_program

ROOT = Path(__file__).resolve().parents[1]
DISK_NEEDED = 2_000_000_000

PAIR = """
from importlib.metadata import version
import torch
print(json.dumps(dict(torch=version('torch'))))
import torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print(json.dumps({name: version(name) for name in ('torch', 'torchvision')}))
"""
IMPORTS = """
import cv2, mmcv.ops, mmdet.apis, mmengine, mmyolo.models, mmyolo_vis_hooks, numpy, PIL
import pytest, pytorch_grad_cam, rich, sklearn, tensorboard, torch, torchvision, wandb
"""


class Environment:
    """A virtual environment, its stamp and its log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / ".mmyolo_vis_hooks.json"
        self.lock = folder / ".mmyolo_vis_hooks.lock"
        self.log = folder / "install.log"

    def installed(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(f"lib/python*/site-packages/{pattern}"))

    def content(self) -> dict[str, Any]:
        """What a stamp holds: what was asked for, and what came of it."""
        files = [*sorted(ROOT.glob("requirements/*.txt")), ROOT / "setup.cfg"]
        key = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        found = [*self.installed("*.dist-info"), *self.installed("mmcv/_ext*")]
        return {"key": f"{ROOT} {key}", "packages": [path.name for path in found]}

    def is_ready(self, torch: str) -> bool:
        """Whether all that was there at the end still is; imports nothing."""
        try:
            made, now = json.loads(self.stamp.read_text()), self.content()
            whole = {*made["packages"]} <= {*now["packages"]} and self.python.exists()
            return whole and made["key"] == now["key"] and torch in ("", made["torch"])
        except (OSError, ValueError, KeyError):
            return False

    def finish(self, torch: str) -> None:
        self.stamp.write_text(json.dumps({**self.content(), "torch": torch}, indent=1))

    def pip(self, problem: str, *arguments: str) -> None:
        show = r" *(Downloading|Installing|Successfully|ERROR).{,180}"
        run(problem, pip(*arguments, python=self.python), self.log, show)


def provide_venv(env: Environment) -> None:
    """Create the virtual environment, or mend and take the one that is there."""
    ours = env.stamp.exists() or not {*env.folder.iterdir()} - {env.lock}
    if not ours and not env.python.exists():
        raise BuildError(f"{env.folder} is no virtual environment: set another VENV=")
    env.stamp.write_text("{}")
    if not env.python.exists():
        print(f"Creating {env.folder} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--without-pip", str(env.folder)]
        run("The virtual environment could not be made", command, env.log)
    # pip takes a package for installed whose last file, RECORD, it never wrote.
    halves = [p for p in env.installed("*.dist-info") if not (p / "RECORD").exists()]
    for path in [*halves, *env.installed("~*")]:
        print(f"Removing what an interrupted install left: {path.name}")
        shutil.rmtree(path, ignore_errors=True)
    if not env.installed("pip-*.dist-info"):
        run("pip could not be installed", [str(env.python), "-m", "ensurepip"], env.log)


def provide_torch(env: Environment, request: str) -> list[str]:
    """Install torch and torchvision as a pair, or keep the one that works.

    Gives what to tell pip later on, so that the pair stays.
    """
    found = ask(PAIR, python=env.python)
    if request or "error" in found:
        wanted = shlex.split(request) or ["-r", str(ROOT / "requirements/torch.txt")]
        broken, free = ["torch", "torchvision"], shutil.disk_usage(env.folder).free
        if "torch" in found:
            broken = ["torchvision"]
            wanted = shlex.split(request) or [f"torch=={found['torch']}", "torchvision"]
        elif free < DISK_NEEDED:
            raise BuildError(
                f"Only {free / 1e9:.1f} GB are free in {env.folder}: 2 GB are needed "
                "with a CPU build of torch, 9 GB with a CUDA one. VENV= names another."
            )
        if "error" in found:
            print(f"They do not work yet: {found['error']}")
            env.pip("pip could not remove the old pair", "uninstall", "-y", *broken)
        env.pip("pip could not get torch and torchvision", "install", *wanted)
        found = ask(PAIR, python=env.python)
    version = [int(number) for number in found.get("torch", "0").split(".")[:2]]
    if "error" in found or version < [2]:
        raise BuildError(
            f"torch (2.0 or newer) and torchvision do not work together: {found}. Name "
            'a pair that fits: TORCH="torch==2.4.1 torchvision==0.19.1".'
        )
    numpy = ["numpy<2"] if version < [2, 3] else []  # torch was compiled against 1
    return [f"{name}=={number}" for name, number in found.items()] + numpy


def provide_packages(env: Environment, held: list[str]) -> None:
    """Everything but mmcv; where libGL is missing, OpenCV's files from headless."""
    names = ("build", "runtime", "openmmlab", "tools", "dev")
    files = [f"--requirement={ROOT}/requirements/{name}.txt" for name in names]
    env.pip("pip could not get requirements/*.txt", "install", *held, *files)
    broken = ask("import cv2", python=env.python).get("error")
    if broken is not None:
        print(f"opencv-python does not import ({broken}): taking the headless build")
        [info] = env.installed("opencv_python-*.dist-info")
        twin = info.name.replace("opencv_python-", "opencv-python-headless==")
        options = ["--force-reinstall", "--no-deps", twin.removesuffix(".dist-info")]
        env.pip("pip could not get OpenCV without libGL", "install", *options)


def setup(folder: Path, torch: str) -> None:
    env, start = Environment(folder.expanduser().absolute()), time.monotonic()
    env.folder.mkdir(parents=True, exist_ok=True)
    with locked(env.lock, f"Another process installs into {env.folder}"):
        if env.is_ready(torch):
            return
        provide_venv(env)
        print("1/4 torch and torchvision")
        held = provide_torch(env, torch)
        print("2/4 MMEngine, MMDetection, MMYOLO, tools and tests")
        provide_packages(env, held)
        print("3/4 mmcv with compiled ops")
        command = [str(env.python), str(ROOT / "tools" / "mmcv_builder.py")]
        run("mmcv could not be built", command, env.log, show=".*")
        print("4/4 this package")
        options = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
        env.pip("pip could not install this package", "install", *options)
        problem = ask(IMPORTS, python=env.python).get("error")
        if problem is not None:
            raise BuildError(f"{problem}. Remove {env.folder} and run this again.")
        env.finish(torch)
        print(f"{env.folder} is ready after {time.monotonic() - start:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="", help="the pair that pip is asked for")
    args = parser.parse_args(argv)
    return run_program(lambda: setup(args.venv, args.torch.strip()))


if __name__ == "__main__":
    sys.exit(main())
