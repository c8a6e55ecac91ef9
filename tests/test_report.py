"""The page, the table and the JSON: true numbers, honest labels, nothing executed, nothing fetched."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import PROGRAMS, Timing, energy, entry, fidelity, latency, manifest, prediction, report, result, signed
from rich.console import Console

from edgeformer.compare import against_prediction, compare
from edgeformer.plot import ticks
from edgeformer.report import _hill, _points, rows, table, to_html, to_json
from edgeformer.summary import FLAGS, clean, facts, number
from edgeformer_agent import wire

WORDS = """html head meta title style body main header section footer h1 h2 h3 h4 p small span strong b em code br ul li
div dl dt dd table caption thead tbody tr th td details summary figure figcaption svg desc defs pattern path rect circle
text"""
TAGS = set(WORDS.split())
VOID = {"meta", "br"}


class Tree(HTMLParser):
    """Tags, attributes, text and table lines of a page; fails where tags do not balance."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.lines: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.lines[-1][-1] += data

    def line(self, *starts: str) -> list[str]:
        return next(line for line in self.lines if tuple(cell.strip() for cell in line[: len(starts)]) == starts)


def flagged(made: wire.Report, *flags: str) -> wire.Report:
    return signed(made._replace(results=tuple(r._replace(flags=flags) for r in made.results)))


def full_page(samples: int = 1024, programs: tuple[str, ...] = PROGRAMS) -> str:
    bundle = manifest((*programs, "tensorrt-fp16") if "tensorrt-fp16" not in programs else programs)
    a, b, c = (report(programs, Timing(seed=s, samples=samples, scale=1 + s / 10), bundle) for s in range(3))
    skipped = {"tensorrt-fp16": "no GPU"}
    emulated = report(programs, Timing(seed=4, samples=samples), bundle, kind="emulated", skipped=skipped)
    comparisons = (*compare(a, b), *against_prediction(bundle, a))
    return to_html(bundle, [a, flagged(b, "throttled"), c, emulated], comparisons, "release key 3f9c")


# --- the page is a page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    return full_page()


def test_it_parses_and_fetches_nothing(page: str) -> None:
    tree = Tree(page)
    assert tree.tags <= TAGS, tree.tags - TAGS
    assert not re.search(r"https?://|src=|@import|<script|<link|<iframe|javascript:", page, re.I)
    assert not [key for key, _ in tree.attributes if key in ("href", "src", "srcset", "action") or key.startswith("on")]
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_every_picture_has_a_name_a_description_and_unique_ids(page: str) -> None:
    tree = Tree(page)
    ids = [value for key, value in tree.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    named = [value.split() for key, value in tree.attributes if key == "aria-labelledby"]
    assert all(set(parts) <= set(ids) for parts in named)
    assert page.count("<svg") == page.count('role="img"') == page.count("<title id=") == page.count("<desc id=") > 8
    assert not re.search(r"<(title|desc) [^>]*></", page)


def test_five_thousand_samples_stay_small() -> None:
    programs = (*PROGRAMS, "litert-fp32", "tensorrt-fp16", "executorch-int8")
    assert len(full_page(5000, programs).encode()) < 400_000


def test_the_same_input_gives_the_same_page(page: str) -> None:
    assert full_page() == page


# --- numbers ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_report() -> None:
    bundle = manifest()
    seen = report(bundle=bundle, results=(result("onnx-int8", Timing(seed=5), energy=energy()),), selected="onnx-int8")
    tree, latency_ = Tree(to_html(bundle, [seen])), seen.results[0].latency
    assert latency_ is not None
    times = [number(value) for value in (latency_.p50_ms, latency_.p90_ms, latency_.p99_ms)]
    memory = number(seen.results[0].memory.peak_rss_mb)
    line = tree.line("onnx-int8 ★ fastest", "A")
    band = "16.2 (8.10–32.4)"
    assert line[2:] == ["23.1", band, *times, "0.9962", "0.9541", "0.8819", "0.8865", memory, "61.3 mJ", "none"]
    assert {f"{times[0]} ms", f"p90 {times[1]}, n 1,024", "ina226 5 V input"} <= set(tree.text)
    assert tree.line("onnx-int8", "A", "device", "cosine")[4:] == [
        *("0.9962", "0.9541", "0.412", "872", "accuracy", "0.8819", "0.8865", "-0.46")
    ]
    assert tree.line("onnx-int8", "A", "61.3")[3:6] == ["118", "2.71", "480"]
    assert tree.line("governor", "ondemand") and tree.line("temp_c cpu-thermal", "47.2 → 55.8")
    digest = wire.digest(wire.dump(bundle))
    assert {digest, "minilm-sst2 3", "2027-05-20", "872 rows of SST-2 dev"} <= set(tree.text)
    assert tree.line("2", "prune.heads", "kept 0.83, parameters 21500000")


NUMBERS = {0.0: "0", 0.01234: "0.0123", 0.9961: "1.00", 2.674: "2.67", 34.26: "34.3", 152.6: "153", 1234.5: "1,234"}
NUMBERS |= {1024: "1,024", 12345678: "12,345,678", 1e300: "1e+300", 10**400: "—", -3.456: "-3.46", float("inf"): "—"}


@pytest.mark.parametrize(("value", "shown"), [(None, "—"), *NUMBERS.items()])
def test_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_binned_counts_hold_every_sample() -> None:
    seen = latency(timing=Timing(samples=5000))
    low, high = min(seen.samples_us) / 1000 * 0.97, max(seen.samples_us) / 1000 * 1.01
    row = rows(manifest(), [report()])[0]
    assert sum(_hill(row, seen, np.linspace(low, high, 57)).counts) == 5000
    points = _points(seen)
    assert len(points) <= 41 and all(p.low <= p.middle <= p.high for p in points)


def test_ticks_are_round() -> None:
    assert ticks(0, 80) == [0, 20, 40, 60, 80]
    assert ticks(0.95, 1, 5) == [0.95, 0.96, 0.97, 0.98, 0.99, 1.0]
    assert ticks(3, 60, logarithmic=True) == [5, 10, 20, 50]
    assert ticks(0.55, 1.8, logarithmic=True) == [0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8]
    assert ticks(2, 2) == [2] and ticks(0.88, 1.13, logarithmic=True) == [0.9, 0.95, 1.0, 1.05, 1.1]


# --- labels -------------------------------------------------------------------------------------------------------


def test_emulated_results_say_so_and_share_no_axis() -> None:
    bundle = manifest()
    page = to_html(bundle, [report(bundle=bundle, kind="emulated", timing=Timing(scale=7))])
    assert page.count("emulated: timing says nothing") >= 3
    assert 'id="lat-t"' not in page and 'id="hillA-t"' not in page and 'id="mem-t"' not in page
    assert 'id="mod-t"' in page and "ms per row, modelled" in page  # what is expected takes the place
    both = to_html(bundle, [report(bundle=bundle), report(bundle=bundle, kind="emulated", timing=Timing(scale=7))])
    picture = re.search(r"<svg[^>]*lat-t.*?</svg>", both, re.S)
    assert picture and "A · Rasp" in picture[0] and "B · Rasp" not in picture[0]
    folded = re.search(r'<details class="emulated">.*?</details>', both, re.S)
    assert folded and "B · Rasp" in folded[0] and "not the device&#x27;s" in folded[0]


def test_a_band_is_drawn_only_over_the_device_it_was_made_for() -> None:
    bundle = manifest()
    assert re.search(r'<svg[^>]*lat-t.*?class="band"', to_html(bundle, [report(bundle=bundle)]), re.S)
    laptop = report(bundle=bundle, device={"model": "Some Laptop"})
    page = to_html(bundle, [laptop])
    picture = re.search(r"<svg[^>]*lat-t.*?</svg>", page, re.S)
    assert picture and "band" not in picture[0] and "predicted for raspberry-pi-4, measured on Some Laptop" in page
    assert "modelled, nobody measured it" in page


def test_without_reports_everything_is_modelled() -> None:
    tree = Tree(to_html(manifest(), []))
    words = " ".join(tree.text)
    assert (
        "Nothing was run: every time below is modelled." in words
        and "Not run yet: litert-int8 for raspberry-pi-4" in " ".join(words.split())
    )
    assert tree.line("onnx-int8")[4:7] == ["—", "—", "—"] and "build machine" in words


def test_no_sensor_is_said_not_filled_in() -> None:
    tree = Tree(to_html(manifest(), [report()]))
    assert tree.line("onnx-int8", "A")[-2:] == ["no sensor", "none"]
    assert "A: no figure is stated; no sensor." in tree.text
    told = report(device={"model": "Pi", "no_energy": "no power sensor: no INA2xx meter"})
    assert "A: no figure is stated; no power sensor: no INA2xx meter." in Tree(to_html(manifest(), [told])).text


def test_a_virtual_machine_is_named() -> None:
    page = Tree(to_html(manifest(), [report(device={"model": "QEMU Standard PC", "virtual": "hypervisor"})]))
    assert page.line("⚑ virtual_machine")[1] == "A, every program"


def test_flags_are_explained_with_a_remedy() -> None:
    page = Tree(to_html(manifest(), [flagged(report(), *FLAGS, "made_up")]))
    for flag, (what, remedy) in FLAGS.items():
        assert page.line(f"⚑ {flag}")[2:] == [what, remedy]
        assert max(map(len, (what, remedy))) < 120
    assert "no explanation" in page.line("⚑ made_up")[2]
    assert "No flags" in to_html(manifest(), [report()])


def test_a_failed_self_check_leads_the_page() -> None:
    seen = report()
    failed = seen.results[0]._replace(golden=wire.Golden(4, 0.3, 0.99, False), latency=None, fidelity=None)
    tree = Tree(to_html(manifest(), [signed(seen._replace(results=(failed, *seen.results[1:])))]))
    assert tree.line("⚑ self_check_failed")[1] == "A onnx-fp32"


def test_skipped_programs_say_why() -> None:
    tree = Tree(full_page())
    assert tree.line("tensorrt-fp16", "D", "no GPU") and tree.line("tensorrt-fp16", "A", "not in this report")


def test_comparisons_carry_their_verdict_and_common_notes_once() -> None:
    bundle = manifest(version=4)
    a, b = report(), report(bundle=bundle, timing=Timing(seed=2, scale=0.8))
    page = to_html(bundle, [b, a], (*compare(a, b), *against_prediction(bundle, b)))
    tree = Tree(page)
    assert tree.line("onnx-int8", "latency, median")[7] == "faster"
    assert tree.line("onnx-int8", "latency, predicted")[5] == "0.500 to 2.000"
    assert page.count("bundle differs: minilm-sst2 3 / minilm-sst2 4") == 1


# --- a report is untrusted ----------------------------------------------------------------------------------------

ATTACKS = (
    '"><script>alert(1)</script>',
    "' onload=alert(1) x='",
    "</style></title><img src=x onerror=alert(1)>",
    "<!--<svg/onload=alert(1)>",
    "\u202e\ud800\x00\x1b[31m\x9b31m&lt;b&gt;",
)


def poisoned(value: Any, attack: str, keep: tuple[str, ...] = ()) -> Any:
    """Every text of a record, keys included, led by the attack."""
    if isinstance(value, str):
        return value if value in keep else attack + value
    if isinstance(value, dict):
        return {attack + key: poisoned(item, attack, keep) for key, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(poisoned(item, attack, keep) for item in value))
    return tuple(poisoned(item, attack, keep) for item in value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("keep", [(), ("measured", "emulated")])
def test_no_text_of_a_report_becomes_markup(attack: str, keep: tuple[str, ...]) -> None:
    seen = flagged(report(skipped={"x": "y"}), "throttled")
    device = seen._replace(results=(seen.results[0]._replace(energy=energy()), *seen.results[1:]))
    bad = poisoned(device, attack, keep), poisoned(device._replace(kind="emulated"), attack, keep)
    bundle = poisoned(manifest(), attack.replace("\ud800", ""))  # half a character has no UTF-8, so no digest
    page = to_html(bundle, bad, (*compare(*bad), *against_prediction(bundle, bad[0])), attack)
    tree = Tree(page)
    assert tree.tags <= TAGS and not [key for key, _ in tree.attributes if key.startswith("on")]
    assert not set("\u202e\x00\x1b\x9b") & set(page)
    page.encode("utf-8")
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(table(bundle, bad))
    assert not set("\u202e\x00\x1b\x9b") & set(console.export_text())


def test_endless_texts_are_cut() -> None:
    long = "x" * 100_000
    bad = poisoned(report(), long, ("measured",))
    assert len(to_html(manifest(), [bad])) < 400_000
    many = {str(i): {str(j): "y" * 500 for j in range(50)} for i in range(50)}
    assert len(facts(many)) <= 60 and all(len(text) <= 161 for text in facts(many).values())


def test_facts_of_any_shape() -> None:
    odd = {"a": None, "b": [], "c": [[1, 2], {"d": 3}], "e": {"f": {"g": True}}, "": 0, "h": [1.5, 1.5, 1.5], "i": {}}
    assert facts(odd) == {"c": "[1, 2], {'d': 3}", "e f": "g True", "": "0", "h": "3 × 1.5"}
    assert clean("a\nb\tc") == "a b c"


def variants() -> Iterator[wire.Result]:
    """Results with whatever a device may leave out or get wrong."""
    plain = result("onnx-int8", Timing(samples=40, rows=8))
    timed = plain.latency
    assert timed is not None
    zero = dict.fromkeys(("mean_ms", "std_ms", "min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms"), 0.0)
    times = (
        None,
        timed,
        timed._replace(samples_us=(), row_lengths=()),
        timed._replace(samples_us=(5,), row_lengths=(0,), n=1),
        timed._replace(row_lengths=(0,) * 8),
        timed._replace(samples_us=(0,) * 40, **zero),
        timed._replace(samples_us=(-4, 10**9) * 20, p99_ms=1e6),
        latency("onnx-int8", Timing(samples=600, lengths=tuple(range(1, 401)))),
        timed._replace(p50_ms=1e300, p90_ms=-1.0, p99_ms=1e308, min_ms=-2.0),
    )
    faiths = (None, fidelity(), fidelity(measure="agreement", metric=None, value=None, reference=None))
    faiths += (fidelity(mean=-0.2, worst=-1.0), fidelity(mean=1.0, worst=1.0, max_abs=0.0, rows=0))
    memories = (wire.Memory(0.0, 0.0), wire.Memory(10.0, 90.0, 1.0), wire.Memory(-1.0, -1.0))
    energies = (None, energy(), energy(above_idle_mj=-3.0, samples=0))
    bare = plain._replace(before={}, after={"khz": [1, 2]})
    for time, faith, memory, power in itertools.product(times, faiths, memories, energies):
        yield bare._replace(latency=time, fidelity=faith, memory=memory, energy=power)


def test_no_report_breaks_the_page() -> None:
    chosen = random.Random(1).sample(list(variants()), 60)
    said = itertools.cycle((prediction(None), prediction(0.0), prediction(9.0), prediction(1e300, low=0.0, high=1e9)))
    for first, second, third in zip(chosen[::3], chosen[1::3], chosen[2::3], strict=True):
        bundle = manifest()._replace(programs=(entry("onnx-int8", predicted=next(said), size_bytes=0),))
        kinds = zip((first, second, third), ("measured", "measured", "emulated"), strict=True)
        seen = [report(bundle=bundle, results=(made,), kind=kind, selected=None) for made, kind in kinds]
        comparisons = (*compare(seen[0], seen[1]), *against_prediction(bundle, seen[0]))
        page = to_html(bundle, seen, comparisons)
        assert Tree(page).tags <= TAGS and not re.search(r'="[^"]*\b(nan|inf)\b', page)
        Console(width=100, file=open(os.devnull, "w")).print(table(bundle, seen))  # noqa: SIM115, PTH123


@pytest.mark.parametrize("programs", [PROGRAMS[:1], (*PROGRAMS, "litert-fp32", "tensorrt-fp16", "executorch-int8"), ()])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_any_number_of_programs_and_reports(programs: tuple[str, ...], count: int) -> None:
    bundle = manifest(programs)
    seen = [report(programs, Timing(seed=i, samples=100), bundle) for i in range(count)]
    assert Tree(to_html(bundle, seen)).tags <= TAGS
    assert len(rows(bundle, seen)) == len(programs) * max(count, 1)


# --- the other two ------------------------------------------------------------------------------------------------


def test_the_table_fits_eighty_columns() -> None:
    programs = (*PROGRAMS, "executorch-int8")
    bundle = manifest(programs)
    seen = flagged(report(programs, bundle=bundle), "throttled", "too_few_queries")
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(table(bundle, [seen, report(programs, bundle=bundle, kind="emulated")]))
    text = console.export_text()
    assert max(map(len, text.rstrip().splitlines())) <= 80 and "…" not in text
    timed = seen.results[1].latency
    assert timed is not None and number(timed.p50_ms) in text
    labels = (
        "energy: no sensor",
        "emulated: timing says nothing",
        "modelled: before anyone",
        "throttled, too_few_queries",
    )
    for words in (*labels, "A litert-int8 *"):
        assert words in text, words


NATIVE = wire.Native(6, "avx512_vnni", (1.0, 0.52, 0.41, 0.39, 0.28, 0.3))
LENGTHS = {
    "128": {"chosen": "dense", "kept": 1.0, "modelled_gain": 1.0},
    "512": {"chosen": "dsa", "kept": 0.61, "modelled_gain": 1.24},
}


def sparse() -> tuple[wire.Manifest, wire.Report]:
    step = wire.Step("attention", {"chosen": "dsa", "why": "modelled gain 1.24", "by_length": LENGTHS})
    made = manifest()._replace(history=(step,))
    seen = report(bundle=made)
    return made, signed(seen._replace(results=tuple(r._replace(native=NATIVE) for r in seen.results)))


def test_sparse_attention_says_what_was_chosen_and_what_ran() -> None:
    made, seen = sparse()
    found = Tree(to_html(made, [flagged(seen, "native_fallback")]))
    assert found.line("128") == ["128", "dense", "1.0", "1.0"] and found.line("512")[1:] == ["dsa", "0.61", "1.24"]
    first = next(line for line in found.lines if "avx512_vnni" in line)
    assert first[3:] == ["6", "0.48", "1.00 0.52 0.41 0.39 0.28 0.30"], first
    assert any("not trusted here" in " ".join(line) for line in found.lines)
    assert 'id="sparse"' not in to_html(manifest(), [report()])


def test_native_figures_fit_the_terminal() -> None:
    made, seen = sparse()
    for width in (80, 140):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        console.print(table(made, [seen]))
        text = console.export_text()
        assert max(map(len, text.rstrip().splitlines())) <= width
        assert "A onnx-int8: 6 calls a run, avx512_vnni; kept 0.48" in text
        assert "by layer: 1.00 0.52 0.41 0.39 0.28 0.30" in text


def test_json_is_one_document_with_every_sample() -> None:
    bundle = manifest()
    a, b = report(bundle=bundle), report(bundle=bundle, timing=Timing(seed=3))
    body = json.loads(to_json(bundle, [a, b], compare(a, b)))
    assert body["schema"] == "edgeformer.summary/1" and body["bundle"]["digest"] == a.bundle
    assert [wire.load_report(json.dumps(one).encode()) for one in body["reports"]] == [a, b]
    assert body["bundle"]["programs"][1]["predicted"]["kind"] == "modelled"
    assert [c["verdict"] for c in body["comparisons"]] == [c.verdict for c in compare(a, b)]


# --- in a browser -------------------------------------------------------------------------------------------------


def test_a_browser_draws_it(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium: apt-get install chromium")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    switches = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    switches += ["disable-background-networking", "disable-component-update", "enable-logging=stderr"]
    switches += [f"user-data-dir={tmp_path / 'profile'}", "window-size=1200,2400"]
    switches += [f"screenshot={tmp_path / 'page.png'}"]
    command = [browser, *(f"--{switch}" for switch in switches), (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (tmp_path / "page.png").exists(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert drawn((tmp_path / "page.png").read_bytes()) > 0.02


def drawn(png: bytes) -> float:
    """Share of bytes that differ from their neighbour: PNG's filters leave zeros where a picture is blank."""
    parts, place = b"", 8
    while place < len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] == b"IDAT":
            parts += png[place + 8 : place + 8 + length]
        place += 12 + length
    pixels = zlib.decompress(parts)
    return 1 - pixels.count(0) / len(pixels)
