"""Reading, computing and writing at the same time, a few images at once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

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
