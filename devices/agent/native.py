"""
The operator library a bundle carries for this machine: found, tried before it is trusted, and asked what it did.

A program with sparse attention runs with or without it, by design to the same numbers. The trial runs the first golden
row both ways in a process of its own, so that a library this CPU cannot execute takes nothing else with it.
"""

import ctypes
import os
import platform
import subprocess
import sys
from typing import Any, Callable, List, Optional, Tuple

from . import cases, runners, score, wire

FALLBACK = "native_fallback"  # the flag of a result whose program ran without its library
LAYERS = 1024  # calls that the library remembers
SECONDS = 600
TRIAL = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {0}.native import main; sys.exit(main())"


def machine():
    # type: () -> str
    """This machine as the manifest names it, "linux-aarch64"."""
    system = "macos" if sys.platform == "darwin" else sys.platform
    name = platform.machine().lower()
    return "{}-{}".format(system, {"arm64": "aarch64", "amd64": "x86_64"}.get(name, name))


def find(folder, entry):
    # type: (str, wire.Entry) -> Optional[str]
    """The library of this program for this machine; None where the bundle has none."""
    path = entry.libraries.get(machine())
    return os.path.abspath(os.path.join(folder, path)) if path else None


def trial(folder, entry, threads, library):
    # type: (str, wire.Entry, int, str) -> Optional[str]
    """None if the library can be trusted with this program here, else why not."""
    package = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable] + (["-I"] if sys.flags.isolated else [])
    command += ["-c", TRIAL.format(__package__), os.path.dirname(package), folder, entry.name, str(threads), library]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "no answer after {} s".format(SECONDS)
    if done.returncode < 0:
        return "killed by signal {}".format(-done.returncode)
    words = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return None if done.returncode == 0 else words[-1] if words else "it ended without a word"


def main():
    # type: () -> int
    """The trial's own process: folder, program, threads, library."""
    folder, program, threads, library = sys.argv[1:]
    with open(os.path.join(folder, "manifest.json"), "rb") as file:
        manifest = wire.load_manifest(file.read())  # verified by who started this
    entry = next(e for e in manifest.programs if e.name == program)
    try:
        why = compare(folder, manifest, entry, int(threads), library)
    except Exception as error:
        why = "{}: {}".format(type(error).__name__, error)
    if why:
        print(why.splitlines()[0])
    return 1 if why else 0


def compare(folder, manifest, entry, threads, library):
    # type: (str, wire.Manifest, wire.Entry, int, str) -> Optional[str]
    """Runs one row both ways; what speaks against the library, or None."""
    golden = cases.load(os.path.join(folder, manifest.cases.golden))
    runner, path, row = runners.load(entry.format), os.path.join(folder, entry.path), golden.rows[0]
    try:
        want = runner.load(path, entry, threads)(row)
    except ImportError:  # no runtime here but the one that the library is: then what the build machine computed
        want = golden.outputs[entry.name][0]
    run = runner.load(path, entry, threads, library)
    watched = journal(run, library)
    got = watched.watch(run)(row) if watched else run(row)
    if watched and not watched.native().calls_per_run:
        return "the library was not called"
    similar = float(score.similarity(manifest.task, [got], [want])[0])
    if similar < entry.golden_similarity:
        return "similarity {:.6f} with the run without it, needs {:.6f}".format(similar, entry.golden_similarity)
    return None


def journal(run, library):
    # type: (Any, Optional[str]) -> Optional[Journal]
    """Of what the function `run`, loaded with this library, lets our operator do; None where it has none to run."""
    if not hasattr(run, "counters") and library is None:
        return None
    counters = run.counters if hasattr(run, "counters") else in_process(library)
    return Journal(counters) if counters else None


def in_process(library):
    # type: (Any) -> Callable[[], Any]
    """The counters of a library of ours, a path, that a runtime has loaded into this process."""
    return _InProcess(library).read


class _InProcess:
    """A library of ours that a runtime has loaded into this process."""

    def __init__(self, library):
        # type: (str) -> None
        self._library = ctypes.CDLL(library)
        self._library.edgeformer_dsa_kernels.restype = ctypes.c_char_p
        self._library.edgeformer_dsa_calls.restype = ctypes.c_int64

    def read(self):
        # type: () -> Tuple[str, int, List[Tuple[int, int]]]
        calls = int(self._library.edgeformer_dsa_calls())
        flat = (ctypes.c_int64 * (2 * LAYERS))()
        layers = int(self._library.edgeformer_dsa_kept(LAYERS, flat))
        self._library.edgeformer_dsa_reset()
        kept = [(int(flat[2 * i]), int(flat[2 * i + 1])) for i in range(layers)]
        return self._library.edgeformer_dsa_kernels().decode("ascii"), calls, kept


class Journal:
    """
    Sums up what the operator says about each run: how often it was called, what it kept in each layer.

    `counters()` is the kernel set, the calls and (kept, candidate blocks) of each call since it was asked last.
    """

    def __init__(self, counters):
        # type: (Callable[[], Any]) -> None
        self._counters = counters
        self._kernels, self._calls = "", None  # type: str, Optional[int]
        self._kept, self._candidates = [], []  # type: List[int], List[int]

    def watch(self, run):
        # type: (Callable[[cases.Row], Any]) -> Callable[[cases.Row], Any]
        """The same function; each of its runs is added up."""

        def watched(row):
            # type: (cases.Row) -> Any
            self._counters()
            output = run(row)
            self._add(*self._counters())
            return output

        return watched

    def _add(self, kernels, calls, kept):
        # type: (str, int, Any) -> None
        missing = len(kept) - len(self._kept)
        self._kept += [0] * missing
        self._candidates += [0] * missing
        for i, (blocks, candidates) in enumerate(kept):
            self._kept[i] += blocks
            self._candidates[i] += candidates
        self._kernels = kernels
        self._calls = calls if self._calls is None else min(self._calls, calls)

    def native(self):
        # type: () -> wire.Native
        """What was added up; the fewest calls that any run made."""
        kept = tuple(kept / float(max(all_, 1)) for kept, all_ in zip(self._kept, self._candidates))
        return wire.Native(self._calls or 0, self._kernels, kept)
