"""Brings the pictures of all ranks to the one that publishes."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_rank,
    is_main_process,
)

from ..errors import VisError, one_line
from ..records import VisImage


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
        self._keep(image.image_id, zlib.compress(pickle.dumps(image), 1))

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
        lost: list[Exception] = []
        for i in range(len(self)):
            try:
                data = zlib.decompress(self._read(i)[1])
            except (VisError, zlib.error) as error:
                lost.append(error)
                continue
            yield pickle.loads(data)
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


@contextlib.contextmanager
def _noted(failures: list[str]) -> Iterator[None]:
    """Note what fails, whatever it is: the others are in the next collective."""
    try:
        yield
    except Exception as error:
        failures.append(one_line(error))
