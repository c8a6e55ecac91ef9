"""What a format produces: files, what goes in and out, what runs it, and what one inference costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeformer_agent import wire


@dataclass(frozen=True)
class Program:
    """An exported model, not yet on disk."""

    format: str
    precision: str
    files: Mapping[str, bytes]  # name -> content; the first is the one the runner opens
    inputs: tuple[wire.Tensor, ...]
    outputs: tuple[wire.Tensor, ...]
    lengths: tuple[int, ...]  # static sequence lengths; () where any length runs
    runtime: wire.Runtime
    needs: wire.Needs
    work: tuple[wire.Work, ...]  # at several lengths, ascending
    sparse: bool = False  # some layers are the DSA operator, which `native.binding` computes faster
    # Where the format itself decides layer by layer: length -> how many layers are sparse, and why others are not.
    sparse_layers: Mapping[str, Any] = field(default_factory=dict)
    # Layer -> how many times narrower a range its int8 inputs have without the outliers that are kept out of them.
    narrower: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.format}-{self.precision}"

    @property
    def entry(self) -> str:
        return next(iter(self.files))

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.files.values()))
