"""
Zeros among the weights, one shot: single weights or a pattern of N in M stay in place and become 0.

    build(model, target, passes=[unstructured.weights(texts, share=0.5)])
    build(model, target, passes=[unstructured.weights(texts, pattern=(2, 4))])

This makes a program smaller to send (zeros compress). No speed is expected: ONNX Runtime and LiteRT have no sparse int8
product here; `tools/bench/prune.py --unstructured` measures both. Structured pruning is what buys time.

Second order by default, as SparseGPT does (Frantar and Alistarh 2023): columns of a linear layer are decided from the
first to the last, by weight and inverse Hessian of the layer's inputs, and each error is spread over the columns still
to come. Layers go in the order of the computation, on the inputs that the pruned layers before them give. torchao and
torch.ao have masks by magnitude and by activations (Wanda) only, without the correction: hence these few lines.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .. import calibration, structure
from ..errors import BadInput
from ..model import Model
from . import Pass

METHODS = ("obs", "magnitude")
MOST_ROWS = 256
BLOCK = 64  # columns whose zeros are chosen together, where no pattern says so
DAMPING = 0.01

Tensor = torch.Tensor


def weights(
    rows: calibration.Rows, *, share: float = 0.5, pattern: tuple[int, int] | None = None, method: str = "obs"
) -> Pass:
    """
    Zeroes `share` of the weights of every attention and feed-forward layer, or all but N of each M neighbours along the
    input with pattern=(N, M). Embeddings and heads stay. method "magnitude" reads no row. Raises BadInput.
    """
    if not 0 <= share < 1:
        raise BadInput(f"share {share} must be at least 0 and below 1: the part of the weights to zero")
    if method not in METHODS:
        raise BadInput(f"method {method!r} must be one of {', '.join(METHODS)}")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise BadInput(f"pattern {pattern} must be (N, M) with 0 < N < M: N weights of each M neighbours stay")

    def run(model: Model) -> Model:
        found = structure.groups(model)
        module = copy.deepcopy(model.module)
        batches = list(calibration.batches(model, rows, MOST_ROWS)) if method == "obs" else []
        zeros = total = 0
        for group in found:
            for names in (group.into, (group.out,)):
                layers = [module.get_submodule(name) for name in names]
                hessian = _hessian(module, layers[0], batches) if method == "obs" else None
                for layer in layers:
                    made = _zeroed(layer, hessian, share, pattern)
                    layer.weight = torch.nn.Parameter(made, requires_grad=False)
                    zeros, total = zeros + int((made == 0).sum()), total + made.numel()
        facts = {
            "method": method,
            "share": round(zeros / total, 4),
            "pattern": None if pattern is None else f"{pattern[0]}:{pattern[1]}",
            "weights": total,
            "rows": sum(len(b.inputs[0]) for b in batches),
        }
        return model.after("unstructured.weights", module, facts=facts)

    return run


def _hessian(module: torch.nn.Module, layer: torch.nn.Module, batches: Sequence[calibration.Batch]) -> Tensor:
    """[D, D] second moments of what reaches a layer; query, key and value share it."""
    inputs = (calibration.reaching(module, layer, batch).double() for batch in batches)
    return torch.stack([x.T @ x for x in inputs]).sum(0)


def _zeroed(layer: Any, hessian: Tensor | None, share: float, pattern: tuple[int, int] | None) -> Tensor:
    weight: Tensor = layer.weight.detach().clone()
    columns = weight.shape[1]
    if pattern is not None and columns % pattern[1]:
        raise BadInput(f"{columns} input channels are not a multiple of {pattern[1]}, which pattern {pattern} needs")
    if hessian is None:
        return weight.masked_fill(_smallest(weight.abs(), share, pattern), 0)
    return _spread(weight.double(), _factor(hessian), share, pattern).float()


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: its row i tells how later columns make up for column i."""
    size = len(hessian)
    damping = DAMPING * hessian.diagonal().mean() + 1e-12
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + damping * torch.eye(size, dtype=hessian.dtype)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _spread(weight: Tensor, factor: Tensor, share: float, pattern: tuple[int, int] | None) -> Tensor:
    """Zeroes block after block of columns; a block is chosen from at once, its errors go on column by column."""
    size = pattern[1] if pattern else BLOCK
    for begin in range(0, weight.shape[1], size):
        end = min(begin + size, weight.shape[1])
        scale = factor.diagonal()[begin:end]
        gone = _smallest(weight[:, begin:end] / scale, share, pattern)
        errors = torch.zeros(len(weight), end - begin, dtype=weight.dtype)
        for i in range(begin, end):
            error = torch.where(gone[:, i - begin], weight[:, i] / factor[i, i], 0.0)
            weight[:, i:end] -= error[:, None] * factor[i, i:end]
            weight[:, i] = torch.where(gone[:, i - begin], 0.0, weight[:, i])
            errors[:, i - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return weight


def _smallest(scores: Tensor, share: float, pattern: tuple[int, int] | None) -> Tensor:
    """True where a weight goes: the smallest magnitudes of all, or all but N of each M neighbours."""
    scores = scores.abs()
    if pattern is None:
        count = round(share * scores.numel())
        order = scores.flatten().argsort()
        gone = torch.zeros(scores.numel(), dtype=torch.bool)
        gone[order[:count]] = True
        return gone.view_as(scores)
    rest = pattern[1] - pattern[0]
    parts = scores.view(len(scores), -1, pattern[1])
    return torch.zeros_like(parts, dtype=torch.bool).scatter_(2, parts.argsort(2)[..., :rest], True).view_as(scores)
