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
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
FLAGS = ["-std=c11", "-O3", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fno-sanitize=all"]
CORE = ("dsa", "dispatch", "cpu")
# A binding uses no C++ library: the runtime that loads it may carry another one.
BINDING_FLAGS = [f for f in FLAGS if f != "-std=c11"] + ["-std=c++17", "-fno-exceptions", "-fno-rtti"]
RUNNER = "edgeformer_runner"
EXECUTORCH = "1.5.1"  # of the wheel that is fetched for other machines than this one
# A wheel is a C++ SDK too, the same for every Python. The digest pins what is linked and shipped.
WHEELS = {
    "linux-aarch64": ("manylinux_2_28_aarch64", "8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a"),
}
# The definitions must be those that the wheel's own libraries were built with.
EXECUTORCH_FLAGS = [
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DET_EVENT_TRACER_ENABLED",
    "-DET_USE_THREADPOOL",
    "-D_LIBCPP_HARDENING_MODE=_LIBCPP_HARDENING_MODE_NONE",  # its checks would call into a C++ library
    "-fno-threadsafe-statics",
    "-lc++",  # of which only the headers are used
    "-Wno-unused-command-line-argument",
]
EXECUTORCH_LIBRARIES = tuple(
    f"executorch{part}" for part in ("", "_threadpool", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack")
)


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


def binding(format: str, target: str | None = None, sdk: Path | None = None) -> Path:
    """
    The operator inside the runtime of one format, e.g. "onnx": a library that the device's runner registers.

    `sdk` is for ExecuTorch, whose headers it needs: the folder `executorch` of the target's wheel. Without it, the one
    that is installed here, or for another machine the one that is fetched.
    """
    name, goal = _target(target)
    source = sources() / "bindings" / f"{format}.cc"
    if not source.is_file():
        raise BuildError(f"no binding {format!r}; there are {', '.join(bindings())}")
    if not goal.shared:
        raise BuildError(f"{name} gets object files only (zig has no headers for it); its app links {format} itself")
    headers, libraries = [], ["-lpthread"]
    if format == "executorch":
        folder = sdk or executorch(name)
        headers, libraries = _include(folder), _link(folder, EXECUTORCH_LIBRARIES[:2])
    more = [*headers, *libraries]
    done = cache() / f"{name}-{format}-{_digest(goal, source, source.with_name('binding.h'), more=more)}"
    if not done.exists():
        with whole_or_nothing(done) as work:
            objects = [*_compile(goal, work, []), _unit(goal, source, work, headers)]
            shared = ["-shared", "-s", "-Wl,-Bsymbolic", "-o", str(work / binding_name(format))]
            zig("-target", goal.triple, *shared, *objects, *libraries)
            for path in objects:
                Path(path).unlink()
    return done / binding_name(format)


def operator(format: str, target: str | None = None) -> Path:
    """What a bundle carries for a machine: the binding, or for ExecuTorch the runner that has it inside."""
    return runner(target) if format == "executorch" else binding(format, target)


def runner(target: str | None = None, sdk: Path | None = None) -> Path:
    """
    The program that runs .pte files without Python and torch, operator inside; the libraries it needs stand next to it.
    `sdk` as for `binding`.
    """
    name, goal = _target(target)
    if not goal.shared:
        raise BuildError(f"{name}: the runner needs that system's own tool chain, see runtimes/README.md")
    folder, bindings_ = sdk or executorch(name), sources() / "bindings"
    units_ = (bindings_ / "executorch.cc", bindings_ / "executorch" / "runner.cc")
    libraries = [folder / "lib" / f"lib{n}.so" for n in EXECUTORCH_LIBRARIES]
    done = cache() / f"{name}-{RUNNER}-{_digest(goal, *units_, bindings_ / 'binding.h', *libraries)}"
    if not done.exists():
        headers = [*_include(folder), f'-DRUNTIME_VERSION="{_version(folder)}"']
        with whole_or_nothing(done) as work:
            objects = [*_compile(goal, work, []), *(_unit(goal, unit, work, headers) for unit in units_)]
            zig("-target", goal.triple, "-s", "-o", str(work / RUNNER), *objects, *_link(folder, EXECUTORCH_LIBRARIES))
            for path in objects:
                Path(path).unlink()
            for needed in libraries:
                shutil.copyfile(needed, work / needed.name)
    return done / RUNNER


def executorch(name: str) -> Path:
    """The folder `executorch` of a machine's wheel: what is installed here, or for another machine fetched once."""
    if name == host():
        found = find_spec("executorch")
        places = [Path(p) for p in (found.submodule_search_locations or ())] if found else []
        if folder := next((p for p in places if (p / "lib" / "libexecutorch.so").is_file()), None):
            return folder
    if name not in WHEELS:
        raise BuildError(f"ExecuTorch for {name} needs that platform's executorch wheel, unpacked (sdk=...)")
    platform_tag, digest = WHEELS[name]
    done = cache() / f"{name}-wheel-{digest[:24]}"
    if not done.exists():
        with whole_or_nothing(done) as work:
            _fetch(platform_tag, digest, work)
    return done / "executorch"


def _fetch(platform_tag: str, digest: str, work: Path) -> None:
    """Downloads a wheel with pip, which refuses one of another digest, and unpacks it into `work`."""
    wanted = work / "wanted.txt"
    wanted.write_text(f"executorch=={EXECUTORCH} --hash=sha256:{digest}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version=3.11", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--platform={platform_tag}", f"--dest={work}"]
    done = subprocess.run([*command, "-r", str(wanted)], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise BuildError(f"the executorch wheel for {platform_tag} cannot be fetched: {done.stderr.strip()[-800:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(
            work, [n for n in archive.namelist() if n.startswith(("executorch/include/", "executorch/lib/"))]
        )
    wheels[0].unlink()


def _version(folder: Path) -> str:
    """Of an unpacked wheel; what the runner says it runs."""
    file = folder / "version.py"
    return next(iter(re.findall(r'__version__ = "(\d[\d.]*)', file.read_text())), "") if file.is_file() else EXECUTORCH


def _include(folder: Path) -> list[str]:
    include = folder / "include"
    headers = (include, include / "executorch" / "runtime" / "core" / "portable_type" / "c10")
    return [*EXECUTORCH_FLAGS, *(f"-isystem{h}" for h in headers)]


def _link(folder: Path, libraries: Sequence[str]) -> list[str]:
    """Kernels and backends register themselves when they are loaded: the linker must keep them."""
    names = [f"-l{n}" for n in libraries]
    return [
        "-Wl,--no-as-needed",
        f"-L{folder / 'lib'}",
        *names,
        "-Wl,--allow-shlib-undefined",
        "-lpthread",
        "-Wl,-rpath,$ORIGIN",
    ]


def _unit(goal: Target, source: Path, work: Path, headers: Sequence[str]) -> str:
    """One C++ source as an object file in `work`."""
    made = str(work / f"{source.stem}.o")
    zig("-target", goal.triple, *BINDING_FLAGS, f"-I{sources() / 'dsa'}", *headers, "-c", str(source), "-o", made)
    return made


def bindings() -> list[str]:
    """Formats that have a binding built here."""
    return sorted(path.stem for path in (sources() / "bindings").glob("*.cc"))


def binding_name(format: str) -> str:
    return f"libedgeformer_{format}.so"


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
        inputs = [Path(a).name for a in args if a.endswith((".c", ".cc", ".o"))]
        raise BuildError(f"zig cc failed on {', '.join(inputs[:3])} for {args[1]}:\n{run.stderr.strip()[-2000:]}")


def _target(name: str | None) -> tuple[str, Target]:
    name = name or host()
    if name not in TARGETS:
        raise BuildError(f"cannot compile for {name!r}: native targets are {', '.join(TARGETS)}")
    return name, TARGETS[name]


def _digest(goal: Target, *files: Path, more: list[str] | None = None) -> str:
    flags = (FLAGS, BINDING_FLAGS, more or [], [(p.name, f) for p, f in units(goal)])
    digest = hashlib.sha256(repr((goal, flags, _zig_version())).encode())
    for path in (*sorted((sources() / "dsa").iterdir()), *files):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(goal: Target, work: Path, more: list[str]) -> list[str]:
    """Every source of the operator, as object files in `work`."""
    for path, flags in units(goal):
        zig("-target", goal.triple, *FLAGS, *more, *flags, "-c", str(path), "-o", str(work / f"{path.stem}.o"))
    return sorted(str(path) for path in work.glob("*.o"))


def _zig_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

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
