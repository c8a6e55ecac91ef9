"""
Rows to check and measure with: from a text file, from labelled data, or made up where a model has no text input.

Rows keep their natural length (right padding is the runner's business) and carry no batch axis.
"""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgeformer_agent import wire
from edgeformer_agent.cases import Row

from .errors import BadInput
from .labelled import READERS, thin
from .model import Model

MAX_ROWS = 1000  # more rows are thinned evenly: a device measures all of them
REFERENCE_BYTES = 32 << 20  # fp32 outputs travel with a bundle: a large vocabulary means few rows
SYNTHETIC_ROWS = 32
TABLES = {  # tasks whose file is a table: how many texts a row, then a label
    "classification": 1,
    "cola": 1,
    "longtech": 1,
    "sst2": 1,
    "similarity": 2,
    "stsb": 2,
}
TASKS = {**dict.fromkeys(TABLES, ".tsv"), "longtech": ".jsonl", "squad": ".json", "lambada": ".jsonl"}
TASKS["tokens"] = ".tsv or .jsonl"
METRICS = {"cola": "mcc"}  # where it is not accuracy or rank correlation
Data = str | Path | Sequence[str] | None  # a file, texts, or samples of the package


@dataclass(frozen=True)
class Rows:
    """Inputs in order, with labels (one a row, or one a pair of rows) where the data has them."""

    rows: tuple[Row, ...]
    source: str  # what they are, with a digest: never a path
    labels: Sequence[Any] | None = None  # numbers, or arrays (see `score.metric`)
    task: wire.Task | None = None  # the model's task, with its metric


def load(model: Model, data: Data, task: str | None, *, most: int = MAX_ROWS) -> Rows:
    """
    `data`: a .txt (one text a line), a labelled file with its `task` (of TASKS: a .tsv of texts, then a label, with a
    header line or none; CoLA and LongTech as their authors publish them; or what `edgeformer.labelled` reads), a .npz
    (an array of rows for each input), texts, or None (a sample that comes with the package; noise for models without
    text). Rows longer than the model's limit are cut. Raises BadInput.
    """
    if task is not None and task not in TASKS:
        raise BadInput(f"no task {task!r}; known: {', '.join(sorted(TASKS))}")
    if model.task.kind == "next_token":
        most = max(1, min(most, REFERENCE_BYTES // (4 * model.output.shape[1])))
    labelled = f"task {task!r} needs labelled data: a {TASKS[task]} file" if task else ""
    if data is not None and not isinstance(data, str | Path):
        if task is not None:
            raise BadInput(f"{labelled}, not texts alone")
        return _unlabelled(model, list(data), "texts given by the caller", most)
    path = Path(data).expanduser() if data is not None else None
    if path is not None and not path.is_file():
        raise BadInput(f"no file {str(data)!r} to check the programs with")
    if path is not None and path.suffix == ".npz":
        if task is not None:
            raise BadInput(f"{labelled}; {path.name} holds inputs alone")
        return _arrays(model, path, most)
    if task is not None:
        if path is None:
            raise BadInput(labelled)
        return _labelled(model, path, task, most) if task in TABLES else _read(model, path, task, most)
    if path is not None:
        return _unlabelled(model, _lines(path), _named(path), most)
    if model.tokenizer is None:
        return _synthetic(model)
    sample = files("edgeformer") / "texts.txt"
    return _unlabelled(model, sample.read_text("utf-8").splitlines(), "sample texts of the package", most)


class Texts(NamedTuple):
    """What a model learns from: texts, and a label each where the file has them."""

    texts: tuple[str, ...]
    labels: tuple[float, ...] | None


def texts(path: str | Path, task: str | None) -> Texts:
    """All texts of a file: a line each, or the first text of each row of a table with its `task`. Raises BadInput."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"no file {str(path)!r} to learn from")
    if task is None or task not in TABLES:
        return Texts(tuple(line for line in _lines(path) if line.strip()), None)
    rows = [row for _, row in _rows(path, task)]
    return Texts(tuple(row[0] for row in rows), tuple(float(row[-1]) for row in rows))


def pairs(path: str | Path, task: str) -> tuple[str | tuple[str, str], ...]:
    """The texts of each row of a table, as a tokenizer takes them: one, or the two of a pair. Raises BadInput."""
    table = [row for _, row in _rows(Path(path).expanduser(), task)]
    return tuple(row[0] if len(row) == 2 else (row[0], row[1]) for row in table)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").split("\n")  # splitlines() also cuts at U+2028
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _unlabelled(model: Model, texts: list[str], source: str, most: int) -> Rows:
    texts = thin([text for text in texts if text.strip()], most)
    if not texts:
        raise BadInput(f"{source}: no text in it; one a line is expected")
    return Rows(tuple(_tokenize(model, text) for text in texts), source)


def _read(model: Model, path: Path, task: str, most: int) -> Rows:
    kind, reader = READERS[task]
    if model.task.kind != kind:
        raise _unfit(model, task)
    lines = _lines(path)
    if not any(line.strip() for line in lines):
        raise BadInput(f"{path.name} holds no rows")
    try:
        judged = reader(model, lines, most)
    except BadInput as error:
        raise BadInput(f"{path.name}: {error}") from error
    if not judged.rows:
        raise BadInput(f"{path.name} holds no rows")
    return Rows(judged.rows, _named(path), judged.labels, judged.task)


def _unfit(model: Model, task: str) -> BadInput:
    kind = model.task.kind.replace("_", " ")
    return BadInput(f"task {task!r} does not go with a model whose output is {model.output.name} ({kind})")


def _labelled(model: Model, path: Path, task: str, most: int) -> Rows:
    table = thin([row for _, row in _rows(path, task)], most)
    if not table:
        raise BadInput(f"{path.name} holds no rows")
    labels: Any = np.asarray([float(row[-1]) for row in table], np.float32)
    rows, judged = _judged(model, table, labels, task)
    return Rows(rows, _named(path), labels, judged)


def _rows(path: Path, task: str) -> list[tuple[int, list[str]]]:
    """Line numbers and rows: the task's texts, then its label."""
    columns = TABLES[task] + 1
    numbered = _longtech(path) if task == "longtech" else _table(path)
    if task == "cola":  # source, label, the author's mark, sentence
        numbered = [(line, [row[3], row[1]] if len(row) == 4 else row) for line, row in numbered]
    if numbered and not _is_number(numbered[0][1][-1]):
        numbered = numbered[1:]  # a header
    for line, row in numbered:
        if len(row) != columns or not _is_number(row[-1]):
            raise BadInput(
                f"{path.name}, line {line}: task {task!r} needs {columns - 1} text column(s) and a number, got {row}"
            )
    return numbered


def _table(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and columns."""
    try:
        reader = csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise BadInput(f"{path.name} is not a table of tab-separated texts: {error}") from error


def _longtech(path: Path) -> list[tuple[int, list[str]]]:
    """One document a line, as JSON with `text` and the number of its class, `y`."""
    made = []
    for number, line in enumerate(_lines(path), 1):
        try:
            said = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise BadInput(f"{path.name}, line {number}: not JSON: {error}") from error
        if said is not None and not (isinstance(said, dict) and {"text", "y"} <= said.keys()):
            raise BadInput(f"{path.name}, line {number}: an object with text and y is needed")
        if said is not None:
            made.append((number, [str(said["text"]), str(said["y"])]))
    return made


def _judged(model: Model, table: list[list[str]], labels: np.ndarray, task: str) -> tuple[tuple[Row, ...], wire.Task]:
    """How this model answers this task: by its head, or by the cosine of two embeddings."""
    kind = model.task.kind
    if TABLES[task] == 1 and kind == "classification":
        if (labels != labels.round()).any() or labels.min() < 0 or labels.max() >= len(model.task.labels):
            raise BadInput(
                f"labels {labels.min():g}..{labels.max():g} do not fit a head with {len(model.task.labels)} classes"
            )
        judged = model.task._replace(metric=METRICS.get(task, "accuracy"))
        return tuple(_tokenize(model, row[0]) for row in table), judged
    if TABLES[task] == 2 and kind == "regression":
        return tuple(_tokenize(model, *row[:2]) for row in table), model.task._replace(metric="spearman")
    if TABLES[task] == 2 and kind == "embedding":
        rows = tuple(_tokenize(model, text) for row in table for text in row[:2])
        return rows, model.task._replace(metric="spearman", paired=True)
    raise _unfit(model, task)


def _tokenize(model: Model, text: str, pair: str | None = None) -> Row:
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer (tokenizer.json), so texts cannot be used; give rows as .npz")
    encoded = model.tokenizer(text, pair, truncation=True, max_length=model.max_length)
    missing = [x.name for x in model.inputs if x.name not in encoded and x.name != "token_type_ids"]
    if missing:
        raise BadInput(f"the tokenizer gives no {', '.join(missing)}")
    zeros = [0] * len(encoded["input_ids"])
    return {x.name: np.asarray(encoded.get(x.name, zeros), x.dtype) for x in model.inputs}


def _arrays(model: Model, path: Path, most: int) -> Rows:
    """Fixed shapes only: one array an input, the first axis counts the rows."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            # same_kind: a token that is 1.5 is refused, not cut to 1
            arrays = {x.name: stored[x.name].astype(x.dtype, casting="same_kind") for x in model.inputs}
    except (
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise BadInput(
            f"{path.name} needs an array for each input {[x.name for x in model.inputs]}: {error}"
        ) from error
    for x in model.inputs:
        shape = arrays[x.name].shape[1:]
        if len(shape) != len(x.shape) - 1 or any(b not in (a, -1) for a, b in zip(shape, x.shape[1:], strict=True)):
            raise BadInput(f"{path.name}: rows of {x.name} have shape {shape}, the model takes {x.shape[1:]}")
        if x.shape[1:2] == (-1,):
            arrays[x.name] = arrays[x.name][:, : model.max_length]
        if x.name == "attention_mask" and (np.diff((arrays[x.name] != 0).astype(int), axis=1) > 0).any():
            raise BadInput(
                f"{path.name}: attention_mask has a 0 before a 1 (left padding); every format takes right padding: "
                "move the tokens of each row to its start"
            )
    counts = {name: len(a) for name, a in arrays.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise BadInput(f"{path.name}: every input needs the same number of rows, at least one, got {counts}")
    picked = thin(list(range(min(counts.values()))), most)
    return Rows(tuple({name: a[i] for name, a in arrays.items()} for i in picked), _named(path))


def _synthetic(model: Model) -> Rows:
    """Seeded noise in the shape of the inputs; lengths spread over what the model takes."""
    random = np.random.default_rng(0)
    lengths = np.linspace(min(4, model.max_length), model.max_length, SYNTHETIC_ROWS).astype(int)
    vocabulary = next((m.num_embeddings for _, m in model.module.named_modules() if type(m).__name__ == "Embedding"), 2)

    def one(x: wire.Tensor, length: int) -> np.ndarray:
        shape = [length if n < 0 else n for n in x.shape[1:]]
        if not x.dtype.startswith("int"):
            return random.standard_normal(shape).astype(x.dtype)
        if x.name == "input_ids":
            return random.integers(min(3, vocabulary - 1), vocabulary, shape).astype(x.dtype)
        return (np.ones if x.name == "attention_mask" else np.zeros)(shape, x.dtype)

    return Rows(tuple({x.name: one(x, int(n)) for x in model.inputs} for n in lengths), "synthetic noise, seed 0")


def _named(path: Path) -> str:
    return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def with_task(model: Model, rows: Rows) -> Model:
    """The model, judged as the data allows."""
    return replace(model, task=rows.task) if rows.task is not None else model
