"""
Root-mean-square norms that fp16 can compute.

Decoders carry a few numbers of some thousands through their layers (the first token's, mostly), whose squares are
beyond 65504: the mean becomes infinite, and the row zero. Here each row is divided by its largest number first,

    x / sqrt(mean(x^2) + e)  =  y / sqrt(mean(y^2) + e / s^2)    with y = x / s, s = max |x|

which is the same in fp32, and keeps everything between 0 and 1 whatever the size of x. Small rows gain as well: their
squares would have been lost below 6e-8.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch

LEAST = 2.0**-14  # the least fp16 number of full precision: no row is divided by less

_aten = torch.ops.aten
Node = torch.fx.Node


class _Norm(NamedTuple):
    """x and its reciprocal root mean square are multiplied in `product`."""

    product: Node
    x: Node
    epsilon: float


def scale(graph: torch.fx.Graph) -> int:
    """Rewrites every such norm over the last axis, in place, and says how many there were."""
    norms = [norm for node in graph.nodes if (norm := _norm(node))]
    for norm in norms:
        with graph.inserting_before(norm.product):
            norm.product.replace_all_uses_with(_scaled(graph, norm))
    graph.eliminate_dead_code()
    return len(norms)


def _norm(node: Node) -> _Norm | None:
    """x * rsqrt(mean(x * x) + e)"""
    if node.target is not _aten.mul.Tensor:
        return None
    for x, root in (node.args, node.args[::-1]):
        shifted = _inputs(root, _aten.rsqrt.default)[0]
        mean, epsilon = (*_inputs(shifted, _aten.add.Tensor), None)[:2]
        square, *over = _inputs(mean, _aten.mean.dim)
        squared = _inputs(square, _aten.pow.Tensor_Scalar)
        if isinstance(x, Node) and isinstance(epsilon, float) and over == [[-1], True] and squared == (x, 2):
            return _Norm(node, x, epsilon)
    return None


def _inputs(node: object, operator: object) -> tuple[object, ...]:
    """Those of a node of this operator; None for anything else."""
    return node.args if isinstance(node, Node) and node.target is operator else (None,)


def _scaled(graph: torch.fx.Graph, norm: _Norm) -> Node:
    root = sqrt(norm.epsilon)
    size = graph.call_function(_aten.amax.default, (graph.call_function(_aten.abs.default, (norm.x,)), [-1], True))
    size = graph.call_function(_aten.clamp.default, (size, max(root, LEAST)))
    y = graph.call_function(_aten.div.Tensor, (norm.x, size))
    mean = graph.call_function(_aten.mean.dim, (graph.call_function(_aten.mul.Tensor, (y, y)), [-1], True))
    small = graph.call_function(_aten.div.Tensor, (root, size))  # its square: e / s^2, and s^2 may be beyond fp16
    shifted = graph.call_function(_aten.add.Tensor, (mean, graph.call_function(_aten.mul.Tensor, (small, small))))
    return graph.call_function(_aten.mul.Tensor, (y, graph.call_function(_aten.rsqrt.default, (shifted,))))
