"""
One program in one process: import, load, self-check, steady run, energy, fidelity, in that order.

The agent starts this in a fresh interpreter for every program, so that memory and start-up are this program's own and
a runtime that crashes takes nothing else with it.
"""

import os
import time
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np

from . import cases, native, power, runners, score, system, timing, wire

GOLDEN_FAILED = "self_check_failed"
OPERATORS = 12  # the profile names so many, the longest
REMEDIES = {"tensorrt": "It comes with JetPack: sudo apt-get install nvidia-jetpack"}  # not what pip would install
Run = Callable[[cases.Row], Any]


class Options(NamedTuple):
    """How to measure. `rows` bounds the evaluation rows; None takes all of them."""

    threads: int
    plan: timing.Plan
    rows: Optional[int]
    root: str
    emulated: bool


class Unavailable(Exception):
    """This device cannot run the program; the message says why."""


def measure(folder, manifest, entry, options):
    # type: (str, wire.Manifest, wire.Entry, Options) -> wire.Result
    """`folder` is verified already. Raises Unavailable where the runtime is missing or of another version."""
    library = native.find(folder, entry)
    distrust = native.trial(folder, entry, options.threads, library) if library else None
    if library and distrust:
        print("{}: running without {}: {}".format(entry.name, os.path.basename(library), distrust))
        library = None
    held_mb = system.rss_mb()
    run, version, times = _open(folder, entry, options.threads, library, distrust)
    golden, first_ms = _golden(folder, manifest, entry, run)
    result = wire.Result(
        program=entry.name,
        format=entry.format,
        precision=entry.precision,
        runtime_version=version,
        threads=options.threads,
        import_ms=times[0],
        load_ms=times[1],
        first_ms=first_ms,
        golden=golden,
        latency=None,
        memory=system.memory(held_mb),
        energy=None,
        fidelity=None,
        before=system.snapshot(options.root),
        after={},
        flags=(() if golden.passed else (GOLDEN_FAILED,)) + ((native.FALLBACK,) if distrust else ()),
    )
    if not golden.passed:
        return result
    journal = native.journal(run, library)
    return _steady(folder, manifest, run, options, result, held_mb, journal)


def _open(folder, entry, threads, library, distrust):
    # type: (str, wire.Entry, int, Optional[str], Optional[str]) -> Tuple[Run, str, Tuple[float, float]]
    """The program, its runtime's version, and the ms that importing and loading took. `distrust`: of its library."""
    start = time.perf_counter()
    try:
        runner = runners.load(entry.format)
        version = runner.version(library)
    except ImportError as error:
        raise Unavailable(_missing(entry, error, distrust))
    if not _within(version, entry.runtime):
        raise Unavailable(
            "{} {} is installed, the program needs >={},<{}".format(
                entry.runtime.package, version, entry.runtime.minimum, entry.runtime.below
            )
        )
    imported = time.perf_counter()
    run = runner.load(os.path.join(folder, entry.path), entry, threads, library)
    return run, version, (1e3 * (imported - start), 1e3 * (time.perf_counter() - imported))


def _missing(entry, error, distrust):
    # type: (wire.Entry, ImportError, Optional[str]) -> str
    package, minimum, below = entry.runtime
    remedy = REMEDIES.get(package, "Run: pip install '{}>={},<{}'".format(package, minimum, below))
    why = "{} is not installed ({}). {}".format(package, error, remedy)
    return "the bundle's own library cannot be used here ({}), and {}".format(distrust, why) if distrust else why


def _within(version, runtime):
    # type: (str, wire.Runtime) -> bool
    def number(text):
        # type: (str) -> List[int]
        digits = [part.split("+")[0].split("rc")[0].split("a")[0].split("b")[0] for part in text.split(".")]
        return [int(part) if part.isdigit() else 0 for part in digits]

    return number(runtime.minimum) <= number(version) < number(runtime.below)


def _golden(folder, manifest, entry, run):
    # type: (str, wire.Manifest, wire.Entry, Run) -> Tuple[wire.Golden, float]
    """Before anything is measured, this device must compute what the build machine computed with this very program."""
    stored = cases.load(os.path.join(folder, manifest.cases.golden))
    wanted = stored.outputs[entry.name]
    start = time.perf_counter()
    outputs = [run(stored.rows[0])]
    first_ms = 1e3 * (time.perf_counter() - start)
    outputs += [run(row) for row in stored.rows[1:]]
    worst = float(score.similarity(manifest.task, outputs, wanted).min())
    return wire.Golden(len(wanted), worst, entry.golden_similarity, worst >= entry.golden_similarity), first_ms


def _steady(folder, manifest, run, options, result, held_mb, journal):
    # type: (str, wire.Manifest, Run, Options, wire.Result, float, Optional[native.Journal]) -> wire.Result
    stored = cases.load(os.path.join(folder, manifest.cases.evaluation))
    picked = _picked(score.groups(manifest.task, len(stored.rows), stored.labels), options.rows)
    rows = [stored.rows[i] for i in picked]

    def step(i):
        # type: (int) -> Any
        return run(rows[i])

    lengths = [cases.length(row) for row in rows]
    before = system.snapshot(options.root)
    latency, flags = timing.measure(step, lengths, options.plan)
    after = system.snapshot(options.root)
    memory = system.memory(held_mb)
    energy, doubts = _energy(step, lengths, options)
    partial = ("evaluation_partial",) if len(rows) < len(stored.rows) else ()
    fidelity = _fidelity(manifest.task, journal.watch(run) if journal else run, stored, picked)
    return result._replace(
        latency=latency,
        memory=memory,
        energy=energy,
        fidelity=fidelity,
        before=before,
        after=after,
        flags=result.flags + flags + system.flags(before, after) + doubts + partial,
        native=journal.native() if journal else None,
        profile=_profile(run, rows),
    )


def _profile(run, rows):
    # type: (Run, List[cases.Row]) -> Tuple[wire.Spent, ...]
    """Of the row of median length, after everything else: watching costs time. Nothing measured is lost if it fails."""
    if not hasattr(run, "profiled"):
        return ()
    try:
        times = run.profiled(sorted(rows, key=cases.length)[len(rows) // 2])
    except Exception as error:
        print("no profile: {}: {}".format(type(error).__name__, error))
        return ()
    spent = [wire.Spent(name, ms) for name, ms in times[:OPERATORS]]
    rest = sum(ms for _, ms in times[OPERATORS:])
    return tuple(spent + ([wire.Spent("the rest", rest)] if rest else []))


def _picked(groups, most):
    # type: (List[int], Optional[int]) -> List[int]
    """At most `most` rows, evenly spread; those that are judged together stay together."""
    if most is None or most >= len(groups):
        return list(range(len(groups)))
    numbers = sorted(set(groups))
    kept = max(1, most * len(numbers) // len(groups))
    chosen = {numbers[i * len(numbers) // kept] for i in range(kept)}
    return [i for i, group in enumerate(groups) if group in chosen]


def _energy(step, lengths, options):
    # type: (Callable[[int], Any], List[int], Options) -> Tuple[Optional[wire.Energy], Tuple[str, ...]]
    """A pass of its own: reading a sensor disturbs latency. None without a sensor."""
    sensor = None if options.emulated else power.find(options.root)
    if sensor is None:
        return None, ()
    least = power.LEAST_RUNS, power.LEAST_SECONDS
    return power.measure(sensor, lambda: timing.burst(step, lengths, least[0], least[1], options.plan.max_seconds))


def _fidelity(task, run, stored, picked):
    # type: (wire.Task, Run, cases.Cases, List[int]) -> wire.Fidelity
    outputs = [run(stored.rows[i]) for i in picked]
    for i, output in zip(picked, outputs):
        if not np.isfinite(output).all():  # no figure of closeness exists then
            raise ValueError("evaluation row {} gives a value that is not finite".format(i))
    reference = [stored.outputs["reference"][i] for i in picked]
    labels = stored.labels
    if labels is not None:
        labels = [labels[i] for i in ([i // 2 for i in picked[::2]] if task.paired else picked)]
    return score.fidelity(task, outputs, reference, labels)
