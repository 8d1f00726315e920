"""Records the forward that a validation or test loop does anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mmengine.runner import BaseLoop
from torch import nn

from ..errors import VisConfigError
from ..network.recorder import ForwardRecord, LayerRecorder


class LoopRecording:
    """Keeps the recording of a loop's current iteration.

    The iteration is wrapped, not the model: only a ``with`` around the forward
    itself is left in order by a failing layer and by Ctrl-C. Between iterations,
    and in iterations without selected images, nothing is attached anywhere.

    Args:
        loop (BaseLoop): Validation or test loop; gets a wrapped ``run_iter``.
        step_name (str): The model's method that the loop calls: ``'val_step'``
            or ``'test_step'``.
        recorder (LayerRecorder): Records the layers.
        choose (Callable): Gives the batch positions to record for a batch's data
            samples; empty for none. Must not raise.

    Raises:
        VisConfigError: If the loop has no ``run_iter``.
    """

    def __init__(
        self,
        loop: BaseLoop,
        step_name: str,
        recorder: LayerRecorder,
        choose: Callable[[Any], Sequence[int]],
    ) -> None:
        run_iter = getattr(loop, "run_iter", None)
        if run_iter is None:
            raise VisConfigError(
                f"alignment='letterbox' and 'network' record the loop's own forward, "
                f"but {type(loop).__name__} has no run_iter; use alignment='resize'"
            )
        self.record: ForwardRecord | None = None
        self._step_name = step_name
        self._recorder = recorder
        self._choose = choose
        loop.run_iter = partial(self._run_iter, run_iter, loop)

    def _run_iter(
        self, run_iter: Callable, loop: BaseLoop, idx: int, data_batch: Any
    ) -> Any:
        self.record = None
        keep = self._choose(data_batch)
        if not keep:
            return run_iter(idx, data_batch)
        with self._recorded_step(loop.runner.model, keep):
            try:
                return run_iter(idx, data_batch)
            finally:
                self.record = None

    @contextlib.contextmanager
    def _recorded_step(self, model: nn.Module, keep: Sequence[int]) -> Iterator[None]:
        step = getattr(model, self._step_name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            # Only the loop's own forward: other hooks run the model in the iteration
            # too, and in a test by the very method that is wrapped here.
            if self.record is not None:
                return step(*args, **kwargs)
            with self._recorder.record(keep) as record:
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
