"""
The C core through ctypes: numpy arrays in, numpy arrays out. For tests and benchmarks; products use a binding.

Arrays may be strided as long as the last axis is contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Thread
from typing import Any

import numpy as np

from .. import native
from .reference import Array, Config, Lists, Scorer, blocks

F32, I8, BF16 = 0, 1, 2
STATUS = ("ok", "bad config", "workspace too small", "unsupported")
_FIELDS = (
    "batch q_heads kv_heads q_rows k_rows dim block_q block_k rank dist sinks rule min_blocks max_blocks "
    "force_diag n_sink causal q_offset select_per_kv dense_below compute"
).split()


class CConfig(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in _FIELDS),
        ("scale", ctypes.c_float),
        ("positions", ctypes.c_int32),
        ("position_bias", ctypes.c_void_p),
    ]


class CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((axis, ctypes.c_ssize_t) for axis in ("batch", "head", "row"))]


class CScorer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Scorer._fields]


class CLengths(ctypes.Structure):
    _fields_ = [("q", ctypes.c_void_p), ("kv", ctypes.c_void_p)]


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, TASK, ctypes.c_void_p)


class CParallel(ctypes.Structure):
    _fields_ = [("pool", ctypes.c_void_p), ("threads", ctypes.c_int32), ("run", RUN)]


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(native.library()))
    lib.dsa_workspace.restype = lib.dsa_workspace_strided.restype = ctypes.c_size_t
    lib.dsa_why.restype = lib.dsa_kernels.restype = ctypes.c_char_p
    return lib


def kernels() -> str:
    return str(library().dsa_kernels().decode())


@contextmanager
def only(name: str | None) -> Iterator[bool]:
    """Limits the core to one kernel set; yields whether this machine can run it."""
    try:
        yield bool(library().dsa_limit(name.encode() if name else None))
    finally:
        library().dsa_limit(None)


def config(c: Config, q: Any, k: Any, s: Any = None, compute: int = F32, position_bias: Array | None = None) -> CConfig:
    """Of anything with shapes: numpy arrays or torch tensors."""
    shapes = dict(
        zip(("batch", "q_heads", "q_rows", "dim"), q.shape, strict=True), kv_heads=k.shape[1], k_rows=k.shape[2]
    )
    scorer = {"rank": 1, "dist": 0, "sinks": 0}
    if s is not None:
        scorer = {"rank": s.wq.shape[2], "dist": s.dist_bias.shape[1] // 2, "sinks": s.sink_bias.shape[1]}
    made = CConfig(**vars(c), **shapes, **scorer, compute=compute)
    if position_bias is not None:
        made.keep = np.ascontiguousarray(position_bias, np.float32)
        made.positions, made.position_bias = made.keep.shape[1] // 2, made.keep.ctypes.data
    return made


def why(c: CConfig) -> str | None:
    text = library().dsa_why(ctypes.byref(c))
    return text.decode() if text else None


def prepare(
    name: str,
    c: CConfig,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    threads: int = 1,
    work: Array | None = None,
) -> Callable[[], None]:
    """A call of the core with its workspace (uint8, large enough; None: its own), ready to be repeated."""
    strided = any(isinstance(x, CTensor) and x.row != c.dim for x in before)
    room = library().dsa_workspace_strided if strided else library().dsa_workspace
    size = room(ctypes.byref(c), threads)
    work = np.zeros(size, np.uint8) if work is None else work[:size]
    if work.nbytes < size:
        raise ValueError(f"{name} needs {size} bytes of workspace, not {work.nbytes}")
    parallel = ctypes.byref(CParallel(threads, threads, _run)) if threads > 1 else None
    arguments = (ctypes.byref(c), *before, *addresses([work]), ctypes.c_size_t(size), parallel, *after)

    def run() -> None:
        if status := getattr(library(), name)(*arguments):
            raise ValueError(f"{name}: {STATUS[status]}; {why(c)}")

    return run


def select(
    c: Config, q: Array, k: Array, s: Scorer, q_len: Array | None = None, kv_len: Array | None = None, threads: int = 1
) -> Lists:
    lists, given = empty_lists(c, q, k), config(c, q, k, s)
    prepare("dsa_select", given, (tensor(q), tensor(k), scorer(s), lengths(q_len, kv_len)), addresses(lists), threads)()
    return lists


def attend(
    c: Config,
    q: Array,
    k: Array,
    v: Array,
    lists: Lists | None = None,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    threads: int = 1,
    compute: int = F32,
    out: Array | None = None,
    position_bias: Array | None = None,
) -> Array:
    if lists is not None and lists.idx.shape != (want := empty_lists(c, q, k).idx.shape):
        raise ValueError(f"idx has shape {lists.idx.shape}; this config's lists have {want}")
    out = np.empty(q.shape, np.float32) if out is None else out
    before = (tensor(q), tensor(k), tensor(v), *addresses(lists or (None, None)), lengths(q_len, kv_len))
    given = config(c, q, k, None, compute, position_bias)
    prepare("dsa_attend", given, before, output(out), threads)()
    return out


def fused(
    c: Config,
    q: Array,
    k: Array,
    v: Array,
    s: Scorer,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    threads: int = 1,
    compute: int = F32,
    out: Array | None = None,
    position_bias: Array | None = None,
) -> tuple[Array, tuple[int, int]]:
    """The output, and how many blocks were kept of how many candidates."""
    out, kept = np.empty(q.shape, np.float32) if out is None else out, np.zeros(2, np.int64)
    before = (tensor(q), tensor(k), tensor(v), scorer(s), lengths(q_len, kv_len))
    given = config(c, q, k, s, compute, position_bias)
    prepare("dsa_fused", given, before, (*output(out), *addresses([kept])), threads)()
    return out, (int(kept[0]), int(kept[1]))


def empty_lists(c: Config, q: Array, k: Array) -> Lists:
    nq, nk = blocks(q.shape[2], c.block_q), blocks(k.shape[2], c.block_k)
    shape = (q.shape[0], k.shape[1] if c.select_per_kv else q.shape[1], nq)
    return Lists(np.empty((*shape, min(c.max_blocks or nk, nk)), np.int32), np.empty(shape, np.int32))


def addresses(arrays: Sequence[Array | None]) -> tuple[Any, ...]:
    """Pointers that keep their arrays alive."""
    return tuple(None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in arrays)


def tensor(x: Array) -> CTensor:
    assert x.dtype == np.float32 and (x.strides[-1] == 4 or x.shape[-1] == 1)
    made = CTensor(x.ctypes.data, *(n // 4 for n in x.strides[:3]))
    made.keep = x
    return made


def output(x: Array) -> tuple[Any, ...]:
    return (*addresses([x]), (ctypes.c_ssize_t * 3)(*(n // 4 for n in x.strides[:3])))


def scorer(s: Scorer) -> Any:
    arrays = [np.ascontiguousarray(x, np.float32) for x in s]
    made = CScorer(*(x.ctypes.data for x in arrays))
    made.keep = arrays
    return ctypes.byref(made)


def lengths(q_len: Array | None, kv_len: Array | None) -> CLengths:
    arrays = [None if x is None else np.ascontiguousarray(x, np.int32) for x in (q_len, kv_len)]
    made = CLengths(*(None if x is None else x.ctypes.data for x in arrays))
    made.keep = arrays
    return made


def _run_tasks(threads: int | None, tasks: int, task: Callable[[int | None, int, int], None], arg: int | None) -> None:
    """A thread pool for tests: thread t takes every task i with i % threads == t."""
    n = threads or 1

    def share(t: int) -> None:
        for i in range(t, tasks, n):
            task(arg, i, t)

    pool = [Thread(target=share, args=(t,)) for t in range(n)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()


_run = RUN(_run_tasks)
