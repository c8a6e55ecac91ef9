"""
ONNX of opset 20 in the words of opset 13, as the parser of TensorRT 8.2 takes them. One rule per operator, in `_RULES`.

There is no converter for the way down (onnx's own stops at LayerNormalization), and the exporter that wrote opset 13 by
itself is deprecated. An operator without a rule is copied; `rules.breaches` then says whether the device takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import pi, sqrt
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from .. import onnx_graph
from ..attention import onnx_function
from ..errors import ExportError
from ..rounding import Chosen

OPSET, IR_VERSION = 13, 7
PLUGIN, PLUGIN_VERSION = "EdgeformerDSA", "1"
FP16_MOST = 65504.0
MASKED = -30000.0  # two of them still fit fp16, and no logit survives one
INT32 = (-(2**31), 2**31 - 1)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
_INTS = (TensorProto.INT32, TensorProto.INT64)
_OF_SUMS = ("Add", "Sub", "Mul", "Div", "Sqrt", "Pow")  # from a sum of squares to what a row is multiplied by
_SCORES = ("q_clean", "k_clean", "v_clean", "k_head", "v_head")  # of the function's body: moved, not computed with
_SELECT, _ATTEND = "select_", "attend_"


class Lowered(NamedTuple):
    """The graph, and the nodes that an fp16 engine must compute in fp32: what overflows, counts, or decides."""

    proto: onnx.ModelProto
    fp32: tuple[str, ...]

    def with_fp32(self, names: Iterable[str]) -> Lowered:
        """These as well; the order is the graph's."""
        wanted = {*self.fp32, *names}
        return self._replace(fp32=tuple(node.name for node in self.proto.graph.node if node.name in wanted))


def with_plugin(proto: onnx.ModelProto) -> Lowered:
    """Sparse attention as nodes of our plugin; it runs only where the plugin's library is loaded."""
    return _lower(proto)


def standard(proto: onnx.ModelProto) -> Lowered:
    """Sparse attention in standard operators: the same numbers, at dense cost and more, anywhere."""
    from onnxscript import optimizer

    if not onnx_function.present(proto):
        return _lower(proto)
    onnx_function.schema()
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for function in named.functions:
        _name_parts(function)
    return _lower(optimizer.optimize(inliner.inline_local_functions(named)))


def _name_parts(function: onnx.FunctionProto) -> None:
    """Selection is fp32 on every target: the nodes up to `keep` get names that say so."""
    part = _SELECT
    for node in function.node:
        node.name = f"{_ATTEND if node.output[0] in _SCORES else part}{node.output[0]}"
        part = _ATTEND if "keep" in node.output else part


def _lower(proto: onnx.ModelProto) -> Lowered:
    onnx_function.schema()
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    writer = _Writer(graph)
    for node in graph.node:
        _RULES.get(node.op_type, _copy)(writer, node)
    made = writer.finish(graph)
    domains = {node.domain for node in made.node}
    imports = [helper.make_opsetid(domain, 1 if domain else OPSET) for domain in sorted(domains | {""})]
    model = helper.make_model(made, opset_imports=imports, ir_version=IR_VERSION, producer_name="edgeformer")
    return Lowered(model, tuple(_fp32(made, writer)))


class _Writer:
    """The graph that is being written. Names of values stay; an alias is a value that needs no node of its own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = {w.name: w for w in graph.initializer}
        self.types = {v.name: _type(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        self.types |= {w.name: (w.data_type, tuple(w.dims)) for w in graph.initializer}
        self.outputs = {v.name for v in graph.output}
        self.aliases: dict[str, str] = {}
        self.exact: set[str] = set()  # nodes that stay fp32

    def add(self, op: str, inputs: Iterable[str], output: str, near: str, **attributes: Any) -> str:
        """One node, named after the node `near` whose rule writes it."""
        names = [self.resolve(name) for name in inputs]
        node = helper.make_node(op, names, [output], name=f"{near}/{op}_{len(self.nodes)}", **attributes)
        self.nodes.append(node)
        return output

    def resolve(self, name: str) -> str:
        while name in self.aliases:
            name = self.aliases[name]
        return self._usable(name)

    def _usable(self, name: str) -> str:
        """The parser takes no boolean constant, and INT64 only where it fits INT32."""
        weight = self.weights.get(name)
        if weight is None or weight.data_type not in (TensorProto.BOOL, TensorProto.INT64, TensorProto.DOUBLE):
            return name
        array = numpy_helper.to_array(weight)
        if weight.data_type == TensorProto.BOOL:
            if f"{name}/bool" not in self.types:
                self.types[f"{name}/bool"] = (TensorProto.BOOL, array.shape)
                self.add("Cast", [self.constant(array.astype(np.int32))], f"{name}/bool", name, to=TensorProto.BOOL)
            return f"{name}/bool"
        if weight.data_type == TensorProto.DOUBLE:
            self.weights[name] = numpy_helper.from_array(array.astype(np.float32), name)
        elif array.size and (array.min() < INT32[0] or array.max() > INT32[1]):
            self.weights[name] = numpy_helper.from_array(array.clip(*INT32), name)  # the parser would clamp it too
        return name

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """An initializer of this content; equal ones share a name."""
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()[:64]}"
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(array, name)
            self.types[name] = (self.weights[name].data_type, array.shape)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def real(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def value(self, name: str) -> np.ndarray[Any, Any] | None:
        """The content of a constant; None for anything else."""
        weight = self.weights.get(name)
        return None if weight is None else np.asarray(numpy_helper.to_array(weight))

    def dtype(self, name: str) -> int:
        return self.types.get(name, (0, None))[0]

    def rank(self, name: str) -> int | None:
        shape = self.types.get(name, (0, None))[1]
        return None if shape is None else len(shape)

    def finish(self, graph: onnx.GraphProto) -> onnx.GraphProto:
        for name in sorted(self.outputs & set(self.aliases)):
            self.add("Identity", [self.aliases[name]], name, name)
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        _fp16_safe(self, kept)
        needed = {name for node in kept for name in node.input}
        weights = [w for name, w in self.weights.items() if name in needed]
        made = {name for node in kept for name in node.output} - self.outputs
        described = [v for v in graph.value_info if v.name in made]  # inference knows nothing of a plugin
        return helper.make_graph(kept[::-1], "edgeformer", graph.input, graph.output, weights, value_info=described)


def _type(value: onnx.ValueInfoProto) -> tuple[int, tuple[int, ...] | None]:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return tensor.elem_type, dims if tensor.HasField("shape") else None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _fp16_safe(writer: _Writer, nodes: list[onnx.NodeProto]) -> None:
    """Masks of -1e30 and -3e38 become -30000 wherever fp16 may see them; selection is fp32 and keeps its own."""
    for node in nodes:
        for i, name in enumerate(node.input):
            value = writer.value(name)
            if node.name.startswith(_SELECT) or value is None or value.dtype != np.float32 or value.size > 64:
                continue
            if (np.abs(value) > FP16_MOST).any():
                node.input[i] = writer.constant(np.clip(value, MASKED, -MASKED).astype(np.float32))


# --- which nodes stay fp32 --------------------------------------------------------------------------------------------


def _fp32(graph: onnx.GraphProto, writer: _Writer) -> Iterator[str]:
    """
    Normalisations and sums (fp16 overflows), also until their root is drawn, the selection of blocks, and whatever is
    made of positions, masks and counts only: integers beyond 2048 and rotation angles are not exact in fp16. That part
    of a graph is small.
    """
    activations = {v.name for v in graph.input if v.type.tensor_type.elem_type in _FLOATS}
    sums = {name for name, weight in writer.weights.items() if not weight.dims}
    for node in graph.node:
        reduced = node.op_type.startswith("Reduce") and node.name in writer.exact
        if reduced or (node.op_type in _OF_SUMS and sums.issuperset(node.input)):
            sums |= set(node.output)
        table = node.op_type in ("Gather", "Conv", PLUGIN) and writer.dtype(node.input[0]) in _FLOATS
        if table or activations & set(node.input):
            activations |= set(node.output)
        elif node.op_type not in ("Shape", "Constant") and not _turned_table(node, writer):
            yield node.name
            continue
        if node.name in writer.exact or sums & set(node.output) or node.name.startswith(_SELECT):
            yield node.name


def layers(proto: onnx.ModelProto, chosen: Chosen) -> Iterator[str]:
    """
    The nodes of the linear layers that the model asks in fp32: product and bias. Raises ExportError where there is no
    such layer.
    """
    if not chosen.exact:
        return
    weights = {w.name: w for w in proto.graph.initializer}
    turned = onnx_graph.transposed(proto.graph)
    found: set[str] = set()
    products: set[str] = set()
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            rows_first = node.input[1] in turned or _attributes(node).get("transB", 0)
            weight = weights.get(turned.get(node.input[1], node.input[1]))
            if path := _computed_in_fp32(weight, rows_first, chosen):
                found.add(path)
                products |= set(node.output)
                yield node.name
        elif node.op_type == "Add" and products & set(node.input) and weights.keys() & set(node.input):
            yield node.name
    chosen.hold(found, "tensorrt")


def _computed_in_fp32(weight: onnx.TensorProto | None, rows_first: bool, chosen: Chosen) -> str:
    if weight is None or len(weight.dims) != 2 or weight.data_type != TensorProto.FLOAT:
        return ""
    array = numpy_helper.to_array(weight)
    return chosen.computed_in_fp32(array if rows_first else array.T)


def _turned_table(node: onnx.NodeProto, writer: _Writer) -> bool:
    """An embedding table as the matrix of a head: the largest weight there is, and half as large in fp16."""
    return node.op_type == "Transpose" and node.input[0] in writer.weights and writer.dtype(node.input[0]) in _FLOATS


# --- rules: what to write instead of one node -------------------------------------------------------------------------


def _copy(w: _Writer, node: onnx.NodeProto) -> None:
    attributes = {k: v for k, v in _attributes(node).items() if k not in ("allowzero", "num_outputs", "stash_type")}
    inputs = [w.resolve(name) if name else "" for name in node.input]
    w.nodes.append(helper.make_node(node.op_type, inputs, node.output, node.name, domain=node.domain, **attributes))


def _alias(w: _Writer, node: onnx.NodeProto, to: str | None = None) -> None:
    w.aliases[node.output[0]] = to or node.input[0]


def _exactly(w: _Writer, node: onnx.NodeProto, rule: Callable[[_Writer, onnx.NodeProto], None]) -> None:
    """Runs a rule; what it writes stays fp32."""
    before = len(w.nodes)
    rule(w, node)
    w.exact |= {made.name for made in w.nodes[before:]}


def _layer_norm(w: _Writer, node: onnx.NodeProto) -> None:
    x, near, out = node.input[0], node.name, node.output[0]
    given, rank = _attributes(node), w.rank(node.input[0])
    axis = given.get("axis", -1)
    if axis != -1 and (rank is None or axis != rank - 1):
        raise ExportError(f"tensorrt: {near}: LayerNormalization over axis {axis}; only the last one has a form here")
    mean = w.add("ReduceMean", [x], f"{out}/mean", near, axes=[-1])
    centred = w.add("Sub", [x, mean], f"{out}/centred", near)
    square = w.add("Mul", [centred, centred], f"{out}/square", near)
    variance = w.add("ReduceMean", [square], f"{out}/variance", near, axes=[-1])
    shifted = w.add("Add", [variance, w.real(given.get("epsilon", 1e-5))], f"{out}/shifted", near)
    deviation = w.add("Sqrt", [shifted], f"{out}/deviation", near)
    biased = len(node.input) > 2 and node.input[2]
    unit = w.add("Div", [centred, deviation], f"{out}/unit", near)
    scaled = w.add("Mul", [unit, node.input[1]], f"{out}/scaled" if biased else out, near)
    if biased:
        w.add("Add", [scaled, node.input[2]], out, near)


def _gelu(w: _Writer, node: onnx.NodeProto) -> None:
    x, near, out = node.input[0], node.name, node.output[0]
    if _attributes(node).get("approximate", b"none") == b"tanh":
        square = w.add("Mul", [x, x], f"{out}/square", near)
        cube = w.add("Mul", [square, x], f"{out}/cube", near)
        small = w.add("Mul", [cube, w.real(0.044715)], f"{out}/small", near)
        inner = w.add("Add", [x, small], f"{out}/inner", near)
        bent = w.add("Tanh", [w.add("Mul", [inner, w.real(sqrt(2 / pi))], f"{out}/scaled", near)], f"{out}/bent", near)
    else:
        scaled = w.add("Div", [x, w.real(sqrt(2))], f"{out}/scaled", near)
        bent = w.add("Erf", [scaled], f"{out}/bent", near)
    gate = w.add("Add", [bent, w.real(1)], f"{out}/gate", near)
    w.add("Mul", [w.add("Mul", [x, gate], f"{out}/gated", near), w.real(0.5)], out, near)


def _reduce(w: _Writer, node: onnx.NodeProto) -> None:
    """Axes as an attribute (an input for ReduceSum), and integers through float: their sums are exact below 2^24."""
    x, near, out, kind = node.input[0], node.name, node.output[0], w.dtype(node.input[0])
    given = {"keepdims": _attributes(node).get("keepdims", 1)}
    axes = w.value(w.resolve(node.input[1])) if len(node.input) > 1 and node.input[1] else None
    if axes is None and len(node.input) > 1 and node.input[1]:
        raise ExportError(f"tensorrt: {near}: {node.op_type} over axes that are computed; they must be constant")
    inputs = [w.add("Cast", [x], f"{out}/float", near, to=TensorProto.FLOAT) if kind in _INTS else x]
    if axes is not None and node.op_type == "ReduceSum":
        inputs.append(w.ints(*axes.tolist()))
    elif axes is not None:
        given["axes"] = axes.tolist()
    w.add(node.op_type, inputs, f"{out}/reduced" if kind in _INTS else out, near, **given)
    if kind in _INTS:
        w.add("Cast", [f"{out}/reduced"], out, near, to=kind)


def _shape(w: _Writer, node: onnx.NodeProto) -> None:
    """Opset 13 has no start and end."""
    x, near, out, given = node.input[0], node.name, node.output[0], _attributes(node)
    rank = w.rank(x)
    if given.get("start", 0) == 0 and given.get("end", rank) == rank:
        w.add("Shape", [x], out, near)
        return
    if rank is None:
        raise ExportError(f"tensorrt: {near}: Shape of a value of unknown rank")
    start, end = (n + rank if n < 0 else n for n in (given.get("start", 0), given.get("end", rank)))
    whole = w.add("Shape", [x], f"{out}/whole", near)
    w.add("Slice", [whole, w.ints(start), w.ints(end), w.ints(0)], out, near)


def _squeeze(w: _Writer, node: onnx.NodeProto) -> None:
    if len(node.input) < 2 and w.rank(node.input[0]) == 1:
        w.add("Squeeze", [node.input[0], w.ints(0)], node.output[0], node.name)
    else:
        _copy(w, node)


def _logical(w: _Writer, node: onnx.NodeProto) -> None:
    """With a constant on one side it is the other side, or that constant."""
    neutral = node.op_type == "And"
    for constant, other in (node.input, node.input[::-1]):
        value = w.value(w.aliases.get(constant, constant))
        if value is not None and value.size == 1 and bool(value.reshape(())) is neutral:
            return _alias(w, node, other)
    return _copy(w, node)


def _through_ints(w: _Writer, node: onnx.NodeProto) -> None:
    """Gather, GatherND and Equal know no booleans."""
    x, near, out = node.input[0], node.name, node.output[0]
    if w.dtype(x) != TensorProto.BOOL:
        return _copy(w, node)
    number = [w.add("Cast", [x], f"{out}/int", near, to=TensorProto.INT32)]
    if node.op_type == "Equal":
        other = w.add("Cast", [node.input[1]], f"{out}/other", near, to=TensorProto.INT32)
        w.add("Equal", [*number, other], out, near)
        return None
    w.add(node.op_type, [*number, node.input[1]], f"{out}/found", near, **_attributes(node))
    w.add("Cast", [f"{out}/found"], out, near, to=TensorProto.BOOL)
    return None


def _through_float(w: _Writer, node: onnx.NodeProto) -> None:
    """ArgMax and MatMul take floats only."""
    near, out, kind = node.name, node.output[0], w.dtype(node.input[0])
    if kind in _FLOATS:
        return _copy(w, node)
    floats = [w.add("Cast", [x], f"{out}/float_{i}", near, to=TensorProto.FLOAT) for i, x in enumerate(node.input)]
    attributes = {k: v for k, v in _attributes(node).items() if k != "select_last_index" or v}
    w.add(node.op_type, floats, out if node.op_type == "ArgMax" else f"{out}/product", near, **attributes)
    if node.op_type != "ArgMax":
        w.add("Cast", [f"{out}/product"], out, near, to=kind)
    return None


def _cumsum(w: _Writer, node: onnx.NodeProto) -> None:
    """A product with a triangle of ones: the parser would unroll CumSum into a loop. Exact below 2^24."""
    x, near, out, kind = node.input[0], node.name, node.output[0], w.dtype(node.input[0])
    rank, axis, given = w.rank(x), w.value(w.resolve(node.input[1])), _attributes(node)
    if rank is None or axis is None or int(axis.reshape(())) not in (-1, rank - 1) or any(given.values()):
        raise ExportError(f"tensorrt: {near}: CumSum has a form here over the last axis only, forward and inclusive")
    size = w.add("Slice", [w.add("Shape", [x], f"{out}/shape", near), w.ints(-1), w.ints(INT32[1]), w.ints(0)],
                 f"{out}/size", near)  # fmt: skip
    n = w.add("Squeeze", [size, w.ints(0)], f"{out}/n", near)
    zero, one = w.constant(np.array(0, np.int64)), w.constant(np.array(1, np.int64))
    column = w.add("Range", [zero, n, one], f"{out}/column", near)
    row = w.add("Unsqueeze", [column, w.ints(1)], f"{out}/row", near)
    triangle = w.add("LessOrEqual", [row, column], f"{out}/triangle", near)
    ones = w.add("Cast", [triangle], f"{out}/ones", near, to=TensorProto.FLOAT)
    floats = w.add("Cast", [x], f"{out}/float", near, to=TensorProto.FLOAT)
    w.add("Cast", [w.add("MatMul", [floats, ones], f"{out}/sum", near)], out, near, to=kind)


def _where(w: _Writer, node: onnx.NodeProto) -> None:
    """Operands of one rank: the parser does not broadcast them."""
    ranks = [w.rank(w.aliases.get(x, x)) for x in node.input]
    if any(rank is None for rank in ranks) or len(set(ranks)) == 1:
        return _copy(w, node)
    most, inputs = max(rank or 0 for rank in ranks), []
    for i, (x, rank) in enumerate(zip(node.input, ranks, strict=True)):
        missing, value = most - (rank or 0), w.value(w.resolve(x))
        if not missing:
            inputs.append(x)
        elif value is not None:
            inputs.append(w.constant(value.reshape((1,) * missing + value.shape)))
        else:
            inputs.append(w.add("Unsqueeze", [x, w.ints(*range(missing))], f"{node.output[0]}/wide_{i}", node.name))
    w.nodes.append(helper.make_node("Where", [w.resolve(x) for x in inputs], node.output, node.name))
    return None


def _clip(w: _Writer, node: onnx.NodeProto) -> None:
    """Integers: the larger of one bound, the smaller of the other."""
    if w.dtype(node.input[0]) not in _INTS:
        return _copy(w, node)
    low, high = (*node.input[1:], "", "")[:2]
    x = node.input[0]
    if low:
        x = w.add("Max", [x, low], f"{node.output[0]}/low" if high else node.output[0], node.name)
    if high:
        w.add("Min", [x, high], node.output[0], node.name)
    return None


def _reciprocal(w: _Writer, node: onnx.NodeProto) -> None:
    w.add("Div", [w.real(1), node.input[0]], node.output[0], node.name)


def _mod(w: _Writer, node: onnx.NodeProto) -> None:
    """Of integers that are not negative."""
    (a, b), near, out = node.input, node.name, node.output[0]
    whole = w.add("Mul", [w.add("Div", [a, b], f"{out}/times", near), b], f"{out}/whole", near)
    w.add("Sub", [a, whole], out, near)


def _constant(w: _Writer, node: onnx.NodeProto) -> None:
    (name, value), out = next(iter(_attributes(node).items())), node.output[0]
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    array = numpy_helper.to_array(value) if name == "value" else np.array(value, kinds[name])
    w.weights[out] = numpy_helper.from_array(np.asarray(array), out)
    w.types[out] = (w.weights[out].data_type, np.shape(array))


def _constant_of_shape(w: _Writer, node: onnx.NodeProto) -> None:
    value = _attributes(node).get("value")
    array = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    w.add("Expand", [w.constant(array), node.input[0]], node.output[0], node.name)


def _plugin(w: _Writer, node: onnx.NodeProto) -> None:
    """
    The node of our plugin, with every operand: a table that is missing or has no columns becomes one of zeros, as
    the device has no empty tensor.
    """
    given = {**onnx_function.INTEGERS, "scale": 0.0, **_attributes(node)}
    inputs = [w.resolve(name) for name in node.input]
    sinks = w.value(inputs[6])
    if sinks is not None:
        nothing = np.zeros((len(sinks), 1), np.float32)
        inputs[6] = inputs[6] if sinks.shape[1] else w.constant(nothing)
        inputs += [w.constant(nothing)] * (len(inputs) < len(onnx_function.OPERANDS))
    attributes = {**given, "plugin_version": PLUGIN_VERSION, "plugin_namespace": ""}
    w.nodes.append(helper.make_node(PLUGIN, inputs, node.output, node.name, domain=onnx_function.DOMAIN, **attributes))


_RULES: dict[str, Callable[[_Writer, onnx.NodeProto], None]] = {
    "LayerNormalization": lambda w, node: _exactly(w, node, _layer_norm),
    "Gelu": _gelu,
    "Shape": _shape,
    "Squeeze": _squeeze,
    "And": _logical,
    "Or": _logical,
    "Gather": _through_ints,
    "GatherND": _through_ints,
    "Equal": _through_ints,
    "ArgMax": lambda w, node: _exactly(w, node, _through_float),
    "MatMul": _through_float,
    "CumSum": lambda w, node: _exactly(w, node, _cumsum),
    "Where": _where,
    "Clip": _clip,
    "Reciprocal": _reciprocal,
    "Mod": _mod,
    "Pow": lambda w, node: _exactly(w, node, _copy),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Identity": _alias,
    onnx_function.NAME: _plugin,
    **{f"Reduce{kind}": lambda w, node: _exactly(w, node, _reduce) for kind in ("Sum", "Mean", "L1", "L2", "Prod")},
    **{f"Reduce{kind}": _reduce for kind in ("Max", "Min")},
}
