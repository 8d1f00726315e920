"""Hands pictures to the backends of the visualizer so that none is lost."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mmengine.visualization import Visualizer

from ..errors import ErrorPolicy, PublishError
from ..records import VisImage

_PNG_END = b"IEND\xaeB`\x82"


class Publisher:
    """Publishes pictures under one tag per mode, hook name and image.

    Each backend gets the picture by itself, so one that fails keeps nothing
    from the others.

    Args:
        visualizer (Visualizer): The runner's.
        name (str): The hook's name.
        policy (ErrorPolicy): What a failing backend does to the run.
        show (bool): Show pictures in a window instead of publishing them.
        wait_time (float): Seconds the window stays; 0 waits for a key.
    """

    def __init__(
        self,
        visualizer: Visualizer,
        *,
        name: str,
        policy: ErrorPolicy,
        show: bool = False,
        wait_time: float = 0.0,
    ) -> None:
        self._visualizer = visualizer
        self._name = name
        self._policy = policy
        self._show = show
        self._wait_time = wait_time
        # W&B: one row of history per run, so its images wait for the row.
        self._wandb_rows: dict[str, dict[str, Any]] = {}
        self.num_published = 0

    @property
    def has_destination(self) -> bool:
        """Whether a picture that is handed over will be seen anywhere."""
        return self._show or bool(self._backends())

    def publish(self, mode: str, image: VisImage, step: int) -> None:
        """Hand one picture to every backend.

        Args:
            mode (str): ``'val'`` or ``'test'``.
            image (VisImage): The picture.
            step (int): Epoch or iteration that the picture belongs to.
        """
        tag = f"{mode}/{self._name}/{image.image_id}"
        if self._show:
            with self._policy.guard(f"show {tag}"):
                self._visualizer.show(
                    image.image_rgb, win_name=tag, wait_time=self._wait_time
                )
                self.num_published += 1
            return
        failed = False
        for backend_name, backend in self._backends().items():
            action = f"publish {tag} through {backend_name}"
            before = self._policy.num_failures
            with self._policy.guard(action):
                self._add_image(backend_name, backend, tag, image.image_rgb, step)
            failed |= self._policy.num_failures > before
        self.num_published += not failed

    def finish(self, commit: bool) -> None:
        """Complete a run: W&B gets its images as one row.

        Args:
            commit (bool): Whether the row ends here. False where somebody who
                comes later, MMEngine's ``LoggerHook``, ends it with the metrics.
        """
        for backend_name, backend in self._backends().items():
            row = self._wandb_rows.pop(backend_name, None)
            if row:
                with self._policy.guard(f"publish {len(row)} images through W&B"):
                    backend.experiment.log(
                        row, commit=commit and getattr(backend, "_commit", True)
                    )

    def _backends(self) -> dict[str, Any]:
        backends = dict(getattr(self._visualizer, "_vis_backends", None) or {})
        if backends or type(self._visualizer).add_image is Visualizer.add_image:
            return backends
        # A visualizer of the user's own that stores pictures by itself.
        return {type(self._visualizer).__name__: self._visualizer}

    def _add_image(
        self, name: str, backend: Any, tag: str, image_rgb: np.ndarray, step: int
    ) -> None:
        kinds = {base.__name__ for base in type(backend).__mro__}
        if "LocalVisBackend" in kinds:
            _add_local_image(backend, tag, image_rgb, step)
        elif "WandbVisBackend" in kinds:
            picture = _wandb_image(backend, image_rgb, tag, step)
            self._wandb_rows.setdefault(name, {})[tag] = picture
        elif "MLflowVisBackend" in kinds:
            # MLflow takes the name for a file name and knows no steps.
            backend.add_image(f"{tag}_{step}.png", image_rgb, step)
        else:
            backend.add_image(tag, image_rgb, step)


def _add_local_image(backend: Any, tag: str, image_rgb: np.ndarray, step: int) -> None:
    """Write a PNG file and make sure that it is whole.

    The backend writes ``{name}_{step}.png`` and does not look whether the file
    came about: a name with a slash or a full disk loses it without an error.
    """
    # Neither mode, name nor image id holds a dot, so names cannot collide.
    name = tag.replace("/", ".")
    backend.add_image(name, image_rgb, step)
    path = os.path.join(backend._img_save_dir, f"{name}_{step}.png")
    try:
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            whole = file.read() == _PNG_END
    except OSError:
        whole = False
    if not whole:
        if os.path.exists(path):
            os.remove(path)
        raise PublishError(
            f"LocalVisBackend did not write {path}; look at the free space and the "
            "permissions of the work dir"
        )


def _wandb_image(backend: Any, image_rgb: np.ndarray, tag: str, step: int) -> Any:
    # The picture is written to W&B's media folder now; only its handle is kept.
    return backend.experiment.Image(image_rgb, caption=f"{tag} @ {step}")
