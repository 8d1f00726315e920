"""How each kind of visualizer backend takes a picture.

A backend that needs a way of its own gets an adapter here, and a line in ``_ADAPTERS``.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from mmengine.visualization import LocalVisBackend, TensorboardVisBackend
from PIL import Image

from ..errors import PublishError
from ..records import BoxedImage, Detections, VisImage
from .files import encode

_PNG_END = b"IEND\xaeB`\x82"


class BackendAdapter:
    """Hands pictures to one backend: the way that fits most.

    Args:
        backend (BaseVisBackend): Of MMEngine's visualizer, or anything with
            ``add_image(name, image, step)``.

    Attributes:
        draws_boxes: Whether it takes images with their boxes, and tables of them.
    """

    draws_boxes = False

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Hand over a picture, ``(H, W, 3)`` uint8, RGB.

        Args:
            tag (str): ``mode/hook/image``; only letters, digits, ``_`` and ``-``
                between the slashes.

        Returns:
            bool: Whether the backend has it; False where it waits for :meth:`finish`.

        Raises:
            PublishError: If the backend lost the picture without an error.
        """
        self.backend.add_image(tag, image_rgb, step)
        return True

    def add_boxed(self, tag: str, image: VisImage, step: int, table: bool) -> None:
        """Hand over the image behind a picture, with boxes that can be switched off.

        Only where ``draws_boxes``. ``table``: also as a row of the run's table.
        """

    @property
    def beside_the_loop(self) -> bool:
        """Whether pictures may be handed over in another thread than the loop's.

        Not in general: the run of MLflow, for one, is that of a thread.
        """
        return False

    def notice(self) -> str:
        """What its user should know before the run; empty if there is nothing."""
        return ""

    def finish(self, commit: bool) -> list[str]:
        """End a validation or test run; give the tags that the backend took now.

        ``commit``: nobody else ends the run's row of history.
        """
        return []

    def reopen(self) -> None:
        """Start again after MMEngine has closed the backend."""
        # What the backend does at its first use, it does again.
        if hasattr(self.backend, "_env_initialized"):
            self.backend._env_initialized = False


class LocalAdapter(BackendAdapter):
    """Writes PNG files and makes sure that they are whole.

    The backend writes ``{name}_{step}.png`` and does not look whether the file came
    about: a name with a slash or a full disk loses it without an error. A file gets its
    name when it is whole, so that a process that is killed meanwhile leaves no half.
    """

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Write a file whose name holds the tag with dots for slashes."""
        # Neither mode, hook nor image holds a dot, so names cannot collide.
        name = tag.replace("/", ".")
        # A subclass may tell the name to somebody else.
        written = f".{name}" if self.beside_the_loop else name
        problem = "it is not whole"
        try:
            self.backend.add_image(written, image_rgb, step)
            # Not earlier: at its first use the backend completes the folder.
            part = self._path(written, step)
            with open(part, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - len(_PNG_END)))
                whole = file.read() == _PNG_END
            if whole:
                os.replace(part, self._path(name, step))
                return True
            os.remove(part)
        except OSError as error:
            if error.filename is None:  # not of a file, but of a subclass's server
                raise
            problem = error.strerror or str(error)
        raise PublishError(
            f"LocalVisBackend did not write {self._path(name, step)} ({problem}); look "
            "at the free space and the permissions of the work dir"
        )

    @property
    def beside_the_loop(self) -> bool:
        """Files can be written in any thread; who knows what a subclass does."""
        return type(self.backend).add_image is LocalVisBackend.add_image

    def reopen(self) -> None:
        """Do nothing: folders are not closed."""

    def _path(self, name: str, step: int) -> str:
        return os.path.join(self.backend._img_save_dir, f"{name}_{step}.png")


class TensorboardAdapter(BackendAdapter):
    """Hands over the file of a picture: its writer takes eight times as long for it."""

    @property
    def beside_the_loop(self) -> bool:
        """Its writer puts what it is given on a queue; of a subclass nobody knows."""
        return type(self.backend).add_image is TensorboardVisBackend.add_image

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Write the event that ``SummaryWriter.add_image`` writes."""
        if not self.beside_the_loop:
            return super().add(tag, image_rgb, step)
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = image_rgb.shape[:2]
        png = encode(".png", image_rgb)
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png
        )
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.backend.experiment._get_file_writer().add_summary(summary, step)
        return True

    def reopen(self) -> None:
        """Open its file now, not from two threads at a time, and once for all hooks."""
        self.backend.experiment._get_file_writer()


class WandbAdapter(BackendAdapter):
    """Gives a run's pictures one row of history, beside its metrics.

    ``WandbVisBackend.add_image`` ignores the step and ends a row for each picture.
    """

    draws_boxes = True
    COLUMNS = ("image id", "image", "boxes", "classes", "scores", "layers", "maps")

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self._row: dict[str, Any] = {}
        self._boxed: dict[str, Any] = {}
        self._tables: dict[str, list[list[Any]]] = {}
        # A Runner has opened it already; it may be closed before there is a picture.
        run = getattr(getattr(backend, "_wandb", None), "run", None)
        self._run_id: str | None = getattr(run, "id", None)

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Write the picture to W&B's media folder, and keep its handle."""
        caption = f"{tag} @ {step}"
        self._row[tag] = self.backend.experiment.Image(image_rgb, caption=caption)
        return False

    def add_boxed(self, tag: str, image: VisImage, step: int, table: bool) -> None:
        """Let W&B draw predictions and objects, two groups that can be switched off.

        The image is kept as JPEG: of a photograph, a PNG is several times as large.
        """
        boxed = image.boxed
        assert boxed is not None
        found, names = boxed.predictions, _names_of_labels(boxed)
        picture = Image.fromarray(boxed.image_rgb)
        groups = {"predictions": _box_data(found, names, picture.size, True)}
        if boxed.truth is not None:
            objects = _box_data(boxed.truth, names, picture.size, False)
            groups["ground_truth"] = objects
        shown = self.backend.experiment.Image(
            picture,
            caption=f"{tag}/boxes @ {step}",
            file_type="jpg",
            boxes={
                group: dict(box_data=data, class_labels=names)
                for group, data in groups.items()
            },
            classes=[dict(id=label, name=name) for label, name in names.items()],
        )
        self._boxed[f"{tag}/boxes"] = shown
        if table:
            title = tag.rpartition("/")[0]
            self._tables.setdefault(f"{title}/table", []).append(
                [
                    image.image_id,
                    shown,
                    found.boxes_xyxy.astype(float).round(1).tolist(),
                    [names[int(label)] for label in found.labels],
                    found.scores.astype(float).round(4).tolist(),
                    list(boxed.layers),
                    self._row[tag],
                ]
            )

    def finish(self, commit: bool) -> list[str]:
        """Log the row; it stays open for metrics that come later."""
        pictures, self._row = self._row, {}
        boxed, self._boxed = self._boxed, {}
        tables, self._tables = self._tables, {}
        if pictures:
            experiment, columns = self.backend.experiment, list(self.COLUMNS)
            row = {**pictures, **boxed}
            for tag, data in tables.items():
                row[tag] = experiment.Table(columns=columns, data=data)
            self._run_id = getattr(experiment.run, "id", None)
            own_commit = getattr(self.backend, "_commit", True)
            experiment.log(row, commit=commit and own_commit)
        return list(pictures)

    def reopen(self) -> None:
        """Go on with the run that was closed."""
        super().reopen()
        if self._run_id is not None:
            self.backend._init_kwargs.update(id=self._run_id, resume="allow")


def _names_of_labels(boxed: BoxedImage) -> dict[int, str]:
    """Name of every class and of every label."""
    labels = [boxed.predictions.labels]
    labels += [] if boxed.truth is None else [boxed.truth.labels]
    names = {int(label): f"class {label}" for label in np.concatenate(labels)}
    # W&B refuses a table of images without any class.
    return {**names, **dict(enumerate(boxed.class_names or ["class 0"]))}


def _box_data(
    found: Detections, names: dict[int, str], size_wh: tuple[int, int], scored: bool
) -> list[dict[str, Any]]:
    """Boxes as W&B takes them: whole pixels within the image."""
    boxes = found.boxes_xyxy.round().clip(0, size_wh * 2).astype(int).tolist()
    return [
        dict(
            position=dict(zip(("minX", "minY", "maxX", "maxY"), box)),
            domain="pixel",
            class_id=int(label),
            box_caption=names[int(label)] + (f" {score:.2f}" if scored else ""),
            scores=dict(score=float(score)),
        )
        for box, label, score in zip(boxes, found.labels, found.scores)
    ]


class MLflowAdapter(BackendAdapter):
    """Gives MLflow's image view its steps: the backend makes a plain artifact."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        mlflow = getattr(backend, "_mlflow", None)  # a Runner has opened it already
        run = mlflow.active_run() if mlflow is not None else None
        self._run_id: str | None = run.info.run_id if run else None

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Log the picture, and wait for that, so that a failure is seen."""
        mlflow = self.backend.experiment
        mlflow.log_image(image_rgb, key=tag, step=step, synchronous=True)
        self._run_id = mlflow.active_run().info.run_id
        return True

    def reopen(self) -> None:
        """Go on with the run that was closed."""
        if self._run_id is not None and self.backend.experiment.active_run() is None:
            self.backend.experiment.start_run(run_id=self._run_id)


class DVCLiveAdapter(BackendAdapter):
    """Writes ``tag/{step}.png``, which DVC's viewers show with a slider.

    Under one name for all steps, as the backend has it, each overwrites the last.
    """

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Put the step into the name."""
        self.backend.add_image(f"{tag}/{step}", image_rgb, step)
        return True

    def notice(self) -> str:
        """Say how to get through the end of a run outside of a repository."""
        live = getattr(self.backend, "_dvclive", None)
        caches = (self.backend._init_kwargs or {}).get("cache_images")
        if live is None or getattr(live, "_dvc_repo", live) is not None or not caches:
            return ""
        return (
            "DVCLiveVisBackend: there is no Git or DVC repository here, so closing the "
            "backend will end the run with \"'NoneType' object has no attribute "
            "'add'\"; set init_kwargs=dict(save_dvc_exp=False, cache_images=False)"
        )

    def reopen(self) -> None:
        """Go on in the folder, which would be emptied otherwise."""
        super().reopen()
        own = self.backend._init_kwargs or {}
        self.backend._init_kwargs = {**own, "resume": True}


class NeptuneAdapter(BackendAdapter):
    """Makes a series per tag: the backend puts all images of a run into one."""

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Append to the tag's series."""
        self.backend.experiment[tag].append(Image.fromarray(image_rgb), step=step)
        return True

    def notice(self) -> str:
        """Say that there is no server any more."""
        return (
            "NeptuneVisBackend: Neptune shut its service down in March 2026, so the "
            "pictures stay in the folder .neptune, which nothing shows; use "
            "TensorboardVisBackend, MLflowVisBackend, AimVisBackend or WandbVisBackend"
        )


class ClearMLAdapter(BackendAdapter):
    """Keeps all steps: by default, file names begin anew after the fifth."""

    def add(self, tag: str, image_rgb: np.ndarray, step: int) -> bool:
        """Report a debug sample, the images of a hook as series of one title."""
        title, _, series = tag.rpartition("/")
        self.backend.experiment.Logger.current_logger().report_image(
            title, series, iteration=step, image=image_rgb, max_image_history=-1
        )
        return True

    def reopen(self) -> None:
        """Begin a second task: in the closed one, files would be overwritten."""
        super().reopen()
        own = self.backend._init_kwargs or {}
        self.backend._init_kwargs = {**own, "reuse_last_task_id": False}


class AimAdapter(BackendAdapter):
    """Goes on with the run that was closed."""

    def reopen(self) -> None:
        """Name the run to the backend."""
        super().reopen()
        if hasattr(self.backend, "_aim_run"):
            self.backend._init_kwargs["run_hash"] = self.backend._aim_run.hash


# By the names of the backends' classes, which need not be importable.
_ADAPTERS: dict[str, type[BackendAdapter]] = {
    "LocalVisBackend": LocalAdapter,
    "TensorboardVisBackend": TensorboardAdapter,
    "WandbVisBackend": WandbAdapter,
    "MLflowVisBackend": MLflowAdapter,
    "DVCLiveVisBackend": DVCLiveAdapter,
    "NeptuneVisBackend": NeptuneAdapter,
    "ClearMLVisBackend": ClearMLAdapter,
    "AimVisBackend": AimAdapter,
}


def adapter_for(backend: Any) -> BackendAdapter:
    """The adapter of a backend, by the nearest of its classes that has one."""
    for base in type(backend).__mro__:
        if base.__name__ in _ADAPTERS:
            return _ADAPTERS[base.__name__](backend)
    return BackendAdapter(backend)
