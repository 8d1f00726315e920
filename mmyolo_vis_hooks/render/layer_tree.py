"""Lays a detector's layers out as a table with the paths that users copy."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import VisConfigError
from ..network.layer_table import LayerRow


def layer_tree(
    rows: Sequence[LayerRow], *, depth: int = 3, all_layers: bool = False
) -> Group:
    """Make a table of layers that rich can print, as wide as it is.

    What lies deeper than ``depth`` levels is counted; ``all_layers`` also shows those
    that cannot be targeted, with the reason.

    Raises:
        VisConfigError: If ``depth`` is no number of levels.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise VisConfigError(
            f"depth={depth!r} is no number of levels; set a whole number of 1 or more"
        )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "type"):
        table.add_column(title, no_wrap=True)
    for title in ("C x h x w", "stride", "params", "below"):
        table.add_column(title, no_wrap=True, justify="right")
    listed = [row for row in rows if all_layers or not row.why_not]
    shown = [row for row in listed if row.depth <= depth]
    for row in shown:
        inside = (f"{row.path}.", f"{row.path}[")
        below = sum(r.depth > depth and r.path.startswith(inside) for r in listed)
        table.add_row(
            "  " * (row.depth - 1) + row.path,
            row.type_name,
            row.why_not or "\n".join(" x ".join(map(str, s)) for s in row.shapes),
            "\n".join(_stride(row.network_hw, shape) for shape in row.shapes),
            _number(row.num_parameters),
            f"+{below}" if below and row.depth == depth else "",
            style="dim" if row.why_not else "",
        )
    return Group(table, Text("\n" + _note(shown, depth), style="dim"))


def _note(shown: Sequence[LayerRow], depth: int) -> str:
    paths = [row.path for row in shown if not row.why_not]
    if not paths:
        return f"No layer can be targeted down to a depth of {depth}."
    height, width = shown[0].network_hw
    indexed = sorted((path for path in paths if "[" in path), key=len)[:1]
    examples = " ".join([paths[0], *(f"'{path}'" for path in indexed)])
    return (
        f"network input {height} x {width} (h x w); stride: its pixels per cell; "
        f"below: layers that a depth above {depth} shows.\n"
        "To target layers, give their paths, in quotes if they have brackets:\n"
        f"  --target-layers {examples}"
    )


def _stride(network_hw: tuple[int, int], shape: tuple[int, int, int]) -> str:
    height, width = (f"{a / b:.3g}" for a, b in zip(network_hw, shape[1:]))
    return height if height == width else f"{height}x{width}"


def _number(count: int) -> str:
    if count < 1000:
        return str(count)
    # Below, thousands would round to a number of four digits.
    return f"{count / 1e3:.1f} k" if count < 99_950 else f"{count / 1e6:.2f} M"
