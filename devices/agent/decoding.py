"""
Greedy decoding by a decoder's program: the prompt at once, then a token at a time after the keys and values so far.

Host and device use this; a program is opened by its runner.
"""

from typing import Any, Dict, List, Sequence

import numpy as np

from . import wire

PAST = "past"


def generates(entry):
    # type: (wire.Entry) -> bool
    """Whether the program takes and gives keys and values."""
    return any(tensor.name == PAST for tensor in entry.inputs)


def longest(entry):
    # type: (wire.Entry) -> int
    """How many tokens the program takes, those before included: its work is counted up to there."""
    return max(work.length for work in entry.work)


def greedy(run, entry, prompt, most, stop=(), on_token=None):
    # type: (Any, wire.Entry, Sequence[int], int, Sequence[int], Any) -> List[int]
    """
    The likeliest token after the prompt, again and again: up to `most` tokens, or to the first of `stop`, which is the
    last one given. `run` is what the entry's runner loaded; `on_token` hears of each token at once.
    """
    past = nothing(entry)[PAST]
    ids, made = list(prompt), []  # type: List[int], List[int]
    while len(made) < most:
        logits, new = run(dict(_row(entry, ids), **{PAST: past}), every=True)
        past = np.concatenate([past, new], axis=2)
        ids = [int(np.argmax(logits))]
        made += ids
        if on_token is not None:
            on_token(ids[0])
        if ids[0] in stop:
            break
    return made


def nothing(entry):
    # type: (wire.Entry) -> Dict[str, Any]
    """What a row adds that comes first: the keys and values of no token. Empty for a program without them."""
    return {t.name: np.zeros([max(n, 0) for n in t.shape[1:]], t.dtype) for t in entry.inputs if t.name == PAST}


def _row(entry, ids):
    # type: (wire.Entry, List[int]) -> Any
    """Inputs of these tokens, all of them valid."""
    values = {"input_ids": ids}
    return {t.name: np.asarray(values.get(t.name, [1] * len(ids)), t.dtype) for t in entry.inputs if t.name != PAST}
