"""
Warm up, run one row at a time, and say what makes the figures doubtful.

Rows are visited in a fixed shuffled order, whole passes only, so every row counts equally and neighbours in time
differ in length. Percentiles interpolate linearly between the closest samples (numpy's default). Every figure of a
`Latency` is computed from its own `samples_us`, so a reader can recompute it.
"""

import time
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import wire

Step = Callable[[int], object]
Clock = Callable[[], float]

WINDOW = 10  # runs in one warm-up window
SETTLED = 0.03  # how far the medians of three windows may lie apart
MOVED = 0.05  # a drift below this is not worth a flag
SIGNIFICANT = 3.0  # |z| above which first and last third differ


class Plan(NamedTuple):
    """How long to measure. Both minima must be reached; `max_seconds` bounds warm-up and runs together."""

    name: str
    warmup_runs: int
    warmup_seconds: float
    min_runs: int
    min_seconds: float
    max_seconds: float


PLANS = {
    "default": Plan("default", 5, 1.0, 100, 10.0, 150.0),
    "quick": Plan("quick", 2, 0.0, 10, 0.5, 30.0),  # a smoke test: always flagged too_few_queries or too_short
    "mlperf": Plan("mlperf", 5, 1.0, 1024, 60.0, 600.0),  # MLPerf Mobile single stream
}

EMULATED = Plan("emulated", 1, 0.0, 3, 0.0, 60.0)  # its milliseconds mean nothing, so few of them are spent
EMULATED_ROWS = 4


def plan(profile, min_runs=None, min_seconds=None, emulated=False):
    # type: (str, Optional[int], Optional[float], bool) -> Plan
    """The profile's plan with what the caller asked for; a longer one gets the time for it."""
    base = EMULATED if emulated else PLANS[profile]
    seconds = base.min_seconds if min_seconds is None else min_seconds
    return base._replace(
        min_runs=base.min_runs if min_runs is None else min_runs,
        min_seconds=seconds,
        max_seconds=max(base.max_seconds, 3 * seconds),
    )


def measure(step, rows, plan, clock=time.perf_counter):
    # type: (Step, Sequence[int], Plan, Clock) -> Tuple[wire.Latency, Tuple[str, ...]]
    """`step(i)` runs row `i`; `rows[i]` is its length in tokens. Take `system.snapshot` right around this call."""
    visits = order(rows)
    begin = clock()
    warmup, settled = _warm_up(step, rows, plan, clock)
    left = plan.max_seconds - (clock() - begin)
    samples, seconds, cut = _run(step, visits, plan.min_runs, plan.min_seconds, left, clock)
    latency = _latency(warmup, samples, seconds, [rows[i] for i in visits])
    flags = [] if settled else ["not_settled"]
    return latency, tuple(flags + (["cut_short"] if cut else []) + _doubts(latency, plan))


def order(rows):
    # type: (Sequence[int]) -> List[int]
    """Row numbers in the order of their visits; numpy keeps this generator's stream fixed for ever."""
    if not len(rows):
        raise ValueError("no rows to measure; a bundle carries at least one evaluation row")
    return [int(i) for i in np.random.RandomState(0).permutation(len(rows))]


def burst(step, rows, runs=200, seconds=2.0, max_seconds=120.0, clock=time.perf_counter):
    # type: (Step, Sequence[int], int, float, float, Clock) -> int
    """Run without keeping times, for `power.measure`: both minima, then to the end of the pass. Returns the runs."""
    return len(_run(step, order(rows), runs, seconds, max_seconds, clock)[0])


def drift(latency):
    # type: (wire.Latency) -> Tuple[float, float]
    """
    First third of the run against the last: z of the Mann-Whitney test, and how far the median moved (0.1 = +10 %).
    Samples are compared after division by what their row usually takes, because rows differ in length.
    """
    samples = np.maximum(latency.samples_us, 0.5)  # a clock too coarse for a row reads 0
    ratio = samples / _expected(samples, latency.row_lengths)
    third = len(ratio) // 3
    if not third:
        return 0.0, 0.0
    first, last = ratio[:third], ratio[-third:]
    return _mann_whitney(first, last), float(np.median(last) / np.median(first) - 1)


def _warm_up(step, rows, plan, clock):
    # type: (Step, Sequence[int], Plan, Clock) -> Tuple[int, bool]
    """Every window runs the same ten rows, shortest to longest, so windows compare and every length is warm."""
    by_length = sorted(range(len(rows)), key=lambda i: rows[i])
    window = [by_length[round(k * (len(rows) - 1) / (WINDOW - 1))] for k in range(WINDOW)]
    patience = max(plan.warmup_seconds, plan.min_seconds)
    begin, times = clock(), []  # type: float, List[float]
    while True:
        started = clock()
        step(window[len(times) % WINDOW])
        ended = clock()
        times.append(ended - started)
        enough = len(times) >= plan.warmup_runs and ended - begin >= plan.warmup_seconds
        if enough and _settled(times):
            return len(times), True
        tired = patience if len(times) >= 3 * WINDOW else 3 * patience  # a slow program gets its three windows
        if ended - begin >= plan.max_seconds / 2 or (enough and ended - begin >= tired):
            return len(times), False


def _settled(times):
    # type: (List[float]) -> bool
    if len(times) % WINDOW or len(times) < 3 * WINDOW:
        return False
    medians = np.median(np.reshape(times[-3 * WINDOW :], (3, WINDOW)), axis=1)
    return bool(medians.max() - medians.min() < SETTLED * medians.min())


def _run(step, visits, runs, seconds, limit, clock):
    # type: (Step, List[int], int, float, float, Clock) -> Tuple[List[float], float, bool]
    """Seconds of every run, seconds of all, and whether `limit` came before both minima and a whole pass."""
    times = []  # type: List[float]
    begin = clock()
    while True:
        started = clock()
        step(visits[len(times) % len(visits)])
        ended = clock()
        times.append(ended - started)
        if len(times) >= runs and ended - begin >= seconds and not len(times) % len(visits):
            return times, ended - begin, False
        if ended - begin >= limit:
            return times, ended - begin, True


def _latency(warmup, samples, seconds, row_lengths):
    # type: (int, List[float], float, List[int]) -> wire.Latency
    whole = tuple(round(1e6 * s) for s in samples)
    ms = np.asarray(whole) / 1e3
    p50, p90, p95, p99 = (float(p) for p in np.percentile(ms, [50, 90, 95, 99]))
    return wire.Latency(
        warmup=warmup,
        n=len(whole),
        seconds=float(seconds),
        mean_ms=float(ms.mean()),
        std_ms=float(ms.std(ddof=1)) if len(whole) > 1 else 0.0,
        min_ms=float(ms.min()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        samples_us=whole,
        row_lengths=tuple(int(n) for n in row_lengths),
    )


def _doubts(latency, plan):
    # type: (wire.Latency, Plan) -> List[str]
    """The default plan is the least that counts: a quicker one cannot clear itself."""
    least = PLANS["default"]
    flags = []
    if latency.n < max(plan.min_runs, least.min_runs):
        flags.append("too_few_queries")
    if latency.seconds < max(plan.min_seconds, least.min_seconds):
        flags.append("too_short")
    z, moved = drift(latency)
    if abs(z) > SIGNIFICANT and abs(moved) > MOVED:
        flags.append("drift")
    return flags


def _expected(samples, row_lengths):
    # type: (np.ndarray[Any, Any], Sequence[int]) -> np.ndarray[Any, Any]
    """What each sample's row usually takes: its median, or a line over the length where rows ran fewer than twice."""
    rows = len(row_lengths)
    if len(samples) >= 2 * rows:
        return np.resize([np.median(samples[row::rows]) for row in range(rows)], len(samples))
    lengths = np.resize(np.asarray(row_lengths, float), len(samples))
    if len(set(lengths)) < 2:
        return np.full(len(samples), np.median(samples))
    # Outliers can tilt the line through zero; no row takes less than a fraction of the fastest sample.
    line = np.polyval(np.polyfit(lengths, samples, 1), lengths)
    return np.clip(line, samples.min() / 2, None)


def _mann_whitney(a, b):
    # type: (np.ndarray[Any, Any], np.ndarray[Any, Any]) -> float
    """z of the U test in its normal approximation, corrected for ties; positive where `b` is the larger."""
    _, where, counts = np.unique(np.concatenate([a, b]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[where.ravel()]  # ties share their mean rank
    m, n = len(a), len(b)
    u = ranks[m:].sum() - n * (n + 1) / 2.0
    ties = (counts.astype(float) ** 3 - counts).sum() / ((m + n) * (m + n - 1.0))
    variance = m * n / 12.0 * (m + n + 1 - ties)
    return float((u - m * n / 2.0) / np.sqrt(variance)) if variance > 0 else 0.0
