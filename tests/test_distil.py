"""Distillation: what each loss means, what is asked of the teacher once, and that a student learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_student import classifier, outputs  # noqa: E402

from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import distil, student  # noqa: E402
from edgeformer.passes.distil import Augment, Losses  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402

RANDOM = np.random.default_rng(0)
TEXTS = [" ".join(f"w{n}" for n in RANDOM.integers(3, 40, RANDOM.integers(2, 12))) for _ in range(96)]
RECIPE = Recipe(epochs=6, batch=16, rate=2e-3, bf16=False)
ALL = Losses(response=1, hard=0.1, feature=0.1, relation=0.1, batch=0.1)
ALL_BUT_HARD = replace(ALL, hard=0.0)


def distance(model: Any, teacher: Any) -> float:
    return float(np.abs(outputs(model, TEXTS) - outputs(teacher, TEXTS)).mean())


def small(teacher: Any) -> Any:
    return student.vocabulary(TEXTS)(student.width(16)(student.layers(2)(teacher)))


@pytest.mark.parametrize("losses", [Losses(), ALL_BUT_HARD], ids=["response", "all"])
def test_a_student_comes_nearer_to_its_teacher(losses: Losses, tmp_path: Path) -> None:
    teacher = classifier()
    with torch.no_grad():
        teacher.module.module.classifier.weight.mul_(20)  # answers worth learning
    start = small(teacher)
    before = distance(start, teacher)
    seen: list[tuple[str, int, int]] = []
    step = distil.distil(
        teacher,
        TEXTS,
        losses=losses,
        recipe=RECIPE,
        folder=tmp_path,
        progress=lambda *x: seen.append(x),
    )
    made = step(start)
    assert distance(made, teacher) < 0.75 * before
    assert distance(start, teacher) == before  # the model that was given is as it was
    facts = made.history[-1].facts
    assert facts["steps"] == 36 and facts["texts"] == 96 and ("feature" in facts["losses"]) == bool(losses.feature)
    assert ("distil", 36, 36) in seen and ("teacher", 96, 96) in seen
    assert not any("project" in name for name in made.module.state_dict())


def test_the_teacher_answers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "SHARD", 40)
    teacher = classifier()
    asked: list[int] = []
    ask = distil._ask
    monkeypatch.setattr(
        distil, "_ask", lambda model, rows, *more: (asked.append(len(rows)), ask(model, rows, *more))[1]
    )
    step = distil.distil(teacher, TEXTS, losses=ALL_BUT_HARD, recipe=replace(RECIPE, epochs=1), folder=tmp_path)
    first = step(small(teacher))
    assert sum(asked) == 96 and len(list((tmp_path / "teacher").iterdir())) == 3
    next(iter((tmp_path / "teacher").iterdir())).unlink()  # as if it had been killed before this one
    again = step(small(teacher))
    assert 96 < sum(asked) <= 96 + 40
    for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)
    asked.clear()
    more = distil.distil(teacher, [*TEXTS, "w3 w4"], losses=ALL_BUT_HARD, recipe=RECIPE, folder=tmp_path)
    more(small(teacher))
    assert sum(asked) == 17  # the shards that are the same are not asked for again
    asked.clear()
    half = distil.distil(teacher, TEXTS, losses=ALL_BUT_HARD, recipe=replace(RECIPE, epochs=0.5))
    assert (
        half(small(teacher)).history[-1].facts["steps"] == 3 and sum(asked) == 48
    )  # nor what training does not come to


def test_each_loss_is_zero_for_a_twin_and_not_for_another() -> None:
    torch.manual_seed(0)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    want, other = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    padded = want.clone()
    padded[1, 2] = 99.0  # what stands in the padding does not count
    for loss in (distil.feature, distil.relation, distil.arrangement):
        assert float(loss(padded, want, valid)) == pytest.approx(0, abs=1e-6), loss.__name__
        assert float(loss(other, want, valid)) > 0.01, loss.__name__
    assert float(distil.relation(torch.randn(2, 3, 24), want, valid)) > 0  # widths may differ
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    for kind in ("classification", "regression", "embedding"):
        assert float(distil.response(a, a, kind, 2.0)) == pytest.approx(0, abs=1e-6)
        assert float(distil.response(a, b, kind, 2.0)) > 0.01


def test_response_is_the_divergence_of_softened_answers() -> None:
    got, want = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -1.0]])
    p, q = (torch.softmax(x / 2, -1)[0] for x in (want, got))
    expected = 4 * float((p * (p / q).log()).sum())
    assert float(distil.response(got, want, "classification", 2.0)) == pytest.approx(expected, rel=1e-5)


def test_rows_without_a_label_take_no_part() -> None:
    output = torch.tensor([[5.0, 0.0], [0.0, 5.0]], requires_grad=True)
    loss = distil._hard(output, torch.tensor([1.0, torch.nan]), "classification")
    torch.autograd.backward(loss)
    assert output.grad is not None and output.grad[0].abs().sum() > 0 and output.grad[1].abs().sum() == 0
    assert float(distil._hard(output.detach(), torch.full((2,), torch.nan), "classification")) == 0.0


def test_augmented_texts_are_made_of_the_given_ones() -> None:
    how = Augment(copies=2, seed=1)
    made = distil.augmented(TEXTS, how, "[MASK]")
    assert len(made) == 2 * len(TEXTS) and made == distil.augmented(TEXTS, how, "[MASK]")
    assert made != distil.augmented(TEXTS, replace(how, seed=2), "[MASK]")
    words = {word for text in TEXTS for word in text.split()}
    found = [word for text in made for word in text.split()]
    assert {*found} <= words | {"[MASK]"} and 0.05 < found.count("[MASK]") / len(found) < 0.2
    sizes = [len(text.split()) for text in made]
    assert max(sizes) > max(len(text.split()) for text in TEXTS)  # joined
    assert "[MASK]" not in " ".join(distil.augmented(TEXTS, how, ""))
    assert distil.augmented(TEXTS, Augment(), "[MASK]") == []


def test_what_cannot_be_distilled_is_named() -> None:
    teacher = classifier()
    with pytest.raises(BadInput, match="needs labels"):
        distil.distil(teacher, TEXTS, losses=ALL)
    with pytest.raises(BadInput, match="1 labels for 96 texts"):
        distil.distil(teacher, TEXTS, labels=[1.0])
    with pytest.raises(BadInput, match="not be below 0 nor all 0"):
        Losses(response=0)
    fewer = student.vocabulary(TEXTS[:1])(teacher)
    with pytest.raises(BadInput, match="has no tokenizer"):
        distil.distil(teacher, TEXTS)(replace(fewer, tokenizer=None))
