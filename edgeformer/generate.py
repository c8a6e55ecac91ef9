"""Text from a decoder's bundle on this machine: verified, opened by the runner that devices use, decoded greedily."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeformer_agent import decoding, native, runners

from . import signing
from .errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from edgeformer_agent import wire

    from .bundle import Bundle


@dataclass(frozen=True)
class Generated:
    """What followed the prompt, and how long it took."""

    program: str
    tokens: tuple[int, ...]
    text: str | None  # None where the bundle has no tokenizer
    first_ms: float  # the prompt and the first token
    next_ms: float | None  # mean of the further tokens; None where there are none


def generate(
    bundle: Bundle,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 64,
    program: str | None = None,
    stop: Sequence[int] | None = None,
    threads: int = 1,
    keys: Iterable[str] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """
    The likeliest tokens after `prompt` (text, where the bundle has a tokenizer, or token ids), by the bundle's first
    program that keeps keys and values, or by `program`. stop: ids that end it; the tokenizer's end of text by default.
    keys: public keys to accept, instead of those trusted here. Raises BadInput, BundleRefused, MissingExtra.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    entry = _entry(bundle, program)
    bundle.verify(tuple(signing.trusted().values()) if keys is None else tuple(keys))
    tokenizer = _tokenizer(bundle)
    ids = _ids(tokenizer, prompt)
    _fits(entry, len(ids), max_new_tokens)
    if stop is None:
        end = getattr(tokenizer, "eos_token_id", None)
        stop = () if end is None else (end,)
    run = _open(bundle, entry, threads)
    times = [time.perf_counter()]

    def told(token: int) -> None:
        times.append(time.perf_counter())
        if on_token is not None:
            on_token(token)

    tokens = tuple(decoding.greedy(run, entry, ids, max_new_tokens, stop, told))
    further = len(tokens) - 1
    return Generated(
        program=entry.name,
        tokens=tokens,
        text=None if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True)),
        first_ms=1e3 * (times[1] - times[0]),
        next_ms=1e3 * (times[-1] - times[1]) / further if further else None,
    )


def _entry(bundle: Bundle, program: str | None) -> wire.Entry:
    found = {entry.name: entry for entry in bundle.manifest.programs}
    able = [name for name, entry in found.items() if decoding.generates(entry)]
    if program is not None and program not in found:
        raise BadInput(f"the bundle has no program {program!r}. It has: {', '.join(found)}.")
    if not able or program not in (None, *able):
        raise BadInput(
            f"{program or bundle.manifest.name} keeps no keys and values, so it cannot generate; programs of this "
            f"bundle that can: {', '.join(able) or 'none'} (a decoder's, in the formats onnx and executorch)"
        )
    return found[program or able[0]]


def _tokenizer(bundle: Bundle) -> Any:
    if not (bundle.path / "tokenizer" / "tokenizer.json").is_file():
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("sdk", error.name) from error
    return AutoTokenizer.from_pretrained(bundle.path / "tokenizer", trust_remote_code=False)


def _ids(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str) and tokenizer is None:
        raise BadInput("this bundle has no tokenizer, so a text cannot be used; give token ids")
    ids = [int(i) for i in (tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)]
    if not ids:
        raise BadInput("an empty prompt has nothing to go on from")
    return ids


def _fits(entry: wire.Entry, prompt: int, further: int) -> None:
    longest = decoding.longest(entry)
    if prompt + further - 1 > longest:  # nothing follows the last one
        most = longest + 1 - prompt
        what = f"at most {most} new tokens" if most > 0 else "a shorter prompt"
        raise BadInput(
            f"a prompt of {prompt} tokens and {further} new ones do not fit: {entry.name} takes {longest} tokens; use "
            f"{what}, or build with longer lengths"
        )


def _open(bundle: Bundle, entry: wire.Entry, threads: int) -> Any:
    """The program with our library, where the bundle has one for this machine and it can be trusted here."""
    try:
        runner = runners.load(entry.format)
    except ImportError as error:
        raise MissingExtra(entry.format, error.name) from error
    library = native.find(str(bundle.path), entry)
    if library and native.trial(str(bundle.path), entry, threads, library):
        library = None
    return runner.load(str(bundle.path / entry.path), entry, threads, library)
