"""
How weights and activations are rounded: what exporters write, and what passes pretend while they train or measure.

Linear layers and embedding tables are rounded symmetrically by row: int8 with one scale a row, int4 with one for each
GROUP of a row's columns; the largest weight becomes 127 or 7. Activations are rounded while a program runs, around a
zero point, with a scale for each token or for each input row ("tensor", as ONNX Runtime's int8 does).

A table of a FEW rows (token types) stays in fp32: each of its rows is added to many tokens or to all, and its error is
the same in all of them and does not average out.

The straight-through rounding is torch's own. torchao's fake quantizers choose scales that no exporter here writes (the
largest weight becomes 127.5 or 7.5), so that training would learn other numbers than the file holds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from .errors import BadInput, ExportError
from .model import Model

NEAR = 1 / 32  # of a token's largest value: what is above is quantized by itself in `Apart`
FEW = 16  # rows of a table that stays in fp32
GROUP = 32  # columns that share a scale in int4
MOST = {"int8": 127, "int4": 7}
SMALLEST = 1e-12  # scale of a row of zeros
DAMPING = 0.05  # of the mean square of what reaches a matrix: as much of it is taken for independent noise
AT_ONCE = 64  # rows
ACTIVATIONS = ("token", "tensor", "none")
FINENESS = ("int4", "int8", "fp16", "fp32")
# What a program of a precision stores: linear layers, embedding tables.
PARTS = {
    "int8": ("int8", "int8"),
    "int8-static": ("int8", "int8"),
    "int4": ("int4", "int4"),
    "int4-embeddings": ("int8", "int4"),
}

Tensor = torch.Tensor
Content = tuple[tuple[int, ...], bytes]


def layers(module: torch.nn.Module) -> dict[str, Any]:
    """Path -> every linear layer and embedding table; no subclass, which may compute more."""
    return {name: m for name, m in module.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Embedding)}


def stored(weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """[rows, columns] fp32 -> int8 values of that shape and fp32 scales [rows, groups]; one group in int8."""
    weight = weight.detach()
    scales = _scales(weight, precision)
    parts = weight.reshape(*scales.shape, -1)
    most = MOST[precision]
    values = (parts / scales[..., None]).round().clamp(-most, most).to(torch.int8)
    return values.reshape(weight.shape), scales


def factor(moments: np.ndarray) -> np.ndarray:
    """
    What `compensated` needs to know of what a matrix is multiplied by. moments: [depth, depth] fp64, the mean of x xT.
    -> upper triangular U with UT U the inverse of the moments.
    """
    noise = DAMPING * float(np.diag(moments).mean()) or 1.0
    inverse = np.linalg.inv(moments + noise * np.eye(len(moments)))
    upper: np.ndarray = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return upper


def compensated(whole: np.ndarray, upper: np.ndarray, most: int) -> np.ndarray:
    """
    [depth, channels] in steps of each channel -> integers up to `most`, not each the nearest: what rounding a row loses
    is made up for by the rows behind it, as far as their inputs go together (Frantar et al., GPTQ, arXiv 2210.17323).
    """
    left, made = whole.astype(np.float64), np.empty(whole.shape)
    for start in range(0, len(left), AT_ONCE):
        end = min(start + AT_ONCE, len(left))
        lost = np.empty_like(left[start:end])
        for i in range(start, end):
            made[i] = np.clip(np.rint(left[i]), -most, most)
            lost[i - start] = (left[i] - made[i]) / upper[i, i]
            left[i + 1 : end] -= upper[i, i + 1 : end, None] * lost[i - start]
        left[end:] -= upper[start:end, end:].T @ lost
    return made


def pretended(weight: Tensor, precision: str) -> Tensor:
    """The fp32 numbers that the stored ones stand for; the gradient passes as if nothing had been rounded."""
    with torch.no_grad():
        scales = _scales(weight, precision).flatten()
    most = MOST[precision]
    parts = weight.reshape(len(scales), -1)
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(parts, scales, zeros, 0, -most, most)
    return rounded.reshape(weight.shape)


def fitting(precision: str, columns: int) -> str:
    """int4 needs whole groups; a row that has none is stored in int8."""
    return "int8" if precision == "int4" and columns % GROUP else precision


def asked(model: Model, precision: str) -> dict[str, str]:
    """Path of each layer -> what a program of `precision` stores it in, finer where the model says so."""
    made = {}
    for name, layer in layers(model.module).items():
        table = isinstance(layer, torch.nn.Embedding)
        part = PARTS[precision][table]
        part = max(part, model.precisions.get(name, part), key=FINENESS.index)
        made[name] = _stored_in(part, layer.weight.shape, table=table)
    return made


def _stored_in(precision: str, shape: Sequence[int], *, table: bool) -> str:
    return "fp32" if table and shape[0] <= FEW else fitting(precision, shape[1])


@dataclass(frozen=True)
class Chosen:
    """
    What the constant matrices of an exported graph are stored in. Exporters rename and transpose them, so a layer that
    the model keeps finer is known by its content.
    """

    parts: tuple[str, str]  # linear layers, embedding tables
    finer: Mapping[Content, str] = field(default_factory=dict)
    ranges: Mapping[Content, tuple[float, float]] = field(default_factory=dict)  # of activations
    exact: Mapping[Content, str] = field(default_factory=dict)  # linear layers asked in fp32, and their paths

    def range_of(self, matrix: np.ndarray) -> tuple[float, float] | None:
        """What reaches a linear layer [out, in]: its least and greatest value."""
        return self.ranges.get(_content(matrix))

    def computed_in_fp32(self, matrix: np.ndarray) -> str:
        """
        The path of a linear layer [out, in] that must be, where the arithmetic is fp16; "" of another. A table is only
        looked up: in fp16 it gives what fp16 arithmetic would take of it.
        """
        return self.exact.get(_content(matrix), "") if self.exact else ""

    def hold(self, found: Collection[str], format: str) -> None:
        """Raises ExportError unless every layer that must be computed in fp32 is among those `found` in a program."""
        if lost := sorted({*self.exact.values()} - {*found}):
            raise ExportError(
                f"{format}: precisions: {lost[0]} = fp32: the program has no such linear layer (it was folded, or no "
                "output needs it); leave it out of the model's precisions"
            )

    def of(self, matrix: np.ndarray, *, table: bool) -> str:
        """`matrix`: [out, in] of a linear layer, [rows, columns] of a table."""
        part = self.parts[table]
        found = self.finer.get(_content(matrix), part) if self.finer else part
        return _stored_in(max(part, found, key=FINENESS.index), matrix.shape, table=table)


def chosen(model: Model, precision: str) -> Chosen:
    """For a program of this precision. Raises BadInput where the model keeps a layer that it has not."""
    finer: dict[Content, str] = {}
    exact: dict[Content, str] = {}
    known = layers(model.module)
    for name, found in model.precisions.items():
        if name not in known or found not in FINENESS:
            raise BadInput(f"precisions: {name} = {found}: {model.name} has no such layer, or it is none of {FINENESS}")
        key = _content(known[name].weight.detach().numpy())
        finer[key] = max(found, finer.get(key, found), key=FINENESS.index)
        if found == "fp32" != precision and isinstance(known[name], torch.nn.Linear):
            exact[key] = name
    if precision != "int8-static":
        return Chosen(PARTS.get(precision, (precision, precision)), finer, exact=exact)
    if not model.ranges:
        raise BadInput(
            f"int8-static needs the ranges of {model.name}'s activations: add the pass smooth.linears, in a recipe "
            '[[pass]] name = "smooth.linears"'
        )
    if gone := sorted(set(model.ranges) - set(known)):
        raise BadInput(f"{gone[0]} has a range and is no layer of {model.name} any more: let smooth.linears come last")
    ranges = {_content(known[name].weight.detach().numpy()): found for name, found in model.ranges.items()}
    return Chosen(PARTS[precision], finer, ranges)


# --- huge values ------------------------------------------------------------------------------------------------------


class Apart(torch.nn.Module):
    """
    A product whose rows hold a few values far above the rest, which one scale a token would round away: what they have
    above `NEAR` is a second row with a scale of its own, through the same weights. A decoder's feed-forward layers give
    such rows, and few of a model's products narrow as theirs do (see `wide`). Takes the bias of `product`.
    """

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.bias: torch.nn.Parameter | None = product.bias
        product.bias = None  # once, not for each part
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        near = x.abs().amax(-1, keepdim=True) * NEAR
        low = torch.minimum(torch.maximum(x, -near), near)
        parts = self.product(torch.stack((low, x - low), -3))
        out: Tensor = parts.select(-3, 0) + parts.select(-3, 1)
        return out if self.bias is None else out + self.bias


def wide(model: Model, layer: torch.nn.Module) -> bool:
    """Whether the tokens that reach a layer are taken apart, where activations have one scale a token."""
    return model.task.kind == "next_token" and type(layer) is torch.nn.Linear and layer.in_features > layer.out_features


# --- pretending -------------------------------------------------------------------------------------------------------


def pretend(module: torch.nn.Module, precisions: Mapping[str, str], activations: str) -> None:
    """Rounds the weights of these layers, and what reaches the linear ones, at every forward. In place."""
    if activations not in ACTIVATIONS:
        raise BadInput(f"activations {activations!r} must be one of {', '.join(ACTIVATIONS)}")
    for name, precision in precisions.items():
        if precision not in MOST:
            continue
        layer = module.get_submodule(name)
        table = isinstance(layer, torch.nn.Embedding)
        parametrize.register_parametrization(layer, "weight", _Rounded(precision))
        if activations != "none" and not table:
            layer.register_forward_pre_hook(_Activations(activations))


def reveal(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Takes away again what `pretend` put in; weights keep what they learned. In place."""
    for name in names:
        layer: Any = module.get_submodule(name)
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, _Activations):
                del layer._forward_pre_hooks[key]


def pretending(model: Model, precisions: Mapping[str, str], activations: str) -> torch.nn.Module:
    """A copy of the model's module that rounds."""
    module = copy.deepcopy(model.module)
    pretend(module, precisions, activations)
    return module


class _Rounded(torch.nn.Module):
    """A weight as its program stores it."""

    bits: Tensor

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self.register_buffer("bits", torch.tensor(int(precision[3:])))  # so that a checkpoint tells int4 from int8

    def forward(self, weight: Tensor) -> Tensor:
        return pretended(weight, self.precision)


class _Activations:
    """Forward pre-hook: [..., channels] rounded to 256 steps between its least and largest value."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    def __call__(self, _module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        rows = x.reshape(-1, x.shape[-1]) if self.scope == "token" else x.flatten(1)
        with torch.no_grad():
            low, high = (f(rows, 1).float() for f in (torch.amin, torch.amax))
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = ((high - low) / 255).clamp(min=SMALLEST)
            zero = (-low / scale).round().to(torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(rows.float(), scale, zero, 0, 0, 255)
        return (rounded.reshape(x.shape).to(x.dtype), *rest)


def _scales(weight: Tensor, precision: str) -> Tensor:
    groups = weight.shape[1] // GROUP if precision == "int4" else 1
    largest = weight.reshape(len(weight), groups, -1).abs().amax(2)
    return (largest / MOST[precision]).clamp(min=SMALLEST)


def _content(matrix: np.ndarray) -> Content:
    return matrix.shape, blake2b(np.ascontiguousarray(matrix, np.float32).tobytes()).digest()
