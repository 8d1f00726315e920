"""An unpickler for tensors and plain data that runs nothing of a file.

No name in a file is ever imported or called. A global becomes an
:class:`InertGlobal`, which is only a name; what is built from it is either one
of a few known values, checked and made by the code below (tensors, containers,
NumPy data, MMEngine's ``HistoryBuffer``), or an :class:`InertObject`, which
remembers its parts and does nothing.

An allow list in ``find_class`` would not be enough. Whoever hands out a real
class or function lets a file change it (``BUILD`` sets attributes), reach
further objects from it (``getattr``), or give NumPy a state by which it takes
bytes for addresses. So each opcode that calls or changes something is replaced.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_DTYPE_NAMES = frozenset(
    name for name, value in vars(torch).items() if isinstance(value, torch.dtype)
)
_NUMPY_TYPE = re.compile(r"[<>|=]?(?:[biufc][1-9]\d?|[US]\d{1,9}|O8?)")
# Names that a checkpoint of MMEngine mentions and nobody needs.
_EXPECTED_NAMES = re.compile(
    r"builtins\.getattr|builtins\.object|numpy\.ndarray|torch\.Tensor|"
    r"torch\.nn\.parameter\.Parameter|mmengine\.logging\.history_buffer\..*"
)
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class InertGlobal:
    """The name of a class or function in a file; never looked up.

    Attributes:
        module: Module as the file names it.
        name: Qualified name in the module.
    """

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def path(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"<inert {self.path}>"


class InertObject:
    """Stands where a file has an object of a class that is not known.

    Attributes:
        path: What the file wanted to call, as text.
        args: What it wanted to call it with.
        state: What it wanted to set on the result; None for nothing.
        items: What it wanted to append (values) or set (key-value pairs).
    """

    __slots__ = ("args", "items", "path", "state")

    def __init__(self, path: str, args: tuple = ()) -> None:
        self.path = path
        self.args = args
        self.state: Any = None
        self.items: list = []

    def __repr__(self) -> str:
        return f"<inert object of {self.path}>"


# ------------------------------------------------------------------ known values
# Every builder gets arguments that a file chose. It checks them, so that torch
# and NumPy only see what they themselves would write.


class _Pending:
    """An array or dtype whose content comes with its state."""

    __slots__ = ("path", "text")

    def __init__(self, path: str, text: str = "") -> None:
        self.path = path
        self.text = text


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(f"malformed {what}")


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        type(size) is int and size >= 0 for size in value
    )


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *, dtype: Any = None
) -> torch.Tensor:
    _check(isinstance(storage, torch.storage.TypedStorage), "tensor storage")
    _check(type(offset) is int and offset >= 0, "tensor offset")
    _check(_is_shape(size) and _is_shape(stride), "tensor shape")
    _check(len(size) == len(stride), "tensor shape")
    _check(dtype is None or isinstance(dtype, torch.dtype), "tensor dtype")
    untyped = storage._untyped_storage
    dtype = dtype or storage.dtype
    if math.prod(size):
        # set_ would enlarge a storage that is too short, with whatever was in
        # that memory.
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        item_size = torch.empty(0, dtype=dtype).element_size()
        _check((last + 1) * item_size <= untyped.nbytes(), "tensor shape")
    tensor = torch.empty((0,), dtype=dtype, device=untyped.device)
    return tensor.set_(untyped, offset, tuple(size), tuple(stride))


def _finish_tensor(
    tensor: torch.Tensor, requires_grad: Any, metadata: Any
) -> torch.Tensor:
    if isinstance(metadata, dict):
        if metadata.get("conj") is True:
            tensor = torch._conj(tensor)
        if metadata.get("neg") is True:
            tensor = torch._neg_view(tensor)
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return tensor.requires_grad_(requires_grad is True and differentiable)


def _rebuild_tensor_v2(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    backward_hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    # Backward hooks are callables; none is taken from a file.
    tensor = _rebuild_tensor(storage, offset, size, stride)
    return _finish_tensor(tensor, requires_grad, metadata)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    backward_hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> torch.Tensor:
    tensor = _rebuild_tensor(storage, offset, size, stride, dtype=dtype)
    return _finish_tensor(tensor, requires_grad, metadata)


def _rebuild_parameter(
    data: Any, requires_grad: Any, *_: Any
) -> torch.nn.parameter.Parameter:
    _check(isinstance(data, torch.Tensor), "parameter")
    return torch.nn.Parameter(data.detach(), requires_grad is True)


def _rebuild_from_type(function: Any, _cls: Any, args: Any, _state: Any) -> Any:
    # Subclasses and Python attributes of a tensor are dropped, its values stay.
    known = isinstance(function, InertGlobal) and isinstance(args, tuple)
    key = (function.module, function.name) if known else ("", "")
    _check(key in _TENSOR_BUILDERS, "tensor subclass")
    return _TENSOR_BUILDERS[key](*args)


def _size(values: Any = ()) -> torch.Size:
    _check(_is_shape(values), "torch.Size")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    _check(isinstance(kind, str) and (index is None or type(index) is int), "device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    _check(isinstance(text, str) and encoding in ("latin1", "latin-1"), "bytes")
    return text.encode("latin-1")


def _bytes(*args: Any) -> bytes:
    _check(not args or isinstance(args[0], (bytes, bytearray)), "bytes")
    return bytes(args[0]) if args else b""


def _bytearray(*args: Any) -> bytearray:
    if len(args) == 2:
        return bytearray(_encode(*args))
    return bytearray(_bytes(*args))


def _container(kind: Callable) -> Callable:
    def build(values: Any = ()) -> Any:
        _check(isinstance(values, (list, tuple, dict, set, frozenset)), "container")
        return kind(values)

    return build


def _complex(real: Any, imag: Any = 0.0) -> complex:
    _check(all(type(part) in (int, float) for part in (real, imag)), "complex")
    return complex(real, imag)


def _numpy_dtype(text: Any, *_: Any) -> Any:
    _check(isinstance(text, str), "numpy.dtype")
    if not _NUMPY_TYPE.fullmatch(text):
        return InertObject("numpy.dtype", (text,))
    return _Pending("numpy.dtype", text)


def _numpy_dtype_with_state(pending: _Pending, state: Any) -> Any:
    _check(isinstance(state, tuple) and len(state) >= 5, "numpy.dtype")
    _, byte_order, sub_dtype, names, fields = state[:5]
    _check(byte_order in ("<", ">", "|", "="), "numpy.dtype")
    if sub_dtype is not None or names is not None or fields is not None:
        return InertObject("numpy.dtype", (pending.text,))
    # The rest of the state (sizes, flags) follows from the type. Taken from the
    # file it could pass off bytes as pointers.
    return np.dtype(pending.text).newbyteorder(byte_order)


def _resolved_dtype(value: Any) -> Any:
    return np.dtype(value.text) if isinstance(value, _Pending) else value


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    dtype = _resolved_dtype(dtype)
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        return InertObject("numpy.scalar", (dtype, raw))
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    _check(isinstance(raw, bytes) and len(raw) == dtype.itemsize, "numpy scalar")
    return np.frombuffer(raw, dtype=dtype)[0] if raw else dtype.type()


def _numpy_array(*_: Any) -> _Pending:
    return _Pending("numpy.ndarray")


def _fill_array(shape: Any, dtype: Any, fortran: Any, raw: Any) -> Any:
    dtype = _resolved_dtype(dtype)
    if not isinstance(dtype, np.dtype):
        return InertObject("numpy.ndarray", (shape, dtype))
    _check(_is_shape(shape), "numpy array")
    size = math.prod(shape)
    order: Any = "F" if fortran is True else "C"
    if dtype.hasobject:
        _check(isinstance(raw, list) and len(raw) == size, "numpy array")
        flat = np.empty(size, dtype=object)
        for index, value in enumerate(raw):
            flat[index] = value
        return flat.reshape(shape, order=order)
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    _check(isinstance(raw, (bytes, bytearray)), "numpy array")
    _check(len(raw) == size * dtype.itemsize, "numpy array")
    if not raw:
        return np.empty(shape, dtype=dtype, order=order)
    flat = np.frombuffer(bytes(raw), dtype=dtype)
    return flat.reshape(shape, order=order).copy(order=order)


def _numpy_array_with_state(_: _Pending, state: Any) -> Any:
    _check(isinstance(state, tuple) and len(state) in (4, 5), "numpy array")
    return _fill_array(*state[-4:])


def _numpy_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    return _fill_array(shape, dtype, order == "F", raw)


def _history_buffer(*_: Any) -> _Pending:
    return _Pending("HistoryBuffer")


def _history_buffer_with_state(_: _Pending, state: Any) -> HistoryBuffer:
    _check(isinstance(state, dict), "HistoryBuffer")
    log, count = state.get("_log_history"), state.get("_count_history")
    max_length = state.get("max_length", 1_000_000)
    for history in (log, count):
        _check(isinstance(history, np.ndarray), "HistoryBuffer")
        _check(history.ndim == 1 and history.dtype.kind in "biuf", "HistoryBuffer")
    _check(len(log) == len(count) and type(max_length) is int, "HistoryBuffer")
    # Its statistics methods are functions; the running MMEngine has its own.
    buffer = HistoryBuffer(max_length=max_length)
    buffer._log_history, buffer._count_history = log, count
    return buffer


_TENSOR_BUILDERS: dict[tuple[str, str], Callable] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
}
_BUILDERS: dict[tuple[str, str], Callable] = {
    **_TENSOR_BUILDERS,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "complex"): _complex,
    ("builtins", "set"): _container(set),
    ("builtins", "frozenset"): _container(frozenset),
    ("builtins", "list"): _container(list),
    ("builtins", "dict"): _container(dict),
    ("collections", "OrderedDict"): _container(OrderedDict),
    ("collections", "Counter"): _container(Counter),
    ("collections", "defaultdict"): lambda *_: {},
    # Dicts with attribute access; configs are made of them.
    ("addict.addict", "Dict"): _container(dict),
    ("mmengine.config.config", "ConfigDict"): _container(dict),
    ("numpy", "dtype"): _numpy_dtype,
    ("mmengine.logging.history_buffer", "HistoryBuffer"): _history_buffer,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _BUILDERS[f"{_core}.multiarray", "scalar"] = _numpy_scalar
    _BUILDERS[f"{_core}.multiarray", "_reconstruct"] = _numpy_array
    _BUILDERS[f"{_core}.numeric", "_frombuffer"] = _numpy_from_buffer
_STATE_BUILDERS: dict[str, Callable] = {
    "numpy.ndarray": _numpy_array_with_state,
    "numpy.dtype": _numpy_dtype_with_state,
    "HistoryBuffer": _history_buffer_with_state,
}


# --------------------------------------------------------------------- unpickler


class _InertUnpickler(pickle._Unpickler):
    """Unpickler that imports nothing and calls only the builders above."""

    # Opcodes that are not listed end the loading: the extension registry and
    # out-of-band buffers, which torch does not write.
    dispatch: ClassVar[dict] = {
        code: handler
        for code, handler in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
            pickle.PERSID,
        )
    }

    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    def __init__(self, file: Any, *, unknown: set[str], **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._unknown = unknown

    def find_class(self, module: str, name: str) -> Any:
        module = _OLD_MODULES.get(module, module)
        if module == "torch" and name in _DTYPE_NAMES:
            return getattr(torch, name)
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.UntypedStorage
        found = InertGlobal(module, name)
        known = (module, name) in _BUILDERS or _EXPECTED_NAMES.fullmatch(found.path)
        if not known:
            self._unknown.add(found.path)
        return found

    def _construct(self, callee: Any, args: Any) -> Any:
        _check(isinstance(args, tuple), "call")
        if not isinstance(callee, InertGlobal):
            return InertObject(f"{callee!r}()", args)
        if callee.path in ("copyreg._reconstructor", "copyreg.__newobj__") and args:
            return self._construct(args[0], ())
        if callee.path == "builtins.getattr" and len(args) == 2:
            owner, name = args
            if isinstance(owner, InertGlobal) and isinstance(name, str):
                return self.find_class(owner.module, f"{owner.name}.{name}")
        builder = _BUILDERS.get((callee.module, callee.name))
        if builder is None:
            self._unknown.add(callee.path)
            return InertObject(callee.path, args)
        try:
            return builder(*args)
        except (TypeError, ValueError) as error:
            raise pickle.UnpicklingError(f"malformed {callee.path}: {error}") from error

    def _replace_top(self, new: Any) -> None:
        old = self.stack[-1]
        self.stack[-1] = new
        # From the end: a pickle has an object once, and put it there a moment ago.
        for key in reversed(self.memo):
            if self.memo[key] is old:
                self.memo[key] = new
                break

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._construct(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        _check(kwargs == {}, "call")
        self.stack[-1] = self._construct(self.stack[-1], args)

    def load_inst(self) -> None:
        module = self.readline()[:-1].decode("ascii")
        name = self.readline()[:-1].decode("ascii")
        args = tuple(self.pop_mark())
        self.append(self._construct(self.find_class(module, name), args))

    def load_obj(self) -> None:
        callee, *args = self.pop_mark()
        self.append(self._construct(callee, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, InertObject):
            target.state = state
        elif isinstance(target, _Pending):
            self._replace_top(_STATE_BUILDERS[target.path](target, state))
        elif type(target) is OrderedDict:
            # A state_dict carries the versions of its modules as an attribute.
            metadata = state.get("_metadata") if isinstance(state, dict) else None
            if isinstance(metadata, dict):
                target._metadata = metadata  # type: ignore[attr-defined]
        elif type(target) is not dict:  # a dict gets its items by SETITEMS
            raise pickle.UnpicklingError(
                f"a {type(target).__name__} does not take a state"
            )

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, InertObject):
            target.items.extend(items)
        else:
            _check(type(target) is list, "list")
            target.extend(items)

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_additems(self) -> None:
        items = self.pop_mark()
        _check(type(self.stack[-1]) is set, "set")
        self.stack[-1].update(items)

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2]))
        if isinstance(target, InertObject):
            target.items.extend(pairs)
        else:
            _check(type(target) in (dict, OrderedDict, Counter), "dict")
            for key, value in pairs:
                target[key] = value

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_binpersid(self) -> None:
        key = self.stack.pop()
        _check(isinstance(key, tuple) and len(key) in (5, 6), "storage")
        kind, storage_type, _name, location, numel = key[:5]
        _check(kind in ("storage", b"storage"), "storage")
        _check(
            storage_type is torch.UntypedStorage
            or isinstance(getattr(storage_type, "dtype", None), torch.dtype),
            "storage type",
        )
        _check(isinstance(location, (str, bytes)), "storage location")
        _check(type(numel) is int and numel >= 0, "storage size")
        self.append(self.persistent_load(key))

    for _code, _handler in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_reduce),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.INST, load_inst),
        (pickle.OBJ, load_obj),
        (pickle.BUILD, load_build),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.ADDITEMS, load_additems),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.BINPERSID, load_binpersid),
    ):
        dispatch[_code[0]] = _handler
    del _code, _handler


def make_pickle_module(unknown: set[str]) -> Any:
    """Make what :func:`torch.load` takes as ``pickle_module``.

    Args:
        unknown: Gets the names of classes and functions that stay inert.
    """

    class Unpickler(_InertUnpickler):
        def __init__(self, file: Any, **kwargs: Any) -> None:
            super().__init__(file, unknown=unknown, **kwargs)

    class InertPickle:
        @staticmethod
        def load(file: Any, **kwargs: Any) -> Any:
            return Unpickler(file, **kwargs).load()

    InertPickle.Unpickler = Unpickler  # type: ignore[attr-defined]
    return InertPickle
