"""
Compiles the C sources of `runtimes` with the ziglang compiler and caches the result by content.

One compiler for every target: the host, Linux boards (glibc 2.27 and later), and freestanding object files for phones,
which the app's own tool chain links. The cache key is everything that goes in: sources, flags, compiler version.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .errors import BuildError


class Target(NamedTuple):
    triple: str
    arch: str
    shared: bool  # a shared library; else object files, because zig has no bionic and no iOS headers


TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.17", "x86_64", True),
    "linux-aarch64": Target("aarch64-linux-gnu.2.27", "aarch64", True),
    "macos-aarch64": Target("aarch64-macos", "aarch64", True),
    "android-aarch64": Target("aarch64-linux-android", "aarch64", False),
    "ios-aarch64": Target("aarch64-ios", "aarch64", False),
}
FLAGS = "-std=c11 -O3 -fPIC -Wall -Wextra -Werror -fvisibility=hidden -fno-sanitize=all".split()
CORE = ("dsa", "dispatch", "cpu")


def host() -> str:
    machine = platform.machine()
    system = "macos" if sys.platform == "darwin" else sys.platform
    return f"{system}-{ {'arm64': 'aarch64', 'AMD64': 'x86_64'}.get(machine, machine) }"


def sources() -> Path:
    """The folder `runtimes`: a sub-package once installed, a sibling of this package in a checkout."""
    found = find_spec("edgeformer.runtimes")
    return Path(found.origin).parent if found and found.origin else Path(__file__).parent.parent / "runtimes"


def cache() -> Path:
    base = os.environ.get("EDGEFORMER_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgeformer" / "native"


def kernel_sets(arch: str) -> dict[str, list[str]]:
    """Kernel set -> compiler flags of its file, best first, from the one list."""
    sets, block = {}, arch
    for line in (sources() / "dsa" / "kernels.inc").read_text().splitlines():
        if line.startswith(("#if", "#elif", "#endif")):
            block = (re.findall(r"__(\w+)__", line) or [arch])[0]
        elif (entry := re.match(r"DSA_KERNELS\((\w+),[^,]*,([^)]*)\)", line)) and block == arch:
            sets[entry[1]] = entry[2].split()
    return sets


def units(goal: Target) -> list[tuple[Path, list[str]]]:
    """Every source file of the operator for a target, with the compiler flags of its own."""
    folder = sources() / "dsa"
    kernels = [(folder / f"kernel_{name}.c", flags) for name, flags in kernel_sets(goal.arch).items()]
    return [(folder / f"{name}.c", []) for name in CORE] + kernels


def library(target: str | None = None) -> Path:
    """The operator for a target (default: this machine): a shared library, or the folder of its object files."""
    name, goal = _target(target)
    done = cache() / f"{name}-{_digest(goal)}"
    if not done.exists():
        with whole_or_nothing(done) as work:
            objects = _compile(goal, work, [] if goal.shared else ["-ffreestanding"])
            if goal.shared:
                zig("-target", goal.triple, "-shared", "-s", "-o", str(work / "libdsa.so"), *objects)
    return done / "libdsa.so" if goal.shared else done


def program(source: Path, target: str | None = None) -> Path:
    """A C program with the operator inside. Linked statically (musl), so that it runs under qemu without a root."""
    name, goal = _target(target)
    goal = goal._replace(triple=f"{goal.arch}-linux-musl")
    done = cache() / f"{name}-{source.stem}-{_digest(goal, source)}"
    if not done.exists():
        with whole_or_nothing(done) as work:
            output = ["-static", "-o", str(work / source.stem)]
            zig(
                "-target",
                goal.triple,
                *FLAGS,
                f"-I{sources() / 'dsa'}",
                str(source),
                *_compile(goal, work, []),
                *output,
                "-lm",
            )
    return done / source.stem


def zig(*args: str) -> None:
    """Runs `zig cc`; its own caches live in ours."""
    own = str(cache() / "zig")
    env = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=own, ZIG_LOCAL_CACHE_DIR=own)
    run = subprocess.run([sys.executable, "-m", "ziglang", "cc", *args], capture_output=True, text=True, env=env)
    if run.returncode:
        inputs = [Path(a).name for a in args if a.endswith((".c", ".o"))]
        raise BuildError(f"zig cc failed on {', '.join(inputs[:3])} for {args[1]}:\n{run.stderr.strip()[-2000:]}")


def _target(name: str | None) -> tuple[str, Target]:
    name = name or host()
    if name not in TARGETS:
        raise BuildError(f"cannot compile for {name!r}: native targets are {', '.join(TARGETS)}")
    return name, TARGETS[name]


def _digest(goal: Target, *more: Path) -> str:
    digest = hashlib.sha256(repr((goal, FLAGS, [(p.name, f) for p, f in units(goal)], _zig_version())).encode())
    for path in (*sorted((sources() / "dsa").iterdir()), *more):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(goal: Target, work: Path, more: list[str]) -> list[str]:
    """Every source of the operator, as object files in `work`."""
    for path, flags in units(goal):
        zig("-target", goal.triple, *FLAGS, *more, *flags, "-c", str(path), "-o", str(work / f"{path.stem}.o"))
    return sorted(str(path) for path in work.glob("*.o"))


def _zig_version() -> str:
    try:
        return version("ziglang")
    except PackageNotFoundError:
        raise BuildError("compiling the native operator needs ziglang: pip install ziglang") from None


@contextmanager
def whole_or_nothing(done: Path) -> Iterator[Path]:
    """A folder that appears under its name only when finished. Of two writers the second one's copy is thrown away."""
    done.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{done.name}.", dir=done.parent))
    try:
        yield work
        work.rename(done)
    except OSError:
        if not done.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
