"""
Joint distillation: the weights of a sparse model learn to give what the dense one gives, on texts without labels.

    student = copy.deepcopy(dense); swap.install(student, ...)      # scorers trained, thresholds calibrated
    distil(student, dense, rows, kept=0.25, recipe=Recipe(steps=400))

What is matched: the output, and the hidden states after every block. Selection has no gradient; thresholds follow the
model as its queries and keys move, so that the kept fraction stays where it was. One row is in memory at a time.
Training is seeded, and resumes from its checkpoint with the bits of an uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import BadInput
from . import op, swap
from .checkpoint import Checkpoint, digest
from .reference import THRESHOLD
from .scorer import Progress, RowInputs, quiet

Tensor = torch.Tensor
SAVE_EVERY = 50  # steps
FOLLOW = 0.5  # of a deviation in the kept fraction, into the logarithm of theta


@dataclass(frozen=True)
class Recipe:
    """
    AdamW with a warm-up and a cosine rate. `output`: weight of the output's error against that of the hidden states.
    It is above 1 because hidden states alone mislead: fitted to them by least squares, tokens came closer to the dense
    model's while their mean, the sentence vector, moved away. Rates of 1e-4 and above made MiniLM worse at first.
    """

    steps: int = 400
    batch: int = 2
    rate: float = 5e-5
    warmup: float = 0.05
    decay: float = 0.0
    output: float = 4.0
    clip: float = 1.0
    bfloat16: bool = True  # linear layers only; attention stays float32. Faster where the CPU has the instructions
    seed: int = 0


class Distilled(NamedTuple):
    losses: tuple[float, ...]  # of each step that this call ran
    kept: float  # mean over the last tenth of them


def distil(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rows: Sequence[RowInputs],
    kept: float,
    recipe: Recipe | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress = quiet,
) -> Distilled:
    """
    Trains `student` in place; embeddings and scorers stay as they are, but for theta under the threshold rule.

    rows: inputs of one forward each, with a batch axis of 1 and no padding. kept: the fraction of blocks to hold to.
    checkpoint: a file that a second call with the same models, rows and recipe goes on from.
    """
    recipe = recipe or Recipe()
    if not rows or recipe.steps < 1:
        raise BadInput(f"distillation needs rows and steps, got {len(rows)} rows and {recipe.steps} steps")
    learned: list[Tensor] = [x for name, x in student.named_parameters() if "embed" not in name]
    thetas = [x.theta for x in swap.scorers(student)]
    if not thetas:
        raise BadInput("the student has no sparse attention; install scorers before distillation")
    optimizer = torch.optim.AdamW(learned, lr=recipe.rate, weight_decay=recipe.decay, fused=True)
    random = torch.Generator().manual_seed(recipe.seed)
    given = [x for row in rows for x in _tensors(row)]
    made_of = digest(repr((recipe, kept)), [*given, *student.state_dict().values()]) if checkpoint else ""
    saved = Checkpoint(Path(checkpoint) if checkpoint else None, made_of)
    done = saved.resume([*learned, *thetas], optimizer, random)
    losses, shares = [], []
    with _trained(student, learned):
        for step in range(done, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _rate(step, recipe)
            picked = torch.randint(len(rows), (recipe.batch,), generator=random).tolist()
            before = op.counters()
            losses.append(_step(student, teacher, [rows[i] for i in picked], optimizer, recipe))
            after = op.counters()
            shares.append((after.kept - before.kept) / max(after.candidates - before.candidates, 1))
            _follow(student, shares[-1] - kept)
            progress("distil", step + 1, recipe.steps)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
                saved.save(step + 1, [*learned, *thetas], optimizer, random)
    last = shares[-max(len(shares) // 10, 1) :]
    return Distilled(tuple(losses), sum(last) / max(len(last), 1))


def _rate(step: int, recipe: Recipe) -> float:
    rising = (step + 1) / max(recipe.warmup * recipe.steps, 1)
    return min(rising, (1 + math.cos(math.pi * step / recipe.steps)) / 2)


def _follow(student: torch.nn.Module, excess: float) -> None:
    for x in swap.scorers(student):
        if x.config.rule == THRESHOLD:
            x.theta.mul_(math.exp(FOLLOW * excess))


@contextmanager
def _trained(student: torch.nn.Module, learned: list[Tensor]) -> Iterator[None]:
    before = [(x, x.requires_grad) for x in student.parameters()]
    for x, _ in before:
        x.requires_grad_(False)
    for y in learned:
        y.requires_grad_(True)
    try:
        yield
    finally:
        for x, needed in before:
            x.requires_grad_(needed)
            x.grad = None


def _step(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rows: Sequence[RowInputs],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> float:
    """Gradients are summed row by row: rows of different lengths need no padding, and memory holds one of them."""
    optimizer.zero_grad()
    total = 0.0
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            with torch.no_grad():
                want, want_hidden = traced(teacher, row)
            got, got_hidden = traced(student, row)
        hidden = torch.stack([_error(a, b) for a, b in zip(got_hidden, want_hidden, strict=True)]).mean()
        loss = (hidden + recipe.output * _error(got, want)) / len(rows)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.clip)
    optimizer.step()
    return total


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
