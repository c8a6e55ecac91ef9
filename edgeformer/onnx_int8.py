"""
int8 and int4 in ONNX. int8 is in standard operators: weights with a scale an output channel, activations quantized
while it runs.

`by_tensor` has one scale for all of an activation, as ONNX Runtime's own quantizer writes it: its runtime makes one
operator of the product and what stands around it. What stands far above the rest is kept out of it (see
`onnx_outliers`), and its weights are rounded so that errors make up for each other (see `rounding.compensated`).
`by_row` has a scale for each token, and a second byte of each value as rows of their own in the same product. Decoders
need both: their first token carries values a thousand times those of the others (an attention sink), and within a token
few channels stand far above the rest, so that one byte loses what the others say.
`static` has one scale for all of an activation, which is known before.

In all of them a table has a scale a row.

int4 is in operators of ONNX Runtime (1.22 and later): MatMulNBits, with activations in int8, and GatherBlockQuantized.
Both store a matrix [rows, columns] as two values a byte, so that a table that is also the head's matrix is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from edgeformer_agent import cases

from . import data, onnx_graph, onnx_outliers, rounding
from .model import Model

MOST, ZERO = 127, 128  # activations are unsigned around ZERO: what every version of MatMulInteger takes
FINE = 1 / 254  # a step of the second byte, in steps of the first: what rounding leaves is at most half of one
SMALLEST = 1e-12  # scale of a row of zeros
SCALARS: dict[str, np.ndarray] = {
    "zero": np.array(ZERO, np.uint8),
    "one": np.array(1, np.float32),
    "part": np.array(1 / MOST, np.float32),
    "fine": np.array(FINE, np.float32),
    "least": np.array(SMALLEST, np.float32),
    "last": np.array([-1]),
}
INT8 = rounding.Chosen(("int8", "int8"))
Factors = Mapping[str, np.ndarray]  # activation -> what `rounding.factor` made of it
INT8_ACTIVATIONS = 4  # of MatMulNBits' accuracy levels
MICROSOFT = "com.microsoft"


class Written(NamedTuple):
    """proto; layer -> how many times narrower a range its int8 inputs have (see `onnx_outliers`)."""

    proto: onnx.ModelProto
    narrower: Mapping[str, float]


def written(proto: onnx.ModelProto, model: Model, precision: str) -> Written:
    """proto: what `onnx_graph.trace` made of `model`. Raises BadInput where the model is not ready for it."""
    if precision == "fp32":
        return Written(proto, {})
    chosen = rounding.chosen(model, precision)
    if precision == "int8-static":
        return static(proto, chosen)
    if model.task.kind == "next_token":
        return by_row(proto, chosen)
    rows = data.load(model, None, None).rows
    return by_tensor(proto, chosen, rows, rows if model.tokenizer is not None else ())  # noise is like no input


def by_tensor(
    proto: onnx.ModelProto,
    chosen: rounding.Chosen,
    rows: Sequence[cases.Row] = (),
    typical: Sequence[cases.Row] = (),
) -> Written:
    """
    rows: what the graph runs on to find outliers; typical: rows like those it will see, for which its weights are
    rounded, else to the nearest. DSA nodes and their function stay as they are, here and in the others.
    """
    made, left = _rewritten(proto, chosen)
    narrow = onnx_outliers.narrowed(made, onnx_outliers.peaks(made, rows, left), left)
    moments = onnx_outliers.moments(narrow.proto, typical, narrow.left)
    factors = {name: rounding.factor(found) for name, found in moments.items()}
    quantized, _ = _rewritten(narrow.proto, INT8, _Rows.tensor_product, narrow.left, factors)
    onnx_graph.strip(quantized)
    return Written(quantized, narrow.account)


def by_row(proto: onnx.ModelProto, chosen: rounding.Chosen) -> Written:
    """A table that is also the head's matrix (tied embeddings) stays one."""
    quantized, _ = _rewritten(proto, chosen, _Rows.row_product)
    onnx_graph.strip(quantized)
    return Written(quantized, {})


def static(proto: onnx.ModelProto, chosen: rounding.Chosen) -> Written:
    """Activations of linear layers in the ranges that are known before; what has none stays in float."""
    quantized, _ = _rewritten(proto, chosen, _Rows.static_product)
    onnx_graph.strip(quantized)
    return Written(quantized, {})


def grouped(proto: onnx.ModelProto) -> bool:
    """Whether some of it is int4."""
    return any(node.op_type in ("MatMulNBits", "GatherBlockQuantized") for node in proto.graph.node)


def _rewritten(
    proto: onnx.ModelProto,
    chosen: rounding.Chosen,
    product: Callable[[_Rows, onnx.NodeProto], None] | None = None,
    left: Collection[str] = (),
    factors: Factors | None = None,
) -> tuple[onnx.ModelProto, list[str]]:
    """
    A copy with tables and int4 products rewritten, and int8 products by `product`, where there is one; names of the
    nodes whose matrices stay in float, where those in `left` are told before.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    ONNXModel(made).replace_gemm_with_matmul()
    rows = _Rows(made.graph, chosen, product, left, factors or {})
    rows.rewrite()
    if grouped(made) and MICROSOFT not in {x.domain for x in made.opset_import}:
        made.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return made, rows.left


class _Rows:
    """A graph while its products and tables are rewritten: what was made once is found again by name."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        chosen: rounding.Chosen,
        product: Callable[[_Rows, onnx.NodeProto], None] | None,
        left: Collection[str],
        factors: Factors,
    ) -> None:
        self.graph, self.chosen, self.product, self.left, self.factors = graph, chosen, product, list(left), factors
        self.nodes: list[onnx.NodeProto] = []
        self.floats = {w.name: w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
        self.turned = onnx_graph.transposed(graph)
        self.made: set[str] = set()

    def rewrite(self) -> None:
        write: dict[tuple[str, str], Callable[[_Rows, onnx.NodeProto], None]] = {
            ("MatMul", "int4"): _Rows.grouped_product,
            ("Gather", "int8"): _Rows.lookup,
            ("Gather", "int4"): _Rows.grouped_lookup,
        }
        if self.product is not None:
            write["MatMul", "int8"] = self.product
        for node in self.graph.node:
            precision = "" if node.name in self.left else self._precision(node)
            if way := write.get((node.op_type, precision)):
                way(self, node)
                continue
            self.nodes.append(node)
            if precision in ("fp16", "fp32"):
                self.left.append(node.name)
        _keep_used(self.graph, self.nodes)

    def _precision(self, node: onnx.NodeProto) -> str:
        """Of its matrix; "" where it has none."""
        if node.op_type == "Gather" and self._matrix(node.input[0]) and not _axis(node):
            return self.chosen.of(numpy_helper.to_array(self.floats[node.input[0]]), table=True)
        if node.op_type == "MatMul" and self._matrix(source := self._source(node.input[1])):
            matrix = numpy_helper.to_array(self.floats[source])
            return self.chosen.of(matrix if source != node.input[1] else matrix.T, table=False)
        return ""

    def _source(self, name: str) -> str:
        return self.turned.get(name, name)

    def _matrix(self, name: str) -> bool:
        return name in self.floats and len(self.floats[name].dims) == 2

    def tensor_product(self, node: onnx.NodeProto) -> None:
        """[..., depth] fp32 and (depth, channels) constant -> [..., channels] fp32, by the nodes ONNX Runtime joins."""
        (x, weight), out = node.input, node.output[0]
        values, scales = self._weights(weight, self.factors.get(x))
        integers, step, zero = names = [f"{x}/{name}" for name in ("integers", "step", "zero")]
        if integers not in self.made:
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names, name=integers))
            self.made.add(integers)
        whole = self._node(f"{out}/whole", "MatMulInteger", integers, values, zero)
        whole = self._node(f"{out}/float", "Cast", whole, to=onnx.TensorProto.FLOAT)
        self._node(out, "Mul", whole, self._node(f"{out}/scales", "Mul", step, scales))

    def row_product(self, node: onnx.NodeProto) -> None:
        """[..., rows, depth] fp32 and (depth, channels) constant -> [..., rows, channels] fp32, integers between."""
        (x, weight), out = node.input, node.output[0]
        values, scales = self._weights(weight)
        both, scale = self._rows(x)
        whole = self._node(f"{out}/whole", "MatMulInteger", both, values, self._scalar("zero"))
        whole = self._node(f"{out}/float", "Cast", whole, to=onnx.TensorProto.FLOAT)
        first, second = f"{out}/first", f"{out}/second"
        self.nodes.append(helper.make_node("Split", [whole], [first, second], f"{out}/split", axis=-2, num_outputs=2))
        second = self._node(f"{out}/fine", "Mul", second, self._scalar("fine"))
        rows = self._node(f"{out}/rows", "Add", first, second)
        self._node(out, "Mul", self._node(f"{out}/channels", "Mul", rows, scales), scale)

    def static_product(self, node: onnx.NodeProto) -> None:
        """The product of dequantized integers, which ONNX Runtime computes as one of integers."""
        (x, weight), out = node.input, node.output[0]
        source = self._source(weight)
        matrix = numpy_helper.to_array(self.floats[source])
        found = self.chosen.range_of(matrix if source != weight else matrix.T)
        if found is None or source != weight:
            self.nodes.append(node)
            return
        low, high = found
        scale = np.float32(max((high - low) / 255, SMALLEST))
        step, zero = f"{out}/step", f"{out}/zero"
        self._constant(step, np.array(scale))
        self._constant(zero, np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8))
        # Layers that read the same tensor have the same range.
        integers = self._once(f"{x}/integers", "QuantizeLinear", x, step, zero)
        values, scales = self._stored(source, channel=1)
        told = self._once(f"{values}/told", "DequantizeLinear", values, scales, axis=1)
        self._node(out, "MatMul", self._once(f"{x}/told", "DequantizeLinear", integers, step, zero), told)

    def _rows(self, x: str) -> tuple[str, str]:
        """Names of an activation's uint8 values, the first bytes above the second, and of the scale of each row."""
        one, zero = self._scalar("one"), self._scalar("zero")
        size = self._once(f"{x}/row/most", "ReduceMax", self._once(f"{x}/row/size", "Abs", x), self._scalar("last"))
        scale = self._once(f"{x}/row/part", "Mul", size, self._scalar("part"))
        scale = self._once(f"{x}/row/scale", "Max", scale, self._scalar("least"))
        steps = self._once(f"{x}/row/steps", "Div", x, scale)
        first = self._once(f"{x}/row/first", "QuantizeLinear", steps, one, zero)
        told = self._once(f"{x}/row/told", "DequantizeLinear", first, one, zero)
        rest = self._once(f"{x}/row/rest", "Sub", steps, told)
        second = self._once(f"{x}/row/second", "QuantizeLinear", rest, self._scalar("fine"), zero)
        return self._once(f"{x}/row/both", "Concat", first, second, axis=-2), scale

    def lookup(self, node: onnx.NodeProto) -> None:
        """Rows of a table, each with its own scale."""
        (table, ids), out = node.input, node.output[0]
        values, scales = self._stored(table, channel=0)
        found = self._node(f"{out}/int8", "Gather", values, ids)
        scale = self._node(f"{out}/scale", "Gather", scales, ids)
        scale = self._node(f"{out}/scales", "Unsqueeze", scale, self._scalar("last"))
        self._node(out, "Mul", self._node(f"{out}/cast", "Cast", found, to=onnx.TensorProto.FLOAT), scale)

    def grouped_product(self, node: onnx.NodeProto) -> None:
        """[..., depth] fp32 and (depth, channels) constant -> [..., channels] fp32, activations in int8."""
        (x, weight), out = node.input, node.output[0]
        source = self._source(weight)
        packed, scales, (channels, depth) = self._grouped(source, turned=source == weight)
        blocks = self._constant(f"{packed}/shape", np.array([channels, depth // rounding.GROUP, rounding.GROUP // 2]))
        self._node(
            out,
            "MatMulNBits",
            x,
            self._once(f"{packed}/blocks", "Reshape", packed, blocks),  # a runtime does it once, when it opens the file
            scales,
            domain=MICROSOFT,
            K=depth,
            N=channels,
            bits=4,
            block_size=rounding.GROUP,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def grouped_lookup(self, node: onnx.NodeProto) -> None:
        (table, ids), out = node.input, node.output[0]
        packed, scales, _ = self._grouped(table, turned=False)
        # 4 bits by default; to say so takes a later version (1.23).
        axes = {"gather_axis": 0, "quantize_axis": 1}
        self._node(
            out, "GatherBlockQuantized", packed, ids, scales, domain=MICROSOFT, block_size=rounding.GROUP, **axes
        )

    def _grouped(self, name: str, turned: bool) -> tuple[str, str, tuple[int, int]]:
        """Names of a matrix' uint8 pairs of values [rows, columns / 2] and of its scales [rows, groups]; its shape."""
        packed, kept = f"{name}/int4/{int(turned)}", f"{name}/scales4/{int(turned)}"
        matrix = numpy_helper.to_array(self.floats[name])
        matrix = np.ascontiguousarray(matrix.T if turned else matrix)
        if packed not in self.made:
            values, scales = (x.numpy() for x in rounding.stored(torch.tensor(matrix), "int4"))
            above = (values + 8).astype(np.uint8)  # 8 is their zero
            self._constant(packed, above[:, 0::2] | (above[:, 1::2] << 4))
            self._constant(kept, scales)
        return packed, kept, (len(matrix), matrix.shape[1])

    def _weights(self, weight: str, factor: np.ndarray | None = None) -> tuple[str, str]:
        """Names of the int8 values (depth, channels) of a product's matrix and of its scales."""
        source = self._source(weight)
        if source == weight:
            return self._stored(weight, 1, factor)
        values, scales = self._stored(source, 0)
        # A runtime turns it once, when it opens the file.
        return self._once(f"{values}/turned", "Transpose", values, perm=[1, 0]), scales

    def _stored(self, name: str, channel: int, factor: np.ndarray | None = None) -> tuple[str, str]:
        """
        Names of a matrix' int8 values and of its scales along the axis `channel`. factor: of what it is multiplied by,
        where errors are to make up for each other.
        """
        values, scales = f"{name}/int8/{channel}", f"{name}/scales/{channel}"
        if values not in self.made:
            matrix = numpy_helper.to_array(self.floats[name])
            found = np.maximum(np.abs(matrix).max(1 - channel, keepdims=True) / np.float32(MOST), np.float32(SMALLEST))
            whole = matrix / found
            whole = np.rint(whole) if factor is None else rounding.compensated(whole, factor, MOST)
            self._constant(values, whole.astype(np.int8))
            self._constant(scales, found.reshape(-1))
        return values, scales

    def _scalar(self, name: str) -> str:
        return self._constant(f"int8/{name}", SCALARS[name])

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.made:
            self.graph.initializer.append(numpy_helper.from_array(value, name))
            self.made.add(name)
        return name

    def _once(self, name: str, operator: str, *inputs: str, **attributes: object) -> str:
        return name if name in self.made else self._node(name, operator, *inputs, **attributes)

    def _node(self, name: str, operator: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        self.made.add(name)
        return name


def _axis(gather: onnx.NodeProto) -> int:
    return next((int(a.i) for a in gather.attribute if a.name == "axis"), 0)


def _keep_used(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """The new nodes in place of the old, without the matrices (also transposed ones) that nobody reads any more."""
    turned = onnx_graph.transposed(graph)
    read = _read(graph, nodes)
    nodes = [node for node in nodes if node.output[0] in read or node.output[0] not in turned]
    read = _read(graph, nodes)
    weights = [w for w in graph.initializer if w.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)


def _read(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in node.input} | {value.name for value in graph.output}
