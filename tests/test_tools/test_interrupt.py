"""Ctrl-C while a program still imports its libraries, which takes seconds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_tools.helpers import TOOLS

PROGRAMS = [
    path.name
    for path in sorted(TOOLS.glob("[!_]*.py"))
    if re.search(r"^    run_(tool|demo)\(main\)", path.read_text("utf-8"), re.M)
]


@pytest.mark.skipif(sys.platform == "win32", reason="no process ends by a signal there")
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_libraries_are_imported(program: str, tmp_path: Path) -> None:
    for library in ("cv2", "mmengine", "numpy", "torch"):
        (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(TOOLS / program)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("", "interrupted\n")
    assert done.returncode == -signal.SIGINT  # a shell says 130
