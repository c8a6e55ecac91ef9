"""
Whole layers leave without training: each time the one whose absence changes the model's answers least.

    build(model, target, passes=[depth.layers(texts, keep=4)])

Texts need no labels: an answer is compared with the whole model's. After it, `distil` or `prune.structured` can go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import calibration
from ..errors import BadInput
from ..model import Model
from . import Pass, student
from .distil import response

MOST_ROWS = 128


def layers(rows: calibration.Rows, *, keep: int) -> Pass:
    """keep: how many layers stay. Greedy: as many trials as layers for each one that leaves. Raises BadInput."""

    def run(model: Model) -> Model:
        count = len(student.layer_stack(model.module))
        if not 0 < keep <= count:
            raise BadInput(f"keep {keep}: {model.name} has {count} layers; keep at least one of them")
        batches = list(calibration.batches(model, rows, MOST_ROWS))
        wanted = [_answers(model, batch) for batch in batches]
        left, changes = tuple(range(count)), list[float]()
        while len(left) > keep:
            trials = [tuple(n for n in left if n != gone) for gone in left]
            costs = [_change(student.layers(trial)(model), batches, wanted) for trial in trials]
            best = min(range(len(trials)), key=costs.__getitem__)
            left, changes = trials[best], [*changes, round(costs[best], 5)]
        made = student.layers(left)(model)
        facts = {
            "kept": list(left),
            "of": count,
            "changes": changes,  # of the answers, after each layer that left
            "parameters": sum(p.numel() for p in made.module.parameters()),
            "rows": sum(len(batch.inputs[0]) for batch in batches),
        }
        return model.after("depth.layers", made.module, facts=facts)

    return run


def _answers(model: Model, batch: calibration.Batch) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.module(*batch.inputs)
    return output


def _change(model: Model, batches: Sequence[calibration.Batch], wanted: Sequence[torch.Tensor]) -> float:
    """The mean over rows of how far answers are from those wanted: KL divergence, squared distance or 1 - cosine."""
    total = sum(
        len(want) * float(response(_answers(model, batch), want, model.task.kind, 1.0))
        for batch, want in zip(batches, wanted, strict=True)
    )
    return total / sum(map(len, wanted))
