"""
The command line: each command is a few lines over the public function of the same name.

Exit codes: 0 done; 1 a gate, a check or a comparison failed; 2 wrong use; 3 something is missing here or on the device.
With --json stdout carries exactly one document; tables, progress and hints go to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .errors import BadInput, EdgeformerError
from .plan import PRECISIONS

INTERRUPTED = 130
SAY_EVERY_S = 30.0  # where no bar shows that something goes on

app = typer.Typer(
    name="edgeformer",
    help="Build, ship and measure transformers on phones and boards.",
    epilog="Exit codes: 0 done · 1 a gate or check failed · 2 wrong use · 3 something is missing.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(no_args_is_help=True, help="Keys that sign bundles, and keys of others that are trusted here.")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder or its .tar.")]
Keys = Annotated[
    list[str] | None, typer.Option("--key", help="Public key to accept, hex; default: those trusted here.")
]
Profile = Annotated[
    str,
    typer.Option(
        "--profile", help="default: ≥100 runs and ≥10 s · quick: a smoke test · mlperf: ≥1024 runs and ≥60 s."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the runtime. [dim]\\[default: 1][/]")]
Programs = Annotated[list[str] | None, typer.Option("--program", help="Only this program; repeatable.")]
MinRuns = Annotated[int | None, typer.Option("--min-runs", min=1, help="Replaces the profile's least number of runs.")]
MinSeconds = Annotated[
    float | None, typer.Option("--min-seconds", min=0, help="Replaces the profile's least duration.")
]
MostRows = Annotated[
    int | None, typer.Option("--rows", min=1, help="At most this many evaluation rows. [dim]\\[default: all][/]")
]
Train = Annotated[str | None, typer.Option(help="What passes calibrate on and learn from: a file like --data.")]
MaxLatency = Annotated[float | None, typer.Option(help="Median latency on the device, modelled, at most.")]
MaxSize = Annotated[float | None, typer.Option(help="Size of the program on disk, at most.")]
MaxDrop = Annotated[float | None, typer.Option(help="Share of fp32's metric that may be lost, 0 to 1.")]
Trials = Annotated[int, typer.Option(min=1, help="Settings that a search tries.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the report there as JSON.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page there.")]


@dataclasses.dataclass(frozen=True)
class Screen:
    """Where a command writes: results to stdout, everything else to stderr."""

    out: Console
    err: Console


def main() -> None:
    """The console script."""
    # Copies of the streams, so that `_quiet` can silence everybody else.
    out, err = (os.fdopen(os.dup(n), "w", encoding="utf-8", errors="replace") for n in (1, 2))
    code = _guarded(Screen(Console(file=out), Console(file=err, highlight=False)))
    with contextlib.suppress(BrokenPipeError):
        out.flush()
    sys.exit(code)


def _guarded(screen: Screen) -> int:
    """The exit code. Whatever is raised becomes one message."""
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False, obj=screen)
        if code == INTERRUPTED:  # typer answers Ctrl-C itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except EdgeformerError as error:
        return _failed(screen, as_json, str(error), error.exit_code)
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _failed(screen, as_json, "interrupted; what was there before is unchanged", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong option; typer's own exception class is not public
            hint = getattr(getattr(error, "ctx", None), "command_path", "edgeformer")
            return _failed(screen, as_json, f"{error.format_message()} Try: {hint} --help", 2)
        if isinstance(error, OSError):
            return _failed(screen, as_json, f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1)
        screen.err.print_exception()
        return _failed(screen, as_json, f"a bug in edgeformer: {type(error).__name__}: {error}", 1)


def _failed(screen: Screen, as_json: bool, message: str, code: int) -> int:
    screen.err.print("[bold red]error:[/]", end=" ")
    screen.err.print(message, markup=False, soft_wrap=True)
    if as_json:
        _document(screen, json.dumps({"error": message, "exit_code": code}, indent=1))
    return code


@contextlib.contextmanager
def _quiet(screen: Screen) -> Iterator[None]:
    """
    Exporters print hundreds of lines to both streams, some of them from C++. They go to a file, and its end is
    shown only where something broke that is not explained by an error of ours.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            yield
        except EdgeformerError:
            raise
        except Exception:
            log.seek(0)
            screen.err.print(b"".join(log.readlines()[-20:]).decode(errors="replace"), markup=False, style="dim")
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, original)
                os.close(descriptor)


@contextlib.contextmanager
def _bars(screen: Screen) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each step, on stderr; where that is no terminal, a line when one ends, and now and then before."""
    texts = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
    columns = (*texts, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()
    last = time.monotonic()
    with Progress(*columns, console=screen.err, disable=not screen.err.is_terminal) as progress:

        def report(what: str, done: int, total: int) -> None:
            nonlocal last
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)
            if screen.err.is_terminal or what in finished:
                return
            if done >= total:
                finished.add(what)
                screen.err.print(f"{what}: done")
            elif time.monotonic() - last >= SAY_EVERY_S:
                screen.err.print(f"{what}: {done} of {total}")
            else:
                return
            last = time.monotonic()

        yield report


@app.command()
def build(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A Hugging Face folder or a hub id (org/name).")],
    target: Annotated[
        list[str], typer.Option("--target", "-t", help="A target's name, see `edgeformer targets`; repeatable.")
    ],
    data: Annotated[
        str | None, typer.Option(help="What to check with: .txt (a text a line), .npz, a labelled file with --task.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="What a labelled file holds: classification, sst2, similarity, stsb (.tsv), squad (.json), lambada "
            "(.jsonl), tokens (.tsv, .jsonl)."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the bundle's folder goes.")] = Path("dist"),
    precision: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PRECISIONS)}; repeatable. [dim]\\[default: the format's own][/]"),
    ] = None,
    format: Annotated[
        list[str] | None, typer.Option(help="Some of the target's formats. [dim]\\[default: all][/]")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="dense; dsa: sparse, trained on the data; auto: sparse where it pays on the target.")
    ] = "auto",
    budget: Annotated[float, typer.Option(help="Fraction of blocks that sparse attention keeps.")] = 0.5,
    gate: Annotated[
        float | None,
        typer.Option(
            help="Least share of fp32 to keep, 0 to 1. [dim]\\[default: .99 of the metric, or cosine .985][/]"
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="A static sequence length; repeatable. [dim]\\[default: 32 64 128 256 512][/]"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the bundle. [dim]\\[default: the model's][/]")] = None,
    bundle_version: Annotated[
        int | None, typer.Option("--bundle-version", help="Must rise. [dim]\\[default: by date and change][/]")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Last valid day, YYYY-MM-DD. [dim]\\[default: end of next year][/]")
    ] = None,
    key: Annotated[str, typer.Option(help="Name of the signing key; made on first use.")] = "default",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Passes and settings: a name of the package's, or a .toml.")
    ] = None,
    train: Train = None,
    max_latency_ms: MaxLatency = None,
    max_size_mb: MaxSize = None,
    max_drop: MaxDrop = None,
    trials: Trials = 20,
    as_json: Json = False,
) -> None:
    """
    Optimize, export, check, package and sign a model for one target or several.

    Every program is opened with the runner its device uses and held against fp32 PyTorch; one that loses more than the
    gate allows stops the build with exit code 1, and nothing is written.

    With several, --json prints a list of documents.

    [dim]edgeformer build --model ./my-model --target raspberry-pi-4 --target pixel-7 --data texts.txt[/]
    """
    from .build import build as run_build
    from .stages import Stages
    from .summary import met, table, to_json

    screen: Screen = context.obj
    with _bars(screen) as progress, _quiet(screen):
        stages = Stages(progress)
        limits = _limits(max_latency_ms, max_size_mb, max_drop)
        bundles = run_build(
            model, target, data=data, task=task, out=out, precision=precision or None, formats=format, gate=gate,
            attention=attention, budget=budget,
            lengths=length, name=name, version=bundle_version, expires=expires, key=key, overwrite=overwrite,
            recipe=recipe, train=train, limits=limits, trials=trials, progress=stages,
        )  # fmt: skip
    cost = stages.cost()
    if as_json:
        documents = [to_json(bundle.manifest, (), cost=cost).rstrip() for bundle in bundles]
        _document(screen, documents[0] if len(documents) == 1 else "[\n" + ",\n".join(documents) + "\n]")
        return
    for bundle in bundles:
        screen.err.print(table(bundle.manifest, ()))
        if limits is not None:
            screen.err.print(met(bundle.manifest, limits.words()), markup=False, soft_wrap=True)
        screen.out.print(str(bundle.path), soft_wrap=True)
    screen.err.print(cost.words(), style="dim", soft_wrap=True)


def _limits(max_latency_ms: float | None, max_size_mb: float | None, max_drop: float | None) -> Any:
    if (max_latency_ms, max_size_mb, max_drop) == (None, None, None):
        return None
    from .budget import Limits

    return Limits(max_latency_ms, max_size_mb, max_drop)


@app.command()
def search(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A Hugging Face folder or a hub id (org/name).")],
    target: Annotated[str, typer.Option("--target", "-t", help="A target's name, see `edgeformer targets`.")],
    data: Annotated[str | None, typer.Option(help="What programs are judged with, as for build.")] = None,
    task: Annotated[str | None, typer.Option(help="What a .tsv holds, as for build.")] = None,
    train: Train = None, max_latency_ms: MaxLatency = None, max_size_mb: MaxSize = None, max_drop: MaxDrop = None,
    space: Annotated[str, typer.Option(help="An open recipe: a name of the package's, or a .toml file.")] = "search",
    trials: Trials = 20,
    finalists: Annotated[int, typer.Option(min=1, help="Trials that are built and measured as programs.")] = 4,
    format: Annotated[str | None, typer.Option(help="Of the target's. [dim]\\[default: its first][/]")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the format's. [dim]\\[default: its first][/]")] = None,
    folder: Annotated[Path, typer.Option(help="Where the search keeps what it found; it goes on from there.")] = Path(
        "search"
    ),
    recipe: Annotated[Path | None, typer.Option(help="Write the best recipe there, for build --recipe.")] = None,
    out: Out = None, html: Html = None, as_json: Json = False,
) -> None:  # fmt: skip
    """
    Try settings of an open recipe, build the best ones, and print the frontier.

    Exit code 1 where nothing meets the limits; the nearest points are shown all the same.
    """
    screen: Screen = context.obj
    with _bars(screen) as progress, _quiet(screen):
        from .budget import Limits, search as run_search
        from .frontier import page, table
        from .recipe import dump

        found = run_search(
            model, target, Limits(max_latency_ms, max_size_mb, max_drop), data=data, task=task, train=train,
            space=space, trials=trials, finalists=finalists, format=format, precision=precision, folder=folder,
            progress=progress,
        )  # fmt: skip
    if out:
        _save(out, found.to_json().encode())
    if html:
        _save(html, page(found).encode())
    if as_json:
        _document(screen, found.to_json())
    else:
        screen.out.print(table(found))
    if recipe:
        _save(recipe, dump(found.recipe).encode())
    if found.best is None:
        screen.err.print(found.refusal(), markup=False)
        raise typer.Exit(1)


@app.command()
def parity(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A Hugging Face folder or a hub id (org/name).")],
    format: Annotated[
        list[str] | None, typer.Option(help="Only this format; repeatable. [dim]\\[default: all][/]")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Repeatable. [dim]\\[default: the format's own][/]")
    ] = None,
    data: Annotated[str | None, typer.Option(help="What to compare on, as for build.")] = None,
    task: Annotated[str | None, typer.Option(help="What a .tsv holds, as for build.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Sparse attention that keeps this share of blocks. [dim]\\[default: dense][/]")
    ] = None,
    layers: Annotated[bool, typer.Option(help="Compare after each layer too, at the price of a second export.")] = True,
    length: Annotated[list[int] | None, typer.Option(help="A static sequence length; repeatable.")] = None,
    out: Out = None, html: Html = None, as_json: Json = False,
) -> None:  # fmt: skip
    """
    Build one model in every format, open each program with its runner, and print how close each comes to PyTorch.

    Exit code 1 where a format fails; the others are shown all the same.
    """
    screen: Screen = context.obj
    with _bars(screen) as progress, _quiet(screen):
        from .agreement import parity as run_parity
        from .matrix import page, table

        found = run_parity(
            model, formats=format, precision=precision, data=data, task=task, budget=budget, layers=layers,
            lengths=length, progress=progress,
        )  # fmt: skip
    if out:
        _save(out, found.to_json().encode())
    if html:
        _save(html, page(found).encode())
    if as_json:
        _document(screen, found.to_json())
    else:
        screen.out.print(table(found))
    if not found.whole:
        raise typer.Exit(1)


@app.command()
def verify(
    context: typer.Context,
    bundle: BundlePath,
    key: Keys = None,
    target: Annotated[str | None, typer.Option(help="The target it must be for.")] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle's signature and every file against it; say exactly what differs. Exit code 1 if anything does."""
    screen: Screen = context.obj
    opened = _open(bundle)
    opened.verify(key, target)
    facts = {"bundle": opened.digest, "name": opened.manifest.name, "version": opened.manifest.version,
             "target": opened.manifest.target, "expires": opened.manifest.expires,
             "files": len(opened.manifest.files)}  # fmt: skip
    if as_json:
        _document(screen, json.dumps({"ok": True, **facts}, indent=1))
        return
    screen.out.print("[green]ok[/] " + " · ".join(f"{k} {v}" for k, v in facts.items()), soft_wrap=True)


@app.command()
def run(
    context: typer.Context, bundle: BundlePath, profile: Profile = "default", threads: Threads = None,
    program: Programs = None, min_runs: MinRuns = None, min_seconds: MinSeconds = None, rows: MostRows = None,
    key: Keys = None, out: Out = None, html: Html = None, as_json: Json = False,
) -> None:  # fmt: skip
    """
    Measure a bundle on this machine, by the agent that devices use, in a fresh interpreter.

    [dim]edgeformer run dist/my-model-raspberry-pi-4 --profile quick --html report.html[/]
    """
    from .deploy import Measure, run as run_here

    screen, opened = context.obj, _open(bundle)
    measure = Measure(profile, tuple(program or ()), threads, min_runs, min_seconds, rows)
    with _bars(screen) as progress:
        report = run_here(opened, measure=measure, keys=key, report_progress=progress)
    _reported(screen, opened, report, out, html, as_json)


@app.command()
def generate(
    context: typer.Context,
    bundle: BundlePath,
    prompt: Annotated[str, typer.Argument(help="A text; - reads it from stdin.")],
    most: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to add at most.")] = 64,
    program: Annotated[str | None, typer.Option("--program", help="This program, not the first that can.")] = None,
    threads: Threads = None,
    key: Keys = None,
    as_json: Json = False,
) -> None:
    """
    Let a decoder's bundle continue a text on this machine: the likeliest token, again and again.

    [dim]edgeformer generate dist/smollm2-raspberry-pi-4 "The capital of France is" --max-new-tokens 8[/]
    """
    from .generate import generate as run_generate

    screen, opened = context.obj, _open(bundle)
    text = sys.stdin.read() if prompt == "-" else prompt
    found = run_generate(opened, text, max_new_tokens=most, program=program, threads=threads or 1, keys=key)
    if as_json:
        _document(screen, json.dumps(dataclasses.asdict(found), indent=1))
        return
    screen.out.print(found.text, markup=False, soft_wrap=True)
    further = "" if found.next_ms is None else f", {found.next_ms:.1f} ms a further token"
    screen.err.print(f"{found.program}: first token {found.first_ms:.1f} ms{further}", style="dim")


@app.command()
def deploy(
    context: typer.Context,
    bundle: BundlePath,
    where: Annotated[str, typer.Argument(help="ssh://user@host:port, user@host, local or local:/folder.")],
    identity: Annotated[Path | None, typer.Option("--identity", "-i", help="Private key file for SSH.")] = None,
    known_hosts: Annotated[Path | None, typer.Option(help="File of accepted host keys.")] = None,
    profile: Profile = "default", threads: Threads = None, program: Programs = None, min_runs: MinRuns = None,
    min_seconds: MinSeconds = None, rows: MostRows = None, key: Keys = None, out: Out = None, html: Html = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """
    Push a bundle to a device, have it verified and measured there, and fetch the report.

    Only files the device does not have are sent; an interrupted push is continued. The device's `current` bundle
    changes in one step, after the new one has passed its self-check.

    [dim]edgeformer deploy dist/my-model-raspberry-pi-4 ssh://pi@192.168.0.7[/]
    """
    from .deploy import Measure, deploy as run_there
    from .link import SshOptions

    screen, opened = context.obj, _open(bundle)
    measure = Measure(profile, tuple(program or ()), threads, min_runs, min_seconds, rows)
    with _bars(screen) as progress:
        report = run_there(
            opened, where, measure=measure, keys=key, report_progress=progress,
            ssh=SshOptions(key_file=identity, known_hosts=known_hosts),
            on_line=lambda line: screen.err.print(line, markup=False, style="dim"),
        )  # fmt: skip
    _reported(screen, opened, report, out, html, as_json)


@app.command()
def report(
    context: typer.Context,
    bundle: BundlePath,
    reports: Annotated[
        list[Path] | None, typer.Argument(help="Reports (.json) of this bundle, from run or deploy.")
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show a bundle and its reports: a table here, JSON, or one page with plots that needs no network."""
    from .compare import against_prediction, compare as held_against

    screen, opened = context.obj, _open(bundle)
    loaded = [_load(path) for path in reports or ()]
    found = [c for r in loaded for c in against_prediction(opened.manifest, r)]
    found += [c for other in loaded[1:] for c in held_against(loaded[0], other)]
    _show(screen, opened, loaded, found, html, as_json)


@app.command()
def compare(
    context: typer.Context,
    baseline: Annotated[Path, typer.Argument(help="A report (.json).")],
    candidate: Annotated[
        Path | None, typer.Argument(help="Another one; without it, --bundle gives the prediction.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Compare measured with what this bundle predicts.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 if anything is slower, worse or outside its band.")
    ] = False,
    as_json: Json = False,
) -> None:
    """
    Hold one report against another, or against the bundle's prediction: ratios, 95 % intervals, and what is noise.

    [dim]edgeformer compare before.json after.json --check[/]
    """
    from .compare import against_prediction, compare as held_against

    screen: Screen = context.obj
    if candidate is None and bundle is None:
        raise BadInput("compare needs a second report, or --bundle for its prediction")
    first, last = _load(baseline), _load(candidate or baseline)
    found = held_against(first, last) if candidate else ()
    found += against_prediction(_open(bundle).manifest, last) if bundle else ()
    if as_json:
        _document(screen, json.dumps([dataclasses.asdict(c) for c in found], indent=1))
    else:
        screen.out.print(_comparisons(found))
    if check and any(c.verdict in ("slower", "worse", "outside the band") for c in found):
        raise typer.Exit(1)


@app.command()
def targets(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One target, with every figure and its source.")] = None,
    as_json: Json = False,
) -> None:
    """List the devices that bundles can be built for, or show one of them."""
    from . import device, formats

    screen: Screen = context.obj
    chosen = [device.load(n) for n in ([name] if name else device.names())]
    if as_json:
        _document(screen, json.dumps([dataclasses.asdict(d) for d in chosen], indent=1))
        return
    if name:
        _details(screen, dataclasses.asdict(chosen[0]))
        return
    table = Table("target", "device", "formats (later)", "cores", "fp32 GFLOP/s", "GB/s", box=None)
    for d in chosen:
        marked = ", ".join(f if f in formats.names() else f"({f})" for f in d.formats)
        cores = " + ".join(f"{c.count} {c.name}" for c in d.cores)
        table.add_row(d.name, d.title, marked, cores, f"{d.fp32_gflops_all:g}", f"{d.bandwidth_gbs:g}")
    screen.out.print(table)


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Say what is installed here, what works with it, and the line that adds the rest; exit 3 if nothing builds."""
    from .doctor import examine

    screen: Screen = context.obj
    findings = examine()
    if as_json:
        _document(screen, json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    else:
        table = Table("", "", "what", "", box=None, show_header=False)
        for f in findings:
            mark = "[green]✓[/]" if f.ok else "[yellow]–[/]"
            table.add_row(mark, f"{f.area} {f.name}", f.says, f"[dim]{f.fix or ''}[/]")
        screen.out.print(table)
    if not any(f.ok for f in findings if f.area == "format"):
        raise typer.Exit(3)


@keys_app.command("list")
def keys_list(context: typer.Context, as_json: Json = False) -> None:
    """Own keys, and those of others that are trusted."""
    from . import signing

    screen: Screen = context.obj
    own, trusted = signing.names(), signing.trusted()
    if as_json:
        _document(screen, json.dumps([{"name": n, "public": k, "own": n in own} for n, k in trusted.items()], indent=1))
        return
    table = Table("name", "", "public key", box=None)
    for n, k in trusted.items():
        table.add_row(n, "signs" if n in own else "trusted", k)
    screen.out.print(table if trusted else "no keys yet; the first build makes one", soft_wrap=True)


@keys_app.command("create")
def keys_create(context: typer.Context, name: Annotated[str, typer.Argument()] = "default") -> None:
    """Make a key pair that signs bundles."""
    from . import signing

    context.obj.out.print(signing.create(name).public, soft_wrap=True)


@keys_app.command("show")
def keys_show(context: typer.Context, name: Annotated[str, typer.Argument()] = "default") -> None:
    """Print a public key, to be pinned on devices and trusted by others."""
    from . import signing

    known = signing.trusted()
    if name not in known:
        raise BadInput(f"no key {name!r}; known: {', '.join(known) or 'none'}")
    context.obj.out.print(known[name], soft_wrap=True)


@keys_app.command("trust")
def keys_trust(
    context: typer.Context, name: str, public: Annotated[str, typer.Argument(help="64 hex digits.")]
) -> None:
    """Accept bundles that somebody else signed."""
    from . import signing

    signing.trust(name, public)
    context.obj.err.print(f"{name} is trusted here", markup=False)


@keys_app.command("untrust")
def keys_untrust(context: typer.Context, name: str) -> None:
    """Accept them no longer."""
    from . import signing

    signing.untrust(name)
    context.obj.err.print(f"{name} is no longer trusted", markup=False)


def _open(path: Path) -> Any:
    from .bundle import open_bundle

    return open_bundle(path)


def _load(path: Path) -> Any:
    from edgeformer_agent import wire

    if not path.is_file():
        raise BadInput(f"no report {str(path)!r}; `edgeformer run` and `deploy` write one with --out")
    try:
        return wire.load_report(path.read_bytes())
    except wire.WireError as error:
        raise BadInput(f"{path.name} is not a report: {error}") from error


def _reported(screen: Screen, bundle: Any, report: Any, out: Path | None, html: Path | None, as_json: bool) -> None:
    """After a measurement: keep it, show it, and fail if nothing passed its self-check."""
    from edgeformer_agent import wire

    from .compare import against_prediction

    if out:
        _save(out, wire.dump(report))
    _show(screen, bundle, [report], list(against_prediction(bundle.manifest, report)), html, as_json)
    failed = [r.program for r in report.results if not r.golden.passed]
    if failed:
        screen.err.print(f"self-check failed: {', '.join(failed)}", markup=False, style="red")
        raise typer.Exit(1)


def _show(screen: Screen, bundle: Any, reports: list[Any], found: list[Any], html: Path | None, as_json: bool) -> None:
    from .report import to_html
    from .summary import table, to_json

    if html:
        _save(html, to_html(bundle.manifest, reports, found, bundle.signer).encode())
        screen.err.print(f"page: {html}", markup=False, soft_wrap=True)
    if as_json:
        _document(screen, to_json(bundle.manifest, reports, found))
        return
    screen.out.print(table(bundle.manifest, reports))


def _comparisons(found: Any) -> Table:
    from .summary import clean, number

    made = Table("program", "metric", "baseline", "candidate", "ratio", "95 %", "p", "verdict", box=None)
    for c in found:
        span = "" if c.low is None else f"{number(c.low)}–{number(c.high)}"
        p = "" if c.p_value is None else f"{c.p_value:.3f}"
        cells = (c.program, c.metric, number(c.baseline), number(c.candidate), number(c.ratio), span, p, c.verdict)
        made.add_row(*(Text(clean(cell)) for cell in cells))  # a report is somebody else's text
        for note in c.notes[:1]:
            made.add_row("", Text(clean(note), style="dim"))
    return made


def _details(screen: Screen, facts: dict[str, Any]) -> None:
    sources = facts.pop("sources")
    table = Table("", "", box=None, show_header=False)
    for key, value in facts.items():
        if value not in (None, (), []):
            table.add_row(key, str(value))
    screen.out.print(table)
    for group, source in sources.items():
        screen.out.print(f"[dim]{group}: {source}[/]", soft_wrap=True)


def _document(screen: Screen, text: str) -> None:
    screen.out.file.write(text.rstrip("\n") + "\n")
    screen.out.file.flush()


def _save(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
