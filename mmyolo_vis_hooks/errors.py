"""Exceptions of this package, and the guard that keeps a drawing failure from
ending a training."""

from __future__ import annotations

import contextlib
import difflib
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from logging import Logger
from typing import Any


class VisError(Exception):
    """Base class of every error this package raises on purpose."""


class VisConfigError(VisError, ValueError):
    """An option has a value that can never work.

    The message names the option, its value and the remedy.
    """


class UnknownOptionError(VisConfigError, TypeError):
    """An option does not exist; a TypeError too, as of any wrong keyword."""


class LayerNotFoundError(VisConfigError):
    """A layer path does not lead to a module of the model."""


class UnsupportedPipelineError(VisConfigError):
    """A test pipeline has a step whose geometry is not known."""


class CheckpointError(VisError, RuntimeError):
    """A file is no checkpoint, is damaged, or its weights cannot be had."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such file; a FileNotFoundError too, as of any file."""


class FeatureShapeError(VisError, ValueError):
    """A layer's output cannot be laid over an image."""


class PublishError(VisError, RuntimeError):
    """A backend did not keep a picture that was handed to it."""


def one_line(error: BaseException) -> str:
    """Kind and message of an error, in one line."""
    # The text of a KeyError is in quotes.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"{type(error).__name__}: {' '.join(str(text).split())}"


def did_you_mean(
    value: Any, names: Iterable[str], remedy: str, *, most: int = 1
) -> str:
    """A remedy, behind the names that an unknown value is nearest to."""
    known = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), known, n=most)
    if not near:
        return remedy
    meant = " or ".join(repr(known[name]) for name in near)
    return f"did you mean {meant}? {remedy[0].upper()}{remedy[1:]}"


@dataclass(frozen=True)
class _Failure:
    """The first failure of a kind, and how many there were."""

    # The error's class and where it comes from; messages may name different images.
    kind: tuple[str, str, int]
    report: str
    message: str
    count: int = 1


class ErrorPolicy:
    """Decides what a failure while drawing does to the run.

    Args:
        on_error (str): ``'log'`` logs the first failure of each kind, counts all of
            them and lets the run go on; ``'raise'`` lets the exception through. In a
            distributed run it waits for :meth:`share`, which raises on every rank:
            a rank that stops alone leaves the others waiting.
        logger (Logger): Told of failures; with a traceback where they are no VisError.
        name (str): Whose failures they are; stands before each message.
    """

    CHOICES = ("log", "raise")

    def __init__(self, on_error: str, logger: Logger, name: str) -> None:
        self.on_error = on_error
        self._logger = logger
        self._name = name
        self._failures: dict[tuple[str, str, int], _Failure] = {}
        self._lock = threading.Lock()  # pictures are written in a thread
        self._waiting: Exception | None = None

    @property
    def num_failures(self) -> int:
        """Number of failures that were swallowed and not yet reported."""
        return sum(failure.count for failure in self._failures.values())

    @property
    def ends_run(self) -> bool:
        """Whether :meth:`share` will raise, so that drawing on has no use."""
        return self._waiting is not None

    @contextlib.contextmanager
    def guard(self, action: str, refusals: Any = ()) -> Iterator[None]:
        """Run a block whose failure must not end the run.

        Args:
            action (str): What the block does, for the log: 'draw image 139'.
            refusals (type | tuple): Errors that are let through. Defaults to none.
        """
        try:
            yield
        except refusals:
            raise
        except Exception as error:
            if self.on_error == "raise":
                # Not above: this module is needed to say that MMEngine is missing.
                from mmengine.dist import get_world_size

                if get_world_size() == 1:
                    raise
                self._waiting = self._waiting or error
            self._record(action, error)

    def _record(self, action: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        ending = "goes on" if self.on_error == "log" else "ends"
        report = f"Could not {action}; the run {ending}"
        if isinstance(error, VisError):
            report += f": {message}"
        else:
            lines = "".join(traceback.format_exception(error)).rstrip()
            report += f". Set on_error='raise' to stop here.\n{lines}"
        frames = traceback.extract_tb(error.__traceback__)
        place = (frames[-1].filename, frames[-1].lineno or 0)
        self._add(_Failure((type(error).__name__, *place), report, message))

    def warn(self, text: str) -> None:
        """Log a line; MMEngine's logger drops one that it has logged before."""
        self._logger.warning(f"{self._name}: {text}")

    def share(self) -> None:
        """Bring the failures of all ranks to rank 0; every rank must call this.

        Raises:
            Exception: With ``on_error='raise'``, on every rank, if one has failed.
        """
        from mmengine.dist import all_gather_object, is_main_process

        ranks = all_gather_object(list(self._failures.values()))
        failed = [(rank, f) for rank, failures in enumerate(ranks) for f in failures]
        if is_main_process():
            for rank, failure in failed:
                if rank != 0:
                    report = f"rank {rank}: {failure.report}"
                    self._add(replace(failure, report=report))
        else:
            self._failures.clear()
        if self.on_error == "raise" and failed:
            rank, failure = failed[0]
            raise self._waiting or VisError(f"rank {rank} failed: {failure.message}")

    def report(self) -> None:
        """Log one line on everything that failed since the last report."""
        if self._failures:
            kinds = sorted(self._failures.values(), key=lambda f: -f.count)
            shown = "; ".join(f"{f.count} x {f.message}" for f in kinds[:3])
            # As an error: MMEngine drops a warning that it has logged before.
            failed = f"{self.num_failures} visualization step(s) failed"
            self._logger.error(f"{self._name}: {failed}: {shown}")
        self._failures.clear()

    def _add(self, failure: _Failure) -> None:
        with self._lock:
            known = self._failures.get(failure.kind)
            count = failure.count + (known.count if known else 0)
            self._failures[failure.kind] = replace(known or failure, count=count)
        if known is None:
            self._logger.error(f"{self._name}: {failure.report}")
