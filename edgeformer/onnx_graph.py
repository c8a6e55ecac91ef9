"""What the formats built on ONNX share: a model traced once, cleaned, and the work counted on what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgeformer_agent import wire

from .attention import cost, onnx_function
from .errors import ExportError
from .model import Model

OPSET = onnx_function.OPSET  # 20: the first with Gelu as one operator; ONNX Runtime >= 1.17 opens it
IR_VERSION = 9  # the exporter's newer one would shut out ONNX Runtime 1.17
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "Conv", "ConvInteger", onnx_function.NAME)
FROM_WEIGHTS = ("Transpose", "Reshape", "DequantizeLinear")  # of one matrix, what is another form of it
INTEGER = ("MatMulInteger", "MatMulNBits", "ConvInteger")
DTYPES = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}


def trace(model: Model, format: str) -> onnx.ModelProto:
    """fp32, any batch, any length up to `model.max_length`. Raises ExportError in the exporter's own words."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    sequence = torch.export.Dim("sequence", min=1, max=max(model.max_length, 2))
    shapes = tuple({0: batch} | {i: sequence for i, n in enumerate(x.shape) if n < 0 and i} for x in model.inputs)
    # Two rows, and a length that is neither 1 nor the maximum, so that no dimension is taken for a constant.
    example = model.example(min(16, max(model.max_length - 1, 2)), batch=2)
    if model.past is not None:
        shapes += ({0: batch, 3: torch.export.Dim("past", min=2)},)  # the graph takes none and one as well
        example += (torch.zeros([2 if i == 0 else 3 if n < 0 else n for i, n in enumerate(model.past.shape)]),)
    try:
        with torch.no_grad():
            graph = torch.export.export(model.module, example, dynamic_shapes=(shapes,), strict=False)
            exported = torch.onnx.export(
                graph,
                dynamo=True,
                opset_version=OPSET,
                input_names=[x.name for x in model.program_inputs],
                output_names=[x.name for x in model.program_outputs],
                custom_translation_table=_translations(),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"{format}: {model.name} does not export: {type(error).__name__}: {error}") from error
    if exported is None:
        raise ExportError(f"{format}: {model.name}: the exporter returned nothing")
    proto = exported.model_proto
    strip(proto)
    onnx_function.attach(proto)
    return proto


def _translations() -> dict[Any, Callable[..., Any]]:
    """torch operator -> what writes its ONNX node. The operator exists once a pass has put it into a model."""
    known = hasattr(torch.ops.edgeformer, "dsa")
    return {torch.ops.edgeformer.dsa.default: onnx_function.node} if known else {}


def strip(proto: onnx.ModelProto) -> None:
    """Only what a runtime reads: the exporter's stack traces name the machine that built it."""
    proto.ir_version = IR_VERSION
    proto.producer_name = "edgeformer"
    proto.producer_version = ""
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    # Stale shapes make the quantizer fail on classification heads ("Inferred shape and existing shape differ").
    del proto.graph.value_info[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def work(proto: onnx.ModelProto, model: Model) -> tuple[wire.Work, ...]:
    """
    Counted on the program itself: it runs once per length with its matrix products' operands as outputs, because shape
    inference stops at the computed shapes of a dynamic graph. A multiply-add is two operations.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    weights = {w.name: w for w in graph.graph.initializer}
    turned = {name: weights[source] for name, source in transposed(graph.graph, FROM_WEIGHTS).items()}
    products = [node for node in graph.graph.node if node.op_type in PRODUCTS]
    seen = {name for node in products for name in (*node.input[:4], node.output[0]) if name and name not in weights}
    known = {value.name for value in (*graph.graph.output, *graph.graph.input)}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(seen - known))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps every name
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kept = cost.calibrated(model.history)
    return tuple(_work_at(session, products, weights | turned, n, kept) for n in kept.counted(model.lengths))


def transposed(graph: onnx.GraphProto, operators: Sequence[str] = ("Transpose",)) -> dict[str, str]:
    """Name -> the constant matrix it is the transpose of: a table that also is the matrix of a head."""
    constants = {w.name for w in graph.initializer if len(w.dims) == 2}
    return {n.output[0]: n.input[0] for n in graph.node if n.op_type in operators and n.input[0] in constants}


def _sizes(x: Any, length: int) -> list[int]:
    """One row of `length` tokens after none: of what is free, the first axis is the batch."""
    free = {0: 1} | {i: 0 for i, d in enumerate(x.shape) if d == "past"}
    return [d if isinstance(d, int) else free.get(i, length) for i, d in enumerate(x.shape)]


def _work_at(session: Any, products: list[Any], weights: dict[str, Any], length: int, kept: cost.Kept) -> wire.Work:
    feed = {x.name: np.ones(_sizes(x, length), DTYPES[x.type]) for x in session.get_inputs()}
    names = [x.name for x in session.get_outputs()]
    shapes = {name: tuple(w.dims) for name, w in weights.items()} | {name: array.shape for name, array in feed.items()}
    shapes |= {name: array.shape for name, array in zip(names, session.run(names, feed), strict=True)}
    work = {False: 0.0, True: 0.0}
    weight_bytes = activation_bytes = 0.0
    for node in products:
        left, right, out = (shapes[name] for name in (*node.input[:2], node.output[0]))
        if node.op_type == onnx_function.NAME:
            work[False] += cost.operations(left, right, shapes[node.input[3]][2], kept)
            activation_bytes += 4.0 * (2 * prod(left) + 2 * prod(right))
            continue
        depth = prod(right[1:]) if node.op_type.startswith("Conv") else prod(left) // prod(out[:-1])
        stored = weights.get(node.input[1])
        integer = node.op_type in INTEGER or (stored is not None and stored.data_type == onnx.TensorProto.INT8)
        work[integer] += 2.0 * prod(out) * depth
        item = onnx.helper.tensor_dtype_to_np_dtype(stored.data_type).itemsize if stored is not None else 4
        weight_bytes += prod(right) * item * (stored is not None)
        activation_bytes += 4.0 * (prod(left) + prod(out) + prod(right) * (stored is None))
    return wire.Work(length, work[False], work[True], weight_bytes, activation_bytes)
