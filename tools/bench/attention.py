"""
Times block-DSA against ONNX Runtime's MultiHeadAttention: every kernel set, dense and sparse, f32 and int8, scoring
included, one thread, process CPU time, interleaved, medians. `python tools/bench/attention.py --quick` takes a minute.

Sparse rows are `fused` (scoring and attention) with one theta for all heads, bisected to the kept fraction.
"""

import argparse
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from edgeformer import native
from edgeformer.attention import kernel
from edgeformer.attention.reference import Config, Scorer

HEADS, RANK, KEPT = 12, 32, (0.5, 0.25, 0.125)
# Least speedup over ORT, dense and kept .25, and most scoring cost in percent of ORT; per (dim, N).
GOALS: dict[tuple[str, int], dict[int, float]] = {
    ("f32 dense", 64): {512: 1.0, 2048: 1.05, 3584: 1.05},
    ("f32 dense", 32): {512: 1.0, 2048: 1.05, 3584: 1.05},
    ("f32 0.25", 64): {512: 2.9, 2048: 3.5, 3584: 4.0},
    ("f32 0.25", 32): {512: 3.0, 2048: 3.7, 3584: 4.2},
    ("i8 0.25", 64): {512: 6.0, 2048: 7.5, 3584: 9.0},
    ("i8 0.25", 32): {512: 5.5, 2048: 6.5, 3584: 8.0},
    ("score", 64): {512: 25, 2048: 50, 3584: 67},
    ("score", 32): {512: 25, 2048: 50, 3584: 67},
}


class Entry(NamedTuple):
    kernels: str | None  # None: not ours
    name: str
    kept: float
    run: Callable[[], Any]


def ort_attention(q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """MultiHeadAttention wants [B, N, H * D] and transposes by itself; that is part of what it costs."""
    batch, heads, n, dim = q.shape
    value: Any = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, n, heads * dim])  # noqa: E731
    node = onnx.helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=heads)
    graph = onnx.helper.make_graph([node], "attention", [value(x) for x in "qkv"], [value("o")])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    packed = {
        x: np.ascontiguousarray(t.swapaxes(1, 2)).reshape(batch, n, heads * dim)
        for x, t in zip("qkv", (q, k, v), strict=True)
    }
    return lambda: session.run(None, packed)


def peak() -> tuple[Callable[[], Any], int]:
    """A run of register-only multiply-adds with the best set's flags, and how many operations it is."""
    goal, best = native.TARGETS[native.host()], kernel.kernels()
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/peak.so"
        flags = native.kernel_sets(goal.arch)[best]
        source = str(Path(__file__).parent / "peak.c")
        native.zig(
            "-target",
            goal.triple,
            "-O3",
            "-ffp-contract=fast",
            "-fno-sanitize=all",
            *flags,
            "-shared",
            "-fPIC",
            source,
            "-o",
            made,
        )
        lib = ctypes.CDLL(made)
    lib.peak.restype = ctypes.c_float
    steps = 1_000_000
    return lambda: lib.peak(ctypes.c_long(steps)), steps * ctypes.c_int.in_dll(lib, "peak_operations").value


def theta_for(kept: float, c: Config, q: Any, k: Any, s: Scorer) -> tuple[Scorer, float]:
    low, high, got, tried = 0.0, 1.0, 1.0, s
    for _ in range(16):
        middle = (low + high) / 2
        tried = s._replace(theta=np.full(HEADS, middle, np.float32))
        got = float(kernel.select(c, q, k, tried).cnt.mean()) / -(-k.shape[2] // c.block_k)
        low, high = (middle, high) if got > kept else (low, middle)
    return tried, got


def entries(n: int, dim: int, sets: list[str]) -> list[Entry]:
    rng = np.random.default_rng(n + dim)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    q, k, v, out = *(normal(1, HEADS, n, dim) for _ in range(3)), np.empty((1, HEADS, n, dim), np.float32)
    wq, wk = (normal(HEADS, dim, RANK) * dim**-0.25 for _ in range(2))
    s = Scorer(wq, wk, normal(HEADS, 65) / 2, normal(HEADS, 1), np.zeros(HEADS, np.float32))
    c, tensors = Config(), (kernel.tensor(q), kernel.tensor(k), kernel.tensor(v))
    made = [Entry(None, "ort", 1.0, ort_attention(q, k, v))]
    lists, none, to = kernel.empty_lists(c, q, k), kernel.lengths(None, None), kernel.output(out)
    half, _ = theta_for(0.5, c, q, k, s)
    score = kernel.prepare(
        "dsa_select", kernel.config(c, q, k, s), (*tensors[:2], kernel.scorer(half), none), kernel.addresses(lists)
    )
    thetas = {kept: theta_for(kept, c, q, k, s) for kept in KEPT}
    for name in sets:
        made.append(Entry(name, "score", 0.0, score))
        for compute, precision in ((kernel.F32, "f32"), (kernel.I8, "i8")):
            dense = kernel.config(c, q, k, compute=compute)
            made.append(
                Entry(
                    name,
                    f"{precision} dense",
                    1.0,
                    kernel.prepare("dsa_attend", dense, (*tensors, None, None, none), to),
                )
            )
            for kept, (scorer, got) in thetas.items():
                sparse = kernel.config(replace(c, rule=0), q, k, s, compute)
                run = kernel.prepare("dsa_fused", sparse, (*tensors, kernel.scorer(scorer), none), (*to, None))
                made.append(Entry(name, f"{precision} {kept}", got, run))
    return made


def measure(todo: list[Entry], seconds: float) -> dict[tuple[str | None, str], list[float]]:
    """Rounds over all entries until the time is used; the first round warms up."""
    times: dict[tuple[str | None, str], list[float]] = {(e.kernels, e.name): [] for e in todo}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 4 or time.monotonic() < end:
        for e in todo:
            if e.kernels:
                kernel.library().dsa_limit(e.kernels.encode())
            begin = time.process_time()
            e.run()
            if rounds:
                times[e.kernels, e.name].append(time.process_time() - begin)
        rounds += 1
    kernel.library().dsa_limit(None)
    return times


def report(n: int, dim: int, sets: list[str], seconds: float, console: Console) -> list[dict[str, Any]]:
    run_peak, operations = peak()
    todo = [*entries(n, dim, sets), Entry(None, "peak", 1.0, run_peak)]
    times = measure(todo, seconds)
    base, work = float(np.median(times[None, "ort"])), 4 * HEADS * n * n * dim
    ceiling = operations / float(np.median(times[None, "peak"])) / 1e9
    table = Table(title=f"N {n}, D {dim}, {HEADS} heads, 1 thread; FMA peak {ceiling:.0f} GF/s")
    for heading in ("kernels", "what", "kept", "ms", "p90", "GF/s", "of peak", "x ORT", "goal"):
        table.add_column(heading, justify="left" if heading in ("kernels", "what", "goal") else "right")
    found = []
    for e in todo[:-1]:
        taken = times[e.kernels, e.name]
        middle = float(np.median(taken))
        speed, rate = base / middle, work * e.kept / middle / 1e9
        goal = GOALS.get((e.name, dim), {}).get(n) if e.kernels == sets[0] else None
        verdict = "" if goal is None else f"{'met' if speed >= goal else 'MISSED'} ({goal})"
        cells = (
            f"{e.kept:.2f}",
            f"{middle * 1e3:.3f}",
            f"{np.quantile(taken, 0.9) * 1e3:.3f}",
            f"{rate:.0f}",
            f"{rate / ceiling:.0%}",
        )
        table.add_row(e.kernels or "onnxruntime", e.name, *cells, f"{speed:.2f}", verdict)
        found.append(
            {
                "n": n,
                "dim": dim,
                "kernels": e.kernels,
                "what": e.name,
                "kept": e.kept,
                "ms": middle * 1e3,
                "times_ort": speed,
                "gflops": rate,
                "peak_gflops": ceiling,
                "rounds": len(taken),
                "goal": goal,
            }
        )
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N 512 and 2048 only, the best kernel set only")
    parser.add_argument("--n", type=lambda x: [int(n) for n in x.split(",")], help="lengths, separated by commas")
    parser.add_argument("--sets", type=lambda x: x.split(","), help="kernel sets (default: all this CPU has)")
    parser.add_argument("--seconds", type=float, default=10, help="per length and dim")
    parser.add_argument("--json", type=Path, default=Path("bench-attention.json"))
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    known = list(native.kernel_sets(native.TARGETS[native.host()].arch))
    sets = given.sets or (
        [kernel.kernels()]
        if given.quick
        else [x for x in known if x != "scalar" and kernel.library().dsa_limit(x.encode())]
    )
    kernel.library().dsa_limit(None)
    console, found = Console(width=110), []
    for n in given.n or ([512, 2048] if given.quick else [128, 512, 2048, 3584]):
        for dim in (64, 32):
            found += report(n, dim, sets, given.seconds, console)
            given.json.write_text(json.dumps(found, indent=1))
    console.print(f"written to {given.json}")


if __name__ == "__main__":
    main()
