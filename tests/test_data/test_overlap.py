"""Reading ahead and running behind: order, errors, early ends, bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mmyolo_vis_hooks.data.overlap import read_ahead, run_behind

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_threads_are_left():
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [n for n in names if n.startswith(("read-ahead", "run-behind"))]


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


@pytest.mark.parametrize(("total", "depth"), [(0, 1), (1, 7), (50, 1), (50, 7)])
def test_items_come_in_their_order(total, depth):
    assert list(read_ahead(Counted(total), depth)) == list(range(total))


def test_an_item_is_taken_while_another_one_is_used():
    taken = threading.Event()

    def items():
        yield 0
        taken.set()
        yield 1

    for _ in read_ahead(items()):
        assert taken.wait(20)


def test_no_more_is_taken_than_the_depth_allows():
    source = Counted(50)
    for item in read_ahead(source, 3):
        time.sleep(0.05)
        assert source.taken <= item + 4
        if item == 2:
            break
    assert source.taken < 10


@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_an_error_is_raised_where_the_items_are_used(fail_at):
    used = []
    with pytest.raises(OSError, match="the disk is gone"):
        used.extend(read_ahead(Counted(20, fail_at)))
    assert used in ([], list(range(fail_at)))


def test_no_more_work_is_open_than_the_depth_allows():
    made, done = [], []

    def work():
        for i in range(20):
            made.append(i)
            assert len(made) - len(done) <= 5
            yield lambda i=i: time.sleep(0.01 * (i % 2 == 0)) or i

    for result in run_behind(work(), workers=2, depth=4):
        done.append(result)
    assert done == list(range(20))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_what_runs_is_finished_and_what_waits_is_not(error):
    started, finished = [], []

    def piece(i):
        started.append(i)
        time.sleep(0.05)
        finished.append(i)
        if i == 1:
            raise error("no more")

    with pytest.raises(error):
        list(run_behind(((lambda i=i: piece(i)) for i in range(40)), 2, 4))
    assert sorted(started) == sorted(finished)
    assert len(started) < 10
