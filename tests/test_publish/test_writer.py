"""Jobs are done beside the loop, in order, and none is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from mmyolo_vis_hooks.publish.writer import Writer


def test_a_slow_job_holds_up_whoever_hands_over_more():
    """What waits is bounded: memory is not what grows."""
    writer, gate, done = Writer(most_waiting=3), threading.Event(), []

    def slow(number: int) -> None:
        gate.wait()
        done.append(number)

    def hand_over() -> None:
        for number in range(8):
            writer.submit(slow, number)
            handed.append(number)

    handed: list[int] = []
    loop = threading.Thread(target=hand_over)
    loop.start()
    time.sleep(0.2)
    assert handed == [0, 1, 2]
    gate.set()
    loop.join()
    writer.wait()
    assert done == list(range(8))


def test_an_error_reaches_whoever_hands_over_or_waits():
    writer, done = Writer(most_waiting=1), []
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.submit(done.append, 1)
    writer.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.submit(done.append, 2)
    writer.wait()
    assert done == [2]


def end_with_three_jobs(ending: str, folder: Path) -> None:
    def write(number: int) -> None:
        time.sleep(0.05)
        (folder / str(number)).touch()

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    writer = Writer()
    for number in range(3):
        writer.submit(write, number)
    if ending == "exception":
        raise ValueError("the run ends")
    signal.raise_signal(signal.Signals[ending])


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.parametrize(
    ("ending", "code"),
    [("SIGTERM", -signal.SIGTERM), ("SIGINT", 1), ("exception", 1)],
)
def test_what_was_handed_over_is_written_however_a_run_ends(tmp_path, ending, code):
    context = multiprocessing.get_context("fork")
    run = context.Process(target=end_with_three_jobs, args=(ending, tmp_path))
    run.start()
    run.join(20)
    assert run.exitcode == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


@pytest.mark.parametrize("job", [lambda: None, lambda: 1 / 0])
def test_thread_and_signal_are_left_as_they_were(job):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Writer().submit(lambda: None)  # of a run that an exception ended
    threads = set(threading.enumerate())
    writer = Writer()
    writer.submit(job)
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    with contextlib.suppress(ZeroDivisionError):
        writer.wait()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert set(threading.enumerate()) <= threads
    signal.signal(signal.SIGTERM, before)
