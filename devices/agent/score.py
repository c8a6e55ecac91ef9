"""
How good outputs are: closeness to the fp32 model, and the task's own metric. Host and device use these functions.

Similarity of a row lies in [.., 1], 1 is equal:
  embedding       cosine of output and reference
  classification  1 - total variation distance of the two softmax distributions; its mean is reported as agreement
                  (share of rows with the same argmax), its minimum as the worst row
  regression      1 - |difference| / standard deviation of the reference; the mean is Pearson's correlation
"""

from typing import Any, Optional, Sequence

import numpy as np

from . import wire

MEASURE = {"embedding": "cosine", "classification": "agreement", "regression": "correlation"}


def fidelity(task, outputs, reference, labels=None):
    # type: (wire.Task, Sequence[Any], Sequence[Any], Optional[Any]) -> wire.Fidelity
    """
    `outputs` and `reference` run parallel, one array a row. Labels (one a row, or one a pair) add the task's metric,
    of the outputs and of the reference on the same rows.
    """
    got, want = _matrix(outputs), _matrix(reference)
    if got.shape != want.shape:
        raise ValueError("outputs have shape {}, the reference {}".format(got.shape, want.shape))
    rows = similarity(task, got, want)
    mean = _mean(task, got, want, rows)
    value = base = None
    if task.metric is not None and labels is not None:
        value, base = metric(task, got, labels), metric(task, want, labels)
    finite = np.isfinite(got)  # the worst row, -1, tells of the others
    furthest = float(abs(got - want)[finite].max()) if finite.any() else 0.0
    return wire.Fidelity(MEASURE[task.kind], mean, float(rows.min()), furthest, len(rows), task.metric, value, base)


def similarity(task, got, want):
    # type: (wire.Task, Any, Any) -> Any
    """One number a row; a row with a value that is not finite has similarity -1."""
    got, want = _matrix(got), _matrix(want)
    finite = np.isfinite(got).all(axis=1)
    safe = np.where(finite[:, None], got, 0)
    if task.kind == "classification":
        rows = 1 - abs(_softmax(safe) - _softmax(want)).sum(axis=1) / 2
    elif task.kind == "regression":
        rows = 1 - abs(safe - want).max(axis=1) / max(float(want.std()), 1e-6)
    else:
        rows = _cosine(safe, want)
    return np.where(finite, rows, -1.0)


def metric(task, outputs, labels):
    # type: (wire.Task, Any, Any) -> float
    """
    accuracy: share of rows whose argmax is the label. mcc, macro_f1: of the same answers, Matthews' correlation and the
    mean F1 of the classes. spearman, pearson: correlation of predictions and labels, of their ranks or of their values.
    A row that is not finite is wrong; it has no rank, so that nothing is correlated then.
    """
    got, labels = _matrix(outputs), np.asarray(labels, np.float64)
    finite = np.isfinite(got).all(axis=1)
    if task.metric == "accuracy":
        return float(((got.argmax(axis=1) == labels) & finite).mean())
    if task.metric in ("mcc", "macro_f1"):
        table = _confusion(np.where(finite, got.argmax(axis=1), -1), labels, got.shape[1])
        return _matthews(table) if task.metric == "mcc" else _macro_f1(table)
    if task.metric in ("spearman", "pearson"):
        if not finite.all():
            return 0.0
        predicted = _cosine(got[0::2], got[1::2]) if task.paired else got[:, 0]
        return _pearson(predicted, labels) if task.metric == "pearson" else _pearson(_ranks(predicted), _ranks(labels))
    raise ValueError("no metric {!r}; known: accuracy, mcc, macro_f1, pearson, spearman".format(task.metric))


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


def _mean(task, got, want, rows):
    # type: (wire.Task, Any, Any, Any) -> float
    finite = bool(np.isfinite(got).all())
    if task.kind == "classification":
        return float((got.argmax(axis=1) == want.argmax(axis=1)).mean()) if finite else 0.0
    if task.kind == "regression" and len(got) > 1 and want.std() > 0:
        return _pearson(got[:, 0], want[:, 0]) if finite else -1.0
    return float(rows.mean())


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
