"""The parity matrix for people: a table for the terminal, one self-contained page."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from edgeformer_agent.wire import Fidelity

from . import plot
from .agreement import DEPARTS, LAYER_ROWS, Cell, Matrix
from .page import document, figure, section, table as html_table, text
from .summary import MISSING, number

__all__ = ["page", "table"]

ENOUGH = 20  # rows, to tell programs with sparse attention apart
HEADS = ("format", "precision", "MB", "to fp32 dense", "worst", "to PyTorch", "sparse", "kept", "departs at")


def table(matrix: Matrix) -> Table:
    """For a terminal of 80 columns."""
    made = Table(
        title=_title(matrix), caption="; ".join(_notes(matrix)), box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    made.title_justify = made.caption_justify = "left"
    for place, head in enumerate(HEADS):
        made.add_column(head, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for cell in matrix.cells:
        if cell.error:
            words = cell.error if len(cell.error) < 400 else cell.error[:400] + "…"
            made.add_row(cell.format, cell.precision, Text(words, style="red"))
        else:
            made.add_row(*_figures(matrix, cell))
    return made


def page(matrix: Matrix) -> str:
    """One HTML page: the matrix, a bar of size and a line of layers a program."""
    head = f'<header><p class="kicker">edgeformer parity</p><h1>{text(matrix.model)}</h1><p class="lead">'
    head += f"{text(_title(matrix))}. {'. '.join(map(text, _notes(matrix)))}</p></header>"
    ran = [cell for cell in matrix.cells if cell.error is None]
    lines = [_figures(matrix, cell) for cell in ran]
    body = head + section("matrix", "Every format", html_table("Cosine or agreement, 1 is the same", HEADS, lines))
    failed = [(cell.format, cell.precision, str(cell.error)) for cell in matrix.cells if cell.error]
    if failed:
        body += section(
            "failed", "What did not run", html_table("In the words of the tool", (*HEADS[:2], "why"), failed)
        )
    if ran:
        body += section("pictures", "Size and closeness", _sizes(ran) + _closeness(ran))
    if any(cell.layers for cell in ran):
        body += section("layers", "Layer by layer", _by_layer(matrix, ran))
    return document(f"{matrix.model}: edgeformer parity", body)


def _title(matrix: Matrix) -> str:
    kind = "dense attention" if matrix.budget is None else f"sparse attention, budget {matrix.budget:g}"
    return f"{matrix.model}: {len(matrix.cells)} programs, {kind}, {matrix.rows} rows ({matrix.source})"


def _notes(matrix: Matrix) -> list[str]:
    words = [
        f"departs: first layer whose tokens have a mean cosine below {DEPARTS:g} to PyTorch with the same attention, "
        f"on {min(LAYER_ROWS, matrix.rows)} rows"
    ]
    own = {cell.format: _share(cell.torch) for cell in matrix.cells if cell.torch}
    if matrix.budget is not None and own:
        said = ", ".join(
            f"{value} ({', '.join(f for f in own if own[f] == value)})" for value in dict.fromkeys(own.values())
        )
        words.append(f"PyTorch itself at this budget, to dense: {said}")
    words += [_difference(cell) for cell in matrix.cells if matrix.budget is not None and cell.difference]
    if matrix.budget is not None and matrix.rows < ENOUGH:
        words.append(f"{matrix.rows} rows: single blocks that turn weigh much, {ENOUGH} long texts in --data tell more")
    return words


def _difference(cell: Cell) -> str:
    """Of a program to PyTorch at the same budget, with its 95 % interval."""
    found = cell.difference
    assert found is not None
    around = "" if found.half is None else f" ± {found.half:.4f}"
    return f"{_name(cell)} to that: {found.mean:+.4f}{around}"


def _figures(matrix: Matrix, cell: Cell) -> tuple[str, ...]:
    ran = cell.native
    kept = f"{sum(ran.kept) / len(ran.kept):.3f}" if ran and ran.kept else MISSING
    close = (_share(cell.fidelity), _share(cell.fidelity, worst=True), _share(cell.with_library or cell.same))
    says = f"{ran.calls_per_run} calls, {ran.kernel_set}" if ran else _layers_of(cell)
    return (cell.format, cell.precision, f"{cell.size_bytes / 2**20:.2f}", *close, says, kept, _departs(matrix, cell))


def _layers_of(cell: Cell) -> str:
    """Of the longest length, where the format itself decided layer by layer."""
    if not cell.sparse_layers:
        return MISSING
    account = list(cell.sparse_layers.values())[-1]
    return f"{account['sparse']} of {account['layers']} layers"


def _departs(matrix: Matrix, cell: Cell) -> str:
    if not cell.layers:
        return "not seen"
    return "none" if cell.departs is None else f"{matrix.layer_names[cell.departs]} ({cell.layers[cell.departs]:.4f})"


def _share(found: Fidelity | None, worst: bool = False) -> str:
    return MISSING if found is None else f"{found.worst if worst else found.mean:.4f}"


def _name(cell: Cell) -> str:
    return f"{cell.format}-{cell.precision}"


def _sizes(cells: list[Cell]) -> str:
    bars = [
        plot.Bar(plot.Label(_name(c), figure=number(c.size_bytes / 2**20, "MB")), c.size_bytes / 2**20, "ink")
        for c in cells
    ]
    picture = plot.bars("size", "Size on disk", ", ".join(b.label.name for b in bars), bars, "MB")
    return figure(picture, "All files of the program.")


def _closeness(cells: list[Cell]) -> str:
    spans = []
    for cell in cells:
        if cell.fidelity:
            label = plot.Label(_name(cell), figure=_share(cell.fidelity), detail=f"worst {cell.fidelity.worst:.4f}")
            mean = cell.fidelity.mean
            spans.append(plot.Span(label, cell.fidelity.worst, mean, mean, "run1", diamond=True))
    least = max(min(0.999, *(span.low for span in spans)), 0.0)
    scale = plot.Scale(least - 0.08 * (1 - least), 1.0, plot.LEFT, plot.RIGHT)
    words = ", ".join(span.label.name for span in spans)
    picture = plot.spans("close", "Closeness to the fp32 model", words, spans, scale, "1 is the same")
    return figure(picture, "Circle: mean over the rows. Diamond: the least similar row.")


def _by_layer(matrix: Matrix, cells: list[Cell]) -> str:
    heads = ("program", *(f">{name}" for name in matrix.layer_names))
    lines = [(_name(cell), *(f"{value:.4f}" for value in cell.layers)) for cell in cells if cell.layers]
    return html_table("Mean cosine over all tokens, to PyTorch with the same attention", heads, lines)
