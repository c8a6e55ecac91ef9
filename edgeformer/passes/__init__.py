"""
One module per optimization. A pass is any callable Model -> Model; its parameters are closed over:

    build(model, "raspberry-pi-4", passes=[sparsify.dsa(long_texts, budget=0.5)])

A pass may assume a module in eval mode with one output; it returns `model.after(name, ..., facts={...})`, leaves the
model it was given untouched, and knows nothing of formats.
"""

from collections.abc import Callable

from ..model import Model

Pass = Callable[[Model], Model]
