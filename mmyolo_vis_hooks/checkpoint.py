"""Load checkpoints safely, and see to it that their weights are read.

torch >= 2.6 refuses every checkpoint that MMEngine trained, and turning its check off
runs arbitrary code from the file. MMEngine reads its checkpoints through
:mod:`mmyolo_vis_hooks.inert` instead, by ``CheckpointLoader.register_scheme``. Under
torch < 2.6 MMEngine's loaders stay.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import print_log
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from .errors import CheckpointError
from .fetch import fetch
from .inert import (
    TORCH_TAKES_STAND_INS,
    InertObject,
    MapLocation,
    foreign_format,
    read_inertly,
    some,
)

_ULTRALYTICS = ("models.yolo.", "ultralytics.", "yolov5.models.")
_CHECKSUM = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def load_checkpoint_safely(
    file: str | os.PathLike | bytes, map_location: MapLocation = None
) -> Any:
    """Load a checkpoint as :func:`read_inertly` does; nothing in the file is executed.

    A warning lists the classes whose objects were replaced.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: As :func:`read_inertly`; or the weights lie in an object of
            an unknown class, such as a pickled model.
    """
    name = "<bytes>" if isinstance(file, bytes) else os.fspath(file)
    checkpoint, unknown = read_inertly(file, map_location)
    _refuse_hidden_weights(name, checkpoint)
    if unknown:
        _warn(
            f"{name}: objects of unknown classes were not loaded, inert "
            f"placeholders stand for them: {', '.join(unknown)}"
        )
    return checkpoint


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


def _refuse_hidden_weights(name: str, checkpoint: Any) -> None:
    found = [checkpoint]
    if isinstance(checkpoint, dict):
        values = [checkpoint, *checkpoint.values()]
        if any(isinstance(v, dict) and _has_tensor(v.values()) for v in values):
            return
        found = [checkpoint.get("state_dict"), *filter(_is_module, values)]
    hiding = [value for value in found if isinstance(value, InertObject)]
    if any(value.path.startswith(_ULTRALYTICS) for value in hiding):
        raise CheckpointError(
            f"{name} is a checkpoint of Ultralytics and holds a pickled model; convert "
            f"a YOLOv5 or YOLOv8: python tools/convert_ultralytics.py {name} OUT.pth "
            "--config CONFIG"
        )
    if hiding:
        raise CheckpointError(
            f"{name} holds an object of {hiding[0].path}, not a dict of weights; save "
            "model.state_dict() in place of the model"
        )


def _has_tensor(values: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _is_module(value: Any) -> bool:
    return "_parameters" in (getattr(value, "state", None) or {})


def weights_of(checkpoint: Any, source: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their names, without ``module.``.

    Raises:
        CheckpointError: It has none.
    """
    saved = checkpoint if isinstance(checkpoint, Mapping) else {}
    found = saved.get("state_dict", saved)
    weights = {
        str(key).removeprefix("module."): value
        for key, value in (found.items() if isinstance(found, Mapping) else ())
        if _is_plain(value)
    }
    if not weights:
        others = [
            f"; save those of {key!r} by themselves"
            for key, value in saved.items()
            if isinstance(value, Mapping) and any(map(_is_plain, value.values()))
        ]
        raise CheckpointError(
            f"{source} holds no weights: it is no dict of tensors, and has none as "
            f"state_dict{''.join(others[:1])}"
        )
    return weights


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that can be copied into a weight."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized)
    )


def check_fit(
    own: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    source: str,
    missing: Iterable[str] | None = None,
    unknown: Iterable[str] | None = None,
) -> None:
    """Warn if a model does not get all of its weights from a checkpoint, or bad ones.

    Args:
        own: State dict of the model, without wrappers.
        weights: What :func:`weights_of` gave.
        source: Path of the checkpoint, for the message.
        missing: Names that were not read. Defaults to None: those not in the file.
        unknown: Names that the model has no use for. Likewise.

    Raises:
        CheckpointError: No weight fits.
    """
    if missing is None or unknown is None:
        missing = [key for key in own if key not in weights]
        unknown = [key for key in weights if key not in own]
    wrong = {
        key: f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    }
    # Counters of batch norms say nothing, and older files lack them.
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    lacking = [key for key in missing if key in counted and key not in wrong]
    # MMDetection of old saved the mean of the preprocessor.
    extra = [key for key in unknown if not key.startswith("data_preprocessor.")]
    fitting = len(counted) - len(lacking) - len(wrong)
    found = {"missing": lacking, "shapes": list(wrong.values()), "unknown": extra}
    details = "; ".join(f"{what} {some(keys)}" for what, keys in found.items() if keys)
    if counted and not fitting:
        raise CheckpointError(
            f"{source} is of another architecture than the config: 0 of {len(counted)} "
            f"weights fit; {details}; give the config that it was trained with"
        )
    if details:
        _warn(f"{source}: {fitting} of {len(counted)} weights fit; {details}")
    read = [key for key in counted if key in weights and key not in wrong]
    bad = [key for key in read if not _is_finite(weights[key])]
    if bad:
        _warn(
            f"{source}: {len(bad)} of {len(counted)} weights hold NaN or infinity, as "
            f"after a training that diverged: {some(bad)}"
        )


def _is_finite(value: torch.Tensor) -> bool:
    # Torch cannot tell it of every float of one byte.
    known = value.float() if value.element_size() == 1 else value
    return bool(known.isfinite().all())


# Loaders. MMEngine logs a loader's name after 'load_from_'.


def register_checkpoint_loaders() -> None:
    """Make MMEngine load every checkpoint with :func:`load_checkpoint_safely`.

    Replaces MMEngine's own loaders, under torch >= 2.6. A loader that somebody else
    registered stays.
    """
    for prefix, loader in _LOADERS.items() if TORCH_TAKES_STAND_INS else ():
        current = CheckpointLoader._schemes.get(prefix)
        if current is None or (
            inspect.isfunction(current)
            and current.__module__ == mmengine_checkpoint.__name__
        ):
            CheckpointLoader.register_scheme(prefix, loader, force=True)


def load_from_local(filename: str, map_location: MapLocation = None) -> Any:
    """Load a checkpoint from a local path."""
    return load_checkpoint_safely(filename, map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> Any:
    """Load a checkpoint from a URL; the download is kept in torch's hub folder."""
    path = _cache_path(filename)
    rank, _ = get_dist_info()
    if rank == 0:
        _download(filename, path)
    barrier()
    if rank > 0:
        # Ranks on other machines do not see the disk of rank 0.
        _download(filename, path)
    return load_checkpoint_safely(path, map_location)


def _cache_path(url: str) -> Path:
    """Where the file of a URL is kept: two of the same base name do not meet."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    plain = folder / os.path.basename(urlparse(url).path)
    # A file that was put there by hand or by torch is the one if its name has its
    # checksum, as those of torchvision and OpenMMLab.
    checksum = _CHECKSUM.search(plain.name)
    if checksum and plain.is_file():
        content = hashlib.sha256(plain.read_bytes())
        if content.hexdigest().startswith(checksum[1]):
            return plain
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return folder / f"{plain.stem}-{digest}{plain.suffix}"


def _download(url: str, path: Path) -> None:
    if path.exists():
        return
    with _fetching(url):
        path.parent.mkdir(parents=True, exist_ok=True)
        # What is kept is taken for the weights for ever.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder, path.name)
            fetch(url, file, show_progress=True)
            with open(file, "rb") as content:
                problem = foreign_format(path.name, content)
            if problem:
                raise CheckpointError(problem)
            file.replace(path)


@contextlib.contextmanager
def _fetching(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each kind of address has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the checkpoint {source} cannot be read: {reason}"
        ) from error


def load_from_list(filename: str, map_location: MapLocation = None) -> Any:
    """Load weights that a library lists, such as ``torchvision://resnet50``."""
    scheme, name = filename.split("://", 1)
    if scheme == "mmcls":
        urls = mmengine_checkpoint.get_mmcls_models()
    elif scheme in ("torchvision", "modelzoo"):
        urls = mmengine_checkpoint.get_torchvision_models()
    else:
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
        urls = mmengine_checkpoint.get_external_models()
    if name not in urls:
        near = difflib.get_close_matches(name, urls, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CheckpointError(f"{filename}: {scheme} has no weights {name!r}{hint}")
    if "://" in urls[name]:
        checkpoint = load_from_http(urls[name], map_location)
    else:
        home = mmengine_checkpoint._get_mmengine_home()
        checkpoint = load_checkpoint_safely(
            os.path.join(home, urls[name]), map_location
        )
    if scheme == "mmcls":
        return mmengine_checkpoint._process_mmcls_checkpoint(checkpoint)
    return checkpoint


def load_from_ceph(filename: str, map_location: MapLocation = None) -> Any:
    """Load a checkpoint from an object store, ``s3://`` or ``petrel://``."""
    with _fetching(filename):
        store = get_file_backend(filename, backend_args={"backend": "petrel"})
        return load_checkpoint_safely(bytes(store.get(filename)), map_location)


_LISTS = ("modelzoo", "torchvision", "open-mmlab", "openmmlab", "mmcls")
_LOADERS: dict[str, Callable] = {
    "": load_from_local,
    "http://": load_from_http,
    "https://": load_from_http,
    r"(\S+\:)?s3://": load_from_ceph,
    r"(\S+\:)?petrel://": load_from_ceph,
    **{f"{name}://": load_from_list for name in _LISTS},
}
