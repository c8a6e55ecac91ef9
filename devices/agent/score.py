"""
How good outputs are: closeness to the fp32 model, and the task's own metric. Host and device use these functions.

Similarity of a row lies in [.., 1], 1 is equal:
  embedding       cosine of output and reference
  regression      1 - |difference| / standard deviation of the reference; the mean is Pearson's correlation
  the other kinds 1 - total variation distance of the two softmax distributions, the mean over the row's distributions;
                  the mean over the data is reported as agreement (share of distributions with the same argmax), its
                  minimum as the worst row. A row has one distribution (classification, next_token), one a token
                  (token_classification), or one over the tokens for each end of the answer (question_answering).
  next_token      the mean is the likelihood that is left of each token fp32 would tell, exp(-KL divergence) with its
                  mean over the rows: 1 / (1 + what perplexity gains). Few tokens are far ahead of all others, so which
                  comes first turns with the smallest change and would take thousands of rows to say as much.
"""

import json
import re
import string
from typing import Any, Dict, List, Optional, Sequence, Set

import numpy as np

from . import wire

MEASURE = {
    "embedding": "cosine",
    "classification": "agreement",
    "regression": "correlation",
    "token_classification": "agreement",
    "question_answering": "agreement",
    "next_token": "likelihood",
}
METRICS = ("accuracy", "exact_match", "f1", "macro_f1", "mcc", "pearson", "spearman")
IGNORED = -100  # the label of a token that is not judged: a special one, or the rest of a word
ANSWER_TOKENS = 30  # the longest answer, as in the official evaluation of BERT on SQuAD


def fidelity(task, outputs, reference, labels=None):
    # type: (wire.Task, Sequence[Any], Sequence[Any], Optional[Sequence[Any]]) -> wire.Fidelity
    """
    `outputs` and `reference` run parallel, one array a row. Labels (see `metric`; one a row, or one a pair) add the
    task's metric, of the outputs and of the reference on the same rows.
    """
    sizes = [np.size(row) for row in outputs], [np.size(row) for row in reference]
    if sizes[0] != sizes[1]:  # broadcasting would compare everything with one row
        raise ValueError("outputs do not have the shape of the reference: {} and {} values a row".format(*sizes))
    rows = similarity(task, outputs, reference)
    mean = _mean(task, outputs, reference, rows)
    value = base = None
    also = {}  # type: Dict[str, float]
    if task.metric is not None and labels is not None:
        value, base = metric(task, outputs, labels), metric(task, reference, labels)
        if task.metric == "f1":
            also["exact_match"] = metric(task._replace(metric="exact_match"), outputs, labels)
    furthest = max(_furthest(got, want) for got, want in zip(outputs, reference))
    return wire.Fidelity(
        MEASURE[task.kind], mean, float(rows.min()), furthest, len(rows), task.metric, value, base, also
    )


def similarity(task, got, want):
    # type: (wire.Task, Sequence[Any], Sequence[Any]) -> Any
    """One number a row; a row with a value that is not finite has similarity -1."""
    finite = np.array([bool(np.isfinite(row).all()) for row in got])
    if MEASURE[task.kind] in ("agreement", "likelihood"):
        pairs = zip(got, want, finite)
        return np.array([_overlap(_logits(task, a), _logits(task, b)) if ok else -1.0 for a, b, ok in pairs])
    safe, base = np.where(finite[:, None], _matrix(got), 0), _matrix(want)
    if task.kind == "regression":
        rows = 1 - abs(safe - base).max(axis=1) / max(float(base.std()), 1e-6)
    else:
        rows = _cosine(safe, base)
    return np.where(finite, rows, -1.0)


def metric(task, outputs, labels):
    # type: (wire.Task, Any, Any) -> float
    """
    accuracy: share of rows whose argmax is the label; of tokens, those with a label (token_classification: an array of
    labels a row, IGNORED where there is none); of passages, each of whose rows must be right (next_token: the passage's
    number and the token a row). mcc, macro_f1: of the same answers of a classification, Matthews' correlation and the
    mean F1 of the classes. exact_match, f1: of the answer's text, by SQuAD's official rules (question_answering: a
    row's label is `answer_label`). spearman, pearson: correlation of predictions and labels, of their ranks or of their
    values. A row that is not finite is wrong; it has no rank, so that nothing is correlated then.
    """
    whole = getattr(outputs, "ndim", 0) == 2  # at once, where a bootstrap asks a thousand times
    rows = np.isfinite(outputs).all(axis=1) if whole else [np.isfinite(row).all() for row in outputs]
    finite = [bool(ok) for ok in rows]
    if task.metric in ("spearman", "pearson"):
        if not all(finite):
            return 0.0
        got = _matrix(outputs)
        predicted = _cosine(got[0::2], got[1::2]) if task.paired else got[:, 0]
        wanted = np.asarray(labels, np.float64)
        return _pearson(predicted, wanted) if task.metric == "pearson" else _pearson(_ranks(predicted), _ranks(wanted))
    if task.metric in ("mcc", "macro_f1"):
        got = _matrix(outputs)
        table = _confusion(np.where(finite, got.argmax(axis=1), -1), np.asarray(labels), got.shape[1])
        return _matthews(table) if task.metric == "mcc" else _macro_f1(table)
    judged = list(zip(outputs, labels, finite))
    if task.metric == "accuracy":
        chosen = [(_logits(task, row).argmax(axis=1) == _wanted(task, label)) & ok for row, label, ok in judged]
        return _accuracy(task, chosen, labels)
    if task.metric in ("exact_match", "f1"):
        rule = _f1 if task.metric == "f1" else _exact
        return float(np.mean([_answered(row, label, rule) if ok else 0.0 for row, label, ok in judged]))
    raise ValueError("no metric {!r}; known: {}".format(task.metric, ", ".join(METRICS)))


def _confusion(chosen, labels, classes):
    # type: (Any, Any, int) -> Any
    """[class chosen, class wanted]; the last row counts what was not answered (-1)."""
    table = np.zeros((classes + 1, classes + 1))
    np.add.at(table, (chosen, labels.astype(int)), 1)
    return table


def _matthews(table):
    # type: (Any) -> float
    """Multi-class Matthews correlation; 0 where all answers or all labels are one class."""
    chosen, wanted, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    scale = float(np.sqrt((total**2 - (chosen**2).sum()) * (total**2 - (wanted**2).sum())))
    return float((np.trace(table) * total - (chosen * wanted).sum()) / scale) if scale else 0.0


def _macro_f1(table):
    # type: (Any) -> float
    """Mean over the classes that were chosen or wanted."""
    both = (table.sum(axis=0) + table.sum(axis=1))[:-1]
    return float((2 * np.diag(table)[:-1] / np.maximum(both, 1))[both > 0].mean())


def groups(task, count, labels):
    # type: (wire.Task, int, Optional[Sequence[Any]]) -> List[int]
    """For each row the number of what it is judged with: a pair, a passage, or itself."""
    if task.kind == "next_token" and labels is not None:
        return [int(label[0]) for label in labels]
    return [i // 2 if task.paired else i for i in range(count)]


def answer_label(context, offsets, answers):
    # type: (str, Sequence[Sequence[int]], Sequence[str]) -> Any
    """
    What judges one answer, as bytes: the text it is a part of, where each token of the row is in it (start and end
    character, [0, 0] for one that is not), and what people answered.
    """
    body = json.dumps({"context": context, "offsets": offsets, "answers": answers}, ensure_ascii=False)
    return np.frombuffer(body.encode("utf-8"), np.uint8)


# --- distributions ----------------------------------------------------------------------------------------------------


def _logits(task, row):
    # type: (wire.Task, Any) -> Any
    """A row's distributions, (number, choices)."""
    row = np.asarray(row, np.float64)
    if task.kind == "question_answering":
        return row.reshape(-1, 2).T
    return row if task.kind == "token_classification" else row.reshape(1, -1)


def _overlap(got, want):
    # type: (Any, Any) -> float
    return float((1 - abs(_softmax(got) - _softmax(want)).sum(axis=1) / 2).mean())


def _divergence(got, want):
    # type: (Any, Any) -> float
    """Kullback-Leibler's, in nats: what a text that `want` told costs more where `got` reads it."""
    logs = [x - x.max(axis=1, keepdims=True) for x in (got, want)]
    ours, theirs = [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logs]
    return float(max(0.0, (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()))


def _mean(task, got, want, rows):
    # type: (wire.Task, Sequence[Any], Sequence[Any], Any) -> float
    finite = all(np.isfinite(row).all() for row in got)
    if MEASURE[task.kind] == "likelihood":
        lost = [_divergence(_logits(task, a), _logits(task, b)) for a, b in zip(got, want)] if finite else [np.inf]
        return float(np.exp(-np.mean(lost)))
    if MEASURE[task.kind] == "agreement":
        same = [_logits(task, a).argmax(axis=1) == _logits(task, b).argmax(axis=1) for a, b in zip(got, want)]
        return float(np.concatenate(same).mean()) if finite else 0.0
    if task.kind == "regression" and len(got) > 1:
        a, b = _matrix(got)[:, 0], _matrix(want)[:, 0]
        if b.std() > 0:
            return _pearson(a, b) if finite else -1.0
    return float(rows.mean())


def _furthest(got, want):
    # type: (Any, Any) -> float
    """The largest difference among the values that are finite; the worst row, -1, tells of the others."""
    got, want = np.ravel(got).astype(np.float64), np.ravel(want)
    finite = np.isfinite(got)
    return float(abs(got - want)[finite].max()) if finite.any() else 0.0


# --- metrics ----------------------------------------------------------------------------------------------------------


def _wanted(task, label):
    # type: (wire.Task, Any) -> Any
    """The right choices of a row, one for each of its distributions."""
    return label[1] if task.kind == "next_token" else label


def _accuracy(task, right, labels):
    # type: (wire.Task, Sequence[Any], Sequence[Any]) -> float
    if task.kind == "token_classification":
        judged = np.concatenate(list(labels)) != IGNORED
        return float(np.concatenate(list(right))[judged].mean()) if judged.any() else 0.0
    whole = groups(task._replace(paired=False), len(right), labels)
    failed = {group for group, row in zip(whole, right) if not row.all()}  # type: Set[int]
    return 1 - len(failed) / float(len(set(whole)))


def _answered(row, label, rule):
    # type: (Any, Any, Any) -> float
    """The best the answer reaches against any of those that people gave."""
    said = json.loads(np.asarray(label, np.uint8).tobytes().decode("utf-8"))
    start, end = _span(np.asarray(row, np.float64), np.asarray(said["offsets"]))
    return float(max(rule(said["context"][start:end], answer) for answer in said["answers"]))


def _span(row, offsets):
    # type: (Any, Any) -> Any
    """Characters [start, end) of the likeliest answer: a start and an end in the text, in order, not too far apart."""
    inside = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    if not len(inside):
        return 0, 0
    apart = inside[None] - inside[:, None]
    both = row[inside, 0][:, None] + row[inside, 1][None]
    first, last = divmod(int(np.where((apart >= 0) & (apart < ANSWER_TOKENS), both, -np.inf).argmax()), len(inside))
    return int(offsets[inside[first], 0]), int(offsets[inside[last], 1])


def _words(text):
    # type: (str) -> List[str]
    """Lower case, without punctuation and articles: what SQuAD's official evaluation compares."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _exact(said, wanted):
    # type: (str, str) -> float
    return float(_words(said) == _words(wanted))


def _f1(said, wanted):
    # type: (str, str) -> float
    """Harmonic mean of precision and recall of words, each counted as often as it occurs in both."""
    a, b = _words(said), _words(wanted)
    common = sum(min(a.count(word), b.count(word)) for word in set(a))
    return 2.0 * common / (len(a) + len(b)) if common else 0.0


# --- numbers ----------------------------------------------------------------------------------------------------------


def _matrix(rows):
    # type: (Any) -> Any
    if getattr(rows, "ndim", 0) == 2:
        return rows.astype(np.float64)
    return np.stack([np.ravel(row) for row in rows]).astype(np.float64)


def _cosine(a, b):
    # type: (Any, Any) -> Any
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return (a * b).sum(axis=1) / np.maximum(scale, 1e-30)


def _softmax(x):
    # type: (Any) -> Any
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _pearson(a, b):
    # type: (Any, Any) -> float
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def _ranks(values):
    # type: (Any) -> Any
    """Average ranks: equal values share one."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[np.ravel(inverse)]
