"""
LiteRT (TFLite) for the ai-edge-litert interpreter: one file, a signature a length, one copy of the weights.

Sparse attention becomes a STABLEHLO_COMPOSITE "edgeformer.dsa", which our delegate takes and any other interpreter
computes by its decomposition (see `attention.composite`).

What is fp32 and dense also opens in tflite-runtime 2.14, the last of its name, on systems too old for ai-edge-litert.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import flatbuffers
import litert_torch
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from litert_torch import fx_infra
from litert_torch.backend.composite.stablehlo_composite_builder import StableHLOCompositeBuilder

from edgeformer_agent import wire

from .. import rounding
from ..attention import composite, cost
from ..errors import ExportError
from ..model import Model
from ..program import Program

PRECISIONS = ("int8", "int4-embeddings", "int4", "fp32")
RUNTIME = wire.Runtime("ai-edge-litert", "2.0", "3")
RUNTIME_INT4 = wire.Runtime("ai-edge-litert", "2.1", "3")  # 2.0.3 computes groups wrongly, without an error
GLIBC = "2.34"  # read from the library's symbols; the wheel's tag claims 2.27
GLIBC_LEGACY = "2.29"  # of tflite-runtime 2.14, in the same way
ALIGNMENT = 16  # of every weight in the file, as the interpreter maps it
COMPOSITE, COMPOSITE_VERSION = "edgeformer.dsa", 1
BITS = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4}
_RULES = ("rule", "min_blocks", "max_blocks")


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """
    Static shapes, batch 1: a signature `length_N` for each of `model.lengths`, `length_0` where there is no sequence.
    Raises ExportError with the converter's own words.
    """
    kept, converted = cost.calibrated(model.history), cache(partial(_fp32, model))
    wide = any(rounding.wide(model, layer) for layer in rounding.layers(model.module).values())
    for precision in precisions:
        fp32 = converted(wide and precision != "fp32")
        packed = _share(fp32 if precision == "fp32" else _integers(fp32, rounding.chosen(model, precision)))
        sparse = COMPOSITE.encode() in packed
        yield Program(
            format="litert",
            precision=precision,
            files={"model.tflite": packed},
            inputs=model.inputs,
            outputs=(model.output,),
            lengths=model.lengths,
            runtime=RUNTIME_INT4 if precision.startswith("int4") else RUNTIME,
            needs=wire.Needs(glibc=GLIBC_LEGACY if precision == "fp32" and not sparse else GLIBC),
            work=_work(packed, kept),
            sparse=sparse,
        )


def _fp32(model: Model, apart: bool) -> bytes:
    """apart: with a decoder's huge values in rows of their own, for integers."""
    converter: Any = litert_torch
    module = _in_order(model.module)
    if apart:
        for name, layer in rounding.layers(module).items():
            if rounding.wide(model, layer):
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, rounding.Apart(layer))
    fx_infra.decomp.add_pre_convert_decomp(torch.ops.aten.index.Tensor, _index)
    if hasattr(torch.ops.edgeformer, "dsa"):  # the operator exists once a pass has put it into a model
        fx_infra.decomp.add_pre_convert_decomp(torch.ops.edgeformer.dsa.default, _composite)
    try:
        for length in model.lengths or (0,):
            converter = converter.signature(f"length_{length}", module, model.example(length))
        converted = converter.convert()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            converted.export(str(path))
            return path.read_bytes()
    except Exception as error:
        raise ExportError(f"litert: {model.name} does not convert: {type(error).__name__}: {error}") from error


def _in_order(module: torch.nn.Module) -> torch.nn.Module:
    """
    A copy without strided tensors. The converter (0.10) knows a constant by its address, and of a strided one it makes
    a copy that is gone when the next takes its address: several scorers would all be the first.
    """
    same: dict[int, Any] = {id(x): x if x.is_contiguous() else x.contiguous() for x in module.buffers()}
    for x in module.parameters():
        same[id(x)] = x if x.is_contiguous() else torch.nn.Parameter(x.detach().contiguous(), requires_grad=False)
    return copy.deepcopy(module, same)


def _index(x: torch.Tensor, indices: Any) -> Any:
    """tflite-runtime 2.14 gathers no truth values, which transformers' masks do: they go as integers."""
    if x.dtype != torch.bool:
        return NotImplemented
    return torch.ops.aten.index.Tensor(x.to(torch.int32), indices).to(torch.bool)


def _composite(q: Any, k: Any, v: Any, *rest: Any, compute: int = 0, **config: Any) -> Any:
    """The torch operator as a composite. Lengths are always operands, and the attributes are the schema's."""
    if reason := composite.inexpressible(**{name: config[name] for name in _RULES if name in config}):
        raise ValueError(reason)
    wq, wk, dist_bias, sink_bias, theta, q_len, kv_len, position_bias = (*rest, None, None, None)[:8]
    q_len, kv_len = (
        torch.full(x.shape[:1], x.shape[2], dtype=torch.int32) if given is None else given
        for x, given in ((q, q_len), (k, kv_len))
    )
    if not sink_bias.shape[1]:  # no tensor without elements in TFLite
        sink_bias = torch.zeros(q.shape[1], 1)
    config = {name: value for name, value in config.items() if name not in ("rule", "max_blocks")}
    attributes = {"version": COMPOSITE_VERSION, "compute": compute, **config}
    builder = StableHLOCompositeBuilder(COMPOSITE, attr=attributes)
    last = () if position_bias is None else (position_bias,)
    marked = builder.mark_inputs(q, k, v, wq, wk, dist_bias, sink_bias, theta, q_len, kv_len, *last)
    return builder.mark_outputs(composite.dsa(*marked, **config))


def _integers(data: bytes, chosen: rounding.Chosen) -> bytes:
    """Dynamic range: the interpreter quantizes activations per call, a token at a time."""
    plan = recipe_manager.RecipeManager()
    plan.add_dynamic_config(".*", qtyping.TFLOperationName.ALL_SUPPORTED, 8)
    for place, kind, precision in _others(data, chosen):
        if precision in rounding.MOST:
            plan.add_dynamic_config(place, kind, 4, qtyping.QuantGranularity(f"BLOCKWISE_{rounding.GROUP}"))
        else:
            plan.add_quantization_config(place, kind, algorithm_key=recipe_manager.AlgorithmName.NO_QUANTIZE)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.tflite", Path(folder) / "quantized.tflite"
        source.write_bytes(data)
        quantizer.Quantizer(str(source), plan.get_quantization_recipe()).quantize().export_model(str(target))
        return target.read_bytes()


def _others(data: bytes, chosen: rounding.Chosen) -> Iterator[tuple[str, Any, str]]:
    """What is not int8: a pattern of its place, as the quantizer names places, the kind of operator, the precision."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    kinds = {schema.BuiltinOperator.FULLY_CONNECTED: False, schema.BuiltinOperator.EMBEDDING_LOOKUP: True}
    found: dict[int, str] = {}  # buffer -> precision: signatures share weights
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = _code(model, operator)
            weight = graph.tensors[operator.inputs[1]] if code in kinds else None
            if weight is None or not _content(data, model.buffers[weight.buffer]):
                continue
            if weight.buffer not in found:
                matrix = np.frombuffer(_content(data, model.buffers[weight.buffer]), np.float32)
                found[weight.buffer] = chosen.of(matrix.reshape(weight.shape), table=kinds[code])
            if found[weight.buffer] != "int8":
                names = ";".join(graph.tensors[i].name.decode() for i in operator.outputs)
                kind = "EMBEDDING_LOOKUP" if kinds[code] else "FULLY_CONNECTED"
                yield f"^{re.escape(names)};$", qtyping.TFLOperationName[kind], found[weight.buffer]


class _Once:
    """A flatbuffer table that several owners point to and that is written once."""

    def __init__(self, table: Any) -> None:
        self.table, self.builder, self.offset = table, None, 0

    def Pack(self, builder: Any) -> int:  # noqa: N802 (the name the generated code calls)
        if self.builder is not builder:
            self.builder, self.offset = builder, self.table.Pack(builder)
        return self.offset


def _share(data: bytes) -> bytes:
    """
    Writes what the signatures have in common once. The converter repeats the scales of every weight in every signature
    and folds a position table of its own for each length; a table that begins a longer one becomes a view into it.
    Weights follow the flatbuffer, so that a view is an offset and a size.
    """
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    contents = [_content(data, buffer) for buffer in model.buffers]
    scales: dict[bytes, _Once] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.quantization is not None:
                tensor.quantization = scales.setdefault(_key(tensor.quantization), _Once(tensor.quantization))
    places, blob = _lay_out(contents)
    start = 0
    for _ in range(
        2
    ):  # the length of the flatbuffer does not depend on the offsets in it, but is known after one round
        for buffer, place, content in zip(model.buffers, places, contents, strict=True):
            buffer.data = None
            buffer.offset, buffer.size = (start + place, len(content)) if content else (0, 0)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        head = bytes(builder.Output())
        start = -(-len(head) // ALIGNMENT) * ALIGNMENT + ALIGNMENT  # never 0 or 1: those mean "inside"
    return head.ljust(start, b"\0") + blob


def _content(data: bytes, buffer: Any) -> bytes:
    if buffer.offset and buffer.offset > 1:
        return data[buffer.offset : buffer.offset + buffer.size]
    return b"" if buffer.data is None else bytes(np.asarray(buffer.data, np.uint8))


def _key(quantization: Any) -> bytes:
    return repr(
        [(k, None if v is None else np.asarray(v).tobytes()) for k, v in sorted(vars(quantization).items())]
    ).encode()


def _lay_out(contents: list[bytes]) -> tuple[list[int], bytes]:
    """The place of each content in one blob; equal contents, and those that begin another, share a place."""
    order = sorted(
        range(len(contents)), key=lambda i: contents[i], reverse=True
    )  # a prefix comes right after its longest
    places, blob, last = [0] * len(contents), bytearray(), b""
    place = 0
    for i in order:
        if not last.startswith(contents[i]) or not last:
            blob.extend(b"\0" * (-len(blob) % ALIGNMENT))
            place, last = len(blob), contents[i]
            blob.extend(last)
        places[i] = place
    return places, bytes(blob)


def _work(data: bytes, kept: cost.Kept) -> tuple[wire.Work, ...]:
    """Counted on the operators of each signature. A multiply-add is two operations."""
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    counted = []
    for signature in model.signatureDefs:
        length = int(signature.signatureKey.decode().removeprefix("length_"))
        counted.append(_graph_work(model, model.subgraphs[signature.subgraphIndex], length, kept))
    return tuple(sorted(counted))


def _graph_work(model: Any, graph: Any, length: int, kept: cost.Kept) -> wire.Work:
    builtin = schema.BuiltinOperator
    products = (builtin.FULLY_CONNECTED, builtin.BATCH_MATMUL, builtin.CONV_2D)
    work = {False: 0.0, True: 0.0}
    weight_bytes = activation_bytes = 0.0
    for operator in graph.operators:
        if _is_composite(operator):
            q, k, _v, wq = ([int(n) for n in graph.tensors[i].shape] for i in operator.inputs[:4])
            work[False] += cost.operations(q, k, wq[2], kept)
            activation_bytes += 4.0 * (2 * prod(q) + 2 * prod(k))
            continue
        if _code(model, operator) not in products:
            continue
        left, right, out = (graph.tensors[i] for i in (*operator.inputs[:2], operator.outputs[0]))
        constant = model.buffers[right.buffer].size > 0
        bits = BITS.get(right.type, 32)
        work[bits < 32] += 2.0 * prod(out.shape) * _depth(_code(model, operator), operator, left, right)
        weight_bytes += prod(right.shape) * bits / 8 * constant
        activation_bytes += 4.0 * (prod(left.shape) + prod(out.shape) + prod(right.shape) * (not constant))
    return wire.Work(length, *map(float, (work[False], work[True], weight_bytes, activation_bytes)))


def _is_composite(operator: Any) -> bool:
    return getattr(operator.builtinOptions2, "name", None) == COMPOSITE.encode()


def _code(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def _depth(code: int, operator: Any, left: Any, right: Any) -> int:
    """Multiply-adds behind one output value."""
    if code == schema.BuiltinOperator.BATCH_MATMUL:
        return int(left.shape[-2 if operator.builtinOptions.adjX else -1])
    return int(prod(right.shape[1:]))
