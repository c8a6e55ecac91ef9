"""
What can be cut out of a transformer, read from its exported graph and not from its name.

A `Group` is a set of equal units between linear layers: the heads of one attention (rows of the query, key and value
layers, columns of the output layer) or the hidden columns of one feed-forward block. In the graph an attention is what
feeds a softmax and what the softmax weights; a feed-forward block is a linear layer that reaches another through
elementwise operators alone. Fused layers (query, key and value in one, or a gate beside its values) are parts of a row
axis, first part first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .errors import BadInput
from .model import Model

HEADS, COLUMNS = "heads", "columns"
# A walk ends at what mixes channels or tokens; every other operator of an encoder works on one channel at a time.
_ENDS = ("linear", "matmul", "bmm", "softmax", "layer_norm", "embedding", "conv2d", "scaled_dot_product_attention")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size",)

Node = torch.fx.Node


class Group(NamedTuple):
    """Unit u owns rows `p * units * width + u * width ...` of each layer in `into` for each part p, and columns
    `u * width ...` of `out`. Layers are named by their path in the module."""

    kind: str  # HEADS or COLUMNS
    layer: int  # which layer of the model, from the input
    into: tuple[str, ...]
    out: str
    units: int
    width: int  # channels a unit
    parts: int  # 1, or 3 for fused query-key-value, 2 for a fused gate

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"


def groups(model: Model) -> tuple[Group, ...]:
    """Every group in the order of the computation. Raises BadInput where the model has none that can be cut."""
    length = min(16, model.max_length) if model.lengths else 0
    try:
        with torch.no_grad():
            graph = torch.export.export(model.module, model.example(length), strict=False)
    except Exception as error:
        raise BadInput(f"{model.name} cannot be traced, so nothing in it can be pruned: {error}") from error
    owners = graph.graph_signature.inputs_to_parameters
    linears = {n: owners[n.args[1].name].removesuffix(".weight") for n in graph.graph.nodes if _is(n, "linear")}
    found = [g for n in graph.graph.nodes if (g := _attention(n, linears) or _feed_forward(n, linears))]
    if not found:
        raise BadInput(
            f"{model.name}: no attention and no feed-forward block in its graph; prune before the attention is swapped"
        )
    places = sorted({_layer(model.module, g.out) for g in found})
    return tuple(g._replace(layer=places.index(_layer(model.module, g.out))) for g in found)


def stacks(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.ModuleList]]:
    """Lists of layers, by path."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, torch.nn.ModuleList))


def rows(group: Group, units: torch.Tensor) -> torch.Tensor:
    """The rows of each layer in `into` that belong to `units`, first part first."""
    columns = channels(group, units)
    return torch.cat([columns + part * group.units * group.width for part in range(group.parts)])


def channels(group: Group, units: torch.Tensor) -> torch.Tensor:
    """The columns of `out` that belong to `units`."""
    return (units[:, None] * group.width + torch.arange(group.width)).flatten()


def cut(module: torch.nn.Module, group: Group, kept: torch.Tensor) -> None:
    """
    Leaves only the units `kept` (ascending) in `module`, in place. Without any, `out` gives its bias alone and what
    fed it has no weights left; exporters drop it as dead.
    """
    if not len(kept):
        channels_in = group.parts * group.width
        for name in group.into:
            _replace(module, name, _First(channels_in))
        _replace(module, group.out, _Constant(module.get_submodule(group.out)))
    else:
        for name in group.into:
            _narrow(module.get_submodule(name), 0, rows(group, kept))
        _narrow(module.get_submodule(group.out), 1, channels(group, kept))
    if group.kind == HEADS:
        _recount(module.get_submodule(group.into[0].rpartition(".")[0]), group, kept if len(kept) else torch.zeros(1))


class _First(torch.nn.Module):
    """The first channels of the input: stands where nothing is computed any more."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.count]


class _Constant(torch.nn.Module):
    """A linear layer without columns: its bias [channels], which broadcasts over tokens."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, _x: torch.Tensor) -> torch.Tensor:
        return self.bias


class _Heads:
    """
    Forward pre-hook of an attention whose layers share a tensor per head (a relative position bias): of every 4-axis
    argument with one entry a head, the entries of the kept heads.
    """

    def __init__(self, before: int, kept: torch.Tensor) -> None:
        self.before, self.kept = before, kept.clone()

    def __call__(self, _module: torch.nn.Module, args: Any, options: Any) -> tuple[Any, Any]:
        return tuple(map(self._of, args)), {key: self._of(value) for key, value in options.items()}

    def _of(self, x: Any) -> Any:
        per_head = isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] == self.before and self.before > 1
        return x[:, self.kept] if per_head else x


def _replace(module: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


def _narrow(linear: Any, axis: int, index: torch.Tensor) -> None:
    """What could learn before still can: distillation comes after."""
    learns = linear.weight.requires_grad
    linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(axis, index), requires_grad=learns)
    if axis == 0 and linear.bias is not None:
        linear.bias = torch.nn.Parameter(linear.bias.detach()[index], requires_grad=learns)
    linear.out_features, linear.in_features = linear.weight.shape


def _recount(attention: Any, group: Group, kept: torch.Tensor) -> None:
    """What the attention module says of its own size; `num_attention_heads` is also what `attention.swap` reads."""
    for names, before, after in (
        (_HEAD_COUNTS, group.units, len(kept)),
        (_WIDTHS, group.units * group.width, len(kept) * group.width),
    ):
        for name in names:
            if getattr(attention, name, None) == before:
                setattr(attention, name, after)
    attention.num_attention_heads = len(kept)
    if len(kept) < group.units:
        attention.register_forward_pre_hook(_Heads(group.units, kept.long()), with_kwargs=True)


def _attention(node: Node, linears: dict[Node, str]) -> Group | None:
    """From its softmax: back to the scores and to query and key, on to the product with the values and the output."""
    if not _is(node, "softmax"):
        return None
    scores = _nearest(node, _inputs, "matmul")
    product = _nearest(node, lambda n: tuple(n.users), "matmul")
    if scores is None or product is None:
        return None
    value = product.args[1]
    sides = [_nearest(side, _inputs, "linear", itself=True) for side in (*scores.args[:2], value)]  # type: ignore[arg-type]
    out = _nearest(product, lambda n: tuple(n.users), "linear")
    if out is None or any(side is None for side in sides):
        return None
    into = tuple(dict.fromkeys(linears[side] for side in sides if side is not None))
    heads, dim = product.meta["val"].shape[1], product.meta["val"].shape[-1]
    parts = {1: 3, 3: 1}.get(len(into), 0)
    sizes = {n.meta["val"].shape[-1] for n in sides if n is not None}
    if sizes != {parts * heads * dim} or not _parts_first(sides[0], parts, heads):
        raise BadInput(
            f"{into[0]}: rows {sorted(sizes)} are not {heads} heads of {dim} for query, key and value alike; attention "
            "with shared keys or another order of rows is not pruned"
        )
    return Group(HEADS, 0, into, linears[out], int(heads), int(dim), parts)


def _parts_first(linear: Node | None, parts: int, heads: int) -> bool:
    """Whether a fused layer is viewed as [.., 3, heads, dim]: the order `rows` assumes."""
    if parts == 1 or linear is None:
        return True
    shapes = [tuple(user.meta["val"].shape) for user in linear.users]
    return all(shape[-3:-1] == (parts, heads) for shape in shapes)


def _feed_forward(node: Node, linears: dict[Node, str]) -> Group | None:
    """hidden -> columns -> hidden, with nothing but elementwise operators between."""
    if node not in linears:
        return None
    first, seen = None, [node.args[0]]
    for step in seen:
        assert isinstance(step, Node)
        if step in linears and first in (None, step):
            first = step
        elif step.op == "placeholder" or _is(step, *_ENDS):
            return None
        else:
            seen += [n for n in _inputs(step) if n not in seen]
    if first is None or len(seen) < 2:
        return None
    columns, hidden = node.args[0].meta["val"].shape[-1], first.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    parts, rest = divmod(first.meta["val"].shape[-1], columns)
    if rest or parts > 2 or hidden != node.meta["val"].shape[-1] or node.meta["val"].ndim < 3:
        return None
    return Group(COLUMNS, 0, (linears[first],), linears[node], int(columns), 1, int(parts))


def _nearest(node: Node, step: Callable[[Node], tuple[Node, ...]], kind: str, itself: bool = False) -> Node | None:
    """The first operator of a kind on any way from a node, which other linear layers end."""
    seen = [node]
    for n in seen:
        if (n is not node or itself) and _is(n, kind):
            return n
        if n is node or not _is(n, "linear", "layer_norm", "embedding"):
            seen += [m for m in step(n) if m not in seen]
    return None


def _inputs(node: Node) -> tuple[Node, ...]:
    return tuple(node.all_input_nodes)


def _is(node: Node, *kinds: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in kinds


def _layer(module: torch.nn.Module, path: str) -> int:
    """The index in the list of layers that holds this path; the first numbers of deeper lists do not count."""
    name = next((n for n, _ in stacks(module) if path.startswith(f"{n}.")), None)
    return int(path.removeprefix(f"{name}.").split(".")[0]) if name is not None else 0
