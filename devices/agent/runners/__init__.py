"""
One module per format; the folder is the registry. A runner has

    version(library)                      of the runtime
    load(path, entry, threads, library)   opens a program; returns a function from one row to one output

`library` is the file with our operator for this machine, or None: the program then computes it in standard operators.
It may be a runtime of its own (ExecuTorch); the function then has `counters`, see `native.Journal`.
A row is {input name: array without batch axis} at its natural length; the output has no batch axis either.
A decoder's program has a second output, `new`: the keys and values of the row's tokens. With those of the tokens before
as the row's `past` it goes on after them; without, from nothing. `run(row, every=True)` returns both outputs.
`ImportError` means that this device cannot run the format.
"""

import importlib
import pkgutil
from typing import Any, List


def names():
    # type: () -> List[str]
    """Works inside a zipapp too."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name):
    # type: (str) -> Any
    """The runner module. Raises ValueError for a format without one, ImportError where its runtime is missing."""
    if name not in names():
        raise ValueError("no runner for format {!r}; this agent has {}".format(name, ", ".join(names())))
    return importlib.import_module(__name__ + "." + name)
