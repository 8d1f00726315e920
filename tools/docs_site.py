"""MkDocs' hook: pages outside of ``docs`` join the site, and links follow them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "README_zh-CN.md": "index.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
_LINK = re.compile(r"(?<=\]\()(?:\.\./)?(?!https?:)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if not source.endswith(".md"):
            text = f"# {source.title()}\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links are written as a reader of the repository follows them."""
    return _LINK.sub(
        lambda link: PAGES.get(link[1], link[1].removeprefix("docs/")), markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r":(func|class|meth):(?=<code>)", "", html)
