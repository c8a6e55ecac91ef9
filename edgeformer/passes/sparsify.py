"""
Dynamic sparse attention: each layer reads only the key blocks that its scorer expects to matter for this input.

    build(model, target, passes=[sparsify.dsa(long_texts, budget=0.5)])

Trains the scorers on the rows given, finds the thresholds that keep `budget` of the blocks at their length, and swaps
the attention. The model's own weights change only with `distil`, which small budgets need: they then learn to give with
sparse attention what the dense model gives. It pays from about a thousand tokens on; below `dense_below` tokens, and in
layers that would keep nearly everything, attention stays dense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer_agent import wire

from ..attention import distil as distillation, scorer, swap
from ..attention.op import Parameters
from ..attention.reference import THRESHOLD, Config
from ..errors import BadInput
from ..model import Model
from . import Pass

DENSE_BELOW = 256
# Calibrated kept fraction above which a layer is dense: scoring would cost more than it saves (spec, section 12).
DENSE_ABOVE = {0: 0.85, 1: 0.75}
MOST_ROWS = 100  # for scorers
FEWEST_BLOCKS = 4  # of the longest row; with fewer there is nothing to choose from

Rows = Sequence[str] | Sequence[Mapping[str, np.ndarray]]


def dsa(
    rows: Rows,
    *,
    budget: float = 0.5,
    length: int = 0,
    buckets: Sequence[int] = (),
    block: int = 64,
    rule: int = THRESHOLD,
    per_head: bool = False,
    int8: bool = False,
    dense_below: int = DENSE_BELOW,
    recipe: scorer.Recipe | None = None,
    distil: int | distillation.Recipe = 0,
    checkpoint: str | Path | None = None,
    progress: scorer.Progress = scorer.quiet,
) -> Pass:
    """
    rows: long texts, or inputs as in `edgeformer.data`; the longer ones serve, cut to `length` (the model's limit).
    budget: fraction of blocks to keep. buckets: shorter lengths to calibrate as well (`swap.for_length`).
    block: tokens a side, 32 (finer) or 64 (faster). rule: reference.THRESHOLD, TOP_P or TOP_K.
    per_head: a budget a head instead of one threshold for all. int8: attention in int8 as well.
    recipe: of the scorer training; by default the one for encoders or for decoders.
    distil: steps of joint distillation, or its whole recipe. It uses all of the long rows, the scorers the first 100.
    checkpoint: a file from which interrupted training goes on; that of the distillation is beside it, with `.distil`.
    """
    if not 0 < budget <= 1:
        raise BadInput(f"budget {budget} must be above 0 and at most 1: the fraction of blocks to keep")
    base = Config(block_q=block, block_k=block, rule=rule, dense_below=dense_below)
    steps = distillation.Recipe(steps=distil) if isinstance(distil, int) else distil

    def run(model: Model) -> Model:
        longest = min(length or model.max_length, model.max_length or length)
        given, module = _inputs(model, rows, longest, block), copy.deepcopy(model.module)
        tokens = 0 if model.lengths else length
        goal = _Goal(budget, per_head, _with_sink(base, module), int(int8), given[:MOST_ROWS], tokens, progress)
        stats = scorer.collect(module, goal.rows, goal.config, progress, tokens)
        trained = scorer.train(stats, recipe, checkpoint=checkpoint, progress=progress)
        most = int(stats.lengths.max())
        by_length = {most: scorer.calibrate(stats, trained.parameters, budget, per_head=per_head)}
        for n in sorted(n for n in buckets if model.lengths and n < most):
            by_length[n] = _calibrated(module, trained.parameters, goal, n)
        dense = _install(module, trained.parameters, by_length, most, goal)
        distilled: dict[str, Any] = {}
        if steps.steps and len(dense) < len(by_length[most].kept_by_layer):
            kept, files = _over_sparse(by_length[most], dense), f"{checkpoint}.distil" if checkpoint else None
            long = _long_enough(given, tokens, dense_below)
            told = distillation.distil(module, model.module, long, kept, steps, checkpoint=files, progress=progress)
            for n in by_length:  # the model has moved, and a layer's inputs are now those of a sparse model
                swap.for_length(module, n)
                by_length[n] = _calibrated(module, trained.parameters, goal, n)
            swap.set_thetas(module, {n: x.theta for n, x in by_length.items()})
            distilled = {"distilled": asdict(steps) | {"rows": len(long), "kept": round(told.kept, 4)}}
        facts = _facts(goal, trained, by_length, most, dense) | distilled
        return model.after("sparsify.dsa", module, facts=facts)

    return run


@dataclass(frozen=True)
class _Goal:
    """What thresholds are calibrated for, and on what."""

    budget: float
    per_head: bool
    config: Config
    compute: int
    rows: list[tuple[torch.Tensor, ...]]
    tokens: int  # of the longest row; 0 where the rows say it
    progress: scorer.Progress


def _calibrated(module: torch.nn.Module, parameters: Parameters, goal: _Goal, length: int) -> scorer.Calibration:
    """For rows cut to `length`, on what the layers of `module` see as it is now, dense or sparse."""
    few = goal.rows[: scorer.CALIBRATION_ROWS]
    few = few if goal.tokens else [tuple(x[:, :length] for x in row) for row in few]
    stats = scorer.collect(module, few, goal.config, goal.progress, goal.tokens)
    return scorer.calibrate(stats, parameters, goal.budget, per_head=goal.per_head)


def _install(
    module: torch.nn.Module, all_layers: Parameters, by_length: dict[int, scorer.Calibration], most: int, goal: _Goal
) -> set[int]:
    """Makes the layers sparse, but for those that keep nearly everything: these are returned."""
    found = by_length[most]
    dense = {n for n, kept in enumerate(found.kept_by_layer) if kept > DENSE_ABOVE[goal.compute]}
    stacked = all_layers._replace(theta=found.theta)

    def parameters(layer: swap.Layer) -> Parameters | None:
        return None if layer.number in dense else scorer.one_layer(stacked, layer.number)

    swap.install(module, parameters, goal.config, goal.compute)
    if len(dense) < len(found.kept_by_layer):
        swap.set_thetas(module, {n: x.theta for n, x in by_length.items()})
    return dense


def _long_enough(
    given: list[tuple[torch.Tensor, ...]], tokens: int, dense_below: int
) -> list[tuple[torch.Tensor, ...]]:
    """Up to `dense_below` tokens student and teacher are the same."""
    long = [row for row in given if (tokens or row[0].shape[1]) > dense_below]
    if not long:
        raise BadInput(f"distillation needs rows of more than dense_below={dense_below} tokens; give longer texts")
    return long


def _over_sparse(found: scorer.Calibration, dense: set[int]) -> float:
    kept = [x for n, x in enumerate(found.kept_by_layer) if n not in dense]
    return sum(kept) / len(kept)


def _facts(
    goal: _Goal, trained: scorer.Trained, by_length: dict[int, scorer.Calibration], most: int, dense: set[int]
) -> dict[str, Any]:
    found, config = by_length[most], goal.config
    kept = [1.0 if n in dense else round(x, 4) for n, x in enumerate(found.kept_by_layer)]
    return {
        "budget": goal.budget,
        "kept": round(sum(kept) / len(kept), 4),
        "kept_by_layer": kept,
        "mass_kept": round(found.recall, 4),
        "dense_layers": sorted(dense),
        "theta": {str(n): _thetas(x.theta) for n, x in sorted(by_length.items())},
        "rows": len(goal.rows),
        "kl": round(trained.kl, 5),
        "kl_untrained": round(trained.first_kl, 5),
        "rule": config.rule,
        "block": config.block_q,
        "rank": trained.parameters.wq.shape[-1],
        "dense_below": config.dense_below,
        "attention": "int8" if goal.compute else "fp32",
    }


def _with_sink(config: Config, module: torch.nn.Module) -> Config:
    """Causal models lean on their first tokens: that block is always read."""
    causal = swap.layers(module)[0].causal
    return Config(**{**vars(config), "causal": int(causal), "n_sink": int(causal)})


def _inputs(model: Model, rows: Rows, longest: int, block: int) -> list[tuple[torch.Tensor, ...]]:
    """The longest rows, as the positional inputs of the model's module, cut to `longest` tokens."""
    named = [_tokenized(model, row, longest) if isinstance(row, str) else row for row in rows]
    if not model.lengths:
        return [tuple(_batch(row[x.name], x) for x in model.inputs) for row in named]
    made = [tuple(_batch(row[x.name][:longest], x) for x in model.inputs) for row in named]
    most = max((x[0].shape[1] for x in made), default=0)
    if most < FEWEST_BLOCKS * block:
        raise BadInput(
            f"sparse attention is trained on long rows: the longest has {most} tokens, and {FEWEST_BLOCKS} blocks of "
            f"{block} need {FEWEST_BLOCKS * block}; give longer texts, or a smaller block"
        )
    return [x for x in made if x[0].shape[1] > most // 2]


def _tokenized(model: Model, text: str, longest: int) -> dict[str, np.ndarray]:
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer; give rows as arrays instead of texts")
    encoded: Any = model.tokenizer(text, truncation=True, max_length=longest)
    zeros = [0] * len(encoded["input_ids"])
    return {x.name: np.asarray(encoded.get(x.name, zeros), x.dtype) for x in model.inputs}


def _batch(array: np.ndarray, x: wire.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, x.dtype))[None]


def _thetas(theta: torch.Tensor) -> float | list[list[float]]:
    """One number where all heads have the same."""
    first = float(theta.flatten()[0])
    return first if bool((theta == first).all()) else [[round(float(x), 6) for x in row] for row in theta]
