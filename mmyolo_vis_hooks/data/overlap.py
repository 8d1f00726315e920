"""Reading, computing and writing at the same time, a few images at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Take items in another thread, so that they are there when they are wanted.

    Args:
        items (Iterable): What costs time to take.
        depth (int): At most so many are taken ahead. Defaults to 2.

    Yields:
        The items in their order. An error while taking one is raised here.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        waiting: deque[Future[Any]] = deque()
        while True:
            while len(waiting) < depth:
                waiting.append(pool.submit(next, iterator, _END))
            item = waiting.popleft().result()
            if item is _END:
                return
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_behind(
    work: Iterable[Callable[[], Item]], workers: int = 2, depth: int = 4
) -> Generator[Item, None, None]:
    """Run work in other threads while the next piece of it is being made.

    Args:
        work (Iterable[Callable]): Made one after the other in this thread.
        workers (int): Number of threads. Defaults to 2.
        depth (int): So many pieces wait or run at most, so that memory stays flat
            where they are slower than what makes them. Defaults to 4.

    Yields:
        Their results in their order. An error in one is raised here; what runs is
        finished first, and what waits is forgotten.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="run-behind")
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
