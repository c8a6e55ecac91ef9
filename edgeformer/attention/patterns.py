"""
What sparse attention is compared with: other ways to choose blocks, and other attentions, behind one interface.

A pattern is what `swap.replaced` takes: a function of a layer that gives its attention module, called like
`dsa.Scorer.forward`. Each module counts what it read, so that rows of a table can be held to the same kept fraction:

    pattern = patterns.local(stats, budget=0.5)
    with swap.replaced(model, pattern):
        model(**row)
    pattern.tally.kept                      # fraction of the candidates, measured

Block patterns run through `edgeformer::dsa_attend`, so they differ in their lists and in nothing else. Performer,
Linformer and Reformer were made for models trained with them: on a frozen model they show what a drop-in costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ..errors import BadInput
from . import dsa, op, scorer, swap
from .op import Parameters
from .reference import TOP_K, Config, blocks

Tensor = torch.Tensor


@dataclass
class Tally:
    read: float = 0
    candidates: float = 0

    @property
    def kept(self) -> float | None:
        """Fraction read of what dense attention reads; None before the first run."""
        return self.read / self.candidates if self.candidates else None

    def add(self, read: float, candidates: float) -> None:
        self.read, self.candidates = self.read + read, self.candidates + candidates


@dataclass(frozen=True)
class Pattern:
    make: Callable[[swap.Layer, Tally], torch.nn.Module]
    tally: Tally = field(default_factory=Tally)

    def __call__(self, layer: swap.Layer) -> torch.nn.Module:
        return self.make(layer, self.tally)


# --- choosing blocks --------------------------------------------------------------------------------------------------

# Given q, k, lengths and position bias: which blocks to keep, [B or 1, H, nQ, nK] bool.
Choose = Callable[[Config, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


class _Blocks(torch.nn.Module):
    """Attention over chosen blocks, through the lists of the operator."""

    def __init__(self, choose: Choose, config: Config, tally: Tally) -> None:
        super().__init__()
        self.choose, self.config, self.tally = choose, config, tally

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        c, (q_len, kv_len) = dsa.masked(self.config, q, k, lengths, causal)
        nq, nk = blocks(q.shape[2], c.block_q), blocks(k.shape[2], c.block_k)
        seen = dsa.plan(c, q.shape[0], nq, nk, dsa.full_lengths(q, q_len), dsa.full_lengths(k, kv_len)).candidates
        kept = self.choose(c, q, k, lengths, position_bias) & seen
        self.tally.add(int(kept.sum()), int(seen.expand_as(kept).sum()))
        attributes = op.attention(c)
        out: Tensor = torch.ops.edgeformer.dsa_attend(
            q, k, v, *dsa.to_lists(kept), q_len, kv_len, position_bias, **attributes, scale=scale
        )
        return out


def _fixed(stats: scorer.Statistics, kept: Tensor) -> Pattern:
    """The same lists [L, H, nQ, nK] for every input; shorter ones use the upper left part."""

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        def choose(c: Config, q: Tensor, k: Tensor, *_: Tensor | None) -> Tensor:
            nq, nk = blocks(q.shape[2], c.block_q), blocks(k.shape[2], c.block_k)
            if nq > kept.shape[2] or nk > kept.shape[3]:
                raise BadInput(f"a fixed pattern for {kept.shape[3]} blocks cannot serve {nk}")
            return kept[layer.number, None, :, :nq, :nk].expand(q.shape[0], -1, -1, -1)

        return _Blocks(choose, stats.config, tally)

    return Pattern(make)


def dense(stats: scorer.Statistics) -> Pattern:
    return _fixed(stats, torch.ones(stats.mass.shape[1:], dtype=torch.bool))


def static(stats: scorer.Statistics, budget: float) -> Pattern:
    """The calibrated static mask: each head's mean block mass over the training rows, one threshold for all."""
    mean = stats.mass.mean(0, keepdim=True).expand_as(stats.mass)
    theta = scorer.settle(stats, mean, budget).theta
    whole = stats.of(stats.lengths.argmax()[None])
    return _fixed(stats, dsa.choose(stats.config, mean[:1], whole.plan, theta, 0)[0])


def _ranked(stats: scorer.Statistics, order: Tensor, budget: float) -> Tensor:
    """The first blocks by `order` [..., nQ, nK], high first; as many a row as the budget says, at least one."""
    candidates = stats.of(stats.lengths.argmax()[None]).plan.candidates[0, 0, 0]
    rank = torch.sort(torch.where(candidates, order, -torch.inf), dim=-1, descending=True, stable=True)[1].argsort(-1)
    count = (candidates.sum(-1) * budget).round().clamp(min=1)
    return candidates & (rank < count[:, None])


def _distance(stats: scorer.Statistics) -> Tensor:
    nq, nk = stats.mass.shape[-2:]
    c = stats.config
    return (torch.arange(nk) - (torch.arange(nq) * c.block_q // c.block_k)[:, None]).abs().float()


def local(stats: scorer.Statistics, budget: float) -> Pattern:
    """A window around the diagonal (Longformer)."""
    return _fixed(stats, _ranked(stats, -_distance(stats), budget).expand(stats.mass.shape[1:]))


def sink_local(stats: scorer.Statistics, budget: float) -> Pattern:
    """A window and the first block (StreamingLLM)."""
    order = -_distance(stats)
    order[:, 0] = -0.5
    return _fixed(stats, _ranked(stats, order, budget).expand(stats.mass.shape[1:]))


def bigbird(stats: scorer.Statistics, budget: float, seed: int = 0) -> Pattern:
    """Window of one block to each side, a global first block (row and column), random blocks up to the budget."""
    shape = stats.mass.shape[1:]
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    order = order + (2 - _distance(stats)).clamp(min=0) * 2
    order[..., 0] += 3
    nq, nk = shape[2:]
    whole = stats.of(stats.lengths.argmax()[None]).plan.candidates[0, 0, 0]
    if stats.config.causal:
        return _fixed(stats, _ranked(stats, order, budget))
    # The global row is full; the others pay for it.
    rest = max((budget * int(whole.sum()) - nk) / max(int(whole.sum()) - nk, 1), 1 / nk)
    kept = _ranked(stats, order, rest)
    kept[..., 0, :] = whole[0]
    assert kept.shape[2] == nq
    return _fixed(stats, kept)


class _Scored(torch.nn.Module):
    """The operator itself, counted."""

    def __init__(self, inner: dsa.Scorer, tally: Tally) -> None:
        super().__init__()
        self.inner, self.tally = inner, tally

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        before = op.counters()
        out: Tensor = self.inner(q, k, v, lengths, causal, scale, position_bias)
        after = op.counters()
        self.tally.add(after.kept - before.kept, after.candidates - before.candidates)
        return out


def scored(parameters: Parameters, config: Config, compute: int = 0) -> Pattern:
    """`edgeformer::dsa` with parameters stacked over layers, theta included."""

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        return _Scored(dsa.Scorer(scorer.one_layer(parameters, layer.number), config, compute), tally)

    return Pattern(make)


def learned(
    stats: scorer.Statistics, parameters: Parameters, budget: float, *, per_head: bool = False, compute: int = 0
) -> Pattern:
    """Calibrated on the rows that `scorer.train` holds out of these statistics."""
    found = scorer.calibrate(stats.split()[1], parameters, budget, per_head=per_head)
    return scored(parameters._replace(theta=found.theta), stats.config, compute)


def top_k(stats: scorer.Statistics, parameters: Parameters, share: float) -> Pattern:
    """A fixed count for every row and head: `share` of the blocks, rounded up (1 - the paper's sparsity)."""
    count = -(-round(share * stats.mass.shape[-1] * 1000) // 1000)
    theta = torch.full(stats.mass.shape[1:3], float(count))
    return scored(parameters._replace(theta=theta), replace(stats.config, rule=TOP_K))


def pooled(stats: scorer.Statistics, budget: float) -> Pattern:
    """Without a learned scorer: block mean against block mean."""
    layers, heads, dim = stats.qm.shape[1], stats.qm.shape[2], stats.qm.shape[4]
    flat = dsa.pooled(layers * heads, dim)
    return learned(stats, Parameters(*(x.reshape(layers, heads, *x.shape[1:]) for x in flat)), budget)


def oracle(stats: scorer.Statistics, budget: float) -> Pattern:
    """The true block mass under the same rule: what a perfect scorer would reach. Costs more than dense."""
    theta = scorer.calibrated_on(stats, budget)

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        def choose(c: Config, q: Tensor, k: Tensor, lengths: Tensor | None, bias: Tensor | None) -> Tensor:
            mass = torch.zeros(*q.shape[:2], blocks(q.shape[2], c.block_q), blocks(k.shape[2], c.block_k))
            valid = dsa.full_lengths(k, lengths)
            for b, n in enumerate(valid.tolist()):
                unused = torch.zeros_like(q[b, :, :n])
                here = mass[b, :, : blocks(n, c.block_q), : blocks(n, c.block_k)]
                shown = (q[b, :, :n], k[b, :, :n], k[b, :, :n])
                scorer.dense_with_mass(c, *shown, q.shape[3] ** -0.5, unused, here, bias)
            plan = dsa.plan(c, q.shape[0], mass.shape[2], mass.shape[3], valid, valid)
            return dsa.choose(c, mass, plan, theta[layer.number], 0)

        return _Blocks(choose, stats.config, tally)

    return Pattern(make)


# --- other attentions -------------------------------------------------------------------------------------------------


def _bidirectional(layer: swap.Layer, name: str) -> None:
    if layer.causal:
        raise BadInput(f"{name} is compared on encoders only: this model is causal")
    if layer.biased:
        raise BadInput(f"{name} has no logits that this model could add its position bias to")


class _Performer(torch.nn.Module):
    def __init__(self, dim: int, features: int, seed: int, tally: Tally) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        square = [torch.linalg.qr(torch.randn(dim, dim, generator=random))[0] for _ in range(blocks(features, dim))]
        norms = torch.randn(features, dim, generator=random).norm(dim=1, keepdim=True)
        self.directions, self.tally = torch.cat(square)[:features] * norms, tally

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, _causal: bool, scale: float) -> Tensor:
        half = (scale or q.shape[3] ** -0.5) ** 0.5
        q, k, v = q * half, k * half, dsa.only_valid(v, lengths)
        fq, fk = (x @ self.directions.T - x.square().sum(-1, keepdim=True) / 2 for x in (q, k))
        fq = torch.exp(fq - fq.amax(-1, keepdim=True))
        fk = dsa.only_valid(torch.exp(fk - fk.amax((-1, -2), keepdim=True)), lengths)
        self.tally.add(min(len(self.directions) / q.shape[2], 1), 1)
        return (fq @ (fk.mT @ v)) / (fq @ fk.sum(2)[..., None]).clamp(min=1e-12)


def performer(features: int = 256, seed: int = 0) -> Pattern:
    """Linear attention with positive orthogonal random features (FAVOR+). Its kept fraction is features / tokens."""

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        _bidirectional(layer, "Performer")
        return _Performer(layer.dim, features, seed, tally)

    return Pattern(make)


class _Linformer(torch.nn.Module):
    def __init__(self, share: float, tally: Tally) -> None:
        super().__init__()
        self.share, self.tally = share, tally

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, _causal: bool, scale: float) -> Tensor:
        n = k.shape[2]
        count = max(round(n * self.share), 1)
        valid = dsa.full_lengths(k, lengths)[:, None]
        t = torch.arange(n)
        segment = torch.where(t < valid, (t * count).div(valid.clamp(min=1), rounding_mode="floor"), count)
        project = (segment[:, None] == torch.arange(count)[:, None]).to(k.dtype)  # [B, count, N]
        size = project.sum(-1, keepdim=True)
        project = (project / size.clamp(min=1))[:, None]
        z = (q @ (project @ dsa.only_valid(k, lengths)).mT) * (scale or q.shape[3] ** -0.5)
        z = z.masked_fill((size == 0)[:, None].mT, -torch.inf)
        self.tally.add(count / n, 1)
        return torch.softmax(z, -1) @ (project @ dsa.only_valid(v, lengths))


def linformer(share: float) -> Pattern:
    """Keys and values projected to `share` of the tokens, here by segment means: a frozen model has no learned ones."""

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        _bidirectional(layer, "Linformer")
        return _Linformer(share, tally)

    return Pattern(make)


class _Hashed(torch.nn.Module):
    def __init__(self, dim: int, buckets: int, rounds: int, seed: int, tally: Tally) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.rotations = torch.randn(rounds, 1, 1, dim, max(buckets // 2, 1), generator=random)
        self.tally = tally

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, _causal: bool, scale: float) -> Tensor:
        hashed = []
        for x in (q, k):
            turned = torch.nn.functional.normalize(dsa.only_valid(x, lengths), dim=-1) @ self.rotations
            hashed.append(torch.cat([turned, -turned], -1).argmax(-1))  # [rounds, B, H, N]
        same = (hashed[0][..., :, None] == hashed[1][..., None, :]).any(0)
        same = same | torch.eye(q.shape[2], dtype=torch.bool)
        valid = torch.arange(k.shape[2]) < dsa.full_lengths(k, lengths)[:, None]
        seen = same & valid[:, None, None] & valid[:, None, :, None]
        self.tally.add(float(seen.sum()), float(q.shape[1] * valid.sum(-1).square().sum()))
        z = (dsa.only_valid(q, lengths) @ dsa.only_valid(k, lengths).mT) * (scale or q.shape[3] ** -0.5)
        return dsa.softmax(z.masked_fill(~seen, -torch.inf)) @ dsa.only_valid(v, lengths)


def lsh(buckets: int, rounds: int = 1, seed: int = 0) -> Pattern:
    """Tokens whose query and key fall into one bucket (Reformer; without its shared queries and keys)."""

    def make(layer: swap.Layer, tally: Tally) -> torch.nn.Module:
        _bidirectional(layer, "Reformer")
        return _Hashed(layer.dim, buckets, rounds, seed, tally)

    return Pattern(make)
