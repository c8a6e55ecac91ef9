"""
Programs on disk for other tools to measure: a folder with program files, `tokenizer/`, and `facts.json`.

A bundle has the same parts. A single .onnx or .tflite file is read too; the tokenizer is then the one beside it, or
the model's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeformer.errors import BadInput
from edgeformer.model import Model
from edgeformer.program import Program
from edgeformer_agent import wire

FACTS, TOKENIZER = "facts.json", "tokenizer"
FORMATS = {".onnx": ("onnx", "onnxruntime"), ".tflite": ("litert", "ai-edge-litert")}
SIGNATURE = "length_"


@dataclass(frozen=True)
class Shelved:
    """`model` reads texts for these programs: it has their tokenizer. Its module is that of the model it is like."""

    programs: tuple[Program, ...]
    model: Model
    facts: dict[str, Any]


def save(folder: Path, model: Model, programs: Iterable[Program], facts: dict[str, Any]) -> None:
    """The facts come last: a folder without them is not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    for program in programs:
        path = folder / f"{program.name}{Path(program.entry).suffix}"
        path.write_bytes(program.files[program.entry])
    for name, content in (model.files or {}).items():
        if name.startswith(f"{TOKENIZER}/"):
            (folder / TOKENIZER).mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def load(path: Path, like: Model) -> Shelved:
    """`like`: a model of the same inputs and task. Raises BadInput."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in FORMATS)
    if not files or (path.is_file() and path.suffix not in FORMATS):
        raise BadInput(f"{path} is no program (.onnx, .tflite) nor a folder or bundle with one")
    folder = path.parent if path.is_file() else path
    model = _reading(folder / TOKENIZER, like)
    facts = folder / FACTS
    programs = tuple(_program(file, model) for file in files)
    return Shelved(programs, model, json.loads(facts.read_text("utf-8")) if facts.is_file() else {})


def tokenizer_mb(model: Model) -> float:
    return sum(len(x) for name, x in (model.files or {}).items() if name.startswith(f"{TOKENIZER}/")) / 1e6


def sources() -> str:
    """Digest of the code and recipes that make programs and figures: what is kept is of this very version."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("edgeformer", "devices/agent"):
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in (".py", ".toml")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _reading(folder: Path, like: Model) -> Model:
    if not folder.is_dir():
        return like
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tuple(x._replace(pad=tokenizer.pad_token_id) if x.name == "input_ids" else x for x in like.inputs)
    files = {f"{TOKENIZER}/{p.name}": p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
    return replace(like, tokenizer=tokenizer, inputs=inputs, files=files)


def _program(path: Path, model: Model) -> Program:
    format, package = FORMATS[path.suffix]
    return Program(
        format=format,
        precision="fp32" if "fp32" in str(path.relative_to(path.parents[1])) else "int8",
        files={path.name: path.read_bytes()},
        inputs=model.inputs,
        outputs=(model.output,),
        lengths=_lengths(path) if format == "litert" else (),
        runtime=wire.Runtime(package, "0", "99"),
        needs=wire.Needs(),
        work=(),
    )


def _lengths(path: Path) -> tuple[int, ...]:
    from ai_edge_litert.interpreter import Interpreter

    names: Sequence[str] = list(Interpreter(model_path=str(path)).get_signature_list())
    if any(not name.startswith(SIGNATURE) for name in names):
        raise BadInput(f"{path.name} has signatures {', '.join(names)}; edgeformer writes {SIGNATURE}N")
    return tuple(sorted(int(name.removeprefix(SIGNATURE)) for name in names))
