"""The agent's stopwatch on a clock that only moves when a test says so. No real time is asserted anywhere."""

import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgeformer_agent import timing, wire

TICK = 1 / 1024  # binary fractions of a second add up exactly


class Clock:
    """Now, and what a run costs: `cost(row, k)` for the k-th call."""

    def __init__(self, cost: Callable[[int, int], float]) -> None:
        self.now, self.cost, self.calls = 100.0, cost, []

    def __call__(self) -> float:
        return self.now

    def step(self, row: int) -> None:
        self.now += self.cost(row, len(self.calls))
        self.calls.append(row)


def run(
    cost: Callable[[int, int], float], rows: Sequence[int], plan: timing.Plan
) -> tuple[Any, tuple[str, ...], Clock]:
    clock = Clock(cost)
    latency, flags = timing.measure(clock.step, rows, plan, clock)
    return latency, flags, clock


def record(samples: Sequence[float], row_lengths: Sequence[int]) -> wire.Latency:
    return timing._latency(0, [s / 1e6 for s in samples], 60.0, list(row_lengths))


PLAN = timing.Plan("custom", 5, 0.0, 100, 10.0, 150.0)
LENGTHS = [3, 128, 17, 64, 40, 9, 99]


def test_a_sample_belongs_to_the_row_the_record_says() -> None:
    latency, _, clock = run(lambda row, _: LENGTHS[row] * TICK, LENGTHS, PLAN)
    steady = clock.calls[latency.warmup :]
    assert len(steady) == latency.n == len(latency.samples_us)
    assert latency.row_lengths == tuple(LENGTHS[row] for row in steady[: len(LENGTHS)])
    for i, sample in enumerate(latency.samples_us):
        assert sample == round(1e6 * TICK * latency.row_lengths[i % len(LENGTHS)])


def test_every_row_runs_equally_often_in_a_fixed_shuffled_order() -> None:
    _, _, clock = run(lambda *_: TICK, LENGTHS, PLAN)
    latency, _, again = run(lambda *_: TICK, LENGTHS, PLAN)
    assert again.calls == clock.calls
    visits = Counter(again.calls[latency.warmup :])
    assert set(visits) == set(range(len(LENGTHS)))
    assert len(set(visits.values())) == 1
    assert timing.order(range(50)) != list(range(50))
    assert sorted(timing.order(range(50))) == list(range(50))
    assert timing.order([0] * 6) == [5, 2, 1, 3, 0, 4]  # RandomState(0): the same on every device and numpy


def test_both_minima_hold() -> None:
    fast, _, _ = run(lambda *_: TICK, [1], PLAN)
    assert (fast.n, fast.seconds) == (10 * 1024, 10.0)
    slow, flags, _ = run(lambda *_: 1.0, [1], PLAN)
    assert (slow.n, slow.seconds, flags) == (100, 100.0, ())


def test_statistics_are_those_of_the_samples() -> None:
    noise = random.Random(3)
    latency, _, _ = run(lambda row, _: 0.002 * LENGTHS[row] + noise.expovariate(500), LENGTHS, PLAN)
    ordered = sorted(s / 1e3 for s in latency.samples_us)

    def percentile(p: float) -> float:
        at = p * (len(ordered) - 1)
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        return low + (high - low) * (at - math.floor(at))

    assert latency.mean_ms == pytest.approx(statistics.fmean(ordered))
    assert latency.std_ms == pytest.approx(statistics.stdev(ordered))
    assert latency.min_ms == ordered[0]
    for name, p in {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99}.items():
        assert getattr(latency, name) == pytest.approx(percentile(p))


def test_the_record_travels() -> None:
    latency, _, _ = run(lambda *_: 0.125, np.array(LENGTHS), PLAN)  # lengths as numpy integers, as a caller has them
    assert json.loads(json.dumps(latency._asdict(), allow_nan=False))["row_lengths"] == list(latency.row_lengths)
    kinds = {name: type(value) for name, value in latency._asdict().items()}
    assert kinds.pop("warmup") is kinds.pop("n") is int
    assert kinds.pop("samples_us") is kinds.pop("row_lengths") is tuple
    assert set(kinds.values()) == {float}


def test_warm_up_lasts_until_the_times_settle() -> None:
    latency, flags, _ = run(lambda _, k: 0.01 if k >= 60 else 0.01 + 0.001 * (60 - k), [1], PLAN)
    assert latency.warmup == 90  # three windows after run 60
    assert set(latency.samples_us) == {10000}
    assert flags == ()


def test_warm_up_obeys_runs_and_seconds() -> None:
    assert run(lambda *_: TICK, [1], PLAN)[0].warmup == 30  # three equal windows
    assert run(lambda *_: TICK, [1], PLAN._replace(warmup_runs=41))[0].warmup == 50  # the next full window
    assert run(lambda *_: 1 / 8, [1], PLAN._replace(warmup_seconds=10.0))[0].warmup == 80


def test_warm_up_sees_the_shortest_and_the_longest_row_whatever_the_mix() -> None:
    rows = list(range(1, 400))
    latency, flags, clock = run(lambda row, _: rows[row] * TICK / 64, rows, PLAN)
    assert latency.warmup == 30  # windows compare although rows differ by a factor of 400
    assert flags == ()
    warm = clock.calls[:10]
    assert {0, 398} <= set(warm) and clock.calls[10:20] == warm


def test_times_that_never_settle_are_bounded_and_flagged() -> None:
    latency, flags, _ = run(lambda _, k: 0.05 * (1 + k // 10 % 2), [1], PLAN)
    assert "not_settled" in flags
    assert latency.warmup * 0.05 <= 10.1  # min_seconds


@pytest.mark.parametrize(("plan", "most"), [("default", 30.0), ("quick", 1.5), ("mlperf", 180.0)])
def test_warm_up_of_a_slow_program_is_bounded(plan: str, most: float) -> None:
    latency, _, _ = run(lambda _, k: 2.0 + 0.5 * (k % 20 < 10), [1], timing.PLANS[plan])
    assert latency.warmup * 2.0 <= most + 2.5


def test_a_program_that_is_too_slow_is_cut_and_says_so() -> None:
    latency, flags, clock = run(lambda *_: 1.0, [8] * 50, PLAN._replace(max_seconds=20.0))
    assert clock.now - 100.0 <= 21.0  # warm-up and runs together, one run over at most
    assert latency.n >= 1
    assert set(flags) >= {"not_settled", "cut_short", "too_few_queries"}
    _, flags, _ = run(lambda *_: 1.0, [8] * 400, PLAN)  # both minima met, but not a whole pass
    assert "cut_short" in flags
    latency, flags, _ = run(lambda *_: 99.0, [8], timing.PLANS["quick"])
    assert latency.n == 1 and latency.std_ms == 0.0 and "cut_short" in flags


@pytest.mark.parametrize(
    ("plan", "cost", "expected"),
    [
        ("default", 1 / 8, ()),
        ("mlperf", 1 / 16, ()),
        ("quick", 1 / 64, ("too_few_queries", "too_short")),  # 32 runs
        ("quick", 2.0, ("not_settled", "too_few_queries")),  # 10 runs in 20 s
        ("quick", TICK / 8, ("too_short",)),  # thousands of runs in half a second
    ],
)
def test_each_plan_is_judged_by_its_rule(plan: str, cost: float, expected: tuple[str, ...]) -> None:
    assert run(lambda *_: cost, [5], timing.PLANS[plan])[1] == expected


def test_mlperf_needs_1024_runs_and_60_seconds() -> None:
    plan = timing.PLANS["mlperf"]
    assert (plan.min_runs, plan.min_seconds) == (1024, 60.0)
    latency, _, _ = run(lambda *_: 1 / 16, [5], plan)
    assert latency.n == 1024 and latency.seconds == 64.0
    samples = timing._latency(0, [1 / 16] * 1023, 63.9, [5])
    assert timing._doubts(samples, plan) == ["too_few_queries"]
    assert timing._doubts(samples._replace(n=1024, seconds=59.9), plan) == ["too_short"]


def noisy(n: int, lengths: Sequence[int], growth: float, spread: float = 0.02, seed: int = 1) -> list[float]:
    """Microseconds that follow the length, with noise, growing linearly by `growth` over the run."""
    noise = np.random.RandomState(seed)
    usual = 500 + 40.0 * np.resize(lengths, n)
    return list(usual * (1 + growth * np.arange(n) / n) * np.exp(noise.normal(0, spread, n)))


@pytest.mark.parametrize("n", [60, 150, 600, 3000])  # half a pass, 1.2, 5 and 25 passes over 120 rows
@pytest.mark.parametrize(("growth", "found"), [(0.0, False), (0.25, True), (-0.25, True), (0.03, False)])
def test_drift_is_seen_through_rows_of_different_length(n: int, growth: float, found: bool) -> None:
    lengths = np.random.RandomState(0).randint(4, 256, 120)
    latency = record(noisy(n, lengths, growth), lengths)
    z, moved = timing.drift(latency)
    assert ("drift" in timing._doubts(latency, PLAN)) is found
    if abs(growth) > 0.2:
        assert np.sign(z) == np.sign(moved) == np.sign(growth)
        assert abs(moved) == pytest.approx(abs(growth) * 2 / 3, rel=0.4)  # thirds lie two thirds of the run apart


def test_drift_is_no_artefact_of_the_order() -> None:
    ascending = list(range(10, 310))  # the last third is all long rows
    assert "drift" not in timing._doubts(record(noisy(300, ascending, 0.0), ascending), PLAN)


def test_drift_is_seen_through_rows_whose_cost_is_not_their_length() -> None:
    cost = np.random.RandomState(2).permutation(np.geomspace(100, 10000, 100))  # static shapes, early exits
    samples = np.resize(cost, 400) * (1 + 0.12 * np.arange(400) / 400)
    assert "drift" in timing._doubts(record(list(samples), [16] * 100), PLAN)
    assert "drift" not in timing._doubts(record(list(np.resize(cost, 400)), [16] * 100), PLAN)


def test_drift_needs_evidence_and_not_only_a_difference() -> None:
    assert timing.drift(record([1000, 1000], [5])) == (0.0, 0.0)
    z, moved = timing.drift(record([1000, 1001, 999, 1300, 1310, 1290], [5]))
    assert moved > 0.05 and abs(z) < 3  # two against two prove nothing
    assert timing.drift(record([0] * 90, [5])) == (0.0, 0.0)  # a clock too coarse to see anything
    for seed in range(30):
        assert "drift" not in timing._doubts(record(noisy(600, [5], 0.0, 0.2, seed), [5]), PLAN)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 2, 2, 2, 3, 4, 4], [5, 5, 5, 5, 5, 5, 5, 9]])
def test_mann_whitney_against_every_possible_split(values: list[int]) -> None:
    def u(chosen: tuple[int, ...]) -> float:
        b = [values[i] for i in chosen]
        a = [values[i] for i in range(8) if i not in chosen]
        return sum((y > x) + 0.5 * (y == x) for x in a for y in b)

    splits = list(itertools.combinations(range(8), 4))
    spread = statistics.pstdev(u(chosen) for chosen in splits)  # exact, ties included
    for chosen in splits[::7]:
        a = np.array([values[i] for i in range(8) if i not in chosen], float)
        b = np.array([values[i] for i in chosen], float)
        assert timing._mann_whitney(a, b) == pytest.approx((u(chosen) - 8) / spread)


def test_no_rows_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="no rows"):
        timing.measure(lambda _: None, [], PLAN)


def test_a_burst_is_whole_passes_of_at_least_200_runs_and_2_seconds() -> None:
    for cost, expected in ((1 / 128, 259), (1 / 16, 203), (TICK / 2, 4102)):
        clock = Clock(lambda *_, cost=cost: cost)
        assert timing.burst(clock.step, LENGTHS, clock=clock) == expected == len(clock.calls)
        assert expected % len(LENGTHS) == 0
    clock = Clock(lambda *_: 5.0)
    assert timing.burst(clock.step, LENGTHS, max_seconds=20.0, clock=clock) == 4
