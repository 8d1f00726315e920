"""Lays a detector's layers out as a tree with aligned columns."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..errors import VisConfigError
from ..network.layer_table import LayerNode

_GAP = 2
_INDENT = 2
# Columns keep this much where the width does not suffice for all of them.
_MIN_TYPE_WIDTH = 14
_MIN_PATH_WIDTH = 12
_HEADS = ("layer", "type", "C x h x w", "stride", "params", "below")


def layer_tree(
    node: LayerNode, *, depth: int = 3, all_layers: bool = False
) -> LayerTree:
    """Make a tree of layers that rich can print.

    A path is never cut, so that it can be copied: one that is too long for its column
    has a line of its own, above the rest of its row. Only one that is longer than the
    whole line is folded.

    Args:
        node (LayerNode): The detector, or a layer of it.
        depth (int): How many levels below ``node`` are shown; what lies deeper is
            counted. Defaults to 3.
        all_layers (bool): Also show layers that cannot be targeted, with the reason.
            Defaults to False.

    Returns:
        LayerTree: For ``Console.print``.

    Raises:
        VisConfigError: If ``depth`` is not a whole number of 1 or more.
    """
    if isinstance(depth, bool) or not isinstance(depth, Integral) or depth < 1:
        raise VisConfigError(
            f"depth={depth!r} is no number of levels; set a whole number of 1 or more"
        )
    return LayerTree(node, int(depth), all_layers)


def tree_text(
    node: LayerNode, *, depth: int = 3, all_layers: bool = False, width: int = 80
) -> str:
    """The tree of :func:`layer_tree` as plain text.

    Args:
        node (LayerNode): The detector, or a layer of it.
        depth (int): How many levels below ``node`` are shown. Defaults to 3.
        all_layers (bool): Also show layers that cannot be targeted. Defaults to False.
        width (int): Characters per line. Defaults to 80.

    Returns:
        str: Lines without trailing spaces; the last one ends with a line break.

    Raises:
        VisConfigError: If ``depth`` is not a whole number of 1 or more.
    """
    tree = layer_tree(node, depth=depth, all_layers=all_layers)
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
    )
    console.print(tree)
    return file.getvalue()


@dataclass(frozen=True)
class LayerTree:
    """A tree of layers, laid out for the width it is printed in.

    Attributes:
        node: The detector, or a layer of it.
        depth: How many levels below ``node`` are shown.
        all_layers: Whether layers that cannot be targeted are shown.
    """

    node: LayerNode
    depth: int
    all_layers: bool

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        rows = list(self._rows(self.node, level=0, indent=0))
        if rows:
            columns = _Columns.fitting(rows, options.max_width)
            yield Text(columns.head(), style="bold")
            for row in rows:
                yield from columns.lines(row)
            yield Text()
        for line in self._footer(rows):
            yield Text(line, style="dim")

    def _rows(self, node: LayerNode, level: int, indent: int) -> Iterator[_Row]:
        is_shown = bool(node.path) and self._is_listed(node)
        opens = level < self.depth
        if is_shown:
            hidden = 0 if opens else sum(map(self._is_listed, node.walk())) - 1
            yield _Row.of(node, indent, is_open=opens, num_hidden=hidden)
        if opens:
            for child in node.children:
                yield from self._rows(child, level + 1, indent + is_shown)

    def _is_listed(self, node: LayerNode) -> bool:
        return node.targetable or self.all_layers

    def _footer(self, rows: Sequence[_Row]) -> Iterator[str]:
        height, width = self.node.network_hw
        name = self.node.path or self.node.type_name
        count = _number(self.node.num_parameters).strip()
        yield f"{name}, {count} parameters, network input {height} x {width} (h x w)."
        paths = [row.path for row in rows if not row.is_dim]
        if not paths:
            yield f"No layer can be targeted down to a depth of {self.depth}."
            return
        note = "stride: input pixels per cell."
        if any(row.num_hidden for row in rows):
            note += f" below: layers that a depth above {self.depth} shows."
        yield note
        yield "To target layers, give their paths, in quotes if they have brackets:"
        indexed = sorted((path for path in paths if "[" in path), key=len)
        examples = dict.fromkeys([paths[0], *indexed[:1]])
        quoted = (f"'{path}'" if "[" in path else path for path in examples)
        yield f"  --target-layers {' '.join(quoted)}"


@dataclass(frozen=True)
class _Row:
    """The texts of one layer; shapes and strides belong to each other."""

    indent: int
    path: str
    type_name: str
    shapes: tuple[str, ...]
    strides: tuple[str, ...]
    params: str
    num_hidden: int
    reason: str
    is_dim: bool

    @classmethod
    def of(
        cls, node: LayerNode, indent: int, *, is_open: bool, num_hidden: int
    ) -> _Row:
        outputs = node.outputs
        reason = node.why_not or ""
        below = {layer.path for layer in node.walk()} if is_open else set()
        if node.gives_items and all(output.layer in below for output in outputs):
            # They follow with their shapes.
            outputs, reason = (), "gives its items"
        return cls(
            indent=indent * _INDENT,
            path=node.path,
            type_name=node.type_name,
            shapes=tuple(" x ".join(map(str, output.shape)) for output in outputs),
            strides=tuple(_stride(*output.stride_hw) for output in outputs),
            params=_number(node.num_parameters),
            num_hidden=num_hidden,
            reason=reason,
            is_dim=not node.targetable,
        )

    @property
    def below(self) -> str:
        return f"+{self.num_hidden}" if self.num_hidden else ""


@dataclass(frozen=True)
class _Columns:
    """Widths of the columns."""

    path: int
    type_name: int
    shape: int
    stride: int
    params: int
    below: int

    @classmethod
    def fitting(cls, rows: Sequence[_Row], width: int) -> _Columns:
        path = _widest(_HEADS[0], (" " * row.indent + row.path for row in rows))
        type_name = _widest(_HEADS[1], (row.type_name for row in rows))
        shape = _widest(_HEADS[2], (text for row in rows for text in row.shapes))
        stride = _widest(_HEADS[3], (text for row in rows for text in row.strides))
        params = _widest(_HEADS[4], (row.params for row in rows))
        below = 0
        if any(row.num_hidden for row in rows):
            below = _widest(_HEADS[5], (row.below for row in rows))
        rest = shape + stride + params + (below + _GAP if below else 0) + 4 * _GAP
        missing = path + type_name + rest - width
        if missing > 0:
            type_name = max(type_name - missing, min(type_name, _MIN_TYPE_WIDTH))
            path = max(width - rest - type_name, min(path, _MIN_PATH_WIDTH))
        return cls(path, type_name, shape, stride, params, below)

    def head(self) -> str:
        layer, type_name, shape, stride, params, below = _HEADS
        return self._joined(
            layer.ljust(self.path),
            type_name.ljust(self.type_name),
            shape.rjust(self.shape),
            stride.rjust(self.stride),
            params.rjust(self.params),
            below.rjust(self.below) if self.below else "",
        )

    def lines(self, row: _Row) -> Iterator[Text]:
        style = "dim" if row.is_dim else ""
        path = _path_text(row, style)
        room = self.path - len(path)
        if room < 0:
            yield path
            path, room = Text(), self.path
        middles = self._middles(row)
        first = self._joined(
            "",
            _shortened(row.type_name, self.type_name).ljust(self.type_name),
            middles[0],
            row.params.rjust(self.params),
            row.below.rjust(self.below),
        )
        yield Text.assemble(path, " " * room, (first, style))
        blank = " " * self.path
        for middle in middles[1:]:
            text = self._joined(blank, " " * self.type_name, middle)
            yield Text(text, style=style)

    def _middles(self, row: _Row) -> list[str]:
        """Shape and stride of each map, or the lines of the reason."""
        if row.shapes:
            return [
                shape.rjust(self.shape) + " " * _GAP + stride.rjust(self.stride)
                for shape, stride in zip(row.shapes, row.strides)
            ]
        width = self.shape + _GAP + self.stride
        lines = textwrap.wrap(row.reason, width) or [""]
        return [line.ljust(width) for line in lines]

    @staticmethod
    def _joined(*parts: str) -> str:
        return (" " * _GAP).join(parts).rstrip()


def _path_text(row: _Row, style: str) -> Text:
    """The path, its last part brighter than the way there."""
    text = Text(" " * row.indent + row.path, style=style)
    way = max(row.path.rfind("."), row.path.rfind("["))
    if way > 0 and not style:
        text.stylize("dim", row.indent, row.indent + way)
    return text


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."


def _widest(head: str, texts: Iterable[str]) -> int:
    return max(map(len, [head, *texts]))


def _stride(height: float, width: float) -> str:
    one, other = _decimal(height), _decimal(width)
    return one if one == other else f"{one}x{other}"


def _decimal(value: float) -> str:
    text = f"{value:.1f}" if value >= 1 else f"{value:.2g}"
    return text[:-2] if text.endswith(".0") else text


def _number(count: int) -> str:
    """A count of parameters; digits end in the same column with and without unit."""
    if count < 1000:
        return f"{count}  "
    # Below, thousands would round to a number of four digits.
    if count < 99_950:
        return f"{count / 1e3:.1f} k"
    return f"{count / 1e6:.2f} M"
