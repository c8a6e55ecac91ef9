"""DSA in ExecuTorch's Python runtime. Its own runner is in test_runner_executorch.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dsa_cases
import numpy as np
import pytest

from edgeformer import native

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")
pytest.importorskip("ziglang")
import sparse_models  # noqa: E402

pytestmark = pytest.mark.slow
LENGTH = 70

# Runs in a process of its own, because a registered kernel stays. Prints calls, kernels and outputs.
SCRIPT = """
import ctypes, json, sys, numpy, torch
from executorch.runtime import Runtime
runtime, c = Runtime.get(), None
if len(sys.argv) > 2:
    c = ctypes.CDLL(sys.argv[2])
    c.edgeformer_dsa_kernels.restype = ctypes.c_char_p
    assert "edgeformer::dsa.out" in runtime.operator_registry.operator_names
said = {}
for name in sys.argv[1].split(","):
    inputs = [torch.from_numpy(x) for x in numpy.load(name + ".npz").values()]
    method = runtime.load_program(name + ".pte").load_method("forward")
    if c:
        c.edgeformer_dsa_reset()
    numpy.save(name + ".out", method.execute(inputs)[0].numpy())
    said[name] = c.edgeformer_dsa_calls() if c else 0
print(json.dumps([said, c.edgeformer_dsa_kernels().decode() if c else ""]))
"""


class One(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A single call, with the lengths it was given."""

    def __init__(self, case: dsa_cases.Case) -> None:
        super().__init__()
        self.attributes, self.given = case.attributes, [x is not None for x in case.operands]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        return torch.ops.edgeformer.dsa(*(next(rest) if there else None for there in self.given), **self.attributes)


def lowered(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    graph = torch.export.export(module.eval(), inputs)
    return bytes(to_edge_transform_and_lower(graph, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, executorch_bundle: Any) -> Path:
    """NAME.pte, NAME.npz (inputs) and NAME.want.npy for some single calls and for an encoder of one layer."""
    folder = tmp_path_factory.mktemp("pte")
    chosen = [
        c
        for c in dsa_cases.PLAIN + dsa_cases.RULES
        if c.name in ("tail", "padded", "biased", "per-kv", "top-p", "most")
    ]
    for case in chosen:
        operands = [x for x in case.operands if x is not None]
        (folder / f"{case.name}.pte").write_bytes(lowered(One(case), tuple(map(torch.from_numpy, operands))))
        np.savez(folder / case.name, *operands)
        np.save(folder / f"{case.name}.want", case.expected())
    bundle, model, _ = executorch_bundle
    rows = list(sparse_models.rows(1, LENGTH).values())
    shutil.copy(
        next(bundle.path / e.path for e in bundle.manifest.programs if e.precision == "fp32"), folder / "encoder.pte"
    )
    np.savez(folder / "encoder", *rows)
    np.save(folder / "encoder.want", model.module(*map(torch.from_numpy, rows)).numpy())
    return folder


def run(folder: Path, names: list[str], *library: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, ",".join(names), *library]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_kernel(files: Path) -> None:
    names = sorted(path.stem for path in files.glob("*.pte"))
    done = run(files, names, str(native.binding("executorch")))
    assert done.returncode == 0, done.stderr[-800:]
    calls, kernels = json.loads(done.stdout.splitlines()[-1])
    assert calls == dict.fromkeys(names, 1)
    assert kernels and len(names) == 7
    for name in names:
        out, want = np.load(files / f"{name}.out.npy"), np.load(files / f"{name}.want.npy")
        np.testing.assert_allclose(out, want, rtol=0, atol=5e-6, err_msg=name)


def test_without_the_kernel_the_method_does_not_load(files: Path) -> None:
    done = run(files, ["tail"])
    assert done.returncode and "edgeformer::dsa.out" in done.stderr


def test_another_platform_needs_its_wheel() -> None:
    with pytest.raises(native.BuildError, match="needs that platform's executorch wheel"):
        native.binding("executorch", "macos-aarch64")
