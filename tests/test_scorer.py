"""Statistics, training and calibration of scorers, and the pass that uses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_swap import inputs, make

from edgeformer import model as models
from edgeformer.attention import dsa, op, scorer, swap
from edgeformer.attention.reference import THRESHOLD, TOP_K, TOP_P, Config
from edgeformer.errors import BadInput
from edgeformer.passes import sparsify

C = Config(block_q=16, block_k=16)


def rows(family: str, *lengths: int) -> list[dict[str, Any]]:
    cache = {"use_cache": False} if family == "llama" else {}
    return [{name: x[:1] for name, x in inputs(family, n, padded=False).items()} | cache for n in lengths]


def stats(family: str = "bert", *lengths: int) -> scorer.Statistics:
    return scorer.collect(make(family), rows(family, *(lengths or (128, 128, 100, 128))), C)


@pytest.mark.parametrize("family", ["bert", "llama", "mpnet"])
@pytest.mark.parametrize("chunk", [1, 16 << 20])
def test_statistics_are_those_of_dense_attention(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "BUFFER_BYTES", chunk)
    model, given = make(family), rows(family, 100, 70)
    found = scorer.collect(model, given, C)
    assert found.lengths.tolist() == [100, 70] and found.config.causal == (family == "llama")
    swap.switch(model, "eager")
    want = model(**given[1], output_attentions=True).attentions
    for layer, p in enumerate(want):
        by_key = torch.nn.functional.pad(p[0], (0, 10)).view(4, 70, 5, 16).sum(-1)
        by_block = torch.stack([part.mean(1) for part in by_key.split(16, 1)], 1)
        torch.testing.assert_close(found.mass[1, layer, :, :5, :5], by_block, rtol=0, atol=1e-5)
    assert not found.mass[1, :, :, 5:].any() and not found.mass[1, :, :, :, 5:].any()
    with torch.no_grad():
        swap.switch(model, "sdpa")
        plain = model(**given[0]).last_hidden_state
        with swap.replaced(model, lambda layer: scorer._Recorder(found, layer, lambda: 0)):
            torch.testing.assert_close(model(**given[0]).last_hidden_state, plain, rtol=0, atol=2e-5)


def test_rows_with_padding_give_the_same_statistics() -> None:
    model = make("bert")
    both = inputs("bert", 100)
    padded = {name: x[1:] for name, x in both.items()}
    alone = {name: x[1:, :60] for name, x in both.items()}
    found = scorer.collect(model, [padded, alone], C)
    torch.testing.assert_close(found.mass[0], found.mass[1])
    torch.testing.assert_close(found.qm[0], found.qm[1])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_training_lowers_the_divergence_and_repeats(family: str) -> None:
    found = stats(family)
    recipe = scorer.Recipe(steps=60, batch=4, rank=8, dist=4)
    one, two = scorer.train(found, recipe), scorer.train(found, recipe)
    assert one.kl < one.first_kl / 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True))
    assert not torch.equal(scorer.train(found, replace(recipe, seed=1)).parameters.wq, one.parameters.wq)


def test_scorers_start_from_a_sketch_stay_near_it_and_never_see_the_rows_held_out() -> None:
    found = stats("llama", 128, 128, 100, 128, 128)
    start = scorer.train(found, scorer.Recipe(steps=0, rank=16))
    layers, heads = found.qm.shape[1:3]
    plain = op.Parameters(*(x.reshape(layers, heads, *x.shape[1:]) for x in dsa.pooled(layers * heads, 16)))
    seen, held = found.split()
    assert (len(seen.lengths), len(held.lengths)) == (4, 1)
    # Of full rank the sketch is q.k itself, but for what it adds to all blocks of a row.
    torch.testing.assert_close(scorer.masses(seen, start.parameters), scorer.masses(seen, plain), rtol=0, atol=1e-4)
    recipe = scorer.Recipe(steps=20, batch=2, rank=16, chosen=1.0)
    free = scorer.train(found, recipe)
    pulled = scorer.train(found, replace(recipe, pull=20.0))
    moved = [float((x.parameters.wq - start.parameters.wq).norm()) for x in (free, pulled)]
    assert 0 < moved[1] < moved[0] / 1.5
    changed = replace(found, mass=torch.cat([found.mass[:4], found.mass[4:].flip(-1)]))
    again = scorer.train(changed, recipe)
    assert torch.equal(again.parameters.wq, free.parameters.wq) and again.held_out_kl != free.held_out_kl


def test_training_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, file = stats(), tmp_path / "scorers.safetensors"
    monkeypatch.setattr(scorer, "SAVE_EVERY", 5)
    recipe = scorer.Recipe(steps=20, batch=2, rank=8)
    want = scorer.train(found, recipe)

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scorer.train(found, recipe, checkpoint=file, progress=stop)
    steps: list[int] = []
    again = scorer.train(found, recipe, checkpoint=file, progress=lambda _w, done, _t: steps.append(done))
    assert steps == list(range(11, 21)), "10 of 13 steps were saved"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, want.parameters, strict=True))
    assert again.kl == want.kl and [x.name for x in tmp_path.iterdir()] == ["scorers.safetensors"]
    with pytest.raises(BadInput, match="other rows, weights or settings"):
        scorer.train(found, replace(recipe, batch=3), checkpoint=file)
    file.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="not what edgeformer wrote"):
        scorer.train(found, recipe, checkpoint=file)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("rule", [THRESHOLD, TOP_P, TOP_K])
@pytest.mark.parametrize("per_head", [False, True])
def test_calibration_keeps_what_was_asked(family: str, rule: int, per_head: bool) -> None:
    found = scorer.collect(make(family), rows(family, 256, 256, 200), Config(**{**vars(C), "rule": rule}))
    trained = scorer.train(found, scorer.Recipe(steps=5, batch=2))
    last = 0.0
    for budget in (0.4, 0.75):
        got = scorer.calibrate(found, trained.parameters, budget, per_head=per_head)
        assert budget - (0.07 if rule == TOP_K or per_head else 0.02) < got.kept <= budget
        assert last < got.recall <= 1 and len(got.kept_by_layer) == 2
        last = got.recall
    with pytest.raises(BadInput, match="budget"):
        scorer.calibrate(found, trained.parameters, 0.0)


def test_a_budget_leaves_room_for_rows_that_keep_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stats("bert", 256, 256, 256, 256, 250, 128)
    sharper = torch.tensor([1.0, 20, 40, 80, 1, 1])[:, None, None, None, None]
    found = replace(found, qm=found.qm * sharper)
    p = scorer.train(found, scorer.Recipe(steps=0)).parameters

    def shares(of: slice) -> torch.Tensor:
        """What each row keeps."""
        ready = p._replace(theta=scorer.calibrate(found, p, 0.5).theta)
        return torch.tensor([scorer.kept_by_layer(found.of([n]), ready) for n in range(6)[of]]).mean(1)

    monkeypatch.setattr(scorer, "SPREAD", 0.0)
    assert shares(slice(4)).mean() == pytest.approx(0.5, abs=0.005), "the longer half, and no room"
    assert shares(slice(4)).max() > 0.52
    monkeypatch.undo()
    kept = shares(slice(4))
    assert kept.mean() + 2 * kept.std(correction=0) == pytest.approx(0.5, abs=0.005)


def test_the_calibrated_share_is_what_the_operator_keeps() -> None:
    model, given = make("bert"), rows("bert", 256, 256, 256)
    found = scorer.collect(model, given, C)
    trained = scorer.train(found, scorer.Recipe(steps=20, batch=2))
    settled = scorer.calibrate(found, trained.parameters, 0.5)
    ready = trained.parameters._replace(theta=settled.theta)
    # A scorer after a sparse layer sees other inputs than in calibration, so the first layer alone is compared.
    swap.install(model, lambda x: scorer.one_layer(ready, 0) if x.number == 0 else None, C)
    before = op.counters()
    with torch.no_grad():
        for row in given:
            model(**row)
    after = op.counters()
    kept = (after.kept - before.kept) / (after.candidates - before.candidates)
    assert kept == pytest.approx(settled.kept_by_layer[0], abs=1e-3)


def test_statistics_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(BadInput, match="no rows"):
        scorer.collect(make("bert"), [], C)
    with pytest.raises(BadInput, match="one row"):
        scorer.collect(make("bert"), [inputs("bert")], C)


# --- the pass ---------------------------------------------------------------------------------------------------------


def arrays(model: models.Model, *lengths: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    make_one = {"input_ids": lambda n: random.integers(5, 90, n), "attention_mask": np.ones}
    return [{x.name: make_one.get(x.name, np.zeros)(n).astype(x.dtype) for x in model.inputs} for n in lengths]


def test_the_pass_makes_a_sparse_model_and_says_what_it_did() -> None:
    model = models.load(make("bert"), lengths=(64, 256))
    given = arrays(model, 256, 256, 30, 200)
    seen: list[tuple[str, int, int]] = []
    step = sparsify.dsa(
        given, budget=0.5, block=16, dense_below=64, recipe=scorer.Recipe(steps=30), progress=lambda *x: seen.append(x)
    )
    sparse = step(model)
    assert not swap.scorers(model.module), "the model that was given is untouched"
    facts = sparse.history[-1].facts
    assert sparse.history[-1].name == "sparsify.dsa" and json.loads(json.dumps(facts)) == facts
    assert 0.45 < facts["kept"] <= 0.5 and facts["kl"] < facts["kl_untrained"]
    assert facts["rows"] == 3 and list(facts["theta"]) == ["256"]
    assert len(swap.scorers(sparse.module)) == 2 - len(facts["dense_layers"])
    assert {what for what, _, _ in seen} == {"dense statistics", "train scorers"}
    short, long = model.example(64), model.example(256)
    with torch.no_grad():
        torch.testing.assert_close(sparse.module(*short), model.module(*short), rtol=0, atol=1e-5)
        before = op.counters()
        close = torch.cosine_similarity(sparse.module(*long), model.module(*long))
        after = op.counters()
    assert close.min() > 0.5 and after.kept - before.kept < after.candidates - before.candidates
    again = step(model)
    for a, b in zip(swap.scorers(sparse.module), swap.scorers(again.module), strict=True):
        assert torch.equal(a.wq, b.wq) and torch.equal(a.theta, b.theta)


def test_thresholds_belong_to_a_length(tmp_path: Path) -> None:
    model = models.load(make("bert"), lengths=(64, 256))
    sparse = sparsify.dsa(
        arrays(model, 256, 256), buckets=(128, 999), block=16, recipe=scorer.Recipe(steps=5), dense_below=0
    )(model)
    thetas = sparse.history[-1].facts["theta"]
    assert list(thetas) == ["128", "256"] and thetas["128"] > thetas["256"] > 0
    inner = swap.transformer(sparse.module)
    inner.save_pretrained(tmp_path)
    again = swap.from_pretrained(type(inner), tmp_path)
    for holder in (sparse.module, again):
        for length, bucket in ((100, 128), (128, 128), (129, 256), (500, 256)):
            assert swap.for_length(holder, length) == bucket
            found = [float(x.theta[0]) for x in swap.scorers(holder)]
            assert found == [pytest.approx(thetas[str(bucket)])] * len(found)


def test_a_generous_budget_leaves_layers_dense() -> None:
    model = models.load(make("bert"), lengths=(256,))
    sparse = sparsify.dsa(arrays(model, 256, 256), budget=0.95, block=16, recipe=scorer.Recipe(steps=5))(model)
    assert sparse.history[-1].facts["dense_layers"] == [0, 1] and not swap.scorers(sparse.module)
    with torch.no_grad():
        want = model.module(*model.example(256))
        torch.testing.assert_close(sparse.module(*model.example(256)), want, rtol=0, atol=1e-5)


def test_images_and_int8() -> None:
    model = models.load(make("vit"))
    random = np.random.default_rng(0)
    images = [{"pixel_values": random.standard_normal((3, 80, 80)).astype(np.float32)} for _ in range(3)]
    with pytest.raises(BadInput, match="give `length`"):
        sparsify.dsa(images, block=16)(model)
    sparse = sparsify.dsa(images, block=16, length=101, int8=True, recipe=scorer.Recipe(steps=5), dense_below=0)(model)
    assert sparse.history[-1].facts["attention"] == "int8"
    assert all(x.compute == 1 for x in swap.scorers(sparse.module)) and swap.scorers(sparse.module)


def test_rows_that_are_too_short_are_refused() -> None:
    model = models.load(make("bert"), lengths=(256,))
    with pytest.raises(BadInput, match="longest has 60 tokens"):
        sparsify.dsa(arrays(model, 60, 20))(model)
    with pytest.raises(BadInput, match="no tokenizer"):
        sparsify.dsa(["text"])(model)
    with pytest.raises(BadInput, match="budget"):
        sparsify.dsa([], budget=1.5)


def test_pooled_parameters_need_no_training() -> None:
    found = stats()
    layers, heads = found.qm.shape[1:3]
    one = dsa.pooled(layers * heads, 16)
    stacked = op.Parameters(*(x.reshape(layers, heads, *x.shape[1:]) for x in one))
    want = torch.softmax(found.qm[0] @ found.km[0].mT / 4, -1)
    torch.testing.assert_close(scorer.masses(found, stacked)[0], want)
