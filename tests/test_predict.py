"""The roofline, on a device with round numbers: every figure here can be done in the head."""

from dataclasses import replace
from typing import Any

import pytest

from edgeformer import device as devices
from edgeformer.device import Accelerator, Device
from edgeformer.predict import METHOD, on, predict, row_ms
from edgeformer_agent import wire

# One thread: 5 GFLOP/s and 40 GOP/s are reached; all: 10 and 90. Memory: 2 GB/s.
DEVICE = replace(
    devices.load("raspberry-pi-4"),
    name="round",
    fp32_gflops=10.0,
    fp32_efficiency=0.5,
    fp32_gflops_all=40.0,
    fp32_efficiency_all=0.25,
    int8_gops=50.0,
    int8_efficiency=0.8,
    int8_gops_all=100.0,
    int8_efficiency_all=0.9,
    bandwidth_gbs=2.0,
    band_one_thread=(0.5, 2.0),
    band_all_threads=(0.25, 4.0),
)


def work(length: int = 32, **changes: float) -> wire.Work:
    return wire.Work(length, 0.0, 0.0, 0.0, 0.0)._replace(**changes)


@pytest.mark.parametrize(
    ("cost", "one", "all_"),
    [
        ({"flops": 5e9}, 1000, 500),
        ({"int8_ops": 18e9}, 450, 200),
        ({"flops": 5e9, "int8_ops": 18e9}, 1450, 700),  # the two follow one another
        ({"weight_bytes": 1e9}, 500, 500),  # threads share one memory
        ({"activation_bytes": 1e9}, 500, 500),
        ({"weight_bytes": 1e9, "activation_bytes": 1e9}, 1000, 1000),
        ({"flops": 5e9, "weight_bytes": 1e9}, 1000, 500),  # compute-bound; even
        ({"flops": 1e9, "weight_bytes": 1e9}, 500, 500),  # memory-bound: the longer of the two, not the sum
        ({}, 0, 0),
    ],
)
def test_by_hand(cost: dict[str, float], one: float, all_: float) -> None:
    assert row_ms([work(**cost)], 32, DEVICE) == pytest.approx(one)
    for threads in (2, 4):
        assert row_ms([work(**cost)], 32, DEVICE, threads) == pytest.approx(all_)


def test_which_bound_holds_depends_on_the_device() -> None:
    cost = [work(flops=5e9, weight_bytes=1e9)]  # 1000 ms of computing, 500 ms of moving
    assert row_ms(cost, 32, replace(DEVICE, bandwidth_gbs=1.0)) == pytest.approx(1000)
    assert row_ms(cost, 32, replace(DEVICE, bandwidth_gbs=0.5)) == pytest.approx(2000)
    assert row_ms(cost, 32, replace(DEVICE, fp32_gflops=1000.0)) == pytest.approx(500)
    assert row_ms(cost, 32, replace(DEVICE, int8_gops=1.0)) == pytest.approx(1000)


COUNTED = (work(16, flops=1e9), work(32, flops=2e9), work(128, flops=14e9))  # 200, 400 and 2800 ms


@pytest.mark.parametrize(
    ("length", "ms"), [(16, 200), (24, 300), (32, 400), (80, 1600), (128, 2800), (1, 200), (500, 2800)]
)
def test_between_the_counted_lengths(length: int, ms: float) -> None:
    """Linear between two; outside, the nearest."""
    assert row_ms(COUNTED, length, DEVICE) == pytest.approx(ms)


def test_each_cost_is_interpolated_apart() -> None:
    counted = (work(0, flops=0.0, weight_bytes=1e9), work(10, flops=10e9, weight_bytes=1e9))
    assert [row_ms(counted, n, DEVICE) for n in (0, 2, 5)] == pytest.approx([500, 500, 1000])


def test_longer_rows_take_no_less() -> None:
    times = [row_ms(COUNTED, n, DEVICE) for n in range(1, 140)]
    assert times == sorted(times) and len(set(times)) > 100


@pytest.mark.parametrize("field", ["flops", "int8_ops", "weight_bytes", "activation_bytes"])
@pytest.mark.parametrize("threads", [1, 4])
def test_more_work_takes_no_less_and_in_the_end_more(field: str, threads: int) -> None:
    base = work(flops=1e8, int8_ops=1e8, weight_bytes=1e7, activation_bytes=1e7)
    times = [row_ms([base._replace(**{field: n * 1e8})], 32, DEVICE, threads) for n in range(1, 60)]
    assert times == sorted(times) and times[-1] > times[0]


@pytest.mark.parametrize("field", ["fp32_gflops", "fp32_efficiency", "int8_gops", "int8_efficiency", "bandwidth_gbs"])
def test_a_faster_device_takes_no_longer(field: str) -> None:
    cost = [work(flops=1e9, int8_ops=1e9, weight_bytes=4e8)]
    faster = replace(DEVICE, **{field: getattr(DEVICE, field) * 1.2})
    assert row_ms(cost, 32, faster) <= row_ms(cost, 32, DEVICE)
    assert row_ms(cost, 32, replace(DEVICE, fp32_gflops_all=1.0, int8_gops_all=1.0)) == row_ms(cost, 32, DEVICE)
    assert row_ms(cost, 32, replace(DEVICE, fp32_gflops=1.0, int8_gops=1.0), 4) == row_ms(cost, 32, DEVICE, 4)


def said(rows: list[int], lengths: tuple[int, ...] = (), device: Device = DEVICE, **more: Any) -> wire.Prediction:
    return predict(COUNTED, lengths, rows, device, **more)


def test_a_prediction_is_median_and_p90_over_the_rows() -> None:
    """Rows 16, 24, 32: 200, 300 and 400 ms; 90 % of the way is four fifths between the last two."""
    assert said([32, 16, 24]) == wire.Prediction(
        "round", 1, wire.Metrics(latency_ms=300.0, latency_p90_ms=380.0), 0.5, 2.0, METHOD, "modelled"
    )
    assert said([16, 16, 16, 128]).metrics.latency_ms == 200  # not the mean
    assert said([16, 16, 16, 128], accuracy=0.875).metrics.accuracy == 0.875


@pytest.mark.parametrize(
    ("row", "paid"),
    [(1, 32), (16, 32), (31, 32), (32, 32), (33, 128), (128, 128), (0, 32)],
)
def test_a_row_pays_for_the_static_length_it_is_padded_to(row: int, paid: int) -> None:
    assert said([row], (32, 128)).metrics == said([paid]).metrics
    assert said([row], (32, 128)).metrics.latency_ms == {32: 400, 128: 2800}[paid]


def test_a_row_without_a_static_length_pays_for_itself() -> None:
    assert said([24], ()).metrics.latency_ms == 300
    assert said([80], (16, 32)).metrics.latency_ms == 1600


def test_the_band_is_that_of_the_threads() -> None:
    assert (said([16]).low, said([16]).high, said([16]).threads) == (0.5, 2.0, 1)
    for threads in (2, 4):
        all_ = said([16], threads=threads)
        assert (all_.low, all_.high, all_.threads) == (0.25, 4.0, threads)
        assert all_.metrics.latency_ms == 100


def test_an_accelerator_does_not_change_what_the_cpu_takes() -> None:
    other = replace(DEVICE, accelerator=Accelerator("gpu", ("tensorrt",), 1e5, 1.0, 5e4))
    assert said([16, 128], device=other) == said([16, 128])
    assert on(other, "onnx", "fp32") is other and on(DEVICE, "tensorrt", "fp16") is DEVICE


def test_an_accelerator_computes_what_it_runs_in_its_own_precision() -> None:
    other = replace(DEVICE, accelerator=Accelerator("gpu", ("tensorrt",), 1e5, 0.5, 5e4))
    for precision, peak in (("fp16", 1e5), ("fp32", 5e4)):
        gpu = on(other, "tensorrt", precision)
        assert (gpu.fp32_gflops, gpu.fp32_gflops_all, gpu.fp32_efficiency_all) == (peak, peak, 0.5)
        assert (said([128], device=gpu).metrics.latency_ms or 0) <= (said([128]).metrics.latency_ms or 0)


@pytest.mark.parametrize("name", devices.names())
def test_every_profile_predicts(name: str) -> None:
    """MiniLM at 128 tokens, int8: 2.9 GOP, 11 MB of weights; between a desktop's and the slowest board's time."""
    cost = (work(8, int8_ops=1.7e8, weight_bytes=1.1e7), work(128, int8_ops=2.9e9, weight_bytes=1.1e7))
    device = devices.load(name)
    for threads in (1, 4):
        made = predict(cost, (), [8, 128, 128], device, threads=threads)
        assert 0.05 < (made.metrics.latency_ms or 0) < 2000 and made.low < 1 < made.high and made.device == name
        wire.dump(made)
