"""What sparse attention costs and when it is chosen: by hand, on a real export, and as the manifest tells it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from test_swap import make

from edgeformer import check, device as devices, model as models, predict, structure, workshop
from edgeformer.attention import choice, cost, scorer, swap
from edgeformer.data import Rows
from edgeformer.errors import BadInput
from edgeformer.passes import sparsify
from edgeformer.plan import Plan, exports
from edgeformer_agent import wire

KEPT = cost.Kept(256, ((512, 0.6), (1024, 0.4)))
HOST = devices.load("raspberry-pi-4")


@pytest.mark.parametrize(
    ("tokens", "share"), [(1, 1.0), (256, 1.0), (257, 0.6), (512, 0.6), (768, 0.5), (1024, 0.4), (9999, 0.4)]
)
def test_what_is_kept_between_the_calibrated_lengths(tokens: int, share: float) -> None:
    assert KEPT.share(tokens) == pytest.approx(share)
    assert cost.Kept(0, ()).share(tokens) == 1.0


def test_scoring_weighs_more_on_short_rows_and_on_int8() -> None:
    assert cost.time_share(0.5, 512) == pytest.approx(0.5 + 16 / 512 + 0.01)
    assert cost.time_share(0.5, 128) > cost.time_share(0.5, 512) > cost.time_share(0.5, 4096) > 0.5
    assert cost.time_share(0.5, 512, compute=1) > cost.time_share(0.5, 512)


def test_dense_up_to_the_longest_length_that_loses() -> None:
    at = {128: 0.98, 512: 0.97, 1024: 0.6, 2048: 0.3}
    assert cost.dense_below(at) == 512 and cost.dense_below(at, floor=256) == 512
    assert cost.dense_below({512: 0.5}, floor=256) == 256
    assert (
        cost.dense_below({512: 0.91}) == 0 and cost.dense_below({512: 0.91}, compute=1) == 512
    )  # int8 breaks even sooner


def test_operations_by_hand() -> None:
    q, k = (1, 12, 512, 64), (1, 12, 512, 64)
    dense = 4 * 12 * 512 * 512 * 64
    assert cost.operations(q, k, 16, cost.Kept(512, ((1024, 0.4),))) == dense  # nothing is scored
    scoring = 12 * (512 + 512) * 64 + 2 * 12 * (8 + 8) * 64 * 16 + 2 * 12 * 8 * 8 * 16
    assert cost.operations(q, k, 16, KEPT) == pytest.approx(0.6 * dense + scoring)
    assert scoring < 0.01 * dense


def rows_of(model: models.Model, tokens: int, count: int = 3) -> Rows:
    random = np.random.default_rng(0)
    ids = {"input_ids": lambda: random.integers(5, 90, tokens), "attention_mask": lambda: np.ones(tokens)}
    rows = [
        {x.name: ids.get(x.name, lambda: np.zeros(tokens))().astype(x.dtype) for x in model.inputs}
        for _ in range(count)
    ]
    return Rows(tuple(rows), "test")


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.load(make("bert"), lengths=(64, 256))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of scorer training, and no floor of 256 tokens for models that end there."""
    monkeypatch.setattr(scorer, "Recipe", lambda: replace(_recipe(), steps=5))
    monkeypatch.setattr(sparsify, "DENSE_BELOW", 0)


_recipe = scorer.Recipe


def decide(model: models.Model, wanted: str, budget: float = 0.5) -> tuple[models.Model, dict[str, Any]]:
    shop = workshop.Workshop(rows_of(model, 256), (), check.DEFAULT_GATE, lambda *_: None)
    made = shop.fitted(model, Plan(HOST, exports(["onnx"], "fp32")), wanted, budget)
    assert made.history[-1].name == "attention"
    return made, dict(made.history[-1].facts)


def test_auto_chooses_sparse_where_the_scorers_deliver(model: models.Model, quick: None) -> None:
    made, facts = decide(model, "auto")
    assert facts["chosen"] == "dsa" and facts["modelled_gain"] >= choice.WORTH and swap.scorers(made.module)
    assert list(facts["by_length"]) == ["64", "256"], "a decision for each of the model's lengths"
    kept, turn = cost.calibrated(made.history), cost.calibrated(made.history).dense_below
    for tokens, said in facts["by_length"].items():
        assert said["chosen"] == ("dsa" if int(tokens) > turn else "dense")
        assert said["modelled_gain"] == 1 if said["chosen"] == "dense" else said["modelled_gain"] > 1
        assert said["kept"] == pytest.approx(kept.share(int(tokens)), abs=1e-4)
    assert {x.config.dense_below for x in swap.scorers(made.module)} == {turn}


def test_auto_never_ships_the_slower_one(model: models.Model, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, facts = decide(model, "auto", budget=0.99)
    assert facts["chosen"] == "dense" and "if the budget is met" in facts["why"] and not swap.scorers(made.module)
    monkeypatch.setattr(scorer, "kept_by_layer", lambda *_: (0.99, 0.99))  # the budget was not met
    made, facts = decide(model, "auto")
    assert facts["chosen"] == "dense" and "with what the trained scorers keep" in facts["why"]
    assert {x["chosen"] for x in facts["by_length"].values()} == {"dense"} and made.module is model.module
    made, facts = decide(model, "dsa")
    assert facts["chosen"] == "dsa" and "asked for" in facts["why"]
    assert {x.config.dense_below for x in swap.scorers(made.module)} == {256}, "asked for, and dense where it loses"


def test_auto_leaves_layers_with_unequal_heads_dense(model: models.Model) -> None:
    module = copy.deepcopy(model.module)
    structure.cut(module, next(x for x in structure.groups(model) if x.kind == structure.HEADS), torch.tensor([0]))
    fewer = replace(model, module=module)
    _, facts = decide(fewer, "auto")
    assert facts["chosen"] == "dense" and "prune with uniform_heads=True" in facts["why"]
    with pytest.raises(BadInput, match="uniform_heads=True"):
        decide(fewer, "dsa")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "litert", "executorch"])
def test_programs_count_what_is_kept(format: str, model: models.Model, quick: None) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "litert": "litert_torch", "executorch": "executorch"}[format])
    step = sparsify.dsa(rows_of(model, 256).rows, budget=0.4, dense_below=64, recipe=replace(_recipe(), steps=5))
    sparse, works = step(model), {}
    (export,) = exports([format], "fp32")
    for name, made in (("dense", model), ("sparse", sparse)):
        (program,) = export.programs(made)
        works[name] = {w.length: w for w in program.work}
        assert program.sparse == (name == "sparse")
    kept = cost.calibrated(sparse.history)
    layer = swap.layers(model.module)[0]
    shape = (1, layer.heads, 256, layer.dim)
    dense = 4.0 * layer.heads * 256 * 256 * layer.dim
    saved = dense - cost.operations(shape, shape, 16, kept)
    number = len(swap.scorers(sparse.module))
    assert works["dense"][256].flops - works["sparse"][256].flops == pytest.approx(number * saved) and saved > 0
    assert works["dense"][64].flops == pytest.approx(works["sparse"][64].flops), "dense below the break-even"
    times = {name: predict.row_ms(tuple(work.values()), 256, HOST) for name, work in works.items()}
    assert times["sparse"] < times["dense"]
    if format != "litert":
        assert list(works["sparse"]) == [1, 64, 65, 256], "counted on both sides of where sparse begins"


def test_a_history_without_the_pass_is_dense() -> None:
    assert cost.calibrated((wire.Step("load", {}),)).share(4096) == 1.0
