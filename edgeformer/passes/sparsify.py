"""
Dynamic sparse attention: each layer reads only the key blocks that its scorer expects to matter for this input.

    build(model, target, passes=[sparsify.dsa(long_texts, budget=0.5)])

Trains the scorers on the rows given, finds thresholds that keep at most `budget` of the blocks at their length, and
swaps the attention. The model's own weights change only with `distil`, which small budgets need: they then learn to
give with sparse attention what the dense model gives. At lengths where that would not be faster than dense, and in
layers that would keep nearly everything, attention stays dense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer_agent import wire

from ..attention import cost, distil as distillation, scorer, swap
from ..attention.op import Parameters
from ..attention.reference import THRESHOLD, TOP_K, Config
from ..errors import BadInput
from ..model import Model
from ..stages import Progress, quiet
from ..train import Recipe
from . import Pass

DENSE_BELOW = 256  # with fewer blocks than these there is next to nothing to choose from
# Calibrated kept fraction above which a layer is dense: scoring would cost more than it saves (spec, section 12).
DENSE_ABOVE = {0: 0.85, 1: 0.75}
MOST_ROWS = 100  # for scorers
LENGTH_ROWS = 8  # on which a shorter length is judged
# For as many tokens, blocks of 32 cost the kernel a tenth to a third more than blocks of 64, and lose less. Decoders
# take them at all lengths: the blocks that a causal model cannot do without are then half as large. Encoders take them
# where 64 would leave a handful to choose from, and where attention is the smaller part of the time.
FINE, COARSE, FINE_TOKENS = 32, 64, 1024
FEWEST_BLOCKS = 4  # of the longest row; with fewer there is nothing to choose from

Rows = Sequence[str] | Sequence[Mapping[str, np.ndarray]]


def dsa(
    rows: Rows,
    *,
    budget: float = 0.5,
    length: int = 0,
    buckets: Sequence[int] = (),
    block: int = 0,
    rule: int = THRESHOLD,
    per_head: bool | None = None,
    int8: bool = False,
    dense_below: int | None = None,
    recipe: scorer.Recipe | None = None,
    distil: int | Recipe = 0,
    scorers: Scorers | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = quiet,
) -> Pass:
    """
    rows: long texts, or inputs as in `edgeformer.data`; the longer ones serve, cut to `length` (the model's limit).
    budget: the most blocks to keep, as a fraction; thresholds leave room for other rows than these (`scorer.SPREAD`).
    buckets: shorter lengths to calibrate as well (`swap.for_length`).
    block: tokens a side, 32 (finer) or 64 (faster); by default 32 for causal models and up to 1,024 tokens, else 64.
    rule: reference.THRESHOLD, TOP_P or TOP_K.
    per_head: a budget a head instead of one threshold for all; by default where the rule is TOP_K, as one count for
    all would keep as much in heads that look everywhere as in those that look at one block.
    int8: attention in int8 as well.
    dense_below: rows of up to so many tokens are dense; by default those that sparse attention would not make faster,
    by what it keeps of the given rows cut to each of the model's lengths.
    recipe: of the scorer training; by default the one for encoders or for decoders.
    distil: steps of joint distillation, or its whole recipe; on all of the long rows, where scorers take the first 100.
    scorers: of this model, from `train` with these rows; they are trained here by default.
    checkpoint: a file from which interrupted training goes on; that of the distillation is beside it, with `.distil`.
    """
    if not 0 < budget <= 1:
        raise BadInput(f"budget {budget} must be above 0 and at most 1: the fraction of blocks to keep")
    compute = int(int8)
    each = per_head if per_head is not None else rule == TOP_K

    def run(model: Model) -> Model:
        made = scorers or train(
            model, rows, length=length, block=block, recipe=recipe, checkpoint=checkpoint, progress=progress
        )
        given, trained = made.rows, made.trained
        module = copy.deepcopy(model.module)
        config = replace(made.stats.config, rule=rule, dense_below=dense_below or 0)
        stats = replace(made.stats, config=config)
        few, tokens = given[:MOST_ROWS], 0 if model.lengths else length
        found = scorer.calibrate(stats.split()[1], trained.parameters, budget, per_head=each)
        thetas = {int(stats.lengths.max()): found.theta}
        for bucket in sorted(n for n in buckets if model.lengths and n < max(thetas)):
            cut = [tuple(x[:, :bucket] for x in row) for row in scorer.held_out(few)]
            part = scorer.collect(module, cut, config, progress)
            thetas[bucket] = scorer.calibrate(part, trained.parameters, budget, per_head=each).theta
        dense = [n for n, kept in enumerate(found.kept_by_layer) if kept > DENSE_ABOVE[compute]]
        parameters = trained.parameters._replace(theta=found.theta)
        by_length = _kept_by_length(model, module, few, stats, parameters, set(dense))
        if dense_below is None:
            config = replace(config, dense_below=cost.dense_below(by_length, compute, DENSE_BELOW))
        _install(module, parameters, set(dense), config, compute)
        learned: dict[str, Any] = {}
        if len(dense) < len(found.kept_by_layer):
            swap.set_thetas(module, thetas)
            if distil:
                long = _longer(given, tokens, config.dense_below)
                sparse = [x for n, x in enumerate(found.kept_by_layer) if n not in dense]
                share = sum(sparse) / len(sparse)
                learned = _distilled(module, model.module, long, share, distil, checkpoint, progress)
                again = _recalibrated(module, few, tokens, config, trained.parameters, list(thetas), budget, each)
                found, thetas = again[max(again)], {n: x.theta for n, x in again.items()}
                swap.set_thetas(module, thetas)
        facts = _facts(trained, found, by_length, dense, config) | {
            "budget": budget,
            "theta": {str(n): _thetas(theta) for n, theta in sorted(thetas.items())},
            "rows": len(few),
            "attention": "int8" if int8 else "fp32",
        }
        return model.after("sparsify.dsa", module, facts=facts | learned)

    return run


@dataclass(frozen=True)
class Scorers:
    """Trained on what a dense model does, before any rule or budget: each can be calibrated on them."""

    rows: list[tuple[torch.Tensor, ...]]  # all of the long ones
    stats: scorer.Statistics
    trained: scorer.Trained


def train(
    model: Model,
    rows: Rows,
    *,
    length: int = 0,
    block: int = 0,
    recipe: scorer.Recipe | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = quiet,
) -> Scorers:
    """The first half of `dsa`, with its parameters; for several calls of it on one model."""
    # Before the rows are looked at: no longer text helps a model that cannot be sparse.
    longest = min(length or model.max_length, model.max_length or length)
    config = config_of(model.module, longest, block)
    given = _inputs(model, rows, longest, config.block_q)
    stats = scorer.collect(model.module, given[:MOST_ROWS], config, progress, 0 if model.lengths else length)
    return Scorers(given, stats, scorer.train(stats, recipe, checkpoint=checkpoint, progress=progress))


def _facts(
    trained: scorer.Trained, found: scorer.Calibration, by_length: dict[int, float], dense: list[int], config: Config
) -> dict[str, Any]:
    kept = [1.0 if n in dense else round(x, 4) for n, x in enumerate(found.kept_by_layer)]
    return {
        "kept": round(sum(kept) / len(kept), 4),
        "kept_by_layer": kept,
        "kept_by_length": {str(n): round(share, 4) for n, share in sorted(by_length.items())},
        "mass_kept": round(found.recall, 4),
        "dense_layers": dense,
        "kl": round(trained.kl, 5),
        "kl_untrained": round(trained.first_kl, 5),
        "rule": config.rule,
        "block": config.block_q,
        "rank": trained.parameters.wq.shape[-1],
        "dense_below": config.dense_below,
    }


def _longer(given: list[tuple[torch.Tensor, ...]], tokens: int, dense_below: int) -> list[tuple[torch.Tensor, ...]]:
    """Up to `dense_below` tokens student and teacher are the same: there is nothing to learn from."""
    long = [row for row in given if (tokens or row[0].shape[1]) > dense_below]
    if not long:
        raise BadInput(f"distillation needs rows of more than dense_below={dense_below} tokens; give longer texts")
    return long


def _distilled(
    module: torch.nn.Module,
    teacher: torch.nn.Module,
    rows: list[tuple[torch.Tensor, ...]],
    kept: float,
    distil: int | Recipe,
    checkpoint: str | Path | None,
    progress: Progress,
) -> dict[str, Any]:
    recipe = distillation.steps(distil, len(rows)) if isinstance(distil, int) else distil
    beside = f"{checkpoint}.distil" if checkpoint else None
    done = distillation.distil(module, teacher, rows, kept, recipe, checkpoint=beside, progress=progress)
    facts = {"rows": len(rows), "steps": done.steps, "rate": recipe.rate, "batch": recipe.batch, "seed": recipe.seed}
    return {"distilled": facts | {"loss": round(done.loss, 5)}}


def _recalibrated(
    module: torch.nn.Module,
    rows: list[tuple[torch.Tensor, ...]],
    tokens: int,
    config: Config,
    parameters: Parameters,
    lengths: list[int],
    budget: float,
    per_head: bool,
) -> dict[int, scorer.Calibration]:
    """The model has moved, and a layer's inputs are now those of a sparse model."""
    found, few = {}, rows[: scorer.CALIBRATION_ROWS]
    for n in lengths:
        swap.for_length(module, n)
        part = few if tokens else [tuple(x[:, :n] for x in row) for row in few]
        stats = scorer.collect(module, part, config, length=tokens)
        found[n] = scorer.calibrate(stats, parameters, budget, per_head=per_head)
    return found


def _kept_by_length(
    model: Model,
    module: torch.nn.Module,
    rows: Sequence[tuple[torch.Tensor, ...]],
    stats: scorer.Statistics,
    parameters: Parameters,
    dense: set[int],
) -> dict[int, float]:
    """What the thresholds in force keep of these rows, whole and cut to the model's lengths: mean of sparse layers."""
    longest = int(stats.lengths.max())
    few = {longest: stats.of(slice(LENGTH_ROWS))}
    for n in (n for n in model.lengths if n < longest):
        cut = [tuple(x[:, :n] for x in row) for row in rows[:LENGTH_ROWS]]
        few[n] = scorer.collect(module, cut, stats.config)
    by_layer = {n: scorer.kept_by_layer(part, parameters) for n, part in few.items()}
    sparse = {n: [share for i, share in enumerate(layers) if i not in dense] for n, layers in by_layer.items()}
    return {n: sum(shares) / len(shares) if shares else 1.0 for n, shares in sparse.items()}


def block_of(module: torch.nn.Module, tokens: int) -> int:
    """Tokens a side of a block for rows of up to `tokens`, where nobody asks for others."""
    return FINE if swap.layers(module)[0].causal or tokens <= FINE_TOKENS else COARSE


def config_of(module: torch.nn.Module, tokens: int, block: int = 0) -> Config:
    """Causal models lean on their first tokens: that block is always read."""
    causal, size = int(swap.layers(module)[0].causal), block or block_of(module, tokens)
    return Config(block_q=size, block_k=size, causal=causal, n_sink=causal)


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


def _install(module: torch.nn.Module, all_layers: Parameters, dense: set[int], config: Config, compute: int) -> None:
    def parameters(layer: swap.Layer) -> Parameters | None:
        return None if layer.number in dense else scorer.one_layer(all_layers, layer.number)

    swap.install(module, parameters, config, compute)


def _thetas(theta: torch.Tensor) -> float | list[list[float]]:
    """One number where all heads have the same."""
    first = float(theta.flatten()[0])
    return first if bool((theta == first).all()) else [[round(float(x), 6) for x in row] for row in theta]
