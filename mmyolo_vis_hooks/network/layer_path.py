"""Finds modules by the paths that users write: ``neck.out_layers[2]``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from ..errors import LayerNotFoundError, VisConfigError

_TOKEN = re.compile(r"(?P<name>\w+)|\[(?P<index>-?\d+)\]|(?P<dot>\.)")
_MAX_SUGGESTIONS = 8


def parse_layer_path(path: str) -> tuple[str | int, ...]:
    """Split a layer path into attribute names and indices.

    Args:
        path (str): Names joined by dots, with indices in brackets or as names:
            ``'neck.out_layers[2]'`` and ``'neck.out_layers.2'`` are the same.

    Returns:
        tuple: ``('neck', 'out_layers', 2)``.

    Raises:
        VisConfigError: If ``path`` is not of that form.
    """
    if not isinstance(path, str) or not path:
        raise VisConfigError(
            f"target_layers must hold module paths such as 'neck.out_layers[2]', "
            f"but got {path!r}"
        )
    parts: list[str | int] = []
    position = 0
    needs_name = True
    while position < len(path):
        match = _TOKEN.match(path, position)
        kind = match.lastgroup if match else None
        if match is None or needs_name != (kind == "name"):
            raise VisConfigError(
                f"target_layers: cannot read {path!r} at position {position} "
                f"({path[position]!r}); write names joined by dots and indices in "
                "brackets, as in 'neck.out_layers[2]'"
            )
        if kind == "name":
            parts.append(
                int(match["name"]) if match["name"].isdecimal() else match["name"]
            )
        elif kind == "index":
            parts.append(int(match["index"]))
        needs_name = kind == "dot"
        position = match.end()
    if needs_name:
        raise VisConfigError(f"target_layers: {path!r} ends with a dot; remove it")
    return tuple(parts)


def resolve_layer(model: nn.Module, path: str) -> nn.Module:
    """Find the module that a layer path names.

    Args:
        model (nn.Module): The detector itself, without wrappers.
        path (str): A path in the syntax of :func:`parse_layer_path`.

    Raises:
        LayerNotFoundError: With the nearest paths that exist.
    """
    module = model
    for depth, part in enumerate(parse_layer_path(path)):
        child = _child(module, part)
        if child is None:
            raise LayerNotFoundError(_not_found_message(model, path, depth))
        module = child
    return module


def resolve_layers(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Find several modules; containers that are never called give their children.

    Args:
        model (nn.Module): The detector itself, without wrappers.
        paths (Sequence[str]): Layer paths.

    Returns:
        dict[str, nn.Module]: In the order of ``paths``. A ``ModuleList`` or
        ``ModuleDict``, which has no forward of its own, is replaced by its items.
    """
    layers: dict[str, nn.Module] = {}
    for path in paths:
        layers.update(_expand(path, resolve_layer(model, path)))
    return layers


def _expand(path: str, module: nn.Module) -> dict[str, nn.Module]:
    if isinstance(module, nn.ModuleList):
        items = {f"{path}[{i}]": child for i, child in enumerate(module)}
    elif isinstance(module, nn.ModuleDict):
        items = {f"{path}.{key}": child for key, child in module.items()}
    else:
        return {path: module}
    if not items:
        raise LayerNotFoundError(
            f"target_layers: {path!r} is an empty {type(module).__name__}, which "
            "never computes anything; name another layer"
        )
    layers: dict[str, nn.Module] = {}
    for item_path, child in items.items():
        layers.update(_expand(item_path, child))
    return layers


def _child(module: nn.Module, part: str | int) -> nn.Module | None:
    module = getattr(module, "_orig_mod", module)  # under torch.compile
    if isinstance(part, str):
        child = dict(module.named_children()).get(part)
        # Some networks keep a submodule behind a property or an alias.
        child = child if child is not None else getattr(module, part, None)
        return child if isinstance(child, nn.Module) else None
    children = list(module.children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return children[part] if -len(children) <= part < len(children) else None
    return dict(module.named_children()).get(str(part))


def _not_found_message(model: nn.Module, path: str, depth: int) -> str:
    names = [bracketed(name) for name, _ in model.named_modules() if name]
    names = [name for name in names if "_orig_mod" not in name]
    parts = parse_layer_path(path)
    known = bracketed(".".join(str(part) for part in parts[:depth]))
    wanted = bracketed(".".join(str(part) for part in parts))
    # Teachers and students, and wrappers of users, have whole detectors inside.
    inside = [name for name in names if name.endswith(f".{wanted}")]
    close = difflib.get_close_matches(wanted, names, n=_MAX_SUGGESTIONS, cutoff=0.6)
    children = [
        name
        for name in names
        if name.startswith(known) and len(parse_layer_path(name)) == depth + 1
    ]
    near = list(dict.fromkeys([*inside, *close, *children]))[:_MAX_SUGGESTIONS]
    where = f"{known!r} has no {parts[depth]!r}" if known else f"no {parts[depth]!r}"
    return (
        f"target_layers: {path!r} is not a layer of {type(model).__name__} "
        f"({where}); {_fused(model, parts[:depth])}near matches: {', '.join(near)}"
    )


def _fused(model: nn.Module, parts: Sequence[str | int]) -> str:
    """What to say where a block has put its branches into one convolution."""
    block: nn.Module | None = model
    for depth in range(len(parts) + 1):
        if getattr(block, "deploy", False) is True:
            name = bracketed(".".join(map(str, parts[:depth])))
            return (
                f"{name!r} was fused for deployment (SwitchToDeployHook, --deploy) and "
                "its branches are gone: name it itself, or do not fuse; "
            )
        if block is None or depth == len(parts):
            break
        block = _child(block, parts[depth])
    return ""


def bracketed(name: str) -> str:
    """Spell a torch module name the way users write it: ``a.0.b`` -> ``a[0].b``."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name)
