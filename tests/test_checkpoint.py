"""Checkpoints of MMEngine load and resume; nothing in a file is executed."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from torch import nn

from mmyolo_vis_hooks.checkpoint import (
    load_checkpoint_safely,
)
from mmyolo_vis_hooks.detector import load_weights
from mmyolo_vis_hooks.errors import CheckpointError
from mmyolo_vis_hooks.inert import TORCH_TAKES_STAND_INS, InertObject
from tests.toy import toy_config

pytestmark = pytest.mark.skipif(
    not TORCH_TAKES_STAND_INS, reason="torch < 2.6: MMEngine's loaders stay"
)


def toy_runner(work_dir: Path, data_root: Path, **overrides: Any) -> Runner:
    """Two epochs with momentum, a schedule, averaged weights and numpy metrics."""
    hooks = overrides.pop("custom_hooks", [dict(type="EMAHook", momentum=0.1)])
    settings: dict = dict(
        val_dataloader=None,
        val_evaluator=None,
        val_cfg=None,
        param_scheduler=[dict(type="MultiStepLR", milestones=[1], by_epoch=True)],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
    )
    config = toy_config(work_dir, hooks, data_root=data_root, **(settings | overrides))
    runner = Runner.from_cfg(config)
    # MMEngine does not save the random state.
    runner.model.backbone[4].p = 0.0
    return runner


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_data: Path) -> Path:
    """Work dir of two epochs that nothing interrupted."""
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    runner = toy_runner(work_dir, toy_data)
    runner.message_hub.update_info("best", np.float64(0.25))
    runner.train()
    return work_dir


def assert_same(actual: Any, expected: Any) -> None:
    """The same types and the very same values, through all containers."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for left, right in zip(actual, expected):
            assert_same(left, right)
    elif isinstance(expected, HistoryBuffer):
        assert actual.max_length == expected.max_length
        assert_same(actual.data, expected.data)
    elif isinstance(expected, torch.Tensor):
        assert actual.stride() == expected.stride()
        assert actual.requires_grad == expected.requires_grad
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    elif isinstance(expected, np.ndarray):
        assert actual.flags.f_contiguous == expected.flags.f_contiguous
        np.testing.assert_array_equal(actual, expected, strict=True)
    else:
        assert actual == expected


def test_a_training_checkpoint_is_what_was_saved(trained: Path) -> None:
    path = trained / "epoch_2.pth"
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        torch.load(path)
    ours = CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    # The file is our own, so it may be unpickled for comparison.
    reference = torch.load(path, map_location="cpu", weights_only=False)
    assert_same(ours, reference)
    assert ours["state_dict"]._metadata == reference["state_dict"]._metadata
    loss = ours["message_hub"]["log_scalars"]["train/loss"]
    assert len(loss.data[0]) == 6
    assert loss.statistics("mean", 2) == loss.data[0][-2:].mean()
    loss.update(1.0)


def test_resume_continues_bit_for_bit(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    folder.mkdir()
    (folder / "last_checkpoint").write_text(str(trained / "epoch_1.pth"))
    toy_runner(folder, toy_data, resume=True).train()
    expected = torch.load(trained / "epoch_2.pth", weights_only=False)
    actual = torch.load(folder / "epoch_2.pth", weights_only=False)
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert_same(actual[part], expected[part])
    for name in ("train/loss", "train/lr"):
        logs = [x["message_hub"]["log_scalars"][name] for x in (actual, expected)]
        assert_same(*logs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_values_survive_a_round_trip(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float32)
    values: dict[str, Any] = {
        "view": base.view(4, 6)[1:3, ::2],
        "whole": base.view(4, 6),
        "bfloat": base.bfloat16(),
        "complex": torch.complex(base, base).conj(),
        "parameter": nn.Parameter(base.clone(), requires_grad=False),
        "plain": [torch.float16, torch.Size([1]), torch.device("cpu"), None, 2**70],
        "numpy": (np.float64(0.1), np.int64(-7), np.bool_(True), np.str_("größe")),
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">i4"),
        "strings": np.array(["a", "bcd"]),
        "np_dtype": np.dtype("float32"),
        "sets": [{1, 2}, frozenset({3})],
        "bytes": [b"\x00\xff", bytearray(b"ab"), b"", 1.5, complex(1, 2)],
        "buffer": HistoryBuffer([1.0, 2.0], [1, 1], 5),
        "empty": HistoryBuffer(),
    }
    if not zipped:  # protocol 2 calls builtins for these
        del values["sets"], values["bytes"][2]
    values["same"] = values["array"]
    path = tmp_path / "values.pth"
    torch.save(
        values | {"config": ConfigDict(a=ConfigDict(b=1))},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    loaded = load_checkpoint_safely(path)
    assert loaded.pop("config") == {"a": {"b": 1}}
    assert_same(loaded, values)
    assert loaded["same"] is loaded["array"]
    loaded["whole"][1, 0] = 99
    assert loaded["view"][0, 0] == 99


# Malicious pickles.


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.parts


def save_raw(path: Path, pickled: bytes, zipped: bool = True) -> None:
    """Write a checkpoint whose pickle is exactly `pickled`."""
    buffer = io.BytesIO()
    if zipped:
        torch.save({}, buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                content = pickled if name.endswith("data.pkl") else old.read(name)
                new.writestr(name, content)
        return
    torch.save(None, buffer, _use_new_zipfile_serialization=False)
    head = io.BytesIO(buffer.getvalue())
    for _ in range(3):
        pickle.load(head)
    keys = pickle.dumps([], protocol=2)
    path.write_bytes(buffer.getvalue()[: head.tell()] + pickled + keys)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def attribute(owner: bytes, name: str) -> bytes:
    return call(glob("__builtin__", "getattr"), owner, text(name))


def opcodes(value: Any) -> bytes:
    """The pickle of `value` without its first and last opcode."""
    return pickle.dumps(value, protocol=2)[2:-1]


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def payloads(marker: str) -> dict[str, bytes]:
    """Pickles that create the file `marker` when unpickled plainly."""
    command = text(f"touch {marker}")
    code = text(f"open({marker!r}, 'w').close()")
    head = b"\x80\x02"
    system = glob("posix", "system")
    attack = call(glob("__builtin__", "eval"), code)
    ordered = glob("collections", "OrderedDict")
    builtins = call(glob("__builtin__", "__import__"), text("builtins"))
    # HistoryBuffer is in every checkpoint that MMEngine trained.
    buffer = glob("mmengine.logging.history_buffer", "HistoryBuffer")
    names = attribute(attribute(buffer, "update"), "__globals__")
    own_builtins = call(attribute(names, "get"), text("__builtins__"))
    own_exec = call(attribute(own_builtins, "get"), text("exec"))
    evil = Calls(eval, f"open({marker!r}, 'w').close()")
    values = {
        "system": call(system, command),
        "getattr chain": call(attribute(builtins, "exec"), code),
        "getattr from HistoryBuffer": call(own_exec, code),
        "numpy array": opcodes(np.array([evil])),
        "inside a tensor": call(
            glob("torch._utils", "_rebuild_tensor_v2"),
            attack + b"K\x00))\x89" + call(ordered),
        ),
        "state": call(ordered) + b"}(" + text("a") + attack + b"ub",
        "pickle in a pickle": opcodes(Calls(pickle.loads, pickle.dumps(evil))),
        "storage in a pickle": opcodes(
            Calls(torch.storage._load_from_bytes, torch_bytes(evil))
        ),
    }
    pickles = {
        name: head + b"}(" + text("state_dict") + value + b"u."
        for name, value in values.items()
    }
    pickles["top level"] = head + attack + b"."
    pickles["old instance"] = head + b"(" + command + b"iposix\nsystem\n."
    pickles["protocol 4"] = (
        b"\x80\x04" + text("posix") + text("system") + b"\x93" + command + b"\x85R."
    )
    return pickles


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", sorted(payloads("marker")))
def test_nothing_in_the_file_runs(tmp_path: Path, name: str, zipped: bool) -> None:
    marker = tmp_path / "executed"
    pickled = payloads(str(marker))[name]
    # Some fail after they struck: an exit status is no tensor.
    with contextlib.suppress(Exception):
        pickle.loads(pickled)
    assert marker.exists(), "the payload must be a working attack"
    marker.unlink()

    path = tmp_path / "attack.pth"
    save_raw(path, pickled, zipped)
    before = set(torch.serialization.get_safe_globals())
    # What loads does so inertly, and is no weights.
    with contextlib.suppress(CheckpointError):
        assert set(load_checkpoint_safely(path)) == {"state_dict"}
    with pytest.raises(CheckpointError, match=r"attack\.pth"):
        load_weights(nn.Linear(2, 2), path)
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == before


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    save_raw(tmp_path / "a.pth", b"\x80\x02}" + text("k") + b"cevil_module\nthing\ns.")
    loaded = load_checkpoint_safely(tmp_path / "a.pth")
    assert repr(loaded["k"]) == "<inert evil_module.thing>"


@pytest.mark.parametrize(
    ("owner", "module", "name"),
    [
        (torch._utils._rebuild_tensor_v2, "torch._utils", "_rebuild_tensor_v2"),
        (HistoryBuffer, "mmengine.logging.history_buffer", "HistoryBuffer"),
        (OrderedDict, "collections", "OrderedDict"),
    ],
)
def test_a_file_cannot_change_a_class(
    tmp_path: Path, owner: Any, module: str, name: str
) -> None:
    """BUILD with a slot state is a setattr on whatever lies on the stack."""
    state = b"N}" + text("was_here") + b"\x88s\x86b"
    pickled = b"\x80\x02}" + text("k") + glob(module, name) + state + b"s."
    save_raw(tmp_path / "a.pth", pickled)
    with pytest.raises(CheckpointError, match="more than weights"):
        load_checkpoint_safely(tmp_path / "a.pth")
    assert not hasattr(owner, "was_here")


def test_statistics_methods_come_from_the_running_mmengine(tmp_path: Path) -> None:
    state = dict(HistoryBuffer([1.0, 3.0], [1, 1]).__getstate__())
    state["statistics_methods"] = {"mean": eval, "evil": eval}
    before = dict(HistoryBuffer._statistics_methods)
    torch.save({"h": Calls(HistoryBuffer, state=state)}, tmp_path / "a.pth")
    # Whatever scripts allow to get along with torch >= 2.6.
    with torch.serialization.safe_globals([HistoryBuffer, getattr, np.dtype]):
        loaded = load_checkpoint_safely(tmp_path / "a.pth")["h"]
        assert HistoryBuffer in torch.serialization.get_safe_globals()
    assert loaded.statistics("mean") == 2.0
    assert HistoryBuffer._statistics_methods == before


@pytest.mark.parametrize("kind", ["O8", "i8"])
def test_numpy_data_cannot_pass_for_pointers(tmp_path: Path, kind: str) -> None:
    """An object dtype without its flags would read the bytes as addresses."""
    reconstruct, arguments, _ = np.array([1, 2]).__reduce__()
    flags = (3, "|", None, None, None, -1, -1, 0)
    forged_dtype = Calls(np.dtype, kind, False, True, state=flags)
    state = (1, (2,), forged_dtype, False, b"A" * 16)
    torch.save({"a": Calls(reconstruct, *arguments, state=state)}, tmp_path / "a.pth")
    found = load_checkpoint_safely(tmp_path / "a.pth")["a"]
    if kind == "O8":
        assert isinstance(found, InertObject)
    else:
        np.testing.assert_array_equal(found, [0x4141414141414141] * 2)


# Unknown classes, messages.


class Opinion:
    """A class that only the training code knows."""

    def __init__(self) -> None:
        self.best = 3
        self.kind = Opinion


def test_unknown_classes_become_placeholders(tmp_path: Path, said: list[str]) -> None:
    model = nn.Linear(2, 2)
    torch.save({"state_dict": model.state_dict(), "o": Opinion()}, tmp_path / "a.pth")
    for source, copy in (("a.pth", "b.pth"), ("b.pth", "c.pth")):
        # A training that was resumed saves it again.
        other = nn.Linear(2, 2)
        loaded = load_checkpoint(other, str(tmp_path / source), strict=True)
        assert torch.equal(other.weight, model.weight)
        assert loaded["o"].path == "tests.test_checkpoint.Opinion"
        assert loaded["o"].state["best"] == 3
        assert loaded["o"].state["kind"].path == loaded["o"].path
        torch.save(loaded, tmp_path / copy)
    assert len(said) == 1
    assert "tests.test_checkpoint.Opinion" in said[0]


# Pre-trained backbones have objects beside their weights.
WHOLE = torch_bytes({"state_dict": {"w": torch.ones(2)}, "args": Opinion()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89PNG\r\n", r"begins with b'\\x89PNG"),
        (WHOLE[: len(WHOLE) // 2], "truncated zip"),
        (pickle.dumps({"state_dict": {}}), "damaged, or holds more than weights"),
        (torch_bytes({"model": nn.Linear(2, 2)}), r"object of torch\.nn.*Linear, not"),
        (torch_bytes({"state_dict": Opinion()}), "object of .*Opinion, not a dict"),
    ],
)
def test_what_is_no_checkpoint_says_so(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointLoader.load_checkpoint(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


HOOK = dict(type="FeatMapVisHook", target_layers="neck", draw=True)


def saved(path: Path, **content: Any) -> str:
    torch.save(content, path)
    return str(path)


def test_a_run_does_not_go_on_with_weights_that_were_not_read(
    trained: Path, toy_data: Path, tmp_path: Path
) -> None:
    whole = load_checkpoint_safely(trained / "epoch_2.pth")
    weights = whole["state_dict"]
    other = {f"other.{key}": value for key, value in weights.items()}
    settings = dict(
        custom_hooks=[HOOK], load_from=saved(tmp_path / "a", state_dict=other)
    )
    runner = toy_runner(tmp_path / "run", toy_data, **settings)
    with pytest.raises(
        CheckpointError, match=r"a is of another.* 0 of \d+ weights fit"
    ):
        runner.test()
    for key in ("meta", "optimizer"):
        whole.pop(key)
    settings = dict(settings, load_from=saved(tmp_path / "b", **whole), resume=True)
    runner = toy_runner(tmp_path / "resume", toy_data, **settings)
    with pytest.raises(CheckpointError, match="not the state of a training"):
        runner.train()
    settings["load_from"] = str(tmp_path / "gone.pth")
    runner = toy_runner(tmp_path / "gone", toy_data, **settings)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*gone"):
        runner.train()


def test_a_run_says_how_much_fits(
    trained: Path, toy_data: Path, tmp_path: Path, said: list[str]
) -> None:
    """A backbone that was trained before, and a head of other classes."""
    weights = load_checkpoint_safely(trained / "epoch_2.pth")["state_dict"]
    kept = {f"module.{k}": v for k, v in weights.items() if k.startswith("backbone")}
    kept["module.head.weight"] = torch.zeros(3, 8, 1, 1)
    kept["module.backbone.1.bias"] = torch.full((8,), torch.nan)
    kept["module.backbone.1.weight"] = torch.ones(8).to(torch.float8_e4m3fn)
    hooks = [HOOK, dict(type="EMAHook")]
    source = saved(tmp_path / "a.pth", state_dict=kept)
    settings = dict(custom_hooks=hooks, load_from=source)
    runner = toy_runner(tmp_path / "run", toy_data, **settings)
    runner.test()
    line, other = said
    assert other == (
        f"{source}: 1 of 18 weights hold NaN or infinity, as after a training that "
        "diverged: backbone.1.bias"
    )
    assert line == (
        f"{source}: 10 of 18 weights fit; missing neck.out_layers.0.weight, "
        "neck.out_layers.0.bias, neck.out_layers.1.weight and 4 more; shapes "
        "head.weight (3, 8, 1, 1) instead of (1, 8, 1, 1)"
    )
    assert torch.equal(runner.model.backbone[0].weight, weights["backbone.0.weight"])
