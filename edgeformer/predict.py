"""
A number before anyone owns the device: a roofline over the work counted on the exported program. Labelled modelled.

One row takes the longer of computing and moving: operations over the rate that good kernels reach on this CPU, bytes of
weights and activations over the sustained memory bandwidth (weights that fit the last cache are still read once a row).
It leaves out softmax, normalisation and dispatch, and knows no scheduler: hence the band of the profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgeformer_agent import wire

from .device import Device

METHOD = "roofline: max(flops / reached rate, bytes / sustained bandwidth) per row"


def predict(
    work: Sequence[wire.Work],
    lengths: tuple[int, ...],
    rows: Sequence[int],
    device: Device,
    *,
    threads: int = 1,
    accuracy: float | None = None,
) -> wire.Prediction:
    """
    Latency over `rows` (their lengths in tokens), as the agent will measure it: median and 90th percentile, in ms.
    `lengths` are the program's static ones (a row pays for the one it is padded to); `accuracy` is the check's finding.
    """
    times = [row_ms(work, _padded(n, lengths), device, threads) for n in rows]
    band = device.band_one_thread if threads == 1 else device.band_all_threads
    metrics = wire.Metrics(
        latency_ms=round(float(np.percentile(times, 50)), 4),
        latency_p90_ms=round(float(np.percentile(times, 90)), 4),
        accuracy=accuracy,
    )
    return wire.Prediction(device.name, threads, metrics, band[0], band[1], METHOD)


def on(device: Device, format: str, precision: str) -> Device:
    """The device as this format sees it: with the accelerator's rates where that runs it, on any number of threads."""
    gpu = device.accelerator
    if gpu is None or format not in gpu.formats:
        return device
    peak = gpu.fp16_gflops if precision == "fp16" or gpu.fp32_gflops is None else gpu.fp32_gflops
    return replace(
        device,
        fp32_gflops=peak,
        fp32_gflops_all=peak,
        fp32_efficiency=gpu.efficiency,
        fp32_efficiency_all=gpu.efficiency,
    )


def row_ms(work: Sequence[wire.Work], length: int, device: Device, threads: int = 1) -> float:
    """One inference at `length` tokens, in ms."""
    single = threads == 1
    fp32 = (
        device.fp32_gflops * device.fp32_efficiency if single else device.fp32_gflops_all * device.fp32_efficiency_all
    )
    int8 = device.int8_gops * device.int8_efficiency if single else device.int8_gops_all * device.int8_efficiency_all
    at = {field: _at(work, field, length) for field in ("flops", "int8_ops", "weight_bytes", "activation_bytes")}
    compute_s = at["flops"] / (fp32 * 1e9) + at["int8_ops"] / (int8 * 1e9)
    memory_s = (at["weight_bytes"] + at["activation_bytes"]) / (device.bandwidth_gbs * 1e9)
    return 1000 * max(compute_s, memory_s)


def _at(work: Sequence[wire.Work], field: str, length: int) -> float:
    """Between the counted lengths, linear."""
    return float(np.interp(length, [w.length for w in work], [getattr(w, field) for w in work]))


def _padded(length: int, lengths: tuple[int, ...]) -> int:
    return next((n for n in lengths if n >= length), length)
