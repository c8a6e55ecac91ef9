"""
What each quantization costs in accuracy and saves in size, on labelled rows: one line a program.

    python tools/bench/quantize.py --model ../shared/models/minilm-sst2 --data ../shared/data/sst2 --steps 200

Programs are ONNX and run where devices run them. Besides the accuracy with its interval: how many rows get fp32's
answer, and how far the outputs are from fp32's, as a share of their size. Calibration and training read train.tsv only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its names are those of other modules

import numpy as np  # noqa: E402

from edgeformer import data, evaluate, formats, model as models  # noqa: E402
from edgeformer.model import Model  # noqa: E402
from edgeformer.passes import Pass, mixed, qat, smooth  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402

BATCH = 16
Variant = tuple[str, str, Callable[[], Pass] | None]  # name, precision, what comes before


def variants(texts: list[str], steps: int) -> Iterator[Variant]:
    calibration = texts[: 4 * mixed.ROWS]
    yield "fp32", "fp32", None
    yield "int8", "int8", None
    yield "int4-embeddings", "int4-embeddings", None
    yield "int4", "int4", None
    for loss in (0.08, 0.05):
        yield (
            f"int4 mixed, loss {loss}",
            "int4",
            lambda loss=loss: mixed.layers(calibration, precision="int4", loss=loss),  # type: ignore[misc]
        )
    yield "int8 mixed, 4 layers", "int8", lambda: mixed.layers(calibration, precision="int8", keep=4)
    for strength in (0.0, 0.5):
        yield (
            f"int8-static, smoothed {strength}",
            "int8-static",
            lambda strength=strength: smooth.linears(calibration, strength=strength),  # type: ignore[misc]
        )
    if steps:
        recipe = Recipe(batch=BATCH, rate=2e-5, epochs=1)
        for precision in ("int4", "int8"):
            yield (
                f"{precision}, {steps} steps of training",
                precision,
                lambda precision=precision: qat.train(texts[: steps * BATCH], precision=precision, recipe=recipe),  # type: ignore[misc]
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="MiniLM fine-tuned on SST-2, or another of its task")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv of SST-2")
    parser.add_argument("--steps", type=int, default=0, help="of training with rounding; none by default")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("quantize.json"))
    options = parser.parse_args()
    train, dev = options.data / "train.tsv", options.data / "dev.tsv"
    if missing := [str(p) for p in (train, dev, options.model) if not p.exists()]:
        print(f"not there: {', '.join(missing)}", file=sys.stderr)
        return 3
    found = data.texts(train, "sst2").texts
    texts = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    wanted = [variant for variant in variants(texts, options.steps) if options.only in variant[0]]
    if not wanted:
        parser.error(f"no variant has {options.only!r} in its name")
    model = models.load(options.model)
    rows = data.load(model, dev, "sst2")
    model = data.with_task(model, rows)
    base = evaluate.evaluate(model, rows, "sst2", name="PyTorch fp32")
    lines = []
    for name, precision, before in wanted:
        lines.append(_measured(model if before is None else before()(model), name, precision, rows, base))
        options.out.write_text(json.dumps(lines, indent=1) + "\n")
    return 0


def _measured(model: Model, name: str, precision: str, rows: data.Rows, base: evaluate.Evaluation) -> dict[str, object]:
    """Of one program: printed, and as what the JSON file holds."""
    (program,) = formats.load("onnx").export(model, [precision])
    found = evaluate.evaluate(program, rows, "sst2", name=name)
    (accuracy,), (difference,) = found.estimates, evaluate.against(found, base)
    got, want = (np.stack(x.outputs) for x in (found, base))
    distance = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    facts = model.history[-1].facts
    more = f" ({len(facts['kept'])} of {facts['layers']} layers finer)" if "kept" in facts else ""
    print(
        f"{name:30} {program.size_bytes / 2**20:6.2f} MiB  accuracy {accuracy.value:.4f} ({accuracy.low:.4f} to "
        f"{accuracy.high:.4f})  agreement {difference.agreement:.4f}  distance {distance:.4f}{more}",
        flush=True,
    )
    about = {"name": name, "precision": precision, "size_mib": program.size_bytes / 2**20, "distance": distance}
    return about | {"accuracy": asdict(accuracy), "difference_to_fp32": asdict(difference), "history": facts}


if __name__ == "__main__":
    sys.exit(main())
