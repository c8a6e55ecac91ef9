"""Small encoders with sparse attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgeformer import model as models
from edgeformer.attention import op  # noqa: F401 (defines `edgeformer::dsa`)
from edgeformer_agent import wire

LAYERS = 2


class Attention(torch.nn.Module):
    """One layer: projections, the operator, a residual. Masks are (batch, rows) of 0 and 1, padded on the right."""

    def __init__(self, width: int, heads: int, kv_heads: int, **config: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.config, dim = heads, kv_heads, config, width // heads
        self.q, self.o = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.k, self.v = (torch.nn.Linear(width, kv_heads * dim) for _ in range(2))
        self.wq, self.wk = (torch.nn.Parameter(torch.randn(heads, dim, 8)) for _ in range(2))
        self.dist_bias = torch.nn.Parameter(torch.randn(heads, 9))
        self.sink_bias = torch.nn.Parameter(torch.randn(heads, 1))
        self.register_buffer("theta", torch.full((heads,), 0.1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape

        def split(y: torch.Tensor, n: int) -> torch.Tensor:
            return y.reshape(batch, rows, n, width // self.heads).transpose(1, 2).contiguous()

        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        length = mask.sum(-1, dtype=torch.int32)
        scorer = (self.wq, self.wk, self.dist_bias, self.sink_bias, self.theta)
        out = torch.ops.edgeformer.dsa(q, k, v, *scorer, length, length, **self.config)
        return x + self.o(out.transpose(1, 2).reshape(batch, rows, width))


class Encoder(torch.nn.Module):
    """Token ids and mask -> the mean of the valid rows."""

    def __init__(self, layers: int, width: int, heads: int, kv_heads: int, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(100, width)
        self.layers = torch.nn.ModuleList(Attention(width, heads, kv_heads, **config) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


def model(
    layers: int = LAYERS,
    width: int = 64,
    heads: int = 2,
    kv_heads: int = 2,
    lengths: tuple[int, ...] = (32, 70, 96),
    **config: Any,
) -> models.Model:
    encoder = Encoder(layers, width, heads, kv_heads, **{"block_q": 32, "block_k": 32, **config})
    return models.Model(
        name="sparse-encoder",
        module=models._OneOutput(encoder, None, "first").eval().requires_grad_(False),
        inputs=tuple(wire.Tensor(name, "int32", (-1, -1)) for name in ("input_ids", "attention_mask")),
        output=wire.Tensor("vector", "float32", (-1, width)),
        task=wire.Task("embedding"),
        lengths=lengths,
    )


def rows(batch: int, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """Token ids and mask; every row but the first is shorter."""
    ids = np.random.default_rng(length).integers(0, 100, (batch, length), dtype=np.int32)
    valid = [max(1, length - 17 * i) for i in range(batch)]
    mask = (np.arange(length)[None] < np.array(valid)[:, None]).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}
