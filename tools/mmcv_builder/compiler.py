"""The C++ compiler: finding it, checking it, and the stand-in that torch calls."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from .messages import BuildError

PCH_HEADER = "mmcv/ops/csrc/common/pytorch_cpp_helper.hpp"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler: how it is called, and 'gcc', 'clang' or 'other'."""

    command: tuple[str, ...]
    family: str

    @classmethod
    def find(cls) -> Compiler:
        wanted = os.environ.get("CXX")
        if os.name == "nt" and not wanted:
            return cls(("cl",), "other")  # setuptools finds Visual C++ by itself
        names = [wanted] if wanted else ["c++", "g++", "clang++"]
        for name in names:
            command = shlex.split(name)
            if command and shutil.which(command[0]):
                return cls(tuple(command), cls._family(command))
        raise BuildError(
            f"There is no C++ compiler: looked for {', '.join(names)}.",
            "Install one (Debian and Ubuntu: apt install g++; Fedora: dnf install "
            "gcc-c++; macOS: xcode-select --install) or name it in CXX.",
        )

    @staticmethod
    def _family(command: Sequence[str]) -> str:
        # Intel's, NVIDIA's and others' compilers also define __GNUC__ or __clang__.
        try:
            macros = subprocess.run(
                [*command, "-dM", "-E", "-x", "c++", os.devnull],
                capture_output=True,
                text=True,
                errors="replace",
            ).stdout
        except OSError:
            return "other"
        if re.search(r"__(INTEL|NVCOMPILER|PGI|CRAY)", macros):
            return "other"
        if "__clang__" in macros:
            return "clang"
        return "gcc" if "__GNUC__" in macros else "other"

    def check(self, cxx_standard: int, folder: Path) -> None:
        """Compile three tiny files to tell what is missing before it costs minutes."""
        if self.command == ("cl",):
            return
        name = " ".join(self.command)
        modern = (
            "#include <concepts>\n" if cxx_standard >= 20 else "#include <optional>\n"
        )
        include = sysconfig.get_path("include")
        standard = f"-std=c++{cxx_standard}"
        probes: list[tuple[str, list[str], str, str]] = [
            (
                "#include <vector>\n",
                [],
                f"The C++ compiler {name} cannot compile a trivial program",
                "Repair it or name another one in CXX.",
            ),
            (
                modern,
                [standard],
                f"The C++ compiler {name} is too old for C++{cxx_standard}, which this "
                "torch needs",
                "Install a newer one (gcc >= 10 or clang >= 13 for C++20, gcc >= 8 or "
                "clang >= 7 for C++17) and name it in CXX, or use an older torch "
                "(< 2.1 builds with older compilers).",
            ),
            (
                "#include <Python.h>\n",
                [standard, f"-I{include}"],
                f"Python's C headers are not in {include}",
                "Install them (Debian and Ubuntu: apt install "
                f"python{sys.version_info[0]}.{sys.version_info[1]}-dev; Fedora: dnf "
                "install python3-devel).",
            ),
        ]
        source, target = folder / "probe.cpp", folder / "probe.o"
        for text, flags, problem, remedy in probes:
            source.write_text(f"{text}int main() {{ return 0; }}\n")
            child = subprocess.run(
                [*self.command, *flags, "-c", str(source), "-o", str(target)],
                capture_output=True,
                text=True,
                errors="replace",
            )
            if child.returncode:
                said = next(
                    (line for line in child.stderr.splitlines() if "error" in line),
                    f"exit {child.returncode}",
                )
                raise BuildError(f"{problem} ({said.strip()}).", remedy)


def wrap_compiler(compiler: Compiler, source: Path, folder: Path) -> dict[str, str]:
    """Make a program that torch can call as CXX; see cxx.py."""
    folder.mkdir()
    # torch accepts a compiler by its name.
    shim = folder / ("clang++" if compiler.family == "clang" else "g++")
    program = Path(__file__).with_name("cxx.py").resolve()
    command = shlex.join([sys.executable, "-I", "-S", str(program)])
    shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    shim.chmod(0o755)
    header = folder / "mmcv_pch.hpp"
    header.write_text(f'#include "{source / PCH_HEADER}"\n')
    real = [shutil.which(compiler.command[0]) or "", *compiler.command[1:]]
    return {
        "CXX": str(shim),
        "MMVIS_CXX": shlex.join(real),
        "MMVIS_CXX_HEADER": str(header),
        "MMVIS_CXX_SUFFIX": ".pch" if compiler.family == "clang" else ".gch",
    }
