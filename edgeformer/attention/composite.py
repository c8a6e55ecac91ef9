"""
Block-DSA in torch's standard operators: rule 0 as a masked dense attention, for static shapes and for symbolic ones.

What a runtime computes that has no library of ours. Where lengths are static it is written for LiteRT's XNNPACK: at
most five axes, no mask of the size of the scores except a causal one, sizes padded to whole blocks inside. Where they
are symbols the number of blocks is that of the longest axis, for every length: one symbol is then the only one, and a
tool chain that passes over a graph again and again reasons about nothing else. The same numbers as the definition, at
dense cost. One difference is left: a NaN in a token that was not kept reaches the rows that did not look at it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .reference import LAST_ROWS

Tensor = torch.Tensor
OUT, FAR = -1e30, 1e9  # beyond any logit; beyond any position
NO_SCORE = -3.2e38  # NaN and -inf are not above it


class Blocks(NamedTuple):
    """One axis of tokens in blocks: how many, how long, and which rows are valid."""

    number: int
    size: int
    valid: Tensor  # (batch, tokens), float 0 or 1
    rows: Tensor  # (batch, number): valid rows of each block
    start: Tensor  # (number): position of the first row
    of: Tensor | None  # (tokens): the block each is in, int32; None where the tokens fill their blocks


def inexpressible(*, rule: int = 0, min_blocks: int = 1, max_blocks: int = 0) -> str | None:
    """What this form cannot say; None if it can."""
    if rule or max_blocks or min_blocks > 1:
        return (
            "DSA in standard operators is rule 0 without clamps; "
            f"got rule={rule}, min_blocks={min_blocks}, max_blocks={max_blocks}"
        )
    return None


def dsa(
    q: Tensor,  # (batch, heads, rows, dim)
    k: Tensor,
    v: Tensor,
    wq: Tensor,
    wk: Tensor,
    dist_bias: Tensor,
    sink_bias: Tensor,
    theta: Tensor,
    q_len: Tensor,
    kv_len: Tensor,
    position_bias: Tensor | None = None,
    *,
    block_q: int = 64,
    block_k: int = 64,
    min_blocks: int = 1,
    force_diag: int = 1,
    n_sink: int = 0,
    causal: int = 0,
    q_offset: int = 0,
    select_per_kv: int = 0,
    dense_below: int = 0,
    scale: float = 0.0,
    longest: int = 0,
) -> Tensor:
    """`longest`: most rows of q or k where their number is a symbol. The other names are the operator's."""
    batch, heads, rows, dim = q.shape
    groups, k_rows = k.shape[1:3]
    q_offset = k_rows - rows if q_offset == LAST_ROWS else q_offset
    a, b = _blocks(rows, block_q, q_len, longest), _blocks(k_rows, block_k, kv_len, longest)
    q, k, v = _clean(q, a), _heads(_clean(k, b), heads), _heads(_clean(v, b), heads)
    candidate, last, first = _candidates(a, b, kv_len, causal, q_offset)
    z = _scores(_pooled(q, a) @ wq[None], _pooled(k, b) @ wk[None], dist_bias, sink_bias, a, b, q_offset)
    mass = _mass(z, candidate)
    if select_per_kv:
        mass = mass.reshape(batch, groups, heads // groups, a.number, b.number).mean(2, keepdim=True)
        mass = mass.expand(batch, groups, heads // groups, a.number, b.number).reshape(batch, heads, a.number, b.number)
        theta = theta[:, None].expand(groups, heads // groups).reshape(heads)
    keep = (mass >= theta.reshape(1, heads, 1, 1)).to(q.dtype)
    if force_diag:
        ends = (b.start + block_k).reshape(1, 1, 1, -1)
        keep = torch.maximum(keep, ((b.start.reshape(1, 1, 1, -1) <= last) & (ends > first)).to(q.dtype))
    if n_sink:
        keep = torch.maximum(keep, (b.start < n_sink * block_k).to(q.dtype).reshape(1, 1, 1, -1))
    keep = _all_if_short(keep, k_rows, dense_below) * candidate
    # With its own block kept, a valid row has one: there is nothing to make up for.
    own = bool(force_diag) and q_len is kv_len and isinstance(q_offset, int) and not q_offset
    if min_blocks and not own:
        keep = torch.maximum(keep, _heaviest(mass, candidate, b) * (1 - keep.amax(-1, keepdim=True)))
    biased = None if position_bias is None else _by_distance(position_bias, q.shape[2], k.shape[2], q_offset)
    out = _attend(q * (scale or dim**-0.5), k, v, keep, a, b, q_offset if causal else None, biased)
    out = out * (a.valid[:, None, :, None] if own else _used(keep, a, b, q_offset if causal else None))
    return out if longest else out[:, :, :rows]


def _blocks(rows: int, size: int, length: Tensor, longest: int) -> Blocks:
    whole = not longest
    number = (rows + size - 1) // size if whole or isinstance(rows, int) else -(-longest // size)
    t = torch.arange(number * size if whole else rows, dtype=torch.float32)
    start = torch.arange(number, dtype=torch.float32) * size
    end = length.to(torch.float32).clamp(max=rows)[:, None]
    valid = (t[None] < end).to(torch.float32)
    of = None if whole else (t / size).to(torch.int32)
    return Blocks(number, size, valid, (end - start).clamp(0, size), start, of)


def _clean(x: Tensor, blocks: Blocks) -> Tensor:
    """Whole blocks where blocks are whole; padding, which may hold anything, is 0."""
    if blocks.of is None:
        x = pad(x, (0, 0, 0, blocks.number * blocks.size - x.shape[2]))
    valid = blocks.valid[:, None, :, None].expand(x.shape)  # one for all layers, where a runtime broadcasts slowly
    return torch.where(valid > 0, x, torch.zeros_like(x))


def _heads(x: Tensor, heads: int) -> Tensor:
    """Each query head sees its kv head."""
    batch, groups, rows, dim = x.shape
    if groups == heads:
        return x
    return x[:, :, None].expand(batch, groups, heads // groups, rows, dim).reshape(batch, heads, rows, dim)


def _pooled(x: Tensor, blocks: Blocks) -> Tensor:
    batch, heads, _, dim = x.shape
    if blocks.of is None:
        total = x.reshape(batch, heads, blocks.number, blocks.size, dim).sum(3)
    else:
        inside = (blocks.of == torch.arange(blocks.number, dtype=torch.int32)[:, None]).to(x.dtype)
        total = _product(inside.expand(batch, heads, -1, -1), x)
    return total / blocks.rows.clamp(min=1).reshape(batch, 1, blocks.number, 1)


def _candidates(a: Blocks, b: Blocks, kv_len: Tensor, causal: int, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, 1, i, j) as 0 or 1, and the first and last position of each query block."""
    first = (a.start + offset).reshape(1, 1, -1, 1)
    last = first + a.rows.reshape(-1, 1, a.number, 1) - 1
    start = b.start.reshape(1, 1, 1, -1)
    candidate = start < kv_len.to(torch.float32).reshape(-1, 1, 1, 1)
    if causal:
        candidate = candidate & (start <= last)
    return candidate.to(torch.float32).expand(-1, 1, a.number, b.number), last, first


def _scores(zq: Tensor, zk: Tensor, dist_bias: Tensor, sink_bias: Tensor, a: Blocks, b: Blocks, offset: int) -> Tensor:
    reach = dist_bias.shape[1] // 2
    here = torch.floor((a.start + (offset + 0.5)) / b.size)  # floats: an integer division becomes ten operators
    j = torch.arange(b.number, dtype=torch.float32)
    at = ((j[None] - here[:, None]).clamp(-reach, reach) + reach).to(torch.int32)
    sink = pad(sink_bias, (0, b.number))[:, : b.number]
    # Not a flat list of a.number * b.number places: folded back, its sizes have bounds that ExecuTorch plans too small.
    distance = torch.nn.functional.embedding(at, dist_bias.T).permute(2, 0, 1)[None]
    return _product(zq, zk.transpose(-1, -2)) + distance + sink[None, :, None]


def _all_if_short(keep: Tensor, rows: int | torch.SymInt, dense_below: int) -> Tensor:
    """
    The length may be a symbol while a graph of any length is traced: no branch then, which would fix it. What was
    scored stays in the graph: a converter drops operands that nobody reads.
    """
    if not dense_below:
        return keep
    if isinstance(rows, int):
        return torch.maximum(keep, torch.ones_like(keep)) if rows <= dense_below else keep
    return torch.maximum(keep, (torch.ones(rows).sum() <= dense_below).to(keep.dtype))


def _mass(z: Tensor, candidate: Tensor) -> Tensor:
    scored = (z > NO_SCORE).to(z.dtype) * candidate
    z = torch.where(scored > 0, z.clamp(max=3e38), torch.full_like(z, -3e38))
    return z.softmax(-1) * scored


def _first(keep: Tensor, b: Blocks) -> Tensor:
    """Where the first kept block starts; FAR if there is none."""
    return torch.where(keep > 0, b.start.reshape(1, 1, 1, -1), torch.full_like(keep, FAR)).amin(-1, keepdim=True)


def _heaviest(mass: Tensor, candidate: Tensor, b: Blocks) -> Tensor:
    """1 for the candidate with most mass, the first of equals."""
    top = (mass >= mass.amax(-1, keepdim=True)).to(mass.dtype) * candidate
    return (b.start.reshape(1, 1, 1, -1) == _first(top, b)).to(mass.dtype)


def _used(keep: Tensor, a: Blocks, b: Blocks, offset: int | None) -> Tensor:
    """(batch, heads, tokens, 1): 1 for a valid row that may look at a token of a kept block."""
    valid = a.valid[:, None, :, None]
    if offset is None:
        return _of_tokens(keep.amax(-1, keepdim=True), a) * valid
    t = torch.arange(a.valid.shape[1], dtype=torch.float32)[:, None] + offset
    return (_of_tokens(_first(keep, b), a) <= t).to(keep.dtype) * valid


def _of_tokens(x: Tensor, a: Blocks) -> Tensor:
    """(batch, heads, blocks, n) -> (batch, heads, tokens, n)"""
    if a.of is not None:
        return x.index_select(2, a.of)
    batch, heads, _, n = x.shape
    return x[:, :, :, None].expand(batch, heads, a.number, a.size, n).reshape(batch, heads, a.number * a.size, n)


def _by_distance(position_bias: Tensor, rows: int, k_rows: int, offset: int) -> Tensor:
    """(1, heads, rows, k_rows): what each logit gets."""
    far = position_bias.shape[1] // 2
    t, u = (torch.arange(n, dtype=torch.float32) for n in (rows, k_rows))
    at = ((u[None] - (t + offset)[:, None]).clamp(-far, far) + far).to(torch.int32)
    return torch.nn.functional.embedding(at, position_bias.T).permute(2, 0, 1)[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, a: Blocks, b: Blocks, offset: int | None, biased: Tensor | None
) -> Tensor:
    """`offset` is the position of row 0 in a causal attention; `biased` is added to the logits."""
    outside = ((1 - b.valid) * OUT)[:, None, None]
    logits = _logits(_product(q, k.transpose(-1, -2)), (1 - keep) * OUT, outside, a, b)
    if biased is not None:
        logits = logits + biased
    if offset is not None:
        future = torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None] + offset
        logits = logits + torch.where(future, OUT, 0.0)
    return _product(logits.softmax(-1), v)


def _logits(logits: Tensor, bias: Tensor, outside: Tensor, a: Blocks, b: Blocks) -> Tensor:
    """Adds each block's bias to its tokens' logits (to whole blocks in five axes), and that of keys in the padding."""
    if a.of is not None and b.of is not None:  # whole rows are copied last, and nothing of that size is broadcast
        return logits + (bias.index_select(3, b.of) + outside).index_select(2, a.of)
    batch, heads, rows, keys = logits.shape
    all_ = batch * heads
    parts = logits.reshape(all_, a.number, a.size, b.number, b.size) + bias.reshape(all_, a.number, 1, b.number, 1)
    return parts.reshape(batch, heads, rows, keys) + outside


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(batch, heads, n, m) @ (batch, heads, m, p), without the copies of its operands that `matmul` exports."""
    batch, heads, n, m = a.shape
    p = b.shape[3]
    return torch.bmm(a.reshape(batch * heads, n, m), b.reshape(batch * heads, m, p)).reshape(batch, heads, n, p)
