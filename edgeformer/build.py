"""The whole pipeline, on one screen: passes, one export a format, the checks, the prediction, the signed bundle."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeformer_agent import cases, wire

from . import device as devices, formats as registry, native, predict, signing
from .bundle import AGENT, Bundle, agent_zip, check_place, open_bundle, write
from .errors import BadInput, BundleRefused, FormatNotYet, UnknownFormat

if TYPE_CHECKING:
    from importlib.metadata import Distribution
    from types import ModuleType

    import torch

    from .data import Rows
    from .model import Model
    from .passes import Pass
    from .program import Program

PRECISIONS = {  # what a format's own `PRECISIONS` may name
    "int8": "int8 weights and embeddings per output channel, activations quantized per call or kept in float",
    "int4": "int4 weights in groups, int8 embeddings, float activations",
    "fp16": "fp16 storage and arithmetic, sums in fp32 where the runtime allows it",
    "fp32": "fp32 throughout",
}
ATTENTION = ("auto", "dense", "dsa")
BLOCK = 64  # tokens a side of a sparse block: the fastest on CPUs
GOLDEN_ROWS = 3
GOLDEN_TOKENS = 64  # a self-check must be cheap on the slowest board
# Other instruction sets round differently. int8: a board's kernels may also saturate where this machine's do not.
GOLDEN_SIMILARITY = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98, "int4": 0.98}

Progress = Callable[[str, int, int], None]  # what, done, total


def build(
    model: str | Path | torch.nn.Module | Model,
    target: str,
    *,
    data: str | Path | Sequence[str] | None = None,
    task: str | None = None,
    out: str | Path = "dist",
    precision: str | Sequence[str] | None = None,
    passes: Iterable[Pass] = (),
    attention: str = "auto",
    budget: float = 0.5,
    formats: Sequence[str] | None = None,
    gate: wire.Gate | float | None = None,
    lengths: Sequence[int] | None = None,
    example: tuple[torch.Tensor, ...] | None = None,
    name: str | None = None,
    version: int | None = None,
    expires: str | None = None,
    key: str = signing.DEFAULT,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """
    Optimizes, exports, checks, packages and signs `model` for `target`; the bundle is the folder `out`/NAME-TARGET.

    model: a Hugging Face folder, a hub id, a `transformers` model, a `Model`, or a module with `example` inputs.
    data, task: what the programs are checked with, see `edgeformer.data.load`; sample texts by default.
    precision: of `PRECISIONS`, one or several; each format's own by default. formats: all of the target's by default.
    attention: "dense", "dsa" (sparse attention that keeps `budget` of the blocks; its scorers are trained on the data),
    or "auto": sparse where the data's rows are long enough that it pays on the device. The manifest says which and why.
    gate: the least share of fp32 that must be kept (see `edgeformer.check.gate`); the manifest records a loosened one.
    lengths: static sequence lengths, up to 512 by default. version: rises by itself with the date and with each change.
    expires: last day of validity, YYYY-MM-DD; by default the end of next year.
    Raises GateFailed (nothing is packaged), BadInput, UnknownTarget, UnknownFormat, FormatNotYet, MissingExtra.
    """
    report = progress or (lambda _what, _done, _total: None)
    device = devices.load(target)
    chosen = _chosen(device, formats)
    if attention not in ATTENTION:
        raise BadInput(f"attention {attention!r} must be one of {', '.join(ATTENTION)}")
    expiry = _expiry(expires)

    from . import check, data as rows_of, model as models  # torch from here on

    exporters = [registry.load(name) for name in chosen]
    wanted_precisions = [_precisions(module, precision) for module in exporters]
    limit = check.gate(gate)
    report("load the model", 0, 1)
    if not isinstance(model, models.Model):
        model = models.load(model, name=name, example=example, lengths=tuple(lengths) if lengths else None)
    folder = Path(out).absolute() / f"{model.name}-{device.name}"
    check_place(folder, overwrite)  # again when writing; here, before minutes of work are spent
    rows = rows_of.load(model, data, task)
    model = rows_of.with_task(model, rows)
    report("load the model", 1, 1)
    wanted = check.reference(model, rows.rows, lambda n: report("fp32 reference", n, len(rows.rows)))
    for step in passes:
        model = step(model)
    model = _attention(model, rows, device, attention, budget, wanted_precisions[0][0], report)

    built: list[_Built] = []
    total = sum(map(len, wanted_precisions))
    for module, precisions in zip(exporters, wanted_precisions, strict=True):
        report("export", len(built), total)
        for program in module.export(model, device, precisions):
            built.append(_checked(program, model, rows, wanted, device, limit, report))
            report("export", len(built), total)
    manifest = _manifest(model, device.name, built, rows, limit, expiry)
    contents = _contents(model, built, rows, wanted)
    report("package and sign", 0, 1)
    signer = signing.load(key)
    bundle = _write(folder, manifest, contents, signer, version, overwrite)
    report("package and sign", 1, 1)
    return bundle


def _attention(
    model: Model, rows: Rows, device: devices.Device, wanted: str, budget: float, precision: str, report: Progress
) -> Model:
    """Dense or sparse, and why: a line of the history in either case."""
    from .attention import choice
    from .passes import sparsify

    tokens = [cases.length(row) for row in rows.rows]
    gain = choice.gain(model.module, tokens, device, budget, precision, sparsify.DENSE_BELOW)
    long_enough = max(tokens) >= sparsify.FEWEST_BLOCKS * BLOCK
    sparse = wanted == "dsa" or (wanted == "auto" and gain >= choice.WORTH and long_enough)
    why = (
        f"modelled gain over the data's rows {gain:.2f}, worth it from {choice.WORTH}"
        if wanted == "auto"
        else "asked for"
    )
    facts = {"chosen": "dsa" if sparse else "dense", "why": why, "modelled_gain": round(gain, 3), "budget": budget}
    if any(step.name == "sparsify.dsa" for step in model.history):  # a pass of the caller's has decided already
        return model
    model = model.after("attention", facts=facts)
    return sparsify.dsa(rows.rows, budget=budget, block=BLOCK, progress=report)(model) if sparse else model


@dataclass(frozen=True)
class _Built:
    program: Program
    entry: wire.Entry
    outputs: tuple[np.ndarray, ...]
    libraries: dict[str, Path]


def _chosen(device: devices.Device, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The formats to build, checked before anything slow starts."""
    here = registry.names()
    names = tuple(wanted) if wanted is not None else device.formats
    for name in names:
        if name not in (*here, *registry.PLANNED):
            raise UnknownFormat(name, [*device.formats, *device.on_request])
        if not device.runs(name):
            known = ", ".join((*device.formats, *device.on_request))
            raise BadInput(f"{device.name} does not run {name}; it runs {known}")
        if name not in here:
            raise FormatNotYet(name, device.name, [f for f in device.formats if f in here])
    if not names or len(set(names)) != len(names):
        raise BadInput(f"formats {list(names)} must name at least one format, each once")
    return names


def _precisions(module: ModuleType, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """Those of the wanted precisions that the format has; its own first choice where nothing is wanted."""
    known = tuple(module.PRECISIONS)
    if wanted is None:
        return known[:1]
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names or len(set(names)) != len(names) or not set(names) <= set(PRECISIONS):
        raise BadInput(f"precision {list(names)} must be some of {', '.join(PRECISIONS)}, each once")
    found = tuple(name for name in names if name in known)
    if not found:
        name = module.__name__.rpartition(".")[2]
        raise BadInput(f"precision {', '.join(names)}: {name} has {', '.join(known)}")
    return found


def _expiry(expires: str | None) -> str:
    """Coarse by default, so that the same inputs give the same bytes for a year."""
    today = datetime.datetime.now(datetime.UTC).date()
    if expires is None:
        return f"{today.year + 1}-12-31"
    try:
        day = datetime.date.fromisoformat(expires)
    except ValueError as error:
        raise BadInput(f"expires {expires!r} must be a day as YYYY-MM-DD") from error
    if day < today:
        raise BadInput(f"expires {expires} is in the past; every device would refuse the bundle")
    return day.isoformat()


def _checked(
    program: Program,
    model: Model,
    rows: Rows,
    wanted: tuple[np.ndarray, ...],
    device: devices.Device,
    limit: wire.Gate,
    report: Progress,
) -> _Built:
    """Opens the program with the device's runner, holds it against the gate, and predicts the device."""
    from . import check

    _fits(program, device)
    path = f"programs/{program.name}/{program.entry}"
    libraries = _libraries(program, device)
    blank = wire.Fidelity("", 0, 0, 0, 0)
    entry = wire.Entry(
        name=program.name,
        format=program.format,
        precision=program.precision,
        path=path,
        size_bytes=program.size_bytes,
        inputs=program.inputs,
        outputs=program.outputs,
        lengths=program.lengths,
        runtime=program.runtime,
        needs=program.needs,
        work=program.work,
        predicted=wire.Prediction(device.name, 1, wire.Metrics(), 1, 1, ""),
        checked=blank,
        golden_similarity=GOLDEN_SIMILARITY[program.precision],
        libraries={machine: f"native/{machine}/{path.name}" for machine, path in libraries.items()},
    )
    total = len(rows.rows)
    outputs = check.run(program, entry, rows.rows, lambda n: report(f"check {program.name}", n, total))
    found = check.fidelity(model, outputs, wanted, rows.labels)
    check.hold(program.name, found, limit)
    tokens = [cases.length(row) for row in rows.rows]
    predicted = predict.predict(program.work, program.lengths, tokens, device, accuracy=found.value)
    return _Built(program, entry._replace(checked=found, predicted=predicted), outputs, libraries)


def _libraries(program: Program, device: devices.Device) -> dict[str, Path]:
    """
    Machine -> the operator compiled for it. Without glibc the app's own tool chain links the operator. ExecuTorch's
    Python runtime needs torch, which boards do not have: they get a runner, with or without sparse attention.
    """
    runs_itself = program.format == "executorch"
    if not device.glibc or not (program.sparse or (runs_itself and device.name != "host")):
        return {}
    machine = native.host() if device.name == "host" else f"linux-{device.arch}"
    return {machine: native.runner(machine) if runs_itself else native.binding(program.format, machine)}


def _fits(program: Program, device: devices.Device) -> None:
    """The floor of the device's system must carry the runtime; a loader's own message would come too late."""
    floor, needed = device.glibc, program.needs.glibc
    if floor and needed and [int(n) for n in floor.split(".")] < [int(n) for n in needed.split(".")]:
        raise BadInput(
            f"{program.format} on {device.name}: {program.runtime.package} needs glibc {needed}, and its system has "
            f"{floor} ({device.os}); choose another format with formats=[...]"
        )


def _manifest(
    model: Model, target: str, built: Sequence[_Built], rows: Rows, limit: wire.Gate, expires: str
) -> wire.Manifest:
    return wire.Manifest(
        schema=wire.MANIFEST_SCHEMA,
        name=model.name,
        version=1,
        target=target,
        expires=expires,
        builder=f"edgeformer {_installed().version}",
        task=model.task,
        programs=tuple(b.entry for b in built),
        history=(*model.history, *(_step(b) for b in built)),
        gate=limit,
        cases=wire.Cases("cases/golden.npz", "cases/evaluation.npz", len(rows.rows), rows.source),
        files={},
    )


def _installed() -> Distribution:
    """This package as it was installed: its version and licence."""
    from importlib.metadata import distribution  # reads mail headers for that: a fifth of `import edgeformer`

    return distribution("edgeformer")


def _step(built: _Built) -> wire.Step:
    """What the exporter did, and what it cost and kept."""
    entry = built.entry
    return wire.Step(
        f"export.{entry.format}",
        {
            "program": entry.name,
            "precision": PRECISIONS[entry.precision],
            "size_bytes": entry.size_bytes,
            entry.checked.measure: entry.checked.mean,
            **({} if entry.checked.value is None else {str(entry.checked.metric): entry.checked.value}),
        },
    )


def _contents(
    model: Model, built: Sequence[_Built], rows: Rows, wanted: tuple[np.ndarray, ...]
) -> dict[str, bytes | Path]:
    """Every file of the bundle but the manifest, its signature and the agent."""
    contents: dict[str, bytes | Path] = dict(model.files or {})
    for b in built:
        contents |= {f"programs/{b.program.name}/{name}": data for name, data in b.program.files.items()}
        for machine, path in b.libraries.items():  # and what it needs, which stands next to it
            contents |= {f"native/{machine}/{file.name}": file for file in sorted(path.parent.iterdir())}
    picked = _golden(rows)
    golden = cases.Cases(
        tuple(rows.rows[i] for i in picked), {b.entry.name: tuple(b.outputs[i] for i in picked) for b in built}, None
    )
    contents["cases/golden.npz"] = cases.dump(golden)
    contents["cases/evaluation.npz"] = cases.dump(cases.Cases(rows.rows, {"reference": wanted}, rows.labels))
    contents["licences/edgeformer-LICENSE"] = (_installed().read_text("licenses/LICENSE") or "").encode()
    return contents


def _golden(rows: Rows) -> list[int]:
    """The shortest, the middle and the longest row that is still cheap."""
    order = sorted(range(len(rows.rows)), key=lambda i: cases.length(rows.rows[i]))
    cheap = [i for i in order if cases.length(rows.rows[i]) <= GOLDEN_TOKENS] or order[:1]
    return sorted({cheap[round(k * (len(cheap) - 1) / (GOLDEN_ROWS - 1))] for k in range(GOLDEN_ROWS)})


def _write(
    folder: Path,
    manifest: wire.Manifest,
    contents: dict[str, bytes | Path],
    signer: signing.Signer,
    version: int | None,
    overwrite: bool,
) -> Bundle:
    """The version is today's date, or one more than that of the bundle it replaces, where something changed."""
    if version is None:
        version = int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
        with suppress(BadInput, BundleRefused):
            before = open_bundle(folder).manifest
            version = max(version, before.version + (not _same(before, manifest, contents)))
    return write(folder, manifest._replace(version=version), contents, signer, overwrite=overwrite)


def _same(before: wire.Manifest, manifest: wire.Manifest, contents: dict[str, bytes | Path]) -> bool:
    """Whether a build changed nothing: it keeps its version then, and gives the same bytes."""
    digests = {
        k: wire.digest(v if isinstance(v, bytes) else v.read_bytes())
        for k, v in (contents | {AGENT: agent_zip()}).items()
    }
    plain = wire.load_manifest(wire.dump(manifest._replace(version=before.version, files=before.files)))
    return plain == before and digests == {name: file.sha256 for name, file in before.files.items()}
