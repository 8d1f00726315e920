"""Putting a proven wheel into this environment, and what it imports."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .children import deferred_signals, pip, run_json, run_logged
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

IMPORT_EACH = """
import importlib, json, sys
broken = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        broken = dict(module=name, error=str(error))
        break
print(json.dumps(broken))
"""


def install_requirements(torch: Torch, log: Path, *, allowed: bool) -> None:
    """Install what mmcv imports and this environment lacks, and nothing else.

    Raises:
        BuildError: It could not be installed, or does not import.
    """
    missing = [name for mod, name in RUNTIME_MODULES.items() if not find_spec(mod)]
    if missing:
        wanted = [*missing, *numpy_limit(torch, missing)]
        if not allowed:
            raise BuildError(
                f"Proving the wheel needs {', '.join(missing)} in this environment.",
                f"Install them: {shlex.join(pip('install', *wanted))}",
            )
        say(f"Installing what mmcv imports: {', '.join(missing)}")
        with log.open("a") as file:
            try:
                run_logged(pip("install", *wanted), file)
            except subprocess.CalledProcessError as error:
                raise pip_failed(error, ", ".join(missing), log) from error
    broken = run_json(IMPORT_EACH, *RUNTIME_MODULES)
    if "error" in broken:
        module, problem = broken.get("module", "mmengine"), broken["error"]
        remedy = f"Repair {RUNTIME_MODULES[module]} first."
        if module == "cv2":
            headless = pip("install", "--force-reinstall", "--no-deps")
            remedy = (
                "Install its system libraries (Debian and Ubuntu: apt install libgl1 "
                "libglib2.0-0), or take the build that needs none: "
                f"{shlex.join(headless)} opencv-python-headless"
            )
        raise BuildError(
            f"mmcv needs {module}, which does not import: {problem}.", remedy
        )


def numpy_limit(torch: Torch, missing: Sequence[str]) -> list[str]:
    """Hold NumPy where it is, or below 2 for a torch compiled against NumPy 1."""
    if "numpy" not in missing:
        return [f"numpy=={metadata.version('numpy')}"]
    major, minor = (int(n) for n in torch.version.split(".")[:2])
    return ["numpy<2"] if (major, minor) < (2, 3) else []


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
                gone = f" ({', '.join(others)} was removed)" if others else ""
                raise BuildError(
                    f"pip could not install {wheel.name}{gone}: "
                    f"{last_words(log.read_text(errors='replace'))}",
                    "The wheel works and stays in the cache: run this again once the "
                    "reason is gone.",
                    log,
                )
