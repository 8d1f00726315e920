"""Hands pictures to the backends of the visualizer so that none is lost."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from mmengine.visualization import Visualizer

from ..errors import ErrorPolicy
from ..records import VisImage
from .backends import BackendAdapter, adapter_for
from .writer import Writer

PATIENCE = 10.0
"""Seconds after which the log says which backend is being waited for."""


class Publisher:
    """Publishes pictures under one tag per mode, hook name and image.

    A backend that fails keeps nothing from the others. Where a backend allows it, its
    pictures are encoded and written beside the loop.

    Args:
        visualizer (Visualizer): The runner's.
        name (str): The hook's name.
        policy (ErrorPolicy): What a failing backend does to the run.
        writer (Writer): What works beside the loop.
        show (bool): Show pictures in a window instead of publishing them.
        wait_time (float): Seconds the window stays; 0 waits for a key.
        table (bool): Let backends that draw boxes make a table of each run.

    Attributes:
        num_published (int): Pictures of finished runs that a backend has taken, or that
            were shown.
    """

    def __init__(
        self,
        visualizer: Visualizer,
        *,
        name: str,
        policy: ErrorPolicy,
        writer: Writer,
        show: bool = False,
        wait_time: float = 0.0,
        table: bool = False,
    ) -> None:
        self._visualizer = visualizer
        self._name = name
        self._policy = policy
        self._writer = writer
        self._show = show
        self._wait_time = wait_time
        self._table = table
        self._known: dict[str, BackendAdapter] = {}
        # Tags of this run that a backend has.
        self._taken: set[str] = set()
        self.num_published = 0

    @property
    def has_destination(self) -> bool:
        """Whether a picture that is handed over will be seen anywhere."""
        return self._show or bool(self._adapters())

    @property
    def wants_boxes(self) -> bool:
        """Whether a backend draws boxes, and pictures should bring their images."""
        if self._show:
            return False
        return any(adapter.draws_boxes for adapter in self._adapters().values())

    def notices(self) -> list[str]:
        """What the user of a backend should know before the run."""
        texts = [adapter.notice() for adapter in self._adapters().values()]
        return [text for text in texts if text]

    def publish(self, mode: str, image: VisImage, step: int) -> None:
        """Hand one picture of a ``'val'`` or ``'test'`` run to every backend.

        Raises:
            Exception: With ``on_error='raise'``, that of this or an earlier picture.
        """
        tag = f"{mode}/{self._name}/{image.image_id}"
        if self._show:
            with self._policy.guard(f"show {tag}"):
                self._visualizer.show(
                    image.image_rgb, win_name=tag, wait_time=self._wait_time
                )
                self._taken.add(tag)
            return
        for name, adapter in self._adapters().items():
            job = name, adapter, tag, image, step
            if adapter.beside_the_loop:
                self._writer.submit(self._hand_over, *job)
            else:
                self._hand_over(*job)

    def _hand_over(
        self,
        name: str,
        adapter: BackendAdapter,
        tag: str,
        image: VisImage,
        step: int,
    ) -> None:
        action = f"publish {tag} through {name}"
        with self._policy.guard(action), self._watched(name):
            if adapter.add(tag, image.image_rgb, step):
                self._taken.add(tag)
            if image.boxed is not None:
                adapter.add_boxed(tag, image, step, self._table)

    def finish(self, commit: bool) -> None:
        """Complete a validation or test run: what was handed over is written then.

        ``commit`` ends the run's row of history here; without it somebody who comes
        later, MMEngine's ``LoggerHook``, ends it with the metrics.
        """
        self._writer.wait()
        for name, adapter in self._adapters().items():
            action = f"publish the pictures of a run through {name}"
            with self._policy.guard(action), self._watched(name):
                self._taken.update(adapter.finish(commit))
        self.num_published += len(self._taken)
        self._taken.clear()

    def reopen(self) -> None:
        """Open backends again that MMEngine has closed after a run."""
        for name, adapter in self._adapters().items():
            with self._policy.guard(f"open {name} again"), self._watched(name):
                adapter.reopen()

    @contextlib.contextmanager
    def _watched(self, backend: str) -> Iterator[None]:
        """Say so, once a backend, where the run waits for its answer."""
        text = (
            f"waiting for {backend}: it has not answered for {PATIENCE:g} s, and the "
            "run cannot go on without it"
        )
        timer = threading.Timer(PATIENCE, self._policy.warn, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _adapters(self) -> dict[str, BackendAdapter]:
        """Of the backends that there are now: other hooks may remove some."""
        backends: dict[str, Any]
        backends = dict(getattr(self._visualizer, "_vis_backends", None) or {})
        own = type(self._visualizer).add_image is not Visualizer.add_image
        if not backends and own:
            # A visualizer of the user's own that stores pictures by itself.
            backends = {type(self._visualizer).__name__: self._visualizer}
        for name, backend in backends.items():
            if name not in self._known or self._known[name].backend is not backend:
                self._known[name] = adapter_for(backend)
        return {name: self._known[name] for name in backends}
