"""Finds modules, and single maps of them, by the paths that users write."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from torch import nn

from ..declare import refuse
from ..errors import FeatureShapeError, LayerNotFoundError, VisConfigError
from .maps import View

_PATH = re.compile(r"\w+(\.\w+|\[-?\d+\])*")
_PART = re.compile(r"\[(-?\d+)\]|(\w+)")
# What a caption may say behind the layer that a path cannot: keys and calls.
_CAPTION = re.compile(r"(\[\w+\])*( \(call \d+\))?$")
_PATHS = (
    "write names joined by dots and indices in brackets, as in 'neck.out_layers[2]'"
)
_MAX_SUGGESTIONS = 8


def parse_layer_path(path: str) -> tuple[str | int, ...]:
    """Split a layer path into attribute names and indices.

    Args:
        path (str): Names joined by dots, with indices in brackets or as names:
            ``'neck.out_layers[2]'`` and ``'neck.out_layers.2'`` are the same,
            ``('neck', 'out_layers', 2)``.

    Raises:
        VisConfigError: If ``path`` is not of that form.
    """
    if not isinstance(path, str):
        raise refuse("target_layers", path, "name modules by their paths; " + _PATHS)
    if not _PATH.fullmatch(path):
        raise VisConfigError(
            f"target_layers: cannot read {path!r} as the path of a module; "
            + _remedy(path)
        )
    parts = (index or name for index, name in _PART.findall(path))
    return tuple(int(p) if p.lstrip("-").isdecimal() else p for p in parts)


def _remedy(path: str) -> str:
    """What to write for a path that cannot be read, also if it is of a caption."""
    if path.startswith("input of "):
        return "target_layers=None explains the input of a block where that is right"
    layer = _CAPTION.sub("", path)
    if layer != path and re.fullmatch(r"[\w.\[\]]+", layer):
        return f"write {layer!r}, which gives every map of the layer"
    return _PATHS


def resolve_layer(model: nn.Module, path: str) -> nn.Module:
    """Find the module that a layer path, or the caption of one of its maps, names.

    Args:
        model (nn.Module): The detector itself, without wrappers.
        path (str): A path in the syntax of :func:`parse_layer_path`. What follows a
            module that is no container is the place of a map in its output.

    Raises:
        LayerNotFoundError: With the nearest paths that exist.
    """
    module, depth = _followed(model, path)
    places = parse_layer_path(path)[depth:]
    is_container = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    is_of_map = depth > 0 and all(isinstance(place, int) for place in places)
    if places and (is_container or not is_of_map):
        raise LayerNotFoundError(_not_found_message(model, path, depth))
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


def layer_of_map(model: nn.Module, path: str) -> str:
    """The path of the layer alone: ``'neck'`` for ``'neck[0]'``, one of its maps."""
    try:
        parts, (_, depth) = parse_layer_path(path), _followed(model, path)
    except VisConfigError:  # an item of a ModuleDict, with a key that is no name
        return path
    return path if depth in (0, len(parts)) else _spelled(parts[:depth])


def named_maps(names: Collection[str], views: Sequence[View]) -> list[View]:
    """The maps that users name: all of a layer, or one.

    Args:
        names (Collection[str]): As users wrote them.
        views (Sequence[View]): All maps that there are.

    Raises:
        FeatureShapeError: If a name is that of no map.
    """
    layers, titles = {v.key.layer for v in views}, [v.title for v in views]
    single = {bracketed(name) for name in names if name not in layers}
    if not single <= set(titles):
        raise FeatureShapeError(
            f"target_layers: there is no map {', '.join(sorted(single - set(titles)))};"
            f" write one of {', '.join(titles)}"
        )
    return [v for v in views if v.title in single or v.key.layer in names]


def _followed(model: nn.Module, path: str) -> tuple[nn.Module, int]:
    """The last module on a path, and how many of its parts lead there."""
    parts = parse_layer_path(path)
    module = model
    for depth, part in enumerate(parts):
        child = _child(module, part)
        if child is None:
            return module, depth
        module = child
    return module, len(parts)


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
        child = module._modules.get(part)
        # Some networks keep a submodule behind a property or an alias.
        child = child if child is not None else getattr(module, part, None)
        return child if isinstance(child, nn.Module) else None
    # Unlike `children`, these hold a module that is shared at each of its places.
    children = list(module._modules.values())
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return children[part] if -len(children) <= part < len(children) else None
    return module._modules.get(str(part))


def _not_found_message(model: nn.Module, path: str, depth: int) -> str:
    names = [bracketed(name) for name, _ in model.named_modules() if name]
    names = [name for name in names if "_orig_mod" not in name]
    parts = parse_layer_path(path)
    known, wanted = _spelled(parts[:depth]), _spelled(parts)
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
            return (
                f"{_spelled(parts[:depth])!r} was fused for deployment "
                "(SwitchToDeployHook, --deploy) and its branches are gone: name it "
                "itself, or do not fuse; "
            )
        block = _child(block, parts[depth]) if block and depth < len(parts) else None
    return ""


def _spelled(parts: Sequence[str | int]) -> str:
    return bracketed(".".join(map(str, parts)))


def bracketed(name: str) -> str:
    """Spell a torch module name the way users write it: ``a.0.b`` -> ``a[0].b``."""
    return re.sub(r"\.(-?\d+)(?=\.|$)", r"[\1]", name)
