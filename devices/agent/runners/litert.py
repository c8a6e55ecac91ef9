"""LiteRT (TFLite), by the ai-edge-litert interpreter with XNNPACK. A row runs at the shortest length that holds it."""

import bisect
from typing import Any, Callable, Optional

import ai_edge_litert
import numpy as np
from ai_edge_litert.interpreter import Interpreter, load_delegate

from .. import cases, wire


def version(library=None):  # noqa: ARG001 (the library does not bring the runtime)
    # type: (Optional[str]) -> str
    return str(ai_edge_litert.__version__)


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    delegates = [load_delegate(library)] if library is not None else None
    interpreter = Interpreter(model_path=path, num_threads=threads, experimental_delegates=delegates)
    lengths = entry.lengths or (0,)
    signatures = {n: interpreter.get_signature_runner("length_{}".format(n)) for n in lengths}

    def run(row):
        # type: (cases.Row) -> Any
        natural = max([array.shape[0] for array in row.values()]) if entry.lengths else 0
        place = bisect.bisect_left(lengths, natural)
        if place == len(lengths):
            raise ValueError("{} tokens: this program holds at most {}".format(natural, lengths[-1]))
        feed = {
            "args_{}".format(i): _padded(row[tensor.name], tensor, lengths[place])[None]
            for i, tensor in enumerate(entry.inputs)
        }
        return next(iter(signatures[lengths[place]](**feed).values()))[0]

    return run


def _padded(array, tensor, length):
    # type: (Any, wire.Tensor, int) -> Any
    """The row filled up on the right with the input's own padding value."""
    if not length or -1 not in tensor.shape[1:]:
        return array.astype(tensor.dtype, copy=False)
    full = np.full((length,) + array.shape[1:], tensor.pad, tensor.dtype)
    full[: array.shape[0]] = array
    return full
