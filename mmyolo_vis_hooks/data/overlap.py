"""Reading, computing and writing at the same time, a few images at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Take at most ``depth`` items ahead, one after the other in another thread.

    Yields:
        The items in their order. An error while taking one is raised here.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, "read-ahead")
    waiting: deque[Future[Any]] = deque()
    try:
        waiting.extend(pool.submit(next, iterator, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_behind(
    work: Iterable[Callable[[], Item]], workers: int = 2, depth: int = 4
) -> Generator[Item, None, None]:
    """Run work in other threads while the next piece of it is being made.

    Args:
        work (Iterable[Callable]): Made one after the other in this thread.
        workers (int): Number of threads.
        depth (int): So many pieces wait or run at most, so that memory stays flat.

    Yields:
        Their results in their order. An error in one is raised here; what runs is
        finished first, and what waits is forgotten.
    """
    pool = ThreadPoolExecutor(workers, "run-behind")
    waiting: deque[Future[Any]] = deque()
    try:
        for piece in work:
            waiting.append(pool.submit(piece))
            while len(waiting) >= depth or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
