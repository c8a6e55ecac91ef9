"""
How good a model or a program is on labelled data, and how sure that is: every number with its 95 % interval, every
comparison with the test that fits rows answered by both.

    rows = data.load(model, "dev.tsv", "sst2")
    base, small = evaluate(model, rows, "sst2"), evaluate(program, rows, "sst2")
    table([base, small])        # accuracy with Wilson's interval; McNemar's exact test of the difference
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich import box
from rich.table import Table

from edgeformer_agent import score, wire

from . import check
from .compare import Z95, fisher, wilson
from .data import Rows
from .errors import BadInput
from .model import Model
from .program import Program
from .workshop import described

METRICS = {  # GLUE's rules, and for LongTech the mean over classes beside the share of rows
    "classification": ("accuracy",),
    "cola": ("mcc",),
    "longtech": ("accuracy", "macro_f1"),
    "similarity": ("pearson", "spearman"),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearman"),
}
RESAMPLES = 1000
LEVELS = (2.5, 97.5)  # percent


@dataclass(frozen=True)
class Estimate:
    """One metric with its 95 % interval over `n` judged rows (or pairs)."""

    metric: str
    value: float
    low: float
    high: float
    interval: str  # Wilson | Fisher z | bootstrap
    n: int


@dataclass(frozen=True)
class Difference:
    """This evaluation less the baseline's, on the same rows, with the 95 % interval of pairs."""

    metric: str
    value: float
    low: float
    high: float
    p_value: float
    test: str  # McNemar, exact | paired bootstrap
    agreement: float | None  # share of rows with the same answer, where answers are classes


@dataclass(frozen=True)
class Evaluation:
    """What was answered, on which data, and what it is worth."""

    name: str
    task: wire.Task
    source: str
    estimates: tuple[Estimate, ...]
    outputs: tuple[np.ndarray, ...] = field(repr=False)  # a row each
    labels: np.ndarray = field(repr=False)


def evaluate(
    subject: Model | Program,
    rows: Rows,
    task: str,
    *,
    name: str | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> Evaluation:
    """
    Answers every row: a model in fp32 PyTorch, a program in the runner that devices use. `rows` are made with the
    subject's own tokenizer. Raises BadInput where the data has no labels, and what `check.run` raises.
    """
    if task not in METRICS:
        raise BadInput(f"no task {task!r} to evaluate; known: {', '.join(sorted(METRICS))}")
    if rows.labels is None or rows.task is None:
        raise BadInput(f"{rows.source}: no labels in it; an evaluation needs them")
    if isinstance(subject, Program):
        outputs = check.run(subject, described(subject), rows.rows, progress)
    else:
        outputs = check.reference(subject, rows.rows, progress)
    return judged(name or subject.name, outputs, rows, task)


def judged(name: str, outputs: Sequence[np.ndarray], rows: Rows, task: str) -> Evaluation:
    """Answers that exist already, of another machine for one."""
    if rows.task is None or rows.labels is None:
        raise BadInput(f"{rows.source}: no labels in it; an evaluation needs them")
    labels = np.asarray(rows.labels)
    estimates = tuple(_estimate(rows.task._replace(metric=m), outputs, labels) for m in METRICS[task])
    return Evaluation(name, rows.task, rows.source, estimates, tuple(outputs), labels)


def against(found: Evaluation, baseline: Evaluation) -> tuple[Difference, ...]:
    """For each metric, the difference to the baseline. Raises BadInput where they answered different rows."""
    if found.source != baseline.source or not np.array_equal(found.labels, baseline.labels):
        raise BadInput(f"{found.name} and {baseline.name} answered different rows; compare on the same data")
    return tuple(_difference(found, baseline, e.metric) for e in found.estimates)


def table(evaluations: Sequence[Evaluation]) -> Table:
    """For the terminal: a line a metric; the first evaluation is the baseline of the others."""
    made = Table(box=box.SIMPLE_HEAD, title=evaluations[0].source)
    for column in ("", "metric", "value", "95 % interval", "n", "against " + evaluations[0].name, "p", "test"):
        made.add_column(column, justify="left" if column in ("", "metric", "test") else "right")
    for i, found in enumerate(evaluations):
        paired = against(found, evaluations[0]) if i else (None,) * len(found.estimates)
        for e, d in zip(found.estimates, paired, strict=True):
            compared = ("", "", e.interval)
            if d is not None:
                compared = (f"{d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f})", f"{d.p_value:.2g}", d.test)
            made.add_row(found.name, e.metric, f"{e.value:.4f}", f"{e.low:.4f} to {e.high:.4f}", str(e.n), *compared)
    return made


# --- statistics -------------------------------------------------------------------------------------------------------


def mcnemar(right: np.ndarray, baseline: np.ndarray) -> float:
    """Exact two-sided p of the rows that only one of two got right. [rows] of booleans each."""
    gained, lost = int((right & ~baseline).sum()), int((~right & baseline).sum())
    n, few = gained + lost, min(gained, lost)
    return float(min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)) if n else 1.0


def paired(right: np.ndarray, baseline: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two shares on the same rows (Agresti and Min: half a row more each way)."""
    n = len(right) + 2
    gained, lost = int((right & ~baseline).sum()) + 0.5, int((~right & baseline).sum()) + 0.5
    half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return (gained - lost) / n - half, (gained - lost) / n + half


def _estimate(task: wire.Task, outputs: Sequence[np.ndarray], labels: np.ndarray) -> Estimate:
    value, n, metric = score.metric(task, outputs, labels), len(labels), str(task.metric)
    if metric == "accuracy":
        return Estimate(metric, value, *wilson(value, n), "Wilson", n)
    if metric in ("pearson", "spearman"):
        return Estimate(metric, value, *fisher(value, n), "Fisher z", n)
    rows = np.stack(outputs)
    drawn = [score.metric(task, _picked(task, rows, at), labels[at]) for at in _resamples(n)]
    low, high = np.percentile(drawn, LEVELS)
    return Estimate(metric, value, float(low), float(high), "bootstrap", n)


def _difference(found: Evaluation, baseline: Evaluation, metric: str) -> Difference:
    task, labels = found.task._replace(metric=metric), found.labels
    ours, theirs = np.stack(found.outputs), np.stack(baseline.outputs)
    agreement = float((ours.argmax(1) == theirs.argmax(1)).mean()) if task.kind == "classification" else None
    if metric == "accuracy":
        right, base = (x.argmax(1) == labels for x in (ours, theirs))
        value = float(right.mean() - base.mean())
        return Difference(metric, value, *paired(right, base), mcnemar(right, base), "McNemar, exact", agreement)

    def gap(at: np.ndarray) -> float:
        mine, other = (score.metric(task, _picked(task, x, at), labels[at]) for x in (ours, theirs))
        return mine - other

    drawn = np.asarray([gap(at) for at in _resamples(len(labels))])
    low, high = (float(x) for x in np.percentile(drawn, LEVELS))
    tail = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    p_value = min(1.0, max(2 * tail, 1 / RESAMPLES))
    return Difference(metric, gap(np.arange(len(labels))), low, high, p_value, "paired bootstrap", agreement)


def _resamples(n: int) -> Sequence[np.ndarray]:
    """The same draws for everything that has n rows, so that comparisons are paired."""
    return list(np.random.default_rng(0).integers(0, n, (RESAMPLES, n)))


def _picked(task: wire.Task, outputs: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Outputs of the labels at `at`: a row each, or the two rows of a pair."""
    return np.asarray(outputs[(2 * at[:, None] + np.arange(2)).ravel() if task.paired else at])
