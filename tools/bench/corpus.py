"""Text for `quality.py`: docstrings, package descriptions and novels to train on, other kinds to test on."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "transformers")
MIN_CHARACTERS = 1500  # of a file's docstrings


def docstrings(seed: int = 0) -> Iterator[str]:
    """The docstrings of one Python file after the other, in a seeded order."""
    files = [path for name in PACKAGES for path in _files(name)]
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        text = " ".join(" ".join(found.split()) for n in nodes if (found := ast.get_docstring(n)))
        if len(text) >= MIN_CHARACTERS:
            yield text


def _files(package: str) -> list[Path]:
    found = find_spec(package)
    return sorted(Path(found.origin).parent.rglob("*.py")) if found and found.origin else []


def training(tokenizer: Any, length: int, count: int) -> list[Any]:
    """Rows of exactly `length` tokens, each from as many files as it takes."""
    return _filled(docstrings(), tokenizer, length, count)


def novels(data: Path, tokenizer: Any, length: int, count: int) -> list[Any]:
    """The same from passages of novels, where they are there."""
    files = sorted((data / "lambada").glob("*.jsonl"))
    passages = (json.loads(line)["text"] for path in files for line in path.read_text("utf-8").splitlines())
    return _filled(passages, tokenizer, length, count)


def descriptions(seed: int = 0) -> Iterator[str]:
    """What installed packages say about themselves, mostly Markdown, in a seeded order."""
    names = sorted({str(found.metadata["Name"]) for found in metadata.distributions() if found.metadata["Name"]})
    random.Random(seed).shuffle(names)
    for name in names:
        about = metadata.metadata(name)
        text = about.get_payload() or about["Description"] or ""
        if isinstance(text, str) and len(text) >= MIN_CHARACTERS:
            yield text


def varied(data: Path, tokenizer: Any, length: int, count: int) -> list[Any]:
    """
    Docstrings, novels and descriptions in turn: thresholds from one kind of text keep another share of another kind.
    """
    others = [novels(data, tokenizer, length, count // 3), _filled(descriptions(), tokenizer, length, count // 3)]
    ours = training(tokenizer, length, count - sum(map(len, others)))
    return [x for kinds in zip_longest(ours, *others) for x in kinds if x is not None]


def _filled(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> list[Any]:
    rows: list[Any] = []
    text = ""
    for more in texts:
        text = f"{text} {more}"
        if len(text) < 4 * length:
            continue
        encoded = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        if encoded["input_ids"].shape[1] == length:
            rows.append(encoded)
            text = ""
        if len(rows) == count:
            break
    return rows


def squad(folder: Path) -> list[str]:
    """Encyclopedia articles."""
    articles = [a for path in sorted(folder.glob("*.json")) for a in json.loads(path.read_text("utf-8"))["data"]]
    return [" ".join(p["context"] for p in article["paragraphs"]) for article in articles]


def longtech(folder: Path, split: str) -> list[dict[str, Any]]:
    """Design documents with the group that owns them: {"text", "y"}."""
    files = sorted(folder.glob(f"{split}*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]


def held_out(data: Path, tokenizer: Any, length: int, count: int) -> tuple[list[Any], list[str]]:
    """Rows of exactly `length` tokens, half from each source that is there; and what is missing."""
    sources = {"squad_v1.1_dev": lambda f: squad(f), "longtech_kep": lambda f: [x["text"] for x in longtech(f, "test")]}
    present = {name: read(data / name) for name, read in sources.items() if (data / name).is_dir()}
    missing = [f"{data / name} is not there" for name in sources if name not in present]
    rows: list[Any] = []
    for texts in present.values():
        encoded = (tokenizer(t, truncation=True, max_length=length, return_tensors="pt") for t in texts)
        long = (x for x in encoded if x["input_ids"].shape[1] == length)
        rows += [row for row, _ in zip(long, range(count // len(present)), strict=False)]
    return rows, missing
