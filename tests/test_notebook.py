"""The notebook of the documents runs, on a real detector and real images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from mmyolo_vis_hooks.attribution.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """What a kernel runs cells in; a process of its own would only import again."""
    with mock.patch.dict(METHODS):  # it registers one of its own
        yield InteractiveShell.instance(history_manager=None, colors="nocolor")
    InteractiveShell.clear_instance()


@pytest.mark.nightly  # `make notebook` runs it, too
@pytest.mark.real_data
def test_the_notebook_runs(
    shared_dir: Path, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (names,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    photos = [str(shared_dir / "data" / name) for name in ("dog.jpg", "demo.jpg")]
    names.source = (
        "from pathlib import Path\n"
        f"config = {str(ROOT / 'configs/coco128/yolox_nano_coco128.py')!r}\n"
        f"checkpoint = {str(shared_dir / 'weights/yolox_nano_coco.pth')!r}\n"
        f"images = {photos!r}"
    )
    texts, num_pictures = "", 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with capture_output() as shown:
                result = shell.run_cell(cell.source)
            result.raise_error()
            texts += shown.stdout
            num_pictures += sum("image/jpeg" in o.data for o in shown.outputs)
            displayed = shell.display_formatter.format(result.result)[0]
            num_pictures += "image/jpeg" in displayed
    assert num_pictures == 3
    assert "Explanation(dog 0." in texts
    assert "['index.html', 'dog.jpg', 'dog.npz', 'dog.json'] 7" in texts


def test_the_notebook_shows_what_came_out() -> None:
    """Who reads it on the web sees its pictures, and no error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert sum("image/jpeg" in o.get("data", {}) for o in outputs) == 3
    assert not [o for o in outputs if o.output_type == "error"]
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
