"""
ExecuTorch (.pte). Any sequence length: a row runs at its natural one.

Where the bundle brings a runner for this machine it is a process of its own, without Python and torch, and rows travel
over its pipes (the protocol stands in runtimes/bindings/executorch/runner.cc). Else it is ExecuTorch's Python runtime.

A program with sparse attention has two methods with one copy of the weights: `forward` needs our operator, which that
runner has, and `standard` computes it in standard operators.

A decoder's program has further methods, `forward_next` and `standard_next`, for one token after the row's `past`.
"""

import contextlib
import os
import struct
import subprocess
import tempfile
import weakref
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import cases, decoding, wire

NATIVE, STANDARD, NEXT = "forward", "standard", "_next"
OPERATOR = "edgeformer::dsa.out"
PROTOCOL = 2
TYPES = {"int32": 3, "int64": 4, "float32": 6}
LAST_LINES, SECONDS = 3, 60
OUTPUTS = 16  # more than any program has


class Broken(Exception):
    """The runner refused a request, or it is gone."""


class Counted(NamedTuple):
    """What the operator did since it was asked last."""

    kernel_set: str
    calls: int
    kept: Tuple[Tuple[int, int], ...]  # kept and candidate blocks of each call, the last 1024


def version(library=None):
    # type: (Optional[str]) -> str
    if library is None:
        from executorch.version import __version__

        return str(__version__)
    _executable(library)
    told = subprocess.check_output([library, "--version"], timeout=SECONDS)
    return told.decode("ascii").strip()


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    """With a library the function has `counters`: what our operator did, None where the program does not have it."""
    if library is None:
        return _python(path, entry, threads)
    return Runner(library, path, entry.inputs, threads)


def _asked(row, inputs, method):
    # type: (cases.Row, Sequence[wire.Tensor], str) -> Tuple[str, List[wire.Tensor]]
    """The method that this row is for, and its inputs."""
    past = row.get(decoding.PAST)
    if past is None or not past.shape[2]:
        return method, [x for x in inputs if x.name != decoding.PAST]
    return method + NEXT, list(inputs)


def _python(path, entry, threads):
    # type: (str, wire.Entry, int) -> Callable[[cases.Row], Any]
    import executorch.kernels.quantized  # registers the int8 embedding
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != threads:  # before a method is loaded: later it may crash
        portable_lib._unsafe_reset_threadpool(threads)
    runtime = Runtime.get()
    program = runtime.load_program(path)
    native = STANDARD not in program.method_names or OPERATOR in runtime.operator_registry.operator_names
    name = NATIVE if native else STANDARD
    methods = {name: program.load_method(name)}

    def run(row, every=False):
        # type: (cases.Row, bool) -> Any
        method, inputs = _asked(row, entry.inputs, name)
        if method not in methods:
            methods[method] = program.load_method(method)
        feed = [torch.from_numpy(row[x.name][None].astype(x.dtype)) for x in inputs]
        outputs = methods[method].execute(feed)
        return tuple(x[0].numpy().copy() for x in outputs) if every else outputs[0][0].numpy().copy()

    return run


class Runner:
    """
    A program in the bundle's own runner, by `method` and what follows it. Raises Broken with the runner's words, also
    when it dies.
    """

    def __init__(self, library, path, inputs, threads=1, method=NATIVE, profile=False):
        # type: (str, str, Tuple[wire.Tensor, ...], int, str, bool) -> None
        _executable(library)
        self._made = (library, path, inputs, threads, method)
        self._inputs, self._method = inputs, method
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (not a pipe: nobody reads it while the runner works)
        command = [library, path, method, str(threads)] + (["profile"] if profile else [])
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0
        )
        self.close = weakref.finalize(self, _end, self._process, self._said)
        try:
            told = _Reader(self._reply())
            spoken, self.threads = told.take("I"), told.take("I")
            if spoken != PROTOCOL:
                raise Broken("{} speaks protocol {}, this agent {}".format(library, spoken, PROTOCOL))
            self.version = told.text()
            self.methods = [told.text() for _ in range(told.take("I"))]
        except Exception:
            self.close()
            raise
        self._counts = STANDARD in self.methods and method == NATIVE
        self.last_ns = 0  # of the last run, inside the runtime

    def __call__(self, row, every=False):
        # type: (cases.Row, bool) -> Any
        method, inputs = _asked(row, self._inputs, self._method)
        most = struct.pack("<I", OUTPUTS if every else 1)
        told = _Reader(self._ask(b"R" + _text(method) + most + _packed(row, inputs)))
        self.last_ns = told.take("Q")
        outputs = tuple(told.tensor()[0] for _ in range(told.take("I")))
        return outputs if every else outputs[0]

    def profile(self, row):
        # type: (cases.Row) -> List[Tuple[str, float]]
        """Milliseconds by operator, longest first. Of a runner made with `profile`."""
        method, inputs = _asked(row, self._inputs, self._method)
        told = _Reader(self._ask(b"P" + _text(method) + _packed(row, inputs)))
        times = [(told.text(), told.take("Q") / 1e6) for _ in range(told.take("I"))]
        return sorted(times, key=lambda pair: -pair[1])

    def profiled(self, row):
        # type: (cases.Row) -> List[Tuple[str, float]]
        """`profile` of a second run, in a process of its own: this one is never watched."""
        watched = Runner(*self._made, profile=True)
        try:
            watched(row)
            return watched.profile(row)
        finally:
            watched.close()

    @property
    def counters(self):
        # type: () -> Optional[Callable[[], Counted]]
        return self._counters if self._counts else None

    def _counters(self):
        # type: () -> Counted
        told = _Reader(self._ask(b"J"))
        kernels, calls = told.text(), told.take("q")
        return Counted(kernels, calls, tuple((told.take("q"), told.take("q")) for _ in range(told.take("I"))))

    def _ask(self, request):
        # type: (bytes) -> bytes
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack("<I", len(request)) + request)
        except (OSError, ValueError):  # it is gone, or was closed
            raise self._gone()
        return self._reply()

    def _reply(self):
        # type: () -> bytes
        (size,) = struct.unpack("<I", self._read(4))
        reply = self._read(size)
        if reply[:1] != b"\0":
            raise Broken(_Reader(reply[1:]).text())
        return reply[1:]

    def _read(self, size):
        # type: (int) -> bytes
        assert self._process.stdout is not None
        parts = []  # type: List[bytes]
        while size:
            part = self._process.stdout.read(size) if not self._process.stdout.closed else b""
            if not part:
                raise self._gone()
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _gone(self):
        # type: () -> Broken
        """How it ended, and what it said last."""
        if not self.close.alive:
            return Broken("the runner is closed")
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()[-LAST_LINES:]
        self.close()
        how = "was killed by signal {}".format(-code) if code < 0 else "ended with code {}".format(code)
        return Broken(": ".join(["the runner " + how] + ([" | ".join(lines)] if lines else [])))


def _text(words):
    # type: (str) -> bytes
    return struct.pack("<I", len(words)) + words.encode("ascii")


def _packed(row, inputs):
    # type: (cases.Row, Sequence[wire.Tensor]) -> bytes
    parts = [struct.pack("<I", len(inputs))]
    for tensor in inputs:
        array = np.ascontiguousarray(row[tensor.name][None], tensor.dtype)
        head = struct.pack("<BB{}I".format(array.ndim), TYPES[tensor.dtype], array.ndim, *array.shape)
        parts += [head, array.tobytes()]
    return b"".join(parts)


class _Reader:
    """A reply from its start to its end. Raises Broken where it is too short."""

    def __init__(self, data):
        # type: (bytes) -> None
        self._data, self._at = data, 0

    def bytes(self, size):
        # type: (int) -> bytes
        self._at += size
        if self._at > len(self._data):
            raise Broken("a reply of {} bytes ends too early".format(len(self._data)))
        return self._data[self._at - size : self._at]

    def take(self, kind):
        # type: (str) -> int
        return int(struct.unpack("<" + kind, self.bytes(struct.calcsize("<" + kind)))[0])

    def text(self):
        # type: () -> str
        return self.bytes(self.take("I")).decode("utf-8", "replace")

    def tensor(self):
        # type: () -> Any
        kind = {code: name for name, code in TYPES.items()}[self.take("B")]
        shape = [self.take("I") for _ in range(self.take("B"))]
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        return np.frombuffer(self.bytes(count), kind).reshape(shape).copy()


def _executable(library):
    # type: (str) -> None
    """An upload leaves files that may not be executed; where the mode cannot be changed, starting it says so."""
    if not os.access(library, os.X_OK):
        with contextlib.suppress(OSError):
            os.chmod(library, 0o755)


def _end(process, said):
    # type: (Any, Any) -> None
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout, said):
        with contextlib.suppress(OSError):
            file.close()
