"""Imports in the package point one way; CONTRIBUTING.md lists the rules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "mmyolo_vis_hooks"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# A folder may import folders of its own level and below. Modules that lie in no
# folder are level 0; __init__.py, which only names what is public, may see all.
LEVELS = {
    "data": 1,
    "capture": 1,
    "maps": 1,
    "drawing": 1,
    "metrics": 1,
    "publishing": 1,
    "explainers": 2,
    "inference": 2,
    "hooks": 3,
}
# A record that travels carries the geometry of its frame.
ALLOWED = {("types.py", f"{PACKAGE}.data.geometry.FrameTransform")}
BACKEND_MODULES = ("wandb", "tensorboard", "tensorboardX", "torch.utils.tensorboard")


def check_package(root: Path) -> list[str]:
    """Every place that breaks a rule, as 'file:line: what'."""
    found, edges = [], {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, problem in check_module(relative, tree):
            found.append(f"{relative}:{line}: {problem}")
        folder = folder_of(relative)
        for line, module in imports(relative, tree):
            other = inner_folder(module)
            if folder and other and other != folder:
                edges.setdefault((folder, other), f"{relative}:{line}")
    for (one, other), place in sorted(edges.items()):
        if one < other and (other, one) in edges:
            back = edges[other, one]
            found.append(f"{place}: {one} and {other} import each other ({back})")
    return found


def check_module(relative: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    folder = folder_of(relative)
    public = relative == Path("__init__.py")
    level = LEVELS.get(folder, 0)
    if folder and folder not in LEVELS:
        yield 1, f"the folder {folder} has no level in tests/test_import_rules.py"
    for line, module in imports(relative, tree):
        top = module.split(".")[0]
        other = inner_folder(module)
        upwards = top == PACKAGE and LEVELS.get(other, 0) > level
        if upwards and not public and (str(relative), module) not in ALLOWED:
            yield line, f"{folder or 'a root module'} imports {other}"
        if top == "mmyolo":
            yield line, "imports mmyolo"
        if top == "pytorch_grad_cam" and relative != Path("maps/cam_methods.py"):
            yield line, "imports pytorch_grad_cam"
        is_backend = re.search(r"VisBackend$", module) or any(
            f"{module}.".startswith(f"{name}.") for name in BACKEND_MODULES
        )
        if is_backend and relative != Path("publishing/publisher.py"):
            yield line, f"sees a backend: {module}"
        is_runner = re.match(r"mmengine\.(runner\.)?(\w+\.)?Runner$", module)
        if is_runner and folder != "hooks":
            yield line, "sees a Runner"
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == "runner" and folder != "hooks":
            yield node.lineno, "takes a runner"
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "_vis_backends"
            and relative != Path("publishing/publisher.py")
        ):
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


def folder_of(relative: Path) -> str:
    return relative.parts[0] if len(relative.parts) > 1 else ""


def inner_folder(module: str) -> str:
    """The folder of the package that a dotted name leads into, or ''."""
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
        ("data/a.py", "from ..explainers.x import X", "data imports explainers"),
        ("data/a.py", "from .. import hooks", "data imports hooks"),
        ("maps/deep/a.py", "from ...hooks.b import X", "maps imports hooks"),
        ("types.py", "from .maps import x", "a root module imports maps"),
        (
            "explainers/a.py",
            "def f():\n    import mmyolo_vis_hooks.hooks.b",
            "explainers imports hooks",
        ),
        (
            "explainers/a.py",
            "if TYPE_CHECKING:\n    from mmengine.runner import Runner",
            "sees a Runner",
        ),
        ("drawing/a.py", "def draw(image, runner): ...", "takes a runner"),
        ("hooks/a.py", "import mmyolo.models", "imports mmyolo"),
        ("hooks/a.py", "import_module('mmyolo')", "imports mmyolo"),
        ("explainers/a.py", "import pytorch_grad_cam", "imports pytorch_grad_cam"),
        (
            "maps/feature_map.py",
            "from pytorch_grad_cam.utils import x",
            "imports pytorch_grad_cam",
        ),
        (
            "hooks/a.py",
            "from mmengine.visualization import WandbVisBackend",
            "sees a backend: mmengine.visualization.WandbVisBackend",
        ),
        ("publishing/gather.py", "import wandb", "sees a backend: wandb"),
        (
            "hooks/a.py",
            "def f(v):\n    return v._vis_backends",
            "sees a backend: _vis_backends",
        ),
        (
            "views/a.py",
            "",
            "the folder views has no level in tests/test_import_rules.py",
        ),
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
    assert found.endswith(f": {problem}")


def test_folders_of_one_level_do_not_import_each_other_in_a_circle(
    tmp_path: Path,
) -> None:
    for folder, other in (("data", "drawing"), ("drawing", "data")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(f"from ..{other} import x")
    [found] = check_package(tmp_path)
    assert "data and drawing import each other" in found


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .hooks import X\nfrom .version import __version__",
        "hooks/a.py": "from mmengine.runner import Runner\n"
        "from ..explainers import x\nfrom ..publishing.publisher import P\n"
        "def before_run(self, runner): ...",
        "explainers/a.py": "from ..data import x\nfrom ..maps.a import y\n"
        "from mmengine.runner.amp import autocast",
        "maps/cam_methods.py": "import pytorch_grad_cam",
        "publishing/publisher.py": "from mmengine.visualization import WandbVisBackend"
        "\ndef f(v): return v._vis_backends",
        "drawing/a.py": "from ..data.geometry import g\nfrom ..types import VisImage",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert check_package(tmp_path) == []
