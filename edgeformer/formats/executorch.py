"""
ExecuTorch (.pte): XNNPACK for matrix products and what surrounds them, any sequence length, batch 1.

Sparse attention is the operator `edgeformer::dsa.out` in the method `forward`; the method `standard` computes it in
standard operators. Both share one copy of the weights, and the runner takes the one it has kernels for.

A decoder's program starts with these methods and goes on with `forward_next` (`standard_next`): one token after those
whose keys and values it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import executorch.exir.passes._quant_patterns_and_replacements  # defines quantized_decomposed::embedding_byte
import executorch.kernels.quantized  # noqa: F401 (and its out variant)
import torch
from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
from executorch.backends.xnnpack.partition.config.generic_node_configs import BMMConfig, GeluConfig, SoftmaxConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from torch.ao.quantization.fx import _decomposed  # noqa: F401 (defines the rest of quantized_decomposed)

from edgeformer_agent import wire

from .. import rounding
from ..attention import composite, cost
from ..errors import ExportError
from ..model import Model
from ..program import Program

PRECISIONS = ("int8", "int4-embeddings", "int4", "fp32")
RUNTIME = wire.Runtime("executorch", "1.5", "2")
GLIBC = "2.27"  # read from the libraries' symbols; the wheel's tag claims 2.28
NATIVE, STANDARD = "forward", "standard"
NEXT = "_next"  # ends the names of a decoder's methods for a further token
PRODUCTS = ("linear", "matmul", "bmm", "mm", "addmm", "conv2d", "convolution")
# What XNNPACK gets of the standard form. It takes a padding that depends on the length for a constant.
PLAIN = [LinearConfig, BMMConfig, SoftmaxConfig, GeluConfig]
MOST_JOINED = 5  # tensors in one concatenation of XNNPACK's
LEAST, GREATEST = -8, 7  # of int4, as XNNPACK and the embedding's kernel want it said

Tensor = torch.Tensor
quantized: Any = torch.ops.quantized_decomposed


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """One file each, batch 1, any length up to `model.max_length`. Raises ExportError in the exporter's own words."""
    kept = cost.calibrated(model.history)
    for precision in precisions:
        module = model.module if precision == "fp32" else _integers(model, precision)
        try:
            graph = _graph(model, module)
            further = {} if model.past is None else {NEXT: _next_graph(model, module, model.past)}
            content = _lowered({"": graph, **further}, max(model.max_length, 2))
        except Exception as error:
            raise ExportError(
                f"executorch: {model.name} does not lower in {precision}: {type(error).__name__}: {error}"
            ) from error
        yield Program(
            format="executorch",
            precision=precision,
            files={"model.pte": content},
            inputs=model.program_inputs,
            outputs=model.program_outputs,
            lengths=(),
            runtime=RUNTIME,
            needs=wire.Needs(glibc=GLIBC),
            work=tuple(_work(graph, n, kept) for n in kept.counted(model.lengths)),
            sparse=_sparse(graph),
        )


def _graph(model: Model, module: torch.nn.Module) -> Any:
    sequence = torch.export.Dim("sequence", min=1, max=max(model.max_length, 2))
    shapes = tuple({i: sequence for i, n in enumerate(x.shape) if n < 0 and i} for x in model.inputs)
    # Neither 1 nor the maximum, and as many blocks as there can be: a size of 1 would be taken for a constant.
    example = model.example(max(model.max_length - 1, 2))
    with torch.no_grad():
        start = module if model.past is None else _Start(module, model.past)
        return torch.export.export(start, example, dynamic_shapes=(shapes,), strict=False)


class _Start(torch.nn.Module):
    """A decoder from its first token on: it also gives the keys and values."""

    def __init__(self, decoder: torch.nn.Module, past: wire.Tensor) -> None:
        super().__init__()
        self.decoder, self.nothing = decoder, torch.zeros([1, *(max(n, 0) for n in past.shape[1:])])

    def forward(self, *tensors: Tensor) -> Any:
        return self.decoder(*tensors, self.nothing)


def _next_graph(model: Model, module: torch.nn.Module, past: wire.Tensor) -> Any:
    """One token after up to `model.max_length` - 1 others."""
    most = model.max_length - 1
    before = torch.zeros([1, *(most if n < 0 else n for n in past.shape[1:])])
    shapes = (*({} for _ in model.inputs), {3: torch.export.Dim.AUTO(min=1, max=most)})
    with torch.no_grad():
        return torch.export.export(module, (*model.example(1), before), dynamic_shapes=(shapes,), strict=False)


def _lowered(graphs: dict[str, Any], longest: int) -> bytes:
    """`graphs`: what follows the methods' names -> graph."""
    methods, partitioners = {}, {}
    for suffix, graph in graphs.items():
        methods[NATIVE + suffix], partitioners[NATIVE + suffix] = graph, [_partitioner(graph)]
        if _sparse(graph):
            standard = graph.run_decompositions({torch.ops.edgeformer.dsa.default: partial(_standard, longest)})
            _merge(standard.graph)  # what a layer says about blocks and lengths, every layer says
            methods[STANDARD + suffix], partitioners[STANDARD + suffix] = standard, [_partitioner(graph, PLAIN)]
    lowered = to_edge_transform_and_lower(
        methods,
        partitioner=partitioners,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return bytes(lowered.to_executorch().buffer)


def _partitioner(graph: Any, operators: list[Any] | None = None) -> Any:
    """
    XNNPACK runs 17 passes over each part it gets, half of the time of an export, and text models need one of them:
    this key asks for that one. The others are for convolutions.
    """
    made = XnnpackPartitioner(operators)
    if joined := made.target_partitioner_configs.get("cat.default"):
        joined.check_constraints = partial(_few_parts, joined.check_constraints)
    made.ops_to_not_decompose = partial(_kept_whole, made.ops_to_not_decompose)
    if not any("conv" in _name(node) for node in graph.graph.nodes):
        made.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
    return made


def _kept_whole(rule: Callable[[Any], Any], program: Any) -> tuple[Any, Callable[[Any], bool] | None]:
    """
    The operators that XNNPACK wants undivided, and by which rule it would leave one. Where it leaves none there is no
    rule to follow, and a graph is traced twice instead of three times.
    """
    operators, takes = rule(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and node.target in operators]
    return operators, None if all(map(takes, nodes)) else takes


def _few_parts(other_rules: Callable[[Any, Any], bool], node: Any, program: Any) -> bool:
    """The partitioner asks for tensors that XNNPACK cannot join: a decoder joins the keys and values of all layers."""
    return len(node.args[0]) <= MOST_JOINED and other_rules(node, program)


def _sparse(graph: Any) -> bool:
    return any(_name(node) == "dsa" for node in graph.graph.nodes)


def _merge(graph: Any) -> None:
    """One node for those that say the same. No text twice: `repr` tells 1 from 1.0, a key of values does not."""
    seen: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.users:
            first = seen.setdefault(repr((node.target, node.args, node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _standard(longest: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **config: Any) -> Tensor:
    """The operator as its decomposition; attention in float, whatever `compute` asks of the native one."""
    config.pop("compute", None)
    if reason := composite.inexpressible(**{n: config.pop(n) for n in ("rule", "max_blocks") if n in config}):
        raise ValueError(reason)
    wq, wk, dist_bias, sink_bias, theta, q_len, kv_len, position_bias = (*rest, None, None, None)[:8]
    q_len, kv_len = (
        torch.full(x.shape[:1], x.shape[2], dtype=torch.int32) if given is None else given
        for x, given in ((q, q_len), (k, kv_len))
    )
    operands = (q, k, v, wq, wk, dist_bias, sink_bias, theta, q_len, kv_len, position_bias)
    return composite.dsa(*operands, longest=longest, **config)


# --- int8 and int4 ---------------------------------------------------------------------------------------------------


class _Linear(torch.nn.Module):
    """
    int8 weights a row, or int4 a group of one; activations quantized a token at a time. XNNPACK knows this sequence as
    one operator.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, linear: torch.nn.Linear, precision: str) -> None:
        super().__init__()
        self.bias: torch.nn.Parameter | None = linear.bias
        self.grouped = precision == "int4"
        values, scales = rounding.stored(linear.weight, precision)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales if self.grouped else scales[:, 0].contiguous())
        self.register_buffer("zeros", torch.zeros_like(self.scales, dtype=torch.int32 if self.grouped else torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = quantized.choose_qparams_per_token_asymmetric(x, torch.int8)
        x = quantized.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
        x = quantized.dequantize_per_token(x, scale, zero, -128, 127, torch.int8, torch.float32)
        if self.grouped:
            weight = quantized.dequantize_per_channel_group(
                self.values, self.scales, self.zeros, LEAST, GREATEST, torch.int8, rounding.GROUP, torch.float32
            )
        else:
            weight = quantized.dequantize_per_channel(self.values, self.scales, self.zeros, 0, -127, 127, torch.int8)
        return torch.nn.functional.linear(x, weight, self.bias)


class _Embedding(torch.nn.Module):
    """int8 rows with a scale each, or int4 with one for each group of a row, two values a byte."""

    def __init__(self, table: torch.nn.Embedding, precision: str) -> None:
        super().__init__()
        values, scales = rounding.stored(table.weight, precision)
        self.grouped = precision == "int4"
        if self.grouped:
            above = (values - LEAST).to(torch.uint8)
            values = above[:, 0::2] * 16 + above[:, 1::2]
        self.register_buffer("values", values)
        self.register_buffer("scales", scales if self.grouped else scales[:, 0].contiguous())

    def forward(self, indices: Tensor) -> Tensor:
        ids = indices.to(torch.int64)
        if self.grouped:
            found: Tensor = quantized.embedding_4bit(self.values, self.scales, None, LEAST, GREATEST, ids)
        else:
            found = quantized.embedding_byte(self.values, self.scales, None, -128, 127, ids)
        return found


def _integers(model: Model, precision: str) -> torch.nn.Module:
    """A copy with linears and embeddings in integers; it shares every other weight."""
    shared = {id(x): x for x in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, shared)
    kinds = {torch.nn.Linear: _Linear, torch.nn.Embedding: _Embedding}
    known, made = rounding.layers(module), {}
    for name, found in rounding.asked(model, precision).items():
        if found in rounding.MOST:
            layer = known[name]
            made[id(layer)] = kinds[type(layer)](layer, found)
            if rounding.wide(model, layer):
                made[id(layer)] = rounding.Apart(made[id(layer)])
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return module.eval().requires_grad_(False)


# --- work -------------------------------------------------------------------------------------------------------------


def _name(node: Any) -> str:
    return (
        str(getattr(getattr(node.target, "overloadpacket", None), "__name__", "")) if node.op == "call_function" else ""
    )


def _work(graph: Any, length: int, kept: cost.Kept) -> wire.Work:
    """Counted on the operators of the lowered graph at one length. A multiply-add is two operations."""
    work = {False: 0.0, True: 0.0}
    weight_bytes = activation_bytes = 0.0
    for node in graph.graph.nodes:
        name = _name(node)
        if name == "dsa":
            q, k, _v, wq = (_shape(x, length) for x in node.args[:4])
            work[False] += cost.operations(q, k, wq[2], kept)
            activation_bytes += 4.0 * (2 * prod(q) + 2 * prod(k))
        elif name in PRODUCTS:
            a, b = node.args[1:3] if name == "addmm" else node.args[:2]
            left, right, out = (_shape(x, length) for x in (a, b, node))
            bits = {"dequantize_per_channel": 8, "dequantize_per_channel_group": 4}.get(_name(b), 32)
            constant = bits < 32 or b.op in ("placeholder", "get_attr")
            depth = prod(right[1:]) if "conv" in name else left[-1]
            work[bits < 32] += 2.0 * prod(out) * depth
            weight_bytes += prod(right) * bits / 8 * constant
            activation_bytes += 4.0 * (prod(left) + prod(out) + prod(right) * (not constant))
    return wire.Work(length, work[False], work[True], weight_bytes, activation_bytes)


def _shape(node: Any, length: int) -> tuple[int, ...]:
    """Of a tensor in the graph, at a length: the sequence is the graph's only symbol."""
    sizes = (getattr(getattr(n, "node", None), "expr", n) for n in node.meta["val"].shape)
    return tuple(int(n if isinstance(n, int) else n.subs(dict.fromkeys(n.free_symbols, length))) for n in sizes)
