"""What the documents say of hooks and tools is what these have."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import guide_pictures
from mmyolo_vis_hooks.attribution.methods import METHODS
from mmyolo_vis_hooks.attribution.targets import TARGETS
from mmyolo_vis_hooks.metrics.baselines import BASELINES
from mmyolo_vis_hooks.metrics.metric import METRICS
from option_tables import with_tables

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_zh-CN.md"]
GUIDES = ["docs/visualization.md", "docs/visualization.zh-CN.md"]
PYTHON = ["docs/python.md", "docs/python.zh-CN.md"]
HOOKS = ["docs/hooks.md", "docs/hooks.zh-CN.md"]
ERRORS = ["docs/errors.md", "docs/errors.zh-CN.md"]
FAITHFULNESS = ["docs/faithfulness.md", "docs/faithfulness.zh-CN.md"]
TROUBLES = ["docs/troubleshooting.md", "docs/troubleshooting.zh-CN.md"]
DOCUMENTS = sorted(
    [*READMES, *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
DEMOS = ["featmap_vis_demo", "boxam_vis_demo"]
TOOLS = [*DEMOS, "list_layers", "convert_ultralytics"]
ERROR_TOOLS = ["explain_errors", "compare_checkpoints", "explore"]
TABLES = [
    *((guide, tool) for guide in GUIDES for tool in TOOLS),
    *((page, tool) for page in ERRORS for tool in ERROR_TOOLS),
    *((page, "eval_boxam") for page in FAITHFULNESS),
]
# What the tables write instead of a value, in English and Chinese.
WORDS = {"required": "必需", "on": "开", "off": "关", "none": "无"}
# Messages that other packages print.
OF_OTHERS = (
    "Weights only load failed",
    "yolov5_collate() got an unexpected keyword argument '_scope_'",
    "The filesystem tracking backend (e.g., './mlruns') is in maintenance mode",
)
# Arguments whose None has a meaning of its own in the tables.
DECIDED_LATER = {"--out-dir", "--target-layers", "--smooth", "--alignment"}


@pytest.mark.parametrize("readme", READMES)
def test_the_tables_of_options_are_those_of_the_declarations(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert text.count("<!-- options: ") == 4
    assert with_tables(text, translated="zh" in readme) == text


@pytest.mark.parametrize("document", [*READMES, "docs/boxam.md"])
def test_every_method_and_target_is_named(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in (*METHODS, *TARGETS):
        assert re.search(rf"`'?{re.escape(name)}'?`", text), name


@pytest.mark.parametrize("document", FAITHFULNESS)
def test_every_metric_and_baseline_is_named(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in (*METRICS, *BASELINES):
        assert f"| `{name}` |" in text, name


def test_the_formulas_of_simple_methods_are_those_of_the_code():
    text = (ROOT / "docs" / "boxam.md").read_text(encoding="utf-8")
    for name in ("layercam", "hirescam", "gradcam_averaged", "gradcamelementwise"):
        assert f"`{METHODS[name].formula}`" in text, name


def parser_of(tool: str) -> argparse.ArgumentParser:
    """The parser that a tool makes for itself."""
    made = []

    class Made(Exception):
        pass

    def keep(self: argparse.ArgumentParser, *args: object) -> None:
        made.append(self)
        raise Made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        with pytest.raises(Made):
            importlib.import_module(tool).parse_args()
    return made[0]


def arguments_of(tool: str) -> dict[str, str]:
    """Arguments of a tool, with their defaults as the tables write them."""
    found = {}
    for action in parser_of(tool)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = (action.option_strings or [action.dest])[0]
        if action.required:
            found[name] = "required"
        elif action.nargs == 0:
            found[name] = "on" if action.default else "off"
        elif action.default is None:
            found[name] = "none"
        else:
            value = action.default
            values = value if isinstance(value, (list, tuple)) else [value]
            found[name] = f"`{' '.join(map(str, values))}`"
    return found


def tool_tables(guide: str) -> dict[str, dict[str, str]]:
    """Defaults in the tables of a guide, by tool and argument."""
    english = {there: word for word, there in WORDS.items()}
    tables: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in (ROOT / guide).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            columns = []
        elif not columns:
            named = [re.findall(r"`(\w+)\.py`", cell) for cell in cells]
            columns = [name[0] if name else "" for name in named]
            if columns[0]:  # a table of a single tool: its defaults come second
                columns = ["", columns[0], *columns[2:]]
        elif argument := re.match("`([-a-z]+)`$", cells[0]):
            for tool, cell in zip(columns, cells):
                if (guide, tool) in TABLES and cell != "—":
                    value = english.get(cell, cell)
                    tables.setdefault(tool, {})[argument[1]] = value
    return tables


@pytest.mark.parametrize(("guide", "tool"), TABLES)
def test_the_tables_list_every_argument_of_a_tool(guide, tool):
    table, own = tool_tables(guide)[tool], arguments_of(tool)
    assert set(table) == set(own)
    for argument, default in own.items():
        if argument in DECIDED_LATER and default == "none":
            assert table[argument] not in WORDS, argument
        elif argument == "--device":  # it depends on the machine
            assert default in table[argument]
        else:
            assert table[argument] == default, argument


def test_the_documents_know_where_pictures_go_by_default():
    folder = importlib.import_module("_vis_demo").OUT_DIR
    for guide in GUIDES:
        for tool in DEMOS:
            assert tool_tables(guide)[tool]["--out-dir"] == f"`{folder}`"


def commands_of(document: str) -> list[list[str]]:
    """The commands of a document that start one of the tools, in words."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```shell\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            tool = re.search(r"python tools/(\w+)\.py", line)
            if tool and tool[1] in TOOLS:
                found.append([tool[1], *words[2:]])
    return found


@pytest.mark.parametrize("document", [*READMES, *GUIDES])
def test_every_command_of_a_demo_can_be_parsed(document, monkeypatch):
    commands = commands_of(document)
    assert len(commands) >= (1 if document in READMES else 12)
    for tool, *words in commands:
        monkeypatch.setattr(sys, "argv", [tool, *words])
        args = importlib.import_module(tool).parse_args()
        for image in getattr(args, "img", None) or []:
            assert not image.startswith("docs/") or (ROOT / image).is_file()


def test_both_languages_show_the_same_commands_and_pictures():
    for one, other in (READMES, GUIDES, HOOKS, ERRORS, FAITHFULNESS):
        assert commands_of(one) == commands_of(other)
        assert pictures_of(one) == pictures_of(other)


def test_every_picture_of_the_guide_stands_below_its_command():
    made = guide_pictures.commands()
    assert {*made, "guide_page.jpg"} == {*pictures_of(GUIDES[0])}
    for words in made.values():
        assert words[2:4] == [
            "configs/examples/yolox_nano_coco.py",
            "docs/weights/yolox_nano_coco.pth",
        ]


def code_of(document: str) -> list[str]:
    """The Python of a document, without its comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [re.sub(r" *#.*", "", block) for block in blocks]


def test_both_languages_show_the_same_python():
    for one, other in (READMES, PYTHON, HOOKS, FAITHFULNESS):
        assert code_of(one) == code_of(other)
        for block in code_of(one):
            ast.parse(block)


def pictures_of(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [Path(path).name for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]


def test_the_configs_of_the_commands_are_mmyolos():
    mmyolo = importlib.util.find_spec("mmyolo")
    assert mmyolo is not None
    configs = Path(str(mmyolo.origin)).parent / ".mim" / "configs"
    for document in GUIDES:
        text = (ROOT / document).read_text(encoding="utf-8")
        # Those in a sentence are in quotes and stand for any.
        named = re.findall(r"(?<!`)mmyolo::(\w+/[\w-]+\.py)", text)
        assert named
        for name in named:
            assert (configs / name).is_file(), name


def messages() -> Iterator[str]:
    """Every text in the code; of an f-string what stands between the values."""
    for folder in ("mmyolo_vis_hooks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@pytest.mark.parametrize("document", TROUBLES)
def test_the_messages_of_troubleshooting_are_in_the_code(document):
    everything = "\n".join(messages())
    text = (ROOT / document).read_text(encoding="utf-8")
    _, theirs, *ours = re.split(r"^## ", text, flags=re.M)
    rows = re.findall(r"^\| `([^`]+)` \|", "".join(ours), re.M)
    assert len(rows) > 40
    for row in rows:
        for part in row.split("…") if row not in OF_OTHERS else ():
            assert part.strip() in everything, row
    assert theirs.count("mcv_builder") >= 3


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_links_within_the_project_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^):]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def anchors_of(path: Path) -> list[str]:
    titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def test_every_picture_is_shown_and_has_a_licence():
    shown = {p for document in DOCUMENTS for p in pictures_of(document)}
    inputs = {"cat.jpg", "astronaut.jpg"}  # of the examples, not shown by themselves
    own = {p.name for p in (ROOT / "docs" / "images").glob("*.[jp][pn]g")} - inputs
    assert own == shown
    licences = (ROOT / "docs" / "images" / "README.md").read_text(encoding="utf-8")
    patterns = re.findall(r"`([\w*]+\.\w+)`", licences)
    for name in own | inputs:
        assert any(Path(name).match(pattern) for pattern in patterns), name
