"""What the user reads: errors with a remedy, and the progress of a build."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PLAIN_PROGRESS_SECONDS = 10.0


class BuildError(Exception):
    """Says in one paragraph what is wrong, what to do and where the log is."""

    def __init__(self, problem: str, remedy: str, log: Path | None = None) -> None:
        parts = [problem, remedy]
        if log is not None:
            parts.append(f"Log: {log}")
        super().__init__(" ".join(parts))


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the program to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


def say(text: str) -> None:
    print(text, flush=True)


def exit_code(action: Callable[[], None]) -> int:
    """Run a program's work; turn its errors and signals into words and a code."""
    for name in ("SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    try:
        action()
    except (BuildError, OSError) as error:  # OSError: a full disk, mostly
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as error:
        print(
            "Interrupted. Nothing is left half-done: run the same command again.",
            file=sys.stderr,
            flush=True,
        )
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 0


def _interrupt(signum: int, _frame: object) -> NoReturn:
    raise Interrupted(signum)


class Progress:
    """Shows n of m compiled objects: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                self._bar, self._task = self._make_bar()

    def _make_bar(self) -> tuple[Any, Any]:
        from rich import progress

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left:"),
            progress.TimeRemainingColumn(),
        )
        return bar, bar.add_task(self._title, total=None)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def feed(self, line: str) -> None:
        """Take one line of the build's output; ninja's '[3/77]' moves the bar."""
        match = re.match(r"\s*\[(\d+)/(\d+)\]", line)
        done, total = (int(n) for n in match.groups()) if match else (None, None)
        if self._bar is not None:
            if done is not None:
                self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if done is not None and (
            done == total or now - self._last_line >= PLAIN_PROGRESS_SECONDS
        ):
            self._last_line = now
            say(f"{self._title}: {done} of {total} after {now - self._start:.0f} s")
