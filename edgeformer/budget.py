"""
A model for a budget: many settings tried cheaply, the best of them built and measured as real programs.

A trial closes an open recipe (see `edgeformer.recipe`), runs its passes and judges the result in PyTorch: the metric on
a part of the rows, the modelled latency on the device, the size of the weights. The trials that no other beats in all
three are then exported, opened with the device's runner and measured on every row; only those figures decide.

Everything is in `folder`: trials in Optuna's journal, finals as JSON. A search that was killed goes on where it was and
ends as it would have; with the same arguments it gives the same trials.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer_agent import cases, runners, wire

from . import check, data as rows_of, model as models, predict
from .attention import swap
from .device import Device
from .errors import BadInput, BudgetMissed, EdgeformerError, MissingExtra
from .model import Model
from .plan import PRECISIONS, Export, plans
from .program import Program
from .recipe import Kitchen, Recipe, closed, cook, dump, load, ranges
from .stages import Progress, quiet
from .workshop import described

try:
    import optuna
except ImportError:  # limits and recipes need none of it; a search says what to install
    optuna = None  # type: ignore[assignment]

__all__ = ["Limits", "Outcome", "Point", "Proxy", "Real", "kitchen", "search"]

PROXY_ROWS = 200
FINALISTS = 4
REPEATS = 3  # of each row when a program is timed


@dataclass(frozen=True)
class Limits:
    """What the device must do. Latency: median over the rows; drop: a share of what fp32 has. None: no limit."""

    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0 and not (name == "max_drop" and value == 0):
                raise BadInput(f"{name} {value} must be above 0")

    def words(self) -> str:
        """In the units in which figures are shown."""
        said = (("ms", self.max_latency_ms, 1), ("MB", self.max_size_mb, 1), ("% lost", self.max_drop, 100))
        known = [f"{factor * most:g} {unit}" for unit, most, factor in said if most is not None]
        return f"{', '.join(known)} at most" if known else "no limit"

    def met(self, latency_ms: float, size_mb: float, drop: float) -> bool:
        wanted = (self.max_latency_ms, self.max_size_mb, self.max_drop)
        return all(
            most is None or found <= most for found, most in zip((latency_ms, size_mb, drop), wanted, strict=True)
        )

    def excess(self, latency_ms: float, size_mb: float, drop: float) -> float:
        """How far outside: the largest ratio to a limit; drops are compared in points of ten per cent."""
        pairs = ((latency_ms, self.max_latency_ms), (size_mb, self.max_size_mb))
        ratios = [found / most - 1 for found, most in pairs if most is not None]
        if self.max_drop is not None:
            ratios.append(10 * (drop - self.max_drop))
        return max([0.0, *ratios])


@dataclass(frozen=True)
class Proxy:
    """A trial's cheap figures: latency modelled, size of the weights, accuracy in PyTorch on a part of the rows."""

    latency_ms: float
    size_mb: float
    drop: float


@dataclass(frozen=True)
class Real:
    """A program's figures. latency_ms: modelled for the device on the exported program; here_ms: measured here."""

    program: str
    latency_ms: float
    size_mb: float
    drop: float
    here_ms: float
    here_speedup: float  # over the unchanged model in the same format and precision, interleaved in one run
    fidelity: wire.Fidelity


@dataclass(frozen=True)
class Point:
    """One setting and what it gave. real is None for what was not a finalist."""

    trial: int
    settings: Mapping[str, Any]
    proxy: Proxy
    real: Real | None = None


@dataclass(frozen=True)
class Outcome:
    """Every point; `best` is the fastest on the device that meets all limits."""

    model: str
    target: str
    limits: Limits
    measure: str
    baseline: Real
    points: tuple[Point, ...]
    best: Point | None
    space: Recipe

    @property
    def recipe(self) -> Recipe:
        """The best point as a recipe. Raises BudgetMissed where there is none."""
        if self.best is None:
            raise BudgetMissed(self.refusal())
        return replace(closed(self.space, self.best.settings), name=f"{self.space.name}-{self.best.trial}")

    def refusal(self) -> str:
        """What came nearest, for who asked for more."""
        real = sorted((p for p in self.points if p.real), key=lambda p: self._excess(p))[:3]
        lines = [f"trial {p.trial}: {_words(p.real)} {_settings(p.settings)}" for p in real if p.real]
        return f"no program of {self.model} on {self.target} meets {self.limits.words()}; nearest:\n" + "\n".join(lines)

    def _excess(self, point: Point) -> float:
        assert point.real is not None
        return self.limits.excess(point.real.latency_ms, point.real.size_mb, point.real.drop)

    def to_json(self) -> str:
        body = dataclasses.asdict(replace(self, space=replace(self.space, steps=())))
        body["space"] = dump(self.space)
        body["recipe"] = dump(self.recipe) if self.best else None
        return json.dumps(body, indent=1, default=lambda value: value._asdict())


def search(
    model: models.Source,
    target: str,
    limits: Limits,
    *,
    data: rows_of.Data = None,
    task: str | None = None,
    train: str | Path | None = None,
    space: str | Path | Recipe = "search",
    trials: int = 20,
    finalists: int = FINALISTS,
    format: str | None = None,
    precision: str | None = None,
    folder: str | Path = "search",
    seed: int = 0,
    progress: Progress | None = None,
) -> Outcome:
    """
    data, task: what programs are judged with, as for `build`. train: a file of the same task that passes calibrate on
    and learn from; without it they see the rows of `data`, without their labels. space: an open recipe.
    format, precision: of the target's; its first by default. Raises BadInput, GateFailed never: what fails is a point.
    """
    report = progress or quiet
    if optuna is None:
        raise MissingExtra("search", "optuna")
    found = load(space) if not isinstance(space, Recipe) else space
    (plan,) = plans(target, [format] if format else None, precision or (found.precision or None))
    plan = plan.first()
    if not isinstance(model, Model):
        model = models.load(model)
    rows = rows_of.load(model, data, task)
    model = rows_of.with_task(model, rows)
    given = kitchen(model, data, train, task, Path(folder), report)
    bench = _Bench(model, rows, (data, task), plan.device, plan.exports[0], given, limits, Path(folder))
    study = _study(bench, found, seed)
    points = _tried(study, bench, found, trials, seed, report)
    baseline = bench.final(-1, replace(found, steps=()))
    points = _judged(points, bench, found, finalists, report)
    met = [p for p in points if p.real and limits.met(p.real.latency_ms, p.real.size_mb, p.real.drop)]
    best = min(met, key=lambda p: p.real.latency_ms if p.real else 0.0, default=None)
    measure = baseline.fidelity.metric or baseline.fidelity.measure
    return Outcome(model.name, plan.device.name, limits, measure, baseline, tuple(points), best, found)


def kitchen(
    model: Model, data: rows_of.Data, train: str | Path | None, task: str | None, folder: Path, report: Progress
) -> Kitchen:
    """What passes are given: the training file, or the rows of `data` without their labels where there is none."""

    def read(reader: Model) -> rows_of.Rows:
        rows = rows_of.load(reader, data if train is None else train, task)
        return replace(rows, labels=None) if train is None else rows

    texts, labels = ((), None) if train is None else rows_of.texts(train, task)
    compares = model.task.kind == "regression"  # its head reads two texts at once
    learned = rows_of.pairs(train, task) if train is not None and task is not None and compares else texts
    return Kitchen(model, read(model), read, learned, labels, folder / "work", report)


@dataclass(frozen=True)
class _Bench:
    """What trials and finals are judged with."""

    model: Model
    rows: rows_of.Rows
    source: tuple[rows_of.Data, str | None]
    device: Device
    export: Export
    kitchen: Kitchen
    limits: Limits
    folder: Path

    @cached_property
    def wanted(self) -> tuple[np.ndarray, ...]:
        """The unchanged model's outputs."""
        return check.reference(self.model, self.rows.rows, lambda _n: None)

    @cached_property
    def unchanged(self) -> Program:
        """What every program is timed against."""
        (program,) = self.export.programs(self.model)
        return program

    def made(self, recipe: Recipe) -> tuple[Model, rows_of.Rows]:
        """The passes run; rows are cut into tokens again where the vocabulary changed."""
        model = cook(recipe, self.kitchen, self.model)
        return model, self.rows if model.tokenizer is self.model.tokenizer else rows_of.load(model, *self.source)

    def proxy(self, recipe: Recipe) -> Proxy:
        model, rows = self.made(recipe)
        picked = _thin(len(rows.rows), PROXY_ROWS)
        few = [rows.rows[i] for i in picked]
        outputs = check.reference(model, few, lambda _n: None)
        wanted = tuple(self.wanted[i] for i in picked)
        labels = None if rows.labels is None else [rows.labels[i] for i in picked]
        found = check.fidelity(self.model, outputs, wanted, labels)
        tokens = [cases.length(row) for row in few]
        precision = self.export.precisions[0]
        return Proxy(_modelled_ms(model, tokens, self.device, precision), _weights_mb(model, precision), drop(found))

    def final(self, trial: int, recipe: Recipe) -> Real:
        """Exported, run on every row, timed against the unchanged model; from the folder where it was done before."""
        path = self.folder / "finals" / f"{hashlib.sha256(self._identity(recipe).encode()).hexdigest()[:16]}.json"
        if path.is_file():
            body = json.loads(path.read_text("utf-8"))
            return Real(**{**body, "fidelity": wire.Fidelity(**body["fidelity"])})
        model, rows = self.made(recipe)
        (program,) = self.export.programs(model) if trial >= 0 else (self.unchanged,)
        outputs = check.run(program, described(program), rows.rows, lambda _n: None)
        found = check.fidelity(self.model, outputs, self.wanted, rows.labels)
        here, ratio = _timed(program, rows, self.unchanged, self.rows)
        tokens = [cases.length(row) for row in rows.rows]
        rates = predict.on(self.device, program.format, program.precision)
        latency = predict.predict(program.work, program.lengths, tokens, rates).metrics.latency_ms or 0.0
        real = Real(program.name, latency, program.size_bytes / 2**20, drop(found), here, ratio, found)
        _save(path, json.dumps({**dataclasses.asdict(real), "fidelity": found._asdict()}, indent=1))
        return real

    def _identity(self, recipe: Recipe) -> str:
        weights = next(step.facts for step in self.model.history if step.name == "load")["weights_sha256"]
        return json.dumps([weights, self.rows.source, self.kitchen.rows.source, self.export.name,
                           self.export.precisions, self.device.name, dump(recipe)])  # fmt: skip


def drop(found: wire.Fidelity) -> float:
    """What was lost, as a share of what fp32 has: of the metric, or of the closeness where there are no labels."""
    if found.value is None or found.reference is None:
        return max(0.0, 1.0 - found.mean)
    return (found.reference - found.value) / abs(found.reference) if found.reference else 0.0


# --- trials -----------------------------------------------------------------------------------------------------------


def _study(bench: _Bench, space: Recipe, seed: int) -> optuna.Study:
    """Of these very arguments: another model, data or space gets a study of its own in the same folder."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not ranges(space):
        raise BadInput(f"recipe {space.name} has no open setting: nothing to search; see edgeformer.recipe")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench.folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(f"{bench._identity(space)} {seed}".encode()).hexdigest()[:16]
    storage = JournalStorage(JournalFileBackend(str(bench.folder / "trials.log")))
    return optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * 3, load_if_exists=True,
    )  # fmt: skip


def _tried(study: optuna.Study, bench: _Bench, space: Recipe, trials: int, seed: int, report: Progress) -> list[Point]:
    """
    Trials until there are `trials`. Each has a sampler of its own, seeded by its number, so that a search that was
    interrupted chooses what it would have chosen.
    """
    done = _complete(study)
    while len(done) < trials:
        report("trials", len(done), trials)
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(done), n_startup_trials=max(4, trials // 3))
        trial = study.ask()
        settings = {name: _suggested(trial, name, found) for name, found in ranges(space).items()}
        known = next((t for t in done if t.params == trial.params), None)
        for key, value in (known.user_attrs if known else {}).items():
            trial.set_user_attr(key, value)
        try:
            proxy = Proxy(*known.values) if known else bench.proxy(closed(space, settings))
        except EdgeformerError as error:
            trial.set_user_attr("error", str(error))
            proxy = Proxy(1e9, 1e9, 1e9)  # not tried again, and never chosen
        study.tell(trial, dataclasses.astuple(proxy))
        done = _complete(study)
    report("trials", trials, trials)
    if all(t.user_attrs.get("error") for t in done):
        raise BadInput(f"every trial failed; the first: {done[0].user_attrs['error']}")
    return [_point(t, space) for t in done[:trials] if "error" not in t.user_attrs]


def _complete(study: optuna.Study) -> list[Any]:
    return [t for t in study.get_trials(deepcopy=False) if t.state is optuna.trial.TrialState.COMPLETE]


def _suggested(trial: optuna.Trial, name: str, found: Any) -> Any:
    if found.choice:
        return trial.suggest_categorical(name, found.choice)
    if isinstance(found.low, int) and isinstance(found.high, int):
        return trial.suggest_int(name, found.low, found.high, step=int(found.step or 1))
    return round(trial.suggest_float(name, found.low, found.high, step=found.step), 6)


def _point(trial: Any, space: Recipe) -> Point:
    chosen = {k: round(v, 6) if isinstance(v, float) else v for k, v in trial.params.items()}
    return Point(trial.number, {name: chosen[name] for name in ranges(space)}, Proxy(*trial.values))


def _judged(points: list[Point], bench: _Bench, space: Recipe, most: int, report: Progress) -> list[Point]:
    """The finalists with their real figures."""
    chosen = _finalists(points, bench.limits, most)
    for n, point in enumerate(chosen):
        report("finalists", n, len(chosen))
        real = bench.final(point.trial, closed(space, point.settings))
        points = [replace(p, real=real) if p.trial == point.trial else p for p in points]
    report("finalists", len(chosen), len(chosen))
    return points


def _finalists(points: Sequence[Point], limits: Limits, most: int) -> list[Point]:
    """Of those that no other beats, the nearest to the limits; inside them the fastest first."""
    unique = list({json.dumps(p.settings, sort_keys=True): p for p in reversed(points)}.values())
    values = {p.trial: dataclasses.astuple(p.proxy) for p in unique}
    front = [p for p in unique if not any(_beats(values[q.trial], values[p.trial]) for q in unique)]
    return sorted(front, key=lambda p: (limits.excess(*values[p.trial]), p.proxy.latency_ms, p.trial))[:most]


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


# --- figures ----------------------------------------------------------------------------------------------------------


def _modelled_ms(model: Model, tokens: Sequence[int], device: Device, precision: str) -> float:
    """Roofline over linear layers and dense attention, median over rows: to compare trials, not to tell users."""
    weights = sum(m.weight.numel() for m in model.module.modules() if isinstance(m, torch.nn.Linear))
    try:
        channels = sum(layer.heads * layer.dim for layer in swap.layers(model.module))
    except BadInput:
        channels = 0
    int8 = precision in ("int8", "int8-static", "int4-embeddings")
    times = []
    for n in tokens:
        linear, attention = 2.0 * weights * n, 4.0 * channels * n * n
        flops, ops = (attention, linear) if int8 else (attention + linear, 0.0)
        work = wire.Work(n, flops, ops, weights * PRECISIONS[precision].weight_bytes, 0.0)
        times.append(predict.row_ms([work], n, device))
    return float(np.median(times))


def _weights_mb(model: Model, precision: str) -> float:
    """Matrices in the wanted precision, vectors in fp32."""
    sizes = [(p.numel(), PRECISIONS[precision].weight_bytes if p.ndim > 1 else 4) for p in model.module.parameters()]
    return sum(n * size for n, size in sizes) / 2**20


def _timed(program: Program, rows: rows_of.Rows, dense: Program, dense_rows: rows_of.Rows) -> tuple[float, float]:
    """Mean over rows of each row's median ms of CPU time, one thread; and the dense one's over it."""
    picked = _thin(len(rows.rows), PROXY_ROWS)
    with check.opened(program) as a, check.opened(dense) as b:
        runs = [
            (runners.load(p.format).load(path, described(p), 1), given.rows)
            for p, path, given in ((program, a, rows), (dense, b, dense_rows))
        ]
        times = np.zeros((2, len(picked), REPEATS))
        for repeat in range(-1, REPEATS):  # the first round warms up
            for place, i in enumerate(picked):
                for which, (run, given) in enumerate(runs):
                    start = time.process_time()
                    run(given[i])
                    if repeat >= 0:
                        times[which, place, repeat] = time.process_time() - start
    here, base = 1000 * np.median(times, axis=2).mean(axis=1)
    return float(here), float(base / here)


def _thin(count: int, most: int) -> list[int]:
    return [i * count // min(count, most) for i in range(min(count, most))]


def _save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _words(real: Real) -> str:
    return f"{real.latency_ms:.3g} ms (modelled), {real.size_mb:.2f} MB, {100 * real.drop:.2f} % lost;"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in settings.items())
