"""Whether a window can open here."""

from __future__ import annotations

import os
import sys

# Where matplotlib only writes files, Visualizer.show waits for ever.
_WITHOUT_WINDOWS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


def has_display() -> bool:
    """Whether this machine has a display, as far as that can be known."""
    on_linux = sys.platform.startswith("linux")
    return not on_linux or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def why_no_window() -> str | None:
    """Say why ``Visualizer.show`` cannot show a picture here, or None where it can."""
    if not has_display():
        return "this machine has no display"
    import matplotlib

    backend = matplotlib.get_backend()
    if backend.lower() in _WITHOUT_WINDOWS:
        return (
            f"matplotlib draws with {backend!r} and can open no window; install PyQt6 "
            "or python3-tk, and unset MPLBACKEND"
        )
    return None
