"""int8 of a decoder: a token with huge values costs the others nothing, and nothing is stored twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import families  # noqa: E402

from edgeformer import formats, model as models, onnx_int8, rounding  # noqa: E402

TOKENS, WIDTH, WIDER = 50, 32, 48
INT8 = rounding.Chosen(("int8", "int8"))
GRAPH = f"""
<ir_version: 9, opset_import: ["" : 20]>
decoder (int32[B, S] ids) => (float[B, S, {TOKENS}] logits) {{
  embedded = Gather (table, ids)
  hidden = MatMul (embedded, weight)
  flat = Reshape (hidden, rows)
  narrow = Gemm (flat, back, bias)
  turned = Transpose <perm = [1, 0]> (table)
  low = MatMul (narrow, turned)
  logits = Reshape (low, shape)
}}
"""


def graph() -> Any:
    """A tied table whose token 0 is a thousand times the others, a product and a Gemm between."""
    random = np.random.default_rng(0)
    table = random.normal(size=(TOKENS, WIDTH))
    table[0] *= 1000
    arrays = {
        "table": table,
        "weight": random.normal(size=(WIDTH, WIDER)),
        "back": random.normal(size=(WIDER, WIDTH)),
        "bias": random.normal(size=WIDTH),
    }
    proto = onnx.parser.parse_model(GRAPH)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    shapes = {"rows": [-1, WIDER], "shape": [1, -1, TOKENS]}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(a), n) for n, a in shapes.items())
    return proto


def logits(proto: Any) -> Any:
    """Of the tokens behind the huge one."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(20, dtype=np.int32)[None]})[0][0, 1:, 1:]


def error(proto: Any) -> float:
    wanted = logits(graph())
    return float(np.linalg.norm(logits(proto) - wanted) / np.linalg.norm(wanted))


def test_a_huge_token_costs_the_others_nothing() -> None:
    rows, tensor = (error(way(graph(), INT8).proto) for way in (onnx_int8.by_row, onnx_int8.by_tensor))
    assert 0 < rows < 0.015 and tensor > 0.3


def test_the_second_byte_leaves_only_the_weights_rounding() -> None:
    rounded = graph()
    for weight, axis in (("table", 1), ("weight", 0), ("back", 0)):
        found = next(w for w in rounded.graph.initializer if w.name == weight)
        matrix = onnx.numpy_helper.to_array(found)
        scale = np.abs(matrix).max(axis, keepdims=True) / 127
        found.CopyFrom(onnx.numpy_helper.from_array(np.rint(matrix / scale) * scale, weight))
    got, wanted = logits(onnx_int8.by_row(graph(), INT8).proto), logits(rounded)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-4


def test_every_matrix_is_int8_and_stored_once() -> None:
    before = graph()
    made = onnx_int8.by_row(before, INT8).proto.graph
    kinds = [node.op_type for node in made.node]
    matrices = {w.name: w for w in made.initializer if len(w.dims) == 2}
    assert sorted(tuple(w.dims) for w in matrices.values()) == [(WIDTH, WIDER), (WIDER, WIDTH), (TOKENS, WIDTH)]
    assert {w.data_type for w in matrices.values()} == {onnx.TensorProto.INT8}
    assert kinds.count("MatMulInteger") == 3 and not {"MatMul", "Gemm", "DynamicQuantizeLinear"} & {*kinds}
    assert before == graph()


@pytest.mark.slow
def test_a_decoder_is_quantized_by_row_and_its_work_counted_so() -> None:
    model = models.load(families.tiny("llama"), name="tiny", lengths=(16,))
    fp32, int8 = formats.load("onnx").export(model, ["fp32", "int8"])
    nodes = onnx.load_from_string(int8.files[int8.entry]).graph.node
    assert not any(node.op_type == "DynamicQuantizeLinear" for node in nodes)
    assert {node.domain for node in nodes} == {""}
    (*_, whole), (*_, made) = fp32.work, int8.work
    assert made.int8_ops == 2 * (whole.flops - made.flops) > 0  # two bytes of each activation
    assert made.weight_bytes == pytest.approx(whole.weight_bytes / 4)
