"""Encodes and writes pictures beside the loop."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from types import FrameType
from typing import Any

_PATIENCE = 10.0  # seconds that a signal waits


class Writer:
    """Does jobs one after the other, in their order, in a thread of its own.

    Where ``most_waiting`` of them are not done, whoever hands over another one waits:
    a slow disk slows drawing and never fills the memory. At the end of the process,
    also by an exception or Ctrl-C, Python waits for what was handed over. SIGTERM ends
    a process at once: it is held up by as much, for at most ten seconds.

    Args:
        most_waiting (int): Of the jobs that are not done.
    """

    def __init__(self, most_waiting: int = 4) -> None:
        self._most_waiting = most_waiting
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[None]] = deque()

    def submit(self, job: Callable[..., None], *args: Any) -> None:
        """Hand over a job.

        Raises:
            Exception: That of an earlier job.
        """
        jobs = self._jobs
        while len(jobs) >= self._most_waiting or (jobs and jobs[0].done()):
            self._finish_first()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "mmyolo_vis_hooks")
            self._hold_up_signal()
        self._jobs.append(self._thread.submit(job, *args))

    def wait(self) -> None:
        """Return when all jobs are done, and end the thread: others may fork then.

        Raises:
            Exception: That of a job.
        """
        # Not in shutdown: where Ctrl-C cuts off a thread's join, Python 3.11 takes the
        # thread for ended, and leaves in the middle of a file.
        wait_for(list(self._jobs))
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while self._jobs:
            self._finish_first()

    def _finish_first(self) -> None:
        # It stays in the queue meanwhile: a signal waits for it, too.
        wait_for([self._jobs[0]])
        self._jobs.popleft().result()

    def _hold_up_signal(self) -> None:
        # Whoever handles the signal already ends the process as Python does; but not
        # the writer of an earlier run, which an exception ended.
        handler = signal.getsignal(signal.SIGTERM)
        is_free = handler is signal.SIG_DFL or isinstance(
            getattr(handler, "__self__", None), Writer
        )
        if is_free and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a fork has none of the threads
            wait_for(list(self._jobs), _PATIENCE)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
