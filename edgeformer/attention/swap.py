"""
Sparse attention in any Hugging Face model, without a copied modeling file.

`install` puts a scorer (submodule `dsa_scorer`) on every attention layer that sees the whole sequence and switches the
model to the attention function registered here. Layers without a scorer, such as those with a sliding window, stay
dense through torch's SDPA. The mask function of the same name hands lengths to the attention: without one transformers
gives a custom attention no mask at all, and padding is silently ignored.

    swap.install(model, lambda layer: dsa.fresh(layer.heads, layer.dim), Config(block_q=32, block_k=32))
    model.save_pretrained(folder); model = swap.from_pretrained(type(model), folder)

MPNet, which computes attention by itself and adds a position bias to its logits, is brought here by `mpnet.py`.

Right padding only. Other masks (left padding, packed sequences, a static cache, a mask of one's own) are refused in
eager mode; in an exported graph lengths are the sum of the mask, whatever it holds. Attention dropout is not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils import is_tracing

from ..errors import BadInput
from . import dsa, mpnet
from .op import Parameters
from .reference import Config

NAME, SCORER, RECORD = "edgeformer_dsa", "dsa_scorer", "edgeformer_dsa"
Tensor = torch.Tensor


class Layer(NamedTuple):
    """One attention layer that a scorer fits on."""

    number: int  # among such layers, from the input
    name: str  # its path in the model
    module: torch.nn.Module
    heads: int
    kv_heads: int
    dim: int
    causal: bool
    biased: bool = False  # its logits get a position bias: the module is then given one as its last argument


def layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    """Every self-attention over the whole sequence, in order. Raises BadInput where the swap cannot see them."""
    found: list[Layer] = []
    for name, module in model.named_modules():
        if mpnet.is_layer(module):
            heads, dim = module.num_attention_heads, module.attention_head_size
            found.append(Layer(len(found), name, module, heads, heads, dim, causal=False, biased=True))
            continue
        config = getattr(module, "config", None)
        if config is None or not hasattr(module, "is_causal") or "Attention" not in type(module).__name__:
            continue
        if "Cross" in type(module).__name__ or getattr(module, "sliding_window", None):
            continue
        heads = int(getattr(module, "num_attention_heads", 0) or config.num_attention_heads)
        dim = int(
            getattr(module, "head_dim", 0)
            or getattr(module, "attention_head_size", 0)
            or config.hidden_size // config.num_attention_heads
        )
        groups = int(getattr(config, "num_key_value_heads", 0) or heads)
        found.append(Layer(len(found), name, module, heads, groups, dim, _causal(module)))
    _supported(model, found)
    return tuple(found)


def alike(model: torch.nn.Module) -> tuple[Layer, ...]:
    """`layers`, which must be equal in their heads: one set of scorers is trained for all. Raises BadInput."""
    found = layers(model)
    if len({(x.heads, x.kv_heads, x.dim, x.causal) for x in found}) != 1:
        raise BadInput(
            "the attention layers differ in their number or size of heads, and sparse attention needs equal ones; "
            "prune with uniform_heads=True"
        )
    return found


def _causal(module: Any) -> bool:
    """A decoder used as an encoder says so in its config (transformers' masking does the same)."""
    return bool(getattr(module, "is_causal", False) and getattr(module.config, "is_causal", True))


def _supported(model: torch.nn.Module, found: list[Layer]) -> None:
    name, ours = type(transformer(model)).__name__, mpnet.encoder(model) is not None
    if not ours and any("relative_attention_bias" in key for key, _ in model.named_modules()):
        raise BadInput(
            f"{name} adds a learned relative position bias to its attention logits, which is read from MPNet only, so "
            "its result would be wrong. Leave this model dense"
        )
    if not found or not (ours or transformer(model)._can_set_attn_implementation()):
        raise BadInput(f"{name} computes attention outside transformers' attention interface, so it cannot be swapped")
    if bad := next((layer for layer in found if layer.dim % 16), None):
        raise BadInput(f"{bad.name} has heads of {bad.dim}; sparse attention needs a multiple of 16")


def transformer(model: torch.nn.Module) -> Any:
    """The transformers model in `model`, which may be a wrapper."""
    inner = next((m for m in model.modules() if hasattr(m, "set_attn_implementation")), None)
    if inner is None:
        raise BadInput(f"{type(model).__name__} holds no transformers model; sparse attention is swapped into those")
    return inner


def switch(model: torch.nn.Module, implementation: str) -> None:
    """Which attention the transformers model in `model` computes: NAME for this one, else one of transformers' own."""
    whole = transformer(model)
    if mpnet.encoder(whole) is None:
        whole.set_attn_implementation(implementation)
        return
    if implementation == NAME:
        mpnet.through(whole, _attention)
    else:
        mpnet.back(whole)
    whole.config._attn_implementation = NAME if implementation == NAME else "eager"  # it has one of its own


def install(
    model: torch.nn.Module,
    parameters: Callable[[Layer], Parameters | None],
    config: Config | None = None,
    compute: int = 0,
) -> tuple[Layer, ...]:
    """Puts a scorer on each layer for which `parameters` gives some; the others stay dense. Returns the sparse ones."""
    config = config or Config()
    swapped = []
    for layer in layers(model):
        if (given := parameters(layer)) is not None:
            layer.module.add_module(SCORER, dsa.Scorer(given, config, compute))
            swapped.append(layer)
    whole = transformer(model)
    switch(whole, NAME)
    # What `from_pretrained` needs to make room for the scorers; it travels in config.json.
    shapes = {layer.name: [list(x.shape) for x in scorer(layer).parameters_of()] for layer in _of(whole, swapped)}
    setattr(whole.config, RECORD, {"config": asdict(config), "compute": compute, "layers": shapes})
    return tuple(swapped)


def _of(whole: torch.nn.Module, swapped: list[Layer]) -> list[Layer]:
    """The same layers, named from the transformers model that saves itself."""
    names = {id(module): name for name, module in whole.named_modules()}
    return [layer._replace(name=names[id(layer.module)]) for layer in swapped]


def remove(model: torch.nn.Module, implementation: str = "sdpa") -> None:
    """Back to dense attention; the scorers are gone."""
    for module in list(model.modules()):
        if SCORER in module._modules:
            del module._modules[SCORER]
    whole = transformer(model)
    switch(whole, implementation)
    if hasattr(whole.config, RECORD):
        delattr(whole.config, RECORD)


def scorer(layer: Layer) -> dsa.Scorer:
    found = getattr(layer.module, SCORER)
    assert isinstance(found, dsa.Scorer)
    return found


def scorers(model: torch.nn.Module) -> tuple[dsa.Scorer, ...]:
    return tuple(m for m in model.modules() if isinstance(m, dsa.Scorer))


def set_thetas(model: torch.nn.Module, by_length: Mapping[int, Tensor]) -> None:
    """
    Thresholds [L, Hs] for several lengths: a block's mass shrinks as blocks get more, so theta is tied to length. They
    travel in config.json; the longest is in force until `for_length` picks another.
    """
    whole = transformer(model)
    sparse = [layer for layer in layers(whole) if hasattr(layer.module, SCORER)]
    getattr(whole.config, RECORD)["theta"] = {
        str(length): {layer.name: theta[layer.number].tolist() for layer in sparse}
        for length, theta in sorted(by_length.items())
    }
    for_length(model, max(by_length))


def has_thetas(model: torch.nn.Module) -> bool:
    """Whether thresholds for several lengths travel with the model."""
    return bool(getattr(transformer(model).config, RECORD).get("theta"))


def for_length(model: torch.nn.Module, length: int) -> int:
    """Puts in force what was calibrated for the shortest length that holds `length`, else for the longest."""
    whole = transformer(model)
    known = {int(n): thetas for n, thetas in getattr(whole.config, RECORD).get("theta", {}).items()}
    if not known:
        raise BadInput("this model has one set of thresholds, for no length in particular")
    bucket = min((n for n in known if n >= length), default=max(known))
    for name, theta in known[bucket].items():
        whole.get_submodule(name).get_submodule(SCORER).get_buffer("theta").copy_(torch.tensor(theta))
    return bucket


@contextmanager
def replaced(model: torch.nn.Module, make: Callable[[Layer], torch.nn.Module | None]) -> Iterator[tuple[Layer, ...]]:
    """
    Another attention for a while, dense, recorded or sparse by other rules: a module called like `dsa.Scorer.forward`.
    Where `make` gives None a layer is dense. What was there before comes back.
    """
    found, whole = layers(model), transformer(model)
    before = [layer.module._modules.pop(SCORER, None) for layer in found]
    implementation = whole.config._attn_implementation
    switch(whole, NAME)
    try:
        for layer in found:
            if (module := make(layer)) is not None:
                layer.module.add_module(SCORER, module)
        yield found
    finally:
        for layer, old in zip(found, before, strict=True):
            layer.module._modules.pop(SCORER, None)
            if old is not None:
                layer.module.add_module(SCORER, old)
        switch(whole, implementation)


def from_pretrained(kind: Any, folder: str | Path) -> Any:
    """A model that `save_pretrained` wrote with its scorers in it. `kind` is its class or an Auto class."""
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(folder)
    record = getattr(stored, RECORD, None)
    if record is None:
        raise BadInput(f"{folder} holds no sparse attention: its config.json has no {RECORD!r}")
    if hasattr(kind, "_model_mapping"):
        kind = kind._model_mapping[type(stored)]

    def with_scorers(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        attributes = Config(**record["config"])
        for name, shapes in record["layers"].items():
            blank = Parameters(*(torch.zeros(shape) for shape in shapes))
            self.get_submodule(name).add_module(SCORER, dsa.Scorer(blank, attributes, record["compute"]))

    # A class of the same name whose instances have scorers from the start: transformers' own loader then fills them.
    floats = [*(getattr(kind, "_keep_in_fp32_modules_strict", None) or []), SCORER]
    members = {"__init__": with_scorers, "__module__": kind.__module__, "_keep_in_fp32_modules_strict": floats}
    made: Any = type(kind.__name__, (kind,), members)
    model = made.from_pretrained(folder)
    model.__class__ = kind
    switch(model, NAME)
    setattr(model.config, RECORD, record)
    return model


# --- what transformers calls ------------------------------------------------------------------------------------------


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """
    `attention_mask`: lengths [B] from `_mask`, None, or (dense layers) the mask that SDPA takes. `position_bias`: the
    table [H, 2P+1] of `mpnet.py`.
    """
    sparse = getattr(module, SCORER, None)
    causal = _causal(module)
    lengths = attention_mask if attention_mask is None or attention_mask.ndim == 1 else None
    if sparse is None:
        if attention_mask is not None and attention_mask.ndim == 1:
            attention_mask = _dense_mask(attention_mask, query, key, causal)
        if position_bias is not None:
            attention_mask = _biased_mask(attention_mask, query, key, position_bias)
        dense: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return dense
    if attention_mask is not None and lengths is None:
        raise BadInput(f"sparse attention takes right padding only, not a mask of shape {tuple(attention_mask.shape)}")
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise BadInput(
                f"{type(module).__name__} uses {name!r}, which edgeformer::dsa does not have; leave it dense"
            )
    last = () if position_bias is None else (position_bias,)
    out = sparse(query, key, value, lengths, causal, scaling or 0.0, *last)
    return out.transpose(1, 2).contiguous(), None


def _dense_mask(lengths: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Lengths as the mask SDPA takes, for a layer that stays dense between sparse ones."""
    u = torch.arange(key.shape[2], device=key.device)
    seen = (u < lengths[:, None])[:, None, None].expand(-1, 1, query.shape[2], -1)
    if causal:
        t = torch.arange(query.shape[2], device=key.device) + (key.shape[2] - query.shape[2])
        seen = seen & (u <= t[:, None])
    return seen


def _biased_mask(seen: Tensor | None, query: Tensor, key: Tensor, position_bias: Tensor) -> Tensor:
    """The same with the bias of a layer that stays dense, [1 or B, H, N, N]."""
    bias = position_bias[:, dsa.distances(Config(), query, key, position_bias)][None].to(query.dtype)
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """Lengths [B] int32, or None without padding. A sliding window gets SDPA's own mask: its layers stay dense."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        own: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, **options,
        )  # fmt: skip
        # Padding behind the window sees nothing. Not every runtime's softmax of nothing is 0: let it see anything.
        return own if own is None else torch.logical_or(own, torch.logical_not(own.any(-1, keepdim=True)))
    if isinstance(q_offset, torch.Tensor) or kv_offset:
        raise BadInput("sparse attention works with a growing cache, not with a static one; use a DynamicCache")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise BadInput(
            f"sparse attention takes a mask [batch, tokens] of right padding, not {attention_mask.ndim} axes"
        )
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    if not is_tracing(attention_mask):
        prefix = torch.arange(attention_mask.shape[1], device=lengths.device) < lengths[:, None]
        if not torch.equal(prefix, attention_mask.bool()):
            raise BadInput(
                "sparse attention takes right padding only, and this attention_mask has a 0 before a 1; "
                "pad on the right (tokenizer.padding_side = 'right')"
            )
    return lengths


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
