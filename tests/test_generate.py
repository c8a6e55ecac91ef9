"""
Greedy decoding: a program with keys and values gives the tokens that transformers' own `generate` gives, dense or
sparse, with our library or without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import edgeformer as ef  # noqa: E402
from edgeformer import formats, native  # noqa: E402
from edgeformer.attention import dsa, op, swap  # noqa: E402
from edgeformer.attention.reference import Config  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.model import Model, load  # noqa: E402
from edgeformer_agent import decoding, native as agent_native, runners, wire  # noqa: E402

NEW = 24
PROMPT = [5 + (7 * i * i + 3 * i) % 190 for i in range(100)]
BLOCKS = Config(block_q=16, block_k=16, n_sink=1)


def opened(model: Model, name: str, folder: Path, library: Path | None = None) -> tuple[Any, wire.Entry]:
    """The fp32 program of a format, by its runner."""
    program = next(formats.load(name).export(model, ("fp32",)))
    for file, content in program.files.items():
        (folder / file).write_bytes(content)
    none = wire.Prediction("host", 1, wire.Metrics(), 1, 1, "")
    entry = wire.Entry(
        program.name, name, "fp32", program.entry, 0, program.inputs, program.outputs, program.lengths,
        program.runtime, program.needs, program.work, none, wire.Fidelity("", 0, 0, 0, 0), 0.9,
    )  # fmt: skip
    return reopened(entry, folder, library), entry


def reopened(entry: wire.Entry, folder: Path, library: Path | None) -> Any:
    path = str(folder / entry.path)
    return runners.load(entry.format).load(path, entry, 1, str(library) if library else None)


def theirs(whole: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    asked = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
    found = whole.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    return [int(i) for i in found[0, len(prompt) :]]


def sparse(whole: Any) -> None:
    """A scorer on every layer that keeps some blocks and drops others."""

    def parameters(layer: swap.Layer) -> op.Parameters:
        made = dsa.fresh(layer.heads, layer.dim, generator=torch.Generator().manual_seed(layer.number))
        return made._replace(wq=made.wq * 2, wk=made.wk * 2, theta=torch.full((layer.heads,), 0.15))

    swap.install(whole, parameters, BLOCKS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ef.Bundle]:
    folder = tmp_path_factory.mktemp("bundle")
    source = folder / "tiny-llama"
    families.tiny("llama").save_pretrained(source)
    families.tokenizer().save_pretrained(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        yield ef.build(source, "host", formats=["onnx"], precision="fp32", lengths=(128,), out=folder)


@pytest.fixture(scope="module")
def dense(bundle: ef.Bundle) -> tuple[Any, wire.Entry]:
    entry = bundle.manifest.programs[0]
    return reopened(entry, bundle.path, None), entry


def test_the_tokens_of_transformers(dense: tuple[Any, wire.Entry]) -> None:
    run, entry = dense
    assert decoding.generates(entry) and [x.name for x in entry.outputs] == ["logits", "new"]
    for prompt in (PROMPT, PROMPT[:1]):
        made = decoding.greedy(run, entry, prompt, NEW)
        assert made == theirs(families.tiny("llama"), prompt) and len(set(made)) > 3


def test_a_prompt_in_two_parts_is_the_prompt(dense: tuple[Any, wire.Entry]) -> None:
    import numpy as np

    run, entry = dense
    nothing = decoding.nothing(entry)
    _, first = run({**decoding._row(entry, PROMPT[:40]), **nothing}, every=True)
    logits, second = run({**decoding._row(entry, PROMPT[40:]), "past": first}, every=True)
    whole, new = run({**decoding._row(entry, PROMPT), **nothing}, every=True)
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([first, second], 2), new, atol=1e-5)
    np.testing.assert_array_equal(run(decoding._row(entry, PROMPT)), whole)  # judged by the same numbers


def test_it_ends_where_it_is_told(dense: tuple[Any, wire.Entry]) -> None:
    run, entry = dense
    heard: list[int] = []
    made = decoding.greedy(run, entry, PROMPT, NEW)
    stop = made[6]
    assert decoding.greedy(run, entry, PROMPT, NEW, (stop,), heard.append) == heard == made[: made.index(stop) + 1]
    assert decoding.greedy(run, entry, PROMPT, 3) == made[:3]


def test_sparse_tokens_with_the_library_and_without(tmp_path: Path) -> None:
    """Prefill and each step go through the operator: a call a layer, and blocks were dropped."""
    whole = families.tiny("llama")
    model = load(whole, name="tiny")
    sparse(model.module)
    sparse(whole)
    wanted = theirs(whole, PROMPT)
    library = native.binding("onnx", native.host())
    run, entry = opened(model, "onnx", tmp_path, library)
    assert _counted(run, entry, str(library)) == wanted
    assert decoding.greedy(reopened(entry, tmp_path, None), entry, PROMPT, NEW) == wanted
    assert theirs(families.tiny("llama"), PROMPT) != wanted  # so dense attention would show


def _counted(run: Any, entry: wire.Entry, library: str) -> list[int]:
    """The tokens; each of them through our operator, in every layer, and it dropped blocks."""
    journal = agent_native.journal(run, library)
    assert journal is not None
    calls: list[wire.Native] = []

    def watched(row: Any, every: bool) -> Any:
        found = journal.watch(lambda row: run(row, every=every))(row)
        calls.append(journal.native())
        return found

    made = decoding.greedy(watched, entry, PROMPT, NEW)
    assert len(calls) == NEW and calls[-1].calls_per_run == 2
    assert calls[0].kept and max(calls[0].kept) < 0.9 and max(calls[-1].kept) < 0.95
    return made


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_executorch_gives_the_tokens_of_transformers(attention: str, tmp_path: Path) -> None:
    """In the runtime without our operator by the methods in standard operators, and in the bundle's own runner."""
    pytest.importorskip("executorch")
    pytest.importorskip("ziglang")
    whole = families.tiny("llama") if attention == "sparse" else deep()
    model = load(whole, name="tiny", lengths=(160,))
    if attention == "sparse":
        sparse(model.module)
        sparse(whole)
    run, entry = opened(model, "executorch", tmp_path)
    methods = _methods(tmp_path / entry.path)
    assert ("standard_next" in methods) == (attention == "sparse") and "forward_next" in methods
    wanted = theirs(whole, PROMPT)
    assert decoding.greedy(run, entry, PROMPT, NEW) == wanted
    library = native.runner()
    own = reopened(entry, tmp_path, library)
    made = _counted(own, entry, str(library)) if attention == "sparse" else decoding.greedy(own, entry, PROMPT, NEW)
    assert made == wanted and isinstance(own, runners.load("executorch").Runner)


def deep() -> Any:
    """Three layers: more keys and values than XNNPACK joins at once."""
    import transformers as hf

    config = families.tiny("llama").config
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return made


def _methods(path: Path) -> set[str]:
    from executorch.runtime import Runtime

    return set(Runtime.get().load_program(path).method_names)


def test_from_a_bundle(bundle: ef.Bundle) -> None:
    text = "w3 w4 w5"
    found = ef.generate(bundle, text, max_new_tokens=NEW, stop=())
    ids = families.tokenizer()(text)["input_ids"]
    assert list(found.tokens) == theirs(families.tiny("llama"), ids) and found.program == "onnx-fp32"
    assert found.text == families.tokenizer().decode(found.tokens, skip_special_tokens=True)
    assert ef.generate(bundle, ids, max_new_tokens=1).tokens == found.tokens[:1]
    with pytest.raises(BadInput, match="max_new_tokens is 0"):
        ef.generate(bundle, text, max_new_tokens=0)
    with pytest.raises(BadInput, match=r"no program .onnx-int8.\. It has: onnx-fp32"):
        ef.generate(bundle, text, program="onnx-int8")
    with pytest.raises(BadInput, match="an empty prompt"):
        ef.generate(bundle, [])


def test_what_does_not_fit_is_refused_before_it_runs(bundle: ef.Bundle) -> None:
    """The bundle is built for 128 tokens; the last new token is never an input."""
    assert len(ef.generate(bundle, PROMPT, max_new_tokens=29, stop=()).tokens) == 29
    with pytest.raises(BadInput, match=r"100 tokens and 30 new ones .* onnx-fp32 takes 128 tokens; use at most 29 new"):
        ef.generate(bundle, PROMPT, max_new_tokens=30)
    with pytest.raises(BadInput, match="use a shorter prompt"):
        ef.generate(bundle, [5] * 129, max_new_tokens=1)


def test_the_command(bundle: ef.Bundle) -> None:
    command = [sys.executable, "-m", "edgeformer", "generate", str(bundle.path), "w3 w4", "--max-new-tokens", "3"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["tokens"]) == 3
