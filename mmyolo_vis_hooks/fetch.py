"""Gets what lies at an address, whole, and does not wait for ever."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import wrap_file

PATIENCE = 60.0
"""Seconds without a byte until an address counts as one that does not answer."""


def fetch(address: str, file: Path, *, show_progress: bool = False) -> None:
    """Write what lies at an address (``http://``, ``https://``) to a file.

    A bar shows how much is there, if asked for and if stderr is a terminal.

    Raises:
        OSError: It does not answer, has no such file, or breaks off; the file cannot be
            written.
        HTTPException | ValueError: It is no address, or its answer is none.
    """
    console = Console(stderr=True)
    hidden = not (show_progress and console.is_terminal)
    # Some servers turn away what calls itself Python.
    request = Request(address, headers={"User-Agent": "mmyolo_vis_hooks"})
    with urlopen(request, timeout=PATIENCE) as answer, open(file, "wb") as target:
        total = answer.length or 0  # not every server knows it
        with wrap_file(
            answer, total, description=file.name, console=console, disable=hidden
        ) as content:
            shutil.copyfileobj(content, target)
        if answer.length:
            raise OSError(f"it broke off, {answer.length} bytes before its end")
