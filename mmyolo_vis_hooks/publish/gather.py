"""Brings the pictures of all ranks to the one that publishes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import cv2
import numpy as np
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
)

from ..errors import VisError
from ..records import VisImage


class RankSpool:
    """Keeps a rank's pictures as PNG files until they are handed over.

    Files, not arrays: a whole validation set of panels would not fit in memory.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory | None = None
        self._paths: list[tuple[str, str]] = []

    def add(self, image: VisImage) -> None:
        """Keep one picture.

        Raises:
            VisError: If it cannot be written.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmyolo_vis_hooks_")
        path = os.path.join(self._folder.name, f"{len(self._paths)}.png")
        bgr = cv2.cvtColor(image.image_rgb, cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(path, bgr):
            raise VisError(f"cannot keep the picture {image.image_id} in {path}")
        self._paths.append((image.image_id, path))

    def gather(self) -> Iterator[VisImage]:
        """Hand the pictures of all ranks to rank 0; every rank must call this.

        Yields:
            VisImage: On rank 0 those of the other ranks; elsewhere nothing.

        Raises:
            VisError: On rank 0, after all others, if pictures did not arrive whole.
        """
        counts = all_gather_object(len(self._paths))
        lost = 0
        for source in range(1, get_world_size()):
            for i in range(counts[source]):
                payload = [self._read(i) if get_rank() == source else None]
                broadcast_object_list(payload, src=source)
                if get_rank() != 0:
                    continue
                picture = _decode(payload[0])
                if picture is None:
                    lost += 1
                else:
                    yield picture
        self.clear()
        # Not earlier: the other ranks would wait for ever for their turn.
        if lost:
            raise VisError(
                f"{lost} picture(s) of other ranks did not arrive whole; look at the "
                "free space of their temporary folders (TMPDIR)"
            )

    def clear(self) -> None:
        """Remove what is kept."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._paths = None, []

    def _read(self, index: int) -> tuple[str, bytes] | None:
        image_id, path = self._paths[index]
        try:
            with open(path, "rb") as file:
                return image_id, file.read()
        except OSError:
            # The other ranks wait for an answer, whatever happened to the file.
            return None


def _decode(payload: tuple[str, bytes] | None) -> VisImage | None:
    if not payload or not payload[1]:
        return None
    image_id, png = payload
    image_bgr = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    if image_bgr is None:
        return None
    return VisImage(image_id, cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB))
