"""Imports in the package point one way; CONTRIBUTING.md lists the rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "mmyolo_vis_hooks"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# A room, a folder or a module beside the folders, may import rooms of its own level
# and below. Modules that are not listed are level 0; __init__.py sees all.
LEVELS = {
    "data": 1,
    "network": 1,
    "attribution": 1,
    "featmap": 1,
    "render": 1,
    "metrics": 1,
    "publish": 1,
    "detector": 2,
    "diagnosis": 2,
    "samples": 2,
    "subjects": 2,
    "checks": 2,
    "options": 2,
    "results": 3,
    "api": 3,
    "hooks": 3,
}
BACKEND_MODULES = ("wandb", "tensorboard", "tensorboardX", "torch.utils.tensorboard")


def check_package(root: Path) -> list[str]:
    """Every place that breaks a rule, as 'file:line: what'."""
    found, edges = [], {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, problem in check_module(relative, tree):
            found.append(f"{relative}:{line}: {problem}")
        room = room_of(relative)
        only_types = set(type_imports(relative, tree))
        for line, module in set(imports(relative, tree)) - only_types:
            other = inner_room(module)
            if room != "__init__" and other and other != room:
                edges.setdefault((room, other), f"{relative}:{line}")
    for (one, other), place in sorted(edges.items()):
        if one < other and (other, one) in edges:
            back = edges[other, one]
            found.append(f"{place}: {one} and {other} import each other ({back})")
    return found


def check_module(relative: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    room = room_of(relative)
    level = LEVELS.get(room, 0)
    if len(relative.parts) > 1 and room not in LEVELS:
        yield 1, f"the folder {room} has no level in tests/test_import_rules.py"
    only_types = set(type_imports(relative, tree))
    for line, module in imports(relative, tree):
        if (line, module) in only_types and inner_room(module) == "options":
            continue  # what options an object has is no dependency when it runs
        top = module.split(".")[0]
        other = inner_room(module)
        if LEVELS.get(other, 0) > level and room != "__init__":
            yield line, f"{room} imports {other}"
        on_request = (room, module) == ("dependencies", "mmyolo")
        if top in ("mmyolo", "mmcv_builder") and not on_request:
            yield line, f"imports {top}"
        if top == "pytorch_grad_cam" and room != "attribution":
            yield line, "imports pytorch_grad_cam"
        is_backend = re.search(r"VisBackend$", module) or any(
            f"{module}.".startswith(f"{name}.") for name in BACKEND_MODULES
        )
        if is_backend and room != "publish":
            yield line, f"sees a backend: {module}"
        is_runner = re.match(r"mmengine\.(runner\.)?(\w+\.)?Runner$", module)
        if is_runner and room != "hooks":
            yield line, "sees a Runner"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == "runner" and room != "hooks":
            yield node.lineno, "takes a runner"
        is_backends = isinstance(node, ast.Attribute) and node.attr == "_vis_backends"
        if is_backends and room != "publish":
            yield node.lineno, "sees a backend: _vis_backends"


def imports(relative: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports.

    ``from a import b`` counts as 'a.b', whether b is a module or a name.
    """
    package = [PACKAGE, *relative.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield node.lineno, str(first.value)


def type_imports(relative: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Those of the imports that only type checkers see."""
    for node in ast.walk(tree):
        name = getattr(node.test, "id", "") if isinstance(node, ast.If) else ""
        if name == "TYPE_CHECKING":
            yield from imports(relative, ast.Module(node.body, []))


def room_of(relative: Path) -> str:
    """The folder of a module, or its own name where it lies in none."""
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def inner_room(module: str) -> str:
    """The room of the package that a dotted name leads into, or ''."""
    parts = module.split(".")
    if parts[0] != PACKAGE or len(parts) < 2:
        return ""
    return parts[1] if parts[1] in LEVELS else ""


def test_the_package_keeps_the_rules() -> None:
    assert list(ROOT.rglob("*.py"))
    assert check_package(ROOT) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("data/a.py", "from ..hooks import FeatMapVisHook", "data imports hooks"),
        ("data/a.py", "from ..samples import X", "data imports samples"),
        ("data/a.py", "from .. import hooks", "data imports hooks"),
        ("render/deep/a.py", "from ...hooks.b import X", "render imports hooks"),
        ("records.py", "from .network import x", "records imports network"),
        ("data/a.py", "def f():\n    import mmyolo_vis_hooks.api", "data imports api"),
        ("render/a.py", "if TYPE_CHECKING: from .. import api", "render imports api"),
        ("api.py", "from mmengine.runner import Runner", "sees a Runner"),
        ("render/a.py", "def draw(image, runner): ...", "takes a runner"),
        ("hooks/a.py", "import mmyolo.models", "imports mmyolo"),
        ("hooks/a.py", "import_module('mmyolo')", "imports mmyolo"),
        ("dependencies.py", "import mmcv_builder", "imports mmcv_builder"),
        ("samples.py", "import pytorch_grad_cam", "imports pytorch_grad_cam"),
        ("hooks/a.py", "from mmengine import WandbVisBackend", "sees a backend"),
        ("hooks/a.py", "import wandb", "sees a backend: wandb"),
        ("hooks/a.py", "v._vis_backends", "sees a backend"),
        ("views/a.py", "", "the folder views has no level"),
    ],
)
def test_a_violation_is_found(
    name: str, text: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    [found] = check_package(tmp_path)
    assert found.startswith(f"{name}:")
    assert f": {problem}" in found


def test_rooms_of_one_level_do_not_import_each_other_in_a_circle(
    tmp_path: Path,
) -> None:
    for room, other in (("data", "render"), ("render", "data")):
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(f"from ..{other} import x")
    [found] = check_package(tmp_path)
    assert "data and render import each other" in found
