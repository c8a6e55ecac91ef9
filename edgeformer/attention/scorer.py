"""
Trains the scorers of a model and calibrates their thresholds, with the model frozen and out of the loop.

    stats = collect(model, rows, Config(block_q=32, block_k=32))   # dense: pooled q and k, block masses
    trained = train(stats)                                        # KL of the scorer to those, all layers at once
    found = calibrate(stats, trained.parameters, budget=0.5)       # thresholds that keep half of the blocks

Statistics take no N x N tensor: attention runs a head and a chunk of rows at a time. Training is seeded, and resumes
from its checkpoint with the bits of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import BadInput
from ..stages import Progress, quiet
from ..train import read, write
from . import dsa, swap
from .op import Parameters
from .reference import THRESHOLD, TOP_K, TOP_P, Config, blocks

Tensor = torch.Tensor
Row = TypeVar("Row")
RowInputs = Mapping[str, Any] | Sequence[Any]  # of one forward, with a batch axis of 1

BUFFER_BYTES = 16 << 20  # of the attention logits at a time
CALIBRATION_ROWS = 32
HOLD_OUT = 5  # one row of so many: on rows it was trained on a scorer is surer than on others, and keeps less of them
SAVE_EVERY = 50  # steps
DENSE_HEAD = 0.9  # a head with this budget or more keeps everything
# Standard deviations between rows that a budget leaves room for. Text of another kind keeps another share: thresholds
# that met .5 on the average row of SmolLM2's mixed text kept .55 of encyclopedia articles and design documents.
SPREAD = 2.0
ROUNDING = 1e-6  # of a share
_BISECTIONS = 18


@dataclass(frozen=True)
class Statistics:
    """What the dense model did on n rows, for L layers of one shape. Mass rows sum to 1 over the blocks seen."""

    config: Config  # its block sizes, causality and forced blocks hold for training and calibration
    lengths: Tensor  # [n]
    qm: Tensor  # [n, L, H, nQ, D] mean query of each block
    km: Tensor  # [n, L, Hkv, nK, D]
    mass: Tensor  # [n, L, H, nQ, nK] mean attention that a query block gives a key block

    def of(self, rows: Any) -> Statistics:
        parts = {name: getattr(self, name)[rows] for name in ("lengths", "qm", "km", "mass")}
        return replace(self, **parts)

    def split(self) -> tuple[Statistics, Statistics]:
        """The rows to train on, and the last ones, held out for calibration; too few rows are all of them both."""
        held = held_out(range(len(self.lengths)))
        return (self.of(slice(held[0])), self.of(slice(held[0], None))) if held[0] else (self, self)

    @property
    def plan(self) -> dsa.Plan:
        """[n, 1, 1, nQ, nK]: the same for all layers and heads."""
        nq, nk = self.mass.shape[-2:]
        found = dsa.plan(self.config, len(self.lengths), nq, nk, self.lengths, self.lengths)
        return dsa.Plan(*(x.unsqueeze(1) for x in found))


class Trained(NamedTuple):
    parameters: Parameters  # stacked: wq [L, H, D, r], ...; theta 0
    first_kl: float  # of the untrained scorer, over the rows it was trained on
    kl: float
    held_out_kl: float  # over the rows held out


class Calibration(NamedTuple):
    theta: Tensor  # [L, Hs]
    kept: float  # fraction of the candidates, over all layers and heads
    kept_by_layer: tuple[float, ...]
    recall: float  # share of the dense attention's mass that is kept


def held_out(rows: Sequence[Row]) -> Sequence[Row]:
    """Those that `train` leaves to calibration: the last fifth, or all where they are too few to leave any."""
    return rows[-(len(rows) // HOLD_OUT) :]  # -0 is the start


# --- statistics -------------------------------------------------------------------------------------------------------


class _Recorder(torch.nn.Module):
    """Dense attention that notes block means and masses in preallocated tensors; passes on what `inside` gives."""

    def __init__(
        self, stats: Statistics, layer: swap.Layer, at: Callable[[], int], inside: torch.nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stats, self.layer, self.at, self.inside = stats, layer, at, inside

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float,
        position_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        sparse = None if self.inside is None else self.inside(q, k, v, lengths, causal, scale, position_bias)
        stats, full = self.stats, q.shape[2]
        n = full if lengths is None else int(lengths[0])
        if q.shape[0] != 1 or full != k.shape[2] or not 0 < n <= _capacity(stats):
            raise BadInput(f"statistics take one row of 1 to {_capacity(stats)} tokens at a time, got {tuple(q.shape)}")
        c, at, layer = stats.config, self.at(), self.layer.number
        stats.lengths[at] = n
        q, k, v = (x[0, :, :n].float() for x in (q, k, v))
        for into, x, block in ((stats.qm, q, c.block_q), (stats.km, k, c.block_k)):
            into[at, layer, :, : blocks(n, block)] = dsa.pool(x[None], block, None)[0]
        out = torch.zeros(1, q.shape[0], full, q.shape[2])
        dense_with_mass(c, q, k, v, scale or q.shape[2] ** -0.5, out[0], stats.mass[at, layer], position_bias)
        return out if sparse is None else sparse


def _capacity(stats: Statistics) -> int:
    return stats.mass.shape[-1] * stats.config.block_k


def dense_with_mass(
    c: Config, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, mass: Tensor,
    position_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Softmax attention of [H,N,D] into `out`, the mean mass of each block into `mass` [H,nQ,nK], by chunks of rows."""
    n, nk = q.shape[1], blocks(k.shape[1], c.block_k)
    step = max(BUFFER_BYTES // (4 * nk * c.block_k * c.block_q), 1) * c.block_q
    buffer = torch.zeros(min(step, n), nk * c.block_k)  # columns past the keys stay 0
    for h in range(q.shape[0]):
        group = h * k.shape[0] // q.shape[0]
        for first in range(0, n, step):
            rows = slice(first, min(first + step, n))
            p = buffer[: rows.stop - first, : k.shape[1]]
            torch.mm(q[h, rows] * scale, k[group].T, out=p)
            if position_bias is not None:
                p += _bias_of(position_bias[h], rows, k.shape[1])
            if c.causal:
                p.masked_fill_(torch.arange(k.shape[1]) > torch.arange(first, rows.stop)[:, None], -torch.inf)
            torch.softmax(p, -1, out=p)
            torch.mm(p, v[group], out=out[h, rows])
            by_block = buffer[: rows.stop - first].view(1, 1, -1, nk, c.block_k).sum(-1)
            at = slice(first // c.block_q, blocks(rows.stop, c.block_q))
            mass[h, at, :nk] = dsa.pool(by_block, c.block_q, None)[0, 0]


def _bias_of(table: Tensor, rows: slice, n: int) -> Tensor:
    """What a position bias [2P+1] adds to these rows against n keys. A row is the next one's, a token further on."""
    far = len(table) // 2
    line = table[torch.arange(1 - n, n).clamp(-far, far) + far]
    return line.unfold(0, n, 1)[n - rows.stop : n - rows.start].flip(0)


def collect(
    model: torch.nn.Module, rows: Sequence[RowInputs], config: Config, progress: Progress = quiet, length: int = 0
) -> Statistics:
    """
    What dense attention does in each layer, over `rows` one at a time. A layer that is sparse already passes on its
    sparse result: the statistics are then of the inputs that the model will see.
    length: of the longest row; asked from the rows by default.
    """
    layers = swap.alike(model)
    if not rows:
        raise BadInput("no rows to train scorers on")
    one = layers[0]
    length = length or max(_tokens(row) for row in rows)
    config = replace(config, causal=int(one.causal))
    shape = (len(rows), len(layers))
    nq, nk = blocks(length, config.block_q), blocks(length, config.block_k)
    stats = Statistics(
        config,
        torch.zeros(len(rows), dtype=torch.int64),
        torch.zeros(*shape, one.heads, nq, one.dim),
        torch.zeros(*shape, one.kv_heads, nk, one.dim),
        torch.zeros(*shape, one.heads, nq, nk),
    )
    done, inside = 0, {layer.number: layer.module._modules.get(swap.SCORER) for layer in layers}
    recorders = swap.replaced(model, lambda layer: _Recorder(stats, layer, lambda: done, inside[layer.number]))
    with torch.no_grad(), recorders:
        for row in rows:
            model(**row) if isinstance(row, Mapping) else model(*row)
            done += 1
            progress("dense statistics", done, len(rows))
    return stats


def _tokens(row: RowInputs) -> int:
    first = next(iter(row.values())) if isinstance(row, Mapping) else row[0]
    if first.ndim != 2:
        raise BadInput("the length of these rows is not that of their first input; give `length`")
    return int(first.shape[1])


# --- training ---------------------------------------------------------------------------------------------------------


def masses(stats: Statistics, parameters: Parameters) -> Tensor:
    """p of every block, [n, L, Hs, nQ, nK]."""
    c, heads = stats.config, stats.qm.shape[2]
    z = dsa.scores(c, stats.qm, stats.km.repeat_interleave(heads // stats.km.shape[2], 2), parameters)
    p = dsa.softmax(z.masked_fill(~stats.plan.candidates, -torch.inf))
    if not c.select_per_kv:
        return p
    groups = stats.km.shape[2]
    return p.view(*p.shape[:2], groups, heads // groups, *p.shape[3:]).mean(3)


def divergence(stats: Statistics, parameters: Parameters, chosen: float = 0.0) -> Tensor:
    """
    KL of the dense masses to the scorer's, the mean over query blocks, candidates only. Plus `chosen` times the KL
    among the blocks that are not forced, each row by the root of the mass they have: forced blocks hold most of a
    causal model's mass, and only the order of the others decides anything.
    """
    candidates, forced = stats.plan
    km = stats.km.repeat_interleave(stats.qm.shape[2] // stats.km.shape[2], 2)
    z = dsa.scores(stats.config, stats.qm, km, parameters)
    total = _divergence(stats.mass, z, candidates)
    if chosen:
        left = candidates & ~forced
        mass = stats.mass.masked_fill(~left, 0.0)
        whole = mass.sum(-1, keepdim=True).clamp(min=1e-6)
        total = total + chosen * _divergence(mass / whole, z, left, whole.sqrt())
    return total / candidates.any(-1).expand(stats.mass.shape[:-1]).sum()


def _divergence(mass: Tensor, z: Tensor, seen: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    gap = mass.clamp(min=1e-9).log() - torch.log_softmax(z.masked_fill(~seen, -1e30), -1)
    return (weight * mass * gap).masked_fill(~seen, 0.0).sum()


@dataclass(frozen=True)
class Recipe:
    """How scorers are trained: AdamW with a cosine rate, on batches of rows. Made for 100 rows of 512 tokens."""

    rank: int = dsa.RANK
    dist: int = dsa.DIST
    sinks: int = dsa.SINKS
    steps: int = 400
    batch: int = 16
    rate: float = 2e-2  # of the two maps
    bias_rate: float = 2e-2
    pull: float = 0.0  # decay of the maps towards where they started
    chosen: float = 0.0  # weight of the blocks that are not forced (`divergence`)
    seed: int = 0


# 20 rows of 2,048 tokens. So few rows are learned by heart: free maps (rate 1e-2, no pull) fitted their rows better and
# lost more of another row's mass than maps that stay near the sketch they start from.
DECODER = Recipe(rank=32, steps=300, batch=2, rate=2e-3, bias_rate=3e-2, pull=12.0, chosen=1.0)


def train(
    stats: Statistics,
    recipe: Recipe | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress = quiet,
) -> Trained:
    """`checkpoint`: a file that a second call with the same data and recipe goes on from."""
    recipe = recipe or (DECODER if stats.config.causal else Recipe())
    seen, held = stats.split()
    random = torch.Generator().manual_seed(recipe.seed)
    start = _sketch(seen, recipe.rank)
    learned = _zeros(seen, start, recipe)
    groups = [{"params": learned[:2], "weight_decay": recipe.pull}, {"params": learned[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate)
    data = (seen.lengths, seen.qm, seen.km, seen.mass)
    file = Path(checkpoint) if checkpoint else None
    made_of = digest(repr((stats.config, recipe)), data) if file else ""

    def now() -> Parameters:
        return _parameters([start[0] + learned[0], start[1] + learned[1], *learned[2:]], torch.zeros(0))

    first_kl = _mean_divergence(seen, now())
    done = _resume(file, made_of, learned, optimizer, random) if file and file.exists() else 0
    for step in range(done, recipe.steps):
        slower = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group, rate in zip(optimizer.param_groups, (recipe.rate, recipe.bias_rate), strict=True):
            group["lr"] = rate * slower
        picked = torch.randint(len(seen.lengths), (min(recipe.batch, len(seen.lengths)),), generator=random)
        loss = divergence(seen.of(picked), now(), recipe.chosen)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        progress("train scorers", step + 1, recipe.steps)
        if file and ((step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps):
            _save(file, made_of, step + 1, learned, optimizer, random)
    selecting = stats.km.shape[2] if stats.config.select_per_kv else stats.qm.shape[2]
    made = _parameters([x.detach() for x in now()[:4]], torch.zeros(stats.qm.shape[1], selecting))
    return Trained(made, first_kl, _mean_divergence(seen, made), _mean_divergence(held, made))


def _zeros(stats: Statistics, start: Sequence[Tensor], recipe: Recipe) -> list[Tensor]:
    """What training adds to the start: to both maps, and to the biases."""
    heads = stats.qm.shape[1:3]
    shapes = [start[0].shape, start[1].shape, (*heads, 2 * recipe.dist + 1), (*heads, recipe.sinks)]
    return [torch.zeros(shape, requires_grad=True) for shape in shapes]


def _mean_divergence(stats: Statistics, parameters: Parameters) -> float:
    with torch.no_grad():
        return float(divergence(stats.of(slice(CALIBRATION_ROWS)), parameters))


def _sketch(stats: Statistics, rank: int) -> tuple[Tensor, Tensor]:
    """
    wq, wk [L, H, D, r] to start from: of all maps of this rank, those whose product is nearest to q.k over these
    blocks. Keys are taken without their mean, which adds the same to every block of a row.
    """
    heads, dim = stats.qm.shape[2], stats.qm.shape[4]
    q, k = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (stats.qm, stats.km))  # [L, H or Hkv, n * blocks, D]
    there = (stats.km.abs().amax((1, 2, 4)) > 0).flatten()  # the others are padding
    k = k[:, :, there] - k[:, :, there].mean(2, keepdim=True)
    root_q, back_q = _roots(q)
    root_k, back_k = (x.repeat_interleave(heads // k.shape[1], 1) for x in _roots(k))
    left, size, right = torch.linalg.svd(root_q @ root_k)
    weight = (size[..., None, :rank] * dim**-0.5).sqrt()
    return back_q @ left[..., :rank] * weight, back_k @ right.mT[..., :rank] * weight


def _roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of the second moment of [..., n, D], and its inverse where it has one."""
    size, axes = torch.linalg.eigh(x.mT @ x)
    size = torch.maximum(size, 1e-6 * size.amax(-1, keepdim=True))
    return axes * size.sqrt()[..., None, :] @ axes.mT, axes * size.rsqrt()[..., None, :] @ axes.mT


def _parameters(learned: Sequence[Tensor], theta: Tensor) -> Parameters:
    wq, wk, dist_bias, sink_bias = learned
    return Parameters(wq, wk, dist_bias, sink_bias, theta)


def digest(about: str, tensors: Iterable[Tensor]) -> str:
    """Of what training depends on."""
    found = hashlib.sha256(about.encode())
    for x in tensors:
        found.update(repr((x.dtype, tuple(x.shape))).encode())
        found.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _save(
    path: Path,
    made_of: str,
    step: int,
    learned: list[Tensor],
    optimizer: torch.optim.Optimizer,
    random: torch.Generator,
) -> None:
    tensors = {"random": random.get_state()}
    for i, x in enumerate(learned):
        tensors |= {f"{i}.value": x.detach()} | {f"{i}.{name}": value for name, value in optimizer.state[x].items()}
    write(path, tensors, {"made_of": made_of, "step": str(step)})


def _resume(
    path: Path, made_of: str, learned: list[Tensor], optimizer: torch.optim.Optimizer, random: torch.Generator
) -> int:
    """Steps that are already done."""
    saved, facts = read(path, made_of)
    for i, x in enumerate(learned):
        mine = {name.split(".")[1]: value for name, value in saved.items() if name.startswith(f"{i}.")}
        x.data.copy_(mine.pop("value"))
        optimizer.state[x] = mine
    random.set_state(saved["random"])
    return int(facts["step"])


# --- calibration ------------------------------------------------------------------------------------------------------


def calibrate(stats: Statistics, parameters: Parameters, budget: float, *, per_head: bool = False) -> Calibration:
    """
    Thresholds (or, by the config's rule, masses or counts) that keep `budget` of the candidates, not of the average row
    but of one that keeps SPREAD deviations more: one value for all heads, which gives each head its own share.
    `per_head`: values from greedy budgets, met on average. The longer half of the rows counts: theta is tied to length,
    and shorter rows keep a larger share of fewer blocks.
    """
    if not 0 < budget <= 1:
        raise BadInput(f"budget {budget} must be above 0 and at most 1: the fraction of blocks to keep")
    stats = _longer(stats)
    with torch.no_grad():
        return settle(stats, masses(stats, parameters), budget, per_head=per_head)


def _longer(stats: Statistics) -> Statistics:
    few = stats.of(slice(CALIBRATION_ROWS))
    return few.of(few.lengths >= few.lengths.median())


def kept_by_layer(stats: Statistics, parameters: Parameters) -> tuple[float, ...]:
    """Shares of the candidates that the parameters' own thresholds keep, at the length of these statistics."""
    with torch.no_grad():
        p = masses(stats, parameters)
    total = stats.plan.candidates.expand_as(p).sum((0, 2, 3, 4))
    kept = dsa.choose(replace(stats.config, dense_below=0), p, stats.plan, parameters.theta, 0).sum((0, 2, 3, 4))
    return tuple((kept / total.clamp(min=1)).tolist())


def calibrated_on(stats: Statistics, budget: float) -> Tensor:
    """The theta [L, Hs] that keeps `budget` of the blocks when the masses are the true ones."""
    few = _longer(stats)
    return settle(few, few.mass, budget).theta


def settle(stats: Statistics, p: Tensor, budget: float, *, per_head: bool = False) -> Calibration:
    """`calibrate` for masses [n, L, Hs, nQ, nK] from anywhere."""
    c, plan, heads = stats.config, stats.plan, p.shape[2]
    mass = stats.mass.view(*stats.mass.shape[:2], heads, -1, *stats.mass.shape[3:]).mean(3)
    shape, total = p.shape[1:3], plan.candidates.expand_as(p).sum((3, 4))  # total [n, L, Hs]

    def kept(theta: Tensor) -> Tensor:
        return dsa.choose(replace(c, dense_below=0), p, plan, theta, 0)

    def share(theta: Tensor) -> Tensor:
        found = kept(theta).sum((3, 4))
        if per_head:
            return found.sum(0) / total.sum(0)
        by_row = (found / total).mean((1, 2))
        return (by_row.mean() + SPREAD * by_row.std(correction=0)).expand(shape)

    target = _budgets(p, mass, plan, budget) if per_head else torch.full(shape, budget)
    theta = _bisect(share, target, c.rule, p.shape[-1])
    everything = {THRESHOLD: 0.0, TOP_P: 1.0, TOP_K: float(p.shape[-1])}[c.rule]
    theta = torch.where(target >= (DENSE_HEAD if per_head else 1.0), everything, theta)
    chosen = kept(theta)
    by_layer = tuple((chosen.sum((0, 2, 3, 4)) / total.sum((0, 2))).tolist())
    seen = plan.candidates.any(-1).expand(p.shape[:-1]).sum()
    recall = float((mass * chosen).sum() / seen)
    return Calibration(theta, float(chosen.sum() / total.sum()), by_layer, recall)


def _bisect(share: Callable[[Tensor], Tensor], target: Tensor, rule: int, nk: int) -> Tensor:
    """The theta whose share is the largest that is not above the target, for each head."""
    low, high = torch.zeros_like(target), torch.full_like(target, nk + 1.0 if rule == TOP_K else 1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        up = (share(middle) < target) ^ (rule == THRESHOLD)  # a threshold keeps less as it rises
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    if rule == TOP_K:
        low, high = low.floor(), high.floor()
    more, less = (low, high) if rule == THRESHOLD else (high, low)
    return torch.where(share(more) <= target + ROUNDING, more, less)


def _budgets(p: Tensor, mass: Tensor, plan: dsa.Plan, budget: float) -> Tensor:
    """The share of each head [L, Hs]: picks in order of the mass that each head's j-th pick adds on average."""
    candidates, forced = (x.expand_as(p) for x in plan)
    order = torch.sort(torch.where(candidates, p, -1.0) + forced * 2.0, dim=-1, descending=True, stable=True)[1]
    exists = candidates.gather(-1, order)
    cost = exists.sum((0, 3)).float()  # [L, Hs, nK]: in how many rows there is a j-th pick
    gain = (mass.gather(-1, order) * exists).sum((0, 3)) / cost.clamp(min=1)
    gain = gain.cummin(-1)[0]
    gain[..., 0] = torch.inf
    ranked = gain.flatten().sort(descending=True, stable=True)[1]
    taken = cost.flatten()[ranked].cumsum(0) <= budget * cost.sum()
    picked = torch.zeros(cost.numel(), dtype=torch.bool).scatter(0, ranked, taken).view_as(cost)
    return (cost * picked).sum(-1) / cost.sum(-1)


def one_layer(parameters: Parameters, layer: int) -> Parameters:
    return Parameters(*(x[layer] for x in parameters))
