"""
Times a whole encoder, all-MiniLM-L6 with its positions tiled, as the programs that we build: fp32 with ONNX Runtime's
fused attention against ours, dense and sparse, with int8 linear layers and int8 attention.

    python tools/bench/end_to_end.py                     # 512 and 3,500 tokens, ONNX Runtime
    python tools/bench/end_to_end.py --litert 3500       # the same in LiteRT, with our delegate
    python tools/bench/end_to_end.py --profile           # and which operators the time goes to

One thread, process CPU time, programs take turns, ratios within a turn, medians. The row is real text, and thresholds
are those that keep the stated fraction of exactly this row: this measures speed. Positions past 512 are tiled, right in
cost, not in what they mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])  # not this folder: see quality.py

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from edgeformer import formats, model as models, native  # noqa: E402
from edgeformer.attention import scorer, swap  # noqa: E402
from edgeformer.passes import sparsify  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer_agent import native as natives, runners  # noqa: E402
from tools.bench import corpus, quality  # noqa: E402

POSITIONS, HEADS, LAYERS = 3584, 12, 6
ALWAYS = 1 << 20  # dense_below: every candidate is kept, nothing is scored
BASE, DENSE_INT8 = "fp32, ORT fused attention", "int8, our dense int8 attention"
TRAINING_ROWS = 2
# Least speedup over (row, row) at a length.
GOALS = {("int8, DSA int8", BASE, 3500): 4.5, ("int8, DSA int8", DENSE_INT8, 3500): 1.5}
LITERT_BASE = "fp32, XNNPACK"


class Entry(NamedTuple):
    name: str
    program: Program
    ours: bool  # with the operator's library


class Timed(NamedTuple):
    times: list[float]  # seconds of CPU, one a round
    cosine: float  # with the fp32 model in torch
    calls: int  # of our operator, in one run
    kept: float | None


# --- the programs -----------------------------------------------------------------------------------------------------


def sparse(model: models.Model, kept: float, compute: int, trained: Any, stats: Any) -> models.Model:
    """The same encoder through our operator; `kept` 1 is dense and scores nothing."""
    module = copy.deepcopy(model.module)
    config = replace(stats.config, dense_below=ALWAYS if kept == 1 else 0)
    theta = scorer.calibrate(stats, trained.parameters, kept).theta
    parameters = trained.parameters._replace(theta=theta)
    swap.install(module, lambda layer: scorer.one_layer(parameters, layer.number), config, compute)
    return replace(model, module=module)


def programs(model: models.Model, format: str, kept: float, trained: Any, stats: Any) -> Iterator[Entry]:
    """Ours for one format; the two dense references of ONNX Runtime with its fused attention."""
    module = formats.load(format)
    plain = list(module.export(model, ["fp32", "int8"]))
    if format == "onnx":
        yield Entry(BASE, fused(plain[0]), False)
        yield Entry("int8, ORT fused attention", fused(plain[1]), False)
    else:
        yield Entry(LITERT_BASE, plain[0], False)
        yield Entry("int8, XNNPACK", plain[1], False)
    for what, fraction, compute, precision in (
        ("fp32, our dense attention", 1.0, 0, "fp32"),
        (DENSE_INT8, 1.0, 1, "int8"),
        ("int8, DSA fp32", kept, 0, "int8"),
        ("int8, DSA int8", kept, 1, "int8"),
    ):
        (made,) = module.export(sparse(model, fraction, compute, trained, stats), [precision])
        yield Entry(what, made, True)


def fused(program: Program) -> Program:
    """
    Each attention as one MultiHeadAttention: the operator of ONNX Runtime's own fusion, which does not know the shape
    that today's exporter gives to mask and scale.
    """
    proto = onnx.load_from_string(program.files["model.onnx"])
    graph, makers = proto.graph, {out: n for n in proto.graph.node for out in n.output}
    users = {name: n for n in proto.graph.node for name in n.input}
    for softmax in [n for n in graph.node if n.op_type == "Softmax"]:
        product = users[softmax.output[0]]
        reshape = users[users[product.output[0]].output[0]]
        scaled = makers[makers[softmax.input[0]].input[0]]
        logits = makers[scaled.input[0]]
        operands = [makers[makers[name].input[0]].input[0] for name in (*logits.input, product.input[1])]
        (scale,) = [i for i in graph.initializer if i.name == scaled.input[1]]
        node = onnx.helper.make_node(
            "MultiHeadAttention",
            [*operands, "", "attention_mask"],
            [reshape.output[0]],
            domain="com.microsoft",
            num_heads=HEADS,
            scale=float(onnx.numpy_helper.to_array(scale)),
        )
        graph.node.insert(list(graph.node).index(reshape), node)
        graph.node.remove(reshape)
    _drop_unused(graph)
    kinds = Counter(n.op_type for n in graph.node)
    assert kinds["MultiHeadAttention"] == LAYERS and not kinds["Softmax"], kinds
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return replace(program, files={"model.onnx": proto.SerializeToString()})


def _drop_unused(graph: Any) -> None:
    used = {x.name for x in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)


# --- measuring --------------------------------------------------------------------------------------------------------


def opened(entry: Entry, folder: Path) -> tuple[Callable[[Any], Any], natives.Journal | None]:
    path = folder / entry.program.entry
    folder.mkdir()
    path.write_bytes(entry.program.files[entry.program.entry])
    library = str(native.operator(entry.program.format)) if entry.ours else None
    run = runners.load(entry.program.format).load(str(path), entry.program, 1, library)
    return run, natives.journal(run, library) if library else None


def measure(entries: list[Entry], row: Any, want: Any, seconds: float, folder: Path) -> dict[str, Timed]:
    """One run of each with its outputs and counters checked, then rounds until the time is used."""
    runs, first = {}, {}
    for number, entry in enumerate(entries):
        run, journal = opened(entry, folder / str(number))
        got = np.asarray((journal.watch(run) if journal else run)(row)).ravel()
        told = journal.native() if journal else None
        if told and told.calls_per_run != LAYERS:
            raise SystemExit(f"{entry.name}: the library was called {told.calls_per_run} times, not {LAYERS}")
        cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
        kept = float(np.mean(told.kept)) if told and told.kept else None
        runs[entry.name], first[entry.name] = run, Timed([], cosine, told.calls_per_run if told else 0, kept)
    end = time.monotonic() + seconds
    while len(first[entries[0].name].times) < 5 or time.monotonic() < end:
        for name, run in runs.items():
            begin = time.process_time()
            run(row)
            first[name].times.append(time.process_time() - begin)
    return first


def report(tokens: int, found: dict[str, Timed], base: str, console: Console) -> list[dict[str, Any]]:
    table = Table(title=f"MiniLM-L6, {tokens} tokens, 1 thread, CPU time, {len(found[base].times)} rounds; measured")
    for heading in ("program", "kept", "calls", "ms", "p90", f"x {base}", f"x {DENSE_INT8}", "cosine to fp32"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    lines = []
    for name, timed in found.items():
        ratios = {other: _ratio(found[other], timed) for other in (base, DENSE_INT8)}
        goals = {other: GOALS[name, other, tokens] for other in ratios if (name, other, tokens) in GOALS}
        cells = [f"{ratios[o]:.2f}" + (_verdict(ratios[o], goals[o]) if o in goals else "") for o in ratios]
        ms, p90 = (1e3 * float(np.quantile(timed.times, q)) for q in (0.5, 0.9))
        kept = "" if timed.kept is None else f"{timed.kept:.3f}"
        table.add_row(name, kept, str(timed.calls), f"{ms:.1f}", f"{p90:.1f}", *cells, f"{timed.cosine:.4f}")
        line = {"tokens": tokens, "program": name, "kept": timed.kept, "calls": timed.calls, "ms": ms, "p90_ms": p90}
        lines.append(
            line | {"times": ratios, "goals": goals, "cosine": timed.cosine, "rounds": len(timed.times), "threads": 1}
        )
    console.print(table)
    return lines


def _ratio(over: Timed, timed: Timed) -> float:
    return float(np.median([a / b for a, b in zip(over.times, timed.times, strict=True)]))


def _verdict(value: float, goal: float) -> str:
    return f" {'met' if value >= goal else 'MISSED'} ({goal})"


def profile(entries: list[Entry], row: Any, console: Console, runs: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds a run by operator, from ONNX Runtime's profiler, which costs time itself."""
    import onnxruntime  # type: ignore[import-untyped]

    shares: dict[str, dict[str, float]] = {}
    for entry in entries:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling, options.log_severity_level = 1, True, 3
        if entry.ours:
            options.register_custom_ops_library(str(native.binding("onnx")))
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = f"{folder}/p"
            session = onnxruntime.InferenceSession(entry.program.files["model.onnx"], options)
            for _ in range(runs):
                session.run(None, {name: array[None] for name, array in row.items()})
            events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
        spent: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
        shares[entry.name] = {name: us / 1e3 / runs for name, us in spent.most_common()}
        top = ", ".join(f"{name} {ms:.1f}" for name, ms in list(shares[entry.name].items())[:9])
        console.print(f"  {entry.name}, ms: {top}")
    return shares


# --- the command ------------------------------------------------------------------------------------------------------


def tabled(model: Any, tokenizer: Any, tokens: int, format: str, given: Any, console: Console) -> list[dict[str, Any]]:
    rows = corpus.training(tokenizer, tokens, TRAINING_ROWS)
    stats = scorer.collect(model, rows, sparsify.config_of(model, tokens))
    trained = scorer.train(stats, scorer.Recipe(steps=given.steps))
    # A static length for formats that need one. ONNX Runtime takes any, and a short one is counted sooner.
    lengths = (tokens,) if format == "litert" else (512,)
    made = models.load(model, tokenizer=tokenizer, name="minilm", lengths=lengths)
    row = {x.name: rows[0][x.name][0].numpy().astype(x.dtype) for x in made.inputs}
    with torch.no_grad():
        want = made.module(*(torch.from_numpy(row[x.name][None]) for x in made.inputs))[0].numpy()
    entries = list(programs(made, format, given.kept, trained, stats.of(slice(1))))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(entries, row, want, given.seconds, Path(folder))
    lines = report(tokens, found, entries[0].name, console)
    shares = profile(entries, row, console) if given.profile and format == "onnx" else {}
    return [line | {"format": format, "ms_by_operator": shares.get(line["program"])} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers: Any = lambda x: [int(n) for n in x.split(",") if n]  # noqa: E731
    parser.add_argument("--n", type=numbers, default=[512, 3500], help="lengths for ONNX Runtime, by commas")
    parser.add_argument("--litert", type=numbers, default=[], help="lengths for LiteRT, by commas")
    parser.add_argument("--kept", type=float, default=0.25)
    parser.add_argument("--seconds", type=float, default=60, help="a length")
    parser.add_argument("--steps", type=int, default=60, help="of the scorers' training")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("bench-end-to-end.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = quality.minilm(POSITIONS)
    console, lines = Console(width=150), []
    for format, lengths in (("onnx", given.n), ("litert", given.litert)):
        for tokens in lengths:
            lines += tabled(model, tokenizer, tokens, format, given, console)
            given.json.write_text(json.dumps({"load": os.getloadavg(), "rows": lines}, indent=1) + "\n")
    console.print(f"load {os.getloadavg()[0]:.1f}; written to {given.json}")


if __name__ == "__main__":
    main()
