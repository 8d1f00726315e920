"""The stand-in for the compiler, with real compilers and a small header."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmcv_builder.compiler import Compiler, wrap_compiler
from mmcv_builder.cxx import pch_flags
from mmcv_builder.messages import BuildError

from .fakes import write_program

CXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(CXX is None, reason="no g++")


def make_source(folder: Path) -> Path:
    """A tree like mmcv's: the common header, and files that rely on it."""
    common = folder / "mmcv" / "ops" / "csrc" / "common"
    common.mkdir(parents=True)
    helper = common / "pytorch_cpp_helper.hpp"
    helper.write_text("#ifndef H\n#define H\n#include <vector>\n#endif\n")
    for number in range(4):
        (folder / f"op{number}.cpp").write_text(
            '#include "pytorch_cpp_helper.hpp"\n'
            f"std::vector<int> op{number}() {{ return {{{number}}}; }}\n"
        )
    (folder / "main.cpp").write_text(
        "#include <vector>\nstd::vector<int> op3();\n"
        "int main() { return op3()[0] - 3; }\n"
    )
    return folder


class Shim:
    """The wrapped compiler, and the flags that torch would pass."""

    def __init__(self, tmp_path: Path, compiler: Compiler) -> None:
        self.source = make_source(tmp_path / "src")
        self.env = wrap_compiler(compiler, self.source, tmp_path / "cxx")
        self.header = Path(self.env["MMVIS_CXX_HEADER"])

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.env["CXX"], *arguments],
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def compile(self, number: int, *flags: str) -> subprocess.Popen[str]:
        common = self.source / "mmcv" / "ops" / "csrc" / "common"
        output = self.source / f"op{number}.o"
        return self.start(
            *("-MMD", "-MF", f"{output}.d", f"-I{common}", "-H", *flags),
            *("-c", str(self.source / f"op{number}.cpp"), "-o", str(output)),
        )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a successful end; return what it wrote to stderr."""
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stderr


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_header_is_precompiled_once_and_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    monkeypatch.setenv("CXX", name)
    compiler = Compiler.find()
    assert compiler.family == {"g++": "gcc", "clang++": "clang"}[name]
    shim = Shim(tmp_path, compiler)
    finish(shim.compile(0, "-std=c++17", "-O2"))
    compiled = list(shim.header.parent.glob("*.gch")) + list(
        shim.header.parent.glob("*.pch")
    )
    assert [path.suffix for path in compiled] == [shim.env["MMVIS_CXX_SUFFIX"]]
    before = compiled[0].stat().st_mtime_ns
    included = finish(shim.compile(1, "-std=c++17", "-O2"))
    # -H lists every header that is read as text.
    assert "bits/stl_vector.h" not in included
    assert compiled[0].stat().st_mtime_ns == before


@needs_gxx
def test_other_flags_compile_without_the_header(tmp_path: Path) -> None:
    shim = Shim(tmp_path, Compiler((str(CXX),), "gcc"))
    finish(shim.compile(0, "-std=c++17", "-O2"))
    included = finish(shim.compile(1, "-std=c++14", "-O2"))
    assert "bits/stl_vector.h" in included


@needs_gxx
def test_parallel_compilations_make_one_header(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    counting = write_program(
        tmp_path / "counting-g++",
        f"open({str(calls)!r}, 'a').write(' '.join(argv) + '\\n')\n"
        f"os.execv({CXX!r}, [{CXX!r}, *argv])\n",
    )
    shim = Shim(tmp_path, Compiler((str(counting),), "gcc"))
    for process in [shim.compile(number, "-std=c++17") for number in range(4)]:
        finish(process)
    lines = calls.read_text().splitlines()
    assert len([line for line in lines if "c++-header" in line]) == 1
    assert len([line for line in lines if f"-include {shim.header}" in line]) == 4


@needs_gxx
def test_a_header_that_fails_means_a_plain_build(tmp_path: Path) -> None:
    failing = write_program(
        tmp_path / "g++",
        "if 'c++-header' in argv: sys.exit('no space left')\n"
        f"os.execv({CXX!r}, [{CXX!r}, *argv])\n",
    )
    shim = Shim(tmp_path, Compiler((str(failing),), "gcc"))
    for number in (0, 1):
        finish(shim.compile(number, "-std=c++17"))
        assert (shim.source / f"op{number}.o").exists()
    assert json.loads(shim.header.with_suffix(".json").read_text())["ok"] is False
    assert not list(shim.header.parent.glob("*.gch"))


@needs_gxx
def test_linking_and_running(tmp_path: Path) -> None:
    shim = Shim(tmp_path, Compiler((str(CXX),), "gcc"))
    finish(shim.compile(3, "-std=c++17"))
    program = tmp_path / "program"
    objects = [str(shim.source / "main.cpp"), str(shim.source / "op3.o")]
    finish(shim.start(*objects, "-o", str(program)))
    assert subprocess.call([str(program)]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "kernel.cu", "-o", "kernel.o", "-std=c++17"],
        ["a.o", "b.o", "-shared", "-o", "_ext.so"],
        ["-ObjC++", "-c", "mps.mm", "-o", "mps.o"],
        ["-v"],
        ["-dumpfullversion", "-dumpversion"],
    ],
)
def test_what_is_not_one_cpp_file_goes_through_untouched(
    arguments: list[str], tmp_path: Path
) -> None:
    echo = write_program(tmp_path / "echo-g++", "print(argv)\n")
    shim = Shim(tmp_path, Compiler((str(echo), "-m64"), "gcc"))
    stdout, _ = shim.start(*arguments).communicate(timeout=60)
    assert stdout.strip() == str(["-m64", *arguments])


def test_flags_leave_out_what_differs_from_file_to_file() -> None:
    def call(name: str) -> list[str]:
        where = ["-MMD", "-MF", f"{name}.o.d", "-I/x", "-fPIC"]
        return [*where, "-c", f"{name}.cpp", "-o", f"{name}.o", "-std=c++20"]

    first, second = call("a"), call("b")
    assert pch_flags(first) == pch_flags(second) == ["-I/x", "-fPIC", "-std=c++20"]
    assert pch_flags(["-c", "a.cpp", "b.cpp"]) is None
    assert pch_flags(["-x", "c++", "-c", "a.cpp"]) is None


# -- finding and checking a compiler ---------------------------------------


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler.*apt install g\+\+"):
        Compiler.find()
    monkeypatch.setenv("CXX", "my-c++ -m64")
    with pytest.raises(BuildError, match=r"looked for my-c\+\+ -m64"):
        Compiler.find()


def test_other_compilers_are_not_taken_for_gcc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intel = write_program(
        tmp_path / "icpx",
        "print('#define __GNUC__ 4\\n#define __clang__ 1\\n"
        "#define __INTEL_LLVM_COMPILER 20250000')\n",
    )
    monkeypatch.setenv("CXX", str(intel))
    assert Compiler.find().family == "other"


@needs_gxx
def test_a_good_compiler_passes(tmp_path: Path) -> None:
    Compiler((str(CXX),), "gcc").check(17, tmp_path)


@needs_gxx
@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        ("True", "cannot compile a trivial program"),
        ("'-std=c++20' in argv", r"too old for C\+\+20.*unrecognized.*newer one"),
        (
            "any(a.startswith('-I') for a in argv)",
            rf"Python's C headers.*python3\.{sys.version_info[1]}-dev",
        ),
    ],
)
def test_what_is_missing_is_named(breaks: str, says: str, tmp_path: Path) -> None:
    broken = write_program(
        tmp_path / "g++",
        f"if {breaks}: sys.exit('error: unrecognized option')\n"
        f"os.execv({CXX!r}, [{CXX!r}, *argv])\n",
    )
    with pytest.raises(BuildError, match=says):
        Compiler((str(broken),), "gcc").check(20, tmp_path)
