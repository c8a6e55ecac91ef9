"""
The layout that Apple's Neural Engine is said to like best: channels first, linear layers as 1x1 convolutions.

    build(model, "iphone-13", passes=[channels_first.layout()])

Each linear layer and each LayerNorm over (batch, rows, channels) computes on (batch, channels, 1, rows) instead and
hands back what it got, so any model keeps its outputs. Between two such layers the transpositions back and forth meet,
and the Core ML converter removes them. Whether a phone is faster for it is unverified: nothing here was run on one.
"""

from __future__ import annotations

import copy

import torch

from ..model import Model
from . import Pass

Tensor = torch.Tensor


def layout() -> Pass:
    """Changes plain `Linear` and one-axis `LayerNorm` modules; layers on other than three axes compute as before."""

    def run(model: Model) -> Model:
        module = copy.deepcopy(model.module)
        changed = {"linear": 0, "layer_norm": 0}
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear:
                    setattr(parent, name, _Pointwise(child))
                    changed["linear"] += 1
                elif type(child) is torch.nn.LayerNorm and len(child.normalized_shape) == 1:
                    setattr(parent, name, _ChannelNorm(child))
                    changed["layer_norm"] += 1
        return model.after("channels_first", module, facts=dict(changed))

    return run


class _Pointwise(torch.nn.Module):
    """A linear layer as a convolution; `weight` is [out, in, 1, 1]."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            return torch.nn.functional.linear(x, self.weight[:, :, 0, 0], self.bias)
        return _back(torch.nn.functional.conv2d(_front(x), self.weight, self.bias))


class _ChannelNorm(torch.nn.Module):
    """LayerNorm over the channels where they are."""

    def __init__(self, norm: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.norm, self.eps = norm.weight, norm.bias, norm, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            found: Tensor = self.norm(x)
            return found
        y = _front(x)
        centred = y - y.mean(1, keepdim=True)
        y = centred * torch.rsqrt((centred * centred).mean(1, keepdim=True) + self.eps)
        y = y if self.weight is None else y * self.weight[None, :, None, None]
        return _back(y if self.bias is None else y + self.bias[None, :, None, None])


def _front(x: Tensor) -> Tensor:
    """(batch, rows, channels) -> (batch, channels, 1, rows)"""
    return x.transpose(1, 2).unsqueeze(2)


def _back(x: Tensor) -> Tensor:
    return x.squeeze(2).transpose(1, 2)
