"""From source to a wheel that has proved its ops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from .cache import CacheEntry
from .children import pip, run_logged
from .compiler import Compiler, wrap_compiler
from .environment import Torch, proof_device, prove
from .messages import BuildError, Progress, say
from .registry import fetch_sdist, last_words, provide_build_tools

DISK_NEEDED = 1_000_000_000
DISK_NEEDED_WITHOUT_PCH = 300_000_000
MEMORY_PER_JOB = 1_500_000_000
BUILD_REMEDIES = (
    ("No space left on device", "The disk is full: free 1 GB or use --cache-dir."),
    (
        "Killed signal terminated|Cannot allocate memory|out of memory",
        "The machine ran out of memory: try again with --jobs 1.",
    ),
    ("Python.h: No such file", "Install Python's headers (python3-dev)."),
    (
        "detected CUDA version|unsupported GNU version|CUDA_HOME|nvcc fatal",
        "The CUDA toolkit does not fit this torch or compiler: install the one that "
        "torch.version.cuda names, or build with --cpu.",
    ),
)


def patch_setup(text: str) -> str:
    """Take the hard-coded C++ standard out of mmcv's setup.py.

    torch's extension builder then adds the one that this torch needs. nvcc does
    not know -g0, so its list only gets -w.
    """
    nvcc = r"(extra_compile_args\['nvcc'\] \+= )\['-std=c\+\+\d+'\]"
    text = re.sub(nvcc, r"\1['-w']", text)
    text = re.sub(r"'-std=c\+\+\d+'", "'-g0', '-w'", text)
    return re.sub(r"'/std:c\+\+\d+'", "'/w'", text)


def count_jobs(wanted: int | None) -> int:
    """All cores that this process may use, but no more than memory allows."""
    if wanted:
        return wanted
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return cores
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if available is None:
        return cores
    return max(1, min(cores, int(available.group(1)) * 1024 // MEMORY_PER_JOB))


def check_disk(folder: Path, use_pch: bool) -> bool:
    """Return whether a precompiled header fits; raise if not even a build does."""
    free = shutil.disk_usage(folder).free
    if use_pch and free < DISK_NEEDED:
        use_pch = False
        if free >= DISK_NEEDED_WITHOUT_PCH:
            say(
                f"Only {free / 1e9:.1f} GB are free in {folder}: building without the "
                f"precompiled header ({DISK_NEEDED / 1e9:.1f} GB), which takes longer."
            )
    if free < DISK_NEEDED_WITHOUT_PCH:
        raise BuildError(
            f"Only {free / 1e9:.2f} GB are free in {folder}.",
            f"Free {DISK_NEEDED / 1e9:.1f} GB there, or name another folder with "
            "--cache-dir or MMVIS_CACHE_DIR.",
        )
    return use_pch


def build_wheel(
    entry: CacheEntry,
    root: Path,
    version: str,
    torch: Torch,
    device: str,
    *,
    jobs: int | None = None,
    use_pch: bool = True,
) -> Path:
    """Compile mmcv, prove it, and only then put it into the cache.

    Returns:
        Path: The wheel in the cache.

    Raises:
        BuildError: It did not work; the message says why and what to do.
    """
    start = time.monotonic()
    compiler = Compiler.find()
    use_pch = check_disk(entry.folder, use_pch and compiler.family != "other")
    with entry.scratch() as scratch, entry.log.open("w") as log:
        compiler.check(torch.cxx_standard, scratch)
        env = provide_build_tools(scratch / "tools", log)
        source = unpack(fetch_sdist(root, version, env, log), scratch, version)
        env.update(build_settings(device, count_jobs(jobs)))
        # torch writes CXX unquoted; hipcc was not tried.
        if use_pch and " " not in str(scratch) and torch.hip is None:
            env.update(wrap_compiler(compiler, source, scratch / "cxx"))
        say(
            f"Compiling mmcv {version} for torch {torch.version} ({device}), "
            f"C++{torch.cxx_standard}, {' '.join(compiler.command)}, "
            f"{env['MAX_JOBS']} at a time; log: {entry.log}"
        )
        # pip's own wheel cache does not know torch's version: keep this out of it.
        options = ["-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command = pip("wheel", *options, "-w", str(scratch / "dist"), str(source))
        try:
            with Progress(f"mmcv {version}") as progress:
                run_logged(command, log, env=env, cwd=scratch, on_line=progress.feed)
        except subprocess.CalledProcessError as error:
            raise compiling_failed(str(error.output), entry.log) from error
        wheel = next(iter((scratch / "dist").glob("mmcv-*.whl")))
        check_wheel(wheel, scratch, proof_device(torch, device), entry.log)
        stored = entry.store(wheel)
    size = stored.stat().st_size / 1e6
    say(f"Built in {time.monotonic() - start:.0f} s, {size:.1f} MB: {stored}")
    return stored


def unpack(sdist: Path, folder: Path, version: str) -> Path:
    """Unpack mmcv's source and patch its setup.py."""
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    source = folder / f"mmcv-{version}"
    setup = source / "setup.py"
    setup.write_text(patch_setup(setup.read_text(encoding="utf-8")), encoding="utf-8")
    return source


def build_settings(device: str, jobs: int) -> dict[str, str]:
    """What mmcv's setup.py and torch's extension builder read."""
    settings = {"MMCV_WITH_OPS": "1", "MAX_JOBS": str(jobs)}
    if device == "cuda":
        settings["FORCE_CUDA"] = "1"
    else:
        settings.update(FORCE_CUDA="0", CUDA_VISIBLE_DEVICES="")
    return settings


def compiling_failed(output: str, log: Path) -> BuildError:
    remedies = (text for what, text in BUILD_REMEDIES if re.search(what, output))
    remedy = next(remedies, "The log has the compiler's full output.")
    return BuildError(f"Compiling mmcv failed:{last_words(output)}", remedy, log)


def check_wheel(
    wheel: Path, scratch: Path, device: str, log: Path | None = None
) -> None:
    """Unpack a wheel and run its ops before anything is installed.

    Raises:
        BuildError: The wheel does not work.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise BuildError(f"{wheel} cannot be unpacked: {error}.", "", log) from error
    proof = prove(folder, device)
    if "error" in proof:
        raise BuildError(
            f"The compiled mmcv does not work: {proof['error']}.",
            "It was not installed.",
            log,
        )
