"""Joint distillation: a sparse model learns from its dense self."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scorer import arrays, rows
from test_swap import make

from edgeformer import model as models, train
from edgeformer.attention import distil, dsa, op, scorer, swap
from edgeformer.attention.reference import THRESHOLD, TOP_K, Config
from edgeformer.errors import BadInput
from edgeformer.passes import sparsify

C = Config(block_q=16, block_k=16)
FAST = replace(distil.RECIPE, rate=2e-3, bf16=False, epochs=12)  # 12 steps of two rows


def pair(family: str = "bert", theta: float = 0.2, config: Config = C) -> tuple[Any, Any]:
    """A sparse student and its dense teacher."""
    teacher = make(family)
    student = copy.deepcopy(teacher)
    random = torch.Generator().manual_seed(0)

    def parameters(layer: swap.Layer) -> op.Parameters:
        blank = dsa.fresh(layer.heads, layer.dim, generator=random)
        return blank._replace(theta=torch.full((layer.heads,), theta))

    swap.install(student, parameters, config)
    return student, teacher


def error(student: Any, teacher: Any, given: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(distil.traced(student, row)[0], distil.traced(teacher, row)[0]) for row in given]
    return sum(float(distil._error(a, b)) for a, b in pairs) / len(pairs)


def shared(model: Any) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items() if swap.SCORER not in name}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_sparse_model_learns_what_the_dense_one_gives(family: str, bf16: bool) -> None:
    student, teacher = pair(family)
    given = rows(family, 128, 128, 100)
    before, weights, dense = error(student, teacher, given), shared(student), shared(teacher)
    assert before > 1e-4, "the sparse model is not the dense one to begin with"
    recipe = replace(distil.RECIPE, rate=2e-3, bf16=bf16, epochs=15)
    calls = op.counters().calls
    told = distil.distil(student, teacher, given, 0.5, recipe)
    ran = op.counters().calls - calls
    assert ran == 2 * 3 * 15 * 2, (
        "two layers, three rows an epoch, through the operator and its selection for the gradient"
    )
    assert error(student, teacher, given) < 0.5 * before and told.steps == 30
    moved = {name for name, x in shared(student).items() if not torch.equal(x, weights[name])}
    assert moved and not any("embedding" in name or "embed_tokens" in name for name in moved)
    assert all(torch.equal(x, dense[name]) for name, x in shared(teacher).items())
    assert all(x.requires_grad and x.grad is None for x in student.parameters())


@pytest.mark.parametrize("rule", [THRESHOLD, TOP_K])
def test_thresholds_follow_the_kept_fraction(rule: int) -> None:
    """Too much kept raises theta; a count is a budget already and stays."""
    for kept, moved in ((0.0, 1), (1.0, -1)):
        student, teacher = pair(theta=0.13, config=replace(C, rule=rule))
        distil.distil(student, teacher, rows("bert", 128), kept, replace(FAST, epochs=1))
        signs = torch.cat([torch.sign(x.theta - 0.13) for x in swap.scorers(student)])
        assert torch.equal(signs, torch.full_like(signs, moved if rule == THRESHOLD else 0))


def test_interrupted_distillation_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "fit", partial(train.fit, save_every_s=0.0))
    given = rows("bert", 128, 64)
    whole, teacher = pair()
    distil.distil(whole, teacher, given, 0.5, FAST)

    def killed(_what: str, done: int, _total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    file = tmp_path / "distil.safetensors"
    with pytest.raises(KeyboardInterrupt):
        distil.distil(pair()[0], teacher, given, 0.5, FAST, checkpoint=file, progress=killed)
    resumed = pair()[0]
    told = distil.distil(resumed, teacher, given, 0.5, FAST, checkpoint=file)
    assert (told.resumed_at, told.steps) == (7, 12)
    assert all(torch.equal(x, whole.state_dict()[name]) for name, x in resumed.state_dict().items())
    with pytest.raises(BadInput, match="other rows, weights or settings"):
        distil.distil(pair()[0], teacher, given, 0.4, FAST, checkpoint=file)


def test_what_cannot_be_distilled_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(BadInput, match="0 rows"):
        distil.distil(student, teacher, [], 0.5)
    with pytest.raises(BadInput, match="no sparse attention"):
        distil.distil(teacher, teacher, rows("bert", 64), 0.5)


def test_the_pass_distils_and_calibrates_again() -> None:
    model = models.load(make("bert"), lengths=(64, 256))
    given = arrays(model, 256, 256, 256)
    settings: dict[str, Any] = {
        "budget": 0.3,
        "block": 16,
        "dense_below": 64,
        "buckets": (128,),
        "recipe": scorer.Recipe(steps=20),
    }
    frozen, told = (sparsify.dsa(given, distil=steps, **settings)(model) for steps in (0, FAST))
    facts = told.history[-1].facts
    assert facts["distilled"]["steps"] == 24 and "distilled" not in frozen.history[-1].facts
    assert 0.25 < facts["kept"] <= 0.3 and facts["theta"]["128"] > facts["theta"]["256"]
    moved = [torch.equal(shared(told.module)[name], x) for name, x in shared(frozen.module).items()]
    assert not all(moved)
    before = op.counters()
    with torch.no_grad():
        for row in given:
            told.module(*(torch.from_numpy(row[x.name])[None] for x in model.inputs))
    after = op.counters()
    kept = (after.kept - before.kept) / (after.candidates - before.candidates)
    assert kept == pytest.approx(facts["kept"], abs=0.02), "calibrated on what sparse layers see, not dense ones"
    with pytest.raises(BadInput, match="dense_below=256"):
        sparsify.dsa(given, distil=FAST, **settings | {"dense_below": 256})(model)
