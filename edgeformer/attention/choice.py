"""
Dense or sparse: what sparse attention would gain on a device, before anything is trained or exported. Modelled.

A row of N tokens costs its linear layers (2 operations a weight and token, at the rate of their precision) and its
attention (4 N^2 operations a layer and channel, fp32). Sparse attention does the kept fraction of the latter and pays
for scoring: 4 % of dense attention, the measured upper end at 512 tokens (`tools/bench`). Short rows stay dense inside
the operator itself (`dense_below`), so a sparse program is never slower there than by the length's own choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..device import Device
from ..errors import BadInput
from . import swap

SCORING = 0.04  # of dense attention
WORTH = 1.1  # least modelled gain over the data's rows that pays for training a scorer


def gain(
    module: torch.nn.Module, lengths: Sequence[int], device: Device, kept: float, precision: str, dense_below: int
) -> float:
    """Modelled time of dense attention over that of sparse, for rows of these lengths; 1 where sparse cannot be had."""
    try:
        layers = swap.layers(module)
    except BadInput:
        return 1.0
    channels = sum(layer.heads * layer.dim for layer in layers)
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    fp32 = device.fp32_gflops * device.fp32_efficiency
    linear = fp32 if precision == "fp32" else device.int8_gops * device.int8_efficiency
    rest = [2.0 * weights * n / linear for n in lengths]
    attention = [4.0 * channels * n * n / fp32 for n in lengths]
    share = [kept + SCORING if n > dense_below else 1.0 for n in lengths]
    sparse = sum(r + a * s for r, a, s in zip(rest, attention, share, strict=True))
    return sum(r + a for r, a in zip(rest, attention, strict=True)) / sparse if sparse else 1.0
