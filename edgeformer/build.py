"""The whole pipeline, on one screen: passes, one export a format, the checks, the prediction, the signed bundle."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

import numpy as np

from edgeformer_agent import cases, wire

from . import signing
from .bundle import AGENT, Bundle, agent_zip, check_place, open_bundle, write
from .errors import BadInput, BundleRefused
from .plan import ATTENTION, PRECISIONS, plans
from .stages import Progress, quiet

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    import torch

    from .budget import Limits
    from .data import Data, Rows
    from .model import Model, Source
    from .passes import Pass
    from .recipe import Recipe
    from .workshop import Made

GOLDEN_ROWS = 3
GOLDEN_TOKENS = 64  # a self-check must be cheap on the slowest board

RecipeSource: TypeAlias = "str | Path | Recipe"
Targets: TypeAlias = list[str] | tuple[str, ...]


# fmt: off
@overload
def build(model: Source, target: str, *, data: Data = ..., task: str | None = ..., out: str | Path = ...,
          precision: str | Sequence[str] | None = ..., passes: Iterable[Pass] = ..., attention: str = ...,
          budget: float = ..., formats: Sequence[str] | None = ..., gate: wire.Gate | float | None = ...,
          lengths: Sequence[int] | None = ..., example: tuple[torch.Tensor, ...] | None = ..., name: str | None = ...,
          version: int | None = ..., expires: str | None = ..., key: str = ..., overwrite: bool = ...,
          recipe: RecipeSource | None = ..., train: str | Path | None = ..., limits: Limits | None = ...,
          trials: int = ..., progress: Progress | None = ...) -> Bundle: ...
@overload
def build(model: Source, target: Targets, *, data: Data = ..., task: str | None = ..., out: str | Path = ...,
          precision: str | Sequence[str] | None = ..., passes: Iterable[Pass] = ..., attention: str = ...,
          budget: float = ..., formats: Sequence[str] | None = ..., gate: wire.Gate | float | None = ...,
          lengths: Sequence[int] | None = ..., example: tuple[torch.Tensor, ...] | None = ..., name: str | None = ...,
          version: int | None = ..., expires: str | None = ..., key: str = ..., overwrite: bool = ...,
          recipe: RecipeSource | None = ..., train: str | Path | None = ..., limits: None = ...,
          trials: int = ..., progress: Progress | None = ...) -> tuple[Bundle, ...]: ...
# fmt: on
def build(
    model: Source,
    target: str | Targets,
    *,
    data: Data = None,
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
    recipe: RecipeSource | None = None,
    train: str | Path | None = None,
    limits: Limits | None = None,
    trials: int = 20,
    progress: Progress | None = None,
) -> Bundle | tuple[Bundle, ...]:
    """
    Optimizes, exports, checks, packages and signs `model` for `target`; the bundle is the folder `out`/NAME-TARGET.
    With several targets it gives a bundle each: what they share is exported and checked once, and nothing is written
    before all have passed.

    model: a Hugging Face folder, a hub id, a `transformers` model, a `Model`, or a module with `example` inputs.
    data, task: what the programs are checked with, see `edgeformer.data.load`; sample texts by default.
    precision: of `PRECISIONS`, one or several; each format's own by default. formats: all of the target's by default.
    attention: "dense", "dsa" (sparse attention that keeps `budget` of the blocks; its scorers are trained on the data),
    or "auto": sparse where the data's rows are long enough that it pays on the device. The manifest says which and why.
    recipe: passes and settings from a TOML file or by name (see `edgeformer.recipe`); train: what they learn from.
    limits: what the device must do; with an open recipe, `trials` settings are searched for it (`edgeformer.search`).
    gate: the least share of fp32 that must be kept (see `edgeformer.check.gate`); the manifest records a loosened one.
    lengths: static sequence lengths, up to 512 by default. version: rises by itself with the date and with each change.
    expires: last day of validity, YYYY-MM-DD; by default the end of next year.
    Raises GateFailed, BudgetMissed (nothing is packaged), BadInput, UnknownTarget, UnknownFormat, FormatNotYet,
    MissingExtra.
    """
    report = progress or quiet
    menu = _menu(recipe, limits, train, target)
    planned = plans(target, formats, precision or (menu.precision if menu else None) or None)
    if limits is not None:  # they are met by one program: the first of what was asked for
        planned = (planned[0].first(),)
    if attention not in ATTENTION:
        raise BadInput(f"attention {attention!r} must be one of {', '.join(ATTENTION)}")
    expiry = _expiry(expires)

    from . import check, data as rows_of, model as models  # torch from here on
    from .order import Order, hold, served
    from .workshop import Workshop

    limit = check.gate(_allowed(gate, limits))
    report("load the model", 0, 1)
    if not isinstance(model, models.Model):
        model = models.load(model, name=name, example=example, lengths=tuple(lengths) if lengths else None)
    folders = [Path(out).absolute() / f"{model.name}-{plan.device.name}" for plan in planned]
    for folder in folders:  # again when writing; here, before minutes of work are spent
        check_place(folder, overwrite)
    rows = rows_of.load(model, data, task)
    model = rows_of.with_task(model, rows)
    report("load the model", 1, 1)
    wanted = check.reference(model, rows.rows, lambda n: report("fp32 reference", n, len(rows.rows)))
    before = model
    for step in passes:
        model = step(model)
    if menu:
        order = Order(menu, limits, train, data, task, trials, Path(out) / "search", report)
        model, attention, budget = served(order, model, before, planned[0], attention, budget)
    if model.tokenizer is not before.tokenizer:  # a pass cut the vocabulary
        rows = rows_of.load(model, data, task)
    shop = Workshop(rows, wanted, limit, report)
    made = []
    for plan in planned:
        fitted = shop.fitted(model, plan, attention, budget)
        built = shop.programs(fitted, plan)
        if limits is not None:
            hold(limits, built[0].entry)
        manifest = _manifest(fitted, plan.device.name, built, rows, limit, expiry)
        made.append((manifest, _contents(fitted, built, rows, wanted)))
    report("package and sign", 0, len(made))
    signer = signing.load(key)
    bundles = []
    for folder, (manifest, contents) in zip(folders, made, strict=True):
        bundles.append(_write(folder, manifest, contents, signer, version, overwrite))
        report("package and sign", len(bundles), len(made))
    return bundles[0] if isinstance(target, str) else tuple(bundles)


def _allowed(gate: wire.Gate | float | None, limits: Limits | None) -> wire.Gate | float | None:
    """What may be lost is also the gate, unless the caller has one."""
    if gate is not None or limits is None or limits.max_drop is None:
        return gate
    return max(0.0, 1 - limits.max_drop)


def _menu(recipe: RecipeSource | None, limits: Limits | None, train: object, target: str | Targets) -> Recipe | None:
    """The recipe that was asked for; a search's own where there are limits only."""
    if limits is not None and not isinstance(target, str) and len(target) > 1:
        raise BadInput("limits go with one target: another device needs another model")
    if recipe is None and limits is None:
        if train is not None:
            raise BadInput("train is what a recipe's passes learn from; name a recipe, or limits to search for")
        return None
    from .recipe import Recipe, load

    found = recipe if recipe is not None else "search" if train is None else "search-trained"
    return found if isinstance(found, Recipe) else load(found)


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


def _manifest(
    model: Model, target: str, built: Sequence[Made], rows: Rows, limit: wire.Gate, expires: str
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


def _step(built: Made) -> wire.Step:
    """What the exporter did, and what it cost and kept."""
    entry = built.entry
    return wire.Step(
        f"export.{entry.format}",
        {
            "program": entry.name,
            "precision": PRECISIONS[entry.precision].about,
            "size_bytes": entry.size_bytes,
            **({"sparse_layers": built.program.sparse_layers} if built.program.sparse_layers else {}),
            **({"narrower": built.program.narrower} if built.program.narrower else {}),
            entry.checked.measure: entry.checked.mean,
            **({} if entry.checked.value is None else {str(entry.checked.metric): entry.checked.value}),
        },
    )


def _contents(
    model: Model, built: Sequence[Made], rows: Rows, wanted: tuple[np.ndarray, ...]
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
