"""The user's cache folder: one entry per wheel that would fit nowhere else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .environment import Torch
from .messages import BuildError, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def cache_root() -> Path:
    """The user's cache folder for this project; MMVIS_CACHE_DIR overrides it."""
    override = os.environ.get("MMVIS_CACHE_DIR")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        local = os.environ.get("LOCALAPPDATA")
        base = Path(local) if local else Path.home() / "AppData" / "Local"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mmyolo_vis_hooks"


def cache_key(mmcv_version: str, torch: Torch, device: str) -> str:
    """Folder name that is different whenever a wheel would not fit."""
    if device == "cpu":
        backend = "cpu"
    else:
        backend = f"rocm{torch.hip}" if torch.hip else f"cuda{torch.cuda}"
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "-".join(torch.archs)
        backend += f"-{archs or 'all'}"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    parts = [f"mmcv-{mmcv_version}", f"torch-{torch.version}", backend, tag]
    parts.append(sysconfig.get_platform())
    if not torch.cxx11_abi:
        parts.append("oldabi")
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def replace_file(source: Path, target: Path) -> None:
    """Copy so that the target is either complete or not there."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


@contextlib.contextmanager
def file_lock(path: Path, busy: str) -> Iterator[bool]:
    """Hold a lock for a block; say ``busy`` and wait if another process has it.

    The lock goes with the process, also with one that is killed. Yields whether
    it had to wait. Without effect on Windows.
    """
    waited = False
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                say(f"{busy}: waiting for it.")
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
        yield waited


class CacheEntry:
    """One folder of the cache: a wheel, its record, the log and the lock."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key
        self.log = self.folder / "build.log"
        self._record = self.folder / "wheel.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise BuildError(
                f"The cache folder {self.folder} cannot be written: {error}.",
                "Name another one with --cache-dir or MMVIS_CACHE_DIR.",
            ) from error

    def wheel(self) -> Path | None:
        """The cached wheel if it is whole; a broken entry is discarded."""
        if not self._record.exists():
            return None
        try:
            record = json.loads(self._record.read_text())
            path = self.folder / str(record["wheel"])
            whole = path.is_file() and sha256(path) == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            self.discard("is damaged")
            return None
        return path

    def store(self, wheel: Path) -> Path:
        target = self.folder / wheel.name
        replace_file(wheel, target)
        record = self.folder / "wheel.json.new"
        record.write_text(json.dumps({"wheel": wheel.name, "sha256": sha256(target)}))
        os.replace(record, self._record)
        return target

    def discard(self, why: str) -> None:
        say(f"The cached wheel in {self.folder} {why}: it is discarded.")
        for path in [self._record, *self.folder.glob("*.whl")]:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Let one process at a time work on this entry; yields whether it waited."""
        busy = "Another process builds the same wheel"
        with file_lock(self.folder / "lock", busy) as waited:
            # Whoever held the lock before is gone: what it left is garbage.
            for stale in self.folder.glob("tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            yield waited

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder in the entry, removed whatever happens."""
        folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
