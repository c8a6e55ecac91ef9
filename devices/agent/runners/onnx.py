"""ONNX, by ONNX Runtime on the CPU. Any sequence length: a row runs at its natural one."""

import os
from typing import Any, Callable, Optional

# ONNX Runtime 1.29 and later report every session to their maker, unless this is set before they are imported
# (microsoft/onnxruntime pull 29843).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

from .. import cases, wire


def version(library=None):  # noqa: ARG001 (the library does not bring the runtime)
    # type: (Optional[str]) -> str
    return str(onnxruntime.__version__)


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(library)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [entry.outputs[0].name]
    dtypes = {tensor.name: tensor.dtype for tensor in entry.inputs}

    def run(row):
        # type: (cases.Row) -> Any
        feed = {name: array[None].astype(dtypes[name], copy=False) for name, array in row.items()}
        return session.run(outputs, feed)[0][0]

    return run
