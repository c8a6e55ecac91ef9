"""ONNX, by ONNX Runtime on the CPU. Any sequence length: a row runs at its natural one."""

import os
from typing import Any, Callable, Optional

# ONNX Runtime 1.29 and later report every session to their maker, unless this is set before they are imported
# (microsoft/onnxruntime pull 29843).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

from .. import cases, decoding, wire


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
    names = [tensor.name for tensor in entry.outputs]
    dtypes = {tensor.name: tensor.dtype for tensor in entry.inputs}
    nothing = decoding.nothing(entry)

    def run(row, every=False):
        # type: (cases.Row, bool) -> Any
        whole = dict(nothing, **row)
        feed = {name: array[None].astype(dtypes[name], copy=False) for name, array in whole.items()}
        outputs = session.run(names if every else names[:1], feed)
        return tuple(output[0] for output in outputs) if every else outputs[0][0]

    return run
