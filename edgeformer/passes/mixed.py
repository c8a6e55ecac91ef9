"""
Mixed precision: the layers that rounding hurts most are kept finer, as few of them as a loss allows.

    build(model, target, precision="int4", passes=[mixed.layers(texts, precision="int4", loss=0.05)])

Each linear layer and embedding table is rounded alone, and what that does to the output on calibration rows is its
loss. Squared losses of single layers add up, so layers are kept in the order of squared loss a weight: the most gain
for the bytes. How many is found by rounding all the others at once. The model carries the result to the exporters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import calibration, rounding
from ..errors import BadInput
from ..model import Model
from ..stages import Progress, quiet
from . import Pass

ROWS = 64
KEPT_IN = {"int8": "fp32", "int4": "int8", "int4-embeddings": "int8"}  # program -> what its sensitive layers are

Tensor = torch.Tensor


def layers(
    rows: calibration.Rows,
    *,
    precision: str = "int4",
    loss: float | None = None,
    keep: int | None = None,
    activations: str = "tensor",
    most_rows: int = ROWS,
    progress: Progress = quiet,
) -> Pass:
    """
    For a program of `precision`: int4 keeps sensitive layers in int8, int8 keeps them in fp32. `loss`: what the output
    may change, as a share of its size (root mean square); `keep`: how many layers instead. `activations` are rounded
    as the program does ("tensor" in ONNX, "token" elsewhere). Raises BadInput, also where no number of layers suffices.
    """
    if precision not in KEPT_IN:
        raise BadInput(f"precision {precision!r} must be one of {', '.join(KEPT_IN)}: others keep nothing finer")
    if (loss is None) == (keep is None):
        raise BadInput("give either loss (a share of the output's size) or keep (a number of layers)")
    if (loss is not None and not 0 < loss < 1) or (keep is not None and keep < 0):
        raise BadInput(f"loss {loss} must be between 0 and 1, keep {keep} not below 0")

    def run(model: Model) -> Model:
        asked, finer = rounding.asked(model, precision), KEPT_IN[precision]
        meter = _Meter(model, rows, activations, most_rows)
        rank = rounding.FINENESS.index
        open_to = [name for name, found in asked.items() if rank(found) < rank(finer)]
        single = {}
        for done, name in enumerate(open_to, 1):
            single[name] = meter.loss({name: asked[name]})
            progress("sensitivity", done, len(open_to))
        sizes = {name: layer.weight.numel() for name, layer in rounding.layers(model.module).items()}
        order = sorted(open_to, key=lambda name: (-(single[name] ** 2) / sizes[name], name))

        def left(count: int) -> float:
            return meter.loss(asked | dict.fromkeys(order[:count], finer))

        count = min(keep, len(order)) if keep is not None else _fewest(left, len(order), float(loss or 0))
        kept = dict.fromkeys(order[:count], finer)
        facts = {
            "precision": precision,
            "kept": kept,
            "layers": len(asked),
            "loss_without": round(left(0), 5),
            "loss": round(left(count), 5),
            "sensitivity": {name: round(single[name], 5) for name in order},
            "rows": meter.rows,
            "activations": activations,
        }
        return model.after("mixed.layers", facts=facts, precisions={**model.precisions, **kept})

    return run


def _fewest(left: Any, most: int, loss: float) -> int:
    """The least count whose loss is allowed, by halving: more layers kept do not lose more, but for chance."""
    if (best := left(most)) > loss:
        raise BadInput(f"with every layer kept finer the output still changes by {best:.4f}; allow more than {loss}")
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= loss else (middle + 1, high)
    return low


class _Meter:
    """The output of the unchanged model, and how far rounding moves it."""

    def __init__(self, model: Model, rows: calibration.Rows, activations: str, most: int) -> None:
        self.module, self.activations = copy.deepcopy(model.module), activations
        self.per_token = model.output.shape[1:2] == (-1,)
        self.batches: Sequence[calibration.Batch] = list(calibration.batches(model, rows, most))
        self.rows = sum(len(batch.inputs[0]) for batch in self.batches)
        self.wanted = self._outputs()
        self.known: dict[Any, float] = {}

    def loss(self, precisions: Mapping[str, str]) -> float:
        """Root mean square of the change over that of the output, over valid tokens."""
        key = tuple(sorted(precisions.items()))
        if key not in self.known:
            rounding.pretend(self.module, precisions, self.activations)
            found = self._outputs()
            rounding.reveal(self.module, precisions)
            moved = sum(float((a - b).square().sum()) for a, b in zip(found, self.wanted, strict=True))
            size = sum(float(x.square().sum()) for x in self.wanted)
            self.known[key] = (moved / max(size, rounding.SMALLEST)) ** 0.5
        return self.known[key]

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            outputs = [(self.module(*batch.inputs).float(), batch.valid) for batch in self.batches]
        return [calibration.tokens(x, valid) if self.per_token else x for x, valid in outputs]
