"""The checks before packaging: every program is opened with the device's own runner and held against fp32 PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer_agent import runners, score, wire
from edgeformer_agent.cases import Row

from .errors import BadInput, ExportError, GateFailed
from .model import Model
from .program import Program

LIMITS = {"likelihood": "agreement"}  # measure -> field of the gate, where it is not its name
DEFAULT_GATE = wire.Gate(metric_ratio=0.99, cosine=0.985, agreement=0.98, correlation=0.985, loosened=False)


def gate(limit: wire.Gate | float | None) -> wire.Gate:
    """
    None is the default. A number sets the share of fp32 that must be kept: of the metric, and as the least cosine,
    agreement (of a decoder: likelihood) or correlation where there are no labels. Raises BadInput outside [0, 1].
    """
    if limit is None:
        return DEFAULT_GATE
    if not isinstance(limit, wire.Gate):
        limit = wire.Gate(limit, limit, limit, limit, False)
    if not all(0 <= value <= 1 for value in limit[:4]):
        raise BadInput(f"gate {limit[:4]}: each limit is a share of fp32, from 0 to 1")
    return limit._replace(loosened=any(a < b for a, b in zip(limit[:4], DEFAULT_GATE[:4], strict=True)))


def reference(model: Model, rows: Sequence[Row], progress: Callable[[int], None]) -> tuple[np.ndarray, ...]:
    """The fp32 module's output for every row, alone in its batch and at its natural length."""
    outputs = []
    with torch.inference_mode():
        for done, row in enumerate(rows, 1):
            tensors = [torch.from_numpy(row[x.name][None]) for x in model.inputs]
            outputs.append(model.module(*tensors)[0].float().numpy())
            progress(done)
    return tuple(outputs)


@contextmanager
def opened(program: Program) -> Iterator[str]:
    """The program as files, and the path of the one that a runner opens."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in program.files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield str(Path(folder) / program.entry)


def run(
    program: Program, entry: wire.Entry, rows: Sequence[Row], progress: Callable[[int], None]
) -> tuple[np.ndarray, ...]:
    """
    The program's output for every row, by the runner that devices use. Raises ExportError where it fails, GateFailed
    where a value is not finite: no mean over the other rows may hide it.
    """
    with opened(program) as path:
        outputs = []
        try:
            step = runners.load(program.format).load(path, entry, 1)
            for done, row in enumerate(rows, 1):
                outputs.append(np.asarray(step(row)))
                progress(done)
        except Exception as error:
            raise ExportError(
                f"{program.name} does not run in its own runtime: {type(error).__name__}: {error}"
            ) from error
    if bad := [i for i, output in enumerate(outputs) if not np.isfinite(output).all()]:
        raise GateFailed(
            f"{program.name}: {len(bad)} of {len(outputs)} rows give NaN or infinity, the first is row {bad[0]}; "
            "nothing was packaged. Use another precision"
        )
    return tuple(outputs)


def hold(name: str, found: wire.Fidelity, limit: wire.Gate) -> None:
    """Raises GateFailed with the program, both numbers and by how much it fails."""
    if found.value is not None and found.reference is not None:
        # A share of what fp32 has may be lost; of a negative correlation too, where a plain product would ask for more.
        size = abs(found.reference)
        what, got, least = f"{found.metric}", found.value, found.reference - (1 - limit.metric_ratio) * size
        of = f"{limit.metric_ratio:.2%} of fp32's {found.reference:.4f}"
        share = 1 - (found.reference - found.value) / size if size else 0.0
    else:
        field = LIMITS.get(found.measure, found.measure)
        what, got, least = f"mean {found.measure} with fp32", found.mean, float(getattr(limit, field))
        of, share = f"the worst row has {found.worst:.4f}", found.mean
    if not got >= least:  # NaN fails too
        digits = 8 if 0 <= least - got < 1e-4 else 4  # "1.0000 is below 1.0000" helps nobody
        loosen = f", or loosen the gate on purpose: gate={_below(share)}" if share > 0 else ""
        raise GateFailed(
            f"{name}: {what} {got:.{digits}f} on {found.rows} rows is below the gate {least:.{digits}f} ({of}) "
            f"by {least - got:.{digits}f}; nothing was packaged. Use another precision{loosen}"
        )


def fidelity(
    model: Model, outputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray], labels: Sequence[Any] | None
) -> wire.Fidelity:
    return score.fidelity(model.task, outputs, wanted, labels)


def _below(value: float) -> float:
    """Rounded down to three places: a gate that would just let it through."""
    return int(value * 1000) / 1000
