"""Putting a proven wheel into this environment, and what it imports."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .children import deferred_signals, pip, run_logged
from .environment import Torch
from .messages import BuildError, say
from .registry import last_words, pip_failed

RUNTIME_MODULES = {  # what mmcv imports: module -> what to ask pip for
    "addict": "addict",
    "cv2": "opencv-python>=3",
    "mmengine": "mmengine>=0.10.0",
    "numpy": "numpy",
    "packaging": "packaging",
    "PIL": "Pillow",
    "yaml": "pyyaml",
    "yapf": "yapf",
}


def install_requirements(torch: Torch, log: Path, *, allowed: bool) -> None:
    """Install what mmcv imports and this environment lacks, and nothing else."""

    missing = [name for mod, name in RUNTIME_MODULES.items() if not find_spec(mod)]
    if not missing:
        return
    # torch before 2.3 was compiled against NumPy 1.
    major, minor = (int(n) for n in torch.version.split(".")[:2])
    if (major, minor) < (2, 3):
        missing = ["numpy<2" if name == "numpy" else name for name in missing]
        if "numpy<2" not in missing:
            from importlib.metadata import version

            missing.append(f"numpy=={version('numpy')}")
    command = pip("install", *missing)
    if not allowed:
        raise BuildError(
            f"Proving the wheel needs {', '.join(missing)} here.", shlex.join(command)
        )
    say(f"Installing what mmcv imports: {', '.join(missing)}")
    with log.open("a") as file:
        try:
            run_logged(command, file)
        except subprocess.CalledProcessError as error:
            raise pip_failed(error, ", ".join(missing), log) from error


def install_wheel(wheel: Path, log: Path) -> None:
    """Install a proven wheel in place of any other mmcv.

    pip puts the old one back if it fails. It runs in a session of its own and is
    always waited for, so that Ctrl-C cannot stop it between the two.
    """

    others = []
    for name in ("mmcv-lite", "mmcv-full"):  # the same folder under other names
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            others.append(name)
    commands = [pip("uninstall", "-y", *others)] if others else []
    options = ["--no-deps", "--no-index", "--force-reinstall"]
    commands.append(pip("install", *options, str(wheel)))
    with log.open("a") as file, deferred_signals():
        for command in commands:
            file.write(f"\n$ {shlex.join(command)}\n")
            file.flush()
            code = subprocess.call(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if code:
                file.flush()
                raise BuildError(
                    f"pip could not install {wheel.name}: "
                    f"{last_words(log.read_text(errors='replace'))}",
                    "The wheel works and stays in the cache: run this again once the "
                    "reason is gone.",
                    log,
                )
