"""Checkpoints of MMEngine load and resume; nothing in a file is executed."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from torch import nn
from torch.utils.data import Dataset

from mmyolo_vis_hooks.checkpoint import (
    CheckpointError,
    load_checkpoint_safely,
    register_checkpoint_loaders,
)
from mmyolo_vis_hooks.inert_pickle import InertGlobal, InertObject

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


# ------------------------------------------------------------------ a toy training


class ToyDetector(BaseModel):
    """Two convolutions with BN: weights, buffers and an optimizer state."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)
        )

    def forward(self, inputs, data_samples=None, mode="tensor"):
        response = self.backbone(torch.stack(list(inputs)).float()).mean((1, 2, 3))
        if mode == "loss":
            target = torch.stack(list(data_samples)).float()
            return {"loss": nn.functional.mse_loss(response, target)}
        return list(response)


class ToyData(Dataset):
    metainfo = {"classes": ("toy",), "palette": [(1, 2, 3)]}

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(8, 3, 8, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return {"inputs": image, "data_samples": image.mean()}


class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples) -> None:
        self.results.extend(float(sample) for sample in data_samples)

    def compute_metrics(self, results: list) -> dict:
        # A NumPy scalar, as the COCO metric returns it.
        return {"response": np.float64(np.mean(results))}


def toy_runner(work_dir, **overrides) -> Runner:
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=ToyData(),
        sampler=dict(type="DefaultSampler", shuffle=False),
    )
    config = dict(
        model=ToyDetector(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            loader, sampler=dict(type="DefaultSampler", shuffle=True)
        ),
        val_dataloader=loader,
        val_evaluator=[ToyMetric()],
        train_cfg=dict(by_epoch=True, max_epochs=4),
        val_cfg=dict(),
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=0.1, momentum=0.9), clip_grad=dict(max_norm=5)
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=5),
            dict(type="MultiStepLR", milestones=[3], by_epoch=True),
        ],
        custom_hooks=[dict(type="EMAHook", momentum=0.1)],
        default_hooks=dict(
            checkpoint=dict(
                type="CheckpointHook", interval=1, save_best="response", rule="greater"
            ),
            logger=dict(type="LoggerHook", interval=1),
        ),
        randomness=dict(seed=3),
        log_level="WARNING",
        experiment_name=f"toy_{os.path.basename(str(work_dir))}",
    )
    config.update(overrides)
    return Runner(**config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Work directory of four uninterrupted epochs, and their Runner."""
    work_dir = tmp_path_factory.mktemp("uninterrupted")
    runner = toy_runner(work_dir)
    runner.train()
    return work_dir, runner


@pytest.mark.skipif(TORCH < (2, 6), reason="torch loads without weights_only")
def test_torch_alone_refuses_a_training_checkpoint(trained):
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        torch.load(trained[0] / "epoch_2.pth")


def test_training_checkpoint_is_what_was_saved(trained):
    work_dir, _ = trained
    path = str(work_dir / "epoch_4.pth")
    ours = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    # The file is our own, so it may be unpickled for comparison.
    reference = torch.load(path, map_location="cpu", weights_only=False)

    assert list(ours) == list(reference)
    assert type(ours["state_dict"]) is OrderedDict
    assert ours["state_dict"]._metadata == reference["state_dict"]._metadata
    for part in ("state_dict", "ema_state_dict"):
        assert list(ours[part]) == list(reference[part])
        for name, value in reference[part].items():
            assert ours[part][name].dtype == value.dtype
            assert torch.equal(ours[part][name], value), name
    assert ours["meta"] == reference["meta"]
    assert ours["param_schedulers"] == reference["param_schedulers"]

    scalars = reference["message_hub"]["log_scalars"]
    assert {"train/loss", "val/response"} <= set(scalars)
    for name, expected in scalars.items():
        actual = ours["message_hub"]["log_scalars"][name]
        assert type(actual) is HistoryBuffer
        assert actual.max_length == expected.max_length
        for left, right in zip(actual.data, expected.data):
            np.testing.assert_array_equal(left, right, strict=True)
        assert actual.statistics("mean", 2) == expected.statistics("mean", 2)
        actual.update(1.0)
    info = reference["message_hub"]["runtime_info"]
    assert ours["message_hub"]["runtime_info"] == info
    assert isinstance(info["best_score"], float)


def test_optimizer_state_is_what_was_saved(trained):
    work_dir, _ = trained
    path = work_dir / "epoch_4.pth"
    ours = load_checkpoint_safely(path)["optimizer"]
    reference = torch.load(path, weights_only=False)["optimizer"]
    assert ours["param_groups"] == reference["param_groups"]
    assert list(ours["state"]) == list(reference["state"])
    for key, slots in reference["state"].items():
        momentum = ours["state"][key]["momentum_buffer"]
        assert torch.equal(momentum, slots["momentum_buffer"])


def test_no_placeholder_in_an_ordinary_checkpoint(trained):
    def walk(value):
        assert not isinstance(value, InertObject), value
        if isinstance(value, dict):
            value = list(value.keys()) + list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(load_checkpoint_safely(trained[0] / "epoch_4.pth"))


@pytest.mark.parametrize("how", ["path", "auto"])
def test_resume_continues_bit_for_bit(trained, tmp_path, how):
    work_dir, reference = trained
    if how == "path":
        resumed = toy_runner(
            tmp_path / "resumed_path",
            resume=True,
            load_from=str(work_dir / "epoch_2.pth"),
        )
    else:
        folder = tmp_path / "resumed_auto"
        folder.mkdir()
        (folder / "last_checkpoint").write_text(str(work_dir / "epoch_2.pth"))
        resumed = toy_runner(folder, resume=True)
    resumed.train()

    assert (resumed.epoch, resumed.iter) == (reference.epoch, reference.iter) == (4, 16)
    for left, right in zip(
        resumed.model.state_dict().values(), reference.model.state_dict().values()
    ):
        assert torch.equal(left, right)
    last = torch.load(work_dir / "epoch_4.pth", weights_only=False)
    again = torch.load(f"{resumed.work_dir}/epoch_4.pth", weights_only=False)
    for name, value in last["ema_state_dict"].items():
        assert torch.equal(again["ema_state_dict"][name], value), name
    for key, slots in last["optimizer"]["state"].items():
        assert torch.equal(
            again["optimizer"]["state"][key]["momentum_buffer"],
            slots["momentum_buffer"],
        )
    for name in ("train/loss", "train/lr"):
        for left, right in zip(
            again["message_hub"]["log_scalars"][name].data,
            last["message_hub"]["log_scalars"][name].data,
        ):
            np.testing.assert_array_equal(left, right)
    assert len(last["message_hub"]["log_scalars"]["train/loss"].data[0]) == 16


def test_the_checkpoint_loads_into_a_model(trained):
    work_dir, _ = trained
    model = ToyDetector()
    load_checkpoint(model, str(work_dir / "epoch_4.pth"), strict=True)
    expected = torch.load(work_dir / "epoch_4.pth", weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])


# ----------------------------------------------------------------- every known value


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_survive_a_round_trip(tmp_path, zipped, protocol):
    base = torch.arange(24, dtype=torch.float32)
    values = {
        "tensor": base.view(4, 6),
        "view": base.view(4, 6)[1:3, ::2],
        "transposed": base.view(4, 6).t(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "bool": base > 3,
        "complex": torch.complex(base, base).conj(),
        "parameter": nn.Parameter(base.clone(), requires_grad=False),
        "grad": base.clone().requires_grad_(),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "float64": np.float64(0.1),
        "int64": np.int64(-7),
        "bool_": np.bool_(True),
        "str_": np.str_("größe"),
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">i4"),
        "objects": np.array([[1, "two"], [None, 4.0]], dtype=object),
        "strings": np.array(["a", "bcd"]),
        "no_items": np.zeros((0, 3), dtype=np.uint8),
        "np_dtype": np.dtype("float32"),
        "ordered": OrderedDict(b=1, a=2),
        "set": {1, 2},
        "frozenset": frozenset({3}),
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab\xff"),
        "no_bytes": b"",
        "numbers": [1, -1, 2**70, 1.5, complex(1, 2), True, None],
        "config": ConfigDict(a=ConfigDict(b=1)),
        "nested": ({"k": [(), (1,), "ü"]},),
    }
    values["same"] = values["tensor"]
    path = tmp_path / "values.pth"
    torch.save(
        values,
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    loaded = load_checkpoint_safely(path)

    assert list(loaded) == list(values)
    for name, expected in values.items():
        actual = loaded[name]
        # Configs come as plain dicts.
        kind = dict if name == "config" else type(expected)
        assert type(actual) is kind, name
        if isinstance(expected, torch.Tensor):
            assert actual.dtype == expected.dtype
            assert actual.requires_grad == expected.requires_grad
            assert actual.stride() == expected.stride()
            assert torch.equal(actual, expected), name
        elif isinstance(expected, np.ndarray):
            assert actual.dtype == expected.dtype
            assert actual.flags.f_contiguous == expected.flags.f_contiguous
            np.testing.assert_array_equal(actual, expected)
            assert actual.flags.writeable
        else:
            assert actual == expected, name
    # Views still share one storage.
    loaded["tensor"][1, 0] = 99
    assert loaded["view"][0, 0] == 99
    assert loaded["same"] is loaded["tensor"]


def test_many_arrays_load_in_linear_time(tmp_path):
    """Looking through the whole memo for each array took half a minute."""
    arrays = [np.full(2, i) for i in range(16_000)]
    path = tmp_path / "many.pth"
    torch.save(dict(arrays=arrays, again=arrays[::-1]), path)
    start = time.perf_counter()
    loaded = load_checkpoint_safely(path)
    assert time.perf_counter() - start < 10
    assert all((a == b).all() for a, b in zip(loaded["arrays"], arrays))
    assert all(a is b for a, b in zip(loaded["again"], loaded["arrays"][::-1]))


def test_bytes_load_like_a_file():
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}}, buffer)
    loaded = load_checkpoint_safely(buffer.getvalue(), map_location="cpu")
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))


# ------------------------------------------------------------------ malicious pickles


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args, state=None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def save_raw(path, pickled: bytes, zipped: bool = True) -> None:
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
    with open(path, "wb") as file:
        file.write(buffer.getvalue()[: head.tell()])
        file.write(pickled)
        file.write(pickle.dumps([], protocol=2))


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def attribute(owner: bytes, name: str) -> bytes:
    return call(glob("__builtin__", "getattr"), owner, text(name))


def opcodes(value) -> bytes:
    """The pickle of `value` without its first and last opcode."""
    return pickle.dumps(value, protocol=2)[2:-1]


def payloads(marker: str) -> dict[str, bytes]:
    """Pickles that create the file `marker` when unpickled plainly."""
    command = text(f"touch {marker}")
    code = text(f"open({marker!r}, 'w').close()")
    head = b"\x80\x02"
    system = glob("posix", "system")
    attack = call(system, command)
    ordered = glob("collections", "OrderedDict")
    builtins = call(glob("__builtin__", "__import__"), text("builtins"))
    # HistoryBuffer is in every checkpoint that MMEngine trained.
    buffer = glob("mmengine.logging.history_buffer", "HistoryBuffer")
    names = attribute(attribute(buffer, "update"), "__globals__")
    own_builtins = call(attribute(names, "get"), text("__builtins__"))
    own_exec = call(attribute(own_builtins, "get"), text("exec"))
    values = {
        "reduce": attack,
        "eval": call(glob("__builtin__", "eval"), code),
        "getattr chain": call(attribute(builtins, "exec"), code),
        "getattr from HistoryBuffer": call(own_exec, code),
        "partial": call(call(glob("functools", "partial"), system, command)),
        "map": call(
            glob("__builtin__", "list"),
            call(glob("__builtin__", "map"), system, b"](" + command + b"e"),
        ),
        "numpy runstring": call(
            glob("numpy.testing._private.utils", "runstring"), code, b"}"
        ),
        "numpy array": opcodes(np.array([Calls(os.system, f"touch {marker}")])),
        "inside a tensor": call(
            glob("torch._utils", "_rebuild_tensor_v2"),
            attack + b"K\x00))\x89" + call(ordered),
        ),
        "inside an OrderedDict": call(ordered, b"](](" + text("k") + attack + b"ee"),
        "state": call(ordered) + b"}(" + text("a") + attack + b"ub",
        "pickle in a pickle": opcodes(
            Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {marker}")))
        ),
        "storage in a pickle": opcodes(
            Calls(
                torch.storage._load_from_bytes,
                torch_bytes(Calls(os.system, f"touch {marker}")),
            )
        ),
    }
    pickles = {
        name: head + b"}(" + text("state_dict") + value + b"u."
        for name, value in values.items()
    }
    pickles["top level"] = head + attack + b"."
    pickles["old instance"] = head + b"(" + command + b"iposix\nsystem\n."
    pickles["old object"] = head + b"(" + system + command + b"o."
    pickles["protocol 4"] = (
        b"\x80\x04" + text("posix") + text("system") + b"\x93" + command + b"\x85R."
    )
    return pickles


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


PAYLOADS = sorted(payloads("marker"))
REFUSED = {
    "map": "malformed container",
    "inside a tensor": "malformed tensor storage",
    "top level": "not a dict of weights",
    "old instance": "not a dict of weights",
    "old object": "not a dict of weights",
    "protocol 4": "not a dict of weights",
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_in_the_file_runs(tmp_path, name, zipped):
    marker = tmp_path / "executed"
    pickled = payloads(str(marker))[name]
    # Some fail after they struck: an exit status is no tensor.
    with contextlib.suppress(Exception):
        pickle.loads(pickled)
    assert marker.exists(), "the payload must be a working attack"
    marker.unlink()

    path = tmp_path / "attack.pth"
    save_raw(path, pickled, zipped)
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[name]):
            CheckpointLoader.load_checkpoint(str(path))
    else:
        assert isinstance(CheckpointLoader.load_checkpoint(str(path)), dict)
    assert not marker.exists()


def test_nothing_is_imported(tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    save_raw(tmp_path / "a.pth", b"\x80\x02}X\x01\x00\x00\x00kcevil_module\nthing\ns.")
    loaded = load_checkpoint_safely(tmp_path / "a.pth")
    assert repr(loaded["k"]) == "<inert evil_module.thing>"
    assert not marker.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    "target",
    [
        b"ctorch\nTensor\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"cmmengine.logging.history_buffer\nHistoryBuffer\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch\nfloat32\n",
    ],
)
def test_a_file_cannot_change_a_class(tmp_path, target):
    """BUILD with a slot state is a setattr on whatever lies on the stack."""
    state = b"N}" + text("vis_hooks_was_here") + b"\x88s\x86b"
    save_raw(tmp_path / "a.pth", b"\x80\x02}" + text("k") + target + state + b"s.")
    with pytest.raises(CheckpointError, match="does not take a state"):
        load_checkpoint_safely(tmp_path / "a.pth")
    for owner in (
        torch.Tensor,
        torch._utils._rebuild_tensor_v2,
        HistoryBuffer,
        OrderedDict,
        torch.UntypedStorage,
    ):
        assert not hasattr(owner, "vis_hooks_was_here")


def test_statistics_methods_come_from_the_running_mmengine(tmp_path):
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    state = dict(buffer.__getstate__())
    state["statistics_methods"] = {"mean": os.system, "evil": os.system}

    class Forged:
        def __reduce__(self):
            return HistoryBuffer, (), state

    before = dict(HistoryBuffer._statistics_methods)
    torch.save({"h": Forged()}, tmp_path / "a.pth")
    loaded = load_checkpoint_safely(tmp_path / "a.pth")["h"]
    assert loaded.statistics("mean") == 2.0
    assert HistoryBuffer._statistics_methods == before


def test_numpy_data_cannot_pass_for_pointers(tmp_path):
    """An object dtype without its flags would read the bytes as addresses."""
    array = np.array([1, 2])
    reconstruct, arguments, _ = array.__reduce__()
    forged_dtype = Calls(
        np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0)
    )
    forged = Calls(
        reconstruct, *arguments, state=(1, (2,), forged_dtype, False, b"A" * 16)
    )
    torch.save({"a": forged}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="malformed numpy array"):
        load_checkpoint_safely(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((9,), (1,), 0),
        ((2,), (8,), 0),
        ((4,), (1,), 1),
        ((2,), (-1,), 1),
        ((-2,), (1,), 0),
    ],
)
def test_a_tensor_stays_in_its_storage(tmp_path, size, stride, offset):
    rebuild, arguments = torch.arange(4.0).__reduce_ex__(2)
    storage, _, _, _, *rest = arguments
    forged = Calls(rebuild, storage, offset, size, stride, *rest)
    torch.save({"a": forged}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="malformed tensor"):
        load_checkpoint_safely(tmp_path / "a.pth")


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match="TorchScript program"):
        load_checkpoint_safely(tmp_path / "program.pt")


def test_the_tar_format_is_refused(tmp_path):
    path = tmp_path / "old.pth"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(CheckpointError, match="tar file"):
        load_checkpoint_safely(path)


# -------------------------------------------------------------------- unknown classes


class Opinion:
    """A class that only the training code knows."""

    def __init__(self) -> None:
        self.best = 3


class Bag(dict):
    pass


class Pile(list):
    pass


def test_unknown_classes_become_placeholders(tmp_path, caplog):
    model = nn.Linear(2, 2)
    pile = Pile([1])
    checkpoint = {
        "state_dict": model.state_dict(),
        "opinion": Opinion(),
        "bag": Bag(a=torch.ones(1)),
        "pile": pile,
        "class": Opinion,
    }
    torch.save(checkpoint, tmp_path / "a.pth")
    other = nn.Linear(2, 2)
    loaded = load_checkpoint(other, str(tmp_path / "a.pth"), strict=True)

    assert torch.equal(other.weight, model.weight)
    assert isinstance(loaded["opinion"], InertObject)
    assert loaded["opinion"].path.endswith("Opinion")
    assert loaded["opinion"].state == {"best": 3}
    assert loaded["bag"].items == [("a", torch.ones(1))]
    assert loaded["pile"].items == [1]
    assert isinstance(loaded["class"], InertGlobal)
    assert not callable(loaded["class"])
    assert not callable(loaded["opinion"])
    # It can be saved again, as CheckpointHook does when it publishes a model.
    torch.save(loaded, tmp_path / "b.pth")
    again = load_checkpoint_safely(tmp_path / "b.pth")
    assert torch.equal(again["state_dict"]["weight"], model.weight)


def test_placeholders_are_reported(tmp_path, capfd, monkeypatch):
    messages = []
    monkeypatch.setattr(
        "mmyolo_vis_hooks.checkpoint.print_log",
        lambda message, **_: messages.append(message),
    )
    torch.save({"o": Opinion()}, tmp_path / "a.pth")
    load_checkpoint_safely(tmp_path / "a.pth")
    assert len(messages) == 1
    assert "Opinion" in messages[0]
    torch.save({"o": {"w": torch.ones(1)}}, tmp_path / "b.pth")
    load_checkpoint_safely(tmp_path / "b.pth")
    assert len(messages) == 1


def test_a_placeholder_in_the_weights_is_named(tmp_path):
    state = OrderedDict(weight=Opinion(), bias=torch.zeros(2))
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match="weight"):
        load_checkpoint(nn.Linear(2, 2), str(tmp_path / "a.pth"), strict=True)


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89PNG\r\n", r"begins with b'\\x89PNG"),
        (b"PK\x03\x04 cut off", "damaged"),
        (b"\x80\x02\x8a\nl", "damaged"),
        (pickle.dumps({"state_dict": {}}), "damaged or something else"),
    ],
)
def test_what_is_no_checkpoint_says_so(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointLoader.load_checkpoint(str(path))
    assert str(path) in str(caught.value)


def test_a_truncated_checkpoint_says_so(trained, tmp_path):
    content = (trained[0] / "epoch_2.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint_safely(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_checkpoint_safely(tmp_path / "none.pth")


def test_a_pickled_model_says_so(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="state_dict"):
        load_checkpoint_safely(tmp_path / "model.pth")


# ----------------------------------------------------------------------- registration


@pytest.fixture
def schemes(monkeypatch):
    """MMEngine's own loaders, as before this package is imported."""
    own = {
        "": mmengine_checkpoint.load_from_local,
        "http://": mmengine_checkpoint.load_from_http,
        "torchvision://": mmengine_checkpoint.load_from_torchvision,
    }
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(own))
    return CheckpointLoader


def loader_of(path: str):
    return CheckpointLoader._get_checkpoint_loader(path)


def test_importing_the_package_registers_the_loaders():
    ours = "mmyolo_vis_hooks.checkpoint"
    for path in (
        "weights.pth",
        "/abs/weights.pth",
        "https://host/weights.pth",
        "torchvision://resnet50",
        "open-mmlab://detectron2/resnet50_caffe",
        "mmcls://resnet50",
        "s3://bucket/weights.pth",
    ):
        assert loader_of(path).__module__ == ours, path


def test_registering_twice_changes_nothing(schemes):
    register_checkpoint_loaders()
    first = dict(schemes._schemes)
    register_checkpoint_loaders()
    assert dict(schemes._schemes) == first
    assert loader_of("a.pth").__name__ == "load_from_local"


def test_a_loader_of_the_user_stays(schemes):
    def mine(filename, map_location=None):
        return {"state_dict": {}}

    schemes.register_scheme("", mine, force=True)
    schemes.register_scheme("vault://", mine)
    register_checkpoint_loaders()
    assert loader_of("a.pth") is mine
    assert loader_of("vault://a.pth") is mine
    assert loader_of("http://host/a.pth").__module__ == "mmyolo_vis_hooks.checkpoint"


def test_downloads_load_safely(tmp_path, monkeypatch):
    torch.save({"state_dict": {"w": torch.ones(2)}, "o": Opinion()}, tmp_path / "a.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    url = (tmp_path / "a.pth").as_uri().replace("file://", "http://host")
    fetched = []

    def download(url, path, progress=True):
        fetched.append(url)
        with open(path, "wb") as file:
            file.write((tmp_path / "a.pth").read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        loaded = CheckpointLoader.load_checkpoint(url, map_location="cpu")
        assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))
        assert isinstance(loaded["o"], InertObject)
    assert fetched == [url]

    monkeypatch.setattr(
        mmengine_checkpoint, "get_torchvision_models", lambda: {"toy": url}
    )
    loaded = CheckpointLoader.load_checkpoint("torchvision://toy")
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))
