"""
Each compression technique on a real model, beside what the paper claims: parameters, speed-up, score, memory.

    python tools/bench/techniques.py --data ../shared/data --models ../shared/models --out techniques.json

Every figure is of a program that was exported and ran in its device runtime on this machine. Speed-up and score are
against the unmodified fp32 program in the same runtime: interleaved row by row, one pinned thread, all dev rows judged.
Techniques that learn get `--minutes` of one CPU each: enough to show where they go, not how far. Rows that are done are
kept under --work, and a second call goes on after them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from edgeformer import budget, check, data, evaluate, formats, model as models, page, plot, recipe, train  # noqa: E402
from edgeformer.attention import dsa, swap  # noqa: E402
from edgeformer.errors import BadInput, ExportError  # noqa: E402
from edgeformer.model import Model  # noqa: E402
from edgeformer.passes import depth, distil, dynamic, mixed, prune, qat, student, unstructured  # noqa: E402
from edgeformer.plan import plans  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer.train import Recipe  # noqa: E402
from edgeformer.workshop import Workshop  # noqa: E402
from tools.bench import peak_memory, shelf, turns  # noqa: E402

TASKS = {"sst2": "minilm-sst2", "stsb": "minilm-stsb"}
LENGTHS = (32, 64, 128)
CALIBRATION_ROWS, TIMED_ROWS, ROUNDS, PEAK_ROWS = 512, 60, 5, 20
# CPU seconds a text of training all layers took where this was written, its teacher's answers included: plans, not
# figures. What a row really took stands in its line.
SECONDS_A_TEXT = {"sst2": 0.010, "stsb": 0.020}
RATE, ROUNDED_RATE, BATCH = 3e-4, 2e-5, 32
COMBINED = "paper-combined"
WIDTH = 100  # where there is no terminal
HEADS = ("technique", "runtime", ">M par.", ">x", ">score", ">%", "paper", ">MB", ">peak MB", ">CPU min")

Tensor = torch.Tensor


@dataclass(frozen=True)
class Claim:
    """What the paper says, where it is known here: of sparse attention, and of all together. The rest stays empty."""

    speedup: float | None = None
    percent: float | None = None  # of the baseline's score

    @property
    def said(self) -> str:
        known = (f"{value:g}{unit}" for value, unit in ((self.speedup, "x"), (self.percent, "%")) if value is not None)
        return " ".join(known)


@dataclass(frozen=True)
class Bench:
    """What a technique is given: the model, rows to calibrate with, texts to learn from."""

    task: str
    model: Model
    folder: Path  # of train.tsv and dev.tsv
    work: Path
    minutes: float

    @cached_property
    def rows(self) -> data.Rows:
        return data.load(self.model, self.folder / "train.tsv", self.task, most=CALIBRATION_ROWS)

    @cached_property
    def dev(self) -> data.Rows:
        return data.load(self.model, self.folder / "dev.tsv", self.task, most=10_000)

    def read(self, model: Model) -> data.Rows:
        """The dev rows, by the tokenizer of a model whose vocabulary may be cut."""
        return self.dev if model.tokenizer is self.model.tokenizer else replace(self, model=model).dev

    def learned(self, model: Model, losses: distil.Losses) -> Model:
        """Distilled from the unmodified model, within the minutes."""
        texts = self.texts()
        step = distil.distil(
            self.model,
            texts,
            losses=losses,
            recipe=Recipe(epochs=1, batch=BATCH, rate=RATE),
            length=LENGTHS[-1],
            folder=self.work / "learning",
            progress=train.quiet,
        )
        return step(model)

    def texts(self) -> list[Any]:
        """As many as the minutes allow, evenly spread; pairs where the task has them."""
        found = data.pairs(self.folder / "train.tsv", self.task)
        count = max(int(60 * self.minutes / SECONDS_A_TEXT[self.task]), BATCH)
        return [found[i] for i in turns.pick(len(found), count)]


@dataclass(frozen=True)
class Technique:
    name: str
    make: Callable[[Bench], Model]
    precision: str = "fp32"
    formats: tuple[str, ...] = ("onnx",)
    claim: Claim = Claim()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One program, or the reason why there is none."""

    task: str
    technique: str
    runtime: str
    claim: Claim
    note: str
    parameters: int = 0  # that are not zero
    score: float = 0.0
    low: float = 0.0
    high: float = 0.0
    baseline: float = 0.0
    difference: float = 0.0  # of the first metric, paired with the baseline's
    p_value: float = 1.0
    program_mb: float = 0.0
    peak_mb: float = 0.0
    ms: float = 0.0
    cpu_ms: float = 0.0
    speedup: float = 0.0
    made_cpu_s: float = 0.0  # of the passes, training included
    layers_run: dict[str, float] | None = None  # where it depends on the row: least, mean, most, of how many
    facts: dict[str, Any] | None = None
    absent: str = ""

    @property
    def percent(self) -> float:
        return 100 * self.score / self.baseline


# --- the techniques ---------------------------------------------------------------------------------------------------


def unmodified(bench: Bench) -> Model:
    return bench.model


def structured(bench: Bench) -> Model:
    return prune.structured(bench.rows, keep=0.6)(bench.model)


def zeros(bench: Bench) -> Model:
    return unstructured.weights(bench.rows, share=0.5)(bench.model)


def tokens(bench: Bench) -> Model:
    return dynamic.tokens(bench.rows, keep=0.6, after=1)(bench.model)


def early_exit(bench: Bench) -> Model:
    return dynamic.early_exit(bench.rows, after=2)(bench.model)


def fewer_layers(bench: Bench) -> Model:
    return depth.layers(bench.rows, keep=4)(bench.model)


def distilled(losses: distil.Losses) -> Callable[[Bench], Model]:
    """Half of the layers, evenly spread, then taught."""

    def make(bench: Bench) -> Model:
        count = len(student.layer_stack(bench.model.module))
        return bench.learned(student.layers(count // 2)(bench.model), losses)

    return make


def cooked(name: str) -> Callable[[Bench], Model]:
    """As `edgeformer build --recipe` makes it of the training file."""

    def make(bench: Bench) -> Model:
        asked, file = recipe.load(name), bench.folder / "train.tsv"
        kitchen = budget.kitchen(bench.model, None, file, bench.task, bench.work / "recipes", train.quiet)
        return with_attention(bench, recipe.cook(asked, kitchen, bench.model), asked.attention, asked.budget or 0.5)

    return make


def sparse(bench: Bench) -> Model:
    return with_attention(bench, bench.model, "dsa", 0.5)


def with_attention(bench: Bench, model: Model, attention: str, kept: float) -> Model:
    """Dense or sparse by the rule of `edgeformer.build`, which refuses rows that are too short."""
    (plan,) = plans("host", ["onnx"], None)
    rows = bench.read(model)
    return Workshop(rows, (), check.gate(None), train.quiet).fitted(model, plan, attention, kept)


class Linear(torch.nn.Module):
    """Attention without a matrix of tokens by tokens: feature maps elu + 1 of queries and keys."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, _causal: bool, _scale: float) -> Tensor:
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        k, v = dsa.only_valid(k, lengths), dsa.only_valid(v, lengths)
        return (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None]).clamp(min=1e-6)


class Masked(torch.nn.Module):
    """A fixed pattern of tokens: a window, and with a stride every so many columns as well."""

    def __init__(self, window: int, stride: int = 0) -> None:
        super().__init__()
        self.window, self.stride = window, stride

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, _causal: bool, scale: float) -> Tensor:
        place = torch.arange(k.shape[2])
        seen = (place[:, None] - place).abs() <= self.window
        if self.stride:
            seen = seen | (place % self.stride == 0)
        whole = torch.full((k.shape[0],), k.shape[2]) if lengths is None else lengths
        seen = seen & (place < whole[:, None])[:, None, None]
        scores = (q @ k.mT) * (scale or q.shape[3] ** -0.5)
        return dsa.softmax(torch.where(seen, scores, -torch.inf)) @ v


def attention(make: Callable[[], torch.nn.Module], learn: bool) -> Callable[[Bench], Model]:
    def run(bench: Bench) -> Model:
        module = copy.deepcopy(bench.model.module)
        with swap.replaced(module, lambda _layer: make()):
            swapped = copy.deepcopy(module)
        model = bench.model.after("attention", swapped, facts={"pattern": repr(make())})
        return bench.learned(model, distil.Losses(response=1.0)) if learn else model

    return run


def rounded(bench: Bench) -> Model:
    """Trained with the rounding that the program will have."""
    recipe = Recipe(epochs=1, batch=BATCH, rate=ROUNDED_RATE)
    return qat.train(bench.texts(), precision="int4", recipe=recipe, folder=bench.work / "learning")(bench.model)


def mixed_layers(bench: Bench) -> Model:
    return mixed.layers(bench.rows, precision="int4", loss=0.05)(bench.model)


def techniques() -> Iterator[Technique]:
    both = ("onnx", "litert")
    yield Technique("unmodified", unmodified, formats=both, note="the baseline")
    yield Technique("structured pruning", structured, formats=both, note="60 % of heads and columns, no training")
    yield Technique("unstructured pruning", zeros, note="half of the weights are 0; no runtime here skips them")
    yield Technique("dynamic pruning", tokens, note="60 % of the tokens go on after the second layer")
    yield Technique("quantization, PTQ", unmodified, precision="int8", formats=both, note="after training")
    yield Technique("quantization, int4", unmodified, precision="int4", formats=both, note="groups of weights")
    yield Technique("quantization, QAT", rounded, precision="int4", note="int4, trained with its rounding")
    yield Technique("quantization, mixed", mixed_layers, precision="int4", note="int4, sensitive layers int8")
    response, features = distil.Losses(response=1.0), distil.Losses(response=1.0, feature=1.0)
    yield Technique("distillation, response", distilled(response), note="half of the layers")
    yield Technique("distillation, feature", distilled(features), note="half of the layers; response too")
    relation = distil.Losses(response=1.0, relation=1.0)
    yield Technique("distillation, relation", distilled(relation), note="half of the layers; response too")
    yield Technique("attention, linear", attention(Linear, learn=True), note="elu + 1, distilled")
    yield Technique("attention, local", attention(lambda: Masked(8), learn=False), note="8 tokens each way, frozen")
    fixed = attention(lambda: Masked(4, 8), learn=False)
    yield Technique("attention, fixed", fixed, note="4 tokens each way, every 8th column, frozen")
    yield Technique(
        "attention, DSA", sparse, claim=Claim(speedup=1.9), note="tools/bench/long_documents.py has long rows"
    )
    yield Technique("depth, early exit", early_exit, note="rows that are sure after the third layer")
    yield Technique("depth, fewer layers", fewer_layers, formats=both, note="4 of 6, no training")
    for name in recipe.names():
        if not recipe.ranges(found := recipe.load(name)):
            claim = Claim(3.8, 91) if name == COMBINED else Claim()
            precision = (found.precision or ("int8",))[0]
            yield Technique(f"recipe {name}", cooked(name), precision, both, claim, found.title)


# --- one line ---------------------------------------------------------------------------------------------------------


class Judge:
    """Holds programs against the unmodified fp32 one of the same runtime, which is exported once."""

    def __init__(self, bench: Bench, timed_rows: int, formats: Sequence[str]) -> None:
        self.bench, self.formats = bench, formats
        self.picked = turns.pick(len(bench.dev.rows), timed_rows)
        self._bases: dict[str, tuple[turns.Entrant, evaluate.Evaluation]] = {}
        self._scratch = tempfile.TemporaryDirectory()

    def lines(self, technique: Technique) -> Iterator[Line]:
        blank = Line(self.bench.task, technique.name, "", technique.claim, technique.note)
        began = time.process_time()
        try:
            model = technique.make(self.bench)
            spent = round(time.process_time() - began, 1)
            for format in (x for x in technique.formats if x in self.formats):
                (program,) = formats.load(format).export(model, [technique.precision])
                yield replace(self._line(blank, model, program), made_cpu_s=spent)
        except (BadInput, ExportError) as error:
            yield replace(blank, absent=str(error))

    def _line(self, blank: Line, model: Model, program: Program) -> Line:
        base, wanted = self._base(program.format)
        subject = self._entrant(blank.technique, program, model)
        found = turns.answers(subject, self.bench.task)
        timing = turns.timed([base, subject], self.picked, ROUNDS)
        first, difference = found.estimates[0], evaluate.against(found, wanted)[0]
        return replace(
            blank,
            layers_run=layers_run(model, [self.bench.dev.rows[i] for i in self.picked]),
            runtime=f"{program.format} {program.precision}",
            parameters=sum(int(p.count_nonzero()) for p in model.module.parameters()),
            score=score(found),
            low=first.low,
            high=first.high,
            baseline=score(wanted),
            difference=difference.value,
            p_value=difference.p_value,
            program_mb=program.size_bytes / 1e6,
            peak_mb=peak_memory.measured(program, subject.rows.rows[:PEAK_ROWS]),
            ms=timing[subject.name].ms,
            cpu_ms=timing[subject.name].cpu_ms,
            speedup=turns.speedup(timing[base.name], timing[subject.name]),
            facts={step.name: dict(step.facts) for step in model.history} | {"runtime": subject.runtime},
        )

    def _base(self, format: str) -> tuple[turns.Entrant, evaluate.Evaluation]:
        if format not in self._bases:
            (program,) = formats.load(format).export(self.bench.model, ["fp32"])
            base = self._entrant("base", program, self.bench.model)
            self._bases[format] = base, turns.answers(base, self.bench.task)
        return self._bases[format]

    def _entrant(self, name: str, program: Program, model: Model) -> turns.Entrant:
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        return turns.entrant(name, program, folder, self.bench.read(model), shelf.tokenizer_mb(model), "")


def layers_run(model: Model, rows: Sequence[data.Row]) -> dict[str, float] | None:
    """Of each row alone. A layer that saw half of a row's tokens is half a layer."""
    if not any(step.name.startswith("dynamic.") for step in model.history):
        return None
    found = dynamic.saved(model, data.Rows(tuple(rows), "timed rows"))
    run = [x.layers_run for x in found]
    return {"least": min(run), "mean": sum(run) / len(run), "most": max(run), "of": found[0].layers}


def score(found: evaluate.Evaluation) -> float:
    """GLUE's: accuracy, or the mean of Pearson's and Spearman's correlation."""
    return sum(x.value for x in found.estimates) / len(found.estimates)


def kept(judge: Judge, technique: Technique, code: str) -> list[Line]:
    """The technique's lines, from an earlier call where nothing has changed since."""
    bench = judge.bench
    said = repr(
        (code, bench.task, bench.minutes, technique.name, technique.precision, technique.formats, judge.formats)
    )
    path = bench.work / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return [read(x) for x in json.loads(path.read_text("utf-8"))]
    lines = list(judge.lines(technique))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(x) for x in lines]), "utf-8")
    part.replace(path)
    return lines


def read(said: dict[str, Any]) -> Line:
    return Line(**{**said, "claim": Claim(**said["claim"])})


# --- what is shown ----------------------------------------------------------------------------------------------------


def cells(line: Line) -> tuple[str, ...]:
    if line.absent:
        return (line.technique, "none", "", "", "", "", line.claim.said, "", "", "")
    return (
        line.technique,
        line.runtime,
        f"{line.parameters / 1e6:.1f}",
        f"{line.speedup:.2f}",
        f"{line.score:.4f}",
        f"{line.percent:.1f}",
        line.claim.said,
        f"{line.program_mb:.1f}",
        f"{line.peak_mb:.0f}",
        f"{line.made_cpu_s / 60:.1f}",
    )


def table(task: str, lines: Sequence[Line]) -> Table:
    """80 columns are enough: names of techniques are what wraps there."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    made.title, made.title_justify = f"{task}: {TASKS[task]}", "left"
    for head in HEADS:
        words = head.lstrip(">").replace(" ", "\n")
        made.add_column(words, justify="right" if head.startswith(">") else "left", no_wrap=head != HEADS[0])
    for line in lines:
        made.add_row(*cells(line))
    return made


def notes(lines: Sequence[Line]) -> str:
    """Why there is no program, and what a row's own work is where it differs."""
    return "\n".join(f"{x.technique}: {said}" for x in lines if (said := absent(x) or saved(x)))


def absent(line: Line) -> str:
    return f"{line.absent} ({line.note})" if line.absent else ""


def saved(line: Line) -> str:
    run = line.layers_run
    if run is None:
        return ""
    least, mean, most, of = (run[name] for name in ("least", "mean", "most", "of"))
    return f"a row runs {mean:.2f} of {of:.0f} layers ({least:.2f} to {most:.2f}), each by the share of tokens it sees"


def caption(about: dict[str, Any]) -> str:
    return (
        f"measured on {about['cpu']}, one pinned thread, load {about['load']}; x and % are against the unmodified "
        f"fp32 program of the same runtime; {about['timed_rows']} dev rows timed in turns, all judged. Techniques that "
        f"learn were given {about['minutes']:g} CPU minutes each, recipes take what they say; CPU min: what making it "
        "took, training included. paper: its claim, on its own hardware and model; empty where it is not known here. "
        "M par.: that are not zero. peak MB: of a process that opens the program and answers a few rows. Score: "
        "accuracy; for stsb the mean of Pearson's and Spearman's correlation."
    )


def document(lines: Sequence[Line], about: dict[str, Any]) -> str:
    title = "Compression techniques, measured and claimed"
    head = f'<header><p class="kicker">edgeformer techniques</p><h1>{title}</h1>'
    body = head + f'<p class="lead">{page.text(caption(about), 1000)}</p></header>'
    for task in dict.fromkeys(x.task for x in lines):
        mine = [x for x in lines if x.task == task]
        body += page.section(task, f"{task}: {TASKS[task]}", picture(task, mine))
        heads = (*HEADS, ">p of the difference", "how")
        rows = [(*cells(x), *more(x)) for x in mine]
        body += page.table("one line a program", heads, rows)
    return page.document(title, body)


def more(line: Line) -> tuple[str, str]:
    if line.absent:
        return "", absent(line)
    return f"{line.p_value:.2g}", "; ".join(filter(None, (line.note, saved(line))))


def picture(task: str, lines: Sequence[Line]) -> str:
    """Speed-up as a bar, what the paper claims as a mark on it."""
    bars = [
        plot.Bar(
            plot.Label(x.technique, x.runtime, f"{x.speedup:.2f}x", f"{x.percent:.1f} % of the score"),
            x.speedup,
            "run1" if x.runtime.startswith("onnx") else "run2",
            band=(x.claim.speedup,) * 3 if x.claim.speedup else None,
        )
        for x in lines
        if not x.absent
    ]
    words = "; ".join(f"{bar.label.name} {bar.label.remark}: {bar.label.figure}, {bar.label.detail}" for bar in bars)
    drawn = plot.bars(task, f"Speed-up on {task}", words, bars, "times the unmodified fp32 program")
    return page.figure(drawn, "Bars: measured here. Diamonds: what the paper claims, on its own hardware.")


def markdown(lines: Sequence[Line], about: dict[str, Any]) -> str:
    """The same tables for a document: a section a task, and what its figures are."""
    made = []
    for task in dict.fromkeys(x.task for x in lines):
        mine = [x for x in lines if x.task == task]
        rows = [[head.lstrip(">") for head in HEADS], ["---:" if x.startswith(">") else "---" for x in HEADS]]
        rows += [list(cells(x)) for x in mine]
        made += [f"### {task}: {TASKS[task]}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
        made += [*(f"- {said}" for said in notes(mine).splitlines()), ""]
    return "\n".join([*made, caption(about), ""])


def write(out: Path, lines: Sequence[Line], about: dict[str, Any]) -> None:
    out.write_text(json.dumps({"about": about, "lines": [asdict(x) for x in lines]}, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(markdown(lines, about), "utf-8")
    out.with_suffix(".html").write_text(document(lines, about), "utf-8")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/ and stsb/: train.tsv, dev.tsv")
    parser.add_argument("--models", type=Path, required=True, help=f"folder with {', '.join(TASKS.values())}")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--only", default="", help="techniques whose name holds one of these words, by commas")
    parser.add_argument(
        "--formats", default="onnx,litert", help="runtimes to measure in, where a technique has several"
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="CPU time of each technique that learns")
    parser.add_argument("--rows", type=int, default=TIMED_ROWS, help="dev rows that are timed")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/edgeformer/techniques").expanduser())
    parser.add_argument("--out", type=Path, default=Path("techniques.json"), help="and beside it .html and .md")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    tasks, words = arguments.tasks.split(","), arguments.only.split(",")
    if unknown := sorted({*tasks} - {*TASKS}):
        print(f"no task {', '.join(unknown)}; known: {', '.join(TASKS)}", file=sys.stderr)
        return 2
    needed = [arguments.data / task / f"{part}.tsv" for task in tasks for part in ("train", "dev")]
    needed += [arguments.models / TASKS[task] / "model.safetensors" for task in tasks]
    if missing := [str(path) for path in needed if not path.is_file()]:
        print(f"not there: {', '.join(missing)}", file=sys.stderr)
        return 3
    torch.set_num_threads(1)
    code, lines = shelf.sources() + hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), list[Line]()
    about = turns.machine() | {"minutes": arguments.minutes, "timed_rows": arguments.rows}
    for task in tasks:
        model = models.load(arguments.models / TASKS[task], lengths=LENGTHS)
        folder = arguments.data / task
        bench = Bench(task, model, folder, arguments.work / task, arguments.minutes)
        judge = Judge(
            replace(bench, model=data.with_task(model, bench.rows)), arguments.rows, arguments.formats.split(",")
        )
        for technique in techniques():
            if any(word in technique.name for word in words):
                print(f"{task}: {technique.name}", file=sys.stderr, flush=True)
                with redirect_stdout(sys.stderr):  # converters talk
                    lines += kept(judge, technique, code)
                write(arguments.out, lines, about)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for task in tasks:
        mine = [x for x in lines if x.task == task]
        console.print(table(task, mine))
        console.print(notes(mine) + "\n", highlight=False)
    console.print(caption(about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
