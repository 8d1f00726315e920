from __future__ import annotations

import io
import re
from textwrap import dedent

import pytest
from rich.console import Console
from rich.text import Text

from mmyolo_vis_hooks.errors import VisConfigError
from mmyolo_vis_hooks.network.layer_table import LayerNode, LayerOutput
from mmyolo_vis_hooks.render.layer_tree import layer_tree, tree_text

NETWORK_HW = (128, 160)


def layer(
    path: str,
    type_name: str,
    params: int,
    *shapes: tuple[int, int, int],
    why_not: str | None = None,
    children: tuple[LayerNode, ...] = (),
    layers: tuple[str, ...] = (),
) -> LayerNode:
    outputs = tuple(
        LayerOutput(
            layer=layers[i] if layers else path,
            call_index=0,
            index=(i,),
            shape=shape,
            stride_hw=(NETWORK_HW[0] / shape[1], NETWORK_HW[1] / shape[2]),
        )
        for i, shape in enumerate(shapes)
    )
    return LayerNode(path, type_name, params, 1, NETWORK_HW, outputs, why_not, children)


def network() -> LayerNode:
    stage = layer(
        "backbone.stage4",
        "Sequential",
        99_949,
        (256, 4, 5),
        children=(
            layer("backbone.stage4[0]", "ConvModule", 1200, (256, 4, 5)),
            layer(
                "backbone.stage4[1]",
                "CSPLayer",
                0,
                (256, 4, 5),
                children=(
                    layer("backbone.stage4[1].conv", "ConvModule", 12, (64, 4, 5)),
                    layer("backbone.stage4[1].drop", "Idle", 0, why_not="does not run"),
                ),
            ),
        ),
    )
    lists = layer(
        "neck.out_layers",
        "ModuleList",
        999,
        (64, 16, 20),
        (64, 2, 3),
        layers=("neck.out_layers[0]", "neck.out_layers[1]"),
        children=(
            layer("neck.out_layers[0]", "ConvModule", 500, (64, 16, 20)),
            layer("neck.out_layers[1]", "ConvModule", 499, (64, 2, 3)),
        ),
    )
    roi_head = layer(
        "roi_head",
        "RoIHead",
        99_950,
        why_not="gives (1000, 256, 7, 7) for one image",
        children=(layer("roi_head.conv", "ConvModule", 64, (64, 256, 320)),),
    )
    return layer(
        "",
        "Detector",
        46_380_000,
        why_not="is the detector itself",
        children=(
            layer("backbone", "Net", 900_000, (256, 4, 5), children=(stage,)),
            layer("neck", "FPN", 1000, (64, 16, 20), (64, 2, 3), children=(lists,)),
            roi_head,
        ),
    )


def lines(text: str) -> list[str]:
    return dedent(text).strip("\n").split("\n")


def body(text: str) -> list[str]:
    """The lines above the footer."""
    return text[: text.index("\n\n")].split("\n")


def footer(text: str) -> list[str]:
    return text[text.index("\n\n") + 2 :].splitlines()


def test_default_tree():
    text = tree_text(network(), depth=2)
    assert body(text) == lines(
        """
        layer              type             C x h x w   stride  params  below
        backbone           Net            256 x 4 x 5       32  0.90 M
          backbone.stage4  Sequential     256 x 4 x 5       32  99.9 k     +3
        neck               FPN           64 x 16 x 20        8   1.0 k
                                           64 x 2 x 3  64x53.3
          neck.out_layers  ModuleList    64 x 16 x 20        8   999       +2
                                           64 x 2 x 3  64x53.3
        roi_head.conv      ConvModule  64 x 256 x 320      0.5    64
        """
    )
    assert footer(text) == lines(
        """
        Detector, 46.38 M parameters, network input 128 x 160 (h x w).
        stride: input pixels per cell. below: layers that a depth above 2 shows.
        To target layers, give their paths, in quotes if they have brackets:
          --target-layers backbone
        """
    )


def test_part_of_a_network_and_items_of_a_container():
    neck = network().children[1]
    text = tree_text(neck)
    assert body(text) == lines(
        """
        layer                   type           C x h x w   stride  params
        neck                    FPN         64 x 16 x 20        8   1.0 k
                                              64 x 2 x 3  64x53.3
          neck.out_layers       ModuleList  gives its items         999
            neck.out_layers[0]  ConvModule  64 x 16 x 20        8   500
            neck.out_layers[1]  ConvModule    64 x 2 x 3  64x53.3   499
        """
    )
    assert footer(text) == lines(
        """
        neck, 1.0 k parameters, network input 128 x 160 (h x w).
        stride: input pixels per cell.
        To target layers, give their paths, in quotes if they have brackets:
          --target-layers neck 'neck.out_layers[0]'
        """
    )


def test_container_whose_items_stand_elsewhere_keeps_its_shapes():
    node = layer("a", "ModuleList", 0, (3, 16, 20), layers=("a[0]",))
    assert "3 x 16 x 20" in body(tree_text(node))[1]


def test_all_layers_with_their_reasons():
    text = tree_text(network(), depth=4, all_layers=True)
    assert body(text) == lines(
        """
        layer                          type             C x h x w   stride  params
        backbone                       Net            256 x 4 x 5       32  0.90 M
          backbone.stage4              Sequential     256 x 4 x 5       32  99.9 k
            backbone.stage4[0]         ConvModule     256 x 4 x 5       32   1.2 k
            backbone.stage4[1]         CSPLayer       256 x 4 x 5       32     0
              backbone.stage4[1].conv  ConvModule      64 x 4 x 5       32    12
              backbone.stage4[1].drop  Idle        does not run                0
        neck                           FPN           64 x 16 x 20        8   1.0 k
                                                       64 x 2 x 3  64x53.3
          neck.out_layers              ModuleList  gives its items           999
            neck.out_layers[0]         ConvModule    64 x 16 x 20        8   500
            neck.out_layers[1]         ConvModule      64 x 2 x 3  64x53.3   499
        roi_head                       RoIHead     gives (1000, 256, 7, 7)  0.10 M
                                                   for one image
          roi_head.conv                ConvModule  64 x 256 x 320      0.5    64
        """
    )


def test_hidden_layers_are_counted_as_they_would_be_shown():
    [row] = [r for r in body(tree_text(network())) if "stage4[1]" in r]
    assert row.endswith("+1")
    all_rows = body(tree_text(network(), all_layers=True))
    [row] = [r for r in all_rows if "stage4[1]" in r]
    assert row.endswith("+2")


def test_a_path_too_long_for_its_column_has_its_own_line():
    text = tree_text(network(), width=66)
    assert body(text)[:5] == lines(
        """
        layer           type             C x h x w   stride  params  below
        backbone        Net            256 x 4 x 5       32  0.90 M
          backbone.stage4
                        Sequential     256 x 4 x 5       32  99.9 k
            backbone.stage4[0]
        """
    )


@pytest.mark.parametrize("width", [80, 100, 160])
def test_long_names_fit_and_every_path_can_be_copied(width):
    name = "DepthwiseSeparableConvModule"
    paths = [f"bbox_head.head_module.multi_level_convs[{i}].conv" for i in range(3)]
    long = [layer(path, name, 1000, (512, 160, 160)) for path in paths]
    node = layer("bbox_head", "Head", 3000, (1, 64, 80), children=tuple(long))
    text = tree_text(node, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert set(paths) < set(text.split())
    # The type gives way first, visibly.
    assert (name in text) == (width == 160)
    assert ("DepthwiseSep.." in text) == (width == 80)
    # The columns are aligned whether or not the path shares the line.
    assert len({row.index("512 x") for row in body(text) if "512 x" in row}) == 1


def test_a_path_longer_than_the_line_is_folded_and_not_cut():
    path = ".".join(["block"] * 30)
    text = tree_text(layer(path, "Conv", 1, (1, 64, 80)))
    assert max(map(len, text.splitlines())) <= 80
    assert path in text.replace("\n", "")


def test_nothing_to_target():
    node = layer("", "Net", 0, why_not="is the detector itself")
    assert tree_text(node) == (
        "Net, 0 parameters, network input 128 x 160 (h x w).\n"
        "No layer can be targeted down to a depth of 3.\n"
    )


def test_colours_change_no_character():
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    console.print(layer_tree(network(), depth=4, all_layers=True))
    coloured = file.getvalue()
    plain = Text.from_ansi(coloured).plain
    expected = tree_text(network(), depth=4, all_layers=True)
    assert plain.rstrip("\n") == expected.rstrip("\n")
    dim = "\x1b[2m"
    assert f"{dim}neck\x1b[0m.out_layers" in coloured
    assert re.search(r"\x1b\[2m *backbone\.stage4\[1\]\.drop", coloured)


@pytest.mark.parametrize("depth", [0, -1, 1.5, True, "3", None])
def test_depth_is_checked(depth):
    with pytest.raises(VisConfigError, match=r"depth=.*whole number of 1 or more"):
        layer_tree(network(), depth=depth)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0 k"),
        (99_949, "99.9 k"),
        (99_950, "0.10 M"),
        (904_000, "0.90 M"),
        (1_250_000_000, "1250.00 M"),
    ],
)
def test_numbers_of_parameters(count, text):
    assert body(tree_text(layer("a", "Net", count, (1, 64, 80))))[1].endswith(text)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 16, 20), "8"),
        ((1, 16, 15), "8x10.7"),
        ((1, 3, 3), "42.7x53.3"),
        ((1, 256, 320), "0.5"),
        ((1, 1, 1), "128x160"),
    ],
)
def test_strides(shape, text):
    assert f" {text}  " in body(tree_text(layer("a", "Net", 0, shape)))[1]
