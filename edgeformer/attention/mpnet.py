"""
MPNet behind transformers' attention interface, which its modeling file does not use.

Its layers compute attention by themselves and add to the logits a bias that they share, [B,H,N,N] by relative position.
`through` gives them the forward that other families have, and lets the encoder hand out that bias as the operator takes
it: a table by distance, which is exact because the buckets of the distances end at 128. What is put there are
attributes of the instances: a copy of the model has its own, and `back` takes them away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

from ..errors import BadInput

FAR = 128  # tokens; what is further away is in the same bucket
BUCKETS = "position_buckets"
Tensor = torch.Tensor


def is_layer(module: torch.nn.Module) -> bool:
    return isinstance(module, MPNetSelfAttention)


def encoder(model: torch.nn.Module) -> Any:
    """The part that holds the bias of all layers; None in other families."""
    return next((m for m in model.modules() if isinstance(m, MPNetEncoder)), None)


def through(model: torch.nn.Module, attention: Callable[..., tuple[Tensor, None]]) -> None:
    """`attention`: called as the interface calls one, with a position_bias [H, 2 FAR + 1]."""
    inner = encoder(model)
    if BUCKETS not in inner._buffers:
        inner.register_buffer(BUCKETS, _buckets(inner), persistent=False)
        inner.compute_position_bias = partial(_position_bias, inner)
    for module in filter(is_layer, inner.modules()):
        module.forward = partial(_forward, module, attention)


def back(model: torch.nn.Module) -> None:
    inner = encoder(model)
    inner._buffers.pop(BUCKETS, None)
    inner.__dict__.pop("compute_position_bias", None)
    for module in filter(is_layer, inner.modules()):
        module.__dict__.pop("forward", None)


def _buckets(inner: Any) -> Tensor:
    """[2 FAR + 1]. Raises BadInput where the model's own bias is not a function of these distances."""
    found: Tensor = inner.relative_position_bucket(torch.arange(-FAR, FAR + 1))
    t = torch.arange(2 * FAR + 2)
    by_distance = found[(t - t[:, None]).clamp(-FAR, FAR) + FAR]
    with torch.no_grad():
        table = inner.relative_attention_bias(by_distance).permute(2, 0, 1)
        same = torch.equal(table, inner.compute_position_bias(torch.zeros(1, len(t)))[0])
    if not same:
        raise BadInput(
            f"the position bias of this MPNet does not end at {FAR} tokens, so no table of edgeformer::dsa holds it; "
            "leave this model dense"
        )
    return found


def _position_bias(inner: Any, _x: Tensor) -> Tensor:
    """From the weights as they are now: they may be trained."""
    table: Tensor = inner.relative_attention_bias(getattr(inner, BUCKETS))
    return table.T


def _forward(
    module: Any,
    attention: Callable[..., tuple[Tensor, None]],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    shape = (*hidden_states.shape[:-1], -1, module.attention_head_size)
    q, k, v = (linear(hidden_states).view(shape).transpose(1, 2) for linear in (module.q, module.k, module.v))
    mixed, weights = attention(module, q, k, v, attention_mask, position_bias=position_bias)
    return module.o(mixed.flatten(2)), weights
