"""
What pruning costs and buys, measured on programs: one line a variant and format.

    python tools/bench/prune.py --model ../shared/models/minilm-sst2 --data ../shared/data/sst2 --out prune.json

Accuracy is that of the exported program on dev.tsv, with the 95 % Wilson interval; `paired` counts rows that only this
program, and only the dense one, has right. Speed-up is against the dense program of the same format and precision:
process CPU time of one thread at natural lengths, programs interleaved row by row, the mean over rows of each row's
median. `zipped` is the size after zlib -9. Calibration reads train.tsv. The last line names what reaches the goal of
pruning without retraining: so much faster than the same program unpruned, 99 % of fp32's accuracy, a pass of minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from edgeformer import data, formats, model as models, structure  # noqa: E402
from edgeformer.passes import Pass, dynamic, prune, student, unstructured  # noqa: E402
from edgeformer_agent import runners  # noqa: E402

Entry = dict[str, Any]
LENGTHS = (16, 32, 48, 64, 128)
PASSES = 4  # over the rows that are timed
GOAL = {"speed_up": 1.5, "accuracy": 0.8776, "pass_cpu_s": 180.0}  # accuracy: .99 of MiniLM's .8865 on SST-2


def variants(arguments: argparse.Namespace, rows: data.Rows, cost: prune.Cost) -> Iterator[tuple[str, Pass | None]]:
    yield "dense", None
    for method in filter(None, arguments.methods.split(",")):
        for keep in arguments.keep:
            yield f"{method} keep {keep:g}", prune.structured(rows, keep=keep, method=method, cost=cost)
    for hidden in arguments.width:
        yield f"width {hidden}", student.width(hidden)
    if arguments.dynamic:
        yield "tokens keep 0.6", dynamic.tokens(rows, keep=0.6, after=1)
        yield "early exit", dynamic.early_exit(rows, after=2)
    for method in unstructured.METHODS if arguments.unstructured else ():
        for share in (0.5, 0.8):
            yield f"zeros {method} {share:g}", unstructured.weights(rows, share=share, method=method)
        yield f"zeros {method} 2:4", unstructured.weights(rows, pattern=(2, 4), method=method)


def measured(model: models.Model, arguments: argparse.Namespace, rows: list[data.Row]) -> prune.Cost:
    """The cost table of the first format on this machine, from programs with fewer heads, or columns, in each layer."""
    groups, format = structure.groups(model), formats.load(arguments.formats[0])
    layers = len({g.layer for g in groups})
    points = {(kind, part): g.units * part // 4 for g in groups for kind in [g.kind] for part in (0, 2, 4)}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for (kind, part), left in points.items():
            module = copy.deepcopy(model.module)
            for group in groups:
                if group.kind == kind and part < 4:
                    structure.cut(module, group, torch.arange(left))
            made = next(format.export(replace(model, module=module), [arguments.precision]))
            runs[f"{kind} {part}"] = opened(made, Path(folder) / f"{kind}-{part}")
        ms = timed(runs, rows)
    table: dict[str, dict[int, float]] = {}
    for (kind, part), left in points.items():
        table.setdefault(kind, {})[left] = max((ms[f"{kind} {part}"] - ms[f"{kind} 0"]) / layers, 0.0)
    show({"costs": arguments.formats[0], "ms_a_layer": table})
    return prune.tabulated(table)


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's, 95 %."""
    z, p = 1.96, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5 / (1 + z * z / count)
    return middle - half, middle + half


def opened(program: Any, folder: Path) -> Callable[[data.Row], Any]:
    path = folder / program.entry
    folder.mkdir()
    path.write_bytes(program.files[program.entry])
    run: Callable[[data.Row], Any] = runners.load(program.format).load(str(path), program, 1)
    return run


def timed(runs: dict[str, Callable[[data.Row], Any]], rows: list[data.Row]) -> dict[str, float]:
    """ms a row on one thread."""
    took = {name: np.zeros((PASSES, len(rows))) for name in runs}
    for i in range(PASSES):
        for j, row in enumerate(rows):
            for name, run in runs.items():
                run(row)  # the caches are this program's own again
                began = time.process_time_ns()
                run(row)
                took[name][i, j] = 1e-6 * (time.process_time_ns() - began)
    return {name: float(np.median(ms, 0).mean()) for name, ms in took.items()}


def judged(run: Callable[[data.Row], Any], rows: data.Rows) -> np.ndarray:
    assert rows.labels is not None
    return np.asarray([int(np.argmax(run(row))) for row in rows.rows]) == rows.labels


def show(entry: Entry) -> None:
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items()), flush=True)


def main() -> None:
    arguments = parsed()
    model = models.load(arguments.model, lengths=LENGTHS)
    train = data.load(model, arguments.data / "train.tsv", "sst2", most=arguments.rows)
    dev = data.load(model, arguments.data / "dev.tsv", "sst2")
    model = data.with_task(model, train)
    picked = list(dev.rows)[:: arguments.every]
    cost = measured(model, arguments, picked) if arguments.costs == "measured" else prune.operations
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, dict[str, Callable[[data.Row], Any]]] = {name: {} for name in arguments.formats}
        dense: dict[str, np.ndarray] = {}
        for number, (name, step) in enumerate(variants(arguments, train, cost)):
            began = time.process_time()
            made = step(model) if step else model
            spent, facts = time.process_time() - began, made.history[-1].facts
            for format in arguments.formats:
                program = next(formats.load(format).export(made, [arguments.precision]))
                run = runs[format][name] = opened(program, Path(folder) / f"{format}-{number}")
                right = judged(run, dev)
                base = dense.setdefault(format, right)
                low, high = interval(int(right.sum()), len(right))
                paired = f"+{int((right & ~base).sum())}/-{int((base & ~right).sum())}"
                entries.append(
                    {
                        "format": format, "variant": name, "accuracy": float(right.mean()), "low": low, "high": high,
                        "paired": paired, "MB": program.size_bytes / 1e6, "pass_cpu_s": spent,
                        "zipped_MB": len(zlib.compress(program.files[program.entry], 9)) / 1e6,
                        "kept": facts.get("kept"), "saved": facts.get("saved"),
                    }
                )  # fmt: skip
                show(entries[-1])
        for format, programs in runs.items():
            ms = timed(programs, picked)
            for name, value in ms.items():
                entry = next(e for e in entries if (e["format"], e["variant"]) == (format, name))
                entry |= {"ms": value, "speed_up": ms["dense"] / value}
                show({k: entry[k] for k in ("format", "variant", "accuracy", "ms", "speed_up")})
    reached = [f"{entry['format']} {entry['variant']}" for entry in entries if reaches(entry)]
    show({"goal": GOAL, "reached_by": ", ".join(reached) or "nobody", "load": os.getloadavg()[0]})
    said = {"rows": len(dev.rows), "timed": len(picked), "goal": GOAL, "reached": reached, "entries": entries}
    arguments.out.write_text(json.dumps(said, indent=1))


def reaches(entry: Entry) -> bool:
    fast, good = (entry[name] >= GOAL[name] for name in ("speed_up", "accuracy"))
    return fast and good and bool(entry["pass_cpu_s"] <= GOAL["pass_cpu_s"])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, default=Path("prune.json"))
    parser.add_argument("--rows", type=int, default=512, help="of train.tsv, to calibrate with")
    parser.add_argument("--keep", type=lambda s: [float(x) for x in s.split(",")], default=[0.8, 0.6, 0.5, 0.4])
    parser.add_argument("--methods", default="obs,fisher,taylor,magnitude")
    parser.add_argument("--formats", type=lambda s: s.split(","), default=["onnx", "litert"])
    parser.add_argument("--costs", choices=("measured", "operations"), default="measured", help="what units cost")
    parser.add_argument("--dynamic", action="store_true", help="token pruning and early exit as well; ONNX only")
    parser.add_argument(
        "--width", type=lambda s: [int(x) for x in s.split(",")], default=[], help="narrower streams, untrained"
    )
    parser.add_argument("--unstructured", action="store_true", help="zeros among the weights as well")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--every", type=int, default=4, help="one of so many dev rows is timed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
