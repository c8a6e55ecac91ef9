"""
TensorRT 8.2 on a Jetson; anywhere else a stand-in that says so.

On the device the program's own C++ and CUDA sources are compiled once with JetPack's compilers, the engine is built once
from the ONNX file, and both are kept in the user's cache under a hash of everything that went in. Where there is no
TensorRT, ONNX Runtime computes the standard-operator file on the CPU, which is what the build machine's check needs.
fp16 is then modelled: every floating-point result and weight is rounded to fp16, arithmetic inside an operator is fp32,
and the nodes that the engine keeps in fp32 are not rounded. The order of the GPU's sums is not modelled.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, List, Optional, Set

import numpy as np

from .. import cases, wire

try:
    _NVINFER = ctypes.CDLL("libnvinfer.so.8")  # type: Optional[ctypes.CDLL]
except OSError:
    _NVINFER = None
    # ONNX Runtime 1.29 and later report every session to their maker, unless told before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

PLAN, STANDARD, PLUGIN = "build.txt", "model.onnx", "plugin.onnx"
CUDA = "/usr/local/cuda"
FLAGS = ["-std=c++14", "-O3", "-shared", "-fPIC"]
ARCHITECTURES = ["-gencode=arch=compute_53,code=sm_53", "-gencode=arch=compute_53,code=compute_53"]  # code, and PTX
MESSAGE = 1024  # bytes of an error text
MOST_OUTPUT = 1 << 20  # values of one row's output


def version():
    # type: () -> str
    """Of TensorRT; where there is none, a text that no program's range admits."""
    if _NVINFER is None:
        return "0 (none here; onnxruntime {} stands in)".format(onnxruntime.__version__)
    number = int(_NVINFER.getInferLibVersion())
    return "{}.{}.{}".format(number // 1000, number // 100 % 10, number % 100)


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    """`path` is the standard-operator file. Raises ValueError or OSError with what is missing."""
    if library is not None:
        raise ValueError("tensorrt: {}: the plugin is built on the device, not carried".format(library))
    if entry.precision not in ("fp16", "fp32"):
        raise ValueError("tensorrt: precision {!r}: this runner has fp16 and fp32".format(entry.precision))
    if _NVINFER is None:
        return _stand_in(path, entry, threads)
    return _engine(path, entry)


# --- the stand-in -----------------------------------------------------------------------------------------------------


def _stand_in(path, entry, threads):
    # type: (str, wire.Entry, int) -> Callable[[cases.Row], Any]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if entry.precision == "fp16":
        # No optimization may see that a number is rounded and widened again.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with open(os.path.join(os.path.dirname(path), PLAN)) as file:
            model = _rounded(path, _exact(file.read()))
    else:
        with open(path, "rb") as binary:
            model = binary.read()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = [entry.outputs[0].name]
    dtypes = {tensor.name: tensor.dtype for tensor in entry.inputs}

    def run(row):
        # type: (cases.Row) -> Any
        feed = {name: array[None].astype(dtypes[name], copy=False) for name, array in row.items()}
        return session.run(outputs, feed)[0][0]

    return run


def _exact(plan):
    # type: (str) -> Set[str]
    """The nodes of the standard-operator file that stay fp32."""
    words = [line.split() for line in plan.splitlines()]
    return {w[2] for w in words if w[:2] == ["fp32", STANDARD]}


def _rounded(path, exact):
    # type: (str, Set[str]) -> bytes
    """The graph with every fp32 result outside `exact`, and every weight used there, rounded to fp16 and back."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    typed = onnx.shape_inference.infer_shapes(model).graph
    floats = {v.name for v in typed.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    nodes, used = [], set()  # type: List[Any], Set[str]
    for node in model.graph.node:
        half = node.name not in exact
        used |= set(node.input) if half else set()
        nodes.append(node)
        for i, name in enumerate(node.output):
            if half and name in floats:
                node.output[i] = name + "/wide"
                nodes.append(helper.make_node("Cast", [name + "/wide"], [name + "/half"], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [name + "/half"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and weight.name in used:
            with np.errstate(over="ignore"):
                array = numpy_helper.to_array(weight).astype(np.float16).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return bytes(model.SerializeToString())
