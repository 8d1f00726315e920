"""What comes from the package registry: mmcv's source and the build tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TextIO

from .cache import sha256
from .children import pip, run_logged
from .messages import BuildError, say

SDIST_SHA256 = {
    "2.0.1": "2b9b2c23795b3f43cf2ebcaca46552d9b4ef7e903eacdcf7c08ee15195044071",
}
# setuptools 81 dropped pkg_resources, which mmcv's setup.py imports.
BUILD_TOOLS = ("setuptools>=64,<81", "wheel", "ninja", "psutil")


def pip_failed(
    error: subprocess.CalledProcessError, what: str, log: Path
) -> BuildError:
    """Turn pip's output into a message; a missing network is told apart."""
    output = str(error.output)
    if "No module named pip" in output:
        return BuildError(
            f"{sys.executable} has no pip.",
            f"Install it: {sys.executable} -m ensurepip",
            log,
        )
    if "No space left on device" in output:
        return BuildError(
            f"The disk is full: pip could not get {what}.", "Free some space.", log
        )
    network = (
        r"NewConnectionError|ConnectTimeout|Temporary failure in name|ProxyError"
        r"|Connection (broken|refused|reset)|Network is unreachable|Max retries"
        r"|No matching distribution|Could not find a version|ReadTimeout"
    )
    if re.search(network, output):
        return BuildError(
            f"pip could not reach the package registry to get {what}.",
            "Check the network and pip's settings (`pip config list`: index, proxy), "
            "then run this again.",
            log,
        )
    return BuildError(f"pip could not get {what}: {last_words(output)}", "", log)


def last_words(output: str, count: int = 6) -> str:
    """The lines of a build's output that say what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if re.search(r"\berror: |\w+Error: ", line)
        and "subprocess-exited-with-error" not in line  # pip's own remark
        and "originates from a subprocess" not in line
    ]
    return "\n  " + "\n  ".join((errors or lines)[-count:]) + "\n"


def fetch_sdist(root: Path, version: str, env: Mapping[str, str], log: TextIO) -> Path:
    """mmcv's source from the cache, or from the registry."""
    target = root / "sdist" / f"mmcv-{version}.tar.gz"
    digest = target.with_name(f"{target.name}.sha256")
    pinned = SDIST_SHA256.get(version)
    if target.exists() and digest.exists():
        if sha256(target) == (pinned or digest.read_text()):
            return target
        say(f"The cached source {target} is damaged: it is fetched again.")
        target.unlink()
    say(f"Fetching the source of mmcv {version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        command = pip("download", *options, "-d", folder, f"mmcv=={version}")
        try:
            run_logged(command, log, env=env)
        except subprocess.CalledProcessError as error:
            what = f"the source of mmcv {version}"
            raise pip_failed(error, what, Path(log.name)) from error
        found = next(iter(Path(folder).glob("mmcv-*.tar.gz")), None)
        if found is None or pinned not in (None, sha256(found)):
            raise BuildError(
                f"The registry's mmcv {version} is not the source that is known here.",
                "Check which index pip uses (`pip config list`).",
                Path(log.name),
            )
        digest.write_text(sha256(found))
        os.replace(found, target)
    return target


def provide_build_tools(folder: Path, log: TextIO) -> dict[str, str]:
    """Make setuptools, wheel, ninja and psutil available to the build.

    What this environment lacks goes into a folder that only the build sees: its
    own setuptools stays as it is.

    Returns:
        dict: The environment for the build's processes.
    """
    env = dict(os.environ, LC_ALL="C", PYTHONUNBUFFERED="1")
    programs = [sysconfig.get_path("scripts"), env.get("PATH", os.defpath)]
    if not build_tools_are_here():
        say(f"Fetching the build tools: {', '.join(BUILD_TOOLS)}")
        command = pip("install", "--no-warn-conflicts", "--target", str(folder))
        try:
            run_logged([*command, *BUILD_TOOLS], log)
        except subprocess.CalledProcessError as error:
            raise pip_failed(error, "the build tools", Path(log.name)) from error
        modules = [str(folder), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(path for path in modules if path)
        programs.insert(0, str(folder / "bin"))
    env["PATH"] = os.pathsep.join(programs)
    return env


def build_tools_are_here() -> bool:
    try:
        versions = {
            name: metadata.version(name)
            for name in ("setuptools", "wheel", "ninja", "psutil")
        }
    except metadata.PackageNotFoundError:
        return False
    return 64 <= int(versions["setuptools"].split(".")[0]) < 81
