"""Checkpoints of addresses, lists and formats: had, or why not, in one line."""

from __future__ import annotations

import hashlib
import http.client
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from mmyolo_vis_hooks import checkpoint
from mmyolo_vis_hooks.checkpoint import (
    load_checkpoint_safely,
    register_checkpoint_loaders,
)
from mmyolo_vis_hooks.errors import CheckpointError
from mmyolo_vis_hooks.inert import TORCH_TAKES_STAND_INS
from tests.test_checkpoint import WHOLE

pytestmark = pytest.mark.skipif(
    not TORCH_TAKES_STAND_INS, reason="torch < 2.6: MMEngine's loaders stay"
)


def test_downloads_are_kept_by_their_whole_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def download(url: str, path: Path, show_progress: bool = False) -> None:
        fetched.append(url)
        torch.save({"state_dict": {"w": torch.tensor(float(len(fetched)))}}, path)

    def loaded(url: str) -> float:
        return float(CheckpointLoader.load_checkpoint(url)["state_dict"]["w"])

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(checkpoint, "fetch", download)
    one, two = "https://host/exp1/best.pth", "https://host/exp2/best.pth?a=1"
    assert [loaded(url) for url in (one, two, one, two)] == [1, 2, 1, 2]
    assert fetched == [one, two]
    monkeypatch.setattr(
        mmengine_checkpoint, "get_torchvision_models", lambda: {"toy": two}
    )
    assert loaded("torchvision://toy") == 2

    # Put there by hand: only a name with the file's own checksum is believed.
    digest = hashlib.sha256(WHOLE).hexdigest()[:8]
    for name, content in ((f"a-{digest}.pth", WHOLE), ("b-01234567.pth", WHOLE)):
        (tmp_path / "checkpoints" / name).write_bytes(content)
    CheckpointLoader.load_checkpoint(f"https://host/a-{digest}.pth")
    assert len(fetched) == 2
    assert loaded("https://host/b-01234567.pth") == 3


def test_what_is_wrong_with_an_address_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a download that is no checkpoint is not kept."""
    answers = [
        b"<html>log in</html>",
        WHOLE[: len(WHOLE) // 2],
        OSError("no route"),
        http.client.InvalidURL("a space"),
        UnicodeEncodeError("ascii", "é", 0, 1, "not in range"),
        WHOLE,
    ]

    def download(url: str, path: Path, show_progress: bool = False) -> None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        path.write_bytes(answer)

    def mistake(source: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            CheckpointLoader.load_checkpoint(source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(checkpoint, "fetch", download)
    url = "https://host/best.pth"
    for reason in ("web page", "truncated zip", "no route", "a space", "not in range"):
        message = mistake(url)
        assert f"checkpoint {url} cannot be read" in message
        assert reason in message
        assert not [*(tmp_path / "checkpoints").iterdir()]
    assert CheckpointLoader.load_checkpoint(url)["state_dict"]["w"].tolist() == [1, 1]

    assert "did you mean resnet50" in mistake("torchvision://resnet5")
    assert "mmcls has no weights 'none'" in mistake("mmcls://none")
    assert "petrel_client" in mistake("s3://bucket/best.pth")


def test_files_that_are_not_there_or_need_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (FileNotFoundError, CheckpointError):
        with pytest.raises(kind, match=r"there is no checkpoint .*none\.pth"):
            load_checkpoint_safely(tmp_path / "none.pth")
    (tmp_path / "a.safetensors").write_bytes(b"\x08")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        load_checkpoint_safely(tmp_path / "a.safetensors")


def test_a_loader_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(filename: str, map_location: Any = None) -> dict:
        return {"state_dict": {}}

    # As before this package is imported.
    names = dict.fromkeys(("http://", "mmcls://"), mmengine_checkpoint.load_from_http)
    monkeypatch.setattr(CheckpointLoader, "_schemes", {"": mine, **names})
    for _ in range(2):
        register_checkpoint_loaders()
        found = CheckpointLoader._get_checkpoint_loader
        assert found("a.pth") is mine
        for path in ("http://host/a.pth", "torchvision://resnet50", "mmcls://resnet50"):
            assert found(path).__module__ == "mmyolo_vis_hooks.checkpoint"
