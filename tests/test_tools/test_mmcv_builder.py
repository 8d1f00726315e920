"""The builder from end to end, on a tiny mmcv, and its words for what goes wrong."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest
import torch

import mmcv_builder as builder
from mmcv_builder import BuildError

TOOLS = Path(__file__).resolve().parents[2] / "tools"

# mmcv's setup.py in small: its lines that are patched, and two files to compile.
# FAKE in the environment tells it to be slow, to fail or to be wrong.
SETUP = """
import os, subprocess, sys, time
from setuptools import setup
def get_version():
    version_file = 'mmcv/version.py'
    with open(version_file, encoding='utf-8') as f:
        exec(compile(f.read(), version_file, 'exec'))
    return locals()['__version__']
extra_compile_args = dict(cxx=['-std=c++14'], nvcc=[])
extra_compile_args['nvcc'] += ['-std=c++14']
flags = [*extra_compile_args['cxx'], '-H', '-I' + os.path.abspath('mmcv/common')]
mode = os.environ.get('FAKE', '')
if 'bdist_wheel' in sys.argv:
    assert os.environ['MMCV_WITH_OPS'] == '1' and os.environ['FORCE_CUDA'] == '0'
    if mode == 'slow':
        os.symlink(str(subprocess.Popen(['sleep', '60']).pid), os.environ['FAKE_PID'])
        time.sleep(60)
    if mode == 'fail':
        sys.exit('op.cpp:3:1: error: no member named upsample')
    for n in (1, 2):
        print('[%d/2] compiling' % n, flush=True)
        source = ['-c', 'mmcv/op%d.cpp' % n, '-o', 'op%d.o' % n]
        subprocess.check_call([os.environ.get('CXX', 'c++'), *flags, *source])
if mode == 'wrong':
    with open('mmcv/ops.py', 'a') as file:
        file.write('nms = lambda *_: (None, Tensor([0]))\\n')
setup(name='mmcv', version=get_version(), packages=['mmcv'])
"""
OP = '#include "pytorch_cpp_helper.hpp"\nstd::vector<int> op() { return {1}; }\n'
SOURCE = {
    "setup.py": SETUP,
    "PKG-INFO": "Metadata-Version: 2.1\nName: mmcv\nVersion: 2.0.1\n",
    "mmcv/__init__.py": "from mmcv.version import __version__\n",
    "mmcv/version.py": "__version__ = '2.0.1'\n",
    "mmcv/ops.py": "from torch import Tensor\nnms = lambda *_: (None, Tensor([1, 2]))\n"
    "roi_align = lambda *_: Tensor([[[[5., 6], [9, 10]]]])\n",
    "mmcv/common/pytorch_cpp_helper.hpp": "#include <vector>\n",
    "mmcv/op1.cpp": OP,
    "mmcv/op2.cpp": OP,
}
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
"""
MAIN = """
import mmcv_builder, shutil, sys
mmcv_builder.SDIST_SHA256 = sys.argv.pop(1)
{extra}
sys.exit(mmcv_builder.main())
"""


class Program:
    """Runs the builder in an environment in which torch, mmcv and pip's index are ours.

    The environment borrows this one's packages, and nothing it does touches them.
    """

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
        subprocess.run(command, check=True)
        self.python = folder / "venv" / "bin" / "python"
        self.site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
        (self.site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.pid, self.cache = folder / "pid", folder / "cache"
        self.registry, fakes = folder / "registry", folder / "fakes"
        self.registry.mkdir()
        self.sum = self.offer("mmcv", "2.0.1")
        (fakes / "torch" / "utils").mkdir(parents=True)
        (fakes / "torch" / "__init__.py").write_text(TORCH)
        (fakes / "torch" / "utils" / "__init__.py").touch()
        (fakes / "torch" / "utils" / "cpp_extension.py").write_text("'-std=c++17'\n")
        for name in ("mmengine", "cv2"):
            (fakes / f"{name}.py").touch()
        own = ("PIP_", "MMVIS_", "CXX", "FORCE_CUDA", "MAX_JOBS", "PYTHONPATH")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        self.env |= {
            "PYTHONPATH": f"{fakes}{os.pathsep}{TOOLS}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.registry),
            "MMVIS_CACHE_DIR": str(self.cache),
            "FAKE_PID": str(self.pid),
        }

    def offer(self, name: str, version: str) -> str:
        """Put a source into the registry; gives its sum."""
        folder = f"{name.replace('-', '_')}-{version}"
        path = self.registry / f"{folder}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for file, text in SOURCE.items():
                text = text.replace("2.0.1", version)
                text = text.replace("name='mmcv'", f"name='{name}'")
                data = text.replace("Name: mmcv", f"Name: {name}").encode()
                member = tarfile.TarInfo(f"{folder}/{file}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def start(self, extra: str = "", **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.python), "-c", MAIN.format(extra=extra), self.sum],
            env={**self.env, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, extra: str = "", **variables: str) -> tuple[int, str]:
        process = self.start(extra, **variables)
        output, _ = process.communicate(timeout=120)
        assert not list(self.cache.glob("*/tmp-*"))  # after every end
        return process.returncode, output

    def forget(self) -> None:
        for path in [*self.site.glob("mmcv*"), *self.site.glob("onedl*")]:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def only_program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("builder"))


@pytest.fixture
def program(only_program: Program) -> Program:
    """As if it had never run."""
    only_program.forget()
    shutil.rmtree(only_program.cache, ignore_errors=True)
    only_program.pid.unlink(missing_ok=True)
    return only_program


def test_two_build_once_then_cache_then_a_broken_cache(program: Program) -> None:
    processes = [program.start(), program.start()]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("Another process builds the same" in output for output in outputs) == 1
    [output] = [output for output in outputs if "Compiling" in output]
    assert "[2/2]" in output
    assert "NMS and RoIAlign give the right numbers" in output
    assert (program.site / "mmcv-2.0.1.dist-info").is_dir()
    # -H marks with '!' what it takes precompiled: the header was made once, used twice.
    [log] = program.cache.glob("*/build.log")
    assert len(re.findall(r"^ *! .*mmcv_pch\.hpp\.[gp]ch", log.read_text(), re.M)) == 2

    program.forget()
    code, output = program.run()
    assert code == 0
    assert "Found a wheel in the cache" in output
    assert "Compiling" not in output

    program.forget()
    [wheel] = program.cache.glob("*/*.whl")
    wheel.write_bytes(wheel.read_bytes()[:100])
    code, output = program.run()
    assert code == 0, output
    assert "does not work and is discarded" in output
    assert "Compiling" in output


def test_the_fork_is_built_where_it_is_installed(program: Program) -> None:
    """In its own version, and nothing of the same folder's other name is left."""
    program.offer("onedl-mmcv", "2.3.6")
    for name, version in (("mmcv", "2.0.1"), ("onedl-mmcv", "2.3.6")):
        info = program.site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        files = [f"{info.name}/{file},," for file in ("METADATA", "RECORD")]
        (info / "RECORD").write_text("\n".join(files))
    code, output = program.run()
    assert code == 0, output
    assert "Compiling onedl-mmcv 2.3.6 for torch" in output
    assert "onedl-mmcv 2.3.6 is installed; NMS and" in output
    found = sorted(path.name for path in program.site.glob("*mmcv*"))
    assert found == ["mmcv", "onedl_mmcv-2.3.6.dist-info"]
    code, output = program.run()
    assert (code, output) == (0, "mmcv 2.3.6 works: nothing to do\n")


def test_what_fails_is_neither_cached_nor_installed(program: Program) -> None:
    code, output = program.run(FAKE="wrong")
    assert code == 1
    assert "does not work:\n  NMS kept boxes [0] instead of [1, 2]" in output
    code, output = program.run(FAKE="fail")
    assert code == 1
    assert "op.cpp:3:1: error: no member named upsample" in output
    assert "Log: " in output
    assert "Traceback" not in output
    assert not list(program.cache.glob("*/*.whl"))
    assert not list(program.site.glob("mmcv*"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(
    signum: signal.Signals, program: Program
) -> None:
    process = program.start(FAKE="slow")
    deadline = time.monotonic() + 60
    while not program.pid.is_symlink():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: run the same command again" in output
    assert "Traceback" not in output
    status = Path("/proc", os.readlink(program.pid), "stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"
    assert not list(program.cache.glob("*/tmp-*"))


NO_NETWORK = dict(PIP_NO_INDEX="", PIP_FIND_LINKS="", PIP_RETRIES="1")
NO_CACHE = dict(MMVIS_CACHE_DIR="/dev/null/cache")
NO_NETWORK["PIP_INDEX_URL"] = "http://127.0.0.1:9/simple"


@pytest.mark.parametrize(
    ("says", "extra", "variables"),
    [
        (r"no C\+\+ compiler: .*apt install g\+\+", "", {"PATH": "/none"}),
        (r"cannot compile a small file of c\+\+17", "", {"CXX": "sh -c false"}),
        (
            r"Python\.h: No such file[^$]*apt install python3\.\d+-dev",
            "mmcv_builder.sysconfig.get_path = lambda name: '/none'",
            {},
        ),
        (r"Not a directory: .*; MMVIS_CACHE_DIR .* other folders", "", NO_CACHE),
        (r"The package registry cannot be reached", "", NO_NETWORK),
        (r"DO NOT MATCH THE HASHES", "mmcv_builder.SDIST_SHA256 = '0' * 64", {}),
        (r"needs torch .*install torch torchvision", "sys.modules['torch'] = None", {}),
    ],
)
def test_what_is_missing_is_named(
    says: str, extra: str, variables: dict[str, str], program: Program
) -> None:
    code, output = program.run(extra, **variables)
    assert code == 1
    assert re.search(says, output), output
    assert "Traceback" not in output


def test_a_remedy_only_where_it_is_certain() -> None:
    def said(output: str) -> list[str]:
        return str(BuildError.quote("It failed", output, Path("log"))).splitlines()

    killed = "g++: fatal error: Killed signal terminated program cc1plus"
    assert said(killed)[:2] == ["It failed:", f"  {killed}"]
    assert "MAX_JOBS=1" in said(killed)[2]
    assert "disk is full" in said("error: x.gch: No space left on device")[2]
    cuda = "RuntimeError: The detected CUDA version (13.0) mismatches the version that"
    assert "FORCE_CUDA=0" in said(cuda)[2]
    # A line that every build on such a machine prints says nothing of its end.
    other = "No CUDA runtime is found, using CUDA_HOME=/usr\nKeyError: '__version__'"
    assert said(other) == ["It failed:", "  KeyError: '__version__'", "Log: log"]
    # nvcc's own way, twice; and a line of pip's program that pip shows.
    nvcc = "ptxas fatal   : Ptx assembly aborted due to errors"
    shown = '"ERROR: Can not execute `setup.py` since setuptools is not available "'
    assert said("\n".join([nvcc, nvcc, shown]))[1:] == [f"  {nvcc}", "Log: log"]


def test_setup_is_mended_for_torch_and_python() -> None:
    """The lines as mmcv 2.0.1 has them."""
    nvcc = "extra_compile_args['nvcc'] += "
    for line, mended in (
        ("'cxx': ['-Wall', '-std=c++17']", "'cxx': ['-Wall', '-g0', '-w']"),
        (f"{nvcc}['-std=c++14']", f"{nvcc}['-w']"),
        ("    return locals()['__version__']\n", "    return '2.0.1'\n"),
    ):
        assert builder.patch_setup(line) == mended


def test_the_cache_tells_apart_what_a_wheel_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {builder.cache_entry("cpu"), builder.cache_entry("cuda")}
    for where, name, value in (
        (torch.version, "cuda", "99.9"),
        (torch, "__version__", "2.99.0+cu999"),
        (builder, "PYTHON", "python3.99"),
        (sysconfig, "get_platform", lambda: "linux-riscv"),
        (builder, "MMCV_VERSION", "2.0.2"),
    ):
        monkeypatch.setattr(where, name, value)
        keys.add(builder.cache_entry("cuda"))
    assert len(keys) == 7


def test_cuda_ops_where_a_gpu_and_its_compiler_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def device(*, gpu: bool, nvcc: bool, **variables: str) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvcc" if nvcc else None)
        monkeypatch.setattr(os, "environ", {"CUDA_HOME": "/none", **variables})
        return builder.choose_device()

    assert device(gpu=False, nvcc=True) == "cpu"
    assert device(gpu=True, nvcc=True) == "cuda"
    assert device(gpu=True, nvcc=True, FORCE_CUDA="0") == "cpu"
    assert device(gpu=False, nvcc=False, FORCE_CUDA="1") == "cuda"
    assert capsys.readouterr().out == ""
    assert device(gpu=True, nvcc=False) == "cpu"
    assert "warning: a GPU, but no nvcc" in capsys.readouterr().out


def test_the_real_mmcv_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert builder.main([]) == 0
    assert capsys.readouterr().out == "mmcv 2.0.1 works: nothing to do\n"
    crash = builder.ask("import os\nos.kill(os.getpid(), 11)")
    assert crash == {"error": "crashed with signal 11"}
