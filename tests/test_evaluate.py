"""Metrics, intervals and tests against independent code, on models and on what a runner answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_student import TEXTS, classifier  # noqa: E402

from edgeformer import data, evaluate, formats  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer_agent import score, wire  # noqa: E402

RANDOM = np.random.default_rng(0)
N = 400
LABELS = RANDOM.integers(0, 3, N).astype(np.float32)
CLASSES = wire.Task("classification", "accuracy")
NUMBERS = wire.Task("regression", "spearman")


def answers(noise: float, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Logits that are right as often as the noise lets them."""
    random = np.random.default_rng(seed)
    logits = np.eye(3)[LABELS.astype(int)] + random.normal(0, noise, (N, 3))
    return tuple(logits.astype(np.float32))


def rows(task: wire.Task, labels: np.ndarray = LABELS) -> data.Rows:
    return data.Rows(tuple({} for _ in labels), "made up", labels, task)


def test_metrics_are_those_of_independent_code() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    got = np.stack(answers(1.0))
    chosen = got.argmax(1)
    found = {m: score.metric(CLASSES._replace(metric=m), got, LABELS) for m in ("accuracy", "mcc", "macro_f1")}
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(LABELS, chosen))
    assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(LABELS, chosen))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(LABELS, chosen, average="macro"))
    numbers = got[:, :1]
    wanted = got[:, 0] + RANDOM.normal(0, 1, N)
    for metric, independent in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        mine = score.metric(NUMBERS._replace(metric=metric), numbers, wanted)
        assert mine == pytest.approx(float(independent(numbers[:, 0], wanted)[0]), abs=1e-9), metric


def test_answers_that_are_no_numbers_are_wrong() -> None:
    broken = np.stack(answers(0.0))
    broken[:40] = np.nan
    for metric in ("mcc", "macro_f1"):
        whole, less = (score.metric(CLASSES._replace(metric=metric), x, LABELS) for x in (answers(0.0), broken))
        assert whole == pytest.approx(1) and less < 0.97
    assert score.metric(CLASSES._replace(metric="mcc"), np.zeros((N, 3)), LABELS) == 0.0  # one class for all
    assert score.metric(NUMBERS._replace(metric="pearson"), broken[:, :1], LABELS) == 0.0


def test_mcnemar_is_the_exact_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for gained, lost in ((0, 0), (3, 11), (40, 41), (0, 6)):
        right = np.array([True] * gained + [False] * lost + [True] * 50)
        base = np.array([False] * gained + [True] * lost + [True] * 50)
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert evaluate.mcnemar(right, base) == pytest.approx(expected)


def test_every_number_has_its_interval() -> None:
    found = evaluate.judged("a", answers(0.8), rows(CLASSES), "longtech")
    accuracy, f1 = found.estimates
    assert (accuracy.interval, f1.interval, accuracy.n) == ("Wilson", "bootstrap", N)
    for e in found.estimates:
        assert e.low < e.value < e.high and 0.04 < e.high - e.low < 0.12
    (mcc,) = evaluate.judged("a", answers(0.8), rows(CLASSES), "cola").estimates
    assert (mcc.metric, mcc.interval) == ("mcc", "bootstrap") and mcc.low < mcc.value < mcc.high
    numbers = [x[:1] for x in answers(0.8)]
    pair = evaluate.judged("a", numbers, rows(NUMBERS, np.stack(numbers)[:, 0] + RANDOM.normal(0, 1, N)), "stsb")
    assert [e.metric for e in pair.estimates] == ["pearson", "spearman"]
    assert all(e.interval == "Fisher z" and e.low < e.value < e.high for e in pair.estimates)


def test_a_difference_is_seen_in_pairs_and_not_seen_where_there_is_none() -> None:
    base = evaluate.judged("base", answers(0.5), rows(CLASSES), "longtech")
    same = evaluate.judged("same", answers(0.5), rows(CLASSES), "longtech")
    worse = evaluate.judged("worse", answers(1.0, seed=2), rows(CLASSES), "longtech")
    for d in evaluate.against(same, base):
        assert (d.value, d.p_value, d.agreement) == (0, 1, 1) and d.low <= 0 <= d.high and d.high - d.low < 0.02
    for d in evaluate.against(worse, base):
        assert d.value < 0 and d.low < d.value < d.high < 0 and d.p_value < 0.01 and d.agreement < 0.9
    assert {d.test for d in evaluate.against(worse, base)} == {"McNemar, exact", "paired bootstrap"}
    with pytest.raises(BadInput, match="answered different rows"):
        evaluate.against(evaluate.judged("b", answers(0.5), rows(CLASSES, 2 - LABELS), "longtech"), base)


def test_pairs_of_embeddings_are_drawn_as_pairs() -> None:
    task = wire.Task("embedding", "spearman", paired=True)
    vectors = tuple(RANDOM.normal(size=(2 * 50, 8)))
    cosines = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    known = replace(rows(task, np.asarray(cosines, np.float32)), rows=tuple({} for _ in vectors))
    found = evaluate.judged("a", vectors, known, "stsb")
    assert all(e.value == pytest.approx(1) and e.n == 50 for e in found.estimates)
    (d, _) = evaluate.against(found, found)
    assert d.value == 0 and d.agreement is None and d.test == "paired bootstrap"
    picked = evaluate._picked(task, np.stack(vectors), np.array([3, 3]))
    assert np.array_equal(picked, np.stack([vectors[i] for i in (6, 7, 6, 7)]))


def test_the_table_says_it_all() -> None:
    base = evaluate.judged("base", answers(0.5), rows(CLASSES), "sst2")
    worse = evaluate.judged("worse", answers(1.0, seed=2), rows(CLASSES), "sst2")
    console = Console(width=140)
    with console.capture() as captured:
        console.print(evaluate.table([base, worse]))
    text = captured.get()
    assert "made up" in text and "McNemar, exact" in text and f"{worse.estimates[0].value:.4f}" in text


FILES = {
    "cola": ("dev.tsv", "gj04\t1\t\tw3 w4.\nks08\t0\t*\tw5 w6 w7\n"),
    "longtech": (
        "test.jsonl",
        "\n".join(json.dumps({"id": "x", "label": "node", "y": y, "text": t}) for y, t in ((1, "w3\nw4."), (0, "w5"))),
    ),
}


@pytest.mark.parametrize("task", FILES)
def test_files_are_read_as_they_are_published(task: str, tmp_path: Path) -> None:
    name, text = FILES[task]
    path = tmp_path / name
    path.write_text(text)
    model = classifier()
    found = data.load(model, path, task)
    assert found.labels is not None and found.labels.tolist() == [1, 0] and found.task is not None
    assert found.task.metric == {"cola": "mcc", "longtech": "accuracy"}[task]
    assert found.rows[0]["input_ids"].tolist() == model.tokenizer("w3 w4.")["input_ids"]


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("cola", "gj04\t1\tw3\n\tw4\t0\n", "line 2: task 'cola'"),
        ("longtech", '{"y": 1}\n', "line 1: an object with text and y"),
        ("longtech", "no\n", "line 1: not JSON"),
    ],
)
def test_other_files_are_refused(task: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        data.load(classifier(), path, task)


def test_what_cannot_be_evaluated_is_named() -> None:
    with pytest.raises(BadInput, match="no labels in it"):
        evaluate.evaluate(classifier(), data.load(classifier(), TEXTS, None), "sst2")
    with pytest.raises(BadInput, match="no task 'glue' to evaluate"):
        evaluate.evaluate(classifier(), data.load(classifier(), TEXTS, None), "glue")


@pytest.mark.slow
def test_a_program_is_evaluated_by_its_runner(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    path, model = tmp_path / "dev.tsv", classifier()
    path.write_text("".join(f"w{3 + i % 40} w{5 + i % 7}\t{i % 3}\n" for i in range(30)))
    known = data.load(model, path, "sst2")
    own = evaluate.evaluate(model, known, "sst2", name="torch")
    (program,) = formats.load("onnx").export(model, ("fp32",))
    done: list[int] = []
    found: Any = evaluate.evaluate(program, known, "sst2", progress=done.append)
    assert found.name == "onnx-fp32" and done[-1] == 30 and found.estimates[0].value == own.estimates[0].value
    np.testing.assert_allclose(np.stack(found.outputs), np.stack(own.outputs), atol=1e-4)
    assert evaluate.against(found, own)[0].agreement == 1.0
