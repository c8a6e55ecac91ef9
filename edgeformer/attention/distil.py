"""
Joint distillation: the weights of a sparse model learn to give what the dense one gives, on texts without labels.

    student = copy.deepcopy(dense); swap.install(student, ...)      # scorers trained, thresholds calibrated
    distil(student, dense, rows, kept=0.25, recipe=steps(400, len(rows)))

What is matched: the output, and the hidden states after every block. Selection has no gradient; thresholds follow the
model as its queries and keys move, so that the kept fraction stays where it was. The loop is `train.fit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from ..stages import Progress, quiet
from ..train import Fitted, Recipe, fit
from . import op, swap
from .reference import THRESHOLD
from .scorer import RowInputs, digest

Tensor = torch.Tensor
# One row at a time: rows of different lengths need no padding, and memory holds one of them. Rates of 1e-4 and above
# made a sentence encoder worse at first.
RECIPE = Recipe(batch=2, accumulate=2, rate=5e-5, warmup=0.05, weight_decay=0.0)
# Of the output's error against that of the hidden states. Hidden states alone mislead: fitted to them by least squares,
# tokens came closer to the dense model's while their mean, the sentence vector, moved away.
OUTPUT = 4.0
FOLLOW = 0.5  # of a deviation in the kept fraction, into the logarithm of theta


def steps(count: int, rows: int) -> Recipe:
    """`RECIPE` for so many steps over so many rows."""
    if count < 1 or rows < 1:
        raise BadInput(f"distillation needs rows and steps, got {rows} rows and {count} steps")
    return replace(RECIPE, epochs=count / -(-rows // RECIPE.batch))


def distil(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rows: Sequence[RowInputs],
    kept: float,
    recipe: Recipe = RECIPE,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress = quiet,
) -> Fitted:
    """
    Trains `student` in place; embeddings and scorers stay as they are, but for theta under the threshold rule.

    rows: inputs of one forward each, with a batch axis of 1 and no padding. kept: the fraction of blocks to hold to.
    checkpoint: a file that a second call with the same models, rows and recipe goes on from.
    """
    if not rows or recipe.accumulate < recipe.batch:
        raise BadInput(f"distillation takes rows, one at a time: got {len(rows)} rows, {recipe.accumulate=}")
    if not swap.scorers(student):
        raise BadInput("the student has no sparse attention; install scorers before distillation")
    teacher_too = [*teacher.state_dict().values(), *(x for row in rows for x in _tensors(row))]
    made_of = digest(repr(kept), [*teacher_too, *student.buffers()]) if checkpoint else ""

    def loss(picked: Sequence[int]) -> Tensor:
        student.eval()  # dropout is noise that the teacher does not have
        total = torch.zeros(())
        for i in picked:
            before = op.counters()
            total = total + _distance(student, teacher, rows[i])
            after = op.counters()
            share = (after.kept - before.kept) / max(after.candidates - before.candidates, 1)
            _follow(student, (share - kept) / recipe.batch)
        return total / len(picked)

    lengths = [_tensors(row)[0].shape[1] for row in rows]
    with _trained(student):
        return fit(
            student, lengths, loss, recipe, checkpoint=checkpoint, made_of=made_of, what="distil", progress=progress
        )


def _follow(student: torch.nn.Module, excess: float) -> None:
    for x in swap.scorers(student):
        if x.config.rule == THRESHOLD:
            x.theta = x.theta * math.exp(FOLLOW * excess)  # another tensor: the gradient selects by the one it had


@contextmanager
def _trained(student: torch.nn.Module) -> Iterator[None]:
    """All of it but the embeddings, which hardly see attention, has a gradient for a while."""
    before = [(name, x, x.requires_grad) for name, x in student.named_parameters()]
    for name, x, _ in before:
        x.requires_grad_("embed" not in name)
    try:
        yield
    finally:
        for _, x, needed in before:
            x.requires_grad_(needed)
            x.grad = None


def _distance(student: torch.nn.Module, teacher: torch.nn.Module, row: RowInputs) -> Tensor:
    with torch.no_grad():
        want, want_hidden = traced(teacher, row)
    got, got_hidden = traced(student, row)
    hidden = torch.stack([_error(a, b) for a, b in zip(got_hidden, want_hidden, strict=True)]).mean()
    return hidden + OUTPUT * _error(got, want)


def _error(got: Tensor, want: Tensor) -> Tensor:
    """Squared error as a share of what there is; for unit vectors twice one minus the cosine."""
    got, want = got.float(), want.float()
    return (got - want).square().sum() / want.square().sum()


def traced(model: torch.nn.Module, row: RowInputs) -> tuple[Tensor, list[Tensor]]:
    """The output of a model and the hidden states after each of its blocks."""
    hidden: list[Tensor] = []

    def note(_module: torch.nn.Module, _given: Any, out: Any) -> None:
        hidden.append(out if isinstance(out, Tensor) else out[0])

    hooks = [block.register_forward_hook(note) for block in _blocks(model)]
    try:
        out = model(**row) if isinstance(row, Mapping) else model(*row)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(out, Tensor):
        return out, hidden
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state), hidden


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What repeats around each attention: `encoder.layer.3` of `encoder.layer.3.attention.self`."""
    names = [layer.name.split(".") for layer in swap.layers(model)]
    ends = [next((n for n in range(len(parts), 0, -1) if parts[n - 1].isdigit()), 0) for parts in names]
    return [model.get_submodule(".".join(parts[:n])) for parts, n in zip(names, ends, strict=True)]


def _tensors(row: RowInputs) -> list[Tensor]:
    values: Any = row.values() if isinstance(row, Mapping) else row
    return [x for x in values if isinstance(x, Tensor)]
