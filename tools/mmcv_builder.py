#!/usr/bin/env python
"""Builds mmcv with its compiled ops for the torch of this environment.

    python -m mmcv_builder        (in a checkout: python tools/mmcv_builder.py)

It needs torch, MMEngine, a C++ compiler and the package registry. If mmcv's ops run
already, it does nothing. Otherwise it compiles mmcv with the C++ standard that this
torch needs and a precompiled header, proves the result by running NMS and RoIAlign, and
installs it; where mmcv comes from OneDL's fork, the fork in the version that is
installed. Finished wheels stay in the user's cache folder. It heeds MMVIS_CACHE_DIR,
CXX, MAX_JOBS (compilers at a time), FORCE_CUDA (1 or 0), TORCH_CUDA_ARCH_LIST.
"""

# The standard library only: this must import before mmcv and all around it is there.
from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

MMCV_VERSION = "2.0.1"  # MMYOLO 0.6 and MMDetection 3 accept it
SDIST_SHA256 = "2b9b2c23795b3f43cf2ebcaca46552d9b4ef7e903eacdcf7c08ee15195044071"
FORK = "onedl-mmcv"  # it imports as mmcv, too
# setuptools 81 dropped pkg_resources, which mmcv's setup.py imports.
BUILD_TOOLS = ("setuptools>=64,<81", "wheel", "ninja", "psutil")
MEMORY_PER_JOB = 1_500_000_000
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"

REMEDIES = {  # only for words that can mean one thing; otherwise the log has to do
    r"No space left on device": "The disk is full: free 1 GB, or set MMVIS_CACHE_DIR.",
    r"Killed signal terminated program|: Cannot allocate memory|memory exhausted"
    r"|LLVM ERROR: out of memory": "Out of memory: MAX_JOBS=1 compiles file by file.",
    r"NewConnectionError|ConnectTimeoutError|NameResolutionError|is unreachable": "The "
    "package registry cannot be reached: see `pip config list` (index, proxy).",
    r"No module named pip\b": "This Python has no pip: run its `-m ensurepip`.",
    r"libGL\.so\.1: cannot": "OpenCV: apt install libgl1, or opencv-python-headless.",
    r"Python\.h'?(: No such file| file not found)": "Install Python's C headers "
    f"(Debian, Ubuntu: apt install {PYTHON}-dev; Fedora: dnf install python3-devel).",
    r"The detected CUDA version \(\S+\) mismatches the version": "Install the CUDA "
    "toolkit that torch.version.cuda names, or set FORCE_CUDA=0 for CPU ops only.",
}


class BuildError(Exception):
    """Says what is wrong and what to do."""

    @classmethod
    def quote(cls, problem: str, output: str, log: Path | None = None) -> BuildError:
        """Quote the lines that tell why, and name what helps if that is certain."""
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        telling = r"\b(error: |fatal *: |\w+Error: )|^ERROR:(?!.*subprocess)"
        errors = list(dict.fromkeys(x for x in lines if re.search(telling, x)))
        said = [f"  {line}" for line in (errors or lines)[-6:]]
        help = [text for words, text in REMEDIES.items() if re.search(words, output)]
        where = [f"Log: {log}"] if log else []
        return cls("\n".join([f"{problem}:", *said, *help[:1], *where]))


def run_program(work: Callable[[], None]) -> int:
    """Do a program's work; turn its errors and signals into words and a code."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)
    try:
        work()
    except (BuildError, OSError) as error:
        others = "; MMVIS_CACHE_DIR and VENV= name other folders"
        told = others if isinstance(error, OSError) else ""  # a full disk, mostly
        print(f"error: {error}{told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: run the same command again to go on.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run(
    problem: str, command: Sequence[str], log: Path, show: str = "(?!)", **options: Any
) -> None:
    """Run a command in a process group of its own, which ends with this program.

    Its output goes into the log, and what matches ``show`` is printed, too.
    """
    output = []
    options |= dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    options |= dict(stderr=subprocess.STDOUT, errors="replace")
    with log.open("a") as file:
        print(f"\n$ {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            for line in process.stdout or ():
                print(line, end="", file=file, flush=True)
                output.append(line)
                if shown := re.match(show, line):
                    print(shown[0])
            process.wait()
        except BaseException:
            end(process)
            raise
    if process.returncode:
        raise BuildError.quote(problem, "".join(output), log)


def end(process: subprocess.Popen[str]) -> None:
    """End a process that leads its own group, and everything it started."""
    patient = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGINT lets pip and this program clean up; the last one is certain.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signum)
            process.wait(timeout=20)
    signal.signal(signal.SIGINT, patient)


def pip(*arguments: str, python: str | Path = sys.executable) -> list[str]:
    options = ["--no-input", "--disable-pip-version-check"]
    return [str(python), "-m", "pip", *options, *arguments]


def ask(code: str, *words: str, python: str | Path = sys.executable) -> dict[str, Any]:
    """The last JSON object that code prints in a child; why it failed, as ``error``."""
    # The current folder is not on the child's path: it may hold a folder `mmcv`.
    code = f"import json, sys\nsys.path = [path for path in sys.path if path]\n{code}"
    command = [str(python), "-c", code, *words]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = [line for line in child.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(said[-1]) if said else {}
    if child.returncode:
        signum = f"crashed with signal {-child.returncode}"
        found["error"] = [signum, *child.stderr.strip().splitlines()][-1]
    return found


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock, which goes with the process; say ``busy`` if it must be awaited."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{busy}: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


PROOF = """
import os, tempfile, zipfile
for wheel in sys.argv[2:]:  # which is not installed yet
    folder = tempfile.TemporaryDirectory(prefix='tmp-', dir=os.path.dirname(wheel))
    zipfile.ZipFile(wheel).extractall(folder.name)  # checks each file's sum
    sys.path.insert(0, folder.name)
import torch, mmcv
# CUDA ops can be run only where a GPU is; elsewhere they load, at least.
device = sys.argv[1] if torch.cuda.is_available() else 'cpu'
from mmcv.ops import nms, roi_align
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
kept = nms(boxes.to(device), torch.tensor([.8, .9, .7]).to(device), 0.5)[1].tolist()
if kept != [1, 2]:
    raise SystemExit('NMS kept boxes %s instead of [1, 2]' % kept)
ramp = torch.arange(16.).reshape(1, 1, 4, 4).to(device)
roi = torch.tensor([[0., 1, 1, 3, 3]]).to(device)
pooled = roi_align(ramp, roi, (2, 2), 1.0, 2, 'avg', True).cpu()
if not torch.allclose(pooled, torch.tensor([[[[5., 6], [9, 10]]]]), atol=1e-4):
    raise SystemExit('RoIAlign gave %s' % pooled.tolist())
print(json.dumps(dict(version=mmcv.__version__)))
"""


def wanted() -> tuple[str, str]:
    """Distribution and version to build: the fork's if it is here, else mmcv's."""
    try:
        return FORK, metadata.version(FORK)
    except metadata.PackageNotFoundError:
        return "mmcv", MMCV_VERSION


def choose_device() -> str:
    """Decide like mmcv: CUDA ops if a GPU is visible or FORCE_CUDA=1."""
    import torch

    forced = os.environ.get("FORCE_CUDA")
    if forced is not None or not torch.cuda.is_available():
        return "cuda" if forced == "1" else "cpu"
    nvcc = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin", "nvcc")
    if torch.version.hip or nvcc.exists() or shutil.which("nvcc"):
        return "cuda"
    print(
        "warning: a GPU, but no nvcc: mmcv gets CPU ops, and NMS fails on the GPU. Get "
        f"CUDA toolkit {torch.version.cuda} and use --force, or hide the GPU."
    )
    return "cpu"


def find_compiler(folder: Path, log: Path) -> list[str]:
    """The C++ compiler, once it has compiled a small file with Python's headers."""
    import torch

    extension = Path(torch.__file__).parent / "utils" / "cpp_extension.py"
    standards = re.findall(r"std=c\+\+(\d\d)", extension.read_text())
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [words for words in map(shlex.split, names) if shutil.which(words[0])]
    if not found:
        raise BuildError(
            f"There is no C++ compiler: looked for {', '.join(names)}. Set CXX, or get "
            "one: apt install g++, dnf install gcc-c++, xcode-select --install."
        )
    source, include = folder / "probe.cpp", sysconfig.get_path("include")
    source.write_text("#include <Python.h>\n#include <optional>\nint main() {}\n")
    standard = f"c++{max(standards, default='17')}"
    flags = [f"-std={standard}", f"-I{include}", "-c", "-o", f"{source}.o"]
    said = f"{shlex.join(found[0])} cannot compile a small file of {standard}: set CXX"
    run(said, [*found[0], *flags, str(source)], log)
    return [str(shutil.which(found[0][0])), *found[0][1:]]


def add_precompiling(compiler: Sequence[str], folder: Path) -> str:
    """A program for CXX that calls ``compile_one``, if it is gcc or clang."""
    said = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    gcc = b"Free Software Foundation" in said
    if not (gcc or b"clang" in said) or " " in str(folder):  # torch leaves CXX unquoted
        return shlex.join(compiler)
    own = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--compile"]
    given = [shlex.join(compiler), str(folder), "gch" if gcc else "pch"]
    program = folder / ("g++" if gcc else "clang++")  # torch knows them by name
    program.write_text(f'#!/bin/sh\nexec {shlex.join([*own, *given])} "$@"\n')
    program.chmod(0o755)
    return str(program)


def compile_one(compiler: str, folder: str, suffix: str, *argv: str) -> NoReturn:
    """Stand in for the C++ compiler: add the precompiled header, then call it.

    gcc and clang take a header that was compiled with their very flags only, so the
    first file of each set of flags makes one. Without it a build is slower, but works.
    """
    real = shlex.split(compiler)
    flags, words, extra = [], iter(argv), []
    for word in words:
        if word in ("-o", "-MF"):
            next(words, None)  # differs from file to file
        elif word not in ("-c", "-MMD") and not word.endswith(".cpp"):
            flags.append(word)
    if "-c" in argv and any(word.endswith(".cpp") for word in argv):
        key = hashlib.sha256(repr(flags).encode()).hexdigest()[:16]
        header = Path(folder, f"{key}_mmcv_pch.hpp")
        made = Path(f"{header}.{suffix}")
        with locked(Path(folder, "header.lock"), "The header is being compiled"):
            if not header.exists():
                header.write_text('#include "pytorch_cpp_helper.hpp"\n')  # all do
                pch = ["-x", "c++-header", str(header), "-o", str(made)]
                subprocess.call([*real, *flags, *pch])
        extra = ["-include", str(header)] if made.exists() else []
    os.execv(real[0], [*real, *extra, *argv])


# Every Python that pip starts imports this; those in mmcv's source find it mended.
SITECUSTOMIZE = f"""
import os, sys
if os.path.exists('setup.py'):
    sys.path.append({os.path.dirname(os.path.abspath(__file__))!r})
    import mmcv_builder, pathlib
    setup = pathlib.Path('setup.py')
    setup.write_text(mmcv_builder.patch_setup(setup.read_text('utf-8')), 'utf-8')
"""


def patch_setup(text: str) -> str:
    """Mend what torch and Python have outgrown in mmcv's setup.py.

    Where no C++ standard is named, torch adds the one that it needs; nvcc does not know
    -g0. Since Python 3.13 `locals()` does not see what `exec` defined.
    """
    nvcc = r"(extra_compile_args\['nvcc'\] \+= )\['-std=c\+\+\d+'\]"
    text = re.sub(nvcc, r"\1['-w']", text)
    text = re.sub(r"'-std=c\+\+\d+'", "'-g0', '-w'", text)
    return text.replace("locals()['__version__']", repr(wanted()[1]))


def build_variables(folder: Path, log: Path) -> dict[str, str]:
    """For a build that finds its tools: here, or in a folder that only it sees."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = {**os.environ, "LC_ALL": "C", "PYTHONUNBUFFERED": "1", "MMCV_WITH_OPS": "1"}
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(cores(0)), memory // MEMORY_PER_JOB))
    env.setdefault("MAX_JOBS", str(jobs))
    programs = [str(folder / "bin"), sysconfig.get_path("scripts")]
    if not all(map(find_spec, ("pkg_resources", "wheel", "ninja", "psutil"))):
        command = pip("install", "--target", str(folder), *BUILD_TOOLS)
        run("pip could not get the build tools", command, log)
    env["PATH"] = os.pathsep.join([*programs, env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env.get("PYTHONPATH", "")])
    return env


def build_wheel(device: str, entry: Path) -> Path:
    """Compile mmcv, prove it, and only then put it into the cache."""
    import torch

    name, version = wanted()
    log, start = entry / "build.log", time.monotonic()
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=entry) as temporary:
        folder = Path(temporary)
        env = build_variables(folder, log)
        env["FORCE_CUDA"] = "1" if device == "cuda" else "0"
        env |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        compiler = find_compiler(folder, log)
        if not torch.version.hip:  # hipcc was not tried
            env["CXX"] = add_precompiling(compiler, folder)
        what = f"{name} {version} for torch {torch.__version__} ({device})"
        print(f"Compiling {what}, {env['MAX_JOBS']} files at a time; log: {log}")
        file = folder / "mmcv.txt"
        known = f" --hash=sha256:{SDIST_SHA256}" if name == "mmcv" else ""
        file.write_text(f"--no-binary={name}\n{name}=={version}{known}\n")
        # pip's own wheel cache does not know torch's version: keep this out of it.
        options = ["--no-deps", "--no-build-isolation", "--no-cache-dir"]
        command = pip("wheel", "-v", *options, "-w", temporary, "-r", str(file))
        tenths = r" *\[(\d*0/\d+|(\d+)/\2)\]"  # of what ninja counts
        run("mmcv could not be built", command, log, tenths, env=env, cwd=folder)
        [wheel] = folder.glob("*mmcv-*.whl")
        problem = ask(PROOF, device, str(wheel)).get("error")
        if problem is not None:
            raise BuildError.quote("The compiled mmcv does not work", problem, log)
        built = wheel.replace(entry / wheel.name)
    print(f"Built in {time.monotonic() - start:.0f} s: {built}")
    return built


def cache_entry(device: str) -> Path:
    """A folder that is different whenever a wheel would not fit."""
    import torch

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("MMVIS_CACHE_DIR") or base / "mmyolo_vis_hooks")
    toolkit = torch.version.hip or torch.version.cuda if device == "cuda" else ""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    build = f"{'-'.join(wanted())}_torch-{torch.__version__}_{device}{toolkit}"
    python = PYTHON.replace("python", "cp").replace(".", "")
    key = "_".join(filter(None, [build, archs, python, sysconfig.get_platform()]))
    return root.expanduser().absolute() / re.sub(r"[^\w.+-]+", "-", key)


def install(device: str, entry: Path, force: bool) -> None:
    """Put the cached wheel, or one that is built now, in the place of any mmcv."""
    for stale in entry.glob("tmp-*"):  # whoever held the lock before is gone
        shutil.rmtree(stale, ignore_errors=True)
    for wheel in [] if force else entry.glob("*.whl"):
        problem = ask(PROOF, device, str(wheel)).get("error")
        if problem is None:
            print(f"Found a wheel in the cache: {wheel}")
            break
        print(f"The cached wheel does not work and is discarded: {problem}")
        wheel.unlink()
    else:
        wheel = build_wheel(device, entry)
    log = entry / "install.log"
    name, version = wanted()
    # These are the same folder under other names.
    twins = sorted({"mmcv", "mmcv-lite", "mmcv-full"} - {name})
    run("pip could not remove another mmcv", pip("uninstall", "-y", *twins), log)
    options = ["--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    run(f"pip could not install {wheel.name}", pip("install", *options), log)
    proof = ask(PROOF, device)
    if proof.get("version") != version:
        raise BuildError(f"The wheel works, but another mmcv comes first: {proof}")
    print(f"{name} {version} is installed; NMS and RoIAlign give the right numbers.")


def build(force: bool) -> None:
    """Install mmcv, unless the one that is there needs nothing."""
    try:
        for module in ("torch", "mmengine", "cv2"):
            importlib.import_module(module)
    except ImportError as error:
        remedy = shlex.join(pip("install", "torch", "torchvision", "mmengine>=0.10"))
        problem = f"mmcv needs torch and MMEngine ({remedy}), which do not import"
        raise BuildError.quote(problem, str(error)) from error
    device = choose_device()
    proof = ask(PROOF, device)
    version, target = proof.get("version", ""), wanted()[1]
    accepted = r"2\.0\.\d" if find_spec("mmyolo") else r"2\.\d+\.\d"
    if (version == target or re.match(accepted, version)) and not force:
        print(f"mmcv {version} works: nothing to do")
        return
    problem = proof.get("error") or f"mmcv {version} is not {target}"
    print(f"mmcv's ops do not run here yet: {problem}")
    entry = cache_entry(device)
    entry.mkdir(parents=True, exist_ok=True)
    with locked(entry / "lock", "Another process builds the same wheel"):
        install(device, entry, force)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("mmcv_builder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--force", action="store_true", help="build anew in any case")
    args = parser.parse_args(argv)
    return run_program(lambda: build(args.force))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_one(*sys.argv[2:])
    sys.exit(main())
