"""What programs share that an interrupted call goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import nn

from _common import ToolError
from mmyolo_vis_hooks.publish.files import make_writable, write_whole


def open_out_dir(out_dir: Path, kept: str) -> None:
    """Make the folder; refuse one that has files but not that of an earlier call."""
    make_writable(out_dir)
    if any(out_dir.iterdir()) and not (out_dir / kept).exists():
        raise ToolError(
            f"{out_dir} holds files that are not of an earlier call; name another "
            "--out-dir"
        )


class Kept:
    """Results by name in a file, which an interrupted call goes on with.

    Args:
        path (Path): Lines of JSON: the settings, then a name and its result each.
        settings (dict): Of this call.

    Raises:
        ToolError: If the file is of a call with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        wanted, lines = json.dumps(settings), [""]
        if path.exists():
            first, *lines = path.read_text("utf-8", errors="replace").split("\n")
            if first != wanted:
                raise ToolError(
                    f"{path.parent} holds results of another call, with other weights, "
                    "settings or objects than this one; name another --out-dir, or "
                    "remove it"
                )
        whole = lines[:-1]  # what follows the last line break was cut off, or is empty
        self.known: dict[str, Any] = dict(map(json.loads, whole))
        text = "".join(f"{line}\n" for line in (wanted, *whole))
        write_whole(path, text.encode())

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def add(self, name: str, result: Any) -> None:
        """Keep a result, whatever happens next."""
        self.known[name] = result
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, result]) + "\n")


def progress(names: Iterable[str], what: str) -> Iterator[str]:
    """Go through names, with a bar where there are any."""
    waiting = list(names)
    if waiting:
        yield from track(waiting, what, console=Console(stderr=True))


def digest(parts: Iterable[bytes]) -> str:
    """What tells a call from one of other weights, settings or objects."""
    total = hashlib.sha1(usedforsecurity=False)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def digest_of_weights(detector: nn.Module) -> str:
    """The digest of all weights and buffers of a detector."""
    tensors = detector.state_dict().values()
    return digest(tensor.cpu().numpy().tobytes() for tensor in tensors)
