"""Outliers in front of int8 products: the same numbers from a graph whose products see a narrower range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import families  # noqa: E402

from edgeformer import formats, model as models, onnx_int8, onnx_outliers, rounding  # noqa: E402

WIDTH, WIDER = 32, 64
INT8 = rounding.Chosen(("int8", "int8"))
BLOCK = f"""
<ir_version: 9, opset_import: ["" : 20]>
block (float[B, S, {WIDTH}] x) => (float[B, S, {WIDTH}] y) {{
  normed = LayerNormalization (x, gain, shift)
  first = MatMul (normed, up)
  biased = Add (first, up_bias)
  gate = Sigmoid (biased)
  columns = Mul (biased, gate)
  second = MatMul (columns, down)
  moved = Add (second, down_bias)
  y = Add (moved, normed)
}}
"""


def block() -> Any:
    """A feed-forward block: one channel of its norm and one of its columns stand far above the rest."""
    random = np.random.default_rng(0)
    arrays = {
        "gain": np.ones(WIDTH),
        "shift": np.zeros(WIDTH),
        "up": random.normal(size=(WIDTH, WIDER)) / 8,
        "up_bias": np.zeros(WIDER),
        "down": random.normal(size=(WIDER, WIDTH)) / 8,
        "down_bias": random.normal(size=WIDTH),
    }
    arrays["gain"][5] = 40
    arrays["up"][5] /= 40
    arrays["up_bias"][9] = 60
    proto = onnx.parser.parse_model(BLOCK)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


X = np.random.default_rng(1).normal(size=(1, 20, WIDTH)).astype(np.float32)


def outputs(proto: Any) -> Any:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def test_the_same_is_computed_from_narrower_ranges() -> None:
    before = block()
    seen = onnx_outliers.peaks(before, [{"x": X[0]}])
    made, left, narrower = onnx_outliers.narrowed(before, seen)
    np.testing.assert_allclose(outputs(made), outputs(before), atol=2e-5)
    assert before == block()
    assert narrower.keys() == {"up_bias", "down_bias"} and min(narrower.values()) > 4
    after = onnx_outliers.peaks(made, [{"x": X[0]}])
    assert after["normed/level"].max() == pytest.approx(seen["normed"].max() / narrower["up_bias"], rel=0.01)
    assert after["columns"].max() == pytest.approx(seen["columns"].max() / narrower["down_bias"], rel=0.01)
    assert left == ["first/aside", "second/aside"]  # in fp32


def test_int8_loses_less() -> None:
    wanted = outputs(block())
    rows = [{"x": X[0]}]

    def error(rows: list[Any], typical: list[Any]) -> float:
        made, narrower = onnx_int8.by_tensor(block(), INT8, rows, typical)
        assert bool(narrower) == bool(rows)
        kinds = [node.op_type for node in made.graph.node]
        assert kinds.count("MatMulInteger") == 2 and kinds.count("MatMul") == (2 if rows else 0)
        return float(np.abs(outputs(made) - wanted).mean())

    nearest = error(rows, [])
    assert nearest < error([], []) / 3
    assert error(rows, rows) < nearest


@pytest.mark.parametrize("change", ["read elsewhere", "no outlier", "in float", "shared"])
def test_what_cannot_or_need_not_go_aside_does_not(change: str) -> None:
    proto = block()
    seen = dict(onnx_outliers.peaks(proto, [{"x": X[0]}]))
    left = ["second"] if change == "in float" else []
    if change == "read elsewhere":
        proto.graph.output.append(onnx.helper.make_tensor_value_info("gate", onnx.TensorProto.FLOAT, None))
    if change == "no outlier":
        seen["columns"] = np.ones(WIDER, np.float32)
    if change == "shared":  # a second layer has the same matrix
        proto.graph.node.extend([onnx.helper.make_node("MatMul", ["columns", "down"], ["again"], "again")])
        proto.graph.output.append(onnx.helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    made, beside, narrower = onnx_outliers.narrowed(proto, seen, left)
    assert not any("aside" in node.name for node in made.graph.node) and beside == left
    assert ("down_bias" in narrower) == (change == "read elsewhere")  # there its channels are levelled by a product
    np.testing.assert_allclose(outputs(made), outputs(block()), atol=2e-5)


@pytest.mark.slow
def test_an_export_says_what_it_narrowed() -> None:
    module = families.tiny("bert")
    with torch.no_grad():
        for layer in module.encoder.layer:  # equal ones are stored once, and name no layer
            layer.output.dense.bias.normal_()
        module.encoder.layer[0].intermediate.dense.bias[3] = 50
    model = models.load(module, name="tiny", lengths=(16,), tokenizer=families.tokenizer())
    fp32, int8 = formats.load("onnx").export(model, ["fp32", "int8"])
    assert not fp32.narrower and "module.encoder.layer.0.output.dense" in int8.narrower
    again = next(iter(formats.load("onnx").export(model, ["int8"])))
    assert again.files == int8.files
