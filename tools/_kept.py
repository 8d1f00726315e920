"""What programs share that an interrupted call goes on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from _common import ToolError
from mmyolo_vis_hooks.publish.files import make_writable, write_whole


class Kept:
    """Results by name in a file of a folder, written one by one.

    Args:
        path (Path): Lines of JSON: the settings, then a name and its result each. Its
            folder is made.
        settings (dict): Of this call.

    Raises:
        ToolError: If the folder has other files, or those of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        make_writable(path.parent)
        first, *lines = [""]
        if path.exists():
            first, *lines = path.read_text(encoding="utf-8").split("\n")
        elif any(path.parent.iterdir()):
            raise ToolError(
                f"{path.parent} holds files that are not of an earlier call; name "
                "another --out-dir"
            )
        if first and json.loads(first) != settings:
            raise ToolError(
                f"{path.parent} holds results of another call, with other weights, "
                "settings or objects than this one; name another --out-dir, or remove "
                "it"
            )
        # The last line may have been cut off.
        whole = [line for line in lines if line.endswith("]")]
        self.known: dict[str, Any] = dict(map(json.loads, whole))
        text = "".join(f"{line}\n" for line in (json.dumps(settings), *whole))
        write_whole(path, text.encode())

    def add(self, name: str, result: Any) -> None:
        """Keep a result, whatever happens next."""
        self.known[name] = result
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, result]) + "\n")


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
