"""Imports the programs of ``tools`` by their files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).resolve().parents[2] / "tools"
# They import each other by their names.
sys.path.insert(0, str(TOOLS))


def load_tool(name: str) -> ModuleType:
    """Import a tool under a name of its own: `test` is one of Python's packages."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
