"""
Rows as passes read them: a few batches of similar length, and what reaches a layer when they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import data
from .model import Model

BATCH_TOKENS = 2048

Tensor = torch.Tensor
Rows = Sequence[str] | data.Rows


class Batch(NamedTuple):
    """Padded on the right; labels are those of a classification."""

    inputs: tuple[Tensor, ...]
    valid: Tensor | None  # [B, N] tokens that are not padding
    labels: Tensor | None


def batches(model: Model, rows: Rows, most: int) -> Iterator[Batch]:
    """At most `most` rows, evenly picked, those of similar length together."""
    found = rows if isinstance(rows, data.Rows) else data.load(model, list(rows), None)
    known = found.labels if model.task.kind == "classification" else None
    labels = None if known is None else np.asarray(known)
    count = min(len(found.rows), most)
    picked = [i * len(found.rows) // count for i in range(count)]
    first = model.inputs[0].name
    size = {i: len(found.rows[i][first]) if model.lengths else BATCH_TOKENS // 16 for i in picked}
    batch: list[int] = []
    for i in sorted(picked, key=lambda i: size[i]):
        if batch and (len(batch) + 1) * size[i] > BATCH_TOKENS:
            yield _batch(model, [found.rows[j] for j in batch], None if labels is None else labels[batch])
            batch = []
        batch.append(i)
    yield _batch(model, [found.rows[j] for j in batch], None if labels is None else labels[batch])


def _batch(model: Model, rows: list[Any], labels: Any) -> Batch:
    made = []
    for x in model.inputs:
        arrays = [torch.from_numpy(np.asarray(row[x.name], x.dtype)) for row in rows]
        made.append(torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True, padding_value=x.pad))
    masks = [t for x, t in zip(model.inputs, made, strict=True) if x.name == "attention_mask"]
    return Batch(
        tuple(made), masks[0].bool() if masks else None, None if labels is None else torch.from_numpy(labels).long()
    )


def tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """[B, N, C] -> [valid tokens, C]."""
    return x.flatten(0, -2) if valid is None else x[valid]


class _ReachedError(Exception):
    """What a hook needs is there; the rest of the model need not run."""


def reaching(module: torch.nn.Module, out: torch.nn.Module, batch: Batch) -> Tensor:
    """What reaches layer `out`, on the valid tokens [tokens, D]."""
    caught: list[Tensor] = []

    def catch(_module: Any, args: Any) -> None:
        caught.append(tokens(args[0], batch.valid))
        raise _ReachedError

    hook = out.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            module(*batch.inputs)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return caught[0]
