"""Brings the pictures of all ranks to the one that publishes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import cv2
import numpy as np
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    is_main_process,
)

from ..errors import VisError, one_line
from ..records import BoxedImage, Detections, VisImage
from .files import encode


class RankSpool:
    """Keeps a rank's pictures on the disk until they are published.

    In one file without a name, not in memory: a whole validation set of panels would
    not fit there. Whatever ends the process, the system removes such a file. It lies
    in the work dir, which has the space that the pictures need in the end.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        # Image id, offset and size of each picture in the file.
        self._places: list[tuple[str, int, int]] = []

    def __len__(self) -> int:
        """Number of pictures that are kept."""
        return len(self._places)

    def add(self, image: VisImage) -> None:
        """Keep one picture.

        Raises:
            VisError: If it cannot be written.
        """
        self._keep(image.image_id, _packed(image))

    def gather(self) -> None:
        """Bring the pictures of all ranks to rank 0; every rank must call this.

        No rank fails before all have had their turn: the others would wait for ever.

        Raises:
            VisError: Where pictures were not read or kept; all others are on rank 0.
        """
        counts = all_gather_object(len(self))
        lost: list[str] = []
        for source, count in enumerate(counts[1:], start=1):
            for i in range(count):
                packet: list[Any] = [None]
                with _noted(lost):
                    if get_rank() == source:
                        packet = [self._read(i)]
                broadcast_object_list(packet, src=source)
                with _noted(lost):
                    if is_main_process() and packet[0] is not None:
                        self._keep(*packet[0])
        if not is_main_process():
            self.clear()
        if lost:
            raise VisError(
                f"{len(lost)} picture(s) did not arrive at rank 0 ({lost[0]}); look at "
                "the free space of the work dir"
            )

    def images(self) -> Iterator[VisImage]:
        """Hand out what is kept, one by one.

        Raises:
            VisError: After all others, if pictures could not be read again.
        """
        lost: list[VisError] = []
        for i in range(len(self)):
            try:
                image = _unpacked(*self._read(i))
            except VisError as error:
                lost.append(error)
                continue
            yield image
        if lost:
            raise VisError(f"{len(lost)} kept picture(s) were lost: {lost[0]}")

    def clear(self) -> None:
        """Remove what is kept."""
        if self._file is not None:
            self._file.close()
        self._file, self._places = None, []

    def _keep(self, image_id: str, data: bytes) -> None:
        try:
            if self._file is None:
                os.makedirs(self._folder, exist_ok=True)
                self._file = tempfile.TemporaryFile(  # noqa: SIM115
                    dir=self._folder, buffering=0
                )
            # Behind the last whole picture.
            offset = sum(self._places[-1][1:]) if self._places else 0
            self._file.seek(offset)
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes were written")
        except OSError as error:
            raise VisError(
                f"the picture {image_id} cannot be kept in {self._folder} ({error})"
            ) from error
        self._places.append((image_id, offset, len(data)))

    def _read(self, index: int) -> tuple[str, bytes]:
        """An image's id and what was kept of it.

        Raises:
            VisError: If it is not there whole.
        """
        image_id, offset, size = self._places[index]
        assert self._file is not None
        try:
            self._file.seek(offset)
            data = self._file.read(size)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes were read")
        except OSError as error:
            raise VisError(
                f"the picture {image_id} could not be read again ({error})"
            ) from error
        return image_id, data


def _packed(image: VisImage) -> bytes:
    """A picture as the ``.npz`` of its parts; images as PNG."""
    parts: dict[str, Any] = {"picture": _png(image.image_rgb)}
    boxed = image.boxed
    if boxed is not None:
        parts |= dict(
            image=_png(boxed.image_rgb),
            class_names=np.array(boxed.class_names, str),
            layers=np.array(boxed.layers, str),
        )
        groups = ("predictions", boxed.predictions), ("truth", boxed.truth)
        for name, found in groups:
            if found is not None:
                parts |= {
                    f"{name}.{part}": array for part, array in vars(found).items()
                }
    file = io.BytesIO()
    np.savez(file, **parts)
    return file.getvalue()


def _unpacked(image_id: str, data: bytes) -> VisImage:
    """The picture again."""
    with np.load(io.BytesIO(data)) as parts:
        groups = {
            name: Detections(
                *(parts[f"{name}.{f.name}"] for f in dataclasses.fields(Detections))
            )
            for name in ("predictions", "truth")
            if f"{name}.scores" in parts
        }
        boxed = None
        if groups:
            boxed = BoxedImage(
                _decoded(parts["image"]),
                **groups,
                class_names=tuple(parts["class_names"].tolist()),
                layers=tuple(parts["layers"].tolist()),
            )
        return VisImage(image_id, _decoded(parts["picture"]), boxed)


def _png(image_rgb: np.ndarray) -> np.ndarray:
    return np.frombuffer(encode(".png", image_rgb), np.uint8)


def _decoded(png: np.ndarray) -> np.ndarray:
    bgr = cv2.imdecode(png, cv2.IMREAD_COLOR)
    if bgr is None:
        raise VisError("a kept picture came back damaged")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


@contextlib.contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    """Note what fails, whatever it is: the others are in the next collective."""
    try:
        yield
    except Exception as error:
        failures.append(one_line(error))
