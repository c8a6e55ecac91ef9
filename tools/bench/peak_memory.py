"""
The most memory that a process holds which opens one program and answers a few rows: nothing else is in it.

`measured` starts this file as a process of its own; its answer is one number, megabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])

import numpy as np  # noqa: E402

from edgeformer_agent import cases, runners, system, wire  # noqa: E402


def measured(program: Any, rows: Sequence[cases.Row]) -> float:
    """Of a `Program`, on one thread. Raises RuntimeError with the process' own words."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in program.files.items():
            (folder / file).write_bytes(content)
        blank = tuple(np.zeros(1, np.float32) for _ in rows)
        (folder / "rows.npz").write_bytes(cases.dump(cases.Cases(tuple(rows), {"none": blank}, None)))
        said = {"format": program.format, "lengths": program.lengths, "path": str(folder / program.entry)}
        said |= {"inputs": program.inputs, "outputs": program.outputs, "rows": str(folder / "rows.npz")}
        command = [sys.executable, __file__]
        done = subprocess.run(command, input=json.dumps(said), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name}: its process failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def main() -> None:
    said = json.load(sys.stdin)
    tensors = {side: tuple(wire.Tensor(x[0], x[1], tuple(x[2]), *x[3:]) for x in said[side]) for side in SIDES}
    entry: Any = SimpleNamespace(**tensors, lengths=tuple(said["lengths"]))
    rows = cases.load(said["rows"]).rows
    run = runners.load(said["format"]).load(said["path"], entry, 1)
    for row in rows:
        run(row)
    print(system.peak_rss_mb())


SIDES = ("inputs", "outputs")

if __name__ == "__main__":
    main()
