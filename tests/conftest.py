"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.toy import write_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real images and weights beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MMVIS_SHARED", default))
    if not (folder / "data" / "coco128").is_dir():
        pytest.skip(f"real images not found; set MMVIS_SHARED (tried {folder.name}/)")
    return folder


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of bright squares with COCO annotations; nobody writes to it."""
    root = tmp_path_factory.mktemp("toy_data")
    write_dataset(root)
    return root
