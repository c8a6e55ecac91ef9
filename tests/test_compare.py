"""Known changes are found, noise is called noise, and what cannot be compared is refused with its reason."""

import itertools
import math

import numpy as np
import pytest
from factory import Timing, energy, entry, fidelity, latency, manifest, prediction, report, result, signed

from edgeformer.compare import (
    Comparison,
    against_prediction,
    best,
    bootstrap_medians,
    compare,
    differences,
    fisher,
    latency_ratio,
    rank_test,
    wilson,
)
from edgeformer_agent import wire


def one(comparisons: tuple[Comparison, ...], metric: str = "latency_ms", program: str = "onnx-int8") -> Comparison:
    return next(c for c in comparisons if (c.metric, c.program) == (metric, program))


def with_results(made: wire.Report, **changes: object) -> wire.Report:
    return signed(made._replace(results=tuple(r._replace(**changes) for r in made.results)))


# --- latency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "verdict"), [(0.8, "faster"), (0.95, "faster"), (1.05, "slower"), (1.3, "slower")])
def test_a_known_shift_is_found(scale: float, verdict: str) -> None:
    found = one(compare(report(timing=Timing(seed=1)), report(timing=Timing(seed=2, scale=scale))))
    assert found.verdict == verdict
    assert found.low is not None and found.high is not None and found.low < scale < found.high
    assert found.high - found.low < 0.05
    assert found.n_baseline == found.n_candidate == 1024
    assert found.notes[0].startswith("paired by row: median of 128 per-row ratios")


def test_other_rows_are_not_paired() -> None:
    faster = Timing(seed=2, scale=0.7, lengths=latency().row_lengths[::-1])
    found = one(compare(report(timing=Timing(seed=1)), report(timing=faster)))
    assert found.verdict == "faster" and found.notes[0].startswith("unpaired ratio of medians: the row")
    assert found.ratio == pytest.approx(found.candidate / found.baseline)


def test_pairing_sees_what_the_spread_of_lengths_hides() -> None:
    a, b = latency(timing=Timing(seed=1)), latency(timing=Timing(seed=2, scale=0.96))
    shuffled = b._replace(row_lengths=b.row_lengths[:-1])
    paired, unpaired = latency_ratio(a, b), latency_ratio(a, shuffled)
    assert paired.p_value < 1e-6 < unpaired.p_value
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


def test_static_lengths_do_not_make_the_median_jump() -> None:
    """Half of the rows take 1 ms and half take 2 ms: medians of such samples jump between the two, pairs do not."""
    lengths = (16,) * 64 + (32,) * 64
    a, b = (latency(timing=Timing(seed=s, lengths=lengths, base_ms=0, slope_ms=1 / 16)) for s in (1, 2))
    found = latency_ratio(a, b)
    assert 0.98 < found.low < 1 < found.high < 1.02


@pytest.mark.parametrize("rows", [128, 8])
def test_noise_is_called_noise(rows: int) -> None:
    """A/A: 200 pairs of runs of the same program, paired by row (128 rows) and not (8 rows)."""
    timings = (Timing(seed=seed, rows=rows, samples=256, noise=0.15) for seed in range(400))
    runs = [report(("onnx-fp32",), timing) for timing in timings]
    verdicts = [compare(a, b)[0].verdict for a, b in zip(runs[::2], runs[1::2], strict=True)]
    assert verdicts.count("noise") >= 0.93 * len(verdicts)


def test_a_machine_that_wanders_is_not_a_difference() -> None:
    """Its samples, taken as independent, differ in most pairs of runs."""
    runs = [latency(timing=Timing(seed=seed, wander=0.04)) for seed in range(400)]
    found = [latency_ratio(a, b) for a, b in zip(runs[::2], runs[1::2], strict=True)]
    noise = [e.low <= 1 <= e.high or e.p_value > 0.05 or abs(e.ratio - 1) < 0.02 for e in found]
    assert sum(noise) >= 0.88 * len(found)
    assert sum("widened" in e.how for e in found) > 0.9 * len(found)
    slower = [latency(timing=Timing(seed=seed, wander=0.04, scale=1.3)) for seed in range(900, 920)]
    shifted = [latency_ratio(a, b) for a, b in zip(runs, slower, strict=False)]
    assert all(e.low > 1 and e.p_value < 0.05 for e in shifted)


@pytest.mark.parametrize("rows", [128, 8])
def test_intervals_cover_the_truth(rows: int) -> None:
    """95 % intervals and p-values, without the 2 % floor's help: true ratio 1.1, and 1.0 for the p-values."""
    covered, rejected = 0, 0
    for seed in range(0, 600, 3):
        a, b, c = (
            latency(timing=Timing(seed=seed + i, rows=rows, samples=257, noise=0.15, scale=s))
            for i, s in enumerate((1.0, 1.1, 1.0))
        )
        estimate = latency_ratio(a, b)
        covered += estimate.low <= 1.1 <= estimate.high
        rejected += latency_ratio(a, c).p_value < 0.05
    assert covered >= 182, covered
    assert rejected <= 16, rejected


def test_the_same_input_gives_the_same_answer() -> None:
    a, b = report(timing=Timing(seed=1)), report(timing=Timing(seed=2))
    assert compare(a, b) == compare(a, b)


def test_a_change_under_two_percent_is_noise_however_significant() -> None:
    quiet = [report(timing=Timing(seed=s, noise=0.002, scale=k)) for s, k in ((1, 1.0), (2, 1.012))]
    found = one(compare(*quiet))
    assert found.p_value is not None and found.p_value < 1e-9 and found.low is not None and found.low > 1
    assert found.verdict == "noise"


def test_too_few_samples_state_no_interval() -> None:
    found = one(compare(report(timing=Timing(samples=19)), report(timing=Timing(scale=3))))
    assert found.verdict == "too few samples" and found.low is None and found.p_value is None
    assert "fewer than 20 samples" in found.notes[0]


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    still = latency()._replace(samples_us=(0,) * 1024)
    frozen = with_results(report(), latency=still)
    assert one(compare(frozen, frozen)).verdict == "noise"


# --- the statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 9), (40, 31), (400, 500)])
@pytest.mark.parametrize("step", [1e-9, 0.5, 2.0])
def test_mann_whitney_is_scipys(sizes: tuple[int, int], step: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(sizes[0])
    a, b = (np.round(random.normal(i / 3, 1, n) / step) * step for i, n in enumerate(sizes))
    expected = stats.mannwhitneyu(a, b, method="asymptotic").pvalue
    assert rank_test(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_test_within_rows_has_the_moments_of_its_permutations() -> None:
    """Three rows of 2+2, 1+2 and 2+1 samples: all 6 x 3 x 3 exchanges give the exact mean and variance."""
    values = np.array([3.0, 9, 4, 7, 7, 1, 2, 8, 5, 6])
    rows, moved = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 0, 1, 1, 0, 0, 1], dtype=bool)
    ranks = np.array([3, 10, 4, 7.5, 7.5, 1, 2, 9, 5, 6])
    choices = [itertools.combinations(np.nonzero(rows == r)[0], int(moved[rows == r].sum())) for r in range(3)]
    sums = [sum(ranks[list(itertools.chain(*picked))]) for picked in itertools.product(*choices)]
    assert len(sums) == 54
    z = (abs(ranks[moved].sum() - np.mean(sums)) - 0.5) / np.std(sums)
    found = rank_test(values[~moved], values[moved], (rows[~moved], rows[moved]))
    assert found == pytest.approx(math.erfc(max(z, 0) / math.sqrt(2)), rel=1e-12)


@pytest.mark.parametrize("n", [20, 21, 300])
def test_bootstrap_medians_are_those_of_drawn_resamples(n: int) -> None:
    values = np.random.default_rng(n).gamma(2, 3, n)
    drawn = np.median(np.random.default_rng(1).choice(values, (20_000, n)), axis=1)
    made = bootstrap_medians(values, np.random.default_rng(2))
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        gap = np.quantile(drawn, min(share + 0.015, 1)) - np.quantile(drawn, max(share - 0.015, 0))
        assert abs(np.quantile(made, share) - np.quantile(drawn, share)) <= gap


@pytest.mark.parametrize(("share", "n"), [(0.5, 100), (0.8865, 872), (1.0, 50), (0.0, 50)])
def test_wilson_is_scipys(share: float, n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    assert wilson(round(share * n) / n, n) == pytest.approx(tuple(expected), abs=1e-7)


def test_fisher_covers_a_known_correlation() -> None:
    stats, random = pytest.importorskip("scipy.stats"), np.random.default_rng(3)
    rho, covered = 0.8, 0
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's of a bivariate normal
    for _ in range(200):
        x, y = random.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 200).T
        low, high = fisher(stats.spearmanr(x, y).statistic, 200)
        covered += low <= truth <= high
    assert 182 <= covered <= 199


# --- the other metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "verdict"), [(1.01, "noise"), (0.8, "better"), (1.1, "worse")])
def test_memory(factor: float, verdict: str) -> None:
    a = report()
    b = with_results(a, memory=a.results[1].memory._replace(peak_rss_mb=a.results[1].memory.peak_rss_mb * factor))
    found = one(compare(a, b), "memory_mb")
    assert (found.verdict, found.low) == (verdict, None) and found.ratio == pytest.approx(factor)


def test_energy_needs_the_same_sensor() -> None:
    a, b = (with_results(report(), energy=energy(above_idle_mj=mj)) for mj in (60.0, 40.0))
    other = with_results(report(), energy=energy(source="fuel gauge"))
    assert one(compare(a, b), "energy_mj").verdict == "better"
    assert one(compare(a, other), "energy_mj").notes[0] == "sensors differ: ina226 5 V input / fuel gauge"
    assert not [c for c in compare(a, report()) if c.metric == "energy_mj"]


@pytest.mark.parametrize(("value", "verdict"), [(769 / 872, "noise"), (715 / 872, "worse"), (828 / 872, "better")])
def test_accuracy_is_unpaired_and_says_so(value: float, verdict: str) -> None:
    a, b = (with_results(report(), fidelity=fidelity(value=v)) for v in (773 / 872, value))
    found = one(compare(a, b), "accuracy")
    assert found.verdict == verdict and found.notes[0].startswith("unpaired: ")
    assert found.low is not None and found.high is not None and found.low < value / 773 * 872 < found.high
    stats = pytest.importorskip("scipy.stats")
    counts = [[round(v * 872), 872 - round(v * 872)] for v in (773 / 872, value)]
    expected = stats.chi2_contingency(counts, correction=False).pvalue
    assert found.p_value == pytest.approx(expected, rel=1e-6)


def test_a_correlation_counts_pairs_of_rows() -> None:
    sides = [fidelity(metric="spearman", value=v, rows=400) for v in (0.85, 0.70)]
    a, b = (with_results(report(), fidelity=side) for side in sides)
    found = one(compare(a, b), "spearman")
    assert (found.n_baseline, found.verdict) == (200, "worse")


def test_fidelity_and_its_worst_row() -> None:
    a = with_results(report(), fidelity=fidelity(mean=0.9990, worst=0.97))
    b = with_results(report(), fidelity=fidelity(mean=0.9986, worst=0.91))
    found = compare(a, b)
    assert one(found, "fidelity").verdict == "noise" and one(found, "fidelity_worst").verdict == "worse"
    other = with_results(report(), fidelity=fidelity(measure="agreement"))
    assert one(compare(a, other), "fidelity").verdict == "not comparable"
    agreed = with_results(report(), fidelity=fidelity(measure="agreement", mean=0.90))
    assert one(compare(other, agreed), "fidelity").verdict == "worse"


# --- what may be compared -----------------------------------------------------------------------------------------


def test_emulated_timing_is_refused_and_fidelity_is_not() -> None:
    a, b = report(), report(kind="emulated", timing=Timing(scale=0.1))
    for pair in ((a, b), (b, a), (b, b)):
        found = compare(*pair)
        assert one(found).verdict == one(found, "memory_mb").verdict == "not comparable"
        assert one(found).notes[0].startswith("emulated: ") and one(found).ratio is None
        assert one(found, "fidelity").verdict == one(found, "accuracy").verdict == "noise"


def test_what_else_differs_is_noted() -> None:
    other = manifest(target="jetson-nano", version=4)
    notes = one(compare(report(), report(bundle=other, profile="quick"))).notes
    for expected in (
        "bundle differs: minilm-sst2 3 / minilm-sst2 4",
        "target differs: raspberry-pi-4 / jetson-nano",
        "device differs: Raspberry Pi 4 Model B Rev 1.4 / NVIDIA Jetson Nano Developer Kit",
        "run profile differs: default / quick",
    ):
        assert expected in notes
    threads = one(compare(report(), with_results(report(), threads=1, flags=("throttled",)))).notes
    assert "threads differs: 4 / 1" in threads and "flagged: throttled" in threads
    assert differences(report(), report()) == ()


def test_programs_of_one_side_only() -> None:
    a, b = report(("onnx-fp32", "litert-int8")), report(("onnx-fp32", "onnx-int8"), skipped={"litert-int8": "no wheel"})
    gone, new = one(compare(a, b), program="litert-int8"), one(compare(a, b), program="onnx-int8")
    assert gone.verdict == "not comparable" and "no wheel" in gone.notes[0]
    assert new.verdict == "no baseline" and new.candidate is not None and new.baseline is None


def test_best_against_best() -> None:
    a, b = report(("onnx-fp32", "onnx-int8")), report(("onnx-fp32", "litert-int8"))
    found = one(compare(a, b), program="best")
    assert found.verdict == "faster" and "onnx-int8 in the baseline and litert-int8" in " ".join(found.notes)
    failed = tuple(r._replace(golden=r.golden._replace(passed=False)) for r in b.results)
    assert best(b._replace(results=failed)) is None
    assert best(b._replace(selected=None)).program == "litert-int8"


def test_a_failed_self_check_has_no_latency_to_compare() -> None:
    found = one(compare(report(), with_results(report(), latency=None)))
    assert found.verdict == "not comparable" and "self-check failed" in found.notes[0]


# --- against the prediction ---------------------------------------------------------------------------------------


def predicted(made: wire.Manifest, seen: wire.Report) -> Comparison:
    return one(against_prediction(made, seen), "predicted_latency_ms")


@pytest.mark.parametrize(("latency_ms", "verdict"), [(12.0, "as predicted"), (3.0, "outside the band")])
def test_measured_against_predicted(latency_ms: float, verdict: str) -> None:
    said = prediction(latency_ms)
    made = manifest()._replace(programs=(entry("onnx-int8", predicted=said),))
    found = predicted(made, report(bundle=made))
    assert found.verdict == verdict and (found.low, found.high) == (0.5, 2.0) and found.baseline == latency_ms
    assert found.notes == ("modelled for raspberry-pi-4 by roofline",)


def test_a_prediction_is_judged_only_where_it_applies() -> None:
    made = manifest()
    x86 = {"model": "QEMU Standard PC", "machine": "x86_64"}
    refusals = {
        "emulated: timing says nothing": report(bundle=made, kind="emulated"),
        "predicted for raspberry-pi-4, measured on QEMU Standard PC": report(bundle=made, device=x86),
        "predicted for raspberry-pi-4, measured on some PC": report(
            bundle=made, device={"model": None, "cpu": "some PC", "machine": "x86_64"}
        ),
        "predicted for 4 threads, measured with 1": with_results(report(bundle=made), threads=1),
        "the report is of another bundle": report(bundle=manifest(version=9)),
        "its self-check failed": with_results(report(bundle=made), latency=None),
    }
    for reason, seen in refusals.items():
        assert (predicted(made, seen).verdict, predicted(made, seen).notes) == ("not comparable", (reason,))
    pi5 = report(bundle=made, device={"model": "Raspberry Pi 5 Model B Rev 1.4"})
    assert predicted(made, pi5).verdict == "not comparable"
    silent = manifest()._replace(programs=(entry("onnx-int8", predicted=prediction(None)),))
    assert predicted(silent, report(bundle=silent)).verdict == "no baseline"


def test_the_host_is_whatever_it_calls_itself() -> None:
    said = prediction(12.0, device="host")
    made = manifest(target="host")._replace(programs=(entry("onnx-int8", predicted=said),))
    seen = report(bundle=made, device={"model": "Some Laptop"})
    assert predicted(made, seen).verdict == "as predicted"


def test_the_factory_speaks_the_wire() -> None:
    made, seen = manifest(), with_results(report(), energy=energy())
    assert wire.load_manifest(wire.dump(made)) == made
    assert wire.load_report(wire.dump(seen)) == seen
    assert result("onnx-fp32").latency == latency()
