"""
A manifest and its reports as rows, one per program and report: what the terminal table, the page and the JSON show.

A report is somebody else's text: its words reach a screen only through `clean`, its numbers through `number`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from edgeformer_agent.wire import (
    Energy,
    Entry,
    Fidelity,
    Latency,
    Manifest,
    Memory,
    Native,
    Prediction,
    Report,
    Result,
    Spent,
    digest as digest_of,
    dump,
)

from .compare import Comparison, best, machine, not_as_predicted

if TYPE_CHECKING:
    from .stages import Cost

SCHEMA = "edgeformer.summary/1"
FAILED = "self_check_failed"
MISSING = "—"
NO_SENSOR = "no sensor"
EMULATED = "emulated: timing says nothing"
MODELLED = "modelled, nobody measured it"
LONGEST = 160  # characters of any one text taken over from a report
MOST_LAYERS = 48  # shown of one program
MOST_FACTS = 60  # of one dictionary taken over from a report

# flag: (what happened, what to do)
FLAGS: Mapping[str, tuple[str, str]] = {
    FAILED: (
        "the outputs on the device are not those of the build machine; nothing was measured",
        "do not ship this program to this device: compare its runtime and instruction set with the bundle's",
    ),
    "emulated": (
        "run on an emulator: outputs are true; time, memory and energy are not the device's",
        "run it on the device itself",
    ),
    "virtual_machine": (
        "the cores are shared with somebody unseen",
        "compare programs within one run; quote no figure from it",
    ),
    "throttled": ("the chip was slowed down during the run", "cool the device (fan, pause, open case) and run again"),
    "undervolted": (
        "the supply voltage fell too low, so the chip slows down",
        "use the maker's power supply and a short cable, then run again",
    ),
    "freq_moved": (
        "a core's clock before and after the run differs by more than 5 %",
        "set the governor to performance (needs root) or warm up for longer",
    ),
    "temp_rise": ("the device grew more than 10 °C warmer during the run", "let it cool down first, or run for longer"),
    "drift": (
        "the last third of the run is faster or slower than the first by more than 5 %",
        "something changed during the run: look at clocks and temperature, run again",
    ),
    "not_settled": ("the latency was still moving when warm-up ended", "end other work on the device and run again"),
    "cut_short": ("the time limit ended the run before its plan was complete", "measure fewer rows or allow more time"),
    "too_few_queries": (
        "fewer runs than a default measurement needs (100; 1,024 for mlperf)",
        "measure with the default profile; high percentiles mean little",
    ),
    "too_short": (
        "less time than a default measurement needs (10 s; 60 s for mlperf)",
        "measure with the default profile",
    ),
    "on_charger": (
        "a battery device was connected to power",
        "its energy figure is invalid: unplug, use adb over Wi-Fi",
    ),
    "evaluation_partial": (
        "fidelity and task were judged on a part of the evaluation rows",
        "run without a limit on rows before quoting them",
    ),
    "sensor_lost": ("the power sensor fell silent, so no energy is stated", "look at its wiring or charger, run again"),
    "sensor_gaps": ("the power sensor answered too rarely, so no energy is stated", "end other work and run again"),
    "energy_too_short": (
        "the burst was shorter than an energy figure needs (200 runs and 2 s)",
        "measure with the default profile",
    ),
    "idle_moved": (
        "idle power before and after the burst differ",
        "the energy above idle is uncertain: end other work, let the device settle, run again",
    ),
    "no_load_seen": (
        "power under load was not above idle",
        "the sensor does not see this device's supply, or its average is too slow: void the energy figure",
    ),
    "not_replicated": ("five tries differ by more than 5 %", "do not quote the figure; find what else runs"),
    "accuracy_below_target": (
        "the task's metric is below the reference by more than the gate allows",
        "use the next higher precision or calibrate with more rows",
    ),
    "native_fallback": (
        "the bundle's library of our operator was not trusted here; sparse layers were computed in standard operators",
        "see why in the agent's output; outputs hold, but no figure shows what sparse attention saves",
    ),
    "cached_queries": ("answers were cached", "the figure is void: caching of queries is forbidden"),
    "benchmark_detected": ("the benchmark's inputs were treated specially", "the figure is void"),
}


@dataclass(frozen=True)
class Row:
    """One program in one report; a program nobody ran has no report, no device and the kind "modelled"."""

    program: str
    report: str  # A, B, ... in the order given; "" without one
    device: str
    kind: str  # measured | emulated | modelled
    size_mb: float | None
    threads: int | None
    predicted: Prediction | None
    misfit: str | None  # why the prediction cannot be held against this measurement
    latency: Latency | None
    memory: Memory | None
    energy: Energy | None
    fidelity: Fidelity | None
    fidelity_from: str  # device | emulator | build machine
    selected: bool
    native: Native | None  # what our operator's library did, where one ran
    profile: tuple[Spent, ...]  # where one run's time went; empty where nobody said
    flags: tuple[str, ...]
    skipped: str | None  # why it was not run

    @property
    def measured(self) -> bool:
        return self.kind == "measured"

    @property
    def band(self) -> tuple[float, float, float] | None:
        """Lowest, stated and highest predicted latency in ms."""
        said = self.predicted
        ms = said.metrics.latency_ms if said else None
        return (ms * said.low, ms, ms * said.high) if said and ms is not None else None


def rows(manifest: Manifest, reports: Sequence[Report]) -> list[Row]:
    """Programs in the manifest's order within each report; then what only the report knows."""
    if not reports:
        return [_row(manifest, entry.name, entry, None, "", None) for entry in manifest.programs]
    entries = {entry.name: entry for entry in manifest.programs}
    found: list[Row] = []
    for place, report in enumerate(reports):
        results = {result.program: result for result in report.results}
        names = dict.fromkeys([*entries, *results, *report.skipped])
        found += [_row(manifest, name, entries.get(name), report, letter(place), results.get(name)) for name in names]
    return found


def table(manifest: Manifest, reports: Sequence[Report]) -> Table:
    """For a terminal of 80 columns: two lines a program, the second is the spread or the reference of the first."""
    found = rows(manifest, reports)
    metric = next((row.fidelity.metric for row in found if row.fidelity and row.fidelity.metric), None)
    task = clean(metric, 9) if metric else "task"
    heads = (
        "program",
        "MB",
        "modelled\n(band)",
        "p50 ms\np90",
        "fidelity\nworst",
        f"{task}\n(fp32)",
        "MB held\n+grown",
        "energy",
    )
    lines = [_cells(row) for row in found]
    shown = [i for i in range(len(heads)) if i == 0 or any(str(line[i]) != MISSING for line in lines)]
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for i in shown:
        made.add_column(heads[i], justify="right" if i else "left", overflow="fold", min_width=0 if i else 15)
    for i, (row, line) in enumerate(zip(found, lines, strict=True)):
        if i and row.report != found[i - 1].report:
            made.add_section()
        made.add_row(*(line[k] for k in shown))
    made.caption = _caption(found, reports)
    made.caption_justify = "left"
    return made


def _caption(found: Sequence[Row], reports: Sequence[Report]) -> Text:
    """Which run is which, and what makes its numbers doubtful."""
    caption = Text("\n".join(_run(letter(i), report) for i, report in enumerate(reports)) or "nothing was run")
    if reports and not any(row.energy for row in found):
        caption.append(f"\nenergy: {NO_SENSOR}")
    for row in found:
        flags = ", ".join(clean(flag, 24) for flag in row.flags[:8])
        if flags:
            style = "red" if FAILED in row.flags else "yellow"
            caption.append(f"\n! {row.report} {clean(row.program, 24)}: {flags}", style=style)
    for row in found:
        if row.native:
            what = f"{number(row.native.calls_per_run)} calls a run, {clean(row.native.kernel_set, 20)}"
            caption.append(f"\nDSA, {row.report} {clean(row.program, 24)}: {what}; kept {kept_text(row.native)}")
            caption.append(f"\n  by layer: {' '.join(layers_kept(row.native))}", style="dim")
    caption.append("\nmodelled: before anyone measured · * fastest that passed its self-check")
    return caption


def met(manifest: Manifest, wanted: str) -> str:
    """What a search had measured when it chose this bundle's recipe, beside the limits."""
    facts = next(step.facts for step in manifest.history if step.name == "recipe")
    passes = "; ".join(f"{x.name} keep {x.facts['keep']}" for x in manifest.history if "keep" in x.facts)
    return (
        f"wanted {wanted}; {facts['recipe']} ({passes or 'as it is'}) has {facts['latency_ms_modelled']:.3g} ms "
        f"(modelled), {facts['size_mb']:.2f} MB, {100 * facts['drop']:.2f} % lost, and is "
        f"{facts['speedup_here']:g}x as fast as the unchanged model here"
    )


def to_json(
    manifest: Manifest, reports: Sequence[Report], comparisons: Sequence[Comparison] = (), cost: Cost | None = None
) -> str:
    """One document with everything the page shows, unrounded, samples included. cost: of the build just done."""
    said = json.loads(dump(manifest))
    essentials = ("name", "version", "target", "expires", "builder", "task", "gate", "history")
    programs = ("name", "format", "precision", "size_bytes", "lengths", "predicted", "checked")
    body = {
        "schema": SCHEMA,
        "bundle": {
            "digest": digest_of(dump(manifest)),
            **{key: said[key] for key in essentials},
            "programs": [{key: program[key] for key in programs} for program in said["programs"]],
        },
        "reports": [json.loads(dump(report)) for report in reports],
        "comparisons": [_finite(asdict(comparison)) for comparison in comparisons],
        **({"build": asdict(cost)} if cost else {}),
    }
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False)


def letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"R{place + 1}"


def clean(value: object, longest: int = LONGEST) -> str:
    """Words of a report without control, direction and half characters, cut where they go on for ever."""
    words = str(value)
    kept = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in words[:longest])
    return kept + ("…" if len(words) > longest else "")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, as many as a measurement is worth; whole numbers from 1,000 on."""
    if value is None or value in (math.inf, -math.inf):
        return MISSING
    size = abs(value)
    if isinstance(value, int):
        shown = f"{value:,}" if size < 1e15 else MISSING
    elif size < 0.995 or size >= 1e9:
        shown = f"{value:.3g}"
    else:
        shown = f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
    return f"{shown} {unit}" if unit else shown


def share(value: float | None) -> str:
    """Four decimals: similarities and accuracies."""
    return MISSING if value is None else f"{value:.4f}"


def explained(flag: str) -> tuple[str, str]:
    """What a flag means and what to do about it."""
    return FLAGS.get(flag, ("this release has no explanation for this flag", "see the agent that wrote the report"))


def energy_text(row: Row) -> str:
    """Above idle, per inference; never a figure where no sensor gave one."""
    if row.energy:
        return number(row.energy.above_idle_mj, "mJ")
    return NO_SENSOR if row.latency else MISSING


def kept_text(native: Native) -> str:
    """Mean share of the blocks that our operator kept."""
    return f"{sum(native.kept) / len(native.kept):.2f}" if native.kept else MISSING


def layers_kept(native: Native) -> list[str]:
    """The share of each layer, in their order."""
    return [f"{kept:.2f}" for kept in native.kept[:MOST_LAYERS]] + ["…"] * (len(native.kept) > MOST_LAYERS)


def band_words(row: Row) -> str:
    """The predicted latency with its ends; who is asked to trust it sees both."""
    if not row.band:
        return MISSING
    low, stated, high = row.band
    return f"{number(stated)} ({number(low)}–{number(high)})"


def facts(found: Mapping[str, Any]) -> dict[str, str]:
    """{"temp_c": {"cpu": 48.2}, "khz": [9, 9]} -> {"temp_c cpu": "48.2", "khz": "2 x 9"}; what is empty is left out."""
    flat: dict[str, str] = {}
    for key, value in found.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, item in inner:
            if item is not None and item != [] and item != {}:
                flat[f"{clean(key, 40)} {clean(name, 40)}".strip()] = _listed(item)
            if len(flat) >= MOST_FACTS:
                return flat
    return flat


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity; the ratio of an absurd report may be one."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _flags(result: Result) -> tuple[str, ...]:
    failed = () if result.golden.passed or FAILED in result.flags else (FAILED,)
    return (*failed, *result.flags)


def _seen_by(report: Report | None) -> str:
    return "device" if report and report.kind == "measured" else "emulator"


def _listed(item: object) -> str:
    if isinstance(item, Mapping):
        return clean(", ".join(f"{key} {value}" for key, value in item.items()))
    if isinstance(item, list) and len(item) > 1 and all(part == item[0] for part in item):
        return f"{len(item)} × {clean(item[0])}"
    return clean(", ".join(map(str, item[:MOST_FACTS]))) if isinstance(item, list) else clean(item)


def _row(
    manifest: Manifest, name: str, entry: Entry | None, report: Report | None, key: str, result: Result | None
) -> Row:
    chosen = best(report) if report else None
    on_device = result.fidelity if result else None
    return Row(
        program=name,
        report=key,
        device=machine(report) if report else "",
        kind=report.kind if report and result else "modelled",
        size_mb=entry.size_bytes / 2**20 if entry else None,
        threads=result.threads if result else None,
        predicted=entry.predicted if entry else None,
        misfit=not_as_predicted(manifest, entry, report, result) if entry and report and result else None,
        latency=result.latency if result else None,
        memory=result.memory if result else None,
        energy=result.energy if result else None,
        fidelity=on_device or (entry.checked if entry else None),
        fidelity_from=_seen_by(report) if on_device else "build machine",
        selected=bool(result and chosen and chosen.program == name),
        native=result.native if result else None,
        profile=result.profile if result else (),
        flags=_flags(result) if result else (),
        skipped=report.skipped.get(name, "not in this report") if report and not result else None,
    )


def _run(key: str, report: Report) -> str:
    kind = EMULATED if report.kind == "emulated" else clean(report.kind, 12)
    return f"{key}: {clean(machine(report), 44)}, {kind}, {clean(report.started, 20)}"


def _cells(row: Row) -> list[Text]:
    dim = "" if row.measured else "dim"
    latency, memory, fidelity = row.latency, row.memory, row.fidelity
    times = f"{number(latency.p50_ms)}\n{number(latency.p90_ms)}" if latency else MISSING
    return [
        _name(row),
        Text(number(row.size_mb)),
        Text(_band(row)),
        Text("not run" if row.skipped else times, style=dim),
        Text(f"{share(fidelity.mean)}\n{share(fidelity.worst)}" if fidelity else MISSING),
        Text(f"{share(fidelity.value)}\n({share(fidelity.reference)})" if fidelity and fidelity.metric else MISSING),
        Text(f"{number(memory.peak_rss_mb)}\n+{number(memory.growth_mb)}" if memory else MISSING, style=dim),
        Text(energy_text(row) if row.energy else MISSING, style=dim),
    ]


def _band(row: Row) -> str:
    band = row.band
    said = row.predicted
    return f"{number(band[1])}\n×{said.low:g}–{said.high:g}" if band and said else MISSING


def _name(row: Row) -> Text:
    name = Text(f"{row.report} {clean(row.program, 17)}{' *' if row.selected else ''}".lstrip())
    if row.kind == "emulated":
        name.append("\n  emulated", style="dim")
    return name
