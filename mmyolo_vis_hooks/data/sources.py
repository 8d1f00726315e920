"""Images of files, folders, addresses and videos, one after the other."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

import cv2
import numpy as np

from ..errors import VisError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".dib", ".jpe", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv"}
    | {".webm", ".wmv"}
)
# File systems take 255 bytes; a number and a suffix come behind a name.
_MAX_NAME_BYTES = 180


class ImageReadError(VisError):
    """A file or an address gives no image."""


@dataclass(frozen=True)
class SourceImage:
    """One image, or the reason why there is none.

    Attributes:
        name: Of the file, and the number of a frame; safe in file names. Others may
            have the same.
        title: Its path or address; of a frame with the number, from 0.
        content: A path or an address; of a video ``(H, W, 3)`` uint8, RGB; None if it
            could not be read.
        error: Why not.
    """

    name: str
    title: str
    content: str | np.ndarray | None
    error: ImageReadError | None = None

    def read(self) -> str | np.ndarray:
        """The content.

        Raises:
            ImageReadError: If it could not be read.
        """
        if self.content is None:
            raise self.error or ImageReadError(f"there is no image {self.title}")
        return self.content


@dataclass(frozen=True)
class _Entry:
    name: str
    title: str
    location: str
    is_video: bool
    count: int = 1


class ImageSource:
    """All images that some arguments of a command name.

    Args:
        sources (Sequence[str]): Image files, videos, folders, which are searched
            with all folders in them, and addresses (``https://``, ``s3://``).
        exclude (str, optional): A folder that is left out, such as that of the results.

    Raises:
        ImageReadError: If something does not exist, a folder holds no image, a video
            cannot be opened.
    """

    def __init__(self, sources: Sequence[str], exclude: str | None = None) -> None:
        self._entries: list[_Entry] = []
        for source in sources:
            for stem, location in _find(source, exclude):
                is_video = _suffix(location) in VIDEO_SUFFIXES
                count = 1
                if is_video:
                    try:
                        with _open_video(location) as video:
                            frames = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
                            count = max(1, frames)  # of a broken one below zero
                    except ImageReadError:
                        # In a folder one bad file must not stop the others; it is
                        # met again, and reported, when its turn comes.
                        if not os.path.isdir(source):
                            raise
                named = safe_name(stem), _printable(location)
                self._entries.append(_Entry(*named, location, is_video, count))

    def __len__(self) -> int:
        """How many images there are; of a video what its header says."""
        return sum(entry.count for entry in self._entries)

    @property
    def has_videos(self) -> bool:
        """Whether frames of videos are among them."""
        return any(entry.is_video for entry in self._entries)

    def __iter__(self) -> Iterator[SourceImage]:
        for entry in self._entries:
            if entry.is_video:
                yield from _frames(entry)
            else:
                yield SourceImage(entry.name, entry.title, entry.location)


def safe_name(name: str) -> str:
    """A name for files: letters, digits, ``_`` and ``-`` of any script."""
    # The end tells the files of one folder apart.
    content = re.sub(r"[^\w-]", "_", name).encode()[-_MAX_NAME_BYTES:]
    return content.decode(errors="ignore") or "_"


def _suffix(location: str) -> str:
    # In a file's name '#' and '?' mean nothing.
    path = urlparse(location).path if "://" in location else location
    return Path(path).suffix.lower()


def _printable(location: str) -> str:
    # Linux takes names that are no UTF-8; a page and a terminal do not.
    return os.fsencode(location).decode(errors="replace")


def _find(source: str, exclude: str | None) -> Iterator[tuple[str, str]]:
    """Name and location of each file that an argument stands for."""
    if "://" in source:
        path = unquote(urlparse(source).path)
        yield Path(path).stem or urlparse(source).netloc, source
        return
    if os.path.isdir(source):
        found = list(_walk(source, exclude))
        if not found:
            kinds = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise ImageReadError(f"the folder {source} holds no image ({kinds})")
        for path in found:
            yield os.path.splitext(os.path.relpath(path, source))[0], path
        return
    if not os.path.isfile(source):
        raise ImageReadError(f"there is no image, folder or video {source}")
    yield Path(source).stem, source


def _walk(folder: str, exclude: str | None) -> Iterator[str]:
    left_out = os.path.realpath(exclude) if exclude else None
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if os.path.realpath(os.path.join(parent, name)) != left_out
        )
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                yield os.path.join(parent, name)


@contextlib.contextmanager
def _open_video(location: str) -> Iterator[cv2.VideoCapture]:
    path = _printable(location)  # a name that is no UTF-8 makes OpenCV crash
    video = cv2.VideoCapture(path)
    try:
        if not video.isOpened():
            raise ImageReadError(f"{path} is no video that OpenCV can open")
        yield video
    finally:
        video.release()


def _frames(entry: _Entry) -> Iterator[SourceImage]:
    title, number, seconds = entry.title, 0, 0.0
    try:
        with _open_video(entry.location) as video:
            # Not mmcv.VideoReader: it seeks at first, and loses the start of MPEG-1.
            while (frame_bgr := video.read()[1]) is not None:
                seconds = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
                yield SourceImage(
                    f"{entry.name}_{number:06d}",
                    f"{title} frame {number}",
                    cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB),
                )
                number += 1
            if not number:
                raise ImageReadError(f"{title} holds no frame that can be decoded")
            # In time, not in frames: their number is a guess where the rate varies.
            rate = video.get(cv2.CAP_PROP_FPS) or math.inf
            seconds = seconds or (number - 1) / rate  # not all frames have a time
            promised = video.get(cv2.CAP_PROP_FRAME_COUNT) / rate
            # A longer sound track promises a little too much.
            if promised - seconds - 3 / rate > min(2, promised / 10):
                raise ImageReadError(
                    f"{title} ends with frame {number - 1}, after {seconds:.1f} of the "
                    f"{promised:.1f} s that its header promises: it was cut short"
                )
    except ImageReadError as error:
        yield SourceImage(entry.name, title, None, error)
