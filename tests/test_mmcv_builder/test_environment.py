"""What is found here: torch, ops that work, a GPU with a compiler for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mmcv
import pytest
import torch as real_torch

from mmcv_builder import environment
from mmcv_builder.children import run_json
from mmcv_builder.environment import Torch, choose_device, prove
from mmcv_builder.messages import BuildError

from .fakes import write_site


def make_torch(*, cuda: str | None = None, gpu: bool = False) -> Torch:
    return Torch("2.9.0", cuda, None, gpu, (), True, 17)


def test_probe_reads_this_torch() -> None:
    found = Torch.probe()
    assert found.version == real_torch.__version__
    assert found.cuda == real_torch.version.cuda
    assert found.cxx_standard in (14, 17, 20, 23)
    assert found.cxx11_abi == real_torch.compiled_with_cxx11_abi()


def test_missing_and_old_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = write_site(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert Torch.probe().version == "2.9.0+fake"
    package = site / "torch" / "__init__.py"
    package.write_text(package.read_text().replace("2.9.0", "1.13.1"))
    with pytest.raises(BuildError, match=r"torch 1\.13\.1\+fake is too old: 2\.0"):
        Torch.probe()
    package.write_text("raise ImportError('libtorch.so: cannot open')")
    with pytest.raises(BuildError, match=r"cannot open.*pip install torch torchvision"):
        Torch.probe()


def test_the_installed_ops_are_proved() -> None:
    proof = prove(None, "cpu")
    assert proof == {"version": mmcv.__version__, "file": mmcv.__file__}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "right = ops.nms\n"
            "def nms(*a):\n    d, k = right(*a)\n    return d, k.flip(0)\n",
            r"NMS kept boxes \[2, 1\] instead of \[1, 2\]",
        ),
        (
            "right = ops.roi_align\ndef roi_align(*a):\n    return right(*a) + 0.01\n",
            r"RoIAlign gave \[\[\[\[5\.0\d+, 6\.0",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
    ],
)
def test_wrong_ops_and_crashes_are_told(change: str, says: str, tmp_path: Path) -> None:
    """The real ops, spoilt by a module that shadows ``mmcv.ops``."""
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.0.1'\n")
    (package / "ops.py").write_text(
        "import importlib, sys\n"
        "shadow = {n: sys.modules.pop(n) for n in ('mmcv', 'mmcv.ops')}\n"
        "here = sys.path.pop(0)\n"
        "ops = importlib.import_module('mmcv.ops')\n"
        "nms, roi_align = ops.nms, ops.roi_align\n"
        "sys.modules.update(shadow)\n" + change
    )
    assert re.search(says, prove(tmp_path, "cpu")["error"])


def test_run_json_answers_also_when_the_child_does_not(tmp_path: Path) -> None:
    assert run_json("print('noise')\nprint('{\"a\": 1}')") == {"a": 1}
    assert "unexpected output 'noise'" in run_json("print('noise')")["error"]
    assert run_json("raise SystemExit('words')") == {"error": "words"}
    assert run_json("pass")["error"] == "exit 0"
    missing = run_json("pass", python=tmp_path / "python")["error"]
    assert "No such file" in missing


def test_run_json_does_not_see_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "only_here" in run_json("import only_here")["error"]


@pytest.mark.parametrize(
    ("torch", "wanted", "nvcc", "device"),
    [
        (make_torch(), None, True, "cpu"),
        (make_torch(cuda="12.8"), None, True, "cpu"),  # a CUDA build, no GPU
        (make_torch(cuda="12.8", gpu=True), None, True, "cuda"),
        (make_torch(cuda="12.8", gpu=True), "cpu", True, "cpu"),
        (make_torch(cuda="12.8"), "cuda", True, "cuda"),
        (make_torch(cuda="12.8", gpu=True), None, False, "cpu"),  # with a warning
    ],
)
def test_device(
    torch: Torch,
    wanted: str | None,
    nvcc: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    found = Path(sys.executable) if nvcc else None
    monkeypatch.setattr(environment, "find_nvcc", lambda: found)
    assert choose_device(torch, wanted) == device
    warned = torch.gpu and not nvcc
    assert ("no nvcc (CUDA toolkit 12.8)" in capsys.readouterr().out) == warned


def test_cuda_on_demand_is_never_dropped_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "find_nvcc", lambda: None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(BuildError, match=r"CPU build.*drop --cuda"):
        choose_device(make_torch(), None)
    with pytest.raises(BuildError, match=r"no nvcc.*toolkit 12\.8.*--cpu"):
        choose_device(make_torch(cuda="12.8"), None)
    monkeypatch.delenv("FORCE_CUDA")
    with pytest.raises(BuildError, match="no nvcc"):
        choose_device(make_torch(cuda="12.8"), "cuda")
