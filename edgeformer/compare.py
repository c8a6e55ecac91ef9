"""
Reports against each other, and a report against its prediction; says when a difference is noise.

A ratio is always candidate / baseline, and `low`..`high` is its 95 % interval. Every interval comes from inside
one run of each side: it does not know how far two runs of the same program on the same board lie apart.

Latency, both sides measured over the same row lengths: every row is its own baseline. The ratio is the median over
rows of (candidate's median on that row / baseline's median on that row), rows are resampled, and the p-value is the
Mann-Whitney U of the samples divided by their row's median, ranked within rows (an aligned rank test). Otherwise:
ratio of the two medians, both resampled, and plain Mann-Whitney U. The notes say which.

Samples of a real run are no independent draws: clocks and neighbours make stretches of it fast or slow. Seven 2.5 s
runs of one program on a busy shared host, taken as independent, gave 18 "differences" in 21 pairs, p down to 1e-67. So
interval and p-value are those of the smaller number of samples that the variance between stretches stands for (`drag`):
4 in 21 remained, from runs that lay minutes apart. Only alternating runs can tell such a change from a real one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeformer_agent.wire import Entry, Fidelity, Latency, Manifest, Report, Result, digest, dump

NOISE = 0.02  # a smaller change of latency or memory is not reproducible between two runs on a quiet board
ENERGY_NOISE = 0.05  # shunts and gain of on-board sensors, uncalibrated
FIDELITY_NOISE = 0.001  # of a mean similarity; ten times as much for the worst row
ALPHA = 0.05
ENOUGH = 20  # samples (or rows, for pairing) below which no interval is stated
RESAMPLES = 4000
STRETCHES = 6
STUDENT = 2.228 / 1.96  # two variances from six stretches each: ten degrees of freedom
SEED = 1
Z95 = 1.959964

ALMOST = 1 - 1e-9  # keeps atanh finite
FIELLER = 1.06  # standard error of Spearman's rho after atanh, times sqrt(n - 3)

Array = NDArray[np.float64]
Places = NDArray[np.intp]
Notes = tuple[str, ...]
Pair = tuple[float, float]
Counts = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """
    One number of one program on both sides.

    `verdict` is faster | slower | better | worse | noise | as predicted | outside the band | no baseline |
    too few samples | not comparable; the first of `notes` gives the reason for the last three.
    """

    metric: str  # latency_ms | memory_mb | energy_mj | accuracy | spearman | fidelity[_worst] | predicted_latency_ms
    program: str
    baseline: float | None
    candidate: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p_value: float | None
    n_baseline: int
    n_candidate: int
    verdict: str
    notes: tuple[str, ...] = ()


class Estimate(NamedTuple):
    """A ratio with its interval, and how it was found."""

    ratio: float
    low: float
    high: float
    p_value: float
    how: str


def compare(a: Report, b: Report) -> tuple[Comparison, ...]:
    """`b` (candidate) against `a` (baseline): each program, then the best of one against the best of the other."""
    notes, refused = differences(a, b), _timing_refused(a, b)
    before, after = {r.program: r for r in a.results}, {r.program: r for r in b.results}
    found: list[Comparison] = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name in before and name in after:
            found += _program(before[name], after[name], refused, notes)
        else:
            found.append(_one_sided(before.get(name), after.get(name), a, b, notes))
    first, second = best(a), best(b)
    if first and second:
        named = f"best is {first.program} in the baseline and {second.program} in the candidate"
        found.append(_latency("best", first, second, refused, (named, *notes)))
    return tuple(found)


def against_prediction(manifest: Manifest, report: Report) -> tuple[Comparison, ...]:
    """Measured latency over predicted latency per program; `low`..`high` is the band the prediction gave."""
    results = {result.program: result for result in report.results}
    return tuple(
        _predicted(entry, results[entry.name], not_as_predicted(manifest, entry, report, results[entry.name]))
        for entry in manifest.programs
        if entry.name in results
    )


def not_as_predicted(manifest: Manifest, entry: Entry, report: Report, result: Result) -> str | None:
    """Why this measurement cannot judge this prediction, or None where it can."""
    said = entry.predicted
    if report.bundle != digest(dump(manifest)):
        return "the report is of another bundle"
    if report.kind != "measured":
        return f"{report.kind}: timing says nothing"
    if report.target != said.device or not _is(said.device, report.device):
        return f"predicted for {said.device}, measured on {machine(report)}"
    if result.threads != said.threads:
        return f"predicted for {said.threads} threads, measured with {result.threads}"
    return None


def machine(report: Report) -> str:
    """What the device calls itself, else its cores, else the target it was given."""
    return str(report.device.get("model") or report.device.get("cpu") or report.target)


def differences(a: Report, b: Report) -> tuple[str, ...]:
    """What else changed between two reports, in words."""
    facts = (
        ("bundle", f"{a.name} {a.version}", f"{b.name} {b.version}"),
        ("bundle digest", a.bundle[:12], b.bundle[:12]),
        ("target", a.target, b.target),
        ("device", machine(a), machine(b)),
        ("kind", a.kind, b.kind),
        ("run profile", a.profile, b.profile),
    )
    return tuple(f"{name} differs: {x} / {y}" for name, x, y in facts if x != y)


def best(report: Report) -> Result | None:
    """The result the device selected, else the fastest one that passed its self-check."""
    timed = [result for result in report.results if result.latency and result.golden.passed]
    chosen = [result for result in timed if result.program == report.selected]
    return next(iter(chosen or sorted(timed, key=lambda r: r.latency.p50_ms if r.latency else math.inf)), None)


def latency_ratio(a: Latency, b: Latency) -> Estimate:
    """See the module's text. Both sides need `ENOUGH` samples for the interval to mean anything."""
    rows = min(len(a.samples_us), len(b.samples_us), len(a.row_lengths))
    if a.row_lengths == b.row_lengths and rows >= ENOUGH:
        return _paired(a, b, rows)
    random = np.random.default_rng(SEED)
    before, after = _samples(a), _samples(b)
    widened = drag(_levelled(a), _levelled(b))
    medians = bootstrap_medians(after, random) / bootstrap_medians(before, random)
    low, high = np.quantile(medians, (ALPHA / 2, 1 - ALPHA / 2))
    reason = "fewer than 20 rows" if a.row_lengths == b.row_lengths else "the row lengths differ"
    how = f"unpaired ratio of medians: {reason}"
    ratio = float(np.median(after) / np.median(before))
    return _widened(Estimate(ratio, float(low), float(high), rank_test(before, after, drag=widened), how), widened)


def drag(before: Array, after: Array) -> float:
    """
    How many times wider intervals are than independent samples would make them; both arrays in the order of time.

    Means over stretches of n independent samples vary n times less than the samples; what they vary more is drift.
    """
    found = []
    for values in (before, after):
        ranks = _ranks(values)  # an outlier is one bad sample, not a bad stretch
        means = [float(stretch.mean()) for stretch in np.array_split(ranks, STRETCHES)]
        spread = float(ranks.var())
        found.append(len(values) / STRETCHES * float(np.var(means, ddof=1)) / spread if spread > 0 else 1.0)
    return max(1.0, STUDENT * math.sqrt(sum(found) / 2))


def bootstrap_medians(values: Array, random: np.random.Generator) -> Array:
    """
    Medians of `RESAMPLES` resamples of `values`, without drawing the resamples.

    The k-th smallest of n uniform draws is Beta(k, n - k + 1), and of n draws with replacement from sorted values
    it is the value at that place: exact, and as cheap for 60,000 samples as for 60.
    """
    ordered, n = np.sort(values), len(values)
    k = (n + 1) // 2
    lower = random.beta(k, n - k + 1, RESAMPLES)
    if n % 2:
        return ordered[_place(lower, n)]
    upper = lower + (1 - lower) * random.beta(1, n - k, RESAMPLES)
    return (ordered[_place(lower, n)] + ordered[_place(upper, n)]) / 2


def rank_test(baseline: Array, candidate: Array, rows: tuple[Places, Places] | None = None, drag: float = 1.0) -> float:
    """
    Two-sided p-value of Mann-Whitney U by the normal approximation, with ties and continuity corrected.

    With `rows` (the row of each sample) ranks are taken over all values but exchanged only within a row.
    """
    values = np.concatenate([baseline, candidate])
    row = np.concatenate(rows) if rows else np.zeros(len(values), dtype=np.intp)
    moved = np.arange(len(values)) >= len(baseline)
    ranks = _ranks(values)
    size, chosen = np.bincount(row), np.bincount(row, weights=moved)
    mean = np.bincount(row, weights=ranks) / np.maximum(size, 1)
    spread = np.bincount(row, weights=(ranks - mean[row]) ** 2)
    variance = float(np.sum(chosen * (size - chosen) / np.maximum(size * (size - 1), 1) * spread))
    shift = abs(float(np.sum(ranks[moved]) - np.sum(chosen * mean)))
    return math.erfc(max(shift - 0.5, 0) / math.sqrt(2 * variance) / drag) if variance > 0 else 1.0


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion seen in n rows."""
    middle, scale = (share + Z95**2 / (2 * n)), 1 + Z95**2 / n
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return (middle - half) / scale, (middle + half) / scale


def fisher(correlation: float, n: int) -> tuple[float, float]:
    """95 % interval of a rank correlation over n pairs."""
    place, half = math.atanh(max(min(correlation, ALMOST), -ALMOST)), Z95 * FIELLER / math.sqrt(max(n - 3, 1))
    return math.tanh(place - half), math.tanh(place + half)


def _paired(a: Latency, b: Latency, rows: int) -> Estimate:
    before, after = _by_row(a), _by_row(b)
    ratios = np.nanmedian(after[:, :rows], axis=0) / np.nanmedian(before[:, :rows], axis=0)
    low, high = np.quantile(bootstrap_medians(ratios, np.random.default_rng(SEED)), (ALPHA / 2, 1 - ALPHA / 2))
    pooled = np.nanmedian(np.concatenate([before, after])[:, :rows], axis=0)
    x, x_rows = _aligned(before, pooled)
    y, y_rows = _aligned(after, pooled)
    how, widened = f"paired by row: median of {rows} per-row ratios", drag(x, y)
    p_value = rank_test(x, y, (x_rows, y_rows), widened)
    return _widened(Estimate(float(np.median(ratios)), float(low), float(high), p_value, how), widened)


def _widened(found: Estimate, times: float) -> Estimate:
    how = f"{found.how}; interval widened {times:.1f} times for drift inside the runs" if times > 1.25 else found.how
    low, high = (found.ratio * (end / found.ratio) ** times for end in (found.low, found.high))
    return found._replace(low=low, high=high, how=how)


def _levelled(latency: Latency) -> Array:
    """Samples over their row's own median where rows ran more than once, so that only drift is left."""
    samples, by_row = _samples(latency), _by_row(latency) if latency.row_lengths else np.empty((0, 0))
    return _aligned(by_row, np.nanmedian(by_row, axis=0))[0] if len(by_row) > 1 else samples


def _aligned(samples: Array, pooled: Array) -> tuple[Array, Places]:
    scaled = samples[:, : len(pooled)] / pooled
    seen = ~np.isnan(scaled)
    return scaled[seen], np.nonzero(seen)[1]


def _by_row(latency: Latency) -> Array:
    """(repeats, rows), NaN where the last round over the rows was cut short."""
    width = len(latency.row_lengths)
    samples = _samples(latency)
    return np.append(samples, np.full(-len(samples) % width, np.nan)).reshape(-1, width)


def _samples(latency: Latency) -> Array:
    return np.maximum(np.asarray(latency.samples_us, dtype=np.float64), 1.0)  # a clock that did not move: 1 us


def _place(fraction: Array, n: int) -> Places:
    return np.minimum((fraction * n).astype(np.intp), n - 1)


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: Array = np.cumsum(count) - (count - 1) / 2
    return mean_rank[place]


def _program(x: Result, y: Result, refused: str | None, notes: Notes) -> list[Comparison]:
    own = (("threads", x.threads, y.threads), ("runtime", x.runtime_version, y.runtime_version))
    notes = (*(f"{name} differs: {p} / {q}" for name, p, q in own if p != q), *notes)
    found = [_latency(x.program, x, y, refused, notes), *_resources(x, y, refused, notes)]
    if x.fidelity and y.fidelity:
        found += _task(x.program, x.fidelity, y.fidelity, notes)
        found += _closeness(x.program, x.fidelity, y.fidelity, notes)
    return found


def _latency(name: str, x: Result, y: Result, refused: str | None, notes: Notes) -> Comparison:
    a, b = x.latency, y.latency
    if a is None or b is None:
        side = "the baseline" if a is None else "the candidate"
        values = (a.p50_ms if a else None, b.p50_ms if b else None)
        return _unjudged("latency_ms", name, values, (0, 0), (f"{side} has no latency: its self-check failed", *notes))
    values, counts = (a.p50_ms, b.p50_ms), (len(a.samples_us), len(b.samples_us))
    if refused:
        return _unjudged("latency_ms", name, values, counts, (refused, *notes))
    if min(counts) < ENOUGH:
        few = f"fewer than {ENOUGH} samples: no interval can be stated"
        return _unjudged("latency_ms", name, values, counts, (few, *notes), "too few samples")
    ratio, low, high, p_value, how = latency_ratio(a, b)
    noise = low <= 1 <= high or p_value > ALPHA or abs(ratio - 1) < NOISE
    verdict = "noise" if noise else "faster" if ratio < 1 else "slower"
    flags = sorted({*x.flags, *y.flags})
    notes = (how, *([f"flagged: {', '.join(flags)}"] if flags else []), *notes)
    return Comparison("latency_ms", name, *values, ratio, low, high, p_value, *counts, verdict, notes)


def _resources(x: Result, y: Result, refused: str | None, notes: Notes) -> list[Comparison]:
    """Memory and energy: one figure a side, so no interval."""
    found = [_single("memory_mb", x.program, (x.memory.peak_rss_mb, y.memory.peak_rss_mb), NOISE, refused, notes)]
    if x.energy and y.energy:
        if x.energy.source != y.energy.source:
            refused = refused or f"sensors differ: {x.energy.source} / {y.energy.source}"
        energies = x.energy.above_idle_mj, y.energy.above_idle_mj
        found.append(_single("energy_mj", x.program, energies, ENERGY_NOISE, refused, notes))
    return found


def _single(metric: str, name: str, values: Pair, floor: float, refused: str | None, notes: Notes) -> Comparison:
    if refused or min(values) <= 0:
        return _unjudged(metric, name, values, (1, 1), (refused or "a figure is not positive", *notes))
    ratio = values[1] / values[0]
    verdict = "noise" if abs(ratio - 1) < floor else "better" if ratio < 1 else "worse"
    how = f"one figure a side, no interval: a change under {floor:.0%} counts as noise"
    return Comparison(metric, name, *values, ratio, None, None, None, 1, 1, verdict, (how, *notes))


def _task(name: str, x: Fidelity, y: Fidelity, notes: Notes) -> list[Comparison]:
    if x.metric is None or x.metric != y.metric or x.value is None or y.value is None:
        return []
    return [_shares(x.metric, name, (x.value, y.value), (_units(x), _units(y)), notes)]


def _units(fidelity: Fidelity) -> int:
    """What the task's metric counts: pairs of rows where embeddings are correlated with scores, else rows."""
    return fidelity.rows // 2 if (fidelity.metric, fidelity.measure) == ("spearman", "cosine") else fidelity.rows


def _closeness(name: str, x: Fidelity, y: Fidelity, notes: Notes) -> list[Comparison]:
    """How close both are to the fp32 model: agreement is a proportion, a similarity gets a fixed floor."""
    counts = (x.rows, y.rows)
    if x.measure != y.measure:
        reason = f"measures differ: {x.measure} / {y.measure}"
        return [_unjudged("fidelity", name, (x.mean, y.mean), counts, (reason, *notes))]
    worst = _similarity("fidelity_worst", name, (x.worst, y.worst), counts, 10 * FIDELITY_NOISE, notes)
    if x.measure == "agreement":
        return [_shares("fidelity", name, (x.mean, y.mean), counts, notes), worst]
    return [_similarity("fidelity", name, (x.mean, y.mean), counts, FIDELITY_NOISE, notes), worst]


def _similarity(metric: str, name: str, values: Pair, counts: Counts, floor: float, notes: Notes) -> Comparison:
    ratio = values[1] / values[0] if values[0] > 0 else None
    verdict = "noise" if abs(values[1] - values[0]) < floor else "better" if values[1] > values[0] else "worse"
    how = f"a change under {floor:g} counts as noise"
    return Comparison(metric, name, *values, ratio, None, None, None, *counts, verdict, (how, *notes))


def _shares(metric: str, name: str, values: Pair, counts: Counts, notes: Notes) -> Comparison:
    """Difference of two proportions or correlations; Newcombe's interval from each side's own (Wilson or Fisher)."""
    (a, b), least = values, -1 if metric == "spearman" else 0
    if min(counts) < ENOUGH or not (0 < a <= 1 and least <= b <= 1):
        few = f"fewer than {ENOUGH} rows, or a value out of range"
        return _unjudged(metric, name, values, counts, (few, *notes), "too few samples")
    interval = fisher if metric == "spearman" else wilson
    (a_low, a_high), (b_low, b_high) = interval(a, counts[0]), interval(b, counts[1])
    low, high = b - a - math.hypot(b - b_low, a_high - a), b - a + math.hypot(b_high - b, a - a_low)
    p_value = _shares_p(metric, values, counts)
    verdict = "noise" if low <= 0 <= high or p_value > ALPHA else "better" if b > a else "worse"
    how = (
        f"unpaired: {100 * (b - a):+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
        f" on {counts[0]} and {counts[1]}; a report carries no per-row answers, so a small real change stays unseen"
    )
    ratios = (b / a, 1 + low / a, 1 + high / a)
    return Comparison(metric, name, a, b, *ratios, p_value, *counts, verdict, (how, *notes))


def _shares_p(metric: str, values: Pair, counts: Counts) -> float:
    (a, b), (n, m) = values, counts
    if metric == "spearman":
        places = [math.atanh(max(min(value, ALMOST), -ALMOST)) for value in values]
        z = (places[1] - places[0]) / (FIELLER * math.sqrt(1 / (n - 3) + 1 / (m - 3)))
    else:
        pooled = (a * n + b * m) / (n + m)
        variance = pooled * (1 - pooled) * (1 / n + 1 / m)
        z = (b - a) / math.sqrt(variance) if variance > 0 else 0.0
    return math.erfc(abs(z) / math.sqrt(2))


def _one_sided(x: Result | None, y: Result | None, a: Report, b: Report, notes: Notes) -> Comparison:
    """A program only one side ran."""
    values = tuple(r.latency.p50_ms if r and r.latency else None for r in (x, y))
    if y is None:
        name = x.program if x else ""
        reason = f"the candidate did not run it: {b.skipped.get(name, 'not in its bundle')}"
        return _unjudged("latency_ms", name, (values[0], None), (0, 0), (reason, *notes))
    reason = f"the baseline did not run it: {a.skipped.get(y.program, 'not in its bundle')}"
    return _unjudged("latency_ms", y.program, (None, values[1]), (0, 0), (reason, *notes), "no baseline")


def _predicted(entry: Entry, result: Result, refused: str | None) -> Comparison:
    said, latency, about = entry.predicted, result.latency, ("predicted_latency_ms", entry.name)
    values = (said.metrics.latency_ms, latency.p50_ms if latency else None)
    counts = (0, len(latency.samples_us) if latency else 0)
    if values[0] is None or values[0] <= 0:
        return _unjudged(*about, values, counts, ("no latency was predicted",), "no baseline")
    if refused or values[1] is None:
        return _unjudged(*about, values, counts, (refused or "its self-check failed",))
    ratio = values[1] / values[0]
    verdict = "as predicted" if said.low <= ratio <= said.high else "outside the band"
    notes = (f"{said.kind} for {said.device} by {said.method}",)
    return Comparison(*about, *values, ratio, said.low, said.high, None, *counts, verdict, notes)


def _unjudged(
    metric: str,
    program: str,
    values: tuple[float | None, float | None],
    counts: Counts,
    notes: Notes,
    verdict: str = "not comparable",
) -> Comparison:
    return Comparison(metric, program, *values, None, None, None, None, *counts, verdict, notes)


def _timing_refused(a: Report, b: Report) -> str | None:
    kinds = sorted({a.kind, b.kind} - {"measured"})
    return f"{' and '.join(kinds)}: timing, memory and energy say nothing about a device" if kinds else None


def _is(device: str, facts: Mapping[str, Any]) -> bool:
    """raspberry-pi-4 is a "Raspberry Pi 4 Model B Rev 1.4"; host is whatever ran it; a nameless PC is neither."""
    model = facts.get("model")
    if device == "host":
        return True
    if not isinstance(model, str):  # phones and boards name themselves, or are at least Arm
        return facts.get("machine") not in ("x86_64", "AMD64", "i686")
    words = (" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in (device, model))
    return f" {next(words)} " in f" {next(words)} "
