"""
The frontier against the peers at their best: accuracy, size and latency of programs, all in one run.

    python tools/bench/frontier.py --data ../shared/data --model ../shared/models/minilm-sst2 \\
        --ours small=students/small --ours "recipe=fast" --out frontier.json

Peers are ONNX Runtime, LiteRT and OpenVINO in int8, each with the fastest of its settings that loses one percent of
fp32's accuracy at most. Ours are the unmodified int8 programs, those pruned without retraining, and what --ours names:
a folder or bundle with programs, a program file, or a recipe. Every program answers all dev rows at their natural
lengths, and takes turns with all others on a sample of them: one thread, pinned. Settings are chosen on the dev rows
too, which favours the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path[0] = str(Path(__file__).parents[2])

import torch  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from edgeformer import data, evaluate, formats, model as models, page, plot, recipe  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.model import Model  # noqa: E402
from edgeformer.passes import prune  # noqa: E402
from tools.bench import peers, shelf, turns  # noqa: E402
from tools.bench.peers import Kit  # noqa: E402
from tools.bench.turns import Entrant, Timing  # noqa: E402

TASK = "sst2"
CALIBRATION_ROWS, PRUNING_ROWS = 300, 512
SCOUT_ROWS, SCOUT_ROUNDS = 30, 3  # to choose a setting
TIMED_ROWS = 150
KEEP = 0.3
WITHIN = 0.99  # of fp32's accuracy: what a peer's best setting must keep
OURS, PEER, REFERENCE = "ours", "peer", "reference"
FORMATS = ("onnx", "litert")
WIDTH = 100  # where there is no terminal
HEADS = ("program", ">accuracy", ">95 %", ">to fp32 (p)", ">MB", ">ms", ">CPU ms", ">x", "goals")


@dataclass(frozen=True)
class Goal:
    speedup: float  # over the best peer of the same run
    accuracy: float
    size_mb: float  # program and tokenizer, millions of bytes

    @property
    def name(self) -> str:
        return f"{self.speedup:g}x"


GOALS = (Goal(2, 0.8776, 12), Goal(5, 0.8599, 6), Goal(10, 0.8422, 4))


@dataclass(frozen=True)
class Line:
    """One program of the table."""

    name: str
    side: str
    runtime: str
    setting: str
    accuracy: evaluate.Estimate
    difference: evaluate.Difference  # to fp32
    program_mb: float
    tokenizer_mb: float
    timing: Timing
    speedup: float  # over the best peer

    @property
    def size_mb(self) -> float:
        return self.program_mb + self.tokenizer_mb

    def missed(self, goal: Goal) -> tuple[str, ...]:
        held = {
            "accuracy": self.accuracy.value >= goal.accuracy,
            "speed": self.speedup >= goal.speedup,
            "size": self.size_mb <= goal.size_mb,
        }
        return tuple(name for name, met in held.items() if not met)


class Tried(NamedTuple):
    """A setting of a peer, and whether it is the one that took part."""

    peer: str
    setting: str
    accuracy: float | None  # of those only that were fast enough to be chosen
    cpu_ms: float
    size_mb: float
    chosen: bool


@dataclass(frozen=True)
class Outcome:
    lines: tuple[Line, ...]
    tried: tuple[Tried, ...]
    best_peer: str
    about: dict[str, Any]

    def reached(self, goal: Goal) -> list[Line]:
        return [x for x in self.lines if x.side == OURS and not x.missed(goal)]


# --- who takes part ---------------------------------------------------------------------------------------------------


def ours(kit: Kit, named: Sequence[tuple[str, str]], folder: Path) -> Iterator[Entrant]:
    """Exported by this version, or read from where they were saved; opened by the runners that devices use."""

    def pruned() -> Model:
        rows = data.load(kit.model, kit.source_data / "train.tsv", TASK, most=PRUNING_ROWS)
        return prune.structured(rows, keep=KEEP)(data.with_task(kit.model, rows))

    own = {"unmodified int8": lambda: kit.model, f"pruned {KEEP:g} int8": pruned}
    own |= {name: partial(cooked, kit, what) for name, what in named if is_recipe(what)}
    for name, make in own.items():
        yield from opened(kit, name, built(kit, name, make), folder)
    for name, what in named:
        if not is_recipe(what):
            yield from opened(kit, name, shelf.load(Path(what), kit.model), folder)


def is_recipe(what: str) -> bool:
    return what in recipe.names() or what.endswith(".toml")


def opened(kit: Kit, name: str, found: shelf.Shelved, folder: Path) -> Iterator[Entrant]:
    rows, size = data.load(found.model, kit.source_data / "dev.tsv", TASK), shelf.tokenizer_mb(found.model)
    for n, program in enumerate(found.programs):
        title, setting = f"{name}, {SHORT[program.format]}", found.facts.get("passes", "as saved")
        yield turns.entrant(title, program, folder / f"{name}-{n}", rows, size, setting)


SHORT = {"onnx": "ONNX", "litert": "LiteRT"}


def built(kit: Kit, name: str, make: Callable[[], Model]) -> shelf.Shelved:
    """Kept in the work folder for as long as neither the model nor this version's code changes."""
    folder = kit.folder / f"{name} {shelf.sources()[:16]}"
    if not (folder / shelf.FACTS).is_file():
        model = make()
        exported = [next(formats.load(format).export(model, ["int8"])) for format in FORMATS]
        passes = ", ".join(step.name for step in model.history) or "as it is"
        shelf.save(folder, model, exported, {"passes": passes})
    return shelf.load(folder, kit.model)


def cooked(kit: Kit, name: str) -> Model:
    """A recipe of the package, or a file, on the training texts."""
    train = kit.source_data / "train.tsv"
    rows, known = data.load(kit.model, train, TASK, most=PRUNING_ROWS), data.texts(train, TASK)
    kitchen = recipe.Kitchen(
        teacher=kit.model,
        rows=rows,
        read=lambda model: data.load(model, train, TASK, most=PRUNING_ROWS),
        texts=known.texts,
        labels=known.labels,
        folder=kit.work / "recipes",
    )
    return recipe.cook(recipe.load(name), kitchen, data.with_task(kit.model, rows))


def chosen(ms: Sequence[float], accuracy: Callable[[int], float], least: float) -> tuple[int, dict[int, float]]:
    """
    The place of the fastest that is accurate enough, of the fastest where none is; and the accuracies that were needed
    to know it.
    """
    order, known = sorted(range(len(ms)), key=ms.__getitem__), dict[int, float]()
    for place in order:
        known[place] = accuracy(place)
        if known[place] >= least:
            return place, known
    return order[0], known


def scouted(kit: Kit, least: float) -> tuple[list[Entrant], list[Tried]]:
    """Each peer at its best setting, and every setting that was tried."""
    best, every = [], []
    for peer in peers.PEERS:
        settings = list(peer.settings(kit))
        numbered = [Entrant(**{**vars(x), "name": str(i)}) for i, x in enumerate(settings)]
        timing = turns.timed(numbered, turns.pick(len(kit.rows.rows), SCOUT_ROWS), SCOUT_ROUNDS)
        ms = [timing[x.name].cpu_ms for x in numbered]
        place, known = chosen(ms, lambda i, of=settings: turns.answers(of[i], TASK).estimates[0].value, least)
        best.append(settings[place])
        every += [
            Tried(peer.name, x.setting, known.get(i), ms[i], x.program_mb, i == place) for i, x in enumerate(settings)
        ]
        print(f"{peer.name}: {settings[place].setting}", file=sys.stderr, flush=True)
    return best, every


# --- the run ----------------------------------------------------------------------------------------------------------


def run(kit: Kit, named: Sequence[tuple[str, str]], timed_rows: int, folder: Path) -> Outcome:
    fp32 = peers.onnxruntime_fp32(kit)
    base = turns.answers(fp32, TASK)
    best, tried = scouted(kit, WITHIN * base.estimates[0].value)
    sides = {fp32.name: REFERENCE} | {x.name: PEER for x in best}
    subjects = [fp32, *best]
    for x in peers.openvino_float(kit):
        sides[x.name] = REFERENCE
        subjects.append(x)
    for x in ours(kit, named, folder):
        if x.name in sides:
            raise BadInput(f"two programs are called {x.name!r}; name them apart with --ours NAME=...")
        sides[x.name] = OURS
        subjects.append(x)
        print(f"{x.name}: {x.program_mb:.2f} MB", file=sys.stderr, flush=True)
    found = {x.name: turns.answers(x, TASK) for x in subjects}
    timing = turns.timed(subjects, turns.pick(len(kit.rows.rows), timed_rows))
    fastest = best_peer([(x.name, found[x.name].estimates[0].value, timing[x.name]) for x in best], base)
    lines = [
        Line(
            x.name, sides[x.name], x.runtime, x.setting, found[x.name].estimates[0],
            evaluate.against(found[x.name], base)[0], x.program_mb, x.tokenizer_mb, timing[x.name],
            turns.speedup(timing[fastest], timing[x.name]),
        )
        for x in subjects
    ]  # fmt: skip
    about = turns.machine() | {"rows": len(kit.rows.rows), "timed_rows": timed_rows}
    about |= {"data": kit.rows.source, "model": kit.model.name, "rounds": turns.ROUNDS}
    return Outcome(tuple(lines), tuple(tried), fastest, about)


def best_peer(found: Sequence[tuple[str, float, Timing]], base: evaluate.Evaluation) -> str:
    place, _ = chosen([x[2].cpu_ms for x in found], lambda i: found[i][1], WITHIN * base.estimates[0].value)
    return found[place][0]


# --- what is shown ----------------------------------------------------------------------------------------------------


def cells(line: Line) -> tuple[str, ...]:
    low, high = (f"{x:.3f}".lstrip("0") for x in (line.accuracy.low, line.accuracy.high))
    difference = line.difference
    return (
        line.name,
        f"{line.accuracy.value:.4f}",
        f"{low}-{high}",
        f"{difference.value:+.4f} ({difference.p_value:.2f})".replace("(0.00)", "(<.01)"),
        f"{line.size_mb:.2f}",
        f"{line.timing.ms:.2f}",
        f"{line.timing.cpu_ms:.2f}",
        f"{line.speedup:.2f}",
        goals_said(line) if line.side == OURS else line.side,
    )


def goals_said(line: Line) -> str:
    """The goals that it reaches; else what the nearest one lacks."""
    reached = [goal.name for goal in GOALS if not line.missed(goal)]
    if reached:
        return f"reaches {', '.join(reached)}"
    nearest = min(GOALS, key=lambda goal: (len(line.missed(goal)), goal.speedup))
    return f"{nearest.name}: {', '.join(line.missed(nearest))}"


def ordered(outcome: Outcome) -> list[Line]:
    return sorted(outcome.lines, key=lambda x: -x.timing.cpu_ms)


def table(outcome: Outcome) -> Table:
    """Names are what wraps where the terminal is narrow; the wall clock stands in the page."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    made.title, made.caption = title(outcome), caption(outcome)
    made.title_justify = made.caption_justify = "left"
    shown = [place for place, head in enumerate(HEADS) if head != ">ms"]
    for head in (HEADS[place] for place in shown):
        words = head.lstrip(">").replace(" (", "\n(").replace("CPU ", "CPU\n")
        made.add_column(words, justify="right" if head.startswith(">") else "left", no_wrap=head != HEADS[0])
    for line in ordered(outcome):
        style = "bold" if line.side == OURS and any(not line.missed(goal) for goal in GOALS) else ""
        made.add_row(*(cells(line)[place] for place in shown), style=style)
    return made


def title(outcome: Outcome) -> str:
    about = outcome.about
    return f"{about['model']}, {about['rows']} dev rows at natural lengths, one pinned thread of {about['cpu']}"


def caption(outcome: Outcome) -> str:
    return "\n".join([*notes(outcome), *(" ".join(x) for x in goal_lines(outcome))])


def notes(outcome: Outcome) -> list[str]:
    about = outcome.about
    return [
        f"ms, CPU ms: mean over {about['timed_rows']} rows of the median of {about['rounds']} turns, all programs "
        f"interleaved; load {about['load']}. x: over {outcome.best_peer}, the best peer of this run, by the clock that "
        "says less. MB: program and tokenizer. to fp32: paired on the same rows, McNemar's exact p."
    ]


def goal_lines(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    """Each goal, what it asks, and who reaches it."""
    return [
        (
            f"{goal.name}:",
            f"accuracy {goal.accuracy} or more,",
            f"{goal.size_mb:g} MB or less:",
            ", ".join(x.name for x in outcome.reached(goal)) or "nobody",
        )
        for goal in GOALS
    ]


def document(outcome: Outcome) -> str:
    head = f'<header><p class="kicker">edgeformer frontier</p><h1>{page.text(outcome.about["model"])}</h1>'
    head += f'<p class="lead">{page.text(title(outcome), 400)}</p></header>'
    body = head + page.section("frontier", "Accuracy against latency", picture(outcome))
    heads = (*HEADS[:-1], *(f"goal {goal.name}" for goal in GOALS))
    lines = [(*cells(x)[:-1], *(verdict(x, goal) for goal in GOALS)) for x in ordered(outcome)]
    below = "".join(f'<p class="note">{page.text(x, 1000)}</p>' for x in notes(outcome))
    goals = page.table("reached by", ("goal", "accuracy", "size", "by"), goal_lines(outcome))
    body += page.section("programs", "Programs", page.table("slowest first", heads, lines) + below)
    body += page.section("goals", "Goals", goals)
    ran = [(x.name, x.runtime, x.setting) for x in ordered(outcome)]
    body += page.section("made", "What ran", page.table("on one thread", ("program", "runtime", "setting"), ran))
    heads = ("peer", "setting", ">accuracy", ">CPU ms", ">MB", "")
    tried = [
        (x.peer, x.setting, said(x.accuracy), f"{x.cpu_ms:.3f}", f"{x.size_mb:.2f}", "took part" if x.chosen else "")
        for x in outcome.tried
    ]
    words = f"The fastest of each peer that keeps {WITHIN:.0%} of fp32's accuracy took part; {SCOUT_ROWS} rows"
    body += page.section("settings", "Every setting that was tried", page.table(words, heads, tried))
    return page.document(f"{outcome.about['model']}: edgeformer frontier", body)


def said(accuracy: float | None) -> str:
    return "too slow to matter" if accuracy is None else f"{accuracy:.4f}"


def verdict(line: Line, goal: Goal) -> str:
    if line.side != OURS:
        return ""
    return "lacks " + ", ".join(line.missed(goal)) if line.missed(goal) else "reached"


STYLES = {OURS: "run1", PEER: "run2", REFERENCE: "ink"}


def picture(outcome: Outcome) -> str:
    marks = [
        plot.Mark(x.timing.cpu_ms, x.accuracy.value, x.name, STYLES[x.side], open=x.side != OURS) for x in outcome.lines
    ]
    best = next(x for x in outcome.lines if x.name == outcome.best_peer)
    corners = [plot.Corner(best.timing.cpu_ms / goal.speedup, goal.accuracy, f"goal {goal.name}") for goal in GOALS]
    words = "; ".join(f"{x.name}: {x.timing.cpu_ms:.3f} ms, {x.accuracy.value:.4f}" for x in ordered(outcome))
    drawn = plot.scatter("frontier", "Accuracy against latency", words, marks, corners, ("CPU ms a row", "accuracy"))
    note = (
        "Filled: ours; open: peers and floating point. A goal is reached above and left of its corner, where the size "
        "fits too. One row of accuracy is 1 of the dev rows; intervals are in the table."
    )
    return page.figure(drawn, note)


def write(path: Path, outcome: Outcome) -> None:
    said = {
        "about": outcome.about,
        "best_peer": outcome.best_peer,
        "goals": [asdict(goal) | {"reached": [x.name for x in outcome.reached(goal)]} for goal in GOALS],
        "lines": [asdict(x) | {"missed": {g.name: x.missed(g) for g in GOALS}} for x in outcome.lines],
        "tried": [x._asdict() for x in outcome.tried],
    }
    path.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    path.with_suffix(".html").write_text(document(outcome), "utf-8")


def pair(text: str) -> tuple[str, str]:
    name, _, what = text.partition("=")
    if not name or not what:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PROGRAM, NAME=FOLDER or NAME=RECIPE")
    return name, what


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/train.tsv and sst2/dev.tsv")
    parser.add_argument("--model", type=Path, required=True, help="MiniLM fine-tuned on SST-2")
    parser.add_argument("--ours", type=pair, action="append", default=[], help="NAME=folder, program file or recipe")
    parser.add_argument("--rows", type=int, default=TIMED_ROWS, help="dev rows that are timed")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/edgeformer/frontier").expanduser())
    parser.add_argument("--out", type=Path, default=Path("frontier.json"), help="and a page beside it, .html")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    folder = arguments.data / TASK
    wanted = [folder / "train.tsv", folder / "dev.tsv", arguments.model / "model.safetensors"]
    if missing := [str(path) for path in wanted if not path.is_file()]:
        print(f"not there: {', '.join(missing)}", file=sys.stderr)
        return 3
    if absent := [peer for peer in peers.PEERS if peer.missing()]:
        for peer in absent:
            print(f"{peer.name} needs {', '.join(peer.missing())}; run: {peer.install}", file=sys.stderr)
        return 3
    torch.set_num_threads(1)
    model = models.load(arguments.model, lengths=peers.LENGTHS)
    dev = data.load(model, folder / "dev.tsv", TASK)
    calibration = data.load(model, folder / "train.tsv", TASK, most=CALIBRATION_ROWS)
    kit = Kit(arguments.model, model, folder, dev, calibration, arguments.work)
    try:
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):  # converters talk
            outcome = run(kit, arguments.ours, arguments.rows, Path(scratch))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    write(arguments.out, outcome)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(outcome))
    return 0 if all(outcome.reached(goal) for goal in GOALS) else 1


if __name__ == "__main__":
    sys.exit(main())
