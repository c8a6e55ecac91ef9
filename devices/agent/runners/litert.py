"""
LiteRT (TFLite), by the ai-edge-litert interpreter with XNNPACK. A row runs at the shortest length that holds it.

Where only its predecessor tflite-runtime is installed, that opens fp32 programs in standard operators.
"""

import bisect
from typing import Any, Callable, Optional

from .. import cases, wire

try:
    import ai_edge_litert as package
    from ai_edge_litert.interpreter import Interpreter, load_delegate

    LEGACY = False
except ImportError as missing:
    try:
        import tflite_runtime as package
        from tflite_runtime.interpreter import Interpreter, load_delegate
    except ImportError:
        raise missing
    LEGACY = True

VERSION = str(package.__version__)


def version(library=None):  # noqa: ARG001 (the library does not bring the runtime)
    # type: (Optional[str]) -> str
    return VERSION + "+tflite-runtime" * LEGACY


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    """Raises ValueError for what the legacy runtime does not compute, or computes wrongly without a word."""
    if LEGACY and entry.precision != "fp32":
        raise ValueError(
            "{}: tflite-runtime {} computes {} wrongly and slower than fp32. Install ai-edge-litert, or ship the fp32 "
            "program".format(entry.name, VERSION, entry.precision)
        )
    delegates = [load_delegate(library)] if library is not None else None
    try:
        interpreter = Interpreter(model_path=path, num_threads=threads, experimental_delegates=delegates)
    except ValueError as error:
        if not LEGACY:
            raise
        raise ValueError(
            "{}: tflite-runtime {} does not know an operator of it ({}). Install ai-edge-litert, or ship a dense fp32 "
            "program".format(entry.name, VERSION, str(error).splitlines()[0])
        )
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
