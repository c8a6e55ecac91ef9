"""
ONNX for ONNX Runtime: dynamic batch and sequence, standard operators, opset 20.

A model with sparse attention has DSA nodes and the function that says what they mean in standard operators: the file
runs with or without our library (see `attention.onnx_function`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgeformer_agent import wire

from .. import onnx_graph, onnx_int8
from ..attention import onnx_function
from ..model import Model
from ..program import Program

PRECISIONS = ("int8", "fp32")
RUNTIME = wire.Runtime("onnxruntime", "1.17", "2")
GLIBC = "2.28"  # read from the library's symbols


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """One file each, any batch, any length up to `model.max_length`. Raises ExportError in the exporter's own words."""
    fp32 = onnx_graph.trace(model, "onnx")
    int8 = onnx_int8.by_row if model.task.kind == "next_token" else onnx_int8.by_tensor
    for precision in precisions:
        proto = int8(fp32) if precision == "int8" else fp32
        yield Program(
            format="onnx",
            precision=precision,
            files={"model.onnx": proto.SerializeToString(deterministic=True)},
            inputs=model.program_inputs,
            outputs=model.program_outputs,
            lengths=(),
            runtime=RUNTIME,
            needs=wire.Needs(glibc=GLIBC),
            work=onnx_graph.work(proto, model),
            sparse=onnx_function.present(proto),
        )
