"""DSA in LiteRT: the delegate, the decomposition in standard operators, and a program that has both."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import dsa_cases
import numpy as np
import pytest

from edgeformer import native

torch = pytest.importorskip("torch")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")
pytest.importorskip("ziglang")
import flatbuffers  # noqa: E402
import sparse_models  # noqa: E402
from ai_edge_litert import schema_py_generated as schema  # noqa: E402
from flatbuffers import flexbuffers  # noqa: E402

from edgeformer.attention import composite  # noqa: E402

LIBRARY = native.binding("litert")


@functools.cache
def library() -> ctypes.CDLL:
    made = ctypes.CDLL(str(LIBRARY))
    made.edgeformer_dsa_kernels.restype = ctypes.c_char_p
    return made


def kept() -> list[tuple[int, int]]:
    pairs = (ctypes.c_int64 * 2048)()
    count = library().edgeformer_dsa_kept(1024, pairs)
    return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]


def custom(case: dsa_cases.Case, **attributes: Any) -> bytes:
    """A file of one CUSTOM node: all that the operator can be asked, also what no decomposition expresses."""
    model, graph, operator, code = schema.ModelT(), schema.SubGraphT(), schema.OperatorT(), schema.OperatorCodeT()
    given = {name: x.shape for name, x in zip(dsa_cases.ORDER, case.operands, strict=True) if x is not None}
    count, graph.tensors = len(given), []
    for name, shape in (*given.items(), ("out", given["q"])):
        tensor = schema.TensorT()
        tensor.shape, tensor.name, tensor.buffer = list(shape), name, 0
        tensor.type = schema.TensorType.INT32 if name.endswith("_len") else schema.TensorType.FLOAT32
        graph.tensors.append(tensor)
    code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = "edgeformer.dsa", 1
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, list(range(count)), [count]
    operator.customOptions = list(flexbuffers.Dumps({"version": 1, **case.attributes, **attributes}))
    graph.operators, graph.inputs, graph.outputs = [operator], list(range(count)), [count]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def opened(data: bytes, delegate: Path | None = None, threads: int = 1) -> Any:
    delegates = [interpreter.load_delegate(str(delegate))] if delegate else None
    return interpreter.Interpreter(model_content=data, num_threads=threads, experimental_delegates=delegates)


def run_custom(case: dsa_cases.Case, threads: int = 1, **attributes: Any) -> Any:
    made = opened(custom(case, **attributes), LIBRARY, threads)
    made.allocate_tensors()
    for detail, x in zip(made.get_input_details(), (x for x in case.operands if x is not None), strict=True):
        made.set_tensor(detail["index"], x)
    made.invoke()
    return made.get_tensor(made.get_output_details()[0]["index"])


@pytest.mark.parametrize("case", dsa_cases.PLAIN + dsa_cases.RULES, ids=lambda case: case.name)
def test_delegate(case: dsa_cases.Case) -> None:
    if 0 in case.operands[6].shape:
        pytest.skip("TFLite has no tensors without elements; the exporter writes one sink of 0 instead")
    case = case.with_lengths()
    library().edgeformer_dsa_reset()
    outputs = [run_custom(case, threads) for threads in (1, 3)]
    np.testing.assert_allclose(outputs[0], case.expected(), rtol=0, atol=5e-6)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert library().edgeformer_dsa_calls() == 2 and kept() == [case.kept()] * 2


def test_delegate_runs_the_best_kernels() -> None:
    features = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if platform.machine() == "x86_64" and "avx2" in features:
        assert library().edgeformer_dsa_kernels().startswith(b"avx")


def test_delegate_int8() -> None:
    case = dsa_cases.case("int8", rows=(200, 200), lengths=([180], [180]), dim=64).with_lengths()
    out, want = run_custom(case, compute=1), case.expected()
    assert 1e-4 < np.linalg.norm(out - want) / np.linalg.norm(want) < 3e-2  # int8 really ran, and well


def test_delegate_says_what_it_cannot() -> None:
    with pytest.raises(RuntimeError, match="edgeformer DSA: dim: 16 to 256"):
        run_custom(dsa_cases.case("dim", dim=24).with_lengths())
    with pytest.raises((RuntimeError, ValueError), match="unresolved custom op"):  # a later version is not ours
        run_custom(dsa_cases.PLAIN[0].with_lengths(), version=2)


@pytest.mark.parametrize("case", dsa_cases.PLAIN, ids=lambda case: case.name)
def test_decomposition(case: dsa_cases.Case) -> None:
    attributes = {k: v for k, v in case.attributes.items() if k not in ("rule", "max_blocks")}
    operands = (None if x is None else torch.from_numpy(x) for x in case.with_lengths().operands)
    np.testing.assert_allclose(composite.dsa(*operands, **attributes), case.expected(), rtol=0, atol=5e-6)


def test_rules_the_decomposition_cannot_express_are_refused() -> None:
    assert composite.inexpressible() is None
    for attributes in ({"rule": 2}, {"max_blocks": 3}, {"min_blocks": 2}):
        assert "rule 0 without clamps" in str(composite.inexpressible(**attributes))


LENGTHS = (32, 70)


@functools.cache
def programs(**config: Any) -> Any:
    """fp32 and int8 of a small encoder with two DSA layers, and its Model."""
    pytest.importorskip("litert_torch")
    from edgeformer.formats import litert as format

    model = sparse_models.model(lengths=LENGTHS, **config)
    return model, list(format.export(model, ("fp32", "int8")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"kv_heads": 1, "causal": 1, "n_sink": 1}, {"dense_below": LENGTHS[0]}],
    ids=["encoder", "causal-gqa", "dense-below"],
)
@pytest.mark.parametrize("precision", [0, 1], ids=["fp32", "int8"])
def test_program(precision: int, config: dict[str, Any]) -> None:
    model, made = programs(**config)
    data = made[precision].files["model.tflite"]
    assert made[precision].sparse
    for threads in (1, 2):
        before = library().edgeformer_dsa_claimed()
        plain, fast = opened(data, None, threads), opened(data, LIBRARY, threads)
        for length, valid in zip(LENGTHS, (20, 70), strict=True):
            rows = {name: np.pad(x, ((0, 0), (0, length - valid))) for name, x in sparse_models.rows(1, valid).items()}
            feed = {f"args_{i}": x for i, x in enumerate(rows.values())}
            library().edgeformer_dsa_reset()
            want = next(iter(plain.get_signature_runner(f"length_{length}")(**feed).values()))
            assert library().edgeformer_dsa_calls() == 0
            found = next(iter(fast.get_signature_runner(f"length_{length}")(**feed).values()))
            assert library().edgeformer_dsa_calls() == sparse_models.LAYERS == len(kept())
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 if not precision else 2e-2)
            if not precision:
                truth = model.module(*map(torch.from_numpy, rows.values())).numpy()
                np.testing.assert_allclose(found, truth, rtol=0, atol=1e-5)
        assert library().edgeformer_dsa_claimed() - before == sparse_models.LAYERS * len(LENGTHS)


@pytest.mark.slow
def test_int8_leaves_the_operator_alone() -> None:
    """Its operands stay float32, and so does every weight that goes into it."""
    model = schema.ModelT.InitFromPackedBuf(programs()[1][1].files["model.tflite"], 0)
    found = 0
    for graph in model.subgraphs[: len(LENGTHS)]:
        for operator in graph.operators:
            if getattr(operator.builtinOptions2, "name", None) == b"edgeformer.dsa":
                kinds = [graph.tensors[i].type for i in operator.inputs]
                assert kinds == [schema.TensorType.FLOAT32] * 8 + [schema.TensorType.INT32] * 2
                found += 1
    assert found == sparse_models.LAYERS * len(LENGTHS)
