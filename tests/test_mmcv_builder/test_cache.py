"""Where wheels live, when two would be the same, and what happens to broken ones."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mmcv_builder.cache import CacheEntry, cache_key, cache_root, file_lock
from mmcv_builder.environment import Torch
from mmcv_builder.messages import BuildError

CPU = Torch("2.9.0+cpu", None, None, False, (), True, 17)
CUDA = Torch("2.9.0+cu128", "12.8", None, True, ("sm90",), True, 17)


def test_root_follows_the_platform_and_the_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMVIS_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "mmyolo_vis_hooks"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "mmyolo_vis_hooks"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_root() == tmp_path / "Library" / "Caches" / "mmyolo_vis_hooks"
    monkeypatch.setenv("MMVIS_CACHE_DIR", "~/mine")
    assert cache_root() == tmp_path / "mine"


def test_key_names_everything_that_a_wheel_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    key = cache_key("2.0.1", CPU, "cpu")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert key.startswith(f"mmcv-2.0.1_torch-2.9.0+cpu_cpu_{tag}_")
    others = [
        cache_key("2.0.0", CPU, "cpu"),
        cache_key("2.0.1", dataclasses.replace(CPU, version="2.9.1+cpu"), "cpu"),
        cache_key("2.0.1", dataclasses.replace(CPU, cxx11_abi=False), "cpu"),
        cache_key("2.0.1", CUDA, "cpu"),
        cache_key("2.0.1", CUDA, "cuda"),
        cache_key("2.0.1", dataclasses.replace(CUDA, archs=("sm80",)), "cuda"),
        cache_key("2.0.1", dataclasses.replace(CUDA, cuda="13.0"), "cuda"),
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0+PTX")
    others.append(cache_key("2.0.1", CUDA, "cuda"))
    assert len({key, *others}) == len(others) + 1
    assert all("/" not in other and " " not in other for other in others)


@pytest.fixture
def entry(tmp_path: Path) -> CacheEntry:
    """An entry with a stored wheel."""
    entry = CacheEntry(tmp_path / "cache", "key")
    wheel = tmp_path / "mmcv-2.0.1-py3-none-any.whl"
    wheel.write_bytes(b"wheel" * 1000)
    stored = entry.store(wheel)
    assert stored == entry.folder / wheel.name
    return entry


def test_a_stored_wheel_is_found(entry: CacheEntry) -> None:
    found = entry.wheel()
    assert found is not None
    assert found.read_bytes() == b"wheel" * 1000
    assert not list(entry.folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "record", "list"])
def test_a_damaged_entry_is_discarded(
    damage: str, entry: CacheEntry, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = entry.folder / "mmcv-2.0.1-py3-none-any.whl"
    record = entry.folder / "wheel.json"
    if damage == "truncate":
        wheel.write_bytes(wheel.read_bytes()[:-1])
    elif damage == "change":
        wheel.write_bytes(b"eelwh" * 1000)
    elif damage == "remove":
        wheel.unlink()
    else:
        record.write_text({"record": "{half", "list": "[]"}[damage])
    assert entry.wheel() is None
    assert "damaged: it is discarded" in capsys.readouterr().out
    assert not record.exists()
    assert not wheel.exists()
    assert entry.wheel() is None  # and nothing is said of an empty entry
    assert capsys.readouterr().out == ""


def test_a_wheel_without_its_record_was_never_finished(entry: CacheEntry) -> None:
    (entry.folder / "wheel.json").unlink()
    assert entry.wheel() is None


def test_unwritable_folder_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"cannot be written.*MMVIS_CACHE_DIR"):
        CacheEntry(tmp_path / "file", "key")


def test_scratch_is_removed_and_leftovers_go_with_the_lock(
    entry: CacheEntry,
) -> None:
    with entry.scratch() as folder:
        (folder / "x").mkdir()
    assert not folder.exists()
    killed = entry.folder / "tmp-of-a-killed-process"
    killed.mkdir()
    with entry.lock() as waited:
        assert not waited
        assert not killed.exists()


def test_a_second_process_waits_for_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\n"
            f"file = open({str(lock)!r}, 'a')\n"
            "fcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "time.sleep(1)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with file_lock(lock, "Somebody is busy") as waited:
        assert waited
        assert holder.wait(timeout=10) == 0  # it had ended before we got the lock
    assert capsys.readouterr().out == "Somebody is busy: waiting for it.\n"
