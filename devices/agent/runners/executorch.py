"""
ExecuTorch (.pte), by its Python runtime. Any sequence length: a row runs at its natural one.

A program with sparse attention has two methods with one copy of the weights: `forward` needs our operator, `standard`
computes it in standard operators. A decoder's has further ones, `forward_next` and `standard_next`, for one token after
the row's `past`.
"""

from typing import Any, Callable, List, Optional

import executorch.kernels.quantized
import torch
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from executorch.version import __version__

from .. import cases, decoding, wire

OPERATOR, NATIVE, STANDARD, NEXT = "edgeformer::dsa.out", "forward", "standard", "_next"


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
    name = NATIVE if native else STANDARD
    methods = {name: program.load_method(name)}

    def run(row, every=False):
        # type: (cases.Row, bool) -> Any
        past = row.get(decoding.PAST)
        goes_on = past is not None and past.shape[2] > 0
        inputs = [x for x in entry.inputs if goes_on or x.name != decoding.PAST]
        method = name + NEXT if goes_on else name
        if method not in methods:
            methods[method] = program.load_method(method)
        feed = [torch.from_numpy(row[x.name][None].astype(x.dtype)) for x in inputs]
        outputs = methods[method].execute(feed)
        return tuple(x[0].numpy().copy() for x in outputs) if every else outputs[0][0].numpy().copy()

    return run
