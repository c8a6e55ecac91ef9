"""
Core ML, by this agent's own interpreter of ML programs (`mil`, `mil_ops`): what a package computes, where numpy runs.

It says nothing about the speed of Core ML; on an iPhone the app under devices/ios runs the same package.
"""

import bisect
import os
from typing import Any, Callable, Optional

from .. import cases, mil, mil_ops, wire

CORE_ML = "8"  # the newest operator set the interpreter reads, that of iOS 18


def version(library=None):  # noqa: ARG001 (the library does not bring the runtime)
    # type: (Optional[str]) -> str
    return CORE_ML


def load(path, entry, threads=1, library=None):  # noqa: ARG001
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    """`path` is the package's Manifest.json. `threads` is numpy's own business."""
    package = mil.Package(os.path.dirname(path))
    lengths = entry.lengths or (0,)
    functions = {}  # those met so far: a program of five lengths opens one of them

    def run(row):
        # type: (cases.Row) -> Any
        natural = max([array.shape[0] for array in row.values()]) if entry.lengths else 0
        place = bisect.bisect_left(lengths, natural)
        if place == len(lengths):
            raise ValueError("{} tokens: this program holds at most {}".format(natural, lengths[-1]))
        length = lengths[place]
        if length not in functions:
            functions[length] = mil_ops.compile(package, "length_{}".format(length))
        feed = {tensor.name: cases.padded(row[tensor.name], tensor, length)[None] for tensor in entry.inputs}
        found = functions[length](feed)[entry.outputs[0].name][0]
        return found[:natural] if entry.outputs[0].shape[1:2] == (-1,) else found

    return run
