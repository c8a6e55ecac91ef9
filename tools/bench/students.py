"""
Small students of MiniLM on SST-2, held against the unmodified int8 model: accuracy, size and speed, in one table.

    python tools/bench/students.py --data ../shared/data --model ../shared/models/minilm-sst2 --out students.json

Each student is cut out of the model by passes, distilled on the training texts and on texts made from them, exported
as int8 ONNX and LiteRT, and judged on the dev rows by the runners that devices use. A run that was stopped goes on
where it was (--work). The figures come from this machine, one thread; latencies are interleaved with the unmodified
model's, so compare ratios and not milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from edgeformer import data, evaluate, formats, model as models  # noqa: E402
from edgeformer.model import Model  # noqa: E402
from edgeformer.passes import Pass, distil, prune, student  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402
from tools.bench import shelf, turns  # noqa: E402

FORMATS = ("onnx", "litert")
LENGTHS = (16, 32, 48, 64, 128)
TRAIN_TOKENS = 64
TIMED_ROWS = 150
SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Goal:
    accuracy: float
    size_mb: float  # program and tokenizer, millions of bytes
    speedup: float  # against the fastest int8 program of the unmodified model


def pruned(keep: float, rows: Path) -> Pass:
    """The rows are read by the model that is pruned: its vocabulary may be cut."""
    return lambda model: prune.structured(data.load(model, rows, "sst2"), keep=keep)(model)


@dataclass(frozen=True)
class Plan:
    """How a student is cut and trained, and what it should reach. What is None stays as it is."""

    goal: Goal
    recipe: Recipe
    layers: int | None = None
    width: tuple[int, int] | None = None  # hidden, feed-forward
    keep: float | None = None  # share of heads and columns, chosen by their importance
    rank: int | None = None  # of the embeddings
    trim: float | None = None  # like keep, of what has learned
    copies: int = 0  # texts made from each text
    dropout: float = 0.0
    embeddings: bool = True  # learn too
    hard: float = 0.3  # weight of the labels, beside the teacher's answers

    def cuts(self, texts: list[str], rows: Path) -> list[Pass]:
        made = [student.layers(self.layers)] if self.layers else []
        made += [student.width(self.width[0], ffn=self.width[1])] if self.width else []
        made += [student.vocabulary(texts), student.positions(LENGTHS[-1])]
        made += [pruned(self.keep, rows)] if self.keep else []
        return made + ([student.embeddings(self.rank)] if self.rank else [])

    def passes(self, teacher: Model, rows: Path, work: Path, progress: Any) -> list[Pass]:
        known = data.texts(rows, "sst2")
        texts, labels = list(known.texts), list(known.labels)
        learn = distil.distil(
            teacher,
            texts,
            labels=labels,
            losses=distil.Losses(response=1.0, hard=self.hard),
            recipe=self.recipe,
            augment=distil.Augment(self.copies),
            dropout=self.dropout,
            embeddings=self.embeddings,
            length=TRAIN_TOKENS,
            folder=work,
            progress=progress,
        )
        return [*self.cuts(texts, rows), learn, *([pruned(self.trim, rows)] if self.trim else [])]


PLANS = {
    "small": Plan(
        Goal(0.8422, 4, 10), Recipe(batch=64, rate=8e-4), layers=2, width=(192, 512), rank=128, copies=3, trim=0.75
    ),
    "medium": Plan(
        Goal(0.8599, 6, 5), Recipe(batch=64, rate=6e-4), layers=3, width=(256, 512), rank=192, copies=3, trim=0.75
    ),
    "large": Plan(Goal(0.8776, 12, 2), Recipe(rate=5e-5), keep=0.3, embeddings=False, hard=1.0, dropout=0.1),
}


@dataclass(frozen=True)
class Line:
    """One int8 program in the table."""

    student: str
    format: str
    accuracy: evaluate.Estimate
    fp32_accuracy: float
    difference: evaluate.Difference | None  # to the unmodified model in fp32
    program_mb: float
    tokenizer_mb: float
    latency_ms: float
    speedup: float | None  # against the fastest unmodified int8 program, interleaved
    train_cpu_s: float | None  # of this run; a part of it where an earlier run was gone on from

    def reaches(self, goal: Goal) -> bool:
        small = self.program_mb + self.tokenizer_mb <= goal.size_mb
        return small and self.accuracy.value >= goal.accuracy and (self.speedup or 0) >= goal.speedup


class Said:
    """Progress as lines, each with the time left."""

    def __init__(self, name: str) -> None:
        self.name, self.last, self.began = name, 0.0, dict[str, tuple[int, float]]()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        first, at = self.began.setdefault(what, (done, now))
        if now - self.last >= SAY_EVERY_S or done == total:
            self.last = now
            left = (total - done) * (now - at) / max(done - first, 1)
            print(f"{self.name}: {what} {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)


def programs(model: Model) -> Iterator[Program]:
    for name in FORMATS:
        yield from formats.load(name).export(model, ["int8"])


def timings(one: dict[str, Program], rows: dict[str, data.Rows]) -> dict[str, turns.Timing]:
    """By the names of the programs, which take turns on every row."""
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / str(number) for number, name in enumerate(one)}
        subjects = [turns.entrant(name, program, places[name], rows[name], 0.0, "") for name, program in one.items()]
        return turns.timed(subjects, turns.pick(min(len(x.rows) for x in rows.values()), TIMED_ROWS))


def made(plan: Plan, teacher: Model, folder: Path, work: Path, name: str) -> tuple[Model, float]:
    began = time.process_time()
    model = teacher
    for step in plan.passes(teacher, folder / "train.tsv", work, Said(name)):
        model = step(model)
        print(f"{name}: {model.history[-1].name} {model.history[-1].facts}", file=sys.stderr, flush=True)
    return model, time.process_time() - began


def judge(
    name: str,
    model: Model,
    dev: Path,
    fp32: evaluate.Evaluation | None,
    unmodified: dict[str, Program],
    base: data.Rows,
) -> tuple[list[Line], dict[str, Program], evaluate.Evaluation]:
    """Both formats of one model, timed in turns with the unmodified ones."""
    rows = data.load(model, dev, "sst2")
    own = evaluate.evaluate(model, rows, "sst2", name=name)
    here = {f"{name}/{p.format}": p for p in programs(model)}
    both = unmodified | here
    timed = timings(both, {n: rows if n in here else base for n in both})
    best = min((timed[n] for n in unmodified), key=lambda x: x.ms, default=None)
    lines = []
    for n, program in here.items():
        found = evaluate.evaluate(program, rows, "sst2", name=n)
        lines.append(
            Line(
                student=name,
                format=program.format,
                accuracy=found.estimates[0],
                fp32_accuracy=own.estimates[0].value,
                difference=evaluate.against(found, fp32 or own)[0],
                program_mb=program.size_bytes / 1e6,
                tokenizer_mb=shelf.tokenizer_mb(model),
                latency_ms=timed[n].ms,
                speedup=turns.speedup(best, timed[n]) if best else None,
                train_cpu_s=None,
            )
        )
    return lines, here, own


def table(lines: Sequence[Line]) -> Table:
    title = "SST-2 dev, int8, one thread; MB with tokenizer; x over the fastest unmodified"
    shown = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in "student,format,accuracy,95 %,loss,p,MB,ms,x,goal".split(","):
        shown.add_column(column, justify="left" if column in ("student", "format") else "right")
    for x in lines:
        d, goal = x.difference, PLANS[x.student].goal if x.student in PLANS else None
        shown.add_row(
            x.student,
            x.format,
            f"{x.accuracy.value:.4f}",
            f"{x.accuracy.low:.3f}-{x.accuracy.high:.3f}",
            f"{d.value:+.4f}" if d else "",
            f"{d.p_value:.2g}" if d else "",
            f"{x.program_mb + x.tokenizer_mb:.2f}",
            f"{x.latency_ms:.3f}",
            f"{x.speedup:.1f}" if x.speedup else "",
            "" if goal is None else "met" if x.reaches(goal) else "missed",
        )
    return shown


def write(out: Path, lines: Sequence[Line]) -> None:
    goals = {name: asdict(plan.goal) for name, plan in PLANS.items()}
    work = out.with_suffix(".part")
    work.write_text(json.dumps({"goals": goals, "lines": [asdict(x) for x in lines]}, indent=1) + "\n")
    work.replace(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/train.tsv and sst2/dev.tsv")
    parser.add_argument("--model", type=Path, required=True, help="MiniLM fine-tuned on SST-2")
    parser.add_argument("--out", type=Path, default=Path("students.json"))
    parser.add_argument("--work", type=Path, default=Path("~/.cache/edgeformer/students").expanduser())
    parser.add_argument("--only", default=",".join(PLANS), help=f"some of {', '.join(PLANS)}")
    arguments = parser.parse_args()
    folder, wanted = arguments.data / "sst2", arguments.only.split(",")
    if missing := [str(p) for p in (folder / "train.tsv", folder / "dev.tsv", arguments.model) if not p.exists()]:
        print(f"not there: {', '.join(missing)}", file=sys.stderr)
        return 3
    if unknown := sorted({*wanted} - {*PLANS}):
        parser.error(f"no student {', '.join(unknown)}; known: {', '.join(PLANS)}")
    torch.set_num_threads(1)
    teacher = models.load(arguments.model, lengths=LENGTHS)
    base = data.load(teacher, folder / "dev.tsv", "sst2")
    lines, unmodified, fp32 = judge("unmodified", teacher, folder / "dev.tsv", None, {}, base)
    for name in wanted:
        model, cpu_s = made(PLANS[name], teacher, folder, arguments.work, name)
        found, exported, _ = judge(name, model, folder / "dev.tsv", fp32, unmodified, base)
        facts = {"student": name, "parameters": sum(p.numel() for p in model.module.parameters())}
        shelf.save(arguments.work / "programs" / name, model, exported.values(), facts)  # for frontier.py --ours
        lines += [Line(**{**vars(x), "train_cpu_s": round(cpu_s, 1)}) for x in found]
        write(arguments.out, lines)
    Console().print(table(lines))
    reached = {x.student for x in lines if x.student in PLANS and x.reaches(PLANS[x.student].goal)}
    return 0 if reached == {*wanted} else 1


if __name__ == "__main__":
    sys.exit(main())
