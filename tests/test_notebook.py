"""The notebook of the documents runs, on a real detector and real images."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.real_data
@pytest.mark.timeout(300)
def test_the_notebook_runs(shared_dir: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (names,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    photos = [str(shared_dir / "data" / name) for name in ("dog.jpg", "demo.jpg")]
    names.source = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        f"config = {str(ROOT / 'configs/coco128/yolox_nano_coco128.py')!r}\n"
        f"checkpoint = {str(shared_dir / 'weights/yolox_nano_coco.pth')!r}\n"
        f"images = {photos!r}"
    )
    folder = str(NOTEBOOK.parent)
    client = NotebookClient(notebook, resources={"metadata": {"path": folder}})
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    pictures = [o for o in outputs if "image/jpeg" in o.get("data", {})]
    texts = "".join(o.text for o in outputs if o.output_type == "stream")
    assert len(pictures) == 3
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
