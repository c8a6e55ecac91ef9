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
    assert found[1:] == (0.0, -1.0, 0.0, 1, "accuracy", 0.0, 1.0, {})  # NaN's argmax is 0, and no answer


def test_accuracy() -> None:
    outputs = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [5.0, 5.0]]
    assert score.metric(CLASSES, outputs, [1, 0, 0, 0]) == 0.75
    assert score.metric(CLASSES, outputs, np.float32([0, 1, 0, 1])) == 0
    assert score.metric(CLASSES, [[NAN, 1.0], *outputs[1:]], [0, 0, 0, 0]) == 0.5


TOKENS = wire.Task("token_classification", "accuracy", False, ("O", "B"))
SPAN = wire.Task("question_answering", "f1")
NEXT = wire.Task("next_token", "accuracy")


def test_tokens_are_judged_one_by_one() -> None:
    """Rows of two and of three tokens: agreement counts tokens, accuracy those with a label."""
    want = [np.array([[LOG3, 0.0], [0.0, LOG3]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])]
    got = [np.array([[LOG3, 0.0], [LOG3, 0.0]]), want[1]]
    assert score.similarity(TOKENS, got, want) == pytest.approx([0.75, 1])
    labels = [np.array([score.IGNORED, 0]), np.array([0, 1, score.IGNORED])]
    found = score.fidelity(TOKENS, got, want, labels)
    assert (found.measure, found.mean, found.worst, found.rows) == ("agreement", 0.8, pytest.approx(0.75), 2)
    assert (found.value, found.reference) == (2 / 3, 1 / 3)
    assert score.metric(TOKENS, got, [np.full(2, score.IGNORED), np.full(3, score.IGNORED)]) == 0
    assert score.metric(TOKENS, [got[0] * NAN, got[1]], labels) == 1 / 3


def test_next_tokens_are_judged_by_what_is_left_of_their_likelihood() -> None:
    """A turned close call costs what it is worth; the same number of turned answers that were sure costs all."""
    close, sure = np.log([0.51, 0.49]), np.log([0.999, 0.001])
    same = score.fidelity(NEXT, [close + 7, sure], [close, sure])
    assert (same.measure, same.mean, same.worst) == ("likelihood", pytest.approx(1), pytest.approx(1))
    turned = score.fidelity(NEXT, [close[::-1], sure], [close, sure])
    assert turned.mean == pytest.approx(np.exp(-0.02 * np.log(0.51 / 0.49) / 2)) and turned.mean > 0.999
    wrong = score.fidelity(NEXT, [close, sure[::-1]], [close, sure])
    assert wrong.mean == pytest.approx(np.exp(-0.998 * np.log(999) / 2)) and wrong.worst == pytest.approx(0.002)
    assert score.fidelity(NEXT, [close, sure * NAN], [close, sure]).mean == 0
    assert score.fidelity(NEXT, [[0.0, -2000.0]], [[0.0, 0.0]]).mean == pytest.approx(0)  # no overflow


def answer(start: int, end: int, tokens: int = 8) -> Any:
    logits = np.zeros((tokens, 2))
    logits[start, 0] = logits[end, 1] = 5
    return logits


def test_ends_of_an_answer_are_distributions_over_the_tokens() -> None:
    found = score.fidelity(SPAN, [answer(2, 4), answer(3, 3)], [answer(2, 5), answer(3, 3)])
    assert (found.measure, found.mean, found.value) == ("agreement", 0.75, None)  # three of four ends
    apart = (np.exp(5) - 1) / (np.exp(5) + 7)  # what one end has elsewhere
    assert found.worst == pytest.approx(1 - apart / 2)


def test_answers_are_texts() -> None:
    """Question in tokens 0 and 1; the text is 'The red fox, a fox.' in tokens 2 to 7."""
    context = "The red fox, a fox."
    offsets = [[0, 0], [0, 0], [0, 3], [4, 7], [8, 11], [11, 12], [13, 14], [15, 18]]
    label = score.answer_label(context, offsets, ["red fox", "the fox"])
    exact = SPAN._replace(metric="exact_match")
    assert score.metric(exact, [answer(2, 5)], [label]) == 1  # article and comma do not count
    assert score.metric(exact, [answer(3, 3)], [label]) == 0
    assert score.metric(SPAN, [answer(3, 3)], [label]) == pytest.approx(2 / 3)  # "red" of "red fox"
    assert score.metric(SPAN, [answer(0, 1)], [label]) == score.metric(SPAN, [answer(2, 2)], [label]) == 0
    assert score._span(answer(7, 3), np.array(offsets)) == (0, 7)  # an end before the start: the first best in order
    found = score.fidelity(SPAN, [answer(2, 4)], [answer(3, 3)], [label])
    assert (found.metric, found.value, found.reference) == ("f1", 1, pytest.approx(2 / 3))
    assert found.also == {"exact_match": 1}
    assert score.metric(SPAN, [answer(2, 4) * NAN], [label]) == 0
    assert score.metric(SPAN, [answer(2, 4)], [score.answer_label("", [[0, 0]] * 8, ["fox"])]) == 0


@pytest.mark.parametrize("text", ["An  Apple-pie.", "THE a an", "the theatre", "U.S. $3,000!"])
def test_words_are_the_official_ones(text: str) -> None:
    """As the official script does it: lower, punctuation, articles, white space."""
    import re
    import string

    lowered = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    assert score._words(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split()).split()


def test_a_word_of_several_tokens_must_be_right_in_all() -> None:
    rows = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    labels = [np.array([4, 1]), np.array([4, 0]), np.array([9, 0])]
    assert score.groups(NEXT, 3, labels) == [4, 4, 9] and score.groups(PAIRS, 4, None) == [0, 0, 1, 1]
    assert score.metric(NEXT, rows, labels) == 0.5
    assert score.metric(NEXT, rows, [labels[0], np.array([4, 2]), labels[2]]) == 0
    assert score.metric(NEXT, [rows[0], [NAN, 0.0, 0.0], rows[2]], labels) == 0
    found = score.fidelity(NEXT, rows, rows[:2] + rows[1:2], labels)
    assert (found.value, found.reference) == (0.5, 1.0)


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
    with pytest.raises(ValueError, match=r"no metric 'bleu'; known: accuracy, exact_match, f1, macro_f1, mcc, pearson"):
        score.metric(CLASSES._replace(metric="bleu"), [[1.0]], [0])
