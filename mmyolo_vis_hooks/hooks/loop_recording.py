"""Records the forward that a validation or test loop does anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmengine.runner import BaseLoop
from torch import nn

from ..errors import VisConfigError
from ..network.recorder import ForwardRecord, LayerRecorder


class LoopRecording:
    """Keeps the recording of a loop's current iteration.

    The iteration is wrapped, not the model: only a ``with`` around the forward
    itself is left in order by a failing layer and by Ctrl-C. Between iterations,
    and in iterations without selected images, nothing is attached to the model, and
    nothing to the loop but from :meth:`attach` to :meth:`detach`.

    Args:
        loop (BaseLoop): Validation or test loop.
        step_name (str): The model's method that the loop calls: ``'val_step'``
            or ``'test_step'``.
        choose (Callable): Gives the recorder and the batch positions to record, of the
            number of an iteration and its batch; no positions for none. Must not raise.

    Raises:
        VisConfigError: If the loop has no ``run_iter``.
    """

    def __init__(
        self,
        loop: BaseLoop,
        step_name: str,
        choose: Callable[[int, Any], tuple[LayerRecorder, Sequence[int]] | None],
    ) -> None:
        if getattr(loop, "run_iter", None) is None:
            raise VisConfigError(
                f"alignment='letterbox' and 'network' record the loop's own forward, "
                f"but {type(loop).__name__} has no run_iter; use alignment='resize'"
            )
        self.record: ForwardRecord | None = None
        self._loop = loop
        self._step_name = step_name
        self._choose = choose
        # What was there before, while this is the loop's ``run_iter``.
        self._inner: Callable | None = None

    def attach(self) -> None:
        """Wrap the loop's iterations."""
        if self._inner is None:
            self._inner = self._loop.run_iter
            self._loop.run_iter = self

    def detach(self) -> None:
        """Put the loop's iterations back, also below the wrapping of another hook."""
        inner, self._inner = self._inner, None
        if inner is None:
            return
        outer = vars(self._loop).get("run_iter")
        while isinstance(outer, LoopRecording) and outer is not self:
            if outer._inner is self:
                outer._inner = inner
                return
            outer = outer._inner
        if outer is self:
            self._loop.run_iter = inner
            if inner == type(self._loop).run_iter.__get__(self._loop):
                del self._loop.run_iter

    def __call__(self, idx: int, data_batch: Any) -> Any:
        """Run an iteration, recorded where it holds a selected image."""
        self.record = None
        run_iter: Any = self._inner
        chosen = self._choose(idx, data_batch)
        try:
            if chosen is None or not chosen[1]:
                return run_iter(idx, data_batch)
            with self._recorded_step(self._loop.runner.model, *chosen):
                return run_iter(idx, data_batch)
        except BaseException:  # no hook is called any more
            self.detach()
            raise
        finally:
            self.record = None

    @contextlib.contextmanager
    def _recorded_step(
        self, model: nn.Module, recorder: LayerRecorder, keep: Sequence[int]
    ) -> Iterator[None]:
        step = getattr(model, self._step_name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Only the loop's own forward: other hooks run the model in the iteration
            # too, and in a test by the very method that is wrapped here.
            if self.record is not None:
                return step(*args, **kwargs)
            with recorder.record(keep) as record:
                outputs = step(*args, **kwargs)
            self.record = record
            return outputs

        previous = vars(model).get(self._step_name)
        setattr(model, self._step_name, recorded)
        try:
            yield
        finally:
            if previous is None:
                delattr(model, self._step_name)
            else:
                setattr(model, self._step_name, previous)


def data_samples_of(data_batch: Any) -> Sequence[Any]:
    """Data samples of a batch; of an augmented batch those of the first view."""
    samples = data_batch["data_samples"]
    if samples and isinstance(samples[0], (list, tuple)):
        samples = samples[0]
    return samples
