"""Lets Ctrl-C end a program with one word, also while libraries are imported.

To be imported before them.
"""

from __future__ import annotations

import sys
from types import TracebackType


def _tell(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
