"""Random configurations of block-DSA for the bindings, and the torch operator where the package does not define it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgeformer.attention import reference as ref

Array = np.ndarray[Any, Any]
ORDER = ("q", "k", "v", "wq", "wk", "dist_bias", "sink_bias", "theta", "q_len", "kv_len", "position_bias")


@dataclass(frozen=True)
class Case:
    """One call: the configuration, the operands in schema order (the last three may be None) and what must come out."""

    name: str
    config: ref.Config
    operands: tuple[Array | None, ...]

    @property
    def attributes(self) -> dict[str, int | float]:
        """As the schema names them."""
        return asdict(self.config)

    def with_lengths(self) -> Case:
        """The same with every length written out."""
        full = [np.full(len(x), x.shape[2], np.int32) for x in self.operands[:2]]
        given = tuple(full[i - 8] if x is None and i in (8, 9) else x for i, x in enumerate(self.operands))
        return Case(self.name, self.config, given)

    def expected(self) -> Array:
        q, k, v, *scorer, q_len, kv_len, bias = self.operands
        return ref.fused(self.config, q, k, v, ref.Scorer(*scorer), q_len, kv_len, position_bias=bias)

    def kept(self) -> tuple[int, int]:
        """Blocks kept and candidates, over all lists."""
        q, k, _, *scorer, q_len, kv_len, _ = self.operands
        c, s = self.config, ref.Scorer(*scorer)
        heads = k.shape[1] if c.select_per_kv else q.shape[1]
        candidates = sum(len(row.candidates) * heads for row in ref.mass_rows(c, q, k, s, q_len, kv_len))
        return int(ref.select(c, q, k, s, q_len, kv_len).cnt.sum()), candidates


def case(
    name: str,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    rows: tuple[int, int] = (128, 128),
    dim: int = 32,
    lengths: tuple[Any, Any] = (None, None),
    theta: float = 0.15,
    reach: int = 4,
    sinks: int = 1,
    rank: int = 8,
    positions: int = 0,
    seed: int = 0,
    **config: Any,
) -> Case:
    c = ref.Config(**config)
    random = np.random.default_rng([seed, *rows, *heads])

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    hq, hkv = heads
    q, k, v = normal(batch, hq, rows[0], dim), normal(batch, hkv, rows[1], dim), normal(batch, hkv, rows[1], dim)
    given = [None if x is None else np.asarray(x, np.int32) for x in lengths]
    for array, length in ((q, given[0]), (k, given[1]), (v, given[1])):
        for b in range(batch if length is not None else 0):
            array[b, :, length[b] :] = np.nan if c.rule == 0 and seed % 2 else 99  # padding may hold anything
    theta_h = np.full(hkv if c.select_per_kv else hq, theta, np.float32)
    scorer = (normal(hq, dim, rank), normal(hq, dim, rank), normal(hq, 2 * reach + 1, scale=0.3), normal(hq, sinks))
    bias = normal(hq, 2 * positions + 1, scale=2.0) if positions else None
    return Case(name, c, (q, k, v, *scorer, theta_h, *given, bias))


# What the function body and the decomposition can express: rule 0 without clamps.
PLAIN = (
    case("plain-64"),
    case("plain-32", block_q=32, block_k=32, dim=64, theta=0.2),
    case("tail", rows=(70, 70), block_q=32, block_k=32),
    case("one-row-tail", rows=(65, 65), seed=1),
    case("short", rows=(5, 5)),
    case("padded", batch=3, lengths=([128, 70, 1], [128, 70, 1]), block_q=32, block_k=32, seed=1),
    case("padded-empty", batch=2, lengths=([100, 0], [100, 0]), rows=(100, 100), block_q=32, block_k=32),
    case("gqa", heads=(4, 2), rows=(96, 96), block_q=32, block_k=32, lengths=([96], [90]), seed=3),
    case("per-kv", heads=(4, 1), rows=(128, 128), block_q=32, block_k=32, select_per_kv=1),
    case("causal", rows=(128, 128), block_q=32, block_k=32, causal=1, n_sink=1),
    case("causal-offset", rows=(40, 130), block_q=32, block_k=32, causal=1, q_offset=90),
    case("decode", rows=(1, 130), block_q=32, block_k=32, causal=1, q_offset=129),
    case("uneven-blocks", rows=(100, 150), block_q=32, block_k=64, lengths=([99], [140]), theta=0.4, seed=1),
    case("sparse", rows=(256, 256), block_q=32, block_k=32, theta=0.9, reach=0, sinks=0),
    case("not-forced", rows=(128, 128), block_q=32, block_k=32, theta=0.9, force_diag=0),
    case("biased", rows=(100, 150), block_q=32, block_k=64, lengths=([99], [140]), heads=(4, 2), positions=40, seed=1),
    case("biased-causal", rows=(40, 130), block_q=32, block_k=32, causal=1, q_offset=90, positions=128),
    case("scaled", scale=0.3, n_sink=2, rows=(128, 192), theta=0.5),
    case("dense-below", rows=(128, 128), block_q=32, block_k=32, theta=0.9, dense_below=128),
    case("not-dense-below", rows=(128, 128), block_q=32, block_k=32, theta=0.9, dense_below=127),
)
# What only the library can: the other rules and the clamps.
RULES = (
    case("top-p", rule=1, theta=0.6, rows=(200, 200), block_q=32, block_k=32),
    case("top-k", rule=2, theta=3, rows=(200, 200), block_q=32, block_k=32, lengths=([190], [190])),
    case("most", max_blocks=2, theta=0.0, rows=(200, 200), block_q=32, block_k=32),
    case("least", min_blocks=3, theta=0.9, rows=(200, 200), block_q=32, block_k=32, causal=1),
)
