"""
edgeformer block-DSA in numpy: the definition that every runtime agrees with. Literal and slow on purpose.

`select` scores pooled query blocks against pooled key blocks and keeps some of them; `attend` is exact softmax
attention over what was kept; `fused` is one after the other. Selection is float32 by definition, attention float64 by
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
THRESHOLD, TOP_P, TOP_K = 0, 1, 2
LAST_ROWS = -1  # as q_offset: the queries are the last of the keys' rows


@dataclass(frozen=True)
class Config:
    """The attributes of the operator; integers and floats only, as they cross every runtime's border."""

    block_q: int = 64
    block_k: int = 64
    scale: float = 0.0  # 0: 1 / sqrt(D)
    rule: int = THRESHOLD
    min_blocks: int = 1
    max_blocks: int = 0  # 0: no clamp
    force_diag: int = 1
    n_sink: int = 0
    causal: int = 0
    q_offset: int = 0  # absolute position of query row 0; runtimes resolve LAST_ROWS by the shapes of a call
    select_per_kv: int = 0
    dense_below: int = 0


class Scorer(NamedTuple):
    wq: Array  # [Hq, D, r], the softmax scale folded in
    wk: Array  # [Hq, D, r]
    dist_bias: Array  # [Hq, 2R+1]
    sink_bias: Array  # [Hq, S]
    theta: Array  # [Hs]


class Lists(NamedTuple):
    idx: Array  # int32 [B, Hs, nQ, Kmax], ascending, padded with -1
    cnt: Array  # int32 [B, Hs, nQ]


class Row(NamedTuple):
    """What selection knows about query block i before it decides, for all Hs heads at once."""

    batch: int
    i: int
    candidates: Array  # [n] key blocks
    forced: Array  # [n] bool
    mass: Array  # [Hs, n]


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def lengths(given: Array | None, batch: int, full: int) -> Array:
    return np.full(batch, full, np.int32) if given is None else np.asarray(given)


def pool(x: Array, block: int, length: int) -> Array:
    """[H, N, D] -> [H, n, D]: the mean of each block's valid rows, added in row order. No valid row: 0, never used."""
    means = np.zeros((x.shape[0], blocks(x.shape[1], block), x.shape[2]), x.dtype)
    for b in range(means.shape[1]):
        rows = range(b * block, min((b + 1) * block, length))
        for t in rows:
            means[:, b] += x[:, t]
        if len(rows):
            means[:, b] /= x.dtype.type(len(rows))
    return means


def softmax(z: Array) -> Array:
    """Over the last axis, summed in increasing order. A row of -inf has no mass at all: 0, not NaN."""
    top = z.max(-1, keepdims=True)
    with np.errstate(over="ignore"):
        e = np.exp(z - np.where(np.isneginf(top), 0, top))
    total = np.cumsum(e, -1)[..., -1:]
    return np.where(total > 0, e / np.where(total > 0, total, 1), 0).astype(z.dtype)


def mass_rows(
    c: Config,
    q: Array,
    k: Array,
    s: Scorer,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Iterator[Row]:
    """Steps 1 to 5: one Row for each query block that has valid rows and candidates."""
    batch, heads, q_rows, _ = q.shape
    groups, k_rows = k.shape[1], k.shape[2]
    reach, sinks = s.dist_bias.shape[1] // 2, s.sink_bias.shape[1]
    wq, wk, dist, sink = (np.asarray(x, dtype) for x in s[:4])
    for b in range(batch):
        valid_q, valid_k = int(lengths(q_len, batch, q_rows)[b]), int(lengths(kv_len, batch, k_rows)[b])
        zq = pool(q[b].astype(dtype), c.block_q, valid_q) @ wq
        zk = pool(k[b].astype(dtype), c.block_k, valid_k).repeat(heads // groups, 0) @ wk
        for i in range(blocks(valid_q, c.block_q)):
            first = c.q_offset + i * c.block_q
            last = c.q_offset + min((i + 1) * c.block_q, valid_q) - 1
            j = np.arange(blocks(valid_k, c.block_k))
            j = j[j * c.block_k <= last] if c.causal else j
            if not len(j):
                continue
            forced = j < c.n_sink
            if c.force_diag:
                forced |= (j * c.block_k <= last) & ((j + 1) * c.block_k > first)
            with np.errstate(invalid="ignore", over="ignore"):
                z = (zq[:, i, None] @ zk[:, j].transpose(0, 2, 1))[:, 0]
                z = z + dist[:, np.clip(j - first // c.block_k, -reach, reach) + reach]
                z[:, j < sinks] += sink[:, j[j < sinks]]
            mass = softmax(np.where(np.isnan(z), -np.inf, np.minimum(z, 3e38)).astype(dtype))
            if c.select_per_kv:
                mass = np.cumsum(mass.reshape(groups, heads // groups, -1), 1)[:, -1] / mass.dtype.type(heads // groups)
            yield Row(b, i, j, forced, mass)


def choose(c: Config, mass: Array, forced: Array, theta: float, k_rows: int) -> Array:
    """Steps 6 to 8 for one head: positions among the candidates, ascending."""
    n, must = len(mass), int(forced.sum())
    order = sorted(range(n), key=lambda x: (not forced[x], -mass[x], x))
    if k_rows <= c.dense_below:
        keep = n
    elif c.rule == THRESHOLD:
        keep = must + sum(bool(mass[x] >= theta) for x in order[must:])
    elif c.rule == TOP_K:
        keep = max(must, min(int(theta), n))
    else:
        keep, reached = must, mass[order[:must]].sum()
        while keep < n and (theta >= 1 or reached < theta):
            reached += mass[order[keep]]
            keep += 1
    keep = max(keep, min(c.min_blocks, n))
    return np.sort(np.array(order[: min(keep, c.max_blocks or n)], np.int32))


def select(
    c: Config,
    q: Array,
    k: Array,
    s: Scorer,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Lists:
    nq, nk = blocks(q.shape[2], c.block_q), blocks(k.shape[2], c.block_k)
    heads = k.shape[1] if c.select_per_kv else q.shape[1]
    idx = np.full((q.shape[0], heads, nq, min(c.max_blocks or nk, nk)), -1, np.int32)
    cnt = np.zeros(idx.shape[:3], np.int32)
    for row in mass_rows(c, q, k, s, q_len, kv_len, dtype):
        for h in range(heads):
            kept = row.candidates[choose(c, row.mass[h], row.forced, s.theta[h], k.shape[2])]
            idx[row.batch, h, row.i, : len(kept)] = kept
            cnt[row.batch, h, row.i] = len(kept)
    return Lists(idx, cnt)


def attend(
    c: Config,
    q: Array,
    k: Array,
    v: Array,
    lists: Lists | None = None,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
    position_bias: Array | None = None,
) -> Array:
    """
    Exact attention over the listed blocks (None: all). Padded rows and rows with nothing to see are 0.
    position_bias: f32 [Hq, 2P+1], added to the logits by key position - query position, clamped to P.
    """
    batch, heads, q_rows, dim = q.shape
    groups, k_rows = k.shape[1], k.shape[2]
    out = np.zeros(q.shape, dtype)
    for b, h, i in np.ndindex(batch, heads, blocks(q_rows, c.block_q)):
        valid_q, valid_k = int(lengths(q_len, batch, q_rows)[b]), int(lengths(kv_len, batch, k_rows)[b])
        kept: Any = range(blocks(k_rows, c.block_k))
        if lists is not None:
            head = h * lists.idx.shape[1] // heads
            kept = lists.idx[b, head, i, : lists.cnt[b, head, i]]
        rows = np.arange(i * c.block_q, min((i + 1) * c.block_q, valid_q))
        spans = [np.arange(j * c.block_k, min((j + 1) * c.block_k, valid_k)) for j in kept]
        keys = np.concatenate([np.arange(0), *spans])
        if c.causal:
            keys = keys[keys <= c.q_offset + i * c.block_q + len(rows) - 1]
        if not len(rows) or not len(keys):
            continue
        group = h * groups // heads
        logits = (c.scale or dim**-0.5) * (q[b, h, rows].astype(dtype) @ k[b, group, keys].astype(dtype).T)
        distance = keys[None] - (c.q_offset + rows[:, None])
        if position_bias is not None:
            far = position_bias.shape[1] // 2
            logits += position_bias[h, np.clip(distance, -far, far) + far]
        if c.causal:
            logits[distance > 0] = -np.inf
        out[b, h, rows] = softmax(logits) @ v[b, group, keys].astype(dtype)
    return out


def fused(
    c: Config,
    q: Array,
    k: Array,
    v: Array,
    s: Scorer,
    q_len: Array | None = None,
    kv_len: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
    position_bias: Array | None = None,
) -> Array:
    return attend(c, q, k, v, select(c, q, k, s, q_len, kv_len), q_len, kv_len, dtype, position_bias)


def margin(c: Config, mass: Array, forced: Array, theta: float, k_rows: int) -> float:
    """How far this head's nearest decision is from tipping over. Two float32 implementations may differ below 1e-5;
    exactly equal masses do not count, because their order is defined."""
    order = sorted(range(len(mass)), key=lambda x: (not forced[x], -mass[x], x))
    must, kept = int(forced.sum()), len(choose(c, mass, forced, theta, k_rows))
    gaps = []
    if k_rows > c.dense_below and c.rule == THRESHOLD and theta > 0:
        gaps += [abs(float(mass[x]) - float(theta)) for x in order[must:]]
    if k_rows > c.dense_below and c.rule == TOP_P and theta < 1:
        reached = np.cumsum(mass[order])
        gaps += [abs(float(reached[n - 1]) - float(theta)) for n in range(max(must, 1), kept + 1)]
    if 0 < kept < len(mass) and forced[order[kept - 1]] == forced[order[kept]]:
        gaps += [gap] if (gap := float(mass[order[kept - 1]] - mass[order[kept]])) else []
    return min(gaps, default=np.inf)
