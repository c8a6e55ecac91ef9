"""
One module per artifact format. This folder is the registry: `onnx.py` is the format "onnx".

A format module offers one constant and one function:

    PRECISIONS = ("int8", "fp32")  # what it writes, of `plan.PRECISIONS`; the first by default
    def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]

and, where its sparse attention keeps blocks by another rule than a threshold, `RULE` (of `attention.reference`).
It traces the model once, writes a program for each precision with its own runtime's quantizer, and
counts the work on what it wrote. It imports its tool chain at its own top, so a missing one costs only its own users.
The module in `devices/agent/runners` with the same stem opens what it writes.
"""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..errors import MissingExtra, UnknownFormat

PLANNED = ()  # profiles may name such formats; this version does not build them


def names() -> list[str]:
    """The formats this version builds."""
    return sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))


def load(name: str) -> ModuleType:
    """The module of one format. Raises UnknownFormat or MissingExtra."""
    if name not in names():
        raise UnknownFormat(name, names())
    # ONNX Runtime 1.29 and later report every session to their maker, unless told before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise MissingExtra(name, error.name) from error
