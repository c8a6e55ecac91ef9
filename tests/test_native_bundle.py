"""A bundle with sparse attention carries its library; the agent tries it, uses it and tells, or does without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ziglang")
import sparse_models

from edgeformer import build, bundle, native, run, signing
from edgeformer.deploy import Measure
from edgeformer_agent import native as agent, wire

pytestmark = pytest.mark.slow
QUICK = Measure(profile="quick", min_runs=3, min_seconds=0, rows=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bundle.Bundle]:
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        model = sparse_models.model(lengths=(32, 70))
        yield build(model, "host", out=folder, precision=("fp32", "int8"))


def test_the_library_travels(made: bundle.Bundle) -> None:
    machine = agent.machine()
    assert machine == native.host()
    for entry in made.manifest.programs:
        path = f"native/{machine}/libedgeformer_{entry.format}.so"
        assert entry.libraries == {machine: path} and path in made.manifest.files
        assert (made.path / path).read_bytes() == native.binding(entry.format).read_bytes()


def test_the_agent_uses_it(made: bundle.Bundle) -> None:
    report = run(made, measure=QUICK)
    assert {r.program for r in report.results} == {"onnx-fp32", "onnx-int8", "litert-fp32", "litert-int8"}
    for result in report.results:
        assert result.golden.passed and agent.FALLBACK not in result.flags
        assert result.native is not None
        assert result.native.calls_per_run == sparse_models.LAYERS == len(result.native.kept)
        assert all(0 < share <= 1 for share in result.native.kept) and result.native.kernel_set
    assert wire.load_report(wire.dump(report)) == report


def broken(made: bundle.Bundle, folder: Path, library: bytes) -> bundle.Bundle:
    """The same bundle, signed, around another library."""
    contents: dict[str, Any] = {n: made.path / n for n in made.manifest.files if n != bundle.AGENT}
    contents |= {name: library for name in contents if name.startswith("native/")}
    return bundle.write(folder / "broken", made.manifest, contents, signing.load(signing.DEFAULT))


@pytest.mark.parametrize("kind", ["no library", "other program's", "crashes"])
def test_without_trust_the_program_runs_alone(made: bundle.Bundle, tmp_path: Path, kind: str) -> None:
    libraries = {
        "no library": b"not an ELF file",
        "other program's": native.library().read_bytes(),
        "crashes": crashing(tmp_path),
    }
    report = run(broken(made, tmp_path, libraries[kind]), measure=QUICK)
    assert len(report.results) == 4
    for result in report.results:
        assert result.golden.passed and result.latency and result.native is None
        assert agent.FALLBACK in result.flags


def crashing(folder: Path) -> bytes:
    """What a library for a newer CPU looks like: an illegal instruction while it is loaded."""
    source, made = folder / "crash.c", folder / "crash.so"
    source.write_text("__attribute__((constructor)) static void crash(void) { __builtin_trap(); }\n")
    native.zig("-target", native.TARGETS[native.host()].triple, "-shared", "-o", str(made), str(source))
    return made.read_bytes()


def test_another_machine_has_no_library(made: bundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = made.manifest.programs[0]
    assert agent.find(str(made.path), entry) is not None
    monkeypatch.setattr(agent.platform, "machine", lambda: "riscv64")
    assert agent.find(str(made.path), entry) is None


def test_a_dense_model_carries_none(tmp_path: Path, config_home: Path) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 8))
    dense = build(module, "host", example=(torch.ones(1, 8),), formats=["onnx"], out=tmp_path, precision="fp32")
    assert all(not entry.libraries for entry in dense.manifest.programs) and not (dense.path / "native").exists()
    shutil.rmtree(dense.path)
