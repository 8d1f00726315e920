"""Child processes: in groups that can be ended, logged, answering in JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .messages import Interrupted


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a process that leads its own group, and everything it started."""
    for signum in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signum)
            else:
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def run_logged(
    command: Sequence[str],
    log: TextIO,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> list[str]:
    """Run a command in a process group of its own; return its output's lines.

    The group is killed if this program is interrupted.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    log.write(f"\n$ {shlex.join(command)}\n")
    log.flush()
    lines = []
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(env) if env is not None else None,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        for line in process.stdout or ():
            log.write(line)
            lines.append(line.rstrip("\n"))
            if on_line is not None:
                on_line(line)
        process.wait()
    except BaseException:
        kill_group(process)
        raise
    finally:
        log.flush()
    if process.returncode:
        raise subprocess.CalledProcessError(
            process.returncode, list(command), "\n".join(lines)
        )
    return lines


def call(command: Sequence[str]) -> int:
    """Run a command that the user watches; return its exit code.

    Ctrl-C on a terminal reaches the command as well: it gets the time to clean up.
    """
    process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Interrupted):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()
        raise


def pip(*arguments: str, python: str | Path = sys.executable) -> list[str]:
    options = ["--no-input", "--disable-pip-version-check"]
    return [str(python), "-m", "pip", *options, *arguments]


def run_json(
    code: str, *arguments: str, python: str | Path = sys.executable
) -> dict[str, Any]:
    """Run Python code in a child that prints one JSON object as its last line.

    The current folder is not on the child's path: it may hold a folder `mmcv`.

    Returns:
        dict: That object; or ``{'error': ...}`` if the child failed or crashed.
    """
    code = f"import sys\nsys.path = [path for path in sys.path if path]\n{code}"
    try:
        child = subprocess.run(
            [str(python), "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 600 s"}
    except OSError as error:
        return {"error": str(error)}
    if child.returncode < 0:
        return {"error": f"crashed with signal {-child.returncode}"}
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        last = child.stderr.strip().splitlines() or [f"exit {child.returncode}"]
        return {"error": last[-1]}
    try:
        answer = json.loads(lines[-1])
    except ValueError:
        return {"error": f"unexpected output {lines[-1]!r}"}
    return dict(answer)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back for the few seconds of a block."""
    received: list[int] = []
    previous = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum is not None:
            previous[signum] = signal.signal(signum, lambda n, _: received.append(n))
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        raise Interrupted(received[0])
