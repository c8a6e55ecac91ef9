"""Where interrupted training goes on: tensors, the state of their optimizer and of the random numbers, in one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BadInput

Tensor = torch.Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Without a path nothing is saved or found. `made_of`: a digest of everything that the training depends on."""

    path: Path | None
    made_of: str

    def save(
        self, step: int, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer, random: torch.Generator
    ) -> None:
        """Whole or not at all."""
        if self.path is None:
            return
        found = {"random": random.get_state()}
        for i, x in enumerate(tensors):
            state = optimizer.state.get(x, {})
            found |= {f"{i}.value": x.detach()} | {f"{i}.{name}": value for name, value in state.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            content = {name: x.contiguous() for name, x in found.items()}
            save_file(content, work, {"made_of": self.made_of, "step": str(step)})
            work.replace(self.path)
        finally:
            work.unlink(missing_ok=True)

    def resume(self, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer, random: torch.Generator) -> int:
        """Puts back what was saved; returns the steps that are already done. Raises BadInput for a file of another."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                made = file.metadata() or {}
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{self.path} is no checkpoint ({error}); delete it or name another file") from error
        if made.get("made_of") != self.made_of:
            raise BadInput(f"{self.path} was made with other rows or settings; delete it or name another file")
        for i, x in enumerate(tensors):
            mine = {name.split(".")[1]: value for name, value in saved.items() if name.startswith(f"{i}.")}
            x.data.copy_(mine.pop("value"))
            if mine:
                optimizer.state[x] = mine
        random.set_state(saved["random"])
        return int(made["step"])


def digest(about: str, tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256(about.encode())
    for x in tensors:
        found.update(repr((x.dtype, tuple(x.shape))).encode())
        found.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
