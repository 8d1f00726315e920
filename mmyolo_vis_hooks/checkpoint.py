"""Load checkpoints without running anything that is in them.

torch >= 2.6 reads files with ``weights_only=True``, which refuses every
checkpoint that MMEngine trained: they hold ``HistoryBuffer``, NumPy scalars and
``builtins.getattr``. Turning the check off runs arbitrary code from the file.
The loaders here take a third way: torch reads the file with the unpickler of
:mod:`mmyolo_vis_hooks.inert_pickle`, which imports and calls nothing that the
file names, and MMEngine reads its checkpoints with them through its own
extension point, ``CheckpointLoader.register_scheme``.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from .errors import VisError
from .inert_pickle import InertGlobal, InertObject, make_pickle_module

MapLocation = str | torch.device | dict | Callable | None
"""What :func:`torch.load` takes as ``map_location``."""

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"


class CheckpointError(VisError, RuntimeError):
    """A file is no checkpoint, is damaged, or holds what cannot be loaded."""


def load_checkpoint_safely(
    file: str | os.PathLike | bytes, map_location: MapLocation = None
) -> Any:
    """Load a checkpoint; nothing in the file is executed.

    Zip files (torch >= 1.6) and the format before are read, with every
    supported torch. A warning lists the classes that were replaced.

    Args:
        file: Path, or the content itself.
        map_location: As in :func:`torch.load`. Defaults to None.

    Returns:
        What the file holds, usually a dict; objects of unknown classes are
        :class:`InertObject`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is no checkpoint, is damaged, or holds a
            TorchScript program or a pickled model in place of its weights.
    """
    if isinstance(file, bytes):
        name, head = "<bytes>", file[:512]
    else:
        name = os.path.expanduser(os.fspath(file))
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name} can not be found.")
        with open(name, "rb") as opened:
            head = opened.read(512)
        if name.endswith(".safetensors"):
            return torch.load(name, map_location=map_location, weights_only=True)
    _refuse_foreign_formats(name, head)

    unknown: set[str] = set()
    try:
        readable: Any = name
        if isinstance(file, bytes):
            readable = io.BytesIO(file)
        elif not head.startswith(_ZIP_MAGIC):
            # From memory, torch does not look for the tar format of torch 0.1,
            # which unpacks files.
            with open(name, "rb") as opened:
                readable = io.BytesIO(opened.read())
        if head.startswith(_ZIP_MAGIC):
            _refuse_torchscript(name, readable)
        checkpoint = torch.load(
            readable,
            map_location=map_location,
            pickle_module=make_pickle_module(unknown),
            weights_only=False,
        )
    except (VisError, OSError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(_explain(name, error)) from error

    if isinstance(checkpoint, (InertGlobal, InertObject)):
        raise CheckpointError(
            f"{name} holds an object of {checkpoint.path}, not a dict of "
            "weights. Save model.state_dict() in place of the model."
        )
    if unknown:
        print_log(
            f"{name}: objects of unknown classes were not loaded, inert "
            f"placeholders stand for them: {', '.join(sorted(unknown))}",
            logger="current",
            level=logging.WARNING,
        )
    return checkpoint


def register_checkpoint_loaders() -> None:
    """Make MMEngine load every checkpoint with :func:`load_checkpoint_safely`.

    Replaces MMEngine's own loaders for local paths, ``http(s)://``,
    ``torchvision://``, ``modelzoo://``, ``open-mmlab://``, ``mmcls://`` and
    ``s3://``. A loader that somebody else registered stays. Calling it again
    changes nothing.
    """
    for prefixes, loader in _LOADERS.items():
        for prefix in prefixes:
            current = CheckpointLoader._schemes.get(prefix)
            if _is_mmengine_loader(current):
                CheckpointLoader.register_scheme(prefix, loader, force=True)


def _is_mmengine_loader(loader: Any) -> bool:
    return loader is None or (
        inspect.isfunction(loader) and loader.__module__ == mmengine_checkpoint.__name__
    )


# --------------------------------------------------------------------- loaders
# MMEngine logs a loader's name after 'load_from_'.


def load_from_local(filename: str, map_location: MapLocation = None) -> Any:
    """Load a checkpoint from a local path."""
    return load_checkpoint_safely(filename, map_location)


def load_from_http(
    filename: str,
    map_location: MapLocation = None,
    model_dir: str | None = None,
) -> Any:
    """Load a checkpoint from a URL; the download is kept in torch's hub folder.

    Rank 0 downloads, the others wait and take the file.

    Args:
        filename: ``http://`` or ``https://``.
        map_location: As in :func:`torch.load`. Defaults to None.
        model_dir: Where downloads are kept. Defaults to None: where torch
            keeps them.
    """
    folder = model_dir or os.path.join(torch.hub.get_dir(), "checkpoints")
    rank, _ = get_dist_info()
    path = os.path.join(folder, os.path.basename(urlparse(filename).path))
    if rank == 0:
        _download(filename, path)
    barrier()
    if rank > 0:
        # Ranks on other machines do not see the disk of rank 0.
        _download(filename, path)
    return load_checkpoint_safely(path, map_location)


def _download(url: str, path: str) -> None:
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=os.isatty(0))


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> Any:
    """Load weights that torchvision names, ``torchvision://resnet50``."""
    urls = mmengine_checkpoint.get_torchvision_models()
    return load_from_http(urls[filename.split("://", 1)[1]], map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> Any:
    """Load weights from OpenMMLab's list, ``open-mmlab://resnet50_caffe``."""
    name = filename.split("://", 1)[1]
    name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    url = mmengine_checkpoint.get_external_models()[name]
    if url.startswith(("http://", "https://")):
        return load_from_http(url, map_location)
    home = mmengine_checkpoint._get_mmengine_home()
    return load_checkpoint_safely(os.path.join(home, url), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> Any:
    """Load a backbone of MMClassification, ``mmcls://...``."""
    urls = mmengine_checkpoint.get_mmcls_models()
    checkpoint = load_from_http(urls[filename.split("://", 1)[1]], map_location)
    return mmengine_checkpoint._process_mmcls_checkpoint(checkpoint)


def load_from_ceph(
    filename: str, map_location: MapLocation = None, backend: str = "petrel"
) -> Any:
    """Load a checkpoint from an object store, ``s3://`` or ``petrel://``."""
    store = get_file_backend(filename, backend_args={"backend": backend})
    return load_checkpoint_safely(bytes(store.get(filename)), map_location)


_LOADERS: dict[tuple[str, ...], Callable] = {
    ("",): load_from_local,
    ("http://", "https://"): load_from_http,
    ("modelzoo://", "torchvision://"): load_from_torchvision,
    ("open-mmlab://", "openmmlab://"): load_from_openmmlab,
    ("mmcls://",): load_from_mmcls,
    (r"(\S+\:)?s3://", r"(\S+\:)?petrel://"): load_from_ceph,
}


# -------------------------------------------------------------- what is refused


def _refuse_foreign_formats(name: str, head: bytes) -> None:
    if head.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)):
        return
    if not head:
        found = "it is empty"
    elif head.startswith(b"version https://git-lfs"):
        found = "it is a Git LFS pointer; fetch the file itself with 'git lfs pull'"
    elif head.lstrip()[:1] == b"<":
        found = "it is a web page; the download went wrong"
    elif head[257:262] == b"ustar":
        found = "it is a tar file; save the weights anew with torch >= 1.0"
    else:
        found = f"it begins with {head[:16]!r}"
    raise CheckpointError(f"{name} is no checkpoint: {found}.")


def _refuse_torchscript(name: str, readable: str | io.BytesIO) -> None:
    # The very reader of torch.load, so that both see the same records.
    records = torch._C.PyTorchFileReader(readable).get_all_records()
    if isinstance(readable, io.BytesIO):
        readable.seek(0)
    if "constants.pkl" in records:
        raise CheckpointError(
            f"{name} is a TorchScript program, not a checkpoint; loading it "
            "would run it. Save model.state_dict() with torch.save()."
        )


def _explain(name: str, error: Exception) -> str:
    if "explicit pickle_module" in str(error):
        return (
            f"{name} can not be loaded while TORCH_FORCE_WEIGHTS_ONLY_LOAD is "
            "set. Unset it: this loader executes nothing either."
        )
    return (
        f"{name} can not be loaded as a checkpoint; it is damaged or something "
        f"else ({type(error).__name__}: {error})."
    )
