"""build(): what it refuses, what it records, that it repeats itself to the byte, and that a kill leaves no half."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import families
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import edgeformer as ef  # noqa: E402
from edgeformer import device as devices, formats, model as models  # noqa: E402
from edgeformer.errors import BadInput, FormatNotYet, GateFailed, UnknownFormat, UnknownTarget  # noqa: E402
from edgeformer.plan import exports  # noqa: E402


class Scorer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The smallest thing with a weight and a sequence of fixed length."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(16, 32)
        self.outer = torch.nn.Linear(32, 8)
        with torch.no_grad():  # one huge weight a column ruins an int8 scale of the whole input
            self.inner.weight[:, 0] *= spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.nn.functional.gelu(self.inner(x)))


def build(out: Path, module: torch.nn.Module | None = None, **options: object) -> ef.Bundle:
    arguments = {"formats": ["onnx"], "name": "scorer", "example": (torch.zeros(1, 16),), "out": out} | options
    return ef.build(module or Scorer(), "raspberry-pi-4", **arguments)  # type: ignore[arg-type]


def test_the_manifest_says_what_was_built(tmp_path: Path, config_home: Path) -> None:
    bundle = build(tmp_path, precision=("fp32", "int8"))
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.name, manifest.target, manifest.gate.loosened) == ("scorer", "raspberry-pi-4", False)
    assert [entry.name for entry in manifest.programs] == ["onnx-fp32", "onnx-int8"]
    fp32, int8 = manifest.programs
    assert fp32.checked.max_abs < 1e-5 < int8.checked.max_abs
    assert fp32.work[0].flops == 2 * (16 * 32 + 32 * 8) and fp32.work[0].int8_ops == 0
    assert int8.work[0].flops == 0 and int8.work[0].int8_ops == fp32.work[0].flops
    assert fp32.predicted.kind == "modelled" and fp32.predicted.device == "raspberry-pi-4"
    assert fp32.predicted.metrics.latency_ms is not None and fp32.predicted.low < 1 < fp32.predicted.high
    assert [step.name for step in manifest.history] == ["load", "attention", "export.onnx", "export.onnx"]
    assert fp32.size_bytes == manifest.files[fp32.path].size
    assert str(tmp_path) not in (bundle.path / "manifest.json").read_text()


def test_several_targets_share_what_is_exported_and_checked(tmp_path: Path, config_home: Path) -> None:
    steps: list[str] = []
    bundles = ef.build(
        Scorer(), ["raspberry-pi-4", "host"], formats=["onnx"], name="scorer", example=(torch.zeros(1, 16),),
        out=tmp_path, progress=lambda what, done, total: steps.append(f"{what} {done}"),
    )  # fmt: skip
    assert [bundle.manifest.target for bundle in bundles] == ["raspberry-pi-4", "host"]
    for bundle in bundles:
        bundle.verify()
    pi, host = (bundle.manifest.programs[0] for bundle in bundles)
    assert steps.count("export onnx 0") == 1 and steps.count("check onnx-int8 1") == 1
    assert pi._replace(predicted=host.predicted) == host and pi.predicted.device != host.predicted.device
    assert bundles[0].manifest.files[pi.path] == bundles[1].manifest.files[host.path]


def test_of_several_targets_one_that_fails_leaves_none(tmp_path: Path, config_home: Path) -> None:
    with pytest.raises(BadInput, match=r"jetson-nano runs none of litert"):
        ef.build(Scorer(), ["raspberry-pi-4", "jetson-nano"], formats=["litert"], out=tmp_path)
    with pytest.raises(BadInput, match="each once"):
        ef.build(Scorer(), ["host", "host"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, config_home: Path) -> None:
    first, second = (build(tmp_path / name) for name in ("a", "b"))
    assert first.archive.read_bytes() == second.archive.read_bytes()


def test_the_version_rises_with_a_change_and_only_then(tmp_path: Path, config_home: Path) -> None:
    first = build(tmp_path)
    assert build(tmp_path, overwrite=True).digest == first.digest
    changed = build(tmp_path, Scorer(2.0), overwrite=True)
    assert changed.manifest.version == first.manifest.version + 1


def test_a_gate_refuses_and_says_both_numbers(tmp_path: Path, config_home: Path) -> None:
    with pytest.raises(GateFailed, match=r"onnx-int8: mean cosine with fp32 0\.\d{4,} .* below the gate 1\.0000"):
        build(tmp_path, gate=1.0)
    assert not list(tmp_path.glob("scorer*"))
    loose = build(tmp_path, gate=0.5)
    assert loose.manifest.gate.loosened and loose.manifest.gate.cosine == 0.5


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"formats": ["onxx"]}, UnknownFormat, "onnx"),
        ({"formats": ["coreml"]}, BadInput, "does not run coreml"),
        ({"formats": []}, BadInput, "at least one format"),
        ({"precision": "fp16"}, BadInput, "int8, int4-embeddings, int4, int8-static, fp32"),
        ({"expires": "2001-01-01"}, BadInput, "in the past"),
        ({"expires": "next year"}, BadInput, "YYYY-MM-DD"),
        ({"gate": 1.5}, BadInput, "from 0 to 1"),
        ({"data": "nowhere.txt"}, BadInput, "nowhere.txt"),
        ({"example": None}, BadInput, "example"),
    ],
)
def test_wrong_use_is_told_and_leaves_nothing(
    options: dict[str, object], error: type[Exception], says: str, tmp_path: Path, config_home: Path
) -> None:
    with pytest.raises(error, match=says):
        build(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_unknown_targets() -> None:
    with pytest.raises(UnknownTarget, match="'raspberry-pi-4'"):
        ef.build("x", "raspberry-pi4")


def test_a_format_of_a_later_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile may know a format before this version builds it."""
    monkeypatch.setattr(formats, "names", lambda: ["onnx"])
    monkeypatch.setattr(formats, "PLANNED", ("coreml",))
    with pytest.raises(FormatNotYet, match="coreml"):
        ef.build("x", "iphone-13")


def test_a_system_too_old_for_the_runtime_is_refused(
    tmp_path: Path, config_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(devices.load("raspberry-pi-4"), glibc="2.27")
    monkeypatch.setattr(devices, "load", lambda name: old)
    with pytest.raises(BadInput, match=r"glibc 2\.28.*2\.27"):
        ef.build(Scorer(), "raspberry-pi-4", formats=["onnx"], example=(torch.zeros(1, 16),), out=tmp_path)


def test_an_existing_bundle_is_kept(tmp_path: Path, config_home: Path) -> None:
    digest = build(tmp_path).digest
    with pytest.raises(ef.EdgeformerError, match="--overwrite"):
        build(tmp_path, Scorer(2.0))
    assert ef.open_bundle(tmp_path / "scorer-raspberry-pi-4").digest == digest


class Victims:
    """Builds in processes of their own, forked from one that has built before: nothing is imported again."""

    CODE = (
        "import os, pathlib, sys; sys.path.insert(0, sys.argv[2]); import test_build\n"
        "def build():\n"
        "    test_build.build(pathlib.Path(sys.argv[1]), test_build.Scorer(2.0), overwrite=True, version=30000000)\n"
        "build()\n"
        "for _ in sys.stdin:\n"
        "    if not (child := os.fork()): build(); os._exit(0)\n"
        "    print(child, flush=True)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )

    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-c", self.CODE, str(out), str(Path(__file__).parent)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def run(self, kill_after_s: float | None = None) -> float:
        """Seconds that a build took; killed then, if a moment is given."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        child, started = int(self.process.stdout.readline()), time.monotonic()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(child, signal.SIGKILL)
        assert int(self.process.stdout.readline()) in ((0,) if kill_after_s is None else (0, -signal.SIGKILL))
        return time.monotonic() - started


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_bundle_or_the_new_one(
    tmp_path: Path, config_home: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL at random moments of a build that replaces a bundle, with more of them near its end."""
    old = build(tmp_path).digest
    victims = Victims(tmp_path)
    request.addfinalizer(victims.process.kill)
    whole = victims.run()
    new = ef.open_bundle(tmp_path / "scorer-raspberry-pi-4").digest
    build(tmp_path, overwrite=True, version=30000001)
    seen = set()
    draw = random.Random(0)
    for _ in range(5):
        victims.run(whole * draw.uniform(0.4, 1.0))
        bundle = ef.open_bundle(tmp_path / "scorer-raspberry-pi-4")
        bundle.verify()
        ef.open_bundle(bundle.archive).verify()
        seen.add(bundle.digest)
    assert old != new and len(seen) <= 2


def test_an_export_leaves_the_collector_as_it_was() -> None:
    (export,) = exports(["onnx"])
    model = models.load(Scorer(), example=(torch.zeros(1, 16),), name="scorer")
    before = gc.get_threshold()
    assert [program.precision for program in export.programs(model)] == ["int8"]
    assert gc.isenabled() and not gc.get_freeze_count() and gc.get_threshold() == before
    next(programs := export.programs(model))
    programs.close()  # type: ignore[attr-defined]
    assert gc.isenabled() and not gc.get_freeze_count() and gc.get_threshold() == before


def test_progress_ends_every_step(tmp_path: Path, config_home: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    build(tmp_path, progress=lambda what, done, total: seen.update({what: (done, total)}))
    assert seen["package and sign"] == (1, 1) and seen["check onnx-int8"][0] == 32
    assert all(done == total for done, total in seen.values()), json.dumps(seen)


def test_short_rows_stay_dense_and_the_manifest_says_why(tmp_path: Path, config_home: Path) -> None:
    bundle = build(tmp_path)
    (step,) = [s for s in bundle.manifest.history if s.name == "attention"]
    assert (
        step.facts["chosen"] == "dense" and step.facts["modelled_gain"] == 1.0 and "worth it from" in step.facts["why"]
    )
    with pytest.raises(BadInput, match="dense, dsa"):
        build(tmp_path / "x", attention="sparse")


def test_sparse_attention_is_refused_where_it_would_be_wrong(tmp_path: Path, config_home: Path) -> None:
    made = {"formats": ["onnx"], "lengths": (64,), "out": tmp_path, "name": "narrow"}
    with pytest.raises(BadInput, match=r"has heads of 8; sparse attention needs a multiple of 16"):
        ef.build(families.tiny("bert"), "host", attention="dsa", **made)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sparse_attention_is_built_shipped_and_counted(tmp_path: Path, config_home: Path) -> None:
    """From a model to the agent's report: two layers, so two native calls an inference, by the bundle's own library."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    model = hf.BertModel(config).eval()
    made = {"formats": ["onnx", "litert"], "lengths": (512,), "gate": 0.5, "out": tmp_path, "name": "long"}
    bundle = ef.build(model, "host", attention="dsa", budget=0.5, **made)  # type: ignore[arg-type]
    steps = {s.name: s.facts for s in bundle.manifest.history}
    assert steps["attention"]["chosen"] == "dsa" and abs(steps["sparsify.dsa"]["kept"] - 0.5) < 0.05
    report = ef.run(bundle, measure=ef.Measure(profile="quick", rows=4))
    for entry, result in zip(bundle.manifest.programs, report.results, strict=True):
        assert entry.libraries and result.native is not None, result.flags
        assert result.native.calls_per_run == 2 == len(result.native.kept) and "native_fallback" not in result.flags
