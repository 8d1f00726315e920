"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .build import build_wheel, check_wheel
from .cache import CacheEntry, cache_key, cache_root, replace_file
from .environment import Torch, choose_device, proof_device, prove
from .install import install_requirements, install_wheel
from .messages import BuildError, exit_code, say
from .versions import MMCV_VERSION, mismatch


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build mmcv with compiled ops for the torch of this environment "
        "and install it. Does nothing if mmcv's ops already run.",
        epilog="CUDA ops are built if torch sees a GPU or FORCE_CUDA=1 is set (as "
        "mmcv's own setup.py decides) and nvcc is found; TORCH_CUDA_ARCH_LIST names "
        "other GPUs than the visible ones. CXX names the compiler.",
    )
    parser.add_argument(
        "--version",
        metavar="X.Y.Z",
        help=f"version of mmcv (default: {MMCV_VERSION})",
    )
    parser.add_argument(
        "--jobs", type=int, help="compilers at a time (default: all cores)"
    )
    parser.add_argument("--no-pch", action="store_true", help="no precompiled header")
    parser.add_argument(
        "--force",
        action="store_true",
        help="build anew even if mmcv works or a wheel is cached",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help="folder for wheels, source and logs (default: MMVIS_CACHE_DIR or "
        f"{cache_root()})",
    )
    parser.add_argument(
        "--wheel-only",
        action="store_true",
        help="make the wheel, install nothing",
    )
    parser.add_argument(
        "--dest", type=Path, metavar="DIR", help="copy the wheel there as well"
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--cuda", dest="device", action="store_const", const="cuda", help="CUDA ops"
    )
    device.add_argument(
        "--cpu", dest="device", action="store_const", const="cpu", help="CPU ops only"
    )
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    return args


def mmcv_works(args: argparse.Namespace, torch: Torch, device: str) -> bool:
    """Tell, and say, whether the installed mmcv needs nothing."""
    proof = prove(None, proof_device(torch, device))
    if "error" in proof:
        say(f"mmcv's ops do not run here yet: {proof['error']}")
        return False
    version = proof["version"]
    if args.version not in (None, version):
        say(f"mmcv {version} works, but {args.version} is asked for.")
        return False
    if args.version is None and mismatch(version):
        say(f"mmcv {version} works, but {mismatch(version)}.")
        return False
    folder = Path(proof["file"]).parent
    say(f"mmcv {version} works with torch {torch.version}: nothing to do ({folder})")
    return True


def usable_wheel(entry: CacheEntry, torch: Torch, device: str) -> Path | None:
    """The cached wheel, if there is one and its ops run."""
    wheel = entry.wheel()
    if wheel is None:
        return None
    try:
        with entry.scratch() as scratch:
            check_wheel(wheel, scratch, proof_device(torch, device))
    except BuildError as error:
        entry.discard(f"does not work ({error})")
        return None
    say(f"Found a wheel in the cache: {wheel}")
    return wheel


def run(args: argparse.Namespace) -> None:
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        # mmcv's setup.py reads a variable that exec() no longer sets in 3.13.
        raise BuildError(
            f"Python {sys.version.split()[0]} is not supported.",
            "Use Python 3.9 to 3.12.",
        )
    torch = Torch.probe()
    device = choose_device(torch, args.device)
    if not (args.force or args.wheel_only) and mmcv_works(args, torch, device):
        return
    version = args.version or MMCV_VERSION
    root = (args.cache_dir or cache_root()).expanduser().absolute()
    entry = CacheEntry(root, cache_key(version, torch, device))
    install_log = entry.folder / "install.log"
    with entry.lock() as waited:
        if waited and not args.wheel_only and mmcv_works(args, torch, device):
            return
        install_requirements(torch, install_log, allowed=not args.wheel_only)
        wheel = None if args.force else usable_wheel(entry, torch, device)
        if wheel is None:
            wheel = build_wheel(
                entry,
                root,
                version,
                torch,
                device,
                jobs=args.jobs,
                use_pch=not args.no_pch,
            )
        if args.dest is not None:
            args.dest.mkdir(parents=True, exist_ok=True)
            replace_file(wheel, args.dest / wheel.name)
            say(f"Copied to {args.dest / wheel.name}")
        if args.wheel_only:
            return
        install_wheel(wheel, install_log)
    proof = prove(None, proof_device(torch, device))
    if "error" in proof or proof["version"] != version:
        raise BuildError(
            f"The wheel works on its own, but not as it is installed: {proof}.",
            "Another mmcv comes first on Python's path: remove it.",
            install_log,
        )
    say(f"mmcv {version} is installed; NMS and RoIAlign give the right numbers.")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))
