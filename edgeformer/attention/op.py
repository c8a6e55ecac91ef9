"""
`edgeformer::dsa` in torch: the one copy of the schema, shapes for tracing, the C core on CPU, gradients.

    o = torch.ops.edgeformer.dsa(q, k, v, wq, wk, dist_bias, sink_bias, theta, q_len, kv_len, block_q=64, ...)

`dsa` is `dsa_attend` over the lists of `dsa_select`, bit for bit. `position_bias` [Hq, 2P+1] is added to the logits by
key position - query position, clamped to P. Gradients reach q, k, v and the position bias through the attention, the
selection held fixed; the scorer gets none (it is trained by itself, see `scorer.py`), and int8 attention has the
gradient of f32. Threads: as many as torch has; their number never changes a bit of the result.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from ..errors import BadInput
from . import kernel
from .reference import LAST_ROWS, Config

NAMESPACE = "edgeformer"
_ATTRIBUTES = (
    "int block_q=64, int block_k=64, int rule=0, int min_blocks=1, int max_blocks=0, int force_diag=1, int n_sink=0, "
    "int causal=0, int q_offset=0, int select_per_kv=0, int dense_below=0"
)
_ALL = f"{_ATTRIBUTES}, int compute=0, float scale=0.0"
_LENGTHS = "Tensor? q_len=None, Tensor? kv_len=None"
_SCORER = "Tensor wq, Tensor wk, Tensor dist_bias, Tensor sink_bias, Tensor theta"
_POSITION = "Tensor? position_bias=None"
_ATTEND = (
    f"Tensor idx, Tensor cnt, {_LENGTHS}, {_POSITION}, *, "
    "int block_q=64, int block_k=64, int causal=0, int q_offset=0, int compute=0, float scale=0.0"
)
_OPERANDS = f"Tensor q, Tensor k, Tensor v, {_SCORER}, {_LENGTHS}, {_POSITION}, *, {_ALL}"
SCHEMA = f"dsa({_OPERANDS}) -> Tensor"
SCHEMA_OUT = (
    f"dsa.out({_OPERANDS}, Tensor(a!) out) -> Tensor(a!)"  # what ExecuTorch makes of the call; it has no torch kernel
)
SCHEMA_SELECT = f"dsa_select(Tensor q, Tensor k, {_SCORER}, {_LENGTHS}, *, {_ATTRIBUTES}) -> (Tensor idx, Tensor cnt)"
SCHEMA_ATTEND = f"dsa_attend(Tensor q, Tensor k, Tensor v, {_ATTEND}) -> Tensor"
SCHEMA_BACKWARD = (
    f"dsa_attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {_ATTEND}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
SCHEMA_POSITION_BACKWARD = f"dsa_position_backward(Tensor grad, Tensor q, Tensor k, Tensor v, {_ATTEND}) -> Tensor"
_GRADIENT_BYTES = 64 << 20  # of one chunk of query rows against all keys

Tensor = torch.Tensor


class Parameters(NamedTuple):
    """The scorer's operands, in the order of the schema."""

    wq: Tensor  # [Hq, D, r], the softmax scale folded in
    wk: Tensor  # [Hq, D, r]
    dist_bias: Tensor  # [Hq, 2R+1]
    sink_bias: Tensor  # [Hq, S]
    theta: Tensor  # [Hs]


class Counters(NamedTuple):
    """What this process has run: calls of the C core, and blocks kept of those that were candidates."""

    calls: int
    kept: int
    candidates: int


class _Tally:
    def __init__(self) -> None:
        self._lock, self._now = threading.Lock(), Counters(0, 0, 0)

    def read(self) -> Counters:
        return self._now

    def add(self, kept: int = 0, candidates: int = 0) -> None:
        with self._lock:
            now = self._now
            self._now = Counters(now.calls + 1, now.kept + kept, now.candidates + candidates)


_tally = _Tally()


def counters() -> Counters:
    """Since the process started: take one before and one after, and subtract."""
    return _tally.read()


def selection(config: Config) -> dict[str, int]:
    """The attributes of `dsa_select`."""
    return {name: value for name, value in vars(config).items() if name != "scale"}


def attention(config: Config) -> dict[str, int]:
    """The integer attributes of `dsa_attend`, but for compute."""
    return {name: getattr(config, name) for name in ("block_q", "block_k", "causal", "q_offset")}


# --- shapes -----------------------------------------------------------------------------------------------------------


def _ceil(n: Any, block: int) -> Any:
    return (n + block - 1) // block


def _list_shape(q: Tensor, k: Tensor, config: Config) -> tuple[Any, ...]:
    heads, most = k.shape[1] if config.select_per_kv else q.shape[1], _ceil(k.shape[2], config.block_k)
    if config.max_blocks:  # lengths are symbols while a graph is traced
        most = torch.sym_min(config.max_blocks, most)  # type: ignore[no-untyped-call]
    return (q.shape[0], heads, _ceil(q.shape[2], config.block_q), most)


def _select_fake(q: Tensor, k: Tensor, *_: Any, **attributes: Any) -> tuple[Tensor, Tensor]:
    shape = _list_shape(q, k, Config(**attributes))
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape[:3], dtype=torch.int32)


def _same_shape(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(q.shape)


def _backward_fake(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _position_backward_fake(*given: Any, **_: Any) -> Tensor:
    position_bias: Tensor = given[8]
    return position_bias.new_empty(position_bias.shape)


# --- the C core -------------------------------------------------------------------------------------------------------


def _dsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wq: Tensor,
    wk: Tensor,
    dist_bias: Tensor,
    sink_bias: Tensor,
    theta: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    compute: int = kernel.F32,
    **attributes: Any,
) -> Tensor:
    config = _placed(attributes, q, k)
    scorer = _scorer(config, q, k, wq, wk, dist_bias, sink_bias, theta)
    q, k, v = _operands(q, k, v)
    out, kept = q.new_empty(q.shape), (ctypes.c_int64 * 2)()
    inputs = (_tensor(q), _tensor(k), _tensor(v), _pointers(scorer), _lengths(q, q_len, kv_len))
    _call(
        "dsa_fused",
        _biased(kernel.config(config, q, k, scorer, compute), q, position_bias),
        inputs,
        (*_output(out), kept),
        (scorer, q_len, kv_len),
    )
    _tally.add(kept[0], kept[1])
    return out


def _select(
    q: Tensor,
    k: Tensor,
    wq: Tensor,
    wk: Tensor,
    dist_bias: Tensor,
    sink_bias: Tensor,
    theta: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    **attributes: Any,
) -> tuple[Tensor, Tensor]:
    config = _placed(attributes, q, k)
    scorer = _scorer(config, q, k, wq, wk, dist_bias, sink_bias, theta)
    q, k, _ = _operands(q, k, k)
    shape = _list_shape(q, k, config)
    idx, cnt = q.new_empty(shape, dtype=torch.int32), q.new_empty(shape[:3], dtype=torch.int32)
    inputs = (_tensor(q), _tensor(k), _pointers(scorer), _lengths(q, q_len, kv_len))
    _call(
        "dsa_select",
        kernel.config(config, q, k, scorer),
        inputs,
        (_pointer(idx), _pointer(cnt)),
        (scorer, q_len, kv_len),
    )
    _tally.add()
    return idx, cnt


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    compute: int = kernel.F32,
    **attributes: Any,
) -> Tensor:
    config = _listed(_placed(attributes, q, k), q, k, idx, cnt)
    q, k, v = _operands(q, k, v)
    idx, cnt, out = idx.contiguous(), cnt.contiguous(), q.new_empty(q.shape)
    inputs = (_tensor(q), _tensor(k), _tensor(v), _pointer(idx), _pointer(cnt), _lengths(q, q_len, kv_len))
    given = _biased(kernel.config(config, q, k, None, compute), q, position_bias)
    _call("dsa_attend", given, inputs, _output(out), (q_len, kv_len))
    _tally.add()
    return out


def _placed(attributes: dict[str, Any], q: Tensor, k: Tensor) -> Config:
    """The call's config: where the queries are the last of the keys' rows, the shapes say where they start."""
    config = Config(**attributes)
    return replace(config, q_offset=k.shape[2] - q.shape[2]) if config.q_offset == LAST_ROWS else config


def _call(
    name: str, c: kernel.CConfig, before: tuple[Any, ...], after: tuple[Any, ...], alive: tuple[Any, ...]
) -> None:
    """One call of the core with workspace and threads of ours; `alive` holds what the pointers point to."""
    if reason := kernel.why(c):
        given = ", ".join(f"{x[0]}={getattr(c, x[0])}" for x in c._fields_ if x[0] != "position_bias")
        raise BadInput(f"edgeformer::{name}: {reason}; got {given}")
    threads = torch.get_num_threads()
    # Models hand over rows of all heads side by side (BNHD); with room for a copy the core is faster on those.
    strided = any(isinstance(x, kernel.CTensor) and x.row != c.dim for x in before)
    room = kernel.library().dsa_workspace_strided if strided else kernel.library().dsa_workspace
    size = room(ctypes.byref(c), threads)
    work = torch.empty(size, dtype=torch.uint8)
    parallel = ctypes.byref(kernel.CParallel(threads, threads, _run)) if threads > 1 else None
    function: Callable[..., int] = getattr(kernel.library(), name)
    status = function(ctypes.byref(c), *before, _pointer(work), ctypes.c_size_t(size), parallel, *after)
    del alive
    if status:
        raise BadInput(f"edgeformer::{name}: {kernel.STATUS[status]}")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "edgeformer-dsa")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool but not its threads


def _run_tasks(threads: int | None, tasks: int, task: Callable[[int | None, int, int], None], arg: int | None) -> None:
    """Threads take the next task until none is left; the core leaves the interpreter's lock while a task runs."""
    n, following = threads or 1, itertools.count()

    def share(t: int) -> None:
        while (i := next(following)) < tasks:
            task(arg, i, t)

    others = [_pool(n - 1).submit(share, t) for t in range(1, n)]
    share(0)
    for other in others:
        other.result()


_run = kernel.RUN(_run_tasks)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 on this CPU with a contiguous last axis; other strides are free."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.float32 or x.ndim != 4:
            raise BadInput(f"edgeformer::dsa: {name} must be float32 [B,H,N,D], got {x.dtype} {tuple(x.shape)}")
    if k.shape != v.shape:
        raise BadInput(f"edgeformer::dsa: k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise BadInput(f"edgeformer::dsa: q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head size")
    return _rows(q), _rows(k), _rows(v)


def _rows(x: Tensor) -> Tensor:
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()


def _scorer(c: Config, q: Tensor, k: Tensor, *tensors: Tensor) -> Parameters:
    heads, dim, rank = q.shape[1], q.shape[3], tensors[0].shape[-1]
    selecting = k.shape[1] if c.select_per_kv else heads
    wanted = ((heads, dim, rank), (heads, dim, rank), (heads, None), (heads, None), (selecting,))
    for name, x, shape in zip(Parameters._fields, tensors, wanted, strict=True):
        fits = len(x.shape) == len(shape) and all(b in (a, None) for a, b in zip(x.shape, shape, strict=True))
        if not fits or x.dtype != torch.float32:
            raise BadInput(f"edgeformer::dsa: {name} must be float32 {shape}, got {x.dtype} {tuple(x.shape)}")
    if tensors[2].shape[1] % 2 == 0:
        raise BadInput(f"edgeformer::dsa: dist_bias needs 2R+1 columns, got {tensors[2].shape[1]}")
    return Parameters(*(x.detach().contiguous() for x in tensors))


def _biased(c: kernel.CConfig, q: Tensor, position_bias: Tensor | None) -> kernel.CConfig:
    if position_bias is None:
        return c
    shape = tuple(position_bias.shape)
    if position_bias.dtype != torch.float32 or len(shape) != 2 or shape[0] != q.shape[1] or shape[1] % 2 == 0:
        raise BadInput(
            f"edgeformer::dsa: position_bias must be float32 [{q.shape[1]}, 2P+1], got {position_bias.dtype} {shape}"
        )
    c.keep = position_bias.detach().contiguous()
    c.positions, c.position_bias = shape[1] // 2, c.keep.data_ptr()
    return c


def _listed(config: Config, q: Tensor, k: Tensor, idx: Tensor, cnt: Tensor) -> Config:
    """The config whose lists have this shape. The core trusts lists, so a block outside k is refused here."""
    blocks, heads = _ceil(k.shape[2], config.block_k), (q.shape[1], k.shape[1])
    rows = (q.shape[0], idx.shape[1], _ceil(q.shape[2], config.block_q))
    if (
        idx.ndim != 4
        or idx.shape[1] not in heads
        or idx.shape[:3] != rows
        or cnt.shape != rows
        or idx.shape[3] > blocks
    ):
        raise BadInput(
            f"edgeformer::dsa_attend: lists {tuple(idx.shape)}, {tuple(cnt.shape)} do not fit {blocks} key blocks"
        )
    if idx.dtype != torch.int32 or cnt.dtype != torch.int32:
        raise BadInput(f"edgeformer::dsa_attend: lists must be int32, got {idx.dtype}, {cnt.dtype}")
    used = idx[cnt[..., None] > torch.arange(idx.shape[3])]
    if _outside(used, blocks - 1) or _outside(cnt, idx.shape[3]):
        raise BadInput(f"edgeformer::dsa_attend: a list names a block outside 0..{blocks - 1} or counts past its end")
    return Config(**{**vars(config), "max_blocks": idx.shape[3], "select_per_kv": int(idx.shape[1] != q.shape[1])})


def _outside(x: Tensor, most: int) -> bool:
    return bool(x.numel()) and bool(x.min() < 0 or x.max() > most)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _tensor(x: Tensor) -> kernel.CTensor:
    return kernel.CTensor(x.data_ptr(), *x.stride()[:3])


def _output(x: Tensor) -> tuple[Any, ...]:
    return _pointer(x), (ctypes.c_ssize_t * 3)(*x.stride()[:3])


def _pointers(scorer: Parameters) -> Any:
    return ctypes.byref(kernel.CScorer(*(x.data_ptr() if x.numel() else None for x in scorer)))


def _lengths(q: Tensor, *given: Tensor | None) -> kernel.CLengths:
    for x in given:
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (q.shape[0],) or not x.is_contiguous()):
            raise BadInput(
                f"edgeformer::dsa: lengths must be contiguous int32 [{q.shape[0]}], got {x.dtype} {tuple(x.shape)}"
            )
    return kernel.CLengths(*(None if x is None else x.data_ptr() for x in given))


# --- gradients --------------------------------------------------------------------------------------------------------


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    compute: int = kernel.F32,
    **attributes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of softmax attention, a chunk of query blocks at a time: memory does not grow with N x N."""
    from . import dsa

    del compute
    config, aten = _placed(attributes, q, k), torch.ops.aten
    scale, group = config.scale or q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    keys, values = (dsa.only_valid(x, kv_len).repeat_interleave(group, 1) for x in (k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, rows_q, rows_grad, mask in _chunks(config, grad, q, k, idx, cnt, q_len, kv_len, position_bias):
        given = (rows_q, keys, values)
        out = aten._scaled_dot_product_flash_attention_for_cpu(*given, attn_mask=mask, scale=scale)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            rows_grad, *given, *out, 0.0, False, attn_mask=mask, scale=scale
        )
        dq[:, :, rows] = found[0]
        dk += found[1]
        dv += found[2]
    heads = (k.shape[0], k.shape[1], group, *k.shape[2:])
    return dq.contiguous(), dk.reshape(heads).sum(2), dv.reshape(heads).sum(2)


def _position_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    compute: int = kernel.F32,
    **attributes: Any,
) -> Tensor:
    """The gradient of the position bias, in the same chunks: of each logit, summed by its distance."""
    from . import dsa

    del compute
    assert position_bias is not None
    config, found = _placed(attributes, q, k), torch.zeros_like(position_bias)
    scale, group = config.scale or q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    keys, values = (dsa.only_valid(x, kv_len).repeat_interleave(group, 1) for x in (k, v))
    for rows, rows_q, rows_grad, mask in _chunks(config, grad, q, k, idx, cnt, q_len, kv_len, position_bias):
        p = torch.softmax(rows_q @ keys.mT * scale + mask, -1)
        by_p = rows_grad @ values.mT
        by_logit = p * (by_p - (p * by_p).sum(-1, keepdim=True))
        at = dsa.distances(config, q, k, position_bias, rows)
        found.index_add_(1, at.flatten(), by_logit.sum(0).flatten(1))
    return found


def _chunks(
    config: Config,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    idx: Tensor,
    cnt: Tensor,
    q_len: Tensor | None,
    kv_len: Tensor | None,
    position_bias: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some rows at a time, their q, their gradient, and what is added to their logits."""
    from . import dsa

    kept = dsa.from_lists(idx, cnt, _ceil(k.shape[2], config.block_k))
    step, plain = _chunk(q, k, config.block_q), _only_lists(config, kept, q, k, q_len, kv_len)
    for first in range(0, q.shape[2], step):
        rows = slice(first, first + step)
        rows_q, rows_grad = q[:, :, rows], grad[:, :, rows]
        if plain:
            mask = _plain_mask(config, kept, q, k, rows)
        else:
            seen = dsa.visible(kept, config, q, k, q_len, kv_len, rows)
            alive = seen.any(-1, keepdim=True)
            rows_q, rows_grad = (torch.where(alive, x, 0.0) for x in (rows_q, rows_grad))
            # A row that sees nothing has no gradient, whatever it is shown; shown nothing, it would be NaN.
            mask = torch.where(seen | ~alive, 0.0, -torch.inf)
        if position_bias is not None:
            mask = mask + position_bias[:, dsa.distances(config, q, k, position_bias, rows)]
        yield rows, rows_q, rows_grad, mask


def _only_lists(c: Config, kept: Tensor, q: Tensor, k: Tensor, q_len: Tensor | None, kv_len: Tensor | None) -> bool:
    """Nothing but the lists decides what a row sees, and every row sees something."""
    full = all(x is None or bool((x >= n).all()) for x, n in ((q_len, q.shape[2]), (kv_len, k.shape[2])))
    return full and not c.causal and bool(kept.any(-1).all())


def _plain_mask(c: Config, kept: Tensor, q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """What is added to the logits, [B,Hq,rows,Nk]."""
    t = torch.arange(q.shape[2])[rows]
    by_block = torch.where(kept[:, :, t // c.block_q], 0.0, -torch.inf).repeat_interleave(
        q.shape[1] // kept.shape[1], 1
    )
    return by_block.repeat_interleave(c.block_k, 3)[..., : k.shape[2]]


def _chunk(q: Tensor, k: Tensor, block: int) -> int:
    """Query rows at a time, a multiple of the block."""
    most = _GRADIENT_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2])
    return max(most // block, 1) * block


def _keep_for_backward(names: int) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:  # noqa: ARG001 (torch passes by name)
        ctx.save_for_backward(*inputs)
        ctx.attributes, ctx.count = keyword_only_inputs, names

    return setup


def _dsa_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *scorer, q_len, kv_len, position_bias = ctx.saved_tensors
    attend = ("block_q", "block_k", "causal", "q_offset", "compute", "scale")
    chosen = {name: value for name, value in ctx.attributes.items() if name not in ("compute", "scale")}
    idx, cnt = torch.ops.edgeformer.dsa_select(q, k, *scorer, q_len, kv_len, **chosen)
    rest = {name: ctx.attributes[name] for name in attend}
    return _gradients(ctx, (grad, q, k, v, idx, cnt, q_len, kv_len, position_bias), rest)


def _attend_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, (grad, *ctx.saved_tensors), ctx.attributes)


def _gradients(ctx: Any, given: tuple[Any, ...], attributes: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """Of the first three operands and of the last, the position bias; that of the latter only where it is trained."""
    found = torch.ops.edgeformer.dsa_attend_backward(*given, **attributes)
    trained = any(ctx.needs_input_grad[ctx.count - 1 :])  # where the call leaves it out, this is past the end
    last = torch.ops.edgeformer.dsa_position_backward(*given, **attributes) if trained else None
    return (*found, *(None,) * (ctx.count - 4), last)


def _no_second_gradient(_ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
    raise BadInput(
        "edgeformer::dsa has first gradients only; differentiate edgeformer.attention.dsa.forward twice instead"
    )


def _define(
    schema: str, cpu: Callable[..., Any], fake: Callable[..., Any], gradient: Any = None, inputs: int = 0
) -> None:
    name = f"{NAMESPACE}::{schema[: schema.index('(')]}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CPU")(cpu)
    torch.library.register_fake(name)(fake)
    if gradient:
        torch.library.register_autograd(name, gradient, setup_context=_keep_for_backward(inputs))


_define(SCHEMA_BACKWARD, _attend_backward, _backward_fake, _no_second_gradient, 9)
_define(SCHEMA_POSITION_BACKWARD, _position_backward, _position_backward_fake, _no_second_gradient, 9)
_define(SCHEMA_SELECT, _select, _select_fake)
_define(SCHEMA_ATTEND, _attend, _same_shape, _attend_gradient, 8)
_define(SCHEMA, _dsa, _same_shape, _dsa_gradient, 11)
torch.library.define(f"{NAMESPACE}::dsa.out", SCHEMA_OUT.removeprefix("dsa.out"))
