from __future__ import annotations

from textwrap import dedent

import pytest
from rich.console import Console

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.network.layer_table import LayerRow
from mmyolo_vis_hooks.render.layer_tree import layer_tree


def layer(
    path: str,
    type_name: str,
    params: int,
    *shapes: tuple[int, int, int],
    why_not: str = "",
) -> LayerRow:
    depth = path.count(".") + path.count("[") + 1
    return LayerRow(path, type_name, depth, params, (128, 160), shapes, why_not)


NETWORK = [
    layer("backbone", "Net", 900_000, (256, 4, 5)),
    layer("backbone.stage4", "Sequential", 99_949, (256, 4, 5)),
    layer("backbone.stage4[0]", "ConvModule", 1200, (256, 4, 5)),
    layer("backbone.stage4[1]", "CSPLayer", 0, (256, 4, 5)),
    layer("backbone.stage4[1].drop", "Idle", 0, why_not="does not run"),
    layer("neck", "FPN", 1000, (64, 16, 20), (64, 2, 3)),
    layer("roi_head", "RoIHead", 99_950, why_not="gives no map: (9, 7)"),
    layer("roi_head.conv", "ConvModule", 64, (64, 256, 320)),
]


def text_of(rows, width: int = 120, **options) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(layer_tree(rows, **options))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_table_of_the_layers_that_can_be_targeted():
    expected = """
        layer              type             C x h x w   stride  params  below
        backbone           Net            256 x 4 x 5       32  0.90 M
          backbone.stage4  Sequential     256 x 4 x 5       32  99.9 k     +2
        neck               FPN           64 x 16 x 20        8   1.0 k
                                           64 x 2 x 3  64x53.3
          roi_head.conv    ConvModule  64 x 256 x 320      0.5      64

        network input 128 x 160 (h x w); stride: its pixels per cell; below: layers that a depth above 2 shows.
        To target layers, give their paths, in quotes if they have brackets:
          --target-layers backbone
        """  # noqa: E501
    assert text_of(NETWORK, depth=2) == dedent(expected).strip("\n").split("\n")
    assert text_of(NETWORK)[-1] == "  --target-layers backbone 'backbone.stage4[0]'"


def test_all_layers_with_their_reasons():
    text = "\n".join(text_of(NETWORK, depth=4, all_layers=True))
    assert text.count("does not run") == 1
    assert "gives no map: (9, 7)" in text
    for row in NETWORK:
        assert row.path in text.split()
    # Hidden layers are counted as they would be shown.
    (stage,) = [r for r in text_of(NETWORK, all_layers=True) if "stage4[1]" in r]
    assert stage.endswith("+1")
    (stage,) = [r for r in text_of(NETWORK) if "stage4[1]" in r]
    assert not stage.endswith("+1")


def test_what_cannot_be_shown():
    rows = [layer("a", "Net", 0, why_not="does not run")]
    assert text_of(rows)[-1] == "No layer can be targeted down to a depth of 3."
    for depth in (0, 1.5, True, "3", None):
        with pytest.raises(VisConfigError, match=r"depth=.*whole number of 1 or more"):
            layer_tree(NETWORK, depth=depth)
