"""
Structured pruning without retraining: heads and feed-forward columns leave the model, weights and all.

    build(model, target, passes=[prune.structured(texts, keep=0.6)])

Which units go is a trade of estimated damage against the time they cost, over all layers at once; what stays is fitted
again, layer by layer, to what the dense model computed (least squares). Rows may be unlabelled: the loss is then the
model's own prediction.

Methods, by what a removal is expected to do to the loss:
  obs        second order in the weights of the output layer, with the best correction by the units that stay
             (Optimal Brain Surgeon over columns, ZipLM: Kurtic et al. 2023), from the inputs and gradients of the rows
  fisher     second order in a mask over units (retraining-free framework: Kwon et al. 2022)
  taylor     first order in the same mask
  magnitude  norm of the weights; reads no row

torch-pruning 1.6.1 was tried for the removal (torch 2.13): it fails on ModernBERT's fused query-key-value layer with an
IndexError, leaves MPNet's heads (they share a position bias) as they are, and cuts classes off a head unless told not
to; costs, the choice between layers and the fit would remain to be written. `edgeformer.structure` reads the groups
from the exported graph instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import calibration, structure
from ..device import Device
from ..errors import BadInput
from ..model import Model
from ..structure import COLUMNS, HEADS, Group
from . import Pass

METHODS = ("obs", "fisher", "taylor", "magnitude")
GRAIN = 32  # columns leave in multiples: what a vector of any instruction set holds in int8
MOST_ROWS = 512
DAMPING = 0.01  # of the mean eigenvalue: inputs are nearly dependent where rows are few
UNIFORM = 0.1  # share of the weight of a token that does not depend on its gradient
STEPS = 2000  # costs are compared in so many steps of the budget

Tensor = torch.Tensor
Cost = Callable[[Group, int], float]  # of a group with so many units left, in any unit


class Path(NamedTuple):
    """How one group shrinks: the damage with so many units left, and the units in the order in which they go."""

    left: tuple[int, ...]  # descending, from all
    damage: tuple[float, ...]
    order: tuple[int, ...]


def operations(group: Group, kept: int) -> float:
    """Channels through linear layers: in proportion to the multiply-adds a token."""
    return float(kept * group.width * (4 if group.kind == HEADS else 1 + group.parts))


def structured(
    rows: calibration.Rows,
    *,
    keep: float = 0.6,
    method: str = "obs",
    cost: Cost = operations,
    grain: int = GRAIN,
    uniform_heads: bool = False,
    fit: bool = True,
) -> Pass:
    """
    rows: texts, or what `data.load` gave; labels serve where it has them. keep: the share of the groups' cost to keep.
    cost: what a group costs with so many units: `operations`, `modelled` or `tabulated`.
    grain: columns leave in multiples of it. uniform_heads: as many heads in every layer, as sparse attention wants.
    fit: least squares of what stays. Raises BadInput.
    """
    if not 0 < keep <= 1:
        raise BadInput(f"keep {keep} must be above 0 and at most 1: the share of the cost of heads and columns to keep")
    if method not in METHODS:
        raise BadInput(f"method {method!r} must be one of {', '.join(METHODS)}")

    def run(model: Model) -> Model:
        found = structure.groups(model)
        batches = list(calibration.batches(model, rows, MOST_ROWS))
        module = copy.deepcopy(model.module)
        paths = _paths(module, found, batches, method, grain, model.task.kind)
        kept = allocate(found, paths, cost, keep, uniform_heads)
        removed = {g: torch.tensor(sorted(p.order[: g.units - k])) for g, p, k in zip(found, paths, kept, strict=True)}
        before = sum(p.numel() for p in module.parameters())
        errors = _apply(module, removed, batches, fit)
        facts = {
            "method": method,
            "keep": keep,
            "kept": {g.name: k for g, k in zip(found, kept, strict=True)},
            "of": {g.name: g.units for g in found},
            "cost_kept": round(sum(map(cost, found, kept)) / sum(cost(g, g.units) for g in found), 4),
            "parameters_before": before,
            "parameters": sum(p.numel() for p in module.parameters()),
            "rows": sum(len(b.inputs[0]) for b in batches),
            "labelled": batches[0].labels is not None,
            "output_error": errors,
        }
        return model.after("prune.structured", module, facts=facts)

    return run


# --- what units cost --------------------------------------------------------------------------------------------------


def modelled(device: Device, hidden: int, tokens: int, *, int8: bool = True) -> Cost:
    """Roofline ms of one row on one thread of `device`: the rates and the bandwidth `edgeformer.predict` uses."""
    linear = device.int8_gops * device.int8_efficiency if int8 else device.fp32_gflops * device.fp32_efficiency
    product = device.fp32_gflops * device.fp32_efficiency

    def cost(group: Group, kept: int) -> float:
        layers = 4 if group.kind == HEADS else 1 + group.parts
        weights = kept * group.width * layers * hidden
        seconds = 2e-9 * tokens * weights / linear
        if group.kind == HEADS:
            seconds += 4e-9 * tokens * tokens * kept * group.width / product
        moved = weights * (1 if int8 else 4) + 4 * tokens * (kept * group.width * layers + 2 * hidden)
        return 1e3 * max(seconds, 1e-9 * moved / device.bandwidth_gbs)

    return cost


def tabulated(table: dict[str, dict[int, float]]) -> Cost:
    """Measured ms: {HEADS or COLUMNS: {units left: ms of one such group}}, linear in between."""
    points = {kind: sorted(at.items()) for kind, at in table.items()}

    def cost(group: Group, kept: int) -> float:
        at = points[group.kind]
        return float(np.interp(kept, [n for n, _ in at], [ms for _, ms in at]))

    return cost


def allocate(
    groups: Sequence[Group], paths: Sequence[Path], cost: Cost, keep: float, uniform_heads: bool = False
) -> list[int]:
    """Units to keep of each group: the least sum of damage within `keep` of the whole cost, by dynamic programming."""
    whole = sum(cost(g, g.units) for g in groups)
    if uniform_heads:
        return _uniform(groups, paths, cost, keep)
    step = keep * whole / STEPS
    best, chosen = np.zeros(STEPS + 1), []  # by steps of the budget spent so far
    for group, path in zip(groups, paths, strict=True):
        options = np.full((len(path.left), STEPS + 1), np.inf)
        for row, (left, damage) in enumerate(zip(path.left, path.damage, strict=True)):
            spent = int(np.ceil(cost(group, left) / step - 1e-6))
            if spent <= STEPS:
                options[row, spent:] = best[: STEPS + 1 - spent] + damage
        chosen.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best[-1]):
        raise BadInput(f"keep {keep} is less than what cannot be removed; raise it")
    kept, at = [], STEPS
    for group, path, choice in zip(reversed(groups), reversed(paths), reversed(chosen), strict=True):
        left = path.left[choice[at]]
        kept.append(left)
        at -= int(np.ceil(cost(group, left) / step - 1e-6))
    return kept[::-1]


def _uniform(groups: Sequence[Group], paths: Sequence[Path], cost: Cost, keep: float) -> list[int]:
    """The number of heads, the same everywhere, with which the best allocation of columns damages least."""
    heads = [i for i, g in enumerate(groups) if g.kind == HEADS]
    columns = [i for i, g in enumerate(groups) if g.kind == COLUMNS]
    budget = keep * sum(cost(g, g.units) for g in groups)
    of_columns = sum(cost(groups[i], groups[i].units) for i in columns)
    best: tuple[float, list[int]] | None = None
    for number in range(1, groups[heads[0]].units + 1):
        share = (budget - sum(cost(groups[i], number) for i in heads)) / max(of_columns, 1e-30)
        if share <= 0:
            break
        kept = allocate([groups[i] for i in columns], [paths[i] for i in columns], cost, min(share, 1.0))
        every = dict(zip(columns, kept, strict=True)) | dict.fromkeys(heads, number)
        damage = sum(paths[i].damage[paths[i].left.index(n)] for i, n in every.items())
        if best is None or damage < best[0]:
            best = damage, [every[i] for i in range(len(groups))]
    if best is None:
        raise BadInput(f"keep {keep} leaves no head in every layer; raise it")
    return best[1]


# --- what units are worth ---------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Sums over tokens at one output layer; D channels of its input and a constant 1, C of its output."""

    inputs: Tensor  # [D + 1, D + 1] second moments, a token weighted by its gradient
    gradients: Tensor  # [C, C] second moments, trace 1
    units: Tensor  # [rows, count] gradient of the loss of one row after a mask over units


def _paths(
    module: torch.nn.Module,
    groups: Sequence[Group],
    batches: Sequence[calibration.Batch],
    method: str,
    grain: int,
    kind: str,
) -> list[Path]:
    if method == "magnitude":
        norms = [_norms(module, g) for g in groups]
        return [_ranked(g, x, grain) for g, x in zip(groups, norms, strict=True)]
    seen = _observe(module, groups, batches, kind)
    if method == "taylor":
        return [_ranked(g, s.units.abs().mean(0), grain) for g, s in zip(groups, seen, strict=True)]
    if method == "fisher":
        return [_fisher(g, s.units.T @ s.units, grain) for g, s in zip(groups, seen, strict=True)]
    return [_obs(g, module.get_submodule(g.out), s, grain) for g, s in zip(groups, seen, strict=True)]


def _norms(module: torch.nn.Module, group: Group) -> Tensor:
    """Squared norm of each unit's weights, relative to the mean of its group."""
    into = torch.zeros(group.units)
    for name in group.into:
        weight: Any = module.get_submodule(name).weight
        into += weight.detach().pow(2).sum(1).view(group.parts, group.units, group.width).sum((0, 2))
    out: Any = module.get_submodule(group.out).weight
    norms: Tensor = into + out.detach().pow(2).sum(0).view(group.units, group.width).sum(1)
    return norms / norms.mean()


def _grain(group: Group, grain: int) -> int:
    """Columns go in whole grains, and the first step takes what is over; heads go one by one."""
    return grain if group.kind == COLUMNS and group.units > grain else 1


def _ranked(group: Group, worth: Tensor, grain: int) -> Path:
    order = worth.argsort()
    total = torch.cat([torch.zeros(1), worth[order].cumsum(0)])
    left = _left(group, grain)
    return Path(left, tuple(float(total[group.units - n]) for n in left), tuple(order.tolist()))


def _left(group: Group, grain: int) -> tuple[int, ...]:
    size = _grain(group, grain)
    return (group.units, *(n for n in range(group.units - 1, -1, -1) if n % size == 0))


def _fisher(group: Group, fisher: Tensor, grain: int) -> Path:
    """Greedy: what adds least to 1' F 1 over the removed, correlations included."""
    order: list[int] = []
    damage, left = [0.0], _left(group, grain)
    adds, gone = fisher.diagonal().clone(), 0.0
    for before, after in pairwise(left):
        for _ in range(before - after):
            unit = int(adds.argmin())
            gone += float(adds[unit])
            adds += 2 * fisher[unit]
            adds[unit] = torch.inf
            order.append(unit)
        damage.append(max(gone, damage[-1]))
    return Path(left, tuple(damage), tuple(order))


def _obs(group: Group, out: Any, seen: _Seen, grain: int) -> Path:
    """
    Removes the units whose loss the others make up for best, corrects the others, and goes on. `weights` [C, D + 1]
    holds the bias last, which never goes.
    """
    weights, inverse = _with_bias(out).double(), _inverse(seen.inputs)
    gradients = seen.gradients.double()
    alive = torch.ones(group.units, dtype=torch.bool)
    order: list[int] = []
    damage, left = [0.0], _left(group, grain)
    for before, after in pairwise(left):
        scores = _losses(weights, inverse, gradients, group).masked_fill(~alive, torch.inf)
        units = scores.argsort()[: before - after]
        gone = structure.channels(group, units)
        block = torch.linalg.solve(inverse[gone][:, gone], torch.cat([weights[:, gone].T, inverse[gone]], 1))
        change, reach = block[:, : len(weights)], block[:, len(weights) :]
        damage.append(damage[-1] + max(float(((gradients @ weights[:, gone]) * change.T).sum()), 0.0))
        weights -= change.T @ inverse[gone]
        inverse -= inverse[:, gone] @ reach
        weights[:, gone] = 0
        inverse[gone] = inverse[:, gone] = 0
        alive[units] = False
        order += units.tolist()
    return Path(left, tuple(damage), tuple(order))


def _losses(weights: Tensor, inverse: Tensor, gradients: Tensor, group: Group) -> Tensor:
    """tr(B W_u (H^-1_uu)^-1 W_u') of every unit u; a removed one has zeros and gives any number."""
    size = group.units * group.width
    if group.width == 1:
        products = ((gradients @ weights[:, :size]) * weights[:, :size]).sum(0)
        return products / inverse.diagonal()[:size].clamp_min(1e-30)
    blocks = inverse[:size, :size].view(group.units, group.width, group.units, group.width)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1) + 1e-12 * torch.eye(group.width, dtype=inverse.dtype)
    parts = weights[:, :size].view(-1, group.units, group.width).permute(1, 2, 0)  # [count, width, C]
    change = torch.linalg.solve(own, parts)
    losses: Tensor = ((parts @ gradients) * change).sum((1, 2))
    return losses


def _with_bias(out: Any) -> Tensor:
    bias = torch.zeros(out.out_features) if out.bias is None else out.bias.detach()
    return torch.cat([out.weight.detach(), bias[:, None]], 1)


def _inverse(moments: Tensor) -> Tensor:
    size = len(moments)
    damped = moments.double() + DAMPING * moments.diagonal().mean().double() * torch.eye(size, dtype=torch.double)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


# --- what the model shows on rows ------------------------------------------------------------------------------------


def _observe(
    module: torch.nn.Module, groups: Sequence[Group], batches: Sequence[calibration.Batch], kind: str
) -> list[_Seen]:
    """One pass forward and backward over the rows."""
    sums: list[list[Any]] = [[0, 0, []] for _ in groups]
    outs = [module.get_submodule(g.out) for g in groups]
    random = torch.Generator().manual_seed(0)
    for batch in batches:
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def keep(number: int, args: Any, output: Tensor, inputs: Any = inputs, outputs: Any = outputs) -> Tensor:
            inputs[number] = args[0].detach()
            watched = output if output.requires_grad else output.detach().requires_grad_()
            outputs[number] = watched
            return watched

        hooks = [
            m.register_forward_hook(lambda _m, args, y, n=n, keep=keep: keep(n, args, y)) for n, m in enumerate(outs)
        ]
        try:
            with torch.enable_grad():
                loss = _loss(module(*batch.inputs), batch, kind, random)
        finally:
            for hook in hooks:
                hook.remove()
        gradients = torch.autograd.grad(loss, [outputs[n] for n in range(len(groups))])
        for n, (group, gradient) in enumerate(zip(groups, gradients, strict=True)):
            for i, term in enumerate(_terms(group, outs[n], inputs[n], gradient, batch.valid)):
                sums[n][i] = [*sums[n][i], term] if i == 2 else sums[n][i] + term
    return [_Seen(a, b, torch.cat(units)) for a, b, units in sums]


def _terms(group: Group, out: Any, x: Tensor, gradient: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
    on_inputs = (gradient @ out.weight.detach()) * x
    units = on_inputs.sum(1).view(len(x), group.units, group.width).sum(2)
    x, gradient = x[valid], gradient[valid]
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    weight = gradient.pow(2).sum(1)
    weight = weight + UNIFORM * weight.mean()
    return (x * weight[:, None]).T @ x, gradient.T @ gradient / gradient.pow(2).sum().clamp_min(1e-30), units


def _loss(output: Tensor, batch: calibration.Batch, kind: str, random: torch.Generator) -> Tensor:
    """
    The sum over rows of a loss whose squared gradients are the Fisher information: against labels, else against
    labels drawn from the model's own prediction; outputs without classes along a random direction.
    """
    if kind != "classification":
        return (output * torch.randn(output.shape, generator=random)).sum()
    labels = batch.labels
    if labels is None:
        labels = torch.multinomial(output.detach().softmax(-1), 1, generator=random)[:, 0]
    return torch.nn.functional.cross_entropy(output, labels, reduction="sum")


# --- removal and fit --------------------------------------------------------------------------------------------------


def _apply(
    module: torch.nn.Module, removed: dict[Group, Tensor], batches: Sequence[calibration.Batch], fit: bool
) -> dict[str, float]:
    """Cuts group after group and fits the rest to the dense outputs, on the inputs that the cut model really has."""
    wanted = _outputs(module, list(removed), batches) if fit else {}
    errors: dict[str, float] = {}
    for group, gone in removed.items():
        kept = torch.tensor([u for u in range(group.units) if u not in set(gone.tolist())], dtype=torch.long)
        out: Any = module.get_submodule(group.out)
        if fit and (len(gone) or errors):
            solved, errors[group.name] = _fitted(module, group, kept, batches, wanted[group])
            _store(out, structure.channels(group, kept), solved)
        if len(gone):
            structure.cut(module, group, kept)
    return errors


def _store(out: Any, columns: Tensor, solved: Tensor) -> None:
    """Weights [C, D + 1] with the bias last; a layer gets a bias where it had none."""
    weight, learns = out.weight.detach().clone(), out.weight.requires_grad
    weight[:, columns] = solved[:, :-1]
    out.weight = torch.nn.Parameter(weight, requires_grad=learns)
    out.bias = torch.nn.Parameter(solved[:, -1].clone(), requires_grad=learns)


def _outputs(
    module: torch.nn.Module, groups: Sequence[Group], batches: Sequence[calibration.Batch]
) -> dict[Group, list[Tensor]]:
    """The dense outputs of each group on the valid tokens, a tensor [tokens, C] a batch."""
    found: dict[Group, list[Tensor]] = {g: [] for g in groups}
    for batch in batches:
        hooks = [
            module.get_submodule(g.out).register_forward_hook(
                lambda _m, _a, y, g=g, batch=batch: found[g].append(calibration.tokens(y, batch.valid))
            )
            for g in groups
        ]
        with torch.no_grad():
            module(*batch.inputs)
        for hook in hooks:
            hook.remove()
    return found


def _fitted(
    module: torch.nn.Module, group: Group, kept: Tensor, batches: Sequence[calibration.Batch], wanted: list[Tensor]
) -> tuple[Tensor, float]:
    """Weights [C, D + 1] from the kept channels to the wanted outputs, and the relative squared error they leave."""
    columns = structure.channels(group, kept)
    out: Any = module.get_submodule(group.out)
    size = len(columns) + 1
    moments, cross, total = torch.zeros(size, size), torch.zeros(size, out.out_features), 0.0
    for batch, target in zip(batches, wanted, strict=True):
        x = calibration.reaching(module, out, batch)[:, columns]
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        moments += x.T @ x
        cross += x.T @ target
        total += float(target.pow(2).sum())
    # Damped towards the present weights, not towards zero: few rows then change little.
    now = _with_bias(out)[:, [*columns.tolist(), -1]].T
    damping = DAMPING * moments.diagonal().mean()
    solved = torch.linalg.solve(
        (moments + damping * torch.eye(size)).double(), (cross + damping * now).double()
    ).float()
    error = float((solved * (moments @ solved)).sum() - 2 * (solved * cross).sum() + total)
    return solved.T, round(max(error, 0.0) / max(total, 1e-30), 5)
