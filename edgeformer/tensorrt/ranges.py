"""
Which nodes fp16 has no room for: the fp32 graph runs on sample rows, and what meets values near 65504 is named.

`lower` knows where sums and squares overflow in any model. What a model's own activations need is seen here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from edgeformer_agent import cases

from .lower import FP16_MOST

ROWS = 4
HEADROOM = 2  # other rows may have larger values than those seen


def peaks(proto: onnx.ModelProto, rows: Sequence[cases.Row]) -> dict[str, float]:
    """Name of a floating-point value -> its largest absolute value over `ROWS` of the rows."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps every name
    session = onnxruntime.InferenceSession(_told(proto), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs() if x.type == "tensor(float)"]
    given = [x.name for x in session.get_inputs()]
    found = dict.fromkeys(names, 0.0)
    for row in rows[:: -(-len(rows) // ROWS)]:
        for name, array in zip(names, session.run(names, {key: row[key][None] for key in given}), strict=True):
            found[name] = max(found[name], float(np.abs(array).max(initial=0)))
    return found


def loud(proto: onnx.ModelProto, seen: Mapping[str, float]) -> Iterator[str]:
    """The nodes that an fp16 engine must compute in fp32: their operands or results come near the end of fp16."""
    high = {name for name, peak in seen.items() if not peak * HEADROOM <= FP16_MOST}
    return (node.name for node in proto.graph.node if high & {*node.input, *node.output})


def _told(proto: onnx.ModelProto) -> bytes:
    """The file with every value as an output. No copy of the graph: its weights are most of the memory."""
    outputs = proto.graph.output
    count, known = len(outputs), {x.name for x in outputs}
    names = (name for node in proto.graph.node for name in node.output if name and name not in known)
    outputs.extend(onnx.ValueInfoProto(name=name) for name in names)
    data: bytes = proto.SerializeToString()
    del outputs[count:]
    return data
