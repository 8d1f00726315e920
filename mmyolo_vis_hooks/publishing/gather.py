"""Brings the pictures of all ranks to the one that publishes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import cv2
import mmcv
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    get_world_size,
)

from ..errors import VisError
from ..types import VisImage


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
        """
        counts = all_gather_object(len(self._paths))
        for source in range(1, get_world_size()):
            for i in range(counts[source]):
                payload = [self._read(i) if get_rank() == source else None]
                broadcast_object_list(payload, src=source)
                if get_rank() == 0 and payload[0] is not None:
                    image_id, png = payload[0]
                    yield VisImage(image_id, mmcv.imfrombytes(png, channel_order="rgb"))
        self.clear()

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
