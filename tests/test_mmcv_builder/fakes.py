"""A registry, a torch and a compiler that cost no time.

The sources here only look like mmcv's: its setup.py 'compiles' two files by
calling CXX, as torch's extension builder would, and reports them as ninja does.
``FAKE_MMCV`` in the environment tells it to be slow, to fail or to be wrong.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

VERSION = "2.0.2"  # not the pinned one

SETUP = """
import os, subprocess, sys, time
from setuptools import setup
flags = ['-std=c++14']
mode = os.environ.get('FAKE_MMCV', '')
if 'bdist_wheel' in sys.argv:
    assert os.environ['MMCV_WITH_OPS'] == '1'
    assert int(os.environ['MAX_JOBS']) >= 1
    for number in (1, 2):
        print('[%d/2] compiling with %s' % (number, ' '.join(flags)), flush=True)
        if mode == 'slow':
            sleeper = subprocess.Popen([sys.executable, '-c', 'input()'],
                                       stdin=subprocess.PIPE)
            with open(os.environ['FAKE_PID'] + '.new', 'w') as file:
                file.write(str(sleeper.pid))
            os.rename(os.environ['FAKE_PID'] + '.new', os.environ['FAKE_PID'])
            time.sleep(60)
        if mode == 'fail':
            sys.exit('op.cpp:3:1: error: no member named upsample')
        name = 'mmcv/ops/csrc/op%d' % number
        subprocess.check_call([os.environ.get('CXX', 'c++'), *flags, '-c',
                               name + '.cpp', '-o', name + '.o'])
if mode == 'wrong':
    with open('mmcv/ops/__init__.py', 'a') as file:
        file.write('nms = lambda *_: (None, Tensor([0]))\\n')
setup(name='mmcv', version='VERSION', packages=['mmcv', 'mmcv.ops'])
"""

INCLUDE = '#include "common/pytorch_cpp_helper.hpp"\n'

OPS = """
from torch import Tensor
nms = lambda *_: (None, Tensor([1, 2]))
roi_align = lambda *_: Tensor([[[[5., 6], [9, 10]]]])
"""

TORCH = """
__version__ = '2.9.0+fake'
class Tensor:
    def __init__(self, data): self.data = data
    def to(self, device): return self
    def cpu(self): return self
    def reshape(self, *shape): return self
    def tolist(self): return self.data
class version:
    cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
tensor = arange = Tensor
allclose = lambda a, b, atol: a.data == b.data
compiled_with_cxx11_abi = lambda: True
"""


def write_registry(folder: Path) -> Path:
    """A folder for pip's find-links with the source of a tiny mmcv."""
    files = {
        "setup.py": SETUP.replace("VERSION", VERSION),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: mmcv\nVersion: {VERSION}\n",
        "mmcv/__init__.py": f"__version__ = '{VERSION}'\n",
        "mmcv/ops/__init__.py": OPS,
        "mmcv/ops/csrc/common/pytorch_cpp_helper.hpp": "#include <vector>\n",
        "mmcv/ops/csrc/op1.cpp": INCLUDE + "std::vector<int> one() { return {1}; }\n",
        "mmcv/ops/csrc/op2.cpp": INCLUDE + "std::vector<int> two() { return {2}; }\n",
    }
    folder.mkdir()
    with tarfile.open(folder / f"mmcv-{VERSION}.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"mmcv-{VERSION}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def write_site(folder: Path) -> Path:
    """Modules that shadow torch and everything that mmcv imports."""
    (folder / "torch" / "utils").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(TORCH)
    (folder / "torch" / "utils" / "cpp_extension.py").write_text("'-std=c++17'\n")
    for name in ("addict", "cv2", "mmengine", "numpy", "PIL", "yaml", "yapf"):
        (folder / f"{name}.py").touch()
    return folder


def environment(site: Path, registry: Path) -> dict[str, str]:
    """Variables under which pip sees that registry only, and no network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "MMVIS_", "CXX", "FORCE_CUDA"))
    }
    root = Path(__file__).resolve().parents[2]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(site), str(root)]),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(registry),
    }


def write_program(path: Path, python: str) -> Path:
    """An executable Python script; `argv` holds its arguments."""
    header = f"#!{sys.executable}\nimport os, sys\nargv = sys.argv[1:]\n"
    path.write_text(header + python)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel that pip installs, made without building anything."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\n"
        f"Version: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={_digest(text)},{len(text.encode())}\n"
        for path, text in files.items()
    )
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return wheel


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
