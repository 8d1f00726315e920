"""The C++ compiler that torch calls: adds a precompiled header to the real one.

torch takes any program as its compiler (CXX). This file is run by itself for
each of mmcv's source files, so it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def compile_main(argv: Sequence[str]) -> NoReturn:
    """Stand in for the C++ compiler: add the precompiled header, then call it.

    The first compilation makes the header with its very flags, since neither gcc
    nor clang takes one that was made with others. A call with other flags, a
    link or a file that is not C++ goes through as it came.
    """
    real = shlex.split(os.environ["MMVIS_CXX"])
    header = Path(os.environ["MMVIS_CXX_HEADER"])
    flags = pch_flags(argv)
    extra: list[str] = []
    if flags is not None and pch_is_ready(real, header, flags):
        extra = ["-include", str(header)]
    os.execvp(real[0], [*real, *extra, *argv])


def pch_flags(argv: Sequence[str]) -> list[str] | None:
    """The flags that decide whether a precompiled header fits this call.

    Returns:
        list | None: None if the call does not compile one C++ file.
    """
    flags, sources, rest = [], [], iter(argv)
    for argument in rest:
        if argument in ("-o", "-MF", "-MT", "-MQ"):
            next(rest, None)
        elif argument.endswith((".cpp", ".cc", ".cxx")):
            sources.append(argument)
        elif argument not in ("-c", "-MMD", "-MD"):
            flags.append(argument)
    if "-c" not in argv or len(sources) != 1 or "-ObjC++" in argv or "-x" in argv:
        return None
    return flags


def pch_is_ready(real: Sequence[str], header: Path, flags: Sequence[str]) -> bool:
    """Make the precompiled header once; tell whether it fits these flags."""
    state = header.with_suffix(".json")
    with header.with_suffix(".lock").open("a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not state.exists():
            compiled = Path(f"{header}{os.environ['MMVIS_CXX_SUFFIX']}")
            command = [*real, *flags, "-x", "c++-header", str(header)]
            code = subprocess.call([*command, "-o", str(compiled)])
            if code:  # a plain build is slower, but it may well work
                compiled.unlink(missing_ok=True)
                print("mmcv_pch: no precompiled header, building plainly", flush=True)
            state.write_text(json.dumps({"flags": list(flags), "ok": code == 0}))
    made = json.loads(state.read_text())
    return bool(made["ok"]) and made["flags"] == list(flags)


if __name__ == "__main__":
    compile_main(sys.argv[1:])
