"""What is here: torch, working ops, a GPU with its compiler."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .children import run_json
from .messages import BuildError, say

TORCH_PROBE = """
import json, os, re, torch
folder = os.path.dirname(torch.__file__)
with open(os.path.join(folder, 'utils', 'cpp_extension.py')) as file:
    standards = re.findall(r'std=c\\+\\+(\\d\\d)', file.read())
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
caps = sorted({torch.cuda.get_device_capability(i) for i in gpus})
print(json.dumps(dict(
    version=torch.__version__,
    cuda=torch.version.cuda,
    hip=getattr(torch.version, 'hip', None),
    gpu=torch.cuda.is_available(),
    archs=['sm%d%d' % cap for cap in caps],
    cxx11_abi=bool(torch.compiled_with_cxx11_abi()),
    cxx_standard=max(map(int, standards), default=17),
)))
"""

PROOF = """
import json, sys
where, device = sys.argv[1:]
if where:
    sys.path.insert(0, where)
import torch, mmcv
from mmcv.ops import nms, roi_align
boxes = torch.tensor([[0., 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
scores = torch.tensor([.8, .9, .7])
kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
if kept != [1, 2]:
    raise SystemExit('NMS kept boxes %s instead of [1, 2]' % kept)
ramp = torch.arange(16.).reshape(1, 1, 4, 4)
roi = torch.tensor([[0., 1, 1, 3, 3]])
pooled = roi_align(ramp.to(device), roi.to(device), (2, 2), 1.0, 2, 'avg', True)
want = torch.tensor([[[[5., 6], [9, 10]]]])
if not torch.allclose(pooled.cpu(), want, atol=1e-4):
    raise SystemExit('RoIAlign gave %s' % pooled.tolist())
print(json.dumps(dict(version=mmcv.__version__, file=mmcv.__file__)))
"""


@dataclasses.dataclass(frozen=True)
class Torch:
    """The torch that mmcv must fit."""

    version: str
    cuda: str | None
    hip: str | None
    gpu: bool
    archs: tuple[str, ...]
    cxx11_abi: bool
    cxx_standard: int

    @classmethod
    def probe(cls) -> Torch:
        found = run_json(TORCH_PROBE)
        if "error" in found:
            raise BuildError(
                f"torch does not import in {sys.executable}: {found['error']}.",
                "Install torch and torchvision in one command, so that they match: "
                f"{sys.executable} -m pip install torch torchvision",
            )
        found["archs"] = tuple(found["archs"])
        torch = cls(**found)
        if int(torch.version.split(".")[0]) < 2:
            raise BuildError(
                f"torch {torch.version} is too old: 2.0 or newer is needed.",
                f"{sys.executable} -m pip install --upgrade torch torchvision",
            )
        return torch


def prove(where: Path | None, device: str) -> dict[str, Any]:
    """Run NMS and RoIAlign in a child and check their numbers.

    Args:
        where (Path, optional): Folder with an unpacked mmcv. None takes the
            installed one.
        device (str): 'cpu' or 'cuda'.

    Returns:
        dict: mmcv's ``version`` and ``file``, or ``error`` with what is wrong.
    """
    return run_json(PROOF, str(where or ""), device)


def proof_device(torch: Torch, device: str) -> str:
    """Where ops built for a device can be run: CUDA ops without a GPU only load."""
    return "cuda" if device == "cuda" and torch.gpu else "cpu"


def find_nvcc() -> Path | None:
    """The CUDA compiler where torch's extension builder looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.exists()), None)


def choose_device(torch: Torch, wanted: str | None) -> str:
    """Decide like mmcv: CUDA ops if a GPU is visible or FORCE_CUDA=1.

    Returns:
        str: 'cuda' or 'cpu': the ops that are built.
    """
    if wanted == "cpu":
        return "cpu"
    forced = wanted == "cuda" or os.environ.get("FORCE_CUDA") == "1"
    if not (forced or torch.gpu):
        return "cpu"
    if torch.cuda is None and torch.hip is None:
        raise BuildError(
            f"CUDA ops were asked for, but torch {torch.version} is a CPU build.",
            "Install a CUDA build of torch, or drop --cuda and FORCE_CUDA.",
        )
    if torch.hip or find_nvcc():
        return "cuda"
    if forced:
        raise BuildError(
            "CUDA ops were asked for, but there is no nvcc on PATH, in CUDA_HOME or "
            "in /usr/local/cuda.",
            f"Install the CUDA toolkit {torch.cuda}, or build with --cpu.",
        )
    say(
        f"warning: a GPU is visible, but there is no nvcc (CUDA toolkit {torch.cuda}), "
        "so mmcv gets CPU ops only: what calls an mmcv op on the GPU, such as the NMS "
        "after a detector, will fail there. Hide the GPU with CUDA_VISIBLE_DEVICES='' "
        "when you run, or install the toolkit and call this program with --cuda."
    )
    return "cpu"
