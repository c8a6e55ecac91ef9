"""
Block-DSA for compilers without gather and without a custom operator (Core ML): static shapes, fp16, at most four axes.

The kept blocks of each query block are ranked without a sort, and fetched by a product with a one-hot matrix. Its width
is fixed when the program is written, so something must bound how many blocks a head keeps: rule top_k, or `max_blocks`.
Heads that keep about as many share a width; there are at most three (`BUCKETS`).

A layer stays dense where this would be more multiply-adds than dense attention: per head, in units of dense attention,
width / blocks for attending and width / block size for fetching; scoring is left out (under 1 % of it), and so is a
position bias (fetched like keys, as tiles: one for each distance between blocks that it tells apart). It also stays
dense at `dense_below` tokens or fewer. A length that is no multiple of the block is padded to one.

A causal layer differs in its candidates, and in one tile: in its own block a row does not see the keys that follow it.

Same numbers as the definition on valid rows. Rows of padding, which nothing reads, are not zeroed.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import NamedTuple

import torch

from .dsa import Scorer
from .reference import THRESHOLD, TOP_K, Config, blocks as blocks_of

MASKED = -30000.0  # fp16 holds two of it
BUCKETS = 3
Tensor = torch.Tensor


class Bucket(NamedTuple):
    """Heads that fetch the same number of blocks."""

    heads: tuple[int, ...]
    width: int


def form(scorer: Scorer, length: int) -> torch.nn.Module | str:
    """What computes this layer at this length, or why that is dense attention: less work, or all there is."""
    config = scorer.config
    if length <= config.dense_below:
        return f"rows of up to {config.dense_below} tokens are dense"
    if config.block_q != config.block_k:
        return f"blocks of {config.block_q} by {config.block_k} are not square"
    counts = None if config.select_per_kv else _counts(scorer, length)
    if counts is None:
        return "nothing bounds how many blocks each head keeps, as rule top_k or max_blocks would"
    found = buckets(_widths(counts, config, length))
    work = share(found, config, length)
    return Static(scorer, counts, found) if work < 1 else f"it would be {work:.2f} times the work of dense attention"


def share(found: tuple[Bucket, ...], config: Config, length: int) -> float:
    """Multiply-adds of the static form over those of dense attention."""
    heads, count = sum(len(bucket.heads) for bucket in found), blocks_of(length, config.block_k)
    width = _fetched(found) / heads
    return count * config.block_k * width * (config.block_k + count) / length**2


def _counts(scorer: Scorer, length: int) -> tuple[int, ...] | None:
    """How many blocks each head asks for; None where nothing bounds it."""
    config, most = scorer.config, blocks_of(length, scorer.config.block_k)
    theta = scorer.theta.tolist()
    if config.rule == TOP_K:
        asked = [max(int(k), config.min_blocks, 1) for k in theta]
    elif config.rule == THRESHOLD and config.max_blocks and config.min_blocks <= 1:
        asked = [most] * len(theta)
    else:
        return None
    return tuple(min(k, config.max_blocks or k, most) for k in asked)


def _widths(counts: tuple[int, ...], config: Config, length: int) -> tuple[int, ...]:
    """The most blocks each head keeps: those that are forced may be more than it asks for."""
    most = min(config.max_blocks or length, blocks_of(length, config.block_k))
    return tuple(min(max(count, _most_forced(config)), most) for count in counts)


def _most_forced(config: Config) -> int:
    return config.n_sink + config.force_diag


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
        self.scorer, self.buckets, self.least = scorer, found, min(counts)
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [1,H,N,D], k and v [1,Hkv,N,D], lengths [1] or None, position_bias [H, 2P+1] or None."""
        groups, size, given = q.shape[1] // k.shape[1], self.scorer.config.block_k, q.shape[2]
        k, v = (_repeated(x, groups) for x in (k, v))
        valid = _valid(blocks_of(given, size) * size, given, lengths)
        q, k, v = (_whole(x, valid.shape[1]) for x in (q, k, v))
        rank, keep = self._ranked(q, k, valid, causal)
        call = (q, k, v, rank, keep, valid, causal, scale, position_bias)
        parts = [self._attend(bucket, *call) for bucket in self.buckets]
        heads = [head for bucket in self.buckets for head in bucket.heads]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        out = out if heads == sorted(heads) else _picked(out, [heads.index(h) for h in range(len(heads))])
        return out if given == out.shape[2] else out[:, :, :given]

    def _ranked(self, q: Tensor, k: Tensor, valid: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """[H, i, j]: the place of block j in the order of row i, and 1 where it is kept."""
        c, heads = self.scorer.config, q.shape[1]
        blocks = q.shape[2] // c.block_k
        rows = valid.reshape(1, blocks, c.block_k)
        candidate = rows.amax(-1).reshape(1, 1, blocks)
        if causal:
            candidate = candidate * torch.ones(blocks, blocks).tril()[None]
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
        keep = (rank < self._limit(forced)).float() * candidate
        if c.rule == THRESHOLD:
            chosen = (p >= self.scorer.theta.reshape(heads, 1, 1)).float()
            keep = keep * torch.maximum(torch.maximum(chosen, forced), (rank < 1).float())
        return rank, keep

    def _limit(self, forced: Tensor) -> Tensor:
        """How many blocks are kept, by head and where it matters by row: what is forced is, up to `max_blocks`."""
        c = self.scorer.config
        if _most_forced(c) <= self.least or c.rule == THRESHOLD:
            return self.counts
        limit = torch.maximum(self.counts, forced.sum(-1, keepdim=True))
        return limit.clamp(max=c.max_blocks) if c.max_blocks else limit

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
        self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, rank: Tensor, keep: Tensor, valid: Tensor, causal: bool,
        scale: float, position_bias: Tensor | None,
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
        if causal:
            logits = logits + _following(one_hot.reshape(heads, blocks, width, blocks), size)
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


def _following(one_hot: Tensor, size: int) -> Tensor:
    """MASKED where a fetched key follows its row, else 0: [H * blocks, size, width * size]."""
    heads, blocks, width, _ = one_hot.shape
    own = (one_hot * torch.eye(blocks).reshape(1, blocks, 1, blocks)).sum(-1).reshape(heads * blocks, 1, width, 1)
    tile = torch.ones(size, size).triu(1).reshape(1, size, 1, size) * MASKED
    return (own * tile).reshape(heads * blocks, size, width * size)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each query head sees its kv head."""
    return x if groups == 1 else _picked(x, [head // groups for head in range(x.shape[1] * groups)])


def _picked(x: Tensor, heads: tuple[int, ...] | list[int]) -> Tensor:
    """Heads of [1, H, ...] in another order; slices, which the Neural Engine has."""
    if list(heads) == list(range(x.shape[1])):
        return x
    return torch.cat([x[:, head : head + 1] for head in heads], 1)


def _valid(rows: int, given: int, lengths: Tensor | None) -> Tensor:
    """[1, rows], 0 for padding: what follows the `given` rows is."""
    most = torch.full((1, 1), given) if lengths is None else lengths.reshape(1, 1)
    return (torch.arange(rows)[None] < most).float()


def _whole(x: Tensor, rows: int) -> Tensor:
    """[1,H,N,D] with rows of zeros behind it."""
    return x if x.shape[2] == rows else torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[2]))


def _pooled(x: Tensor, rows: Tensor) -> Tensor:
    """Mean over the valid rows of each block: [H, blocks, D]."""
    _, heads, _, dim = x.shape
    blocks, size = rows.shape[1:]
    total = (x.reshape(heads, blocks, size, dim) * rows.reshape(1, blocks, size, 1)).sum(2)
    return total / rows.sum(-1).clamp(min=1).reshape(1, blocks, 1)
