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

PRECISIONS = ("int8", "int4-embeddings", "int4", "int8-static", "fp32")
RUNTIME = wire.Runtime("onnxruntime", "1.17", "2")
RUNTIME_INT4 = wire.Runtime("onnxruntime", "1.22", "2")  # the first that looks up rows of int4 as written here
GLIBC = "2.28"  # read from the library's symbols


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """One file each, any batch, any length up to `model.max_length`. Raises ExportError in the exporter's own words."""
    fp32 = onnx_graph.trace(model, "onnx")
    for precision in precisions:
        proto, narrower = onnx_int8.written(fp32, model, precision)
        yield Program(
            format="onnx",
            precision=precision,
            files={"model.onnx": proto.SerializeToString(deterministic=True)},
            inputs=model.program_inputs,
            outputs=model.program_outputs,
            lengths=(),
            runtime=RUNTIME_INT4 if onnx_int8.grouped(proto) else RUNTIME,
            needs=wire.Needs(glibc=GLIBC),
            work=onnx_graph.work(proto, model),
            sparse=onnx_function.present(proto),
            narrower=narrower,
        )
