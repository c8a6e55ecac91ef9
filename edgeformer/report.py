"""
Reports for people and programs: a table for the terminal, one self-contained HTML page, one JSON document.

The page needs no network, no script and no font; its pictures are SVG. A report comes from a device nobody here
controls: its words pass `clean` and `escape`, and the page's own policy forbids everything but inline style.
Measured, emulated and modelled figures never share an axis unless the prediction was made for that very device.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from edgeformer_agent.wire import Entry, Fidelity, Latency, Manifest, Memory, Native, Report, Step, digest, dump

from . import plot
from .compare import NOISE, Comparison, machine
from .page import (
    Cell,
    Raw,
    details as _details,
    document,
    figure as _figure,
    section as _section,
    table as _table,
    text as _t,
)
from .plot import Label, tag
from .summary import (
    EMULATED,
    MISSING,
    MODELLED,
    NO_SENSOR,
    Row,
    band_words,
    clean,
    energy_text,
    explained,
    facts,
    kept_text,
    layers_kept,
    letter,
    number,
    rows,
    share,
    table,
    to_json,
)

__all__ = ["Row", "rows", "table", "to_html", "to_json"]

BINS = 56
LENGTHS = 40  # places on the token axis of a panel
PREDICTED = "predicted_latency_ms"
NAMES = {
    "latency_ms": "latency, median",
    PREDICTED: "latency, predicted",
    "memory_mb": "peak memory",
    "energy_mj": "energy above idle",
    "fidelity": "fidelity, mean",
    "fidelity_worst": "fidelity, worst row",
}
MEASURES = {
    "agreement": "Circle: share of rows with the same answer. Diamond: the row whose class probabilities moved most, "
    "1 less their total variation.",
    "likelihood": "Circle: what is left of each next token's likelihood. Diamond: the row whose probabilities moved "
    "most, 1 less their total variation.",
    "correlation": "Circle: correlation over the rows. Diamond: the row farthest off, 1 less error over spread.",
}
COSTS = ("latency_ms", "memory_mb", "energy_mj")  # less is better, ratios share one axis
VERDICTS = {"faster": "good", "better": "good", "as predicted": "good", "slower": "bad", "worse": "bad"}
VERDICTS["outside the band"] = "bad"


Timed = tuple[Row, Latency]
Judged = tuple[Row, Fidelity]


@dataclass(frozen=True)
class Page:
    """What every section is made from."""

    manifest: Manifest
    reports: Sequence[Report]
    comparisons: Sequence[Comparison]
    rows: Sequence[Row]
    signer: str | None

    def by_program(self) -> list[Row]:
        """Runs of one program next to each other."""
        order = list(dict.fromkeys(row.program for row in self.rows))
        return sorted(self.rows, key=lambda row: order.index(row.program))

    def timed(self, kind: str) -> list[Timed]:
        return [(row, row.latency) for row in self.by_program() if row.kind == kind and row.latency]


def to_html(
    manifest: Manifest,
    reports: Sequence[Report],
    comparisons: Sequence[Comparison] = (),
    signer: str | None = None,
) -> str:
    """One page. `signer` names the key that verified the bundle; a manifest does not carry it."""
    page = Page(manifest, reports, comparisons, rows(manifest, reports), signer)
    sections = (
        _validity,
        _programs,
        _latency,
        _distributions,
        _fidelity,
        _sparse,
        _spent,
        _resources,
        _compared,
        _places,
        _bundle,
    )
    body = _header(page) + "".join(section(page) for section in sections) + _footer()
    return document(f"{manifest.name} {manifest.version} on {manifest.target}: edgeformer report", body)


# --- the top of the page ------------------------------------------------------------------------------------------


def _header(page: Page) -> str:
    made = page.manifest
    lead = f"Bundle for {_t(made.target)}, {len(made.programs)} programs, digest <code>{digest(dump(made))[:12]}</code>"
    runs = "".join(_run(letter(i), report) for i, report in enumerate(page.reports))
    return tag(
        "header",
        {},
        '<p class="kicker">edgeformer report</p>',
        f"<h1>{_t(made.name)} <small>version {made.version}</small></h1>",
        f'<p class="lead">{lead}</p>',
        f'<ul class="runs">{runs}</ul>' if runs else "",
        _headline(page),
    )


def _run(key: str, report: Report) -> str:
    words = f"{_t(report.started)} · {_t(report.profile)} run · agent {_t(report.agent)}"
    return (
        f"<li>{_key(key)}<div><strong>{_t(machine(report))}</strong> "
        f"{_badge(report.kind)}<br><span>{words}</span></div></li>"
    )


def _key(key: str) -> str:
    return f'<b class="key {_style(key)}">{key}</b> ' if key else ""


def _badge(kind: str) -> str:
    words = {"emulated": EMULATED, "modelled": MODELLED}.get(kind, clean(kind, 20))
    style = kind if kind in ("measured", "emulated", "modelled") else "emulated"
    return f'<em class="badge {style}">{escape(words)}</em>'


def _headline(page: Page) -> str:
    """The fastest program that passed, where something was run; what is expected, where nothing was."""
    chosen = [row for row in page.rows if row.selected]
    ran = sorted(chosen, key=lambda row: not row.measured)
    expected = sorted(page.rows, key=lambda row: row.band[1] if row.band else math.inf)
    row = next(iter(ran or expected), None)
    if row is None:
        return ""
    where = f"on {_t(row.device)}" if row.device else f"for {_t(page.manifest.target)}"
    state = {"measured": "Fastest that passed its self-check", "modelled": "Not run yet"}
    words = f"{state.get(row.kind, 'Outputs checked')}: <strong>{_t(row.program)}</strong> {where}"
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<span>{escape(remark)}</span></dd></div>"
        for name, figure, remark in _tiles(row)
    )
    return f'<p class="best">{words} {_key(row.report)}{_badge(row.kind)}</p><dl class="tiles">{tiles}</dl>'


def _tiles(row: Row) -> list[tuple[str, str, str]]:
    """Name, figure, remark; time, memory and energy only where they were measured on the device itself."""
    found, memory, energy = row.fidelity, row.memory, row.energy
    tiles = [_latency_tile(row), ("Size", number(row.size_mb, "MB"), clean(row.program, 40))]
    if found:
        tiles.append((f"Fidelity, {clean(found.measure, 20)}", share(found.mean), f"worst row {share(found.worst)}"))
    if found and found.metric:
        tiles.append((clean(found.metric, 20).capitalize(), share(found.value), f"fp32 {share(found.reference)}"))
    if memory and row.measured:
        tiles.append(("Peak memory", number(memory.peak_rss_mb, "MB"), f"grew {number(memory.growth_mb)} MB"))
    if row.measured:
        tiles.append(("Energy per inference", energy_text(row), clean(energy.source, 60) if energy else "none stated"))
    return tiles


def _latency_tile(row: Row) -> tuple[str, str, str]:
    latency, said, band = row.latency, row.predicted, row.band
    if row.measured and latency:
        return "Latency, median", number(latency.p50_ms, "ms"), f"p90 {number(latency.p90_ms)}, n {number(latency.n)}"
    if said and band:
        return "Latency, modelled", number(band[1], "ms"), f"{_ends(band)} on {clean(said.device, 24)}"
    return "Latency", MISSING, "neither measured nor modelled"


def _ends(band: tuple[float, float, float]) -> str:
    return f"{number(band[0])}–{number(band[2])}"


def _validity(page: Page) -> str:
    flagged: dict[str, list[str]] = {}
    for i, report in enumerate(page.reports):
        doubt = "emulated" if report.kind != "measured" else "virtual_machine" if report.device.get("virtual") else ""
        if doubt:
            flagged.setdefault(doubt, []).append(f"{letter(i)}, every program")
    for row in page.rows:
        for flag in row.flags:
            flagged.setdefault(flag, []).append(f"{row.report} {clean(row.program, 40)}")
    if flagged:
        lines = [
            (Raw(f'<b class="flag">⚑ {_t(flag, 40)}</b>'), "; ".join(places), *explained(flag))
            for flag, places in flagged.items()
        ]
        heads = ("flag", "where", "what it means", "what to do")
        inside = _table("Flags raised by the device, and what they mean for the figures", heads, lines)
        return _section("validity", "Read this first", inside, "warn")
    if not page.timed("measured"):
        return _section("validity", "Read this first", "<p>Nothing was run: every time below is modelled.</p>", "warn")
    calm = "<p>No flags: clocks, temperatures and supply stayed within bounds, and the runs were long enough.</p>"
    return _section("validity", "Validity", calm, "calm")


def _programs(page: Page) -> str:
    heads: tuple[str, ...] = ("program", "~run", ">size MB", ">predicted ms", ">p50 ms", ">p90", ">p99")
    heads += (">fidelity", ">worst", ">task", ">fp32", ">peak MB", ">energy", "flags")
    lines = [_program_line(row) for row in page.rows if row.skipped is None]
    skipped = [(row.program, row.report, clean(row.skipped)) for row in page.rows if row.skipped is not None]
    devices = " and ".join(dict.fromkeys(clean(row.predicted.device, 40) for row in page.rows if row.predicted))
    words = f"Every program in every report. Predictions are modelled for {devices}" if devices else "Every program"
    inside = _table(words, heads, lines)
    if skipped:
        inside += _table("Not run, and why", ("program", "run", "why"), skipped)
    return _section("programs", "Programs", inside)


def _program_line(row: Row) -> tuple[Cell, ...]:
    latency, found, memory = row.latency, row.fidelity, row.memory
    times = (latency.p50_ms, latency.p90_ms, latency.p99_ms) if latency else (None, None, None)
    star = ' <span class="star">★ fastest</span>' if row.selected and row.measured else ""
    dim = "" if row.measured else ' class="dim"'
    return (
        Raw(f"<b>{_t(row.program)}</b>{star}"),
        Raw(_key(row.report) + ("" if row.measured else f"<small>{_t(row.kind, 12)}</small>")),
        number(row.size_mb),
        band_words(row),
        *(Raw(f"<span{dim}>{number(value)}</span>") for value in times),
        share(found.mean if found else None),
        share(found.worst if found else None),
        share(found.value if found else None),
        share(found.reference if found else None),
        Raw(f"<span{dim}>{number(memory.peak_rss_mb if memory else None)}</span>"),
        energy_text(row),
        ", ".join(clean(flag, 30) for flag in row.flags) or "none",
    )


# --- latency ------------------------------------------------------------------------------------------------------


def _latency(page: Page) -> str:
    measured = page.timed("measured")
    inside = ""
    if measured:
        bars = [_latency_bar(row, latency) for row, latency in measured]
        picture = plot.bars("lat", "Measured latency per program", _said(bars), bars, "ms per row, measured")
        words = "Bar: median. Strokes: 90th and 99th percentile."
        if any(bar.band for bar in bars):
            words += " Hatched box: the band modelled for this device. Diamond: the predicted value."
        inside += _figure(picture, words) + _misfits(measured)
    if not any(row.misfit is None for row, _ in measured):
        inside += _modelled(page)
    inside += _emulated(page)
    return _section("latency", "Latency", inside or "<p>Nothing was measured or modelled.</p>")


def _latency_bar(row: Row, latency: Latency) -> plot.Bar:
    detail = f"p90 {number(latency.p90_ms)} · p99 {number(latency.p99_ms)}"
    label = _label(row, number(latency.p50_ms, "ms"), detail)
    marks = (latency.p90_ms, latency.p99_ms)
    return plot.Bar(label, latency.p50_ms, _style(row.report), marks=marks, band=None if row.misfit else row.band)


def _misfits(measured: Sequence[Timed]) -> str:
    reasons: dict[str, list[str]] = {}
    for row, _ in measured:
        if row.misfit:
            reasons.setdefault(clean(row.misfit), []).append(f"{row.report} {clean(row.program, 40)}")
    lines = "".join(f"<li>{escape(', '.join(names))}: {escape(reason)}</li>" for reason, names in reasons.items())
    return f'<div class="note">Predictions not drawn over these measurements:<ul>{lines}</ul></div>' if lines else ""


def _modelled(page: Page) -> str:
    """On an axis of its own, because no measurement of the predicted device is there."""
    bars = []
    for row in {row.program: row for row in page.rows if row.predicted and row.band}.values():
        if row.predicted and row.band:
            label = Label(clean(row.program), f"for {clean(row.predicted.device, 20)}", number(row.band[1], "ms"))
            bars.append(plot.Bar(replace(label, detail=_ends(row.band)), None, "band", band=row.band))
    if not bars:
        return ""
    picture = plot.bars("mod", "Modelled latency per program", _said(bars), bars, "ms per row, modelled")
    words = f"{_badge('modelled')} Diamond: predicted value. Hatched box: where the true median is expected."
    return _figure(picture, words)


def _emulated(page: Page) -> str:
    bars = [
        plot.Bar(_label(row, number(latency.p50_ms, "ms"), "under emulation"), latency.p50_ms, "emu")
        for row, latency in page.timed("emulated")
    ]
    if not bars:
        return ""
    picture = plot.bars("emu", f"Time taken under emulation. {EMULATED}", _said(bars), bars, "ms, not the device's")
    summary = f"<summary>{_badge('emulated')} Show the time taken all the same</summary>"
    words = "These are times of the emulator on the build machine. They rank nothing and predict nothing."
    return f'<details class="emulated">{summary}{_figure(picture, words)}</details>'


def _distributions(page: Page) -> str:
    inside = ""
    for i, report in enumerate(page.reports):
        key = letter(i)
        mine = [(row, found) for row, found in page.timed("measured") if row.report == key and found.samples_us]
        if mine:
            inside += f"<h3>{key} · {_t(machine(report))}</h3>" + _hills(key, mine) + _clouds(key, mine)
    return _section("distribution", "Distribution of latency", inside) if inside else ""


def _hills(key: str, mine: Sequence[Timed]) -> str:
    low = min(max(latency.min_ms, 1e-3) for _, latency in mine)
    high = max(min(max(latency.p99_ms for _, latency in mine), plot.LARGE) * 1.12, low * 1.05)
    scale = plot.Scale(low * 0.97, high, plot.LEFT, plot.RIGHT, logarithmic=high > 6 * low)
    space = np.geomspace if scale.logarithmic else np.linspace
    ridges = [_hill(row, latency, space(scale.low, scale.high, BINS + 1)) for row, latency in mine]
    unit = f"ms per row, measured{', logarithmic' if scale.logarithmic else ''}"
    title = f"Latency distribution per program, run {key}"
    words = "How often each latency occurred. Circle: median. Diamond: 90th percentile. Triangle: 99th percentile."
    return _figure(plot.ridges(f"hill{key}", title, _said(ridges), ridges, scale, unit), words)


def _hill(row: Row, latency: Latency, edges: NDArray[np.float64]) -> plot.Ridge:
    ms = _ms(latency)
    counts, _ = np.histogram(ms, edges)
    beyond = int(np.sum(ms > edges[-1]))
    remark = f"n {latency.n:,}" + (f", {beyond:,} off the axis" if beyond else "")
    detail = f"p90 {number(latency.p90_ms)} · p99 {number(latency.p99_ms)}"
    label = Label(clean(row.program), remark, number(latency.p50_ms, "ms"), detail)
    marks = (latency.p50_ms, latency.p90_ms, latency.p99_ms)
    return plot.Ridge(label, tuple(edges.tolist()), tuple(counts.tolist()), marks, _style(row.report))


def _clouds(key: str, mine: Sequence[Timed]) -> str:
    clouds = [(row, _points(latency)) for row, latency in mine if any(latency.row_lengths)]
    if not clouds:
        return '<p class="note">The input has no sequence: no latency against tokens.</p>'
    every = [point for _, points in clouds for point in points]
    axes = plot.panel_axes(max(point.x for point in every), max(point.high for point in every))
    panels = ""
    for i, (row, points) in enumerate(clouds):
        first, last = points[0], points[-1]
        words = f"{number(first.middle)} ms at {first.x:g} tokens, {number(last.middle)} ms at {last.x:g}"
        title = f"Latency against tokens, {clean(row.program)}"
        picture = plot.panel(f"cloud{key}{i}", title, words, points, axes, ("tokens", "ms"))
        panels += f'<div class="{_style(key)}"><h4>{_t(row.program)}</h4>{picture}<p>{words}</p></div>'
    words = "Dot: median of the runs at that length. Line: 10th to 90th percentile. All panels share both axes."
    return f'<figure><div class="panels">{panels}</div><figcaption>{words}</figcaption></figure>'


def _points(latency: Latency) -> list[plot.Point]:
    """Quantiles per length, or per bin of lengths where there are too many to draw."""
    ms = _ms(latency)
    tokens = np.resize(np.asarray(latency.row_lengths, dtype=np.float64), len(ms))
    if len(np.unique(tokens)) > LENGTHS:
        width = (tokens.max() - tokens.min()) / LENGTHS
        tokens = np.round((np.floor((tokens - tokens.min()) / width) + 0.5) * width + tokens.min(), 1)
    quantiles = ((x, *np.quantile(ms[tokens == x], (0.1, 0.5, 0.9))) for x in np.unique(tokens))
    return [plot.Point(*(float(value) for value in found)) for found in quantiles]


def _ms(latency: Latency) -> NDArray[np.float64]:
    return np.asarray(latency.samples_us, dtype=np.float64) / 1000


# --- fidelity, size, memory, energy -------------------------------------------------------------------------------


def _fidelity(page: Page) -> str:
    rows = page.by_program()
    run = [row for row in rows if row.fidelity_from != "build machine"]
    seen = {row.program for row in run}
    unseen = {row.program: replace(row, report="") for row in rows if row.program not in seen}  # once, not per report
    wanted = [*run, *unseen.values()]
    judged = [(row, row.fidelity) for row in wanted if row.fidelity]
    inside = ""
    for i, measure in enumerate(dict.fromkeys(found.measure for _, found in judged)):
        inside += _fidelity_picture(f"fid{i}", measure, [pair for pair in judged if pair[1].measure == measure])
    heads: tuple[str, ...] = ("program", "run", "seen on", "measure", ">mean", ">worst", ">largest diff.", ">rows")
    heads += ("task", ">value", ">fp32", ">points")
    numbers = _table("Closeness to the fp32 PyTorch model, and the task", heads, [_judged(*pair) for pair in judged])
    inside += _details("The same as numbers, with the task", numbers)
    return _section("fidelity", "Fidelity to the fp32 model", inside) if judged else ""


def _judged(row: Row, found: Fidelity) -> tuple[Cell, ...]:
    known = found.value is not None and found.reference is not None
    points = f"{100 * ((found.value or 0) - (found.reference or 0)):+.2f}" if known else MISSING
    seen = (row.program, row.report or MISSING, row.fidelity_from, found.measure)
    close = (share(found.mean), share(found.worst), f"{found.max_abs:.3g}", number(found.rows))
    return (*seen, *close, found.metric or MISSING, share(found.value), share(found.reference), points)


def _fidelity_picture(key: str, measure: str, judged: Sequence[Judged]) -> str:
    spans = []
    for row, found in judged:
        label = _label(row, share(found.mean), f"worst {share(found.worst)}", row.fidelity_from)
        spans.append(plot.Span(label, found.worst, found.mean, found.mean, _style(row.report), diamond=True))
    least = max(min(0.999, *(value for span in spans for value in (span.low, span.middle))), 0.0)
    scale = plot.Scale(least - 0.08 * (1 - least), 1.0, plot.LEFT, plot.RIGHT)
    unit = f"{clean(measure, 30)} with the fp32 model; 1 is the same"
    picture = plot.spans(key, f"Fidelity: {clean(measure, 30)}", _said(spans), spans, scale, unit)
    return _figure(picture, MEASURES.get(measure, "Circle: mean over the rows. Diamond: the least similar row."))


def _sparse(page: Page) -> str:
    """What sparse attention was chosen for, and what our operator did; nothing where there is neither."""
    decided = next((step.facts for step in page.manifest.history if step.name == "attention"), {})
    by_length = decided.get("by_length")
    inside = ""
    if isinstance(by_length, Mapping):
        heads: tuple[str, ...] = (">tokens", "attention", ">blocks kept", ">gain, modelled")
        chosen = [(length, *_chosen(said)) for length, said in by_length.items() if isinstance(said, Mapping)]
        inside += _table(f"Chosen for each length: {clean(decided.get('why', ''))}", heads, chosen)
    if ran := [_counted(row, row.native) for row in page.by_program() if row.native]:
        heads = ("program", "~run", "kernels", ">calls a run", ">blocks kept", "kept by each layer")
        inside += _table("What the operator's library counted on the device, over all runs", heads, ran)
    return _section("sparse", "Sparse attention", inside) if inside else ""


def _spent(page: Page) -> str:
    """Operators with their share of one run, where it was measured on the device itself."""
    inside = ""
    for row in page.by_program():
        total = sum(spent.ms for spent in row.profile)
        if row.measured and total:
            words = f"{clean(row.program, 40)}, run {row.report}: one run of a row of median length, watched"
            lines = [(clean(x.operator, 60), number(x.ms), f"{100 * x.ms / total:.1f}") for x in row.profile]
            inside += _table(words, ("operator", ">ms", ">% of the run"), lines)
    if inside:
        inside += '<p class="note">Watching costs time: shares are what to read here, not milliseconds.</p>'
    return _section("spent", "Where the time goes", inside) if inside else ""


def _counted(row: Row, did: Native) -> tuple[Cell, ...]:
    layers = " ".join(layers_kept(did))
    return (
        row.program,
        Raw(_key(row.report)),
        clean(did.kernel_set, 24),
        number(did.calls_per_run),
        kept_text(did),
        layers,
    )


def _chosen(said: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(clean(said.get(key, MISSING), 20) for key in ("chosen", "kept", "modelled_gain"))


def _resources(page: Page) -> str:
    sizes = [_size_bar(entry) for entry in page.manifest.programs]
    picture = plot.bars("size", "Size on disk per program", _said(sizes), sizes, "MB on disk")
    inside = "<h3>Size on disk</h3>" + _figure(picture, "All files of the program.") if sizes else ""
    held = [(row, row.memory) for row in page.by_program() if row.memory and row.measured]
    inside += "<h3>Peak memory</h3>"
    if held:
        bars = [_memory_bar(row, memory) for row, memory in held]
        picture = plot.bars("mem", "Peak memory per program", _said(bars), bars, "MB resident, measured")
        words = "Whole bar: peak of the process. Solid end: what runtime and program added; pale: held before."
        inside += _figure(picture, words)
    if any(row.kind == "emulated" for row in page.rows):
        inside += '<p class="note">Memory under emulation contains the emulator and is not drawn.</p>'
    elif not held:
        inside += '<p class="note">Not measured.</p>'
    return _section("resources", "Size, memory, energy", inside + "<h3>Energy per inference</h3>" + _energies(page))


def _size_bar(entry: Entry) -> plot.Bar:
    size = entry.size_bytes / 2**20
    return plot.Bar(Label(clean(entry.name), clean(entry.precision, 26), number(size, "MB")), size, "ink")


def _memory_bar(row: Row, memory: Memory) -> plot.Bar:
    label = _label(row, number(memory.peak_rss_mb, "MB"), f"grew {number(memory.growth_mb)} MB")
    part = min(max(memory.growth_mb, 0.0), memory.peak_rss_mb)
    return plot.Bar(label, memory.peak_rss_mb, _style(row.report), part=part)


def _energies(page: Page) -> str:
    """Above idle and in total, with the sensor; or the words that there is none."""
    lines: list[tuple[Cell, ...]] = []
    for row in page.rows:
        if row.energy and row.measured:
            found = row.energy
            sizes = (number(found.above_idle_mj), number(found.total_mj), number(found.idle_w), number(found.samples))
            lines.append((row.program, row.report, *sizes, found.source, found.method))
    if not lines:
        if not page.timed("measured"):
            return '<p class="note">Not measured.</p>'
        reasons = [(letter(i), r.device.get("no_energy") or NO_SENSOR) for i, r in enumerate(page.reports)]
        return "".join(f'<p class="note">{key}: no figure is stated; {_t(reason, 400)}.</p>' for key, reason in reasons)
    heads = ("program", "run", ">above idle mJ", ">total mJ", ">idle W", ">samples", "sensor", "method")
    return _table("Energy per inference, integrated from one sensor over a burst", heads, lines)


# --- comparisons, environment, bundle -----------------------------------------------------------------------------


def _compared(page: Page) -> str:
    if not page.comparisons:
        return ""
    sets = [set(c.notes) for c in page.comparisons if c.metric != PREDICTED] or [set()]
    common = set.intersection(*sets)
    inside = "".join(f'<p class="note">{_t(note, 400)}</p>' for note in page.comparisons[0].notes if note in common)
    costs = [_ratio_span(c, c.ratio) for c in page.comparisons if c.metric in COSTS and c.ratio is not None]
    if costs:
        reach = min(max(1.1, *(max(span.high, 1 / max(span.low, plot.SMALL)) for span in costs)), plot.LARGE) * 1.03
        scale = plot.Scale(1 / reach, reach, plot.LEFT, plot.RIGHT, logarithmic=True)
        title, unit = "Candidate over baseline", "candidate / baseline, logarithmic; left of 1 is less"
        picture = plot.spans("ratio", title, _said(costs), costs, scale, unit, (1 - NOISE, 1.0, 1 + NOISE))
        words = f"Dot: ratio. Line: 95 % interval, where one can be stated. Grey zone: ±{NOISE:.0%}, noise."
        inside += _figure(picture, words)
    heads = ("program", "~metric", ">baseline", ">candidate", ">ratio", "~95 % interval", ">p", "verdict", "notes")
    lines = [_comparison(c, common) for c in page.comparisons]
    words = "A ratio is candidate over baseline. A prediction is modelled and its interval is the band"
    inside += _table(words, heads, lines)
    return _section("compared", "Compared", inside)


def _ratio_span(found: Comparison, ratio: float) -> plot.Span:
    low = found.low if found.low and found.low > 0 else ratio
    name = NAMES.get(found.metric, found.metric)
    label = Label(clean(found.program), clean(name, 30), clean(found.verdict), f"× {_times(ratio)}")
    style = VERDICTS.get(found.verdict, "ink")
    return plot.Span(label, min(low, ratio), ratio, max(found.high or ratio, ratio), style)


def _comparison(found: Comparison, common: Set[str]) -> tuple[Cell, ...]:
    sided = number if found.metric in (*COSTS, PREDICTED) else share
    interval = f"{_times(found.low)} to {_times(found.high)}" if found.low is not None else MISSING
    p_value = MISSING if found.p_value is None else f"{found.p_value:.3f}" if found.p_value >= 0.001 else "< 0.001"
    verdict = Raw(f'<b class="verdict {VERDICTS.get(found.verdict, "ink")}">{_t(found.verdict)}</b>')
    names = (found.program, NAMES.get(found.metric, found.metric), sided(found.baseline), sided(found.candidate))
    notes = Raw(f"<small>{'<br>'.join(_t(note, 400) for note in found.notes if note not in common)}</small>")
    return (*names, _times(found.ratio), interval, p_value, verdict, notes)


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.3f}" if ratio < 10 else number(ratio)


def _places(page: Page) -> str:
    """What the device is, and what moved while it was measured."""
    inside = ""
    for i, report in enumerate(page.reports):
        known = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts(report.device).items())
        inside += f"<h3>{letter(i)} · {_t(machine(report))} {_badge(report.kind)}</h3>"
        inside += f'<dl class="facts">{known}</dl>' + _environment(report)
    return _section("places", "Device and environment", inside) if inside else ""


def _environment(report: Report) -> str:
    states = [(result, facts(result.before), facts(result.after)) for result in report.results]
    names = list(dict.fromkeys(key for _, before, after in states for key in (*before, *after)))
    if not names:
        return '<p class="note">The report says nothing about clocks, temperatures or supply.</p>'
    heads = ("before → after", *(result.program for result, _, _ in states))
    lines = [(name, *(_moved(before.get(name), after.get(name)) for _, before, after in states)) for name in names]
    return _table(f"Environment of run {report.started}, right before and right after each measurement", heads, lines)


def _moved(before: str | None, after: str | None) -> Cell:
    if before == after:
        return before or MISSING
    return Raw(f"{escape(before or MISSING)} <b>→ {escape(after or MISSING)}</b>")


def _bundle(page: Page) -> str:
    made = page.manifest
    gate = made.gate
    least = f"metric {gate.metric_ratio:g} × fp32, cosine {gate.cosine:g}, agreement or likelihood {gate.agreement:g}"
    least += f", correlation {gate.correlation:g}{', loosened by hand' if gate.loosened else ''}"
    identity = {
        "name": f"{made.name} {made.version}",
        "target": made.target,
        "digest": digest(dump(made)),
        "signed by": page.signer or "not stated here: run edgeformer verify",
        "valid to": made.expires,
        "built by": made.builder,
        "task": f"{made.task.kind}, {made.task.metric or 'no metric'}",
        "gate, at least": least,
        "evaluated on": f"{made.cases.rows:,} rows of {made.cases.source}",
    }
    inside = "".join(f"<div><dt>{key}</dt><dd>{_t(value)}</dd></div>" for key, value in identity.items())
    passes = [(str(i), step.name, _figures(step)) for i, step in enumerate(made.history, 1)]
    table = _table("Passes, in the order they were applied", (">", "pass", "figures it left"), passes) if passes else ""
    return _section("bundle", "Bundle", f'<dl class="facts wide">{inside}</dl>{table}')


def _figures(step: Step) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts(step.facts).items())


def _footer() -> str:
    return (
        "<footer><p>Latency is one row at a time, steady state, after warm-up; rows differ in length. "
        "Predictions are modelled by a roofline and never measured. Intervals come from inside one run of each side "
        "and do not cover what two runs on different days differ by. This page loads nothing.</p></footer>"
    )


# --- markup -------------------------------------------------------------------------------------------------------


def _label(row: Row, figure: str, detail: str = "", seen: str = "") -> Label:
    run = f"{row.report} · {clean(row.device, 24)}" if row.report else "not run"
    return Label(clean(row.program), f"{row.report} · {seen}" if seen and row.report else seen or run, figure, detail)


def _said(items: Sequence[plot.Bar | plot.Ridge | plot.Span]) -> str:
    """The picture in words, for who cannot see it."""
    labels = (item.label for item in items)
    return "; ".join(" ".join(filter(None, (it.name, it.remark, it.figure, it.detail))) for it in labels)


def _style(key: str) -> str:
    """Class of a run: a colour and, in every picture, its letter beside it."""
    return f"run{(ord(key[0]) - ord('A')) % 4 + 1}" if key else "ink"
