"""
What sparse attention costs, against dense attention: counted operations, and the modelled share of the time.

Scoring reads q and k once and compares blocks, so its share falls with the length. Two numbers describe it, fitted to
what `tools/bench/attention.py` prints as the break-even of our kernels (on x86, the C core against itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np

# By compute (0 fp32, 1 int8): scoring a query costs as much as attending to so many more keys, and a share of them all.
SCORING_KEYS = {0: 16.0, 1: 40.0}
SCORING_SHARE = {0: 0.01, 1: 0.025}


class Kept(NamedTuple):
    """The share of blocks that sparse layers keep, by length; all up to `dense_below` tokens."""

    dense_below: int
    at: tuple[tuple[int, float], ...]  # (tokens, share), ascending; () where nobody calibrated: all
    block: int = 64

    def share(self, tokens: int) -> float:
        """Linear between the lengths that were calibrated, the nearest outside them."""
        if tokens <= self.dense_below or not self.at:
            return 1.0
        return float(np.interp(tokens, [n for n, _ in self.at], [share for _, share in self.at]))

    def counted(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Lengths to count a dynamic program's work at: also on both sides of where sparse attention begins."""
        turn = {n for n in (self.dense_below, self.dense_below + 1) if self.at and lengths and n <= lengths[-1]}
        return tuple(sorted({1, *lengths, *turn} - {0})) if lengths else (0,)

    def scored(self, tokens: int) -> bool:
        return tokens > self.dense_below


def calibrated(history: Sequence[Any]) -> Kept:
    """What a model's history says its sparse layers keep."""
    facts: Mapping[str, Any] = next((x.facts for x in reversed(history) if x.name == "sparsify.dsa"), {})
    at = tuple(sorted((int(n), float(share)) for n, share in facts.get("kept_by_length", {}).items()))
    return Kept(int(facts.get("dense_below", 0)), at, int(facts.get("block", 64)))


def time_share(kept: float, tokens: int, compute: int = 0) -> float:
    """Modelled time of sparse attention, scoring included, over that of the same kernels' dense attention."""
    return kept + SCORING_KEYS[compute] / tokens + SCORING_SHARE[compute]


def dense_below(at: Mapping[int, float], compute: int = 0, floor: int = 0) -> int:
    """The longest of these lengths at which sparse is no faster than dense: up to there dense is computed."""
    return max([floor, *(n for n, kept in at.items() if time_share(kept, n, compute) >= 1)])


def operations(q: Sequence[int], k: Sequence[int], rank: int, kept: Kept) -> float:
    """Of one call on q [B,H,Nq,D] and k [B,Hkv,Nk,D]; a multiply-add is two. Scoring is counted where it is done."""
    batch, heads, rows, dim = q
    keys = k[2]
    attention = 4.0 * batch * heads * rows * keys * dim * kept.share(keys)
    if not kept.scored(keys):
        return attention
    nq, nk = ceil(rows / kept.block), ceil(keys / kept.block)
    pooling = batch * (heads * rows + k[1] * keys) * dim
    projections = 2.0 * batch * heads * (nq + nk) * dim * rank
    return attention + pooling + projections + 2.0 * batch * heads * nq * nk * rank
