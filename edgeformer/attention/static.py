"""
Block-DSA for compilers without gather and without a custom operator (Core ML): static shapes, fp16, at most four axes.

The kept blocks of each query block are ranked without a sort, and fetched by a product with a one-hot matrix. Its width
is fixed when the program is written, so something must bound how many blocks a head keeps: rule top_k, or `max_blocks`.
Heads that keep about as many share a width; there are at most three (`BUCKETS`).

A layer stays dense where this would be more multiply-adds than dense attention: per head, in units of dense attention,
width / blocks for attending and width / block size for fetching; scoring is left out (under 1 % of it), and so is a
position bias (fetched like keys, as tiles: one for each distance between blocks that it tells apart). It also stays
dense at `dense_below` tokens or fewer, with a causal mask, or where a length is no multiple of the block.

Same numbers as the definition on valid rows. Rows of padding, which nothing reads, are not zeroed.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import NamedTuple

import torch

from .dsa import Scorer
from .reference import THRESHOLD, TOP_K, Config

MASKED = -30000.0  # fp16 holds two of it
BUCKETS = 3
CAUSAL = "this form has no causal mask"
Tensor = torch.Tensor


class Bucket(NamedTuple):
    """Heads that fetch the same number of blocks."""

    heads: tuple[int, ...]
    width: int


def form(scorer: Scorer, length: int, causal: bool) -> torch.nn.Module | str:
    """What computes this layer at this length, or why that is dense attention: less work, or all there is."""
    config = scorer.config
    if causal or config.causal:
        return CAUSAL
    if length <= config.dense_below:
        return f"rows of up to {config.dense_below} tokens are dense"
    if length % config.block_k or config.block_q != config.block_k:
        return f"{length} tokens are not in whole blocks of {config.block_q} by {config.block_k}"
    counts = None if config.select_per_kv else _counts(scorer, length)
    if counts is None:
        return "nothing bounds how many blocks each head keeps, as rule top_k or max_blocks would"
    found = buckets(counts)
    work = share(found, config, length)
    return Static(scorer, counts, found) if work < 1 else f"it would be {work:.2f} times the work of dense attention"


def share(found: tuple[Bucket, ...], config: Config, length: int) -> float:
    """Multiply-adds of the static form over those of dense attention."""
    heads = sum(len(bucket.heads) for bucket in found)
    width = sum(len(bucket.heads) * bucket.width for bucket in found) / heads
    return width * config.block_k / length + width / config.block_k


def _counts(scorer: Scorer, length: int) -> tuple[int, ...] | None:
    """The most blocks each head keeps; None where nothing bounds it."""
    config, blocks = scorer.config, length // scorer.config.block_k
    theta = scorer.theta.tolist()
    if config.rule == TOP_K:
        asked = [max(int(k), config.min_blocks, 1) for k in theta]
    elif config.rule == THRESHOLD and config.max_blocks and config.min_blocks <= 1:
        asked = [blocks] * len(theta)
    else:
        return None
    return tuple(min(k, config.max_blocks or k, blocks) for k in asked)


def buckets(counts: tuple[int, ...]) -> tuple[Bucket, ...]:
    """At most BUCKETS groups of heads with the least fetched in all; each is as wide as its largest count."""
    order = sorted(range(len(counts)), key=lambda head: counts[head])
    best: tuple[Bucket, ...] = (Bucket(tuple(order), counts[order[-1]]),)
    for parts in range(2, BUCKETS + 1):
        for cuts in combinations(range(1, len(order)), parts - 1):
            edges = (0, *cuts, len(order))
            groups = [order[a:b] for a, b in pairwise(edges)]
            tried = tuple(Bucket(tuple(heads), counts[heads[-1]]) for heads in groups)
            if _fetched(tried) < _fetched(best):
                best = tried
    return best


def _fetched(found: tuple[Bucket, ...]) -> int:
    return sum(len(bucket.heads) * bucket.width for bucket in found)


class Static(torch.nn.Module):
    """One layer with its scorer's values; called like `dsa.Scorer`."""

    counts: Tensor

    def __init__(self, scorer: Scorer, counts: tuple[int, ...], found: tuple[Bucket, ...]) -> None:
        super().__init__()
        self.scorer, self.buckets = scorer, found
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,  # noqa: ARG002
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [1,H,N,D], k and v [1,Hkv,N,D], lengths [1] or None, position_bias [H, 2P+1] or None."""
        groups = q.shape[1] // k.shape[1]
        k, v = (_repeated(x, groups) for x in (k, v))
        valid = _valid(q.shape[2], lengths)
        rank, keep = self._ranked(q, k, valid)
        given = (q, k, v, rank, keep, valid, scale, position_bias)
        parts = [self._attend(bucket, *given) for bucket in self.buckets]
        heads = [head for bucket in self.buckets for head in bucket.heads]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out if heads == sorted(heads) else _picked(out, [heads.index(h) for h in range(len(heads))])

    def _ranked(self, q: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """[H, i, j]: the place of block j in the order of row i, and 1 where it is kept."""
        c, heads = self.scorer.config, q.shape[1]
        blocks = q.shape[2] // c.block_k
        rows = valid.reshape(1, blocks, c.block_k)
        candidate = rows.amax(-1).reshape(1, 1, blocks)
        z = _pooled(q, rows) @ self.scorer.wq @ (_pooled(k, rows) @ self.scorer.wk).transpose(-1, -2)
        z = z + self._bias(blocks)
        p = (z + (1 - candidate) * MASKED).softmax(-1)
        forced = self._forced(blocks) * candidate
        # Candidates first, the forced before all. In brackets: p + 1 would leave fp16 a step of 0.001, and many ties.
        order = (p + 2 * forced) * candidate + (candidate - 1)
        mine, other = order.reshape(heads * blocks, blocks, 1), order.reshape(heads * blocks, 1, blocks)
        earlier = torch.ones(blocks, blocks).tril(-1)[None]  # of equals the smaller number goes first
        ahead = (other > mine).float() + (other == mine).float() * earlier
        rank = ahead.sum(-1).reshape(heads, blocks, blocks)
        keep = (rank < self.counts).float() * candidate
        if c.rule == THRESHOLD:
            chosen = (p >= self.scorer.theta.reshape(heads, 1, 1)).float()
            keep = keep * torch.maximum(torch.maximum(chosen, forced), (rank < 1).float())
        return rank, keep

    def _bias(self, blocks: int) -> Tensor:
        """What distance and sink add, a constant [H, i, j]."""
        reach, sinks = self.scorer.dist_bias.shape[1] // 2, min(self.scorer.sink_bias.shape[1], blocks)
        i, j = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
        added = self.scorer.dist_bias[:, ((j - i).clamp(-reach, reach) + reach).reshape(-1)]
        added = added.reshape(-1, blocks, blocks)
        sink = torch.nn.functional.pad(self.scorer.sink_bias[:, :sinks], (0, blocks - sinks))
        return added + sink[:, None]

    def _forced(self, blocks: int) -> Tensor:
        c = self.scorer.config
        forced = torch.eye(blocks) * c.force_diag
        return torch.maximum(forced, (torch.arange(blocks) < c.n_sink).float()[None])[None]

    def _attend(
        self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, keep: Tensor, valid: Tensor, scale: float,
        position_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The heads of one bucket, [1, heads, N, D]."""
        size, dim, heads = self.scorer.config.block_k, q.shape[3], len(bucket.heads)
        blocks, width = q.shape[2] // size, bucket.width
        q, k, v = (_picked(x, bucket.heads) for x in (q, k, v))
        rank, keep = (_picked(x[None], bucket.heads)[0] for x in (rank, keep))
        slots = torch.arange(width, dtype=torch.float32).reshape(1, width, 1)
        shape = (heads * blocks, 1, blocks)
        one_hot = (rank.reshape(shape) == slots).float() * keep.reshape(shape)
        one_hot = one_hot.reshape(heads, blocks * width, blocks)
        fetched = [(one_hot @ x.reshape(heads, blocks, size * dim)).reshape(-1, width * size, dim) for x in (k, v)]
        seen = (one_hot @ valid.reshape(1, blocks, size)).reshape(-1, 1, width * size)
        logits = q.reshape(-1, size, dim) * (scale or dim**-0.5) @ fetched[0].transpose(-1, -2)
        if position_bias is not None:
            table = _picked(position_bias[None], bucket.heads)[0]
            logits = logits + _by_distance(table, one_hot.reshape(heads, blocks, width, blocks), size)
        return ((logits + (1 - seen) * MASKED).softmax(-1) @ fetched[1]).reshape(1, heads, blocks * size, dim)


def _by_distance(table: Tensor, one_hot: Tensor, size: int) -> Tensor:
    """What `table` [H, 2P+1] adds to each row's logits against the fetched blocks: [H * blocks, size, width * size]."""
    far, (heads, blocks, width, _) = table.shape[1] // 2, one_hot.shape
    most = min(-(-(far + size - 1) // size), blocks - 1)  # blocks further apart get one value, that of P
    t = torch.arange(size)
    apart = torch.arange(-most, most + 1)[:, None, None] * size + t[None, None] - t[None, :, None]
    tiles = table[:, (apart.clamp(-far, far) + far).reshape(-1)].reshape(heads, 2 * most + 1, size * size)
    i, j = torch.arange(blocks)[:, None, None], torch.arange(blocks)[None, :, None]
    which = ((j - i).clamp(-most, most) + most == torch.arange(2 * most + 1)).float()
    wanted = (one_hot @ which[None]).reshape(heads, blocks * width, 2 * most + 1)
    found = (wanted @ tiles).reshape(heads * blocks, width, size, size)
    return found.transpose(1, 2).reshape(heads * blocks, size, width * size)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each query head sees its kv head."""
    return x if groups == 1 else _picked(x, [head // groups for head in range(x.shape[1] * groups)])


def _picked(x: Tensor, heads: tuple[int, ...] | list[int]) -> Tensor:
    """Heads of [1, H, ...] in another order; slices, which the Neural Engine has."""
    if list(heads) == list(range(x.shape[1])):
        return x
    return torch.cat([x[:, head : head + 1] for head in heads], 1)


def _valid(rows: int, lengths: Tensor | None) -> Tensor:
    """[1, N], 0 for padding."""
    if lengths is None:
        return torch.ones(1, rows)
    return (torch.arange(rows)[None] < lengths.reshape(1, 1)).float()


def _pooled(x: Tensor, rows: Tensor) -> Tensor:
    """Mean over the valid rows of each block: [H, blocks, D]."""
    _, heads, _, dim = x.shape
    blocks, size = rows.shape[1:]
    total = (x.reshape(heads, blocks, size, dim) * rows.reshape(1, blocks, size, 1)).sum(2)
    return total / rows.sum(-1).clamp(min=1).reshape(1, blocks, 1)
