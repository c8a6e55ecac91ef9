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
from collections.abc import Iterator, Sequence
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


def library(target: str | None = None) -> Path:
    """The operator for a target (default: this machine): a shared library, or the folder of its object files."""
    name = target or host()
    if name not in TARGETS:
        raise BuildError(f"cannot compile for {name!r}: native targets are {', '.join(TARGETS)}")
    goal, folder = TARGETS[name], sources() / "dsa"
    units = [(folder / f"{unit}.c", []) for unit in CORE]
    units += [(folder / f"kernel_{unit}.c", flags) for unit, flags in kernel_sets(goal.arch).items()]
    digest = hashlib.sha256(repr((goal, FLAGS, [(p.name, f) for p, f in units], _zig_version())).encode())
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    done = cache() / f"{name}-{digest.hexdigest()[:24]}"
    if not done.exists():
        with _whole_or_nothing(done) as work:
            objects = [_compile(path, flags, goal, work) for path, flags in units]
            if goal.shared:
                zig("-target", goal.triple, "-shared", "-s", "-o", str(work / "libdsa.so"), *objects)
    return done / "libdsa.so" if goal.shared else done


def program(source: Path, target: str | None = None, flags: Sequence[str] = ()) -> Path:
    """A test program over the operator, linked with its library's object files' sources; cached like the library."""
    name = target or host()
    shared = library(name)
    digest = hashlib.sha256(source.read_bytes() + repr((shared.parent.name, list(flags))).encode()).hexdigest()[:24]
    done = cache() / f"{name}-{source.stem}-{digest}"
    if not done.exists():
        with _whole_or_nothing(done) as work:
            include, rpath = f"-I{sources() / 'dsa'}", f"-Wl,-rpath,{shared.parent}"
            binary = str(work / source.stem)
            zig("-target", TARGETS[name].triple, *FLAGS, *flags, include, "-o", binary, str(source), str(shared), rpath, "-lm")
    return done / source.stem


def zig(*args: str) -> None:
    """Runs `zig cc`; its own caches live in ours."""
    own = str(cache() / "zig")
    env = dict(os.environ, ZIG_GLOBAL_CACHE_DIR=own, ZIG_LOCAL_CACHE_DIR=own)
    run = subprocess.run([sys.executable, "-m", "ziglang", "cc", *args], capture_output=True, text=True, env=env)
    if run.returncode:
        inputs = [Path(a).name for a in args if a.endswith((".c", ".o"))]
        raise BuildError(f"zig cc failed on {', '.join(inputs[:3])} for {args[1]}:\n{run.stderr.strip()[-2000:]}")


def _compile(path: Path, flags: list[str], goal: Target, work: Path) -> str:
    output = str(work / f"{path.stem}.o")
    free = [] if goal.shared else ["-ffreestanding"]
    zig("-target", goal.triple, *FLAGS, *free, *flags, "-c", str(path), "-o", output)
    return output


def _zig_version() -> str:
    try:
        return version("ziglang")
    except PackageNotFoundError:
        raise BuildError("compiling the native operator needs ziglang: pip install ziglang") from None


@contextmanager
def _whole_or_nothing(done: Path) -> Iterator[Path]:
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
