"""
The operator in plain torch, and the `Scorer` module that carries its parameters inside a model.

`forward` equals `edgeformer::dsa` and is differentiable: it says what the operator means to exporters and to training.
It costs what dense attention costs; the C core behind `op.py` is what skips work.

Shapes: q [B,Hq,Nq,D], k and v [B,Hkv,Nk,D]; masks of blocks are [B,Hs,nQ,nK], True where kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import op
from .op import Parameters
from .reference import LAST_ROWS, THRESHOLD, TOP_K, Config, blocks

Tensor = torch.Tensor
RANK, DIST, SINKS = 16, 32, 1


class Scorer(torch.nn.Module):
    """
    What decides which blocks one attention layer reads: two low-rank maps, two biases, a threshold a head.

    All of it is buffers: it is trained by itself (`scorer.py`) and stays fixed while a model trains. `compute` is the
    precision of the attention (op.py); theta 0 under the threshold rule is dense attention.
    """

    wq: Tensor
    wk: Tensor
    dist_bias: Tensor
    sink_bias: Tensor
    theta: Tensor

    def __init__(self, parameters: Parameters, config: Config, compute: int = 0) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        for name, value in parameters._asdict().items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).clone())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention in q's dtype; selection and accumulation are float32. A causal q holds the last rows of k."""
        config, (q_len, kv_len) = masked(self.config, q, k, lengths, causal)
        found: Tensor = torch.ops.edgeformer.dsa(
            q.float(), k.float(), v.float(), *(x.float() for x in self.parameters_of()), q_len, kv_len,
            position_bias if position_bias is None else position_bias.float(),
            **op.selection(config), compute=self.compute, scale=scale,
        )  # fmt: skip
        return found.to(q.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scorer:
        """`model.half()` and the like move a scorer but leave it float32: a rounded theta would keep other blocks."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def parameters_of(self) -> Parameters:
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    def extra_repr(self) -> str:
        heads, dim, rank = self.wq.shape
        return f"heads={heads}, dim={dim}, rank={rank}, {self.config}"


def masked(
    config: Config, q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool
) -> tuple[Config, tuple[Tensor | None, Tensor | None]]:
    """
    The call's config and its q_len and kv_len: in a decode or chunk the queries are the last of the keys' rows. Where
    they start is a number here, and `LAST_ROWS` in a graph with free lengths: it differs from call to call.
    """
    if q.shape[2] == k.shape[2]:
        return replace(config, causal=int(causal)), (lengths, lengths)
    offset = k.shape[2] - q.shape[2] if causal else 0
    rows = None if lengths is None else (lengths - offset).clamp(0, q.shape[2]).to(torch.int32)
    known = offset if isinstance(offset, int) else LAST_ROWS
    return replace(config, causal=int(causal), q_offset=known), (rows if causal else None, lengths)


def fresh(
    heads: int, dim: int, *, selecting: int | None = None, rank: int = RANK, dist: int = DIST, sinks: int = SINKS,
    generator: torch.Generator | None = None,
) -> Parameters:  # fmt: skip
    """Untrained: the first columns of a random orthogonal matrix, so that scores start as a sketch of q.k; theta 0."""
    full = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
    start = full[..., : min(rank, dim)] * dim**-0.25
    biases = (torch.zeros(heads, 2 * dist + 1), torch.zeros(heads, sinks))
    return Parameters(start, start.clone(), *biases, torch.zeros(selecting or heads))


def pooled(heads: int, dim: int, dist: int = 0) -> Parameters:
    """No learned scorer: block means against block means."""
    same = torch.eye(dim).expand(heads, dim, dim) * dim**-0.25
    return Parameters(same, same, torch.zeros(heads, 2 * dist + 1), torch.zeros(heads, 0), torch.zeros(heads))


# --- select -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which blocks a query block may see and must see."""

    candidates: Tensor  # [B, 1, nQ, nK] bool
    forced: Tensor  # [B, 1, nQ, nK] bool


def plan(c: Config, batch: int, nq: Any, nk: Any, q_len: Tensor, kv_len: Tensor) -> Plan:
    i, j = torch.arange(nq, device=q_len.device)[None, :, None], torch.arange(nk, device=q_len.device)[None, None]
    rows = (q_len[:, None, None] - i * c.block_q).clamp(0, c.block_q)
    first = c.q_offset + i * c.block_q
    last = first + rows - 1
    candidates = (j * c.block_k < kv_len[:, None, None]) & (rows > 0)
    if c.causal:
        candidates = candidates & (j * c.block_k <= last)
    forced = (j < c.n_sink).expand(batch, nq, nk)
    if c.force_diag:
        forced = forced | ((j * c.block_k <= last) & ((j + 1) * c.block_k > first))
    return Plan(candidates[:, None], (forced & candidates)[:, None])


def full_lengths(x: Tensor, given: Tensor | None) -> Tensor:
    full = torch.full((x.shape[0],), x.shape[2], dtype=torch.int64, device=x.device)
    return full if given is None else torch.minimum(given.to(torch.int64).clamp(min=0), full)


def only_valid(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Padding may hold anything, NaN too: 0 instead."""
    if lengths is None:
        return x
    return torch.where((torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None, :, None], x, 0.0)


def pool(x: Tensor, block: int, lengths: Tensor | None) -> Tensor:
    """[B,H,N,D] -> [B,H,n,D]: the mean of the valid rows of each block."""
    n = blocks(x.shape[2], block)
    rows = full_lengths(x, lengths)[:, None] - torch.arange(n, device=x.device) * block
    full = torch.nn.functional.pad(only_valid(x, lengths), (0, 0, 0, n * block - x.shape[2]))
    return full.view(*x.shape[:2], n, block, x.shape[3]).sum(3) / rows.clamp(1, block)[:, None, :, None]


def scores(c: Config, qm: Tensor, km: Tensor, s: Parameters) -> Tensor:
    """[...,H,nQ,D] and [...,H,nK,D] -> [...,H,nQ,nK], also with leading axes (layers) on both sides."""
    z = (qm @ s.wq) @ (km @ s.wk).mT
    reach, nq, nk = s.dist_bias.shape[-1] // 2, qm.shape[-2], km.shape[-2]
    j = torch.arange(nk, device=z.device)
    first = (c.q_offset + torch.arange(nq, device=z.device) * c.block_q) // c.block_k
    z = z + s.dist_bias[..., (j[None] - first[:, None]).clamp(-reach, reach) + reach]
    if sinks := s.sink_bias.shape[-1]:
        z = z + torch.where(j < sinks, s.sink_bias[..., j.clamp(max=sinks - 1)], 0.0)[..., None, :]
    return torch.where(z.isnan(), -torch.inf, z.clamp(max=3e38))


def softmax(z: Tensor) -> Tensor:
    """A row of -inf has no mass: 0, not NaN, and no gradient."""
    top = z.amax(-1, keepdim=True).detach()
    e = torch.exp(z - torch.where(top == -torch.inf, 0.0, top))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total > 0, total, 1.0)


def mass(
    c: Config, q: Tensor, k: Tensor, s: Parameters, q_len: Tensor | None, kv_len: Tensor | None
) -> tuple[Tensor, Plan]:
    """p [B,Hs,nQ,nK] and the plan of the call."""
    qm, km = pool(q, c.block_q, q_len), pool(k, c.block_k, kv_len)
    shown = plan(c, q.shape[0], qm.shape[2], km.shape[2], full_lengths(q, q_len), full_lengths(k, kv_len))
    group = q.shape[1] // k.shape[1]
    z = scores(c, qm, km.repeat_interleave(group, 1), s)
    p = softmax(z.masked_fill(~shown.candidates, -torch.inf))
    return (p.view(p.shape[0], k.shape[1], group, *p.shape[2:]).mean(2) if c.select_per_kv else p), shown


def choose(c: Config, p: Tensor, shown: Plan, theta: Tensor, k_rows: Any) -> Tensor:
    """The rule and its clamps: [...,Hs,nQ,nK] bool. theta is [...,Hs]."""
    candidates, forced = (x.expand_as(p) for x in shown)
    if c.dense_below and k_rows <= c.dense_below and not c.max_blocks:
        return candidates
    theta = theta[..., None, None]
    reached = candidates & (forced | (p >= theta))
    if c.rule == THRESHOLD and c.min_blocks <= 1 and not c.max_blocks:  # the common case needs no sort
        return _at_least_one(reached, p, candidates) if c.min_blocks else reached
    order = torch.sort(torch.where(candidates, p, -1.0), dim=-1, descending=True, stable=True)[1]
    order = order.gather(-1, torch.sort(forced.gather(-1, order).int(), dim=-1, descending=True, stable=True)[1])
    rank, total, must = order.argsort(-1), candidates.sum(-1, keepdim=True), forced.sum(-1, keepdim=True)
    if c.dense_below and k_rows <= c.dense_below:
        keep = total
    elif c.rule == THRESHOLD:
        keep = reached.sum(-1, keepdim=True)
    elif c.rule == TOP_K:
        keep = torch.maximum(must, theta.floor().to(torch.int64).clamp(min=0))
    else:
        ordered = torch.where(candidates, p, 0.0).gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        keep = torch.maximum(must, torch.where(theta >= 1, total, (before < theta).sum(-1, keepdim=True)))
    keep = torch.minimum(torch.maximum(keep, total.clamp(max=c.min_blocks)), total)
    return candidates & (rank < (keep.clamp(max=c.max_blocks) if c.max_blocks else keep))


def _at_least_one(reached: Tensor, p: Tensor, candidates: Tensor) -> Tensor:
    """min_blocks 1 without a sort: a row that keeps nothing keeps its heaviest candidate, the first of equals."""
    none = ~reached.any(-1, keepdim=True)
    best = torch.where(candidates, p, -1.0).argmax(-1, keepdim=True)
    return reached | (none & candidates & (torch.arange(p.shape[-1], device=p.device) == best))


def select(
    c: Config, q: Tensor, k: Tensor, s: Parameters, q_len: Tensor | None = None, kv_len: Tensor | None = None
) -> Tensor:
    """Kept blocks, [B,Hs,nQ,nK] bool."""
    with torch.no_grad():
        p, shown = mass(c, q, k, s, q_len, kv_len)
        return choose(c, p, shown, s.theta, k.shape[2])


def to_lists(kept: Tensor, most: int = 0) -> tuple[Tensor, Tensor]:
    """A mask of blocks as (idx, cnt)."""
    n = kept.shape[-1]
    j = torch.arange(n, dtype=torch.int32, device=kept.device)
    idx = torch.where(kept, j, n).sort(-1)[0][..., : most or n]
    return torch.where(idx == n, -1, idx).to(torch.int32).contiguous(), kept.sum(-1, dtype=torch.int32)


def from_lists(idx: Tensor, cnt: Tensor, n: int) -> Tensor:
    used = torch.arange(idx.shape[-1], device=idx.device) < cnt[..., None]
    mask = torch.zeros(*idx.shape[:3], n + 1, dtype=torch.bool, device=idx.device)
    return mask.scatter_(-1, torch.where(used, idx, n).to(torch.int64), True)[..., :n]


# --- attend -----------------------------------------------------------------------------------------------------------


def visible(
    kept: Tensor,
    c: Config,
    q: Tensor,
    k: Tensor,
    q_len: Tensor | None,
    kv_len: Tensor | None,
    rows: slice = slice(None),
) -> Tensor:
    """Which key each query row sees: [B,Hq,rows,Nk] bool. `rows` starts at a block."""
    t = torch.arange(q.shape[2], device=q.device)[rows]
    u = torch.arange(k.shape[2], device=q.device)
    seen = kept[:, :, t // c.block_q][..., u // c.block_k].repeat_interleave(q.shape[1] // kept.shape[1], 1)
    seen = seen & (u < full_lengths(k, kv_len)[:, None])[:, None, None]
    seen = seen & (t < full_lengths(q, q_len)[:, None])[:, None, :, None]
    return seen & (u <= c.q_offset + t[:, None]) if c.causal else seen


def distances(c: Config, q: Tensor, k: Tensor, position_bias: Tensor, rows: slice = slice(None)) -> Tensor:
    """The column of `position_bias` [H, 2P+1] that each logit gets: [rows, Nk] int64."""
    far = position_bias.shape[1] // 2
    t = torch.arange(q.shape[2], device=q.device)[rows]
    u = torch.arange(k.shape[2], device=q.device)
    return (u - (c.q_offset + t[:, None])).clamp(-far, far) + far


def attend(
    c: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (only_valid(x, kv_len).repeat_interleave(group, 1) for x in (k, v))
    seen = visible(kept, c, q, k, q_len, kv_len)
    z = only_valid(q, q_len) @ k.mT * (c.scale or q.shape[3] ** -0.5)
    if position_bias is not None:
        z = z + position_bias[:, distances(c, q, k, position_bias)]
    return softmax(z.masked_fill(~seen, -torch.inf)) @ v


def forward(
    c: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Parameters,
    q_len: Tensor | None = None,
    kv_len: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """`edgeformer::dsa` as plain torch operations."""
    return attend(c, q, k, v, select(c, q, k, s, q_len, kv_len), q_len, kv_len, position_bias)
