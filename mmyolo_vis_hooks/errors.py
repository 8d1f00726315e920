"""Exceptions of this package, and the guard that keeps a drawing failure from
ending a training."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from logging import Logger


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


class FeatureShapeError(VisError, ValueError):
    """A layer's output cannot be laid over an image."""


class PublishError(VisError, RuntimeError):
    """A backend did not keep a picture that was handed to it."""


class ErrorPolicy:
    """Decides what a failure while drawing does to the run.

    Args:
        on_error (str): ``'log'`` logs the first failure of each kind with its
            traceback, counts all of them and lets the run go on; ``'raise'``
            lets the exception through.
        logger (Logger): Where failures are reported.

    ``KeyboardInterrupt`` and ``SystemExit`` are never swallowed.
    """

    CHOICES = ("log", "raise")

    def __init__(self, on_error: str, logger: Logger) -> None:
        self.on_error = on_error
        self._logger = logger
        self._failures: Counter[tuple[str, str, int]] = Counter()
        self._first_messages: dict[tuple[str, str, int], str] = {}

    @property
    def num_failures(self) -> int:
        """Number of failures that were swallowed so far."""
        return sum(self._failures.values())

    @contextlib.contextmanager
    def guard(self, action: str) -> Iterator[None]:
        """Run a block whose failure must not end the run.

        Args:
            action (str): What the block does, for the log: 'draw image 139'.
        """
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            self.record(action, error)

    def record(self, action: str, error: Exception) -> None:
        """Count a failure; log the first of its kind with the traceback."""
        kind = _kind(error)
        self._failures[kind] += 1
        if self._failures[kind] == 1:
            self._first_messages[kind] = f"{type(error).__name__}: {error}"
            self._logger.error(
                "Could not %s; the run goes on. Set on_error='raise' to stop here.",
                action,
                exc_info=error,
            )

    def summary(self) -> str | None:
        """One line on everything that failed, or None if nothing did."""
        if not self._failures:
            return None
        kinds = "; ".join(
            f"{n} x {self._first_messages[kind]}"
            for kind, n in self._failures.most_common(3)
        )
        return f"{self.num_failures} visualization step(s) failed: {kinds}"


def _kind(error: Exception) -> tuple[str, str, int]:
    """Where an error comes from. Its message may name a different image each time."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (frames[-1].filename, frames[-1].lineno or 0) if frames else ("", 0)
    return (type(error).__name__, *place)
