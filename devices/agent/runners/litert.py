"""LiteRT (TFLite), by the ai-edge-litert interpreter with XNNPACK. A row runs at the shortest length that holds it."""

import bisect
from typing import Any, Callable, Optional

import ai_edge_litert
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
            "args_{}".format(i): cases.padded(row[tensor.name], tensor, lengths[place])[None]
            for i, tensor in enumerate(entry.inputs)
        }
        output = next(iter(signatures[lengths[place]](**feed).values()))[0]
        return output[:natural] if entry.outputs[0].shape[1:2] == (-1,) else output

    return run
