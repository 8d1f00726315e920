"""Writes files whole, and none over a file that somebody else wrote."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import PublishError, VisConfigError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
RESULT_SUFFIXES = (".npz", ".json", *PICTURE_SUFFIXES)
"""What the file of a result may end in."""
_JPEG_QUALITY = 92
# What is written of one image beside a page.
_SUFFIXES = (".jpg", ".npz", ".json")


class OwnFiles:
    """Files that were written to a folder here, by this run or an earlier one.

    A record tells them from the user's: a line for each, with its size, from the moment
    in which it is there. One that has another size now was changed by somebody else.
    Threads may write at the same time.

    Args:
        folder (Path): Where files go; made if it is missing.
        assets (str): Name of the folder in it that holds the record, too.

    Raises:
        PublishError: If the folders cannot be written to.
    """

    RECORD = "written.jsonl"

    def __init__(self, folder: Path, assets: str) -> None:
        self.folder = folder
        self._assets = folder / assets
        self._record = self._assets / self.RECORD
        self._lock = threading.Lock()
        for needed in (folder, self._assets):
            make_writable(needed)
        self._sizes = {
            name: size
            for name, size in self._read()
            if (folder / name).is_file() and (folder / name).stat().st_size == size
        }
        found = {
            path.relative_to(folder).as_posix()
            for parent in (folder, self._assets)
            for path in parent.iterdir()
            if path != self._record
        }
        # Some file systems do not tell A.jpg from a.jpg.
        self._others = {name.lower() for name in found - self._sizes.keys()}
        self._taken = {
            Path(name).name.split(".")[0]
            for name in self._others
            if name.endswith(_SUFFIXES)
        }

    def check_free(self, name: str) -> None:
        """Make sure that a path in the folder can be written without loss to the user.

        Raises:
            PublishError: If somebody else's file is there.
        """
        if name.lower() in self._others:
            raise PublishError(
                f"{self.folder / name} is not of an earlier run and is not "
                "overwritten; move it, or name another folder"
            )

    def free_name(self, name: str) -> str:
        """Give a name for which no file of the user's stands in the way.

        Files of a name, which holds no dots, are ``NAME.jpg``, ``NAME.npz`` and
        ``NAME.json`` in the folder, and ``NAME.*.jpg`` among the assets. Else it is
        NAME-2, NAME-3, …: each once in a run, and the same in every run.
        """
        with self._lock:
            number, free = 1, name
            while free.lower() in self._taken:
                number += 1
                free = f"{name}-{number}"
            self._taken.add(free.lower())
        return free

    def write(self, name: str, data: bytes) -> Path:
        """Write a file, by its path in the folder, whole or not at all.

        Raises:
            PublishError: If it cannot be written, or would replace somebody's file.
        """
        self.check_free(name)
        write_whole(self.folder / name, data)
        self.adopt(name)
        return self.folder / name

    def adopt(self, name: str) -> None:
        """Take a file that was written otherwise into the record."""
        size = (self.folder / name).stat().st_size
        with self._lock:
            self._sizes[name] = size
            # Without the record the file is taken for the user's: that loses nothing.
            with contextlib.suppress(OSError), open(self._record, "a") as file:
                file.write(json.dumps([name, size]) + "\n")

    def close(self) -> None:
        """Write the record anew, without what was replaced since."""
        with self._lock:
            lines = [json.dumps(item) for item in sorted(self._sizes.items())]
        write_whole(self._record, "".join(f"{line}\n" for line in lines).encode())

    def _read(self) -> Iterator[tuple[str, int]]:
        with contextlib.suppress(OSError), open(self._record, "rb") as file:
            for line in file:
                # The last line may be cut off.
                with contextlib.suppress(ValueError):
                    name, size = json.loads(line)
                    yield str(name), int(size)


def make_writable(folder: Path) -> None:
    """Make a folder, and raise a PublishError now if it will take no files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PublishError(
            f"cannot write to the folder {folder} ({error.strerror or error}); name a "
            "folder of your own with free space"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole, or raise a PublishError and leave what was there."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            file.write(data)
        written = part.stat().st_size
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        os.replace(part, path)
    except OSError as error:
        raise PublishError(
            f"{path} was not written ({error}); look at the free space and the "
            "permissions of its folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_image(file: str, image_rgb: np.ndarray) -> None:
    """Write ``(H, W, 3)`` uint8, RGB, in the format of the suffix; whole, as above."""
    path = Path(file)
    write_whole(path, encode(path.suffix.lower(), image_rgb, _JPEG_QUALITY))


def write_result(
    path: Path,
    draw: Callable[[], np.ndarray],
    arrays: Callable[[], dict[str, np.ndarray]],
    records: Callable[[], list[dict[str, Any]]],
) -> None:
    """Write of a result what the suffix asks for, whole; missing folders are made.

    Args:
        path (Path): ``.npz`` gets the arrays, ``.json`` the records, the suffix of a
            picture the picture; a ``VisConfigError`` says what else cannot be.
        draw, arrays, records (Callable): Give these.
    """
    suffix = path.suffix.lower()
    if suffix not in RESULT_SUFFIXES:
        raise VisConfigError(
            f"path={str(path)!r} cannot work: use a folder, or a name that ends in "
            f"{', '.join(RESULT_SUFFIXES)}"
        )
    make_writable(path.parent)
    if suffix == ".npz":
        data = BytesIO()
        np.savez_compressed(data, **arrays())  # type: ignore[arg-type]
        write_whole(path, data.getvalue())
    elif suffix == ".json":
        write_whole(path, json.dumps(records(), indent=1).encode())
    else:
        write_image(str(path), draw())


def encode(suffix: str, picture: np.ndarray, quality: int = 95) -> bytes:
    """Encode ``(H, W)`` levels or ``(H, W, 3)`` RGB, uint8, in the format of a suffix.

    Raises:
        PublishError: If OpenCV or the format cannot do it.
    """
    if picture.ndim == 3:
        picture = np.ascontiguousarray(picture[..., ::-1])
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if "jp" in suffix else []
    try:
        done, data = cv2.imencode(suffix, picture, options)
    except cv2.error:
        done = False
    if not done:
        height, width = picture.shape[:2]
        raise PublishError(
            f"a picture of {width}x{height} pixels cannot be stored as {suffix}; make "
            "it smaller, or choose another format"
        )
    return data.tobytes()
