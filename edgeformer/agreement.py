"""
The parity matrix: one model in every format, each program opened by its own runner and held against fp32 PyTorch, layer
by layer where asked, with our operator's library where there is one.

Nothing is packaged and nothing stops it: a format that fails is a cell that says why. Layers are seen by a probe: the
same model with its hidden states as the output, exported the same way, so every runtime that runs the model shows them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from edgeformer_agent import cases, native as journal, runners, score, wire

from . import check, data as rows_of, formats as registry, model as models, native
from .errors import EdgeformerError
from .model import Model
from .passes import sparsify
from .plan import Export, exports
from .program import Program
from .stages import Progress, quiet
from .workshop import described

__all__ = ["Cell", "Difference", "Matrix", "parity"]

LAYER_ROWS = 4  # rows that layers are compared on, from the shortest to the longest: each gives all of its tokens
DEPARTS = 0.99  # a layer whose tokens have a mean cosine below this has departed from PyTorch
SCHEMA = "edgeformer.parity/3"
FEWEST = 5  # rows of which an interval is stated
NORMAL = 1.959964  # half of a 95 % interval, in standard errors of many rows


@dataclass(frozen=True)
class Difference:
    """
    What a program's rows have over those of PyTorch with the same attention, both in similarity to the dense model (see
    `score`): mean, half of its 95 % interval (None for fewer than `FEWEST` rows), and how many rows.

    Paired, since rows differ far more than programs do. Where attention is sparse, the least change turns single
    blocks, and a row gains or loses by it: few rows say little.
    """

    mean: float
    half: float | None
    rows: int


@dataclass(frozen=True)
class Cell:
    """
    One format in one precision. fidelity: to the dense fp32 model; same: to PyTorch with the same attention;
    torch: of that to the dense model; difference: of fidelity and torch, row by row.
    with_library: `same`, computed by our operator's library; native: what the library says it did.
    layers: mean cosine over all tokens after each layer, to PyTorch with the same attention.
    sparse_layers: see `Program`.
    """

    format: str
    precision: str
    error: str | None = None
    size_bytes: int = 0
    export_s: float = 0.0
    fidelity: wire.Fidelity | None = None
    same: wire.Fidelity | None = None
    torch: wire.Fidelity | None = None
    difference: Difference | None = None
    with_library: wire.Fidelity | None = None
    native: wire.Native | None = None
    layers: tuple[float, ...] = ()
    sparse_layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def departs(self) -> int | None:
        """The first layer below `DEPARTS`; None where none is."""
        return next((i for i, value in enumerate(self.layers) if not value >= DEPARTS), None)


@dataclass(frozen=True)
class Matrix:
    """All cells of one model. budget: fraction of blocks that sparse attention keeps, None where it is dense."""

    model: str
    rows: int
    source: str
    budget: float | None
    layer_names: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def whole(self) -> bool:
        """Whether every format ran."""
        return all(cell.error is None for cell in self.cells)

    def to_json(self) -> str:
        """One document with everything the page shows, unrounded."""
        body = {**dataclasses.asdict(self), "schema": SCHEMA}
        for cell, found in zip(body["cells"], self.cells, strict=True):
            cell["departs"] = self.layer_names[found.departs] if found.departs is not None else None
        return json.dumps(_plain(body), indent=1, allow_nan=False)


@dataclass(frozen=True)
class _Wanted:
    """
    What a cell is held against: outputs of the dense model, of the same attention (and how close those are to each
    other), and hidden states of the same on the rows `seen`.
    """

    model: Model
    probe: Model | None
    rows: rows_of.Rows
    dense: tuple[np.ndarray, ...]
    same: tuple[np.ndarray, ...]
    torch: wire.Fidelity
    seen: tuple[cases.Row, ...]
    layers: tuple[np.ndarray, ...]
    names: tuple[str, ...]


def parity(
    model: models.Source,
    *,
    formats: Sequence[str] | None = None,
    precision: str | Sequence[str] | None = None,
    data: rows_of.Data = None,
    task: str | None = None,
    budget: float | None = None,
    layers: bool = True,
    lengths: Sequence[int] | None = None,
    example: tuple[torch.Tensor, ...] | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """
    Exports `model` in every format (or in `formats`) and says how close each program comes, whatever happens to others.

    budget: with Dynamic Sparse Attention that keeps this fraction of the blocks, trained on the data; None is dense.
    layers: also compare the hidden states after each layer, at the price of a second export (of one static length).
    Raises BadInput, UnknownFormat, MissingExtra.
    """
    report = progress or quiet
    wanted_exports = exports(tuple(formats) if formats else registry.names(), precision)
    if not isinstance(model, Model):
        model = models.load(model, example=example, lengths=tuple(lengths) if lengths else None)
    rows = rows_of.load(model, data, task)
    model = rows_of.with_task(model, rows)
    dense = check.reference(model, rows.rows, lambda n: report("fp32 reference", n, len(rows.rows)))
    if budget is None:
        kinds = dict.fromkeys((export.rule for export in wanted_exports), _wanted(model, rows, dense, layers, report))
    else:
        made = sparsify.train(model, rows.rows, progress=report)
        kinds = {}
        for rule in {export.rule for export in wanted_exports}:
            step = sparsify.dsa(rows.rows, budget=budget, rule=rule, scorers=made)
            kinds[rule] = _wanted(step(model), rows, dense, layers, report)
    cells = [cell for export in wanted_exports for cell in _cells(export, kinds[export.rule], report)]
    names = kinds[wanted_exports[0].rule].names
    return Matrix(model.name, len(rows.rows), rows.source, budget, names, tuple(cells))


def _wanted(model: Model, rows: rows_of.Rows, dense: tuple[np.ndarray, ...], layers: bool, report: Progress) -> _Wanted:
    total = len(rows.rows)
    sparse = any(step.name == "sparsify.dsa" for step in model.history)
    same = check.reference(model, rows.rows, lambda n: report("sparse reference", n, total)) if sparse else dense
    torch_loss = check.fidelity(model, same, dense, rows.labels)
    probe, names = probed(model) if layers else (model, ())
    if not names:
        return _Wanted(model, None, rows, dense, same, torch_loss, (), (), ())
    seen = _spread(rows.rows)
    longest = max(map(cases.length, seen))
    probe = replace(probe, lengths=tuple(n for n in probe.lengths if n >= longest)[:1] or probe.lengths[-1:])
    states = check.reference(probe, seen, lambda n: report("layers", n, len(seen)))
    return _Wanted(model, probe, rows, dense, same, torch_loss, seen, states, names)


def _spread(rows: Sequence[cases.Row]) -> tuple[cases.Row, ...]:
    """`LAYER_ROWS` of all lengths."""
    order = sorted(rows, key=cases.length)
    places = {round(k * (len(order) - 1) / (LAYER_ROWS - 1)) for k in range(LAYER_ROWS)}
    return tuple(order[i] for i in sorted(places))


def _cells(export: Export, wanted: _Wanted, report: Progress) -> Iterator[Cell]:
    """A cell for each precision; an error ends the format, not the matrix."""
    done: list[str] = []
    start = time.perf_counter()
    try:
        report(f"export {export.name}", 0, 1)
        for program in export.programs(wanted.model):
            seconds = time.perf_counter() - start
            report(f"export {export.name}", 1, 1)
            done.append(program.precision)
            yield _cell(program, seconds, export, wanted, report)
            start = time.perf_counter()
    except EdgeformerError as error:
        for precision in export.precisions[len(done) :]:
            yield Cell(export.name, precision, error=str(error))


def _cell(program: Program, seconds: float, export: Export, wanted: _Wanted, report: Progress) -> Cell:
    cell = Cell(program.format, program.precision, size_bytes=program.size_bytes, export_s=seconds)
    cell = replace(cell, sparse_layers=program.sparse_layers)
    total = len(wanted.rows.rows)
    try:
        outputs = check.run(
            program, described(program), wanted.rows.rows, lambda n: report(f"check {program.name}", n, total)
        )
        labels = wanted.rows.labels
        cell = replace(
            cell,
            fidelity=check.fidelity(wanted.model, outputs, wanted.dense, labels),
            same=check.fidelity(wanted.model, outputs, wanted.same, labels),
            torch=wanted.torch,
            difference=_difference(wanted, outputs),
        )
        cell = _natively(cell, program, wanted)
        return replace(cell, layers=_layers(program.precision, export, wanted))
    except EdgeformerError as error:
        return replace(cell, error=str(error))


def _difference(wanted: _Wanted, outputs: Sequence[np.ndarray]) -> Difference:
    ours, theirs = (score.similarity(wanted.model.task, x, wanted.dense) for x in (outputs, wanted.same))
    return paired(ours - theirs)


def paired(differences: np.ndarray) -> Difference:
    """Student's interval of the mean; his quantile by its expansion, which is off by 0.3 % at `FEWEST` rows."""
    n = len(differences)
    if n < FEWEST:
        return Difference(float(differences.mean()), None, n)
    z, free = NORMAL, n - 1
    quantile = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return Difference(float(differences.mean()), float(quantile * differences.std(ddof=1) / n**0.5), n)


def _natively(cell: Cell, program: Program, wanted: _Wanted) -> Cell:
    """With what the same program gives by our operator's library, and the library's own account of what it did."""
    if not program.sparse or program.format not in native.bindings():
        return cell
    library = str(native.operator(program.format, native.host()))
    with check.opened(program) as path:
        run = runners.load(program.format).load(path, described(program), 1, library)
        book = journal.journal(run, library)
        assert book is not None  # the program is sparse
        run = book.watch(run)
        outputs = [np.asarray(run(row)) for row in wanted.rows.rows]
    found = check.fidelity(wanted.model, outputs, wanted.same, wanted.rows.labels)
    return replace(cell, with_library=found, native=book.native())


def _layers(precision: str, export: Export, wanted: _Wanted) -> tuple[float, ...]:
    """Mean cosine over all tokens after each layer; () where the format cannot export the probe."""
    if wanted.probe is None:
        return ()
    with suppress(EdgeformerError):
        (program,) = replace(export, precisions=(precision,)).programs(wanted.probe)
        outputs = check.run(program, described(program), wanted.seen, lambda _n: None)
        cosines = [_cosines(*pair, len(wanted.names)) for pair in zip(outputs, wanted.layers, strict=True)]
        return tuple(float(x) for x in np.concatenate(cosines).mean(0))
    return ()


def _cosines(got: np.ndarray, want: np.ndarray, width: int) -> np.ndarray:
    """(tokens, layers) from two (tokens, layers x hidden); `got` may be padded at its end."""
    a, b = (x[: len(want)].reshape(len(want), width, -1).astype(np.float64) for x in (got, want))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    cosines: np.ndarray = (a * b).sum(-1) / np.maximum(scale, 1e-30)
    return cosines


def probed(model: Model) -> tuple[Model, tuple[str, ...]]:
    """The model with its hidden states side by side as the output (batch, tokens, layers x hidden), and their names."""
    found = blocks(model.module)
    if not found:
        return model, ()
    names = ("embeddings", *(f"layer {i}" for i in range(len(found))))
    output = wire.Tensor("hidden_states", "float32", (-1, -1, -1))
    return replace(model, module=_Probe(model.module, found).eval(), output=output), names


def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's layers: its longest list of modules of one class."""
    lists = [list(m) for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    alike = [x for x in lists if len({type(m) for m in x}) == 1]
    return max(alike, key=len, default=[])


class _Probe(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
        super().__init__()
        self.module, self._layers = module, layers  # a plain list: the layers are registered once, in `module`

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks = [self._layers[0].register_forward_pre_hook(lambda _m, given: seen.append(given[0]))]
        for layer in self._layers:
            hooks.append(layer.register_forward_hook(lambda _m, _given, out: seen.append(_first(out))))
        try:
            self.module(*tensors)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(seen, -1)


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _plain(value: object) -> object:
    """JSON has no NaN: an unknown number is null."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
