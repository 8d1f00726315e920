"""Read what :func:`torch.save` wrote without running anything that is in it.

torch's restricted unpickler (``weights_only=True``) can be told, from torch 2.6 on,
which object stands for a name in a file. Here every name gets a stand-in, so nothing
that a file asks for is imported or called, and yet its tensors and plain values come
out: of checkpoints of MMEngine (``HistoryBuffer``, NumPy data, ``builtins.getattr``),
and of pickled models.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .errors import CheckpointError, CheckpointNotFoundError

MapLocation = str | torch.device | dict | Callable | None
TORCH_TAKES_STAND_INS = hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
_NUMPY_TYPE = re.compile(r"[<>|=]?[biufcSU]\d{1,9}")


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class InertObject:
    """Stands where a file has an object of a class that is not known.

    Attributes:
        path: Class or function that the file names, ``module.name``.
        args: What the file wanted to call it with.
        state: What it wanted to set on the result, or None.
    """

    def __init__(self, path: str, args: tuple = ()) -> None:
        self.path = str(path)
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple:
        return InertObject, (self.path, self.args), self.state

    def __repr__(self) -> str:
        return f"<inert {self.path}>"


class _InertClass:
    path: str

    def __new__(cls, *args: Any) -> Any:
        return InertObject(cls.path, args)


def _inert_class(path: str) -> type:
    return type("Inert", (_InertClass,), {"path": path})


class _Made:
    """Has what becomes of an object once its state is known."""

    value: Any = None


class _Dtype(_Made):
    # Only the type and the byte order are taken. NumPy would believe the rest, by
    # which a file can pass off bytes as addresses of objects.
    def __init__(self, text: Any, *_: Any) -> None:
        if isinstance(text, str) and _NUMPY_TYPE.fullmatch(text):
            self.value = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        if self.value is not None and state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array(_Made):
    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = InertObject("numpy.ndarray", state)
        if dtype.value is not None:
            order: Any = "F" if fortran else "C"
            view: Any = np.ndarray(shape, dtype.value, raw, order=order)
            self.value = view.copy(order)


class _History(_Made):
    # The statistics methods of a file are functions, kept with the class;
    # the running MMEngine has its own.
    def __setstate__(self, state: Any) -> None:
        log, count = state["_log_history"].value, state["_count_history"].value
        self.value = HistoryBuffer(log, count, state["max_length"])


def _scalar(dtype: Any, raw: Any = None) -> Any:
    if dtype.value is None:
        return InertObject("numpy.scalar", (dtype, raw))
    return np.ndarray((), dtype.value, raw)[()]


class _PlainDict:
    """Makes dicts of classes derived from dict: torch fills no other type."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict(*(arg for arg in args if isinstance(arg, dict)))


_KNOWN: dict[str, Any] = {
    "addict.addict.Dict": _PlainDict,
    "builtins.bytes": lambda *_: b"",  # others are made by _codecs.encode
    "builtins.frozenset": frozenset,
    "builtins.getattr": lambda *args: InertObject("builtins.getattr", args),
    "collections.defaultdict": _PlainDict,
    "mmcv.utils.config.ConfigDict": _PlainDict,
    "mmengine.config.config.ConfigDict": _PlainDict,
    "mmengine.logging.history_buffer.HistoryBuffer": _History,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _inert_class("numpy.ndarray"),
    f"{__name__}.InertObject": InertObject,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _KNOWN[f"{_core}.multiarray.scalar"] = _scalar
    _KNOWN[f"{_core}.multiarray._reconstruct"] = _Array


@contextlib.contextmanager
def _stand_ins(unknown: Iterable[str]) -> Iterator[None]:
    """Let torch see the stand-ins alone, whatever else this process allows."""
    allowed = torch.serialization.get_safe_globals()
    known = {**_KNOWN, **{path: _inert_class(path) for path in unknown}}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(s, path) for path, s in known.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _finished(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Put real values where stand-ins are, in containers and inert objects."""
    if isinstance(value, _Made):
        return value.value
    if isinstance(value, type) and issubclass(value, _InertClass):
        return InertObject(value.path)
    if id(value) in done:
        return done[id(value)][0]
    if type(value) is tuple:
        new = tuple(_finished(item, done) for item in value)
        done[id(value)] = new, value
        return new
    done[id(value)] = value, value
    if isinstance(value, dict):
        for key in value:
            value[key] = _finished(value[key], done)
    elif isinstance(value, list):
        value[:] = [_finished(item, done) for item in value]
    elif isinstance(value, InertObject):
        value.args = _finished(value.args, done)
        value.state = _finished(value.state, done)
    return value


def read_inertly(
    file: str | os.PathLike | bytes, map_location: MapLocation = None
) -> tuple[Any, list[str]]:
    """Read a file of :func:`torch.save`; nothing in it is run or imported.

    Args:
        file: Path, or the content itself.
        map_location: As in :func:`torch.load`.

    Returns:
        What the file holds, objects of unknown classes being :class:`InertObject`,
        and the names of these classes.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: The file is no checkpoint, is damaged, or needs torch >= 2.6.
    """
    name = "<bytes>" if isinstance(file, bytes) else os.path.expanduser(file)
    if not isinstance(file, bytes) and not os.path.isfile(name):
        raise CheckpointNotFoundError(f"there is no checkpoint {name}")
    if not TORCH_TAKES_STAND_INS:
        raise CheckpointError(
            f"{name} cannot be read without running it under torch "
            f"{torch.__version__}; use torch >= 2.6"
        )
    try:
        with (
            io.BytesIO(file) if isinstance(file, bytes) else open(name, "rb") as content
        ):
            problem = foreign_format(name, content)
            if problem:
                raise CheckpointError(f"{name} is no checkpoint: {problem}")
            if name.endswith(".safetensors"):
                return _read_safetensors(name), []
            return _read(name, content, map_location)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error


def _read(name: str, content: Any, map_location: MapLocation) -> tuple[Any, list[str]]:
    unknown: list[str] = []
    try:
        # The format before zip files cannot be asked what it wants: what is known
        # loads there.
        if zipfile.is_zipfile(content):
            content.seek(0)
            with _stand_ins(()):
                wanted = torch.serialization.get_unsafe_globals_in_checkpoint(content)
            unknown = sorted(wanted)
        content.seek(0)
        with _stand_ins(unknown):
            loaded = torch.load(content, map_location, weights_only=True)
        return _finished(loaded, {}), unknown
    except (OSError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        names = f" ({some(unknown)})" if unknown else ""
        raise CheckpointError(
            f"{name} cannot be loaded as a checkpoint: it is damaged, or holds more "
            f"than weights and plain data{names}; save model.state_dict() anew"
        ) from error


def foreign_format(name: str, content: Any) -> str:
    """What an open file is that is no checkpoint; empty for one."""
    if name.endswith(".safetensors"):
        return ""
    head = content.read(512)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(content):
            return "it is a damaged or truncated zip file"
        names = zipfile.ZipFile(content).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return "it is a TorchScript program; save model.state_dict()"
        return ""
    if head.startswith(b"\x80"):
        return ""
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with 'git lfs pull'"
    if head.lstrip()[:1] == b"<":
        return "it is a web page; the download went wrong"
    return f"it begins with {head[:16]!r}" if head else "it is empty"


def _read_safetensors(name: str) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{name} needs the library safetensors: 'pip install safetensors'"
        ) from error
    try:
        return load_file(name)
    except SafetensorError as error:
        raise CheckpointError(f"{name} is no safetensors file: {error}") from error
