"""The parts of a build: patching, limits, and the words for what goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from mmcv_builder import build, messages
from mmcv_builder.build import (
    build_settings,
    check_disk,
    compiling_failed,
    count_jobs,
    patch_setup,
)
from mmcv_builder.children import call, run_logged
from mmcv_builder.messages import BuildError, Interrupted, Progress
from mmcv_builder.registry import last_words, pip_failed

Usage = namedtuple("Usage", "free")


def test_setup_loses_its_cxx_standard() -> None:
    """The lines as mmcv 2.0.1 has them."""
    text = """
            extra_compile_args['cxx'] = ['-std=c++14']
                extra_compile_args['cxx'] = ['/std:c++14']
            extra_compile_args['cxx'] = ['-Wall', '-std=c++17']
            extra_compile_args['nvcc'] += ['-std=c++14']
"""
    assert patch_setup(text) == (
        """
            extra_compile_args['cxx'] = ['-g0', '-w']
                extra_compile_args['cxx'] = ['/w']
            extra_compile_args['cxx'] = ['-Wall', '-g0', '-w']
            extra_compile_args['nvcc'] += ['-w']
"""
    )


def test_settings_keep_cuda_out_of_a_cpu_build() -> None:
    cpu = build_settings("cpu", 3)
    assert cpu["MAX_JOBS"] == "3"
    assert cpu["MMCV_WITH_OPS"] == "1"
    assert (cpu["FORCE_CUDA"], cpu["CUDA_VISIBLE_DEVICES"]) == ("0", "")
    cuda = build_settings("cuda", 3)
    assert cuda["FORCE_CUDA"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in cuda


def test_jobs_are_the_cores_that_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        build.os, "sched_getaffinity", lambda _: set(range(8)), raising=False
    )
    memory = {"kB": 64_000_000}
    monkeypatch.setattr(
        Path, "read_text", lambda _: f"MemAvailable: {memory['kB']} kB\n"
    )
    assert count_jobs(None) == 8
    memory["kB"] = 5_000_000
    assert count_jobs(None) == 3
    memory["kB"] = 100_000
    assert count_jobs(None) == 1
    assert count_jobs(6) == 6


def test_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = 2e9
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: Usage(free))
    assert check_disk(tmp_path, True)
    assert not check_disk(tmp_path, False)
    free = 5e8
    assert not check_disk(tmp_path, True)
    assert "without the precompiled header" in capsys.readouterr().out
    free = 1e8
    with pytest.raises(BuildError, match=r"Only 0\.10 GB.*--cache-dir"):
        check_disk(tmp_path, True)


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("fatal error: x.gch: No space left on device", "The disk is full"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("a.h:1:10: fatal error: Python.h: No such file", "python3-dev"),
        ("RuntimeError: The detected CUDA version (13.0) mismatches", "--cpu"),
        ("op.cpp:3:1: error: no member named 'x'", "compiler's full output"),
    ],
)
def test_a_failed_build_says_what_to_do(output: str, remedy: str) -> None:
    said = str(compiling_failed(f"[1/77] fine\n{output}\n", Path("/cache/build.log")))
    assert output in said
    assert "[1/77] fine" not in said
    assert remedy in said
    assert said.endswith("Log: /cache/build.log")


def test_last_words_without_an_error_are_the_last_lines() -> None:
    output = "\n".join(f"line {n}" for n in range(20))
    said = last_words(output).split("\n")
    assert [line.strip() for line in said if line.strip()] == [
        f"line {n}" for n in range(14, 20)
    ]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("NewConnectionError('...'): Name or service not known", "network"),
        ("ERROR: No matching distribution found for mmcv==2.0.1", "index, proxy"),
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("error: something else", "something else"),
    ],
)
def test_pip_failures_are_told_apart(output: str, says: str) -> None:
    error = subprocess.CalledProcessError(1, ["pip"], output)
    said = str(pip_failed(error, "the source of mmcv", Path("/log")))
    assert says in said
    assert said.endswith("Log: /log")


# -- progress and child processes -------------------------------------------


def test_plain_progress_is_sparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(messages.time, "monotonic", lambda: now)
    with Progress("mmcv") as progress:
        for number in range(1, 78):
            now += 2
            progress.feed(f"  [{number}/77] g++ -c a.cpp\n")
            progress.feed("  a warning about [3/4] of something\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mmcv: 5 of 77 after 10 s"
    assert lines[-1] == "mmcv: 77 of 77 after 154 s"
    assert len(lines) == 16


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with Progress("mmcv") as progress:
        progress.feed("[3/77] g++ -c a.cpp\n")
        task = progress._bar.tasks[0]
        assert (task.completed, task.total) == (3, 77)


def test_run_logged_keeps_lines_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[str] = []
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    with log.open("w") as file:
        command = [sys.executable, "-u", "-c", code]
        lines = run_logged(command, file, on_line=seen.append)
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run_logged([sys.executable, "-c", "raise SystemExit('no')"], file)
    assert lines == ["out", "err"]
    assert seen == ["out\n", "err\n"]
    assert failed.value.output == "no"
    assert "\nout\nerr\n" in log.read_text()


def test_an_interrupted_command_takes_its_children_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"open({str(pid)!r}, 'w').write(str(subprocess.Popen(sleep).pid))\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )

    def interrupt(line: str) -> None:
        raise Interrupted(signal.SIGTERM)

    with (tmp_path / "log").open("w") as file, pytest.raises(Interrupted):
        run_logged([sys.executable, "-c", code], file, on_line=interrupt)
    assert not is_running(int(pid.read_text()))


def is_running(pid: int) -> bool:
    """Whether a process lives, after a moment for it to be reaped."""
    for _ in range(50):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_call_returns_the_exit_code() -> None:
    assert call([sys.executable, "-c", "raise SystemExit(7)"]) == 7
