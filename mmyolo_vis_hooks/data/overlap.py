"""Reading, computing and writing at the same time, a few images at once."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Take items in another thread, so that they are there when they are wanted.

    Args:
        items (Iterable): What costs time to take.
        depth (int): At most so many wait. Defaults to 2.

    Yields:
        The items in their order. An error while taking one is raised here.
    """
    waiting: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(value: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as caught:
            error = caught
        put((_END, error))

    reader = threading.Thread(target=take, name="read-ahead", daemon=True)
    reader.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        reader.join()


class WriteBehind:
    """Finishes work in other threads while the caller goes on.

    At most ``depth`` pieces of work wait or run, so that memory stays flat where
    writing is slower than what comes before it.

    Args:
        workers (int): Number of threads. Defaults to 2.
        depth (int): How much work may be open. Defaults to 4.
    """

    def __init__(self, workers: int = 2, depth: int = 4) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write-behind")
        self._depth = depth
        self._open: deque[tuple[Any, Future]] = deque()

    def submit(self, key: Any, work: Callable[[], Any]) -> Iterator[tuple[Any, Any]]:
        """Hand over a piece of work; gives what is finished.

        Args:
            key: Given back with the result.
            work (Callable): Called without arguments in another thread.

        Yields:
            tuple: Key and result, or the exception that the work raised.
        """
        while len(self._open) >= self._depth:
            yield self._next()
        self._open.append((key, self._pool.submit(work)))
        while self._open and self._open[0][1].done():
            yield self._next()

    def drain(self) -> Iterator[tuple[Any, Any]]:
        """Wait for all open work; gives it as :meth:`submit` does."""
        while self._open:
            yield self._next()

    def close(self) -> None:
        """Wait for what runs and forget what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> tuple[Any, Any]:
        key, future = self._open.popleft()
        error = future.exception()
        return key, future.result() if error is None else error


class CoreShare:
    """Finds out whether the network should leave a core to reading and writing.

    A small network gains little from the last core and waits for it where other
    threads draw; a large one needs it. So a few images run with all threads of
    torch, a few with one less, and the faster way is kept.

    Args:
        window (int): Images of each trial. Defaults to 6.
        threads (int, optional): All threads; with 1, as where a GPU does the work,
            nothing is tried. Defaults to None, as many as torch has.
        set_threads (Callable): Sets their number. Defaults to torch's.
        clock (Callable): Seconds. Defaults to the time that passes.
    """

    _WARM_UP = 2

    def __init__(
        self,
        window: int = 6,
        *,
        threads: int | None = None,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._all = torch.get_num_threads() if threads is None else threads
        self._window = window
        self._set = set_threads
        self._clock = clock
        self._ends: list[float] = []
        self._with_all = 0.0

    def __enter__(self) -> CoreShare:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._all > 1:
            self._set(self._all)

    def image_done(self) -> None:
        """Say that the network is done with an image, and is asked for the next."""
        if self._all < 2 or self._ends is _DECIDED:
            return
        self._ends.append(self._clock())
        if len(self._ends) <= self._WARM_UP + self._window:
            return
        times = [b - a for a, b in zip(self._ends, self._ends[1:])]
        median = statistics.median(times[self._WARM_UP :])
        self._ends = []
        if not self._with_all:
            self._with_all = median
            self._set(self._all - 1)
            return
        if median >= self._with_all:
            self._set(self._all)
        self._ends = _DECIDED


_DECIDED: list[float] = []
