"""What the documents say of the options is what the hooks have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mmyolo_vis_hooks import BoxAMVisHook, FeatMapVisHook
from mmyolo_vis_hooks.maps.cam_methods import METHODS
from mmyolo_vis_hooks.maps.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_zh-CN.md"]
HOOKS = {"BoxAMVisHook": BoxAMVisHook, "FeatMapVisHook": FeatMapVisHook}


def options_of(hook: type) -> dict[str, object]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(hook).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def table_of(readme: str, hook: str) -> dict[str, str]:
    """Options and defaults of a hook's table."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    (title,) = re.findall(rf"^## .*`{hook}`.*$", text, re.M)
    section = text.split(title)[1].split("\n## ")[0].split("\n### ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| ", section, re.M)
    found = {}
    for names, defaults in rows:
        values = re.split("[,、] ?(?=`)", defaults.strip())
        for name, value in zip(re.findall(r"`(\w+)`", names), values):
            found[name] = value.strip("`")
    return found


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize("name", HOOKS)
def test_the_tables_list_every_option_with_its_default(readme, name):
    table = table_of(readme, name)
    own = options_of(HOOKS[name])
    shared = set(options_of(FeatMapVisHook)) if name == "BoxAMVisHook" else set()
    for option, default in own.items():
        if option in shared and option not in table:
            assert f"`{option}`" in (ROOT / readme).read_text(encoding="utf-8")
            continue
        if option == "target_layers" and default:
            default = list(default)
        shown = "'featmap'" if option == "name" else repr(default)
        shown = "0" if option == "wait_time" else shown
        assert table.get(option) == shown, option
    assert set(table) <= set(own)


@pytest.mark.parametrize("document", [*READMES, "docs/boxam.md"])
def test_every_method_and_target_is_named(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in (*METHODS, *TARGETS):
        assert re.search(rf"`'?{re.escape(name)}'?`", text), name


def test_the_formulas_of_simple_methods_are_those_of_the_code():
    text = (ROOT / "docs" / "boxam.md").read_text(encoding="utf-8")
    for name in ("layercam", "hirescam", "gradcam_averaged", "gradcamelementwise"):
        assert f"`{METHODS[name].formula}`" in text, name


@pytest.mark.parametrize("document", [*READMES, "docs/boxam.md", "CONTRIBUTING.md"])
def test_links_within_the_project_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
