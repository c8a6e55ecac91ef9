"""Where long work is, and what it costs this machine: seconds by stage, and the most memory it held."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Cost", "Progress", "Stages", "quiet"]

Progress = Callable[[str, int, int], None]  # what, done, total
SHOWN_S = 0.5  # shorter stages are left out of the words


def quiet(_what: str, _done: int, _total: int) -> None:
    """The progress of who does not ask."""


@dataclass(frozen=True)
class Cost:
    """
    stages_s: wall seconds, in the order the stages began; they add up to the whole. cpu_s: of this process, which is
    what is left of a time where others share the machine. peak_mb: of this process; peak_child_mb: of the largest that
    it started, beside it. MB of 1024 kB.
    """

    stages_s: Mapping[str, float]
    cpu_s: float
    peak_mb: float
    peak_child_mb: float

    def words(self) -> str:
        """One line for a terminal."""
        parts = ", ".join(f"{what} {s:.0f}" for what, s in self.stages_s.items() if s >= SHOWN_S)
        whole = f"{sum(self.stages_s.values()):.0f} s ({self.cpu_s:.0f} s of CPU)"
        child = f" + {self.peak_child_mb:.0f} in a child" if self.peak_child_mb else ""
        return f"took {whole}, peak memory {self.peak_mb:.0f} MB{child}; by stage: {parts}"


class Stages:
    """A listener to progress: a stage lasts from its own word until another speaks."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._spent = progress, dict[str, float]()
        self._last, self._since, self._cpu = "start", time.perf_counter(), time.process_time()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._close(what)
        self._progress(what, done, total)

    def cost(self) -> Cost:
        """So far."""
        self._close(self._last)
        rounded = {what: round(seconds, 3) for what, seconds in self._spent.items()}
        peaks = (round(_peak_mb(who), 1) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return Cost(rounded, round(time.process_time() - self._cpu, 3), *peaks)

    def _close(self, following: str) -> None:
        now = time.perf_counter()
        self._spent[self._last] = self._spent.get(self._last, 0.0) + now - self._since
        self._last, self._since = following, now


def _peak_mb(who: int) -> float:
    """Linux counts in kB, macOS in bytes."""
    return resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
