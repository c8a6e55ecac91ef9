"""
The one training loop: fine-tuning, distillation and whatever else is a loss over rows.

    fit(module, lengths, loss, Recipe(epochs=2), checkpoint="fit.safetensors")

`loss(rows)` is the mean loss of those rows; the loop picks rows of similar length, so that padding costs little, and
owns everything else. All randomness of a step comes from the seed and the step's number: a run that was killed and goes
on from its checkpoint ends with the bits of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import BadInput
from .stages import Progress, quiet

Tensor = torch.Tensor
Loss = Callable[[Sequence[int]], Tensor]  # the mean over these rows, a scalar

POOL = 50  # batches that are sorted by length together: long enough for equal lengths, short enough to stay random
SAVE_EVERY_S = 30.0
SMOOTH = 0.98  # of the running mean of the loss


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a linear decay to zero. The defaults fine-tune a small encoder."""

    epochs: float = 1.0
    batch: int = 32  # rows a step
    accumulate: int = 1  # parts a batch is computed in, one after the other: less memory, the same step
    rate: float = 1e-4
    warmup: float = 0.06  # share of the steps
    weight_decay: float = 0.01  # of matrices; vectors have none
    clip: float = 1.0  # norm of the gradient
    bf16: bool = True  # products in bfloat16 where the CPU has it; weights and sums stay fp32
    recompute: bool = False  # activations again in the backward pass: less memory, a third more time
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "rate", "clip"):
            if not getattr(self, name) > 0:
                raise BadInput(f"recipe: {name} {getattr(self, name)} must be above 0")
        if not (0 <= self.warmup < 1 and self.weight_decay >= 0):
            raise BadInput(
                f"recipe: warmup {self.warmup} must be in [0, 1), weight_decay {self.weight_decay} not below 0"
            )
        if self.accumulate > self.batch:
            raise BadInput(f"recipe: {self.accumulate} parts of a batch of {self.batch} rows; use fewer parts")


@dataclass(frozen=True)
class Fitted:
    """What a run did. `loss` is a running mean over about the last fifty steps."""

    steps: int
    resumed_at: int
    loss: float
    cpu_s: float  # of this process; a resumed run counts its own part


def fit(
    module: torch.nn.Module,
    lengths: Sequence[int],
    loss: Loss,
    recipe: Recipe,
    *,
    checkpoint: str | Path | None = None,
    made_of: str = "",
    what: str = "train",
    progress: Progress = quiet,
    save_every_s: float = SAVE_EVERY_S,
) -> Fitted:
    """
    Trains what requires a gradient, in place, and leaves the module in eval mode. `lengths`: tokens of each row.
    `checkpoint`: a file that a second call goes on from; `made_of` names what `loss` depends on, so that another
    training's file is refused. Raises BadInput where it is another's or the loss stops being a number.
    """
    per_epoch, steps = _steps(len(lengths), recipe)
    if not per_epoch:
        raise BadInput("no rows to train on")
    learned: dict[str, Tensor] = {name: x for name, x in module.named_parameters() if x.requires_grad}
    began, saved, order, epoch = time.process_time(), time.monotonic(), [], -1
    with torch.random.fork_rng(devices=[]), _recomputed(module, recipe.recompute):
        optimizer = _optimizer(learned, recipe)
        identity = _digest(learned, lengths, recipe, made_of)
        first, mean = _resume(checkpoint, identity, module, learned, optimizer)
        module.train()
        for step in range(first, steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = batches(lengths, recipe.batch, recipe.seed, epoch)
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _schedule(step, steps, recipe.warmup)
            found = _step(list(learned.values()), order[step % per_epoch], loss, optimizer, recipe)
            if not math.isfinite(found):
                raise BadInput(f"{what}: the loss of step {step + 1} is {found}; lower the rate ({recipe.rate})")
            mean = found if step == 0 else SMOOTH * mean + (1 - SMOOTH) * found
            if checkpoint and (step + 1 == steps or time.monotonic() - saved >= save_every_s):
                _save(Path(checkpoint), identity, step + 1, mean, module, learned, optimizer)
                saved = time.monotonic()
            progress(what, step + 1, steps)
    module.eval()
    return Fitted(steps, first, mean, time.process_time() - began)


def batches(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Every row once, in random order, rows of similar length together."""
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    size = np.asarray(lengths)
    pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
    by_length = [pool[np.argsort(size[pool], kind="stable")] for pool in pools]
    made = [pool[i : i + batch].tolist() for pool in by_length for i in range(0, len(pool), batch)]
    return [made[i] for i in random.permutation(len(made))]


def used(lengths: Sequence[int], recipe: Recipe) -> list[int]:
    """The rows that `fit` reads, ascending: all of them from one epoch on."""
    per_epoch, steps = _steps(len(lengths), recipe)
    if steps >= per_epoch:
        return list(range(len(lengths)))
    return sorted(row for batch in batches(lengths, recipe.batch, recipe.seed, 0)[:steps] for row in batch)


def _steps(rows: int, recipe: Recipe) -> tuple[int, int]:
    """Of an epoch, and of all."""
    per_epoch = -(-rows // recipe.batch)
    return per_epoch, max(round(recipe.epochs * per_epoch), 1)


def _step(
    learned: list[Tensor], rows: list[int], loss: Loss, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> float:
    """One step over `rows`, in parts. Returns their mean loss."""
    optimizer.zero_grad()
    total, size = 0.0, -(-len(rows) // recipe.accumulate)
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            found = loss(part) * (len(part) / len(rows))
        torch.autograd.backward(found)
        total += float(found.detach())
    torch.nn.utils.clip_grad_norm_(learned, recipe.clip)
    optimizer.step()
    return total


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 to 1 over the warm-up, then to 0 at the end."""
    rising = max(warmup * steps, 1.0)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1.0), 1.0)


def _optimizer(learned: dict[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    if not learned:
        raise BadInput("nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [x for x in learned.values() if x.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [x for x in learned.values() if x.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, fused=True)


@contextmanager
def _recomputed(module: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """The outermost transformers model inside computes its layers again in the backward pass."""
    if not wanted:
        yield
        return
    found: Any = next((m for m in module.modules() if hasattr(m, "gradient_checkpointing_enable")), None)
    if found is None:
        raise BadInput(f"recompute needs a transformers model inside {type(module).__name__}; train without it")
    found.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        found.gradient_checkpointing_disable()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _digest(learned: dict[str, Tensor], lengths: Sequence[int], recipe: Recipe, made_of: str) -> str:
    """Everything that training depends on."""
    digest = hashlib.sha256(repr((recipe, made_of, list(lengths))).encode())
    for name, x in learned.items():
        digest.update(name.encode() + repr(tuple(x.shape)).encode() + x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(
    path: Path,
    identity: str,
    step: int,
    mean: float,
    module: torch.nn.Module,
    learned: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"{name}|buffer": x for name, x in module.named_buffers()}
    for name, x in learned.items():
        tensors[f"{name}|value"] = x.detach()
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state[x].items()}
    write(path, tensors, {"made_of": identity, "step": str(step), "loss": repr(mean)})


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """A safetensors file that is there whole or not at all, whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.part")  # one name: what a killed run left behind is written over
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, work, facts)
    with work.open("rb") as file:
        os.fsync(file.fileno())
    work.replace(path)


def read(path: Path, made_of: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write` wrote. Raises BadInput where it is no such file, or was made of something else."""
    try:
        with safe_open(path, "pt") as file:
            facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not what edgeformer wrote ({error}); delete it or name another file") from error
    if facts.get("made_of") != made_of:
        raise BadInput(f"{path} was made with other rows, weights or settings; delete it or name another file")
    return tensors, facts


def _resume(
    path: str | Path | None,
    identity: str,
    module: torch.nn.Module,
    learned: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Steps that are already done, and their running loss."""
    if path is None or not Path(path).exists():
        return 0, 0.0
    saved, facts = read(Path(path), identity)
    for name, x in module.named_buffers():
        x.copy_(saved.pop(f"{name}|buffer"))
    for name, x in learned.items():
        x.data.copy_(saved.pop(f"{name}|value"))
        mine = [key for key in saved if key.startswith(f"{name}|")]
        optimizer.state[x] = {key.rpartition("|")[2]: saved[key].clone() for key in mine}
    return int(facts["step"]), float(facts["loss"])
