"""
Dynamic sparse attention: each layer reads only the key blocks that its scorer expects to matter for this input.

    build(model, target, passes=[sparsify.dsa(long_texts, budget=0.5)])

Trains the scorers on the rows given (the model's own weights do not change), finds the thresholds that keep `budget`
of the blocks at their length, and swaps the attention. At lengths where that would not be faster than dense, and in
layers that would keep nearly everything, attention stays dense.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer_agent import wire

from ..attention import cost, scorer, swap
from ..attention.op import Parameters
from ..attention.reference import THRESHOLD, Config
from ..errors import BadInput
from ..model import Model
from . import Pass

DENSE_BELOW = 256  # with fewer blocks than these there is next to nothing to choose from
# Calibrated kept fraction above which a layer is dense: scoring would cost more than it saves (spec, section 12).
DENSE_ABOVE = {0: 0.85, 1: 0.75}
MOST_ROWS = 100
LENGTH_ROWS = 8  # on which a shorter length is judged
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
    dense_below: int | None = None,
    recipe: scorer.Recipe | None = None,
    checkpoint: str | Path | None = None,
    progress: scorer.Progress = scorer.quiet,
) -> Pass:
    """
    rows: long texts, or inputs as in `edgeformer.data`; the longer ones serve, cut to `length` (the model's limit).
    budget: fraction of blocks to keep. buckets: shorter lengths to calibrate as well (`swap.for_length`).
    block: tokens a side, 32 (finer) or 64 (faster). rule: reference.THRESHOLD, TOP_P or TOP_K.
    per_head: a budget a head instead of one threshold for all. int8: attention in int8 as well.
    dense_below: rows of up to so many tokens are dense; by default those that sparse attention would not make faster,
    by what it keeps of the given rows cut to each of the model's lengths.
    recipe: of the scorer training; by default the one for encoders or for decoders.
    checkpoint: a file from which interrupted scorer training goes on.
    """
    if not 0 < budget <= 1:
        raise BadInput(f"budget {budget} must be above 0 and at most 1: the fraction of blocks to keep")
    compute = int(int8)
    base = Config(block_q=block, block_k=block, rule=rule, dense_below=dense_below or 0)

    def run(model: Model) -> Model:
        longest = min(length or model.max_length, model.max_length or length)
        module = copy.deepcopy(model.module)
        config = _with_sink(base, module)  # before the rows: no longer text helps a model that cannot be sparse
        given = _inputs(model, rows, longest, block)
        stats = scorer.collect(module, given, config, progress, 0 if model.lengths else length)
        trained = scorer.train(stats, recipe, checkpoint=checkpoint, progress=progress)
        found = scorer.calibrate(stats, trained.parameters, budget, per_head=per_head)
        thetas = {int(stats.lengths.max()): found.theta}
        for bucket in sorted(n for n in buckets if model.lengths and n < max(thetas)):
            part = scorer.collect(module, [tuple(x[:, :bucket] for x in row) for row in given], config, progress)
            thetas[bucket] = scorer.calibrate(part, trained.parameters, budget, per_head=per_head).theta
        dense = [n for n, kept in enumerate(found.kept_by_layer) if kept > DENSE_ABOVE[compute]]
        kept = [1.0 if n in dense else round(x, 4) for n, x in enumerate(found.kept_by_layer)]
        parameters = trained.parameters._replace(theta=found.theta)
        by_length = _kept_by_length(model, module, given, stats, parameters, set(dense))
        if dense_below is None:
            config = replace(config, dense_below=cost.dense_below(by_length, compute, DENSE_BELOW))
        _install(module, parameters, set(dense), config, compute)
        if len(dense) < len(kept):
            swap.set_thetas(module, thetas)
        facts = {
            "budget": budget,
            "kept": round(sum(kept) / len(kept), 4),
            "kept_by_layer": kept,
            "kept_by_length": {str(n): round(share, 4) for n, share in sorted(by_length.items())},
            "mass_kept": round(found.recall, 4),
            "dense_layers": dense,
            "theta": {str(n): _thetas(theta) for n, theta in sorted(thetas.items())},
            "rows": len(given),
            "kl": round(trained.kl, 5),
            "kl_untrained": round(trained.first_kl, 5),
            "rule": rule,
            "block": block,
            "rank": trained.parameters.wq.shape[-1],
            "dense_below": config.dense_below,
            "attention": "int8" if int8 else "fp32",
        }
        return model.after("sparsify.dsa", module, facts=facts)

    return run


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


def _with_sink(config: Config, module: torch.nn.Module) -> Config:
    """Causal models lean on their first tokens: that block is always read."""
    causal = swap.layers(module)[0].causal
    return Config(**{**vars(config), "causal": int(causal), "n_sink": int(causal)})


def _inputs(model: Model, rows: Rows, longest: int, block: int) -> list[tuple[torch.Tensor, ...]]:
    """The longest rows, as the positional inputs of the model's module, cut to `longest` tokens."""
    named = [_tokenized(model, row, longest) if isinstance(row, str) else row for row in rows]
    if not model.lengths:
        made = [tuple(_batch(row[x.name], x) for x in model.inputs) for row in named]
        return made[:MOST_ROWS]
    made = [tuple(_batch(row[x.name][:longest], x) for x in model.inputs) for row in named]
    most = max((x[0].shape[1] for x in made), default=0)
    if most < FEWEST_BLOCKS * block:
        raise BadInput(
            f"sparse attention is trained on long rows: the longest has {most} tokens, and {FEWEST_BLOCKS} blocks of "
            f"{block} need {FEWEST_BLOCKS * block}; give longer texts, or a smaller block"
        )
    kept = [x for x in made if x[0].shape[1] > most // 2]
    return kept[:MOST_ROWS]


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
