"""What the exporters promise of their files: nothing of this machine, shared weights, counted work, any length."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("litert_torch")

from edgeformer import check, data, formats, model as models  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer_agent import cases, runners, wire  # noqa: E402


def middling() -> models.Model:
    """Big enough that weights, and not the graph, decide the size of a file."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=8000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=512,
    )  # fmt: skip
    return models.load(hf.BertModel(config).eval(), name="middling")


def entry(program: Program, model: models.Model) -> wire.Entry:
    """As build() writes it, as far as a runner looks."""
    nothing = wire.Fidelity("", 0, 0, 0, 0), wire.Prediction("", 1, wire.Metrics(), 1, 1, "")
    return wire.Entry(
        program.name, program.format, program.precision, program.entry, program.size_bytes, program.inputs,
        program.outputs, program.lengths, program.runtime, program.needs, program.work, nothing[1], nothing[0], 0.9,
    )  # fmt: skip


@pytest.mark.slow
def test_five_lengths_cost_little_more_than_one_and_the_shortest_that_fits_runs(tmp_path: Path) -> None:
    model = middling()
    (several,) = formats.load("litert").export(model, ["int8"])
    (one,) = formats.load("litert").export(models.load(model.module.module, lengths=(512,)), ["int8"])
    assert several.lengths == (32, 64, 128, 256, 512) and one.lengths == (512,)
    assert several.size_bytes < 1.10 * one.size_bytes, (several.size_bytes, one.size_bytes)
    assert [w.length for w in several.work] == list(several.lengths)

    path = tmp_path / several.entry
    path.write_bytes(several.files[several.entry])
    run = runners.load("litert").load(str(path), entry(several, model), 1)
    rows = data.load(model, None, None).rows
    picked = [next(r for r in rows if len(r["input_ids"]) > 256), {k: v[:31] for k, v in rows[-1].items()}]
    picked += [{k: v[:n] for k, v in rows[-1].items()} for n in (32, 33, 1)]
    for row, wanted in zip(picked, check.reference(model, picked, lambda _: None), strict=True):
        assert float(np.dot(run(row), wanted)) > 0.99, len(row["input_ids"])
    with pytest.raises(ValueError, match="513 tokens"):
        run({k: np.ones(513, np.int32) for k in rows[0]})


@functools.cache
def tiny() -> models.Model:
    return models.load(families.tiny("bert"), name="tiny", lengths=(16,))


@functools.cache
def programs(format: str) -> tuple[Program, ...]:
    return tuple(formats.load(format).export(tiny(), ["fp32", "int8"]))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_nothing_of_this_machine_is_in_a_file(format: str) -> None:
    for program in programs(format):
        content = b"".join(program.files.values())
        for trace in (str(Path(models.__file__).parent), str(Path.home()), "site-packages"):
            assert trace.encode() not in content, (program.name, trace)


LEGACY = ("tflite-runtime==2.14.0", "numpy<2")
OPENED = """
import json, sys
import numpy
from agent import cases, wire
from agent.runners import litert
entry = wire._decode(wire.Entry, json.load(sys.stdin), "entry")
try:
    run = litert.load(sys.argv[1], entry)
except ValueError as error:
    sys.exit(str(error))
print(litert.version())
numpy.save(sys.argv[3], [run(row) for row in cases.load(sys.argv[2]).rows])
"""


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but tflite-runtime and the agent, as a path for modules."""
    folder = tmp_path_factory.mktemp("legacy")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--target", folder, *LEGACY]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"pip finds no {LEGACY[0]} for this Python")
    (folder / "agent").symlink_to(Path(wire.__file__).parent)
    return folder


@pytest.mark.slow
def test_tflite_runtime_opens_fp32_and_refuses_int8(legacy: Path, tmp_path: Path) -> None:
    rows, (fp32, int8) = tuple(data.load(tiny(), None, None).rows[:2]), programs("litert")
    (tmp_path / "rows").write_bytes(cases.dump(cases.Cases(rows, {}, None)))

    def opened(program: Program) -> subprocess.CompletedProcess[bytes]:
        path = tmp_path / program.name
        path.write_bytes(program.files[program.entry])
        words = (path, tmp_path / "rows", tmp_path / "outputs.npy")
        command = [sys.executable, "-S", "-c", OPENED, *words]  # -S: not what is installed here
        told = wire.dump(entry(program, tiny()))
        return subprocess.run(command, input=told, capture_output=True, env={"PYTHONPATH": str(legacy)})

    done = opened(fp32)
    assert done.stdout.decode().strip() == "2.14.0+tflite-runtime", done.stderr.decode()
    wanted = check.reference(tiny(), rows, lambda _: None)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), wanted, atol=1e-5)
    assert b"litert-int8: tflite-runtime 2.14.0 computes int8 wrongly" in opened(int8).stderr
    assert (fp32.needs.glibc, int8.needs.glibc) == ("2.29", "2.34")


@pytest.mark.slow
def test_onnx_is_plain_and_any_length_runs(tmp_path: Path) -> None:
    model = models.load(families.tiny("electra"), name="tiny", lengths=(48,))
    fp32, int8 = formats.load("onnx").export(model, ["fp32", "int8"])
    proto = onnx.load_from_string(fp32.files[fp32.entry])
    assert proto.ir_version <= 9 and {(o.domain, o.version) for o in proto.opset_import} == {("", 20)}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert [i.name for i in proto.graph.input] == [x.name for x in model.inputs]
    assert fp32.work[-1].flops == int8.work[-1].int8_ops + int8.work[-1].flops > 0 == fp32.work[-1].int8_ops
    kinds = {node.op_type for node in onnx.load_from_string(int8.files[int8.entry]).graph.node}
    assert "MatMulInteger" in kinds and re.search("DynamicQuantizeLinear", " ".join(kinds))
    path = tmp_path / fp32.entry
    path.write_bytes(fp32.files[fp32.entry])
    run = runners.load("onnx").load(str(path), entry(fp32, model), 1)
    rows = [{k: v[:n] for k, v in data.load(model, None, None).rows[-1].items()} for n in (1, 2, 17, 48)]
    for row, wanted in zip(rows, check.reference(model, rows, lambda _: None), strict=True):
        np.testing.assert_allclose(run(row), wanted, atol=1e-5)


def test_an_unknown_format_lists_what_exists() -> None:
    with pytest.raises(LookupError, match="'onnx'"):
        formats.load("onxx")


def test_a_module_that_cannot_be_exported_says_so() -> None:
    class Untraceable(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(np.asarray(x.detach()).sum())

    model = models.load(Untraceable(), example=(torch.ones(1, 4),), name="odd")
    for format in ("onnx", "litert"):
        with pytest.raises(Exception, match=f"{format}: odd does not") as caught:
            list(formats.load(format).export(model, ["fp32"]))
        assert type(caught.value).__name__ == "ExportError"
