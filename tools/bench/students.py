"""
Small students of MiniLM on SST-2, trained and held against it.

    python tools/bench/students.py --data ../shared/data --model ../shared/models/minilm-sst2
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from edgeformer import check, data as rows_of, model as models  # noqa: E402
from edgeformer.passes import distil, student  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402

LENGTHS = (16, 32, 48, 64, 128)


@dataclass(frozen=True)
class Spec:
    layers: int
    hidden: int = 0
    ffn: int = 0
    rank: int = 0
    recipe: Recipe = Recipe(epochs=3, batch=64, rate=5e-4)
    losses: distil.Losses = distil.Losses(response=1.0, hard=0.3)
    copies: int = 2


SPECS = {
    "large": Spec(3, 384, ffn=1152, recipe=Recipe(epochs=1, batch=64, rate=2e-4), copies=1),
    "medium": Spec(2, 256, recipe=Recipe(epochs=2, batch=64, rate=4e-4), copies=1),
    "small": Spec(1, 192, recipe=Recipe(epochs=3, batch=64, rate=8e-4), copies=1),
}


def tsv(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [r[0].strip() for r in rows], [float(r[1]) for r in rows]


class Log:
    def __init__(self):
        self.began, self.last = {}, 0.0

    def __call__(self, what, done, total):
        now = time.monotonic()
        first, at = self.began.setdefault(what, (done, now))
        if now - self.last > 20 or done == total:
            self.last = now
            left = (total - done) * (now - at) / max(done - first, 1)
            print(f"{what} {done}/{total} left {left:.0f}s cpu {time.process_time():.0f}s", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/edgeformer/students").expanduser())
    parser.add_argument("--only", default="small,medium,large")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--set", default="")
    a = parser.parse_args()
    torch.set_num_threads(1)
    teacher = models.load(a.model, lengths=LENGTHS)
    texts, labels = tsv(a.data / "sst2" / "train.tsv")
    if a.limit:
        texts, labels = texts[: a.limit], labels[: a.limit]
    dev = rows_of.load(teacher, a.data / "sst2" / "dev.tsv", "sst2")
    log = Log()
    for name in a.only.split(","):
        spec = eval(f"replace(SPECS[name], {a.set})") if a.set else SPECS[name]
        began = time.process_time()
        made = teacher
        passes = [student.layers(spec.layers), student.vocabulary(texts), student.positions(128)]
        if spec.hidden:
            passes.insert(1, student.width(spec.hidden, ffn=spec.ffn))
        if spec.rank:
            passes.append(student.embeddings(spec.rank))
        for step in passes:
            made = step(made)
            print(made.history[-1], flush=True)
        made = distil.distil(
            teacher,
            texts,
            labels=labels,
            losses=spec.losses,
            recipe=spec.recipe,
            augment=distil.Augment(spec.copies),
            length=64,
            folder=a.work,
            progress=log,
        )(made)
        print(made.history[-1])
        rows = rows_of.load(made, a.data / "sst2" / "dev.tsv", "sst2")
        out = np.stack(check.reference(made, rows.rows, lambda n: None))
        print("ACC", name, (out.argmax(1) == rows.labels).mean(), "cpu", time.process_time() - began, spec, flush=True)


if __name__ == "__main__":
    main()
