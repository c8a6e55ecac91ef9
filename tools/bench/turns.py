"""Programs that take turns: answered on all rows, timed row by row, so that figures of one run can be compared."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeformer import data, evaluate
from edgeformer.program import Program
from edgeformer.workshop import described
from edgeformer_agent import runners
from edgeformer_agent.cases import Row

ROUNDS = 7
Run = Callable[[Row], Any]


@dataclass(frozen=True)
class Entrant:
    """A program that is open. `rows` are made by its own tokenizer."""

    name: str
    runtime: str  # and its version
    setting: str
    run: Run
    rows: data.Rows
    program_mb: float  # millions of bytes
    tokenizer_mb: float


@dataclass(frozen=True)
class Timing:
    """Means over rows of each row's median over rounds. Both clocks: on a busy machine the first is the larger."""

    ms: float
    cpu_ms: float
    p90_ms: float  # over rows


def entrant(name: str, program: Program, folder: Path, rows: data.Rows, tokenizer_mb: float, setting: str) -> Entrant:
    """The program, opened by the runner that devices use, on one thread. `folder` is made, and must stay."""
    for file, content in program.files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    runner = runners.load(program.format)
    run = runner.load(str(folder / program.entry), described(program), 1)
    runtime = f"{program.runtime.package} {runner.version()}"
    return Entrant(name, runtime, setting, run, rows, program.size_bytes / 1e6, tokenizer_mb)


def answers(subject: Entrant, task: str) -> evaluate.Evaluation:
    """On all its rows."""
    return evaluate.judged(
        subject.name, [np.asarray(subject.run(row)) for row in subject.rows.rows], subject.rows, task
    )


def pick(count: int, most: int) -> list[int]:
    """At most so many places, evenly spread: the same in every run."""
    return [i * count // min(count, most) for i in range(min(count, most))]


@contextmanager
def pinned() -> Iterator[int]:
    """Every thread of this process on one CPU, whose number it gives, for as long as figures are taken."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    _to({cpu})
    try:
        yield cpu
    finally:
        _to(allowed)


def _to(cpus: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)


def timed(subjects: Sequence[Entrant], picked: Sequence[int], rounds: int = ROUNDS) -> dict[str, Timing]:
    """
    By name, on one pinned CPU. A program answers a row twice in each turn, and the second time counts: the caches hold
    its own weights again, as they do where nothing else runs.
    """
    clocks = (time.perf_counter_ns, time.process_time_ns)
    taken = np.zeros((2, rounds, len(picked), len(subjects)))
    with pinned():
        for at, place in enumerate(picked):
            for turn in range(rounds):
                for number, subject in enumerate(subjects):
                    row = subject.rows.rows[place]
                    subject.run(row)
                    began = [clock() for clock in clocks]
                    subject.run(row)
                    taken[:, turn, at, number] = [clock() - start for clock, start in zip(clocks, began, strict=True)]
    ms, cpu = 1e-6 * np.median(taken, axis=1)  # [rows, subjects] each
    means = zip(ms.mean(0), cpu.mean(0), np.quantile(ms, 0.9, axis=0), strict=True)
    return {s.name: Timing(*map(float, found)) for s, found in zip(subjects, means, strict=True)}


def speedup(base: Timing, other: Timing) -> float:
    """How often `other` fits into `base`, by the clock that says less."""
    return min(base.ms / other.ms, base.cpu_ms / other.cpu_ms)


def machine() -> dict[str, Any]:
    """What explains a figure, without naming anybody's machine."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": 1,
    }
