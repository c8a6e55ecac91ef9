"""Closeness and metrics on values worked out by hand, and against scipy; a broken row never hides in a mean."""

from typing import Any

import numpy as np
import pytest

from edgeformer_agent import score, wire

EMBEDDING = wire.Task("embedding")
CLASSES = wire.Task("classification", "accuracy", False, ("a", "b"))
REGRESSION = wire.Task("regression", "spearman")
PAIRS = wire.Task("embedding", "spearman", True)
NAN = float("nan")
LOG3 = float(np.log(3))  # softmax of (0, log 3) is (1/4, 3/4)


def test_cosine() -> None:
    got = [[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0], [0.0, 0.0]]
    want = [[2.0, 0.0], [4.0, 3.0], [5.0, 0.0], [1.0, 0.0]]
    assert score.similarity(EMBEDDING, got, want) == pytest.approx([1, 0.96, -1, 0])
    found = score.fidelity(EMBEDDING, got, want)
    assert found == wire.Fidelity("cosine", pytest.approx(0.24), -1.0, 7.0, 4)


def test_cosine_of_tiny_and_huge_vectors() -> None:
    for size in (1e-12, 1e12):
        assert score.similarity(EMBEDDING, [[size, size]], [[1.0, 1.0]]) == pytest.approx([1])


def test_agreement_is_a_share_of_rows_and_the_worst_row_a_distance_of_distributions() -> None:
    want = [[0.0, LOG3], [0.0, LOG3], [LOG3, 0.0], [0.0, 0.0]]
    got = [[0.0, LOG3], [LOG3, 0.0], [LOG3 + 100, 100.0], [0.0, LOG3]]
    assert score.similarity(CLASSES, got, want) == pytest.approx([1, 0.5, 1, 0.75])  # a shift changes no softmax
    found = score.fidelity(CLASSES, got, want)
    assert (found.measure, found.rows, found.metric, found.value) == ("agreement", 4, "accuracy", None)
    assert found.mean == 0.5  # rows 0 and 2; the last one's reference is a tie, which argmax gives to class 0
    assert found.worst == pytest.approx(0.5) and found.max_abs == pytest.approx(100)


def test_agreement_with_large_logits() -> None:
    assert score.similarity(CLASSES, [[1e4, 0.0]], [[0.0, 1e4]]) == pytest.approx([0])


def test_correlation() -> None:
    want, got = [[0.0], [1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0], [10.0]]
    deviation = np.sqrt(1.25)
    assert score.similarity(REGRESSION, got, want) == pytest.approx(1 - np.array([1, 1, 1, 7]) / deviation)
    found = score.fidelity(REGRESSION, got, want)
    assert found.measure == "correlation"
    assert found.mean == pytest.approx(14 / np.sqrt(5 * 50))  # sums of (-1.5..1.5) times (-3, -2, -1, 6)
    assert found.worst == pytest.approx(1 - 7 / deviation)  # far below 0, and no reason to call the outputs broken
    assert score.fidelity(REGRESSION, [[-x[0]] for x in want], want).mean == pytest.approx(-1)


def test_correlation_of_constants() -> None:
    same = [[2.0], [2.0]]
    assert score.fidelity(REGRESSION, [[5.0], [5.0]], [[0.0], [1.0]]).mean == 0
    assert score.fidelity(REGRESSION, same, same).mean == 1  # nothing varies: rows are compared
    assert score.fidelity(REGRESSION, [[3.0]], [[3.0]]).mean == 1
    assert score.fidelity(REGRESSION, [[9.0], [2.0]], same).mean < -1000


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("task", [EMBEDDING, CLASSES, REGRESSION])
def test_one_value_that_is_not_finite(task: wire.Task, bad: float) -> None:
    want = [[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]
    got = [[1.0, 0.0], [2.5, bad], [0.0, 3.0]]
    assert score.similarity(task, got, want) == pytest.approx([1, -1, 1])
    found = score.fidelity(task, got, want, [0, 0, 1] if task == CLASSES else None)
    assert found.worst == -1 and found.max_abs == 0.5
    assert found.mean == pytest.approx({"embedding": 1 / 3, "classification": 0, "regression": -1}[task.kind])
    wire.dump(found)  # a report that cannot be written would take the finding with it


def test_rows_without_a_finite_value() -> None:
    found = score.fidelity(CLASSES, [[NAN, NAN]], [[1.0, 0.0]], [0])
    assert found[1:] == (0.0, -1.0, 0.0, 1, "accuracy", 0.0, 1.0)  # NaN's argmax is 0, and no answer


def test_accuracy() -> None:
    outputs = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [5.0, 5.0]]
    assert score.metric(CLASSES, outputs, [1, 0, 0, 0]) == 0.75
    assert score.metric(CLASSES, outputs, np.float32([0, 1, 0, 1])) == 0
    assert score.metric(CLASSES, [[NAN, 1.0], *outputs[1:]], [0, 0, 0, 0]) == 0.5


def test_spearman() -> None:
    def one(*values: float) -> list[list[float]]:
        return [[v] for v in values]

    assert score.metric(REGRESSION, one(1, 2, 3, 4), [10, 20, 30, 1000]) == pytest.approx(1)  # ranks, not values
    assert score.metric(REGRESSION, one(4, 3, 2, 1), [1, 2, 3, 4]) == pytest.approx(-1)
    assert score.metric(REGRESSION, one(1, 2, 3, 4), [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 x 2 / (4 x 15)
    assert score.metric(REGRESSION, one(1, 1, 2), [1, 2, 3]) == pytest.approx(np.sqrt(3) / 2)  # ranks 1.5, 1.5, 3
    assert score.metric(REGRESSION, one(7, 7, 7), [1, 2, 3]) == 0
    assert score.metric(REGRESSION, one(1, NAN, 3), [1, 2, 3]) == 0  # a NaN has no rank


@pytest.mark.parametrize("seed", range(8))
def test_spearman_with_ties_is_scipys(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    outputs, labels = random.integers(0, 6, 40) / 3, random.integers(0, 11, 40) / 2
    ours = score.metric(REGRESSION, outputs[:, None], labels)
    assert ours == pytest.approx(stats.spearmanr(outputs, labels).statistic, abs=1e-12)


def test_pairs_are_neighbours() -> None:
    """Rows 0 and 1, 2 and 3, 4 and 5: cosines 1, 0 and -1."""
    rows = [[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]
    assert score.metric(PAIRS, rows, [5.0, 2.5, 0.0]) == pytest.approx(1)
    assert score.metric(PAIRS, rows, [2.5, 5.0, 0.0]) == pytest.approx(0.5)
    broken = [[NAN, 0.0], *rows[1:]]
    found = score.fidelity(PAIRS, broken, rows, [5.0, 2.5, 0.0])
    assert (found.value, found.reference, found.rows) == (0.0, pytest.approx(1), 6)


def test_the_metric_is_that_of_outputs_and_reference_apart() -> None:
    found = score.fidelity(CLASSES, [[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [1, 1])
    assert (found.value, found.reference) == (1.0, 0.5)
    plain = score.fidelity(CLASSES._replace(metric=None), [[0.0, 1.0]], [[1.0, 0.0]], [1])
    assert (plain.metric, plain.value, plain.reference) == (None, None, None)


@pytest.mark.parametrize(
    ("got", "want"),
    [([[1.0, 2.0]], [[1.0]]), ([[1.0]], [[1.0], [1.0]]), ([[1.0], [1.0, 2.0]], [[1.0], [1.0]])],
)
def test_shapes_must_agree(got: Any, want: Any) -> None:
    """Broadcasting would compare everything with one row."""
    with pytest.raises(ValueError, match="shape"):
        score.fidelity(EMBEDDING, got, want)


def test_rows_of_any_rank_are_vectors() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert score.fidelity(EMBEDDING, [image], [image.ravel()]).mean == pytest.approx(1)


def test_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match=r"no metric 'f1'; known: accuracy, mcc, macro_f1, pearson, spearman"):
        score.metric(CLASSES._replace(metric="f1"), [[1.0]], [0])
