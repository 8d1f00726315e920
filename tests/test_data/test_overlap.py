"""Reading ahead and writing behind: order, errors, early ends, bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mmyolo_vis_hooks.data.overlap import CoreShare, WriteBehind, read_ahead

pytestmark = pytest.mark.timeout(60)

PATIENCE = 20.0


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "read-ahead"]


def writers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("write-behind")]


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_threads_are_left():
    yield
    assert readers() == []
    assert writers() == []


class Counted:
    """Counts what was taken of it."""

    def __init__(self, total: int, fail_at: int | None = None) -> None:
        self.taken = 0
        self._total = total
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[int]:
        for i in range(self._total):
            if i == self._fail_at:
                raise OSError("the disk is gone")
            self.taken += 1
            yield i


# -------------------------------------------------------------------------- read_ahead


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 50])
def test_items_come_in_their_order(total, depth):
    assert list(read_ahead(range(total), depth)) == list(range(total))


def test_none_and_exceptions_are_items_like_others():
    items = [None, ValueError("an item"), StopIteration(), ()]
    assert list(read_ahead(items)) == items


def test_items_are_taken_in_another_thread_while_one_is_used():
    items = Counted(10)
    names = set()

    def named() -> Iterator[int]:
        for item in items:
            names.add(threading.current_thread().name)
            yield item

    ahead = read_ahead(named(), depth=2)
    assert next(ahead) == 0
    wait_until(lambda: items.taken >= 3)
    assert list(ahead) == list(range(1, 10))
    assert names == {"read-ahead"}


def test_nothing_is_taken_before_the_first_is_wanted():
    items = Counted(10)
    ahead = read_ahead(items)
    assert readers() == []
    assert items.taken == 0
    ahead.close()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_is_taken_than_the_depth_allows(depth):
    items = Counted(100)
    ahead = read_ahead(items, depth)
    for used in range(1, 30):
        next(ahead)
        # What waits, and the one that waits for a place.
        assert items.taken <= used + depth + 1
    wait_until(lambda: items.taken == 29 + depth + 1)
    time.sleep(0.3)  # longer than a try to put an item takes
    assert items.taken == 29 + depth + 1
    ahead.close()


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_an_error_is_raised_where_the_items_are_used(fail_at):
    seen = []
    ahead = read_ahead(Counted(10, fail_at))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        seen.extend(ahead)
    assert seen == list(range(fail_at))
    functions = [entry.name for entry in caught.traceback]
    assert functions[-1] == "__iter__"  # where it happened


def test_errors_that_are_no_exceptions_are_raised_too():
    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    ahead = read_ahead(interrupted())
    assert next(ahead) == 0
    with pytest.raises(KeyboardInterrupt):
        next(ahead)


def test_a_source_that_cannot_be_iterated():
    with pytest.raises(TypeError):
        list(read_ahead(None))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_used", [1, 3])
def test_the_thread_ends_when_the_user_stops_early(num_used):
    items = Counted(10**9)
    ahead = read_ahead(items, depth=2)
    for _ in range(num_used):
        next(ahead)
    (reader,) = readers()
    ahead.close()
    assert not reader.is_alive()
    assert items.taken <= num_used + 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_thread_ends_when_the_user_fails(error):
    def use() -> None:
        ahead = read_ahead(Counted(10**9))
        try:
            for item in ahead:
                if item == 2:
                    raise error
        finally:
            ahead.close()

    with pytest.raises(error):
        use()


def test_an_error_behind_what_was_used_is_not_raised():
    ahead = read_ahead(Counted(10, fail_at=1))
    next(ahead)
    ahead.close()


# ------------------------------------------------------------------------- WriteBehind


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    writer = WriteBehind(workers=2, depth=4)
    yield writer
    writer.close()


def submit_all(behind: WriteBehind, works: dict) -> list:
    results = []
    for key, work in works.items():
        results += behind.submit(key, work)
    return results + list(behind.drain())


def test_results_come_in_the_order_of_the_work(behind):
    first_may_end = threading.Event()

    def slow() -> str:
        assert first_may_end.wait(PATIENCE)
        return "slow"

    works = {0: slow, 1: lambda: "quick", 2: lambda: first_may_end.set()}
    results = submit_all(behind, works)
    assert results == [(0, "slow"), (1, "quick"), (2, None)]


def test_all_work_is_done_once_and_elsewhere(behind):
    threads = []

    def work() -> int:
        threads.append(threading.current_thread())
        return len(threads)

    results = submit_all(behind, dict.fromkeys(range(50), work))
    assert [key for key, _ in results] == list(range(50))
    assert len(threads) == 50
    assert threading.main_thread() not in threads
    assert len(set(threads)) <= 2


def test_errors_are_returned_and_the_rest_goes_on(behind):
    failure = OSError("the disk is full")
    interrupt = KeyboardInterrupt()

    def fail(error: BaseException) -> None:
        raise error

    works = {
        0: lambda: "a",
        1: lambda: fail(failure),
        2: lambda: fail(interrupt),
        3: lambda: "d",
    }
    results = submit_all(behind, works)
    assert results == [(0, "a"), (1, failure), (2, interrupt), (3, "d")]


def test_an_exception_that_is_a_result_is_one(behind):
    value = ValueError("a result")
    assert submit_all(behind, {0: lambda: value}) == [(0, value)]


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (2, 4), (4, 2)])
def test_no_more_work_is_open_than_the_depth_allows(workers, depth):
    behind = WriteBehind(workers=workers, depth=depth)
    lock = threading.Lock()
    open_now, most_running, most_open = 0, 0, 0
    running = 0

    def work() -> None:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    for key in range(40):
        for _ in behind.submit(key, work):
            open_now -= 1
        open_now += 1
        most_open = max(most_open, open_now)
    remaining = list(behind.drain())
    behind.close()
    assert most_open <= depth
    assert len(remaining) <= depth
    assert 1 <= most_running <= min(workers, depth)


def test_a_full_queue_waits_for_the_oldest():
    behind = WriteBehind(workers=1, depth=2)
    may_end = threading.Event()
    works = [lambda: may_end.wait(PATIENCE), lambda: "second"]
    for key, work in enumerate(works):
        assert list(behind.submit(key, work)) == []
    opener = threading.Timer(0.1, may_end.set)
    opener.start()
    results = list(behind.submit(2, lambda: "third"))
    assert may_end.is_set()
    assert results[0] == (0, True)
    assert results + list(behind.drain()) == [(0, True), (1, "second"), (2, "third")]
    behind.close()
    opener.join()


def test_drain_without_work(behind):
    assert list(behind.drain()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_closing_after_an_interrupt_forgets_what_waits(error):
    behind = WriteBehind(workers=1, depth=4)
    started, may_end = threading.Event(), threading.Event()
    done = []

    def work(key: int) -> None:
        started.set()
        assert may_end.wait(PATIENCE)
        done.append(key)

    def use() -> None:
        try:
            for key in range(3):
                list(behind.submit(key, lambda key=key: work(key)))
            assert started.wait(PATIENCE)
            raise error
        finally:
            threading.Timer(0.1, may_end.set).start()
            behind.close()

    with pytest.raises(error):
        use()
    assert done == [0]


def test_closing_twice_and_without_work():
    behind = WriteBehind()
    behind.close()
    behind.close()


def test_both_together_keep_little_in_memory():
    """As the programs use them: read ahead, use, write behind."""
    behind = WriteBehind(workers=2, depth=3)
    items = Counted(60)
    finished = 0
    most = 0
    for item in read_ahead(items, depth=2):
        for key, result in behind.submit(item, lambda item=item: item * item):
            assert result == key * key
            finished += 1
        most = max(most, items.taken - finished)
    finished += len(list(behind.drain()))
    behind.close()
    assert finished == 60
    assert most <= 3 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("with_all", "with_one_less", "kept"), [(1.0, 0.8, [3, 4]), (1.0, 1.2, [3, 4, 4])]
)
def test_the_faster_number_of_threads_is_kept(with_all, with_one_less, kept):
    now, chosen = 0.0, [4]
    cores = CoreShare(window=3, threads=4, set_threads=chosen.append, clock=lambda: now)
    with cores:
        for number in range(40):
            cores.image_done()
            # One slow image, as the first or a disturbed one, decides nothing.
            slow = 50.0 if number in (0, 4, 9) else 0.0
            now += slow or (with_all if chosen[-1] == 4 else with_one_less)
    assert chosen[1:] == kept  # the last is put back at the end


def test_one_thread_is_left_alone():
    chosen: list[int] = []
    with CoreShare(window=1, threads=1, set_threads=chosen.append) as cores:
        for _ in range(20):
            cores.image_done()
    assert chosen == []
