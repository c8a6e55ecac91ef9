"""
Smoothing (SmoothQuant, Xiao et al. 2023): outlier channels of activations move into weights, and their ranges are kept.

    build(model, "host", formats=["onnx"], precision="int8-static", passes=[smooth.linears(texts)])

Each channel that reaches a linear layer is divided by a factor, and that column of its weight multiplied by it: the
model's output stays as it was, and one scale for all of an activation no longer drowns what most channels say. The
division costs nothing where a LayerNorm feeds linear layers alone, or where it is the output layer of an attention
(the values' layer takes it). Elsewhere (a LayerNorm that also feeds a residual, an activation function) it stays a
product a channel in front of the layer.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .. import calibration, rounding, structure
from ..errors import BadInput
from ..model import Model
from . import Pass

ROWS = 128
FACTORS = (1e-3, 1e3)  # least and greatest

Tensor = torch.Tensor


class Fed(NamedTuple):
    """Linear layers that one tensor reaches, and what can take the division: `into` and its first row there."""

    layers: tuple[str, ...]
    kind: str  # norm | values | product
    into: str = ""
    row: int = 0


def linears(rows: calibration.Rows, *, strength: float = 0.5, most_rows: int = ROWS) -> Pass:
    """
    `strength`: how much of the difficulty moves into the weights, from 0 (none) to 1 (all). The model also gets the
    ranges that its activations have on `rows`: what "int8-static" programs are made with. Raises BadInput.
    """
    if not 0 <= strength <= 1:
        raise BadInput(f"strength {strength} must be from 0 to 1: the share that moves into the weights")

    def run(model: Model) -> Model:
        module = copy.deepcopy(model.module)
        batches = list(calibration.batches(model, rows, most_rows))
        seen = _seen(module, batches)
        found = [fed for fed in _fed(model) if set(fed.layers) <= set(seen)]
        renamed: dict[str, str] = {}
        for fed in sorted(found, key=lambda f: f.kind == "product"):  # those last: their layers get other paths
            x = seen[fed.layers[0]]
            renamed |= _migrate(module, fed, torch.maximum(-x.low, x.high), strength)
        after = _seen(module, batches)
        ranges = {name: (min(float(s.low.min()), 0.0), max(float(s.high.max()), 0.0)) for name, s in after.items()}
        facts = {
            "strength": strength,
            "rows": sum(len(batch.inputs[0]) for batch in batches),
            "moved": dict(Counter(fed.kind for fed in found)),
            "layers": sum(len(fed.layers) for fed in found),
        }
        precisions = {renamed.get(name, name): kept for name, kept in model.precisions.items()}
        return model.after("smooth.linears", module, facts=facts, ranges=ranges, precisions=precisions)

    return run


class _Divided(torch.nn.Module):
    """A product a channel: what could be moved nowhere."""

    inverse: Tensor

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("inverse", 1 / factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inverse


def _migrate(module: torch.nn.Module, fed: Fed, peaks: Tensor, strength: float) -> dict[str, str]:
    """In place. Returns the new paths of layers that have another one now."""
    layers: list[Any] = [module.get_submodule(name) for name in fed.layers]
    weights = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0)
    factors = (peaks**strength / weights.clamp(min=rounding.SMALLEST) ** (1 - strength)).clamp(*FACTORS)
    factors = torch.where((peaks > 0) & (weights > 0), factors, 1.0)
    for layer in layers:
        layer.weight.data = layer.weight.data * factors
    if fed.kind != "product":
        into: Any = module.get_submodule(fed.into)
        last = fed.row + len(factors)
        for x in (into.weight, into.bias):
            if x is not None:
                x.data[fed.row : last] /= factors if x.ndim == 1 else factors[:, None]
        return {}
    divided = _Divided(factors)  # one for all: runtimes compute it once
    for name, layer in zip(fed.layers, layers, strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Sequential(divided, layer))
    return {name: f"{name}.1" for name in fed.layers}


# --- the graph --------------------------------------------------------------------------------------------------------


def _fed(model: Model) -> list[Fed]:
    """Every linear layer that is used once, with those that read the same tensor."""
    length = min(16, model.max_length) if model.lengths else 0
    with torch.no_grad():
        graph = torch.export.export(model.module, model.example(length), strict=False)
    owners = graph.graph_signature.inputs_to_parameters
    uses = Counter(owners[x.name] for n in graph.graph.nodes for x in n.all_input_nodes if x.name in owners)
    reading: dict[Any, list[str]] = {}
    for node in graph.graph.nodes:
        if _is(node, "linear") and node.args[1].name in owners and uses[owners[node.args[1].name]] == 1:
            reading.setdefault(node.args[0], []).append(owners[node.args[1].name].removesuffix(".weight"))
    values = _values(model)
    return [_placed(x, tuple(names), owners, uses, values) for x, names in reading.items()]


def _placed(x: Any, names: tuple[str, ...], owners: Any, uses: Counter[str], values: dict[str, tuple[str, int]]) -> Fed:
    if _is(x, "layer_norm") and len(x.users) == len(names) and len(x.args) > 2 and x.args[2] is not None:
        scale = owners[x.args[2].name]
        if uses[scale] == 1:
            return Fed(names, "norm", scale.removesuffix(".weight"))
    if len(names) == 1 and names[0] in values:
        return Fed(names, "values", *values[names[0]])
    return Fed(names, "product")


def _values(model: Model) -> dict[str, tuple[str, int]]:
    """Output layer of an attention -> the layer that makes its values, and their first row there."""
    try:
        found = structure.groups(model)
    except BadInput:
        return {}
    heads = [group for group in found if group.kind == structure.HEADS]
    return {g.out: (g.into[-1], (g.parts - 1) * g.units * g.width) for g in heads}


def _is(node: Any, kind: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] == kind


# --- what reaches layers ----------------------------------------------------------------------------------------------


class _Range(NamedTuple):
    low: Tensor  # [channels]
    high: Tensor


def _seen(module: torch.nn.Module, batches: Sequence[calibration.Batch]) -> dict[str, _Range]:
    """Of each linear layer that runs: least and greatest value of every channel, over valid tokens."""
    seen: dict[str, _Range] = {}
    valid: Tensor | None = None

    def watch(name: str) -> Callable[[torch.nn.Module, Any], None]:
        def hook(_module: torch.nn.Module, args: Any) -> None:
            x = args[0].detach()
            known = valid is not None and x.shape[:2] == valid.shape and x.ndim == 3
            flat = calibration.tokens(x, valid) if known else x.flatten(0, -2)
            low, high = flat.amin(0), flat.amax(0)
            before = seen.get(name, _Range(low, high))
            seen[name] = _Range(torch.minimum(before.low, low), torch.maximum(before.high, high))

        return hook

    known = {name: m for name, m in rounding.layers(module).items() if isinstance(m, torch.nn.Linear)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in known.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                valid = batch.valid
                module(*batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
