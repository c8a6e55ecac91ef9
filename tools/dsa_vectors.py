"""
Writes tests/golden/dsa/index.json: the conformance vectors of edgeformer block-DSA (specification section 13).

Run it only when the operator's definition changes; every runtime reads the result. Inputs are not stored but made
again: s = s * 1664525 + 1013904223 (32 bits), value = ((s >> 8) & 0xffff) / 32768 - 1, from `seed` on, filling q, k, v,
wq, wk, dist_bias, sink_bias in that order, then changed by `edits`. A null in an edit is NaN. A seed is taken only if
no decision of selection is closer than 1e-4, so lists must be equal everywhere. The cases of the list `biased` have one
more operand, filled last: position_bias, for distances up to `positions`. `python tools/dsa_vectors.py` from the
repository.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from edgeformer.attention import reference as ref  # noqa: E402

INDEX = ROOT / "tests" / "golden" / "dsa" / "index.json"
SAMPLES, SMALL, MARGIN = 64, 128, 1e-4
TENSORS = ("q", "k", "v", "wq", "wk", "dist_bias", "sink_bias", "position_bias")
SHAPE = {
    "batch": 1,
    "q_heads": 2,
    "kv_heads": 2,
    "q_rows": 192,
    "k_rows": 192,
    "dim": 32,
    "rank": 8,
    "dist": 4,
    "sinks": 1,
}
ATTRIBUTES = {name: field.default for name, field in ref.Config.__dataclass_fields__.items()}
MIDDLE = {ref.THRESHOLD: 0.2, ref.TOP_P: 0.75, ref.TOP_K: 2.0}


def fill(seed: int, count: int) -> np.ndarray[Any, Any]:
    """The first `count` values of the generator; the closed form of a linear recurrence, in wrapping arithmetic."""
    with np.errstate(over="ignore"):
        power = np.cumprod(np.full(count, 1664525, np.uint32), dtype=np.uint32)
        series = np.cumsum(np.concatenate([np.ones(1, np.uint32), power[:-1]]), dtype=np.uint32)
        s = power * np.uint32(seed) + np.uint32(1013904223) * series
    return (((s >> 8) & 0xFFFF).astype(np.float64) / 32768 - 1).astype(np.float32)


class Operands(NamedTuple):
    """What the reference and the kernels take."""

    config: ref.Config
    qkv: tuple[ref.Array, ref.Array, ref.Array]
    scorer: ref.Scorer
    length: tuple[ref.Array | None, ref.Array | None]
    position_bias: ref.Array | None = None


def shapes(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    b, h, g, d, r = (case[x] for x in ("batch", "q_heads", "kv_heads", "dim", "rank"))
    kv = (b, g, case["k_rows"], d)
    scorer = {"wq": (1, h, d, r), "wk": (1, h, d, r)}
    biases = {"dist_bias": (1, h, 1, 2 * case["dist"] + 1), "sink_bias": (1, h, 1, case["sinks"])}
    if "positions" in case:
        biases["position_bias"] = (1, h, 1, 2 * case["positions"] + 1)
    return {"q": (b, h, case["q_rows"], d), "k": kv, "v": kv, **scorer, **biases}


def inputs(case: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The operands of a case, all with four axes."""
    sizes = shapes(case)
    stream = fill(case["seed"], sum(int(np.prod(s)) for s in sizes.values()))
    tensors, at = {}, 0
    for name in TENSORS[: len(sizes)]:
        count = int(np.prod(sizes[name]))
        tensors[name], at = stream[at : at + count].reshape(sizes[name]).copy(), at + count
    for name, operation, b, h, n0, n1, d0, d1, value in case["edits"]:
        part = (slice(None) if b < 0 else b, slice(None) if h < 0 else h, slice(n0, n1), slice(d0, d1))
        number = np.float32(np.nan if value is None else value)
        old = tensors[name][part]
        tensors[name][part] = {"set": number, "add": old + number, "mul": old * number}[operation]
    return tensors


def operands(case: dict[str, Any]) -> Operands:
    t = inputs(case)
    heads, dim, rank = case["q_heads"], case["dim"], case["rank"]
    scorer = ref.Scorer(
        t["wq"].reshape(heads, dim, rank),
        t["wk"].reshape(heads, dim, rank),
        t["dist_bias"].reshape(heads, -1),
        t["sink_bias"].reshape(heads, -1),
        np.array(case["theta"], np.float32),
    )
    q_len, kv_len = (None if case[x] is None else np.array(case[x], np.int32) for x in ("q_len", "kv_len"))
    attributes = ref.Config(**{x: case[x] for x in ATTRIBUTES})
    position_bias = t["position_bias"].reshape(heads, -1) if "position_bias" in t else None
    return Operands(attributes, (t["q"], t["k"], t["v"]), scorer, (q_len, kv_len), position_bias)


def nearest(o: Operands) -> float:
    rows = ref.mass_rows(o.config, o.qkv[0], o.qkv[1], o.scorer, *o.length)
    heads = ((row, mass, theta) for row in rows for mass, theta in zip(row.mass, o.scorer.theta, strict=True))
    k_rows = o.qkv[1].shape[2]
    return min((ref.margin(o.config, mass, row.forced, theta, k_rows) for row, mass, theta in heads), default=np.inf)


def ragged(lists: ref.Lists) -> list[list[int]]:
    flat = lists.idx.reshape(-1, lists.idx.shape[-1])
    return [row[:n].tolist() for row, n in zip(flat, lists.cnt.reshape(-1), strict=True)]


def padded(rows: list[list[int]], shape: tuple[int, ...]) -> ref.Lists:
    idx = np.full((len(rows), shape[-1]), -1, np.int32)
    for to, row in zip(idx, rows, strict=True):
        to[: len(row)] = row
    return ref.Lists(idx.reshape(shape), np.array([len(r) for r in rows], np.int32).reshape(shape[:-1]))


def list_shape(case: dict[str, Any]) -> tuple[int, ...]:
    heads = case["kv_heads"] if case["select_per_kv"] else case["q_heads"]
    n = ref.blocks(case["k_rows"], case["block_k"])
    return (case["batch"], heads, ref.blocks(case["q_rows"], case["block_q"]), min(case["max_blocks"] or n, n))


def finish(case: dict[str, Any]) -> dict[str, Any]:
    """Finds a seed whose decisions are clear and adds what must come out."""
    for seed in range(case["seed"], case["seed"] + 400):
        case["seed"] = seed
        c, qkv, scorer, length, position_bias = whole_case = operands(case)
        near = np.inf if case["exact"] or "lists" in case else nearest(whole_case)
        if near >= MARGIN:
            break
    else:
        raise SystemExit(f"{case['name']}: no seed with a clear margin")
    if "lists" not in case:
        case["lists"] = ragged(ref.select(c, qkv[0], qkv[1], scorer, *length))
    lists = padded(case["lists"], list_shape(case))
    out = ref.attend(c, *qkv, lists, *length, position_bias=position_bias).reshape(-1)
    at = np.arange(out.size)
    if out.size > SMALL:
        at = np.sort(np.random.default_rng(seed).choice(out.size, SAMPLES, False))
    keys = np.arange(case["k_rows"]) < ref.lengths(length[1], case["batch"], case["k_rows"])[:, None]
    top = float(np.abs(np.where(keys[:, None, :, None], qkv[2], 0)).max())
    numbers = [None if np.isnan(x) else float(f"{x:.9g}") for x in out[at]]
    return case | {
        "margin": None if near == np.inf else round(near, 6),
        "max_v": top,
        "at": at.tolist(),
        "out": numbers,
    }


def case(name: str, **given: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {
        "name": name,
        "seed": 1,
        "exact": 0,
        "compute": 0,
        "bnhd": 0,
        "edits": [],
        "q_len": None,
        "kv_len": None,
    }
    made = fixed | SHAPE | ATTRIBUTES | {"scorer_gain": 6, "theta": None} | given
    heads = made["kv_heads"] if made["select_per_kv"] else made["q_heads"]
    theta = MIDDLE[made["rule"]] if made["theta"] is None else made["theta"]
    made["theta"] = [theta] * heads if np.isscalar(theta) else theta
    gain = made.pop("scorer_gain")
    made["edits"] = [["wq", "mul", -1, -1, 0, made["dim"], 0, made["rank"], gain], *made["edits"]]
    return made


def rows(n: int) -> dict[str, int]:
    return {"q_rows": n, "k_rows": n}


def whole(
    name: str, operation: str, n0: int, n1: int, value: float | None, dim: int = 32, b: int = -1, h: int = -1
) -> list[Any]:
    return [name, operation, b, h, n0, n1, 0, dim, value]


def shape_cases() -> list[dict[str, Any]]:
    made = []
    for x, n in enumerate((1, 31, 32, 33, 63, 64, 65, 257, 500)):
        for block in (32, 64):
            dim = (32, 64, 96, 128)[(x + block // 64) % 4]
            made.append(case(f"shape-{n}-block-{block}-dim-{dim}", **rows(n), block_q=block, block_k=block, dim=dim))
    made.append(case("shape-block_q-64-block_k-32", **rows(257), block_k=32, dim=64))
    made.append(case("shape-block_q-16-block_k-128", **rows(257), block_q=16, block_k=128, dim=64))
    made.append(case("shape-block_q-128-block_k-16-cross", q_rows=130, k_rows=97, block_q=128, block_k=16, dim=64))
    made.append(case("shape-rank-32", **rows(257), rank=32, dim=64, scale=0.2, scorer_gain=2))
    return made


def rule_cases() -> list[dict[str, Any]]:
    made = []
    for rule, thetas in ((0, (0, 1e-3, 0.2, 1, 1.5)), (1, (0, 1e-3, 0.75, 1, 1.5)), (2, (0, 1.9, 3, 100))):
        for theta in thetas:
            made.append(
                case(f"rule-{rule}-theta-{theta:g}", rule=rule, theta=float(theta), **rows(257), block_q=32, block_k=32)
            )
    made.append(case("rule-0-theta-per-head", theta=[0.05, 0.4], **rows(257)))
    return made


def clamp_cases() -> list[dict[str, Any]]:
    made = []
    for rule in (0, 1, 2):
        wide = dict(rule=rule, **rows(257), block_q=32, block_k=32)
        made.append(case(f"clamp-min-above-rule-{rule}", min_blocks=4, theta=(0.9, 0.1, 1.0)[rule], **wide))
        made.append(case(f"clamp-max-below-rule-{rule}", max_blocks=2, theta=(0.01, 0.99, 7.0)[rule], **wide))
        made.append(case(f"clamp-max-below-forced-{rule}", max_blocks=2, n_sink=3, block_q=64, block_k=32, rule=rule))
    made.append(case("clamp-min-above-candidates", min_blocks=50))
    return made


def forced_cases() -> list[dict[str, Any]]:
    wide = dict(**rows(257), block_q=32, block_k=32, theta=0.6)
    return [
        case("forced-none", force_diag=0, min_blocks=0, **wide),
        case("forced-sink", n_sink=1, **wide),
        case("forced-sink-only", n_sink=2, force_diag=0, **wide),
        case("forced-causal-row-0", causal=1, n_sink=1, **wide),
    ]


def tie_cases() -> list[dict[str, Any]]:
    flat: dict[str, Any] = {
        "scorer_gain": 0,
        "exact": 1,
        "edits": [["dist_bias", "set", -1, -1, 0, 1, 0, 9, 0], ["sink_bias", "set", -1, -1, 0, 1, 0, 1, 0]],
    }
    across = flat | {"scorer_gain": 6, "edits": [*flat["edits"], whole("k", "set", 32, 192, 0.25)]}
    wide = dict(block_q=32, block_k=32)
    return [
        case("tie-all-top_k", rule=2, theta=3.0, **wide, **flat),
        case("tie-all-top_p", rule=1, theta=0.4, **wide, **flat),
        case("tie-all-threshold", theta=0.1, **wide, **flat),
        case("tie-across-the-cut", rule=2, theta=3.0, **wide, **across),
        case("tie-across-max_blocks", theta=0.0, max_blocks=3, **wide, **across),
    ]


def special_cases() -> list[dict[str, Any]]:
    wide = dict(block_q=32, block_k=32, exact=1)
    nan_score = [["dist_bias", "set", -1, -1, 0, 1, 4, 5, None]]
    return [
        case("nan-score-forced", theta=0.2, edits=nan_score, dist=4, **{**wide, "exact": 0}),
        case("nan-score-free-threshold-0", theta=0.0, force_diag=0, edits=nan_score, **wide),
        case("nan-score-free-top_k", rule=2, theta=2.0, force_diag=0, edits=nan_score, **{**wide, "exact": 0}),
        case("nan-score-everywhere", rule=2, theta=2.0, edits=[["dist_bias", "set", -1, -1, 0, 1, 0, 9, None]], **wide),
        case(
            "huge-scores",
            rule=2,
            theta=3.0,
            edits=[
                whole("dist_bias", "set", 0, 1, 3.2e38, 3),
                whole("sink_bias", "set", 0, 1, 3.2e38, 1),
                ["dist_bias", "set", -1, -1, 0, 1, 6, 7, -3e38],
            ],
            **wide,
        ),
        case(
            "underflow-of-a-one-token-block",
            **rows(33),
            theta=0.0,
            force_diag=0,
            edits=[["dist_bias", "set", -1, -1, 0, 1, 5, 6, -300]],
            **wide,
        ),
    ]


def padding_cases() -> list[dict[str, Any]]:
    made = []
    for name, length in (("full", 192), ("one", 1), ("edge", 64), ("inside", 100), ("zero", 0)):
        garbage = [whole(x, "set", length, 192, None) for x in "qkv"]
        made.append(case(f"padding-{name}", q_len=[length], kv_len=[length], edits=garbage, block_k=32))
    made.append(case("padding-keys-only", kv_len=[70], edits=[whole(x, "set", 70, 192, None) for x in "kv"]))
    made.append(case("padding-queries-only", q_len=[70], edits=[whole("q", "set", 70, 192, None)]))
    two = [whole(x, "set", n, 192, None, b=b) for x in "qkv" for b, n in ((0, 150), (1, 33))]
    lengths = {"q_len": [150, 33], "kv_len": [150, 33]}
    made.append(case("batch-2-lengths", batch=2, edits=two, **lengths))
    made.append(case("batch-2-lengths-bnhd-causal", batch=2, edits=two, bnhd=1, causal=1, **lengths))
    return made


def causal_cases() -> list[dict[str, Any]]:
    return [
        case("causal-prefill", causal=1, **rows(257), dim=64),
        case("causal-prefill-32", causal=1, **rows(200), block_q=32, block_k=32, rule=1),
        case("causal-chunk", causal=1, q_rows=50, k_rows=257, q_offset=207, block_k=32),
        case("causal-chunk-odd-offset", causal=1, q_rows=40, k_rows=200, q_offset=33, block_q=32, block_k=32, rule=2),
        case("causal-decode", causal=1, q_rows=1, k_rows=300, q_offset=299, dim=64, scorer_gain=1),
        case(
            "causal-decode-cache",
            causal=1,
            q_rows=1,
            k_rows=300,
            q_offset=149,
            kv_len=[150],
            scorer_gain=1,
            edits=[whole(x, "set", 150, 300, None) for x in "kv"],
        ),
        case("causal-block_q-128-block_k-32", causal=1, **rows(257), block_q=128, block_k=32),
    ]


def head_cases() -> list[dict[str, Any]]:
    made = []
    for heads, groups in ((4, 2), (4, 1)):
        for per_kv in (0, 1):
            wide = dict(q_heads=heads, kv_heads=groups, select_per_kv=per_kv)
            made.append(case(f"gqa-{heads}-{groups}-per_kv-{per_kv}", **wide, causal=per_kv, block_k=32))
    made.append(case("gqa-4-2-per_kv-top_p-bnhd", q_heads=4, kv_heads=2, select_per_kv=1, rule=1, bnhd=1))
    return made


def bias_cases() -> list[dict[str, Any]]:
    return [
        case("bias-distance-beyond-R", dist=2, **rows(257), block_q=32, block_k=32, scorer_gain=1, theta=0.1),
        case("bias-R-0", dist=0, block_k=32),
        case("bias-S-0", sinks=0, block_k=32),
        case("bias-S-above-blocks", sinks=9, block_k=32),
    ]


def list_cases() -> list[dict[str, Any]]:
    def given(name: str, lists: list[list[int]], **more: Any) -> dict[str, Any]:
        return case(name, q_heads=1, kv_heads=1, **more) | {"lists": lists}

    return [
        given("lists-empty", [[], [1], []]),
        given("lists-full", [[0, 1, 2]] * 3),
        given("lists-future-only", [[1, 2], [2], [0]], causal=1),
        given("lists-partly-future", [[0, 2], [0, 1, 2], [2]], causal=1, block_k=64),
        given(
            "lists-beyond-length", [[0, 2], [2], [1]], kv_len=[70], edits=[whole(x, "set", 70, 192, None) for x in "kv"]
        ),
        given("lists-strided", [[0], [0, 2], [1]], bnhd=1, dim=64),
    ]


def int8_cases() -> list[dict[str, Any]]:
    wide = dict(compute=1, dim=64, rule=2, theta=2.0)
    return [
        case("i8-plain", **wide),
        case("i8-dim-32-block-32-tail", **{**wide, "dim": 32}, **rows(150), block_q=32, block_k=32),
        case("i8-constant-k", edits=[whole("k", "set", 0, 192, 0.5, 64)], exact=1, **wide),
        case("i8-offset-k", edits=[["k", "add", -1, -1, 0, 192, 3, 4, 20.0]], exact=1, **{**wide, "theta": 3.0}),
        case("i8-outlier-channel-v", edits=[["v", "mul", -1, -1, 0, 192, 7, 8, 30.0]], **wide),
        case("i8-zero-query-row", edits=[whole("q", "set", 5, 6, 0, 64)], **wide),
        case(
            "i8-causal-padding",
            causal=1,
            q_len=[100],
            kv_len=[100],
            edits=[whole(x, "set", 100, 192, None, 64) for x in "qkv"],
            **wide,
        ),
        case("i8-gqa-bnhd-batch-2", batch=2, q_heads=4, bnhd=1, **wide),
    ]


def dense_cases() -> list[dict[str, Any]]:
    return [
        case("dense_below-at", dense_below=192, theta=0.9),
        case("dense_below-above", dense_below=191, theta=0.9),
        case("dense_below-clamped", dense_below=192, max_blocks=2),
    ]


def position_cases() -> list[dict[str, Any]]:
    """Distances within the table and beyond; int8; queries that start after the first key."""

    def far(positions: int) -> dict[str, Any]:
        return {"positions": positions, "edits": [["position_bias", "mul", -1, -1, 0, 1, 0, 2 * positions + 1, 4]]}

    padded = [whole(x, "set", n, 192, None, b=b) for x in "qkv" for b, n in ((0, 150), (1, 33))]
    lengths = {"q_len": [150, 33], "kv_len": [150, 33]}
    return [
        case("position-within", **rows(200), block_q=32, block_k=32, **far(128)),
        case("position-beyond", **rows(257), dim=64, theta=0.05, **far(20)),
        case("position-padded", batch=2, block_k=32, **lengths, **(far(60) | {"edits": far(60)["edits"] + padded})),
        case("position-causal-chunk", causal=1, q_rows=50, k_rows=257, q_offset=207, block_k=32, **far(60)),
        case("position-gqa-bnhd", q_heads=4, select_per_kv=1, bnhd=1, block_q=128, block_k=16, **far(9)),
        case("position-i8", compute=1, dim=64, rule=2, theta=2.0, **far(40)),
        case("position-i8-causal", compute=1, causal=1, dim=64, **rows(150), block_q=32, block_k=32, **far(40)),
    ]


def lines(made: list[dict[str, Any]]) -> str:
    return ",\n".join(json.dumps(one, separators=(",", ":"), allow_nan=False) for one in made)


def main() -> None:
    groups = [shape_cases, rule_cases, clamp_cases, forced_cases, tie_cases, special_cases, padding_cases]
    groups += [causal_cases, head_cases, bias_cases, list_cases, int8_cases, dense_cases]
    made = [finish(one) for group in groups for one in group()]
    biased = [finish(one) for one in position_cases()]
    INDEX.parent.mkdir(parents=True, exist_ok=True)
    # A list of their own: a reader from before this operand does not meet them.
    INDEX.write_text(
        '{"version":1,"about":"written by tools/dsa_vectors.py",'
        f'"cases":[\n{lines(made)}\n],"biased":[\n{lines(biased)}\n]}}\n'
    )
    print(f"{len(made)} cases and {len(biased)} with a position bias, {INDEX.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
