"""A search for people: a table for the terminal, one self-contained page with the frontier."""

from __future__ import annotations

from rich.table import Table

from . import plot
from .budget import Limits, Outcome, Point, Real
from .page import document, figure, section, table as html_table, text
from .summary import MISSING

__all__ = ["page", "table"]

HEADS = ("trial", "settings", ">ms, modelled", ">MB", ">lost %", ">x here", "limits")
PROXIES = ("trial", "settings", ">ms, modelled", ">MB", ">lost %")


def table(outcome: Outcome) -> Table:
    """The programs that were built and measured; the unchanged model first."""
    made = Table(title=_title(outcome), title_justify="left", caption=_caption(outcome), caption_justify="left")
    for head in HEADS:
        made.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left")
    for line in _lines(outcome):
        made.add_row(*line, style="bold" if outcome.best and line[0] == str(outcome.best.trial) else "")
    return made


def page(outcome: Outcome) -> str:
    """One HTML page: the frontier as pictures, the programs, every trial."""
    head = f'<header><p class="kicker">edgeformer search</p><h1>{text(outcome.model)}</h1>'
    head += f'<p class="lead">{text(_title(outcome), 400)}. {text(_caption(outcome), 400)}</p></header>'
    real = [(str(p.trial), p.real) for p in outcome.points if p.real]
    body = head + section("frontier", "Frontier", _pictures(outcome, real))
    body += section(
        "programs",
        "Programs built and measured",
        html_table("best: the fastest that meets all limits", HEADS, _lines(outcome)),
    )
    trials = [(str(p.trial), _settings(p), *_figures(p.proxy.latency_ms, p.proxy.size_mb, p.proxy.drop))
              for p in outcome.points]  # fmt: skip
    words = "Cheap figures in PyTorch on a part of the rows; they choose what is built, and nothing else"
    body += section("trials", "Every trial", html_table(words, PROXIES, trials))
    return document(f"{outcome.model} for {outcome.target}: edgeformer search", body)


def _title(outcome: Outcome) -> str:
    return f"{outcome.model} for {outcome.target}, {len(outcome.points)} trials, wanted: {outcome.limits.words()}"


def _caption(outcome: Outcome) -> str:
    return (
        f"ms: modelled for {outcome.target} on the exported program; lost: of fp32's {outcome.measure}, all rows; "
        "x here: over the unchanged model in the same format, measured here, interleaved"
    )


def _lines(outcome: Outcome) -> list[tuple[str, ...]]:
    made = [_line("unchanged", "", outcome.baseline, outcome.limits)]
    ran = sorted((p for p in outcome.points if p.real), key=lambda p: p.real.latency_ms if p.real else 0.0)
    for point in ran:
        if point.real:
            line = _line(str(point.trial), _settings(point), point.real, outcome.limits)
            made.append((*line[:-1], "best") if point is outcome.best else line)
    return made


def _line(trial: str, settings: str, real: Real, limits: Limits) -> tuple[str, ...]:
    met = "met" if limits.met(real.latency_ms, real.size_mb, real.drop) else "missed"
    return (trial, settings, *_figures(real.latency_ms, real.size_mb, real.drop), f"{real.here_speedup:.2f}", met)


def _figures(latency_ms: float, size_mb: float, drop: float) -> tuple[str, str, str]:
    return f"{latency_ms:.2f}", f"{size_mb:.2f}", f"{100 * drop:.2f}"


def _settings(point: Point) -> str:
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in point.settings.items()) or MISSING


def _pictures(outcome: Outcome, real: list[tuple[str, Real]]) -> str:
    """What is kept against the cost, for latency and for size; one panel each."""
    every = [("unchanged", outcome.baseline), *real]
    least = min(1 - r.drop for _, r in every)
    up = plot.Scale(min(least, 0.99) - 0.005, 1.005, *_ends(plot.panel_axes(1, 1)[1]))
    panels = ""
    for key, unit, of in (("ms", "ms, modelled", _latency), ("mb", "MB on disk", _size)):
        across = plot.panel_axes(max(of(r) for _, r in every), 1)[0]
        points = [plot.Point(of(r), 1 - r.drop, 1 - r.drop, 1 - r.drop) for _, r in every]
        words = "; ".join(f"{name}: {of(r):.2f} {unit}, {1 - r.drop:.4f} kept" for name, r in every)
        picture = plot.panel(key, f"Kept against {unit}", words, points, (across, up), (unit, "share of fp32 kept"))
        panels += f'<div class="run1"><h4>{unit}</h4>{picture}</div>'
    return figure(f'<div class="panels">{panels}</div>', "Each dot is a program that was built and run on all rows.")


def _latency(real: Real) -> float:
    return real.latency_ms


def _size(real: Real) -> float:
    return real.size_mb


def _ends(scale: plot.Scale) -> tuple[float, float]:
    return scale.start, scale.end
