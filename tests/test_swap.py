"""Sparse attention inside transformers' own models: dense at theta 0, exported, saved, refused with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from edgeformer import model as models
from edgeformer.attention import dsa, op, swap
from edgeformer.attention.reference import Config
from edgeformer.errors import BadInput

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZE, "vocab_size": 100, "max_position_embeddings": 300}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BLOCKS = Config(block_q=16, block_k=16)
MAKE: dict[str, Any] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=300)
    ),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)),
    "electra": lambda: hf.ElectraModel(hf.ElectraConfig(**TEXT, embedding_size=32)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, **SPECIAL, local_attention=16)),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "mistral": lambda: hf.MistralModel(hf.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=None)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SIZE, image_size=80, patch_size=8)),
}
FAMILIES = list(MAKE)


def make(family: str) -> Any:
    torch.manual_seed(0)
    model = MAKE[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # spread, so that a wrong mask or position shows
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def inputs(family: str, n: int = 100, padded: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 80, 80)}
    attention_mask = torch.ones(2, n, dtype=torch.long)
    if padded:
        attention_mask[1, n * 6 // 10 :] = 0
    return {"input_ids": torch.randint(5, 90, (2, n)), "attention_mask": attention_mask}


def hidden(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the valid rows."""
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        out = model(**given, **options).last_hidden_state
    return out[given["attention_mask"].bool()] if "attention_mask" in given else out


def put(model: Any, theta: float, config: Config = BLOCKS) -> tuple[swap.Layer, ...]:
    def parameters(layer: swap.Layer) -> op.Parameters:
        generator = torch.Generator().manual_seed(layer.number)
        made = dsa.fresh(layer.heads, layer.dim, generator=generator)
        return made._replace(theta=torch.full((layer.heads,), theta))

    return swap.install(model, parameters, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_theta_0_is_dense_and_a_threshold_is_not(family: str) -> None:
    model = make(family)
    for padded in (True, False):
        given = inputs(family, padded=padded)
        swap.switch(model, "sdpa")
        want = hidden(model, given)
        before = op.counters().calls
        sparse = put(model, 0.0)
        torch.testing.assert_close(hidden(model, given), want, rtol=0, atol=2e-5)
        assert op.counters().calls - before == len(sparse) == (1 if family == "modernbert" else 2)
        put(model, 0.3)
        assert (hidden(model, given) - want).abs().max() > 1e-4
    swap.remove(model)
    assert torch.equal(hidden(model, given), want) and not swap.scorers(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family: str) -> None:
    if family == "vit":
        pytest.skip("images have no padding")
    model = make(family)
    put(model, 0.1)
    given = inputs(family)
    want = hidden(model, given)
    given["input_ids"][1, 60:] = 7
    torch.testing.assert_close(hidden(model, given), want)
    alone = {name: x[1:, :60] for name, x in given.items()}
    torch.testing.assert_close(hidden(model, alone), want[100:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_with_a_free_length(family: str) -> None:
    model = make(family)
    put(model, 0.1)
    given = inputs(family)
    n = torch.export.Dim("n", min=17, max=256)
    shapes = {name: {1: n} if family != "vit" else {} for name in given}
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    calls = [str(node.target) for node in program.graph.nodes if "edgeformer" in str(node.target)]
    assert calls == ["edgeformer.dsa.default"] * len(swap.scorers(model))
    other = inputs(family, n=161)
    out = program.module()(**other).last_hidden_state
    out = out[other["attention_mask"].bool()] if family != "vit" else out
    torch.testing.assert_close(out, hidden(model, other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = make(family)
    put(model, 0.07)
    model.save_pretrained(tmp_path)
    again = swap.from_pretrained(hf.AutoModel, tmp_path).eval()
    assert type(again) is type(model)
    assert all(x.config == BLOCKS and float(x.theta[0]) == pytest.approx(0.07) for x in swap.scorers(again))
    given = inputs(family)
    assert torch.equal(hidden(again, given), hidden(model, given))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(
        hidden(swap.from_pretrained(type(model), tmp_path / "twice").eval(), given), hidden(model, given)
    )


def test_a_sparse_model_is_taken_as_it_is() -> None:
    model = make("bert")
    put(model, 0.3)
    loaded = models.load(model).module
    given = inputs("bert", padded=False)
    with torch.no_grad():
        whole = torch.nn.functional.normalize(model(**given).last_hidden_state.mean(1), dim=-1)
        here = loaded(*given.values(), torch.zeros_like(given["input_ids"]))
        swap.remove(model)
        dense = torch.nn.functional.normalize(model(**given).last_hidden_state.mean(1), dim=-1)
    torch.testing.assert_close(here, whole, rtol=0, atol=1e-6)
    assert (dense - whole).abs().max() > 1e-4


def test_loading_a_dense_folder_says_so(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no sparse attention"):
        swap.from_pretrained(hf.AutoModel, tmp_path)


def test_decoding_with_a_cache_is_dense_at_theta_0() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
    given = {**inputs("llama", padded=False), "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    want = model.generate(**given, pad_token_id=0)
    put(model, 0.0)
    before = op.counters().calls
    assert torch.equal(model.generate(**given, pad_token_id=0), want)
    assert op.counters().calls - before == 2 * 20


@pytest.mark.parametrize(
    ("family", "names"),
    [("bert", ["layer.0.attention.self.query"]), ("mpnet", ["layer.0.attention.attn.q", "relative_attention_bias"])],
)
def test_gradients_flow_through_a_sparse_model(family: str, names: list[str]) -> None:
    model = make(family)
    put(model, 0.1)
    model(**inputs(family)).last_hidden_state.square().mean().backward()
    for name in names:
        found = model.encoder.get_submodule(name).weight.grad
        assert found is not None and torch.isfinite(found).all() and found.abs().max() > 0


def test_a_position_bias_that_is_no_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mpnet")
    bucket = model.encoder.relative_position_bucket
    further = staticmethod(lambda x, num_buckets=32: bucket(x, num_buckets, max_distance=300))
    monkeypatch.setattr(type(model.encoder), "relative_position_bucket", further)
    with pytest.raises(BadInput, match="does not end at 128 tokens"):
        put(model, 0.0)
    assert model.config._attn_implementation == "eager" and "compute_position_bias" not in vars(model.encoder)


def test_half_precision_models_keep_a_float_scorer(tmp_path: Path) -> None:
    model, given = make("bert"), inputs("bert")
    put(model, 0.1)
    model = model.to(torch.bfloat16)
    assert model.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = swap.from_pretrained(hf.AutoModel, tmp_path).eval()
    for one in (model, again):
        assert {x.dtype for x in swap.scorers(one)[0].parameters_of()} == {torch.float32}
        assert float(swap.scorers(one)[0].theta[0]) == pytest.approx(0.1, abs=1e-7)
        assert hidden(one, given).dtype == torch.bfloat16
    assert torch.equal(hidden(again, given), hidden(model, given))
    put(model, 0.0)
    found = hidden(model, given)
    swap.switch(model, "sdpa")
    want = hidden(model, given)
    assert torch.nn.functional.cosine_similarity(found.float(), want.float(), dim=-1).min() > 0.99


def test_some_layers_may_stay_dense_with_padding() -> None:
    for family in ("bert", "llama", "mpnet"):
        model, given = make(family), inputs(family)
        swap.switch(model, "sdpa")
        want = hidden(model, given)
        found = swap.install(model, lambda x: dsa.fresh(x.heads, x.dim) if x.number else None, BLOCKS)
        assert [x.number for x in found] == [1]
        torch.testing.assert_close(hidden(model, given), want, rtol=0, atol=2e-5)


def test_replaced_puts_everything_back() -> None:
    model, given, seen = make("bert"), inputs("bert"), []
    put(model, 0.2)
    want = hidden(model, given)

    class Zero(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any, lengths: Any, causal: bool, scale: float) -> Any:
            seen.append((q.shape[2], lengths.tolist(), causal))
            return torch.zeros_like(q)

    with pytest.raises(ZeroDivisionError), swap.replaced(model, lambda layer: Zero()):
        hidden(model, given)
        raise ZeroDivisionError
    assert seen == [(100, [100, 60], False)] * 2
    assert torch.equal(hidden(model, given), want)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_masks_that_are_no_right_padding_are_refused(family: str) -> None:
    model, given = make(family), inputs(family)
    put(model, 0.0)
    for bad in (given["attention_mask"].flip(-1), given["attention_mask"].clone().index_fill_(1, torch.tensor([3]), 0)):
        with pytest.raises(BadInput, match="right padding only"):
            hidden(model, {**given, "attention_mask": bad})
    with pytest.raises(BadInput, match="right padding only"):
        hidden(model, {"input_ids": given["input_ids"], "attention_mask": torch.zeros(2, 1, 100, 100)[:, :, :, :]})


def test_packed_sequences_are_refused() -> None:
    model, given = make("llama"), inputs("llama")
    put(model, 0.0)
    positions = torch.cat([torch.arange(40), torch.arange(60)]).expand(2, -1)
    with pytest.raises(BadInput, match="right padding only"):
        model(given["input_ids"], position_ids=positions, use_cache=False)


def test_models_it_would_get_wrong_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match="relative position bias"):
        put(
            hf.T5EncoderModel(hf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)), 0.0
        )
    with pytest.raises(BadInput, match="multiple of 16"):
        put(hf.BertModel(hf.BertConfig(**{**TEXT, "hidden_size": 32})), 0.0)
    with pytest.raises(BadInput, match="no transformers model"):
        put(torch.nn.Linear(2, 2), 0.0)
    with pytest.raises(BadInput, match="outside transformers' attention interface"):
        put(hf.FNetModel(hf.FNetConfig(**{k: v for k, v in TEXT.items() if k != "num_attention_heads"})), 0.0)
