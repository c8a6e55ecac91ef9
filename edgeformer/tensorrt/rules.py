"""
What the ONNX parser of TensorRT 8.2 takes, as rules over a graph: `breaches` lists what the device would refuse.

Read in the parser's operator list and importers (branch 8.2-GA of onnx-tensorrt). What it does not know: forms of
Einsum beyond ellipses, Resize modes, recurrent details. A breach names the node, the rule, the value and a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..attention import onnx_function
from ..errors import ExportError
from .lower import FP16_MOST, INT32, OPSET, PLUGIN

MOST_RANK = 8
MOST_BYTES = 2**31 - 1  # of a file without external data
MOST_ELEMENTS = 2**31 - 1

# Operators by the element types they take: f FP32, h FP16, i INT32, q INT8, b BOOL. Any other is not supported.
_OPERATORS = {
    "fh": """Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh BatchNormalization Ceil Celu Cos Cosh CumSum Dropout Einsum
        Erf Exp Floor GRU ImageScaler InstanceNormalization LRN LSTM Log LogSoftmax LpNormalization MatMul
        NonMaxSuppression Pow QuantizeLinear RNN RandomUniform RandomUniformLike ReduceL1 ReduceL2 ReduceLogSum
        ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Resize ReverseSequence Scan
        Sin Sinh Softmax Sqrt Tan TopK Upsample""",
    "fhq": """Clip Conv ConvTranspose Elu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool HardSigmoid LeakyRelu LpPool
        MaxPool PRelu ParametricSoftplus Relu Round ScaledTanh Selu Sigmoid Softplus Softsign Tanh ThresholdedRelu""",
    "fhi": """Abs Add DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mul Neg Range
        SpaceToDepth Sub Sum""",
    "fhiqb": "Cast Concat Constant Identity Reshape Shape Size Slice Squeeze Transpose Unsqueeze",
    "fhiq": "AveragePool Gather GatherElements GatherND Pad Scatter ScatterElements ScatterND Sign",
    "fhib": "Expand EyeLike Flatten If Loop Split Tile Where",
    "b": "And Not Or",
    "f": "ConstantOfShape",
    "q": "DequantizeLinear",
}
TYPES = {name: set(kinds) for kinds, names in _OPERATORS.items() for name in names.split()}
_LETTERS = {
    TensorProto.FLOAT: "f", TensorProto.DOUBLE: "f", TensorProto.FLOAT16: "h", TensorProto.INT32: "i",
    TensorProto.INT64: "i", TensorProto.INT8: "q", TensorProto.BOOL: "b",
}  # fmt: skip
_WORDS = {"f": "FP32", "h": "FP16", "i": "INT32", "q": "INT8", "b": "BOOL"}
# Which inputs carry data of the types above; the others are indices, conditions or shapes. All, where it is not here.
_DATA = {
    "Gather": (0,), "GatherElements": (0,), "GatherND": (0,), "Reshape": (0,), "Expand": (0,), "Slice": (0,),
    "TopK": (0,), "CumSum": (0,), "Unsqueeze": (0,), "Squeeze": (0,), "Clip": (0,), "Where": (1, 2), "Tile": (0,),
    "Pad": (0,), "ConstantOfShape": (), "Split": (0,), "ReduceSum": (0,), "Resize": (0,),
}  # fmt: skip
_CONSTANT = {
    "TopK": (1,), "CumSum": (1,), "Slice": (3,), "Unsqueeze": (1,), "Squeeze": (1,), "ReduceSum": (1,), "Clip": (1, 2),
    "Split": (1,), "Resize": (2,), "Conv": (1,), "ConvTranspose": (1,), "InstanceNormalization": (1, 2),
    PLUGIN: (3, 4, 5, 6, 7),
}  # fmt: skip
# Inputs that decide a shape: the engine computes them on the host, from shapes and constants only.
_SHAPES = {
    "Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Slice": (1, 2), "Tile": (1,), "Range": (0, 1, 2),
}  # fmt: skip
_HOST = set(
    """Add Sub Mul Div Max Min Concat Gather Slice Squeeze Unsqueeze Reshape Cast Identity Equal Less Greater Not And Or
    Where ReduceProd""".split()
)
_REMEDIES = {
    "LayerNormalization": "write it as ReduceMean, Sub, Mul, ReduceMean, Add, Sqrt, Div, Mul, Add (`lower` does)",
    "Gelu": "write it as 0.5 x (1 + Erf(x / sqrt 2)) (`lower` does)",
    "Mod": "write it as a - (a / b) b",
    "Reciprocal": "write it as 1 / x",
    "Trilu": "compare two Ranges and choose with Where",
    "NonZero": "its result has a shape that depends on values; keep a mask instead",
    "CumSum": "multiply by a triangle of ones",
}


class Breach(NamedTuple):
    """What the device would refuse: where, by which rule, what was found, what to do."""

    node: str
    rule: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}, got {self.value}; {self.remedy}"


class _Graph:
    """Types, constants and host-side values of a graph, by name."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        self.nodes = graph.node
        self.types = {v.name: _type(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        self.constants = {w.name: w for w in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.types |= {name: (w.data_type, tuple(w.dims)) for name, w in self.constants.items()}
        self.inputs = [v for v in graph.input if v.name not in self.constants]
        self.outputs = list(graph.output)
        self.host = set(self.constants)
        for node in graph.node:
            if node.op_type in ("Shape", "Size") or (node.op_type in _HOST and self.host.issuperset(node.input)):
                self.host |= set(node.output)

    def letter(self, name: str) -> str:
        return _LETTERS.get(self.types.get(name, (0, None))[0], "?")

    def array(self, name: str) -> np.ndarray[Any, Any]:
        return np.asarray(numpy_helper.to_array(self.constants[name]))


def _type(value: onnx.ValueInfoProto) -> tuple[int, tuple[int, ...] | None]:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return tensor.elem_type, dims if tensor.HasField("shape") else None


def hold(proto: onnx.ModelProto, name: str, fp32: Collection[str] | None = None) -> None:
    """Raises ExportError with the first breaches. `fp32`: the nodes that an fp16 engine computes in fp32; None: all."""
    found = breaches(proto, fp32)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ExportError(f"tensorrt: {name}: TensorRT 8.2 would refuse it: {' | '.join(map(str, found[:3]))}{more}")


def breaches(proto: onnx.ModelProto, fp32: Collection[str] | None = None) -> list[Breach]:
    """Everything the device would refuse, in the graph's order; [] where there is nothing."""
    found = list(_file(proto))
    if found:  # nothing below can be trusted
        return found
    graph = _Graph(proto)
    found += [*_borders(graph), *_weights(graph)]
    for node in graph.nodes:
        for rule in _NODE_RULES:
            found += [b._replace(node=f"{node.op_type} {node.name!r}") for b in rule(graph, node)]
        if fp32 is not None and node.name not in fp32:
            found += [b._replace(node=f"{node.op_type} {node.name!r}") for b in _half_range(graph, node)]
    return found


def _file(proto: onnx.ModelProto) -> Iterator[Breach]:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not 7 <= opset <= OPSET:
        yield Breach("file", f"opset 7 to {OPSET}", str(opset), "lower it first")
    for function in proto.functions:
        yield Breach("file", "no functions of its own", function.name, "inline it, or write a plugin's node")
    if proto.ByteSize() > MOST_BYTES:
        yield Breach("file", f"at most {MOST_BYTES} bytes", str(proto.ByteSize()), "a smaller model, or fp16 weights")


def _borders(graph: _Graph) -> Iterator[Breach]:
    for value in (*graph.inputs, *graph.outputs):
        letter, (kind, shape) = graph.letter(value.name), graph.types[value.name]
        if letter not in ("f", "h", "i") or kind == TensorProto.DOUBLE:
            name = TensorProto.DataType.Name(kind)
            yield Breach(f"value {value.name!r}", "inputs and outputs are FP32, FP16 or INT32", name, "cast it outside")
        if shape is None or 0 in shape:
            yield Breach(f"value {value.name!r}", "no empty or unknown shape", str(shape), "give it a shape")


def _weights(graph: _Graph) -> Iterator[Breach]:
    for name, weight in graph.constants.items():
        kind, count = weight.data_type, int(np.prod(weight.dims, dtype=np.int64))
        node = f"weight {name!r}"
        if kind not in _LETTERS or kind == TensorProto.BOOL:
            yield Breach(node, "weights are numbers", TensorProto.DataType.Name(kind), "store INT32 and cast")
        if count > MOST_ELEMENTS:
            yield Breach(node, f"at most {MOST_ELEMENTS} elements", str(count), "split it")
        elif not count and any(name in n.input and n.op_type == PLUGIN for n in graph.nodes):
            yield Breach(node, "no empty weight", str(list(weight.dims)), "a column of zeros says the same")
        elif kind == TensorProto.INT64 and count:
            array = graph.array(name)
            if array.min() < INT32[0] or array.max() > INT32[1]:
                bad = int(array[(array < INT32[0]) | (array > INT32[1])].reshape(-1)[0])
                yield Breach(node, "INT64 becomes INT32", str(bad), "keep integers within 32 bits")


def _supported(_: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    if node.op_type not in TYPES and node.op_type != PLUGIN:
        remedy = _REMEDIES.get(node.op_type, "write it with operators that are (see `rules.TYPES`)")
        yield Breach("", "an operator of the parser", node.op_type, remedy)


def _types(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    wanted = TYPES.get(node.op_type)
    if wanted is None:
        return
    places = _DATA.get(node.op_type, tuple(range(len(node.input))))
    for name in (node.input[i] for i in places if i < len(node.input) and node.input[i]):
        letter = graph.letter(name)
        if letter not in wanted:
            says = "/".join(_WORDS[k] for k in "fhiqb" if k in wanted)
            yield Breach("", f"takes {says}", f"{_WORDS.get(letter, 'an unknown type')} in {name!r}", "cast around it")


def _ranks(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    shapes = {name: graph.types.get(name, (0, None))[1] for name in (*node.input, *node.output) if name}
    for name, shape in shapes.items():
        if shape is not None and len(shape) > MOST_RANK:
            yield Breach("", f"at most {MOST_RANK} axes", f"{len(shape)} of {name!r}", "merge axes with Reshape")
    ranks = sorted({len(s) for s in (shapes[x] for x in node.input if x) if s is not None})
    if node.op_type == "Where" and len(ranks) > 1:
        yield Breach("", "operands of one rank", f"ranks {ranks}", "Unsqueeze the smaller ones")


def _constants(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    places = _CONSTANT.get(node.op_type, ())
    for name in (node.input[i] for i in places if i < len(node.input) and node.input[i]):
        if name not in graph.constants:
            yield Breach("", "this input is an initializer", f"{name!r}, which is computed", "fold it into a constant")


def _dynamic(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    for name in (node.input[i] for i in _SHAPES.get(node.op_type, ()) if i < len(node.input) and node.input[i]):
        if name not in graph.host:
            yield Breach(
                "", "shapes come from shapes and constants", f"{name!r}, made of values", "a mask instead of a size"
            )
        elif graph.letter(name) != "i" and not (node.op_type == "Range" and name in graph.constants):
            yield Breach("", "a shape is INT32", f"{_WORDS.get(graph.letter(name), '?')} in {name!r}", "cast to INT64")


def _attributes(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    """What an operator cannot do although its name is known."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    op, fold = node.op_type, "fold it into a constant"
    if op == "TopK" and given.get("largest", 1) != 1:
        yield Breach("", "TopK takes the largest, whatever it is told", "largest=0", "negate the values")
    if op in ("ArgMax", "ArgMin") and given.get("select_last_index"):
        yield Breach("", "the first of equals", "select_last_index=1", "reverse the axis first")
    if op == "Reshape" and given.get("allowzero") and 0 in _small(graph, node.input[1]):
        yield Breach("", "a 0 keeps an axis", "allowzero=1 with a 0", "no empty tensors")
    if op == "ConstantOfShape" and "value" in given and given["value"].data_type != TensorProto.FLOAT:
        yield Breach("", "fills with FP32", TensorProto.DataType.Name(given["value"].data_type), "Expand a constant")
    if op == "EyeLike":
        yield Breach("", "no EyeLike of a dynamic shape", node.input[0], fold)
    if op == "Einsum" and b"." in given["equation"]:
        yield Breach("", "no ellipsis", given["equation"].decode(), "write MatMul and Transpose")
    if op in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and any(_small(graph, node.input[2])):
        yield Breach("", "zero point 0", node.input[2], "quantize symmetrically")


def _plugin(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    """Sizes that the plugin's kernels have."""
    if node.op_type != PLUGIN:
        return
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    missing = [name for name in (*onnx_function.INTEGERS, "scale", "plugin_version") if name not in given]
    if missing:
        yield Breach("", "every attribute of the plugin is there", f"without {', '.join(missing)}", "write it out")
    shape = graph.types.get(node.input[0], (0, None))[1]
    sizes = {"head": shape[3] if shape is not None and len(shape) == 4 else -1}
    sizes |= {name: given[name] for name in ("block_q", "block_k") if name in given}
    for name, size in sizes.items():
        if size not in range(16, 129, 16):
            yield Breach("", f"{name} of 16 to 128, a multiple of 16", str(size), "leave the model dense")


def _small(graph: _Graph, name: str) -> list[float]:
    return graph.array(name).reshape(-1).tolist() if name in graph.constants else []


def _half_range(graph: _Graph, node: onnx.NodeProto) -> Iterator[Breach]:
    for name in (x for x in node.input if x in graph.constants and graph.letter(x) == "f"):
        value = graph.array(name)
        if value.size and float(np.abs(value).max()) > FP16_MOST:
            most = f"{float(np.abs(value).max()):g} in {name!r}"
            yield Breach("", f"fp16 ends at {FP16_MOST:g}", most, "keep the node fp32, or a smaller constant")


_NODE_RULES: tuple[Callable[[_Graph, onnx.NodeProto], Iterator[Breach]], ...] = (
    _supported, _types, _ranks, _constants, _dynamic, _attributes, _plugin,
)  # fmt: skip
