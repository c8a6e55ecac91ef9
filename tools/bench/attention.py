"""
Times block-DSA against ONNX Runtime's MultiHeadAttention: every kernel set, dense and sparse, f32 and int8, scoring
included, one thread, process CPU time, interleaved, medians. `python tools/bench/attention.py --quick` takes a minute.
`--threads 2` holds two threads of ONNX Runtime against one instead, the operator as a node in it, by the wall clock:
it needs an idle machine, and says the load.

Sparse rows are `fused` (scoring and attention), one theta for all heads, bisected to the kept fraction. Causal rows are
dense attention of which the future is left out, against ONNX Runtime's full attention. "Of peak" is the share of the
multiply-adds that a register-only loop does right after that contender, for .3 ms: at the clock it left, which is 6 %
lower than what that loop reaches alone. Two libraries' product of 1024^3, which has no softmax in it, is next to it.
Our calls take turns on 13 outputs and workspaces: each writes where none has written for a round, and the luck of pages
in the second-level cache, which shifts a row that keeps its memory by up to 5 %, averages out. Before a call is timed,
the same is done with 16 tokens: data are cold, the interpreter and the code are not (they cost 50 us, a sixth of what
scoring 512 tokens takes, and no product pays them).
The break-even is the kept fraction at which sparse takes as long as our own dense attention. "score alone" is selection
by itself after a matrix product, so that all of Q and K are far away. No model does that: in one call with attention
they are read anyway, so scoring adds less, which is printed under the table.
"""

import argparse
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before the libraries that read them

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table

from edgeformer import native
from edgeformer.attention import kernel, onnx_function
from edgeformer.attention.reference import Config, Scorer

HEADS, RANK, KEPT = 12, 32, (0.5, 0.25, 0.125)
LAYERS = 8  # of one run, when threads are compared
PRODUCT = 1024  # rows, columns and depth
SCORED = "scored, all kept"  # what a threshold of 0 costs
SCORE = "score alone"
PLACES = 13  # more than a round has calls of one kernel set
SMALL = 16  # tokens of the call before the one that is timed
PROBE = 200_000  # steps of the loop that measures the peak
OF_PEAK = 0.77  # least share of the FMA peak: f32 dense, D 64, from 1,024 tokens
BREAK_EVEN = 0.95  # least, from 512 tokens
TWO_THREADS = 1.8  # least speedup
# Least speedup over ORT, dense and kept .25, and most scoring cost in percent of ORT; per (dim, N).
GOALS: dict[tuple[str, int], dict[int, float]] = {
    ("f32 dense", 64): {512: 1.0, 2048: 1.05, 3584: 1.05},
    ("f32 dense", 32): {512: 1.0, 2048: 1.05, 3584: 1.05},
    ("f32 0.25", 64): {512: 2.9, 2048: 3.5, 3584: 4.0},
    ("f32 0.25", 32): {512: 3.0, 2048: 3.7, 3584: 4.2},
    ("i8 0.25", 64): {512: 6.0, 2048: 7.5, 3584: 9.0},
    ("i8 0.25", 32): {512: 5.5, 2048: 6.5, 3584: 8.0},
    (SCORE, 64): {512: 25, 2048: 50, 3584: 67},
    (SCORE, 32): {512: 25, 2048: 50, 3584: 67},
}


class Entry(NamedTuple):
    kernels: str | None  # None: not ours
    name: str
    kept: float
    run: Callable[[], Any]
    operations: float  # that count as done, in one run
    warm: Callable[[], Any] = lambda: None  # before the clock starts


Times = dict[tuple[str | None, str], list[float]]


class Measured(NamedTuple):
    """Seconds per round; `after` those of the peak's loop that followed."""

    times: Times
    after: Times


def products() -> list[Entry]:
    """Square f32 matrix products by the libraries that torch and numpy call, each with what it calls itself."""
    a, b = (np.random.default_rng(i).standard_normal((PRODUCT, PRODUCT), np.float32) for i in (1, 2))
    out, into = np.empty_like(a), torch.empty(PRODUCT, PRODUCT)
    x, y, operations = torch.from_numpy(a), torch.from_numpy(b), 2.0 * PRODUCT**3
    torch.set_num_threads(1)
    blas: Any = np.show_config(mode="dicts")
    name = blas["Build Dependencies"]["blas"]["name"]
    library = "MKL" if torch.backends.mkl.is_available() else "own"
    return [
        Entry(None, f"product, torch ({library})", 1.0, lambda: torch.mm(x, y, out=into), operations),
        Entry(None, f"product, numpy ({name})", 1.0, lambda: np.matmul(a, b, out=out), operations),
    ]


def in_runtime(
    node: Any,
    operands: dict[str, Any],
    threads: int,
    layers: int,
    weights: Sequence[Any] = (),
    library: str | None = None,
) -> Callable[[], Any]:
    """
    Runs a node `layers` times, into arrays that are there: ONNX Runtime wakes its threads once per run and asks the
    system for memory, and a model has many layers to spread that over.
    """
    shape = list(operands["q"].shape)
    outs = {f"o{i}": np.empty(shape, np.float32) for i in range(layers)}
    nodes = [onnx.helper.make_node(node.op_type, node.input, [o], domain=node.domain) for o in outs]
    for copy in nodes:
        copy.attribute.extend(node.attribute)
    values = (
        [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, shape) for x in xs] for xs in (operands, outs)
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(node.domain, 1)]
    graph = onnx.helper.make_graph(nodes, "attention", *values, weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # equal layers are not one
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else a pool waits on the next one's core
    if library:
        options.register_custom_ops_library(library)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    opened = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    places = opened.io_binding()
    for name, x in operands.items():
        places.bind_cpu_input(name, x)
    for name, x in outs.items():
        places.bind_output(name, "cpu", 0, np.float32, shape, x.ctypes.data)
    keep = (operands, outs)
    return lambda: (opened.run_with_iobinding(places), keep)


def ort_attention(q: Any, k: Any, v: Any, threads: int = 1, layers: int = 1) -> Callable[[], Any]:
    """MultiHeadAttention wants [B, N, H * D] and transposes by itself; that is part of what it costs."""
    batch, heads, n, dim = q.shape
    node = onnx.helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=heads)
    rows = {x: t.swapaxes(1, 2).reshape(batch, n, heads * dim) for x, t in zip("qkv", (q, k, v), strict=True)}
    return in_runtime(node, rows, threads, layers)


def peak(kernels: str) -> tuple[Callable[[], Any], int]:
    """A run of register-only multiply-adds with the flags of a kernel set, and how many operations it is."""
    goal = native.TARGETS[native.host()]
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/peak.so"
        flags = native.kernel_sets(goal.arch)[kernels]
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
    return lambda: lib.peak(ctypes.c_long(PROBE)), PROBE * ctypes.c_int.in_dll(lib, "peak_operations").value


def theta_for(kept: float, c: Config, q: Any, k: Any, s: Scorer) -> tuple[Scorer, float]:
    low, high, got, tried = 0.0, 1.0, 1.0, s
    for _ in range(16):
        middle = (low + high) / 2
        tried = s._replace(theta=np.full(HEADS, middle, np.float32))
        got = float(kernel.select(c, q, k, tried).cnt.mean()) / -(-k.shape[2] // c.block_k)
        low, high = (middle, high) if got > kept else (low, middle)
    return tried, got


class Case(NamedTuple):
    """Random operands of one length and dim, and the calls of the core on them."""

    c: Config
    q: Any
    k: Any
    v: Any
    scorer: Scorer
    places: list[tuple[Any, Any]]  # outputs and workspaces
    turn: Iterator[int]

    def in_turn(self, made: Callable[[Any, Any], Callable[[], None]]) -> Callable[[], None]:
        """The call that `made` makes of an output and a workspace, each time in another place."""
        calls = [made(*place) for place in self.places]
        return lambda: calls[next(self.turn) % len(calls)]()

    @property
    def operations(self) -> float:
        return 4.0 * HEADS * self.q.shape[2] ** 2 * self.q.shape[3]

    def dense(self, compute: int, causal: int = 0) -> Callable[[], None]:
        tensors = tuple(map(kernel.tensor, (self.q, self.k, self.v)))
        config = kernel.config(replace(self.c, causal=causal), self.q, self.k, compute=compute)
        before = (*tensors, None, None, kernel.lengths(None, None))
        return self.in_turn(
            lambda out, work: kernel.prepare("dsa_attend", config, before, kernel.output(out), work=work)
        )

    def sparse(self, compute: int, scorer: Scorer) -> Callable[[], None]:
        tensors = tuple(map(kernel.tensor, (self.q, self.k, self.v)))
        config = kernel.config(replace(self.c, rule=0), self.q, self.k, scorer, compute)
        before = (*tensors, kernel.scorer(scorer), kernel.lengths(None, None))
        return self.in_turn(
            lambda out, work: kernel.prepare("dsa_fused", config, before, (*kernel.output(out), None), work=work)
        )

    def node(self, compute: int, scorer: Scorer, threads: int, layers: int, dense: bool) -> Callable[[], Any]:
        """The operator in ONNX Runtime, whose threads do the work."""
        operands = dict(zip("qkv", (self.q, self.k, self.v), strict=True))
        weights = [onnx.numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in scorer._asdict().items()]
        node = onnx.helper.make_node(
            onnx_function.NAME,
            [*operands, *(w.name for w in weights)],
            ["o"],
            domain=onnx_function.DOMAIN,
            compute=compute,
            dense_below=2**30 if dense else 0,
        )
        return in_runtime(node, operands, threads, layers, weights, str(native.binding("onnx")))

    def score(self, scorer: Scorer) -> Callable[[], None]:
        lists, none = kernel.empty_lists(self.c, self.q, self.k), kernel.lengths(None, None)
        operands = (kernel.tensor(self.q), kernel.tensor(self.k), kernel.scorer(scorer), none)
        config = kernel.config(self.c, self.q, self.k, scorer)
        return self.in_turn(
            lambda _, work: kernel.prepare("dsa_select", config, operands, kernel.addresses(lists), work=work)
        )

    def keeping(self, kept: float) -> tuple[Scorer, float]:
        return theta_for(kept, self.c, self.q, self.k, self.scorer)


def case(n: int, dim: int) -> Case:
    rng = np.random.default_rng(n + dim)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    q, k, v = (normal(1, HEADS, n, dim) for _ in range(3))
    wq, wk = (normal(HEADS, dim, RANK) * dim**-0.25 for _ in range(2))
    scorer = Scorer(wq, wk, normal(HEADS, 65) / 2, normal(HEADS, 1), np.zeros(HEADS, np.float32))
    configs = (kernel.config(Config(), q, k, scorer, compute) for compute in (kernel.F32, kernel.I8))
    size = max(kernel.library().dsa_workspace(ctypes.byref(c), 1) for c in configs)
    places = [(np.zeros_like(q), np.zeros(size, np.uint8)) for _ in range(PLACES)]
    return Case(Config(), q, k, v, scorer, places, count())


def entries(n: int, dim: int, sets: list[str]) -> list[Entry]:
    x = case(n, dim)
    made = [Entry(None, "ort", 1.0, ort_attention(x.q, x.k, x.v), x.operations)]
    thetas = {kept: x.keeping(kept) for kept in KEPT}
    seen = (1 + 1 / n) / 2  # of all pairs of tokens
    for name in sets:
        made.append(Entry(name, SCORE, 0.0, x.score(thetas[0.5][0]), 0.0))
        for compute, precision in ((kernel.F32, "f32"), (kernel.I8, "i8")):
            made.append(Entry(name, f"{precision} dense", 1.0, x.dense(compute), x.operations))
            made.append(Entry(name, f"{precision} causal", seen, x.dense(compute, 1), seen * x.operations))
            made.append(Entry(name, f"{precision} {SCORED}", 1.0, x.sparse(compute, x.scorer), x.operations))
            for kept, (scorer, got) in thetas.items():
                run = x.sparse(compute, scorer)
                made.append(Entry(name, f"{precision} {kept}", got, run, got * x.operations))
    return made


def measure(
    todo: list[Entry],
    seconds: float,
    clock: Callable[[], float] = time.process_time,
    probe: Callable[[], Any] = lambda: None,
) -> Measured:
    """
    Rounds over all entries, each followed by `probe`, until the time is used; the first round warms up. Every round has
    another order: what runs before a contender leaves it a clock and a cache.
    """
    order = np.random.default_rng(1)
    times: Times = {(e.kernels, e.name): [] for e in todo}
    after: Times = {key: [] for key in times}
    end, rounds = time.monotonic() + seconds, 0
    while rounds < 4 or time.monotonic() < end:
        for e in map(todo.__getitem__, order.permutation(len(todo))):
            if e.kernels:
                kernel.library().dsa_limit(e.kernels.encode())
            e.warm()
            begin = clock()
            e.run()
            done = clock()
            probe()
            start = clock()  # of the second one, which nothing cold slows down
            probe()
            if rounds:
                times[e.kernels, e.name].append(done - begin)
                after[e.kernels, e.name].append(clock() - start)
        rounds += 1
    kernel.library().dsa_limit(None)
    return Measured(times, after)


def after_both(one: Callable[[], Any], other: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (one(), other())


def ratio(over: list[float], under: list[float]) -> float:
    """The median over the rounds: what slows the machine down slows both."""
    return float(np.median([a / b for a, b in zip(over, under, strict=True)]))


def break_even(times: Times, kernels: str, precision: str, half: float) -> float:
    """The kept fraction at which sparse costs what dense does, on the line through about .5 and all."""
    dense, all_kept, some = (times[kernels, f"{precision} {x}"] for x in ("dense", SCORED, 0.5))
    slope = ratio(all_kept, dense) - ratio(some, dense)
    return min(half + (1 - half) * (1 - ratio(some, dense)) / slope, 1.0)


def verdict(value: float, least: float | None) -> str:
    return "" if least is None else f"{'met' if value >= least else 'MISSED'} ({least:g})"


def report(n: int, dim: int, sets: list[str], seconds: float, console: Console) -> list[dict[str, Any]]:
    run_peak, operations = peak(sets[0])
    small, others = entries(SMALL, dim, sets), products()
    todo = [e._replace(warm=w.run) for e, w in zip(entries(n, dim, sets), small, strict=True)] + others
    todo = [e._replace(warm=after_both(others[0].run, e.warm)) if e.name == SCORE else e for e in todo]
    times, after = measure(todo, seconds, probe=run_peak)
    base = times[None, "ort"]
    peaks = {key: operations / float(np.median(ceiling)) / 1e9 for key, ceiling in after.items()}
    clocks = f"{min(peaks.values()):.0f} to {max(peaks.values()):.0f} GF/s"
    table = Table(title=f"N {n}, D {dim}, {HEADS} heads, 1 thread; FMA peak {clocks}")
    for heading in ("kernels", "what", "kept", "ms", "p90", "GF/s", "of peak", "x ORT", "goal"):
        table.add_column(heading, justify="left" if heading in ("kernels", "what", "goal") else "right")
    found = []
    for e in todo:
        taken, ceiling = times[e.kernels, e.name], after[e.kernels, e.name]
        ms, p90 = (1e3 * float(np.quantile(taken, q)) for q in (0.5, 0.9))
        speed, of_peak = ratio(base, taken), ratio(ceiling, taken) * e.operations / operations
        goal, peak_goal = _goals(e, n, dim, sets[0])
        verdicts = [verdict(speed, goal), verdict(of_peak, peak_goal) and f"peak {verdict(of_peak, peak_goal)}"]
        share = f"{of_peak:.0%}" if e.kernels in (None, sets[0]) else ""  # of that set's vectors
        cells = (f"{e.kept:.2f}", f"{ms:.3f}", f"{p90:.3f}", f"{e.operations / ms / 1e6:.0f}", share)
        times_ort = "" if e.name.startswith("product") else f"{speed:.2f}"
        table.add_row(e.kernels or "", e.name, *cells, times_ort, ", ".join(v for v in verdicts if v))
        line = {"n": n, "dim": dim, "kernels": e.kernels, "what": e.name, "kept": e.kept, "ms": ms, "p90_ms": p90}
        line |= {"times_ort": speed, "gflops": e.operations / ms / 1e6, "of_peak": of_peak}
        line["peak_gflops"] = peaks[e.kernels, e.name]
        found.append(line | {"rounds": len(taken), "goal": goal, "goal_of_peak": peak_goal})
    console.print(table)
    return found + _break_evens(n, dim, sets, todo, times, console)


def _goals(e: Entry, n: int, dim: int, best: str) -> tuple[float | None, float | None]:
    """Least speedup over ORT, and least share of the peak; of the best kernel set."""
    if e.kernels != best:
        return None, None
    return GOALS.get((e.name, dim), {}).get(n), OF_PEAK if (e.name, dim) == ("f32 dense", 64) and n >= 1024 else None


def _break_evens(
    n: int, dim: int, sets: list[str], todo: list[Entry], times: Times, console: Console
) -> list[dict[str, Any]]:
    half, found, ort = next(e.kept for e in todo if e.name == "f32 0.5"), [], times[None, "ort"]
    for kernels in sets:
        for precision in ("f32", "i8"):
            kept = break_even(times, kernels, precision, half)
            all_kept, dense = (ratio(times[kernels, f"{precision} {x}"], ort) for x in (SCORED, "dense"))
            goal = BREAK_EVEN if n >= 512 and kernels == sets[0] else None
            console.print(
                f"  {kernels} {precision}: sparse breaks even at {kept:.3f} kept {verdict(kept, goal)}; "
                f"scoring in the call adds {all_kept - dense:.1%} of ORT"
            )
            line = {"n": n, "dim": dim, "kernels": kernels, "what": f"{precision} break-even", "kept": kept}
            found.append(line | {"scoring_of_ort": all_kept - dense})
    return found


def scaling(n: int, dim: int, threads: int, seconds: float, console: Console) -> list[dict[str, Any]]:
    """Several threads of ONNX Runtime against one, by the wall clock, the operator through its binding; per layer."""
    x = case(n, dim)
    scorer, _ = x.keeping(0.25)
    todo = []  # one and several take turns: a pool that has just worked spins for a while
    for t in (1, threads):
        todo.append(Entry(None, f"ort {t}", 1.0, ort_attention(x.q, x.k, x.v, t, LAYERS), x.operations))
    for compute, precision in ((kernel.F32, "f32"), (kernel.I8, "i8")):
        for kept in (1.0, 0.25):
            for t in (1, threads):
                run = x.node(compute, scorer, t, LAYERS, dense=kept == 1)
                todo.append(
                    Entry(None, f"{precision} {'dense' if kept == 1 else kept} {t}", kept, run, kept * x.operations)
                )
    times = measure(todo, seconds, time.perf_counter).times
    table = Table(title=f"N {n}, D {dim}: {threads} threads against 1, wall clock, load {os.getloadavg()[0]:.1f}")
    for heading in ("what", "ms, 1 thread", f"ms, {threads} threads", "speedup", "goal"):
        table.add_column(heading)
    found = []
    for what in ("ort", "f32 dense", "f32 0.25", "i8 dense", "i8 0.25"):
        one, several = (times[None, f"{what} {t}"] for t in (1, threads))
        ms, speed = [1e3 / LAYERS * float(np.median(x)) for x in (one, several)], ratio(one, several)
        goal = TWO_THREADS if what != "ort" and threads == 2 else None
        table.add_row(what, *(f"{x:.3f}" for x in ms), f"{speed:.2f}", verdict(speed, goal))
        found.append({"n": n, "dim": dim, "what": what, "threads": threads, "ms": ms, "speedup": speed, "goal": goal})
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N 512 and 2048 only, the best kernel set only")
    parser.add_argument("--n", type=lambda x: [int(n) for n in x.split(",")], help="lengths, separated by commas")
    parser.add_argument("--sets", type=lambda x: x.split(","), help="kernel sets (default: all this CPU has)")
    parser.add_argument("--seconds", type=float, default=10, help="per length and dim")
    parser.add_argument("--threads", type=int, default=1, help="more than 1: only those against one, on the best set")
    parser.add_argument("--json", type=Path, default=Path("bench-attention.json"))
    given = parser.parse_args()
    if given.threads == 1 and hasattr(os, "sched_setaffinity"):
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
            if given.threads > 1:
                found += scaling(n, dim, given.threads, given.seconds, console)
            else:
                found += report(n, dim, sets, given.seconds, console)
            given.json.write_text(json.dumps(found, indent=1))
    console.print(f"load {os.getloadavg()[0]:.1f}; written to {given.json}")


if __name__ == "__main__":
    main()
