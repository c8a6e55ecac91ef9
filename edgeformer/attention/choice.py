"""
Dense or sparse, length by length: what sparse attention gains on a device. Modelled, and labelled so.

A row of N tokens costs its linear layers (2 operations a weight and token, at the device's rate for their precision)
and its attention (4 N^2 operations a layer and channel, at its fp32 rate). Sparse attention costs the share of the
latter that `cost.time_share` gives. Before training the share kept is the budget; afterwards it is what the thresholds
kept of the calibration rows at each length. A length at which sparse would not be faster is computed dense, by the
operator itself (`dense_below`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..device import Device
from ..errors import BadInput
from . import cost, swap

WORTH = 1.1  # least modelled gain over the data's rows that pays for training a scorer


@dataclass(frozen=True)
class Load:
    """What a token costs on a device, in ns: its linear layers, and dense attention to one key."""

    linear: float
    attention: float

    def gain(self, tokens: int, kept: cost.Kept, compute: int = 0) -> float:
        """Modelled time of the dense model over that of the sparse one, for a row of this length."""
        share = cost.time_share(kept.share(tokens), tokens, compute) if kept.scored(tokens) else 1.0
        return (self.linear + self.attention * tokens) / (self.linear + self.attention * tokens * share)

    def over(self, lengths: Sequence[int], kept: cost.Kept, compute: int = 0) -> float:
        """The same over all rows together."""
        dense = [n * (self.linear + self.attention * n) for n in lengths]
        sparse = [d / self.gain(n, kept, compute) for d, n in zip(dense, lengths, strict=True)]
        return sum(dense) / sum(sparse)


def load(module: torch.nn.Module, device: Device, precision: str) -> Load | None:
    """None where sparse attention cannot be had in this model."""
    if obstacle(module):
        return None
    layers = swap.layers(module)
    channels = sum(layer.heads * layer.dim for layer in layers)
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    fp32 = device.fp32_gflops * device.fp32_efficiency
    int8 = precision in ("int8", "int8-static", "int4-embeddings")
    linear = device.int8_gops * device.int8_efficiency if int8 else fp32
    return Load(2.0 * weights / linear, 4.0 * channels / fp32)


def obstacle(module: torch.nn.Module) -> str:
    """Why sparse attention cannot be had in this model; empty where it can."""
    try:
        swap.alike(module)
    except BadInput as error:
        return str(error)
    return ""


def by_length(load: Load, lengths: Sequence[int], kept: cost.Kept, compute: int = 0) -> Mapping[str, dict[str, object]]:
    """For the manifest: what was chosen at each length, what is kept there, and the gain over dense."""
    return {
        str(n): {
            "chosen": "dsa" if kept.scored(n) else "dense",
            "kept": round(kept.share(n), 4),
            "modelled_gain": round(load.gain(n, kept, compute), 3),
        }
        for n in lengths
    }
