"""
ExecuTorch (.pte), by its Python runtime. Any sequence length: a row runs at its natural one.

A program with sparse attention has two methods with one copy of the weights: `forward` needs our operator, `standard`
computes it in standard operators.
"""

from typing import Any, Callable, List, Optional

import executorch.kernels.quantized
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from executorch.version import __version__

from .. import cases, wire

OPERATOR, NATIVE, STANDARD = "edgeformer::dsa.out", "forward", "standard"


def version():
    # type: () -> str
    return str(__version__)


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    if portable_lib._threadpool_get_thread_count() != threads:
        portable_lib._unsafe_reset_threadpool(threads)
    runtime = Runtime.get()
    program = runtime.load_program(path)
    native = STANDARD not in program.method_names or OPERATOR in runtime.operator_registry.operator_names
    method = program.load_method(NATIVE if native else STANDARD)

    def run(row):
        # type: (cases.Row) -> Any
        feed = [torch.from_numpy(row[x.name][None].astype(x.dtype)) for x in entry.inputs]
        return method.execute(feed)[0][0].numpy().copy()

    return run
