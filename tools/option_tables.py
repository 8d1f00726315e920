"""Write the tables of options into the documents: ``python tools/option_tables.py``.

A table stands between ``<!-- options: BoxAMOptions -->`` and ``<!-- end -->``; what
both kinds have alike stands in ``shared``. English tables come whole from the
declarations; in others names and defaults do, and what a translator wrote beside a
name stays.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mmyolo_vis_hooks import options
from mmyolo_vis_hooks.declare import option_rows

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "README_zh-CN.md")
_TABLE = re.compile(r"(<!-- options: (\w+) -->\n\n)(.*?)(\n<!-- end -->)", re.S)


def with_tables(text: str, *, translated: bool) -> str:
    """A document with its tables as they should be.

    Args:
        text: The document.
        translated: Keep the words beside a name that is there already.
    """
    return _TABLE.sub(
        lambda match: match[1] + _table(match, translated) + match[4], text
    )


def _table(match: re.Match, translated: bool) -> str:
    header = match[3].splitlines()[:2]
    known = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", match[3], re.M))
    rows = []
    for name, default, help in _options(match[2]):
        text = known.get(name, help) if translated else help
        rows.append(f"| `{name}` | `{default}` | {text} |")
    return "\n".join([*header, *rows]) + "\n"


def _options(table: str) -> list[tuple[str, str, str]]:
    of_boxes = option_rows(options.BoxAMOptions)
    shared = [row for row in option_rows(options.FeatMapOptions) if row in of_boxes]
    if table == "shared":
        return [*shared, *option_rows(options.RunOptions)]
    own = option_rows(getattr(options, table))
    kinds = {"BoxAMOptions": "BoxRunOptions", "DiagnosisOptions": "ErrorRunOptions"}
    if table in kinds:
        of_runs = option_rows(options.RunOptions)
        in_runs = option_rows(getattr(options, kinds[table]))
        own += [row for row in in_runs if row not in of_runs]
    if table == "DiagnosisOptions":  # of a hook that has not all that the others share
        return own
    return [row for row in own if row not in shared]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text, translated="zh" in name), encoding="utf-8")


if __name__ == "__main__":
    main()
