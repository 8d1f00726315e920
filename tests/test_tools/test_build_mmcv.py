"""The program from end to end, on a tiny mmcv from a registry in a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.test_mmcv_builder.fakes import (
    VERSION,
    environment,
    write_program,
    write_registry,
    write_site,
)
from tests.test_mmcv_builder.test_build import is_running

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "build_mmcv.py"


class Program:
    """Runs tools/build_mmcv.py with everything around it replaced."""

    def __init__(self, folder: Path) -> None:
        self.registry = write_registry(folder / "registry")
        self.env = environment(write_site(folder / "site"), self.registry)
        self.env["FAKE_PID"] = str(folder / "pid")
        self.pid = folder / "pid"
        self.cache = folder / "cache"
        self.dest = folder / "dest"

    def start(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), "--cache-dir", str(self.cache)]
        command += ["--wheel-only", "--dest", str(self.dest), "--version", VERSION]
        return subprocess.Popen(
            [*command, *options],
            env={**self.env, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str, **variables: str) -> tuple[int, str]:
        process = self.start(*options, **variables)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    @property
    def entry(self) -> Path:
        [entry] = self.cache.glob("mmcv-*")
        return entry

    def leftovers(self) -> list[str]:
        """What should be gone after every end of the program."""
        paths = [*self.cache.glob("*/tmp-*"), *self.cache.glob("**/*.part")]
        return [path.name for path in paths]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_build_then_cache_then_a_broken_cache(program: Program) -> None:
    code, output = program.run()
    assert code == 0, output
    assert f"Fetching the source of mmcv {VERSION}" in output
    assert "mmcv 2.0.2: 2 of 2" in output
    [wheel] = program.dest.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "mmcv/ops/__init__.py" in archive.namelist()
    assert program.leftovers() == []
    # The hard-coded standard is gone, and the header was precompiled.
    log = (program.entry / "build.log").read_text()
    assert "[1/2] compiling with -g0 -w" in log
    assert "no precompiled header" not in log

    code, output = program.run()
    assert code == 0, output
    assert "Found a wheel in the cache" in output
    assert "Compiling" not in output

    [cached] = program.entry.glob("*.whl")
    cached.write_bytes(cached.read_bytes()[:100])
    [sdist] = program.cache.glob("sdist/*.tar.gz")
    sdist.write_bytes(sdist.read_bytes()[:100])
    code, output = program.run()
    assert code == 0, output
    assert "is damaged: it is discarded" in output
    assert "is damaged: it is fetched again" in output
    assert "Compiling" in output


def test_a_wheel_with_wrong_numbers_reaches_neither_cache_nor_user(
    program: Program,
) -> None:
    code, output = program.run(FAKE_MMCV="wrong")
    assert code == 1
    assert "does not work: NMS kept boxes [0] instead of [1, 2]" in output
    assert not program.dest.exists()
    assert not list(program.cache.glob("*/*.whl"))
    assert program.leftovers() == []
    assert program.run()[0] == 0  # and the next call recovers


def test_a_failed_build_shows_its_errors_and_the_log(program: Program) -> None:
    code, output = program.run(FAKE_MMCV="fail")
    assert code == 1
    assert "error: Compiling mmcv failed:" in output
    assert "op.cpp:3:1: error: no member named upsample" in output
    log = program.entry / "build.log"
    assert f"Log: {log}" in output
    assert "op.cpp:3:1: error" in log.read_text()
    assert "Traceback" not in output
    assert program.leftovers() == []
    assert program.run()[0] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(
    signum: signal.Signals, program: Program
) -> None:
    process = program.start(FAKE_MMCV="slow")
    deadline = time.monotonic() + 60
    while not program.pid.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    assert list(program.cache.glob("*/tmp-*"))
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert "Interrupted." in output
    assert "Traceback" not in output
    assert not is_running(int(program.pid.read_text()))
    assert program.leftovers() == []
    assert program.run()[0] == 0


def test_two_at_once_build_once(program: Program) -> None:
    first, second = program.start(), program.start()
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert sum("Compiling" in output for output in outputs) == 1
    assert sum("Another process builds the same" in output for output in outputs) == 1


def test_no_registry(program: Program) -> None:
    for path in program.registry.iterdir():
        path.unlink()
    code, output = program.run()
    assert code == 1
    assert f"registry to get the source of mmcv {VERSION}" in output
    assert "pip config list" in output
    assert f"Log: {program.entry / 'build.log'}" in output


def test_no_network(program: Program) -> None:
    code, output = program.run(
        PIP_NO_INDEX="",
        PIP_FIND_LINKS="",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
    )
    assert code == 1
    assert "could not reach the package registry" in output


def test_no_compiler(program: Program) -> None:
    code, output = program.run(PATH="/nonexistent")
    assert code == 1
    assert "There is no C++ compiler" in output
    assert "apt install g++" in output


def test_no_torch(program: Program) -> None:
    program.env["PYTHONPATH"] = os.pathsep.join(
        [str(program.registry), program.env["PYTHONPATH"]]
    )
    (program.registry / "torch.py").write_text("raise ImportError('none here')")
    code, output = program.run()
    assert code == 1
    assert "torch does not import" in output
    assert f"{sys.executable} -m pip install torch torchvision" in output


@pytest.mark.parametrize("options", [["--no-pch"], ["--jobs", "1"]])
def test_options_of_the_build(options: list[str], program: Program) -> None:
    cxx = write_program(
        program.registry.parent / "g++",
        "open(os.environ['FAKE_PID'], 'a').write(' '.join(argv) + '\\n')\n"
        "os.execvp('g++', ['g++', *argv])\n",
    )
    code, output = program.run(*options, CXX=str(cxx))
    assert code == 0, output
    calls = program.pid.read_text().splitlines()
    made = [line for line in calls if "c++-header" in line]
    assert len(made) == (0 if "--no-pch" in options else 1)
    assert ("1 at a time" in output) or "--jobs" not in options


def test_what_works_is_left_alone() -> None:
    """The real mmcv of this environment."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout


def test_wrong_arguments() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--jobs", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--jobs must be at least 1, not 0" in done.stderr
