"""
Outlier channels in front of int8 products that have one scale for all of an activation: a graph that computes the same
and whose products see a narrower range.

In encoders a few channels of a few tokens stand far above the rest (in MiniLM one hidden column of the first token is
five times the largest of all others), and a scale that holds them rounds away what the others say. Where a layer of its
own makes the columns, as in a feed-forward block, the largest go beside the rest in fp32: no operator more runs over
the rest. Elsewhere they are divided by a factor, and their rows of the weight multiplied by it: one product a channel.

Which channels, is measured: the fp32 graph runs on sample rows. What would not become WORTH times narrower without
the OUTLIERS largest stays as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from edgeformer_agent import cases

ROWS = 8
TOKENS = 1024  # whose products are added up at once
OUTLIERS = 4  # channels of an activation
WORTH = 1.85  # times narrower without them
BY_COLUMN = ("Add", "Sub", "Mul", "Div", "Pow", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Neg", "Clip")

Peaks = Mapping[str, np.ndarray]


class Narrowed(NamedTuple):
    """graph; nodes that must stay in float; layer -> how many times narrower what reaches it is."""

    proto: onnx.ModelProto
    left: list[str]
    account: dict[str, float]


def peaks(proto: onnx.ModelProto, rows: Sequence[cases.Row], left: Collection[str] = ()) -> dict[str, np.ndarray]:
    """What reaches each product: the largest absolute value of every channel [depth], over `ROWS` of the rows."""
    found: dict[str, np.ndarray] = {}
    for arrays in _activations(proto, rows[:: -(-len(rows) // ROWS) or 1], left):
        for name, x in arrays.items():
            top = np.abs(x).max(0)
            found[name] = np.maximum(found.get(name, top), top)
    return found


def moments(proto: onnx.ModelProto, rows: Sequence[cases.Row], left: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Of what reaches each product, the mean of x xT [depth, depth] fp64 over the tokens of all rows, where finite."""
    total: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    parts: list[dict[str, np.ndarray]] = []
    for arrays in _activations(proto, rows, left):
        parts.append(arrays)
        if sum(len(next(iter(part.values()))) for part in parts) >= TOKENS:
            _add(total, tokens, parts)
    _add(total, tokens, parts)
    means = {name: found.astype(np.float64) / tokens[name] for name, found in total.items()}
    return {name: mean for name, mean in means.items() if np.isfinite(mean).all()}


def _add(total: dict[str, np.ndarray], tokens: dict[str, int], parts: list[dict[str, np.ndarray]]) -> None:
    """The products of many tokens at once: of a few, adding them up takes longer than they do. Empties `parts`."""
    for name in parts[0] if parts else ():
        x = np.concatenate([part[name] for part in parts])
        total[name] = total.get(name, 0) + x.T @ x
        tokens[name] = tokens.get(name, 0) + len(x)
    parts.clear()


def _activations(
    proto: onnx.ModelProto, rows: Sequence[cases.Row], left: Collection[str]
) -> Iterator[dict[str, np.ndarray]]:
    """For each row, what reaches the products that are not named in `left`: [tokens, depth]."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {x.name for x in (*copy.graph.input, *copy.graph.output)}
    names = sorted(_Graph(copy.graph).products(left))
    if not names or not rows:  # as in a graph of Gemm: a runtime asked for no output gives all
        return
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps every name
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = [x.name for x in session.get_inputs()]
    computed = [name for name in names if name not in given]  # a product may read an input, which is no output
    for row in rows:
        feed = {name: row[name][None] for name in given}
        found = feed | dict(zip(computed, session.run(computed, feed) if computed else (), strict=True))
        yield {name: found[name].reshape(-1, found[name].shape[-1]) for name in names}


def narrowed(proto: onnx.ModelProto, seen: Peaks, left: Collection[str] = ()) -> Narrowed:
    """A copy; nodes named in `left` are no int8 products. What has no peaks in `seen` stays as it is."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = _Graph(made.graph)
    account: dict[str, float] = {}
    beside = list(left)
    for x, readers in graph.products(left).items():
        if x not in seen:
            continue
        peak, level = seen[x], _level(seen[x])
        if not peak.max() >= WORTH * level > 0:
            continue
        account |= {graph.layer(node): round(float(peak.max()) / level, 2) for node in readers}
        chain = graph.chain(x) if len(readers) == 1 else None
        if chain is None:
            graph.scale(x, readers, np.maximum(peak / level, 1))
        else:
            beside += graph.aside(chain, readers[0], np.sort(np.argsort(-peak, kind="stable")[:OUTLIERS]))
    graph.close()
    return Narrowed(made, beside, account)


def _level(peak: np.ndarray) -> float:
    """The largest that is no outlier."""
    return float(np.sort(peak)[: -OUTLIERS or None].max(initial=0.0))


class _Graph:
    """A graph while it is rewritten, in place."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph, self.nodes = graph, list(graph.node)
        self.weights = {w.name: w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.results = {x.name for x in graph.output}

    def products(self, left: Collection[str]) -> dict[str, list[onnx.NodeProto]]:
        """Activation -> the products [..., depth] x constant (depth, channels) that read it."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            if self._product(node) and node.name not in left:
                found.setdefault(node.input[0], []).append(node)
        return found

    def layer(self, product: onnx.NodeProto) -> str:
        """By the name of the bias that is added to it; exporters store equal ones once, and then it names no layer."""
        end = self._end(product)
        named = end is not product and len(self.users[end.input[1]]) == 1
        return str(end.input[1].removesuffix(".bias") if named else product.name)

    def chain(self, x: str) -> list[onnx.NodeProto] | None:
        """The nodes that make the columns of `x` one by one, from products on; None where others do, or read them."""
        found: list[onnx.NodeProto] = []
        if not self._collect(x, found):
            return None
        inside = {id(node) for node in found}
        outputs = {node.output[0] for node in found} - {x}
        shared = any(id(user) not in inside for name in outputs for user in self.users.get(name, []))
        return None if shared or len(self.users[x]) > 1 or self.results & (outputs | {x}) else found

    def _collect(self, x: str, found: list[onnx.NodeProto]) -> bool:
        """In the order of the computation."""
        node = self.makers.get(x)
        if node is None or len(node.output) != 1:
            return False
        if any(node is other for other in found):
            return True
        if not self._product(node):
            inputs = [name for name in node.input if name]
            varying = [name for name in inputs if name not in self.weights]
            vectors = all(len(self.weights[name].dims) <= 1 for name in inputs if name in self.weights)
            if node.op_type not in BY_COLUMN or not vectors or not all(self._collect(n, found) for n in varying):
                return False
        found.append(node)
        return True

    def aside(self, chain: list[onnx.NodeProto], product: onnx.NodeProto, picked: np.ndarray) -> list[str]:
        """The columns `picked` beside the others, in fp32. Names of the products that they take."""
        inside, beside = {node.output[0] for node in chain}, []
        for node in chain:
            inputs = []
            for i, name in enumerate(node.input):
                inputs.append(f"{name}/aside" if name in inside else name)
                if name in self.weights and max(self.weights[name].dims, default=1) > 1:
                    matrix = self._array(name)
                    # Named by the node: layers may share a constant, and have other outliers.
                    inputs[-1] = self._constant(f"{node.name}/{i}/aside", matrix[..., picked])
                    if node.op_type in ("MatMul", "Add"):
                        node.input[i] = self._constant(f"{node.name}/{i}/rest", _without(matrix, picked))
            beside.append(helper.make_node(node.op_type, inputs, [f"{node.output[0]}/aside"], f"{node.name}/aside"))
            beside[-1].attribute.extend(node.attribute)
        matrix = self._array(product.input[1])
        inputs = [f"{product.input[0]}/aside", self._constant(f"{product.input[1]}/aside", matrix[picked])]
        product.input[1] = self._constant(f"{product.input[1]}/rest", _without(matrix.T, picked).T)
        beside.append(helper.make_node("MatMul", inputs, [f"{product.output[0]}/aside"], f"{product.name}/aside"))
        end = self._end(product)  # behind the bias, which the runtime adds in the product
        out, end.output[0] = end.output[0], f"{end.output[0]}/rest"
        del self.makers[out]  # no chain goes through a sum of two
        both = [end.output[0], beside[-1].output[0]]
        self._insert(end, [*beside, helper.make_node("Add", both, [out], f"{out}/both")])
        return [node.name for node in beside if node.op_type == "MatMul"]

    def scale(self, x: str, products: Sequence[onnx.NodeProto], factors: np.ndarray) -> None:
        """Channels divided by `factors` [depth] in front of the products, whose weights take them."""
        inverse = self._constant(f"{x}/inverse", (1 / factors).astype(np.float32))
        made = helper.make_node("Mul", [x, inverse], [f"{x}/level"], f"{x}/level")
        self._insert(products[0], [made], before=True)
        for product in products:
            matrix = self._array(product.input[1]) * factors[:, None].astype(np.float32)
            product.input[:] = [made.output[0], self._constant(f"{product.input[1]}/level", matrix)]

    def close(self) -> None:
        """Puts the nodes back, without the constants that nobody reads any more."""
        read = {name for node in self.nodes for name in node.input}
        kept = [w for w in self.graph.initializer if w.name in read | self.results]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)

    def _product(self, node: onnx.NodeProto) -> bool:
        """With a matrix of its own: one that layers share cannot follow the outliers of each."""
        matrix = self.weights.get(node.input[1]) if node.op_type == "MatMul" else None
        return matrix is not None and len(matrix.dims) == 2 and len(self.users.get(node.input[1], ())) < 2

    def _end(self, product: onnx.NodeProto) -> onnx.NodeProto:
        """The addition of a bias right behind a product, or the product."""
        users = self.users.get(product.output[0], [])
        biased = len(users) == 1 and users[0].op_type == "Add" and users[0].input[1] in self.weights
        return users[0] if biased else product

    def _array(self, name: str) -> np.ndarray:
        array: np.ndarray = numpy_helper.to_array(self.weights[name])
        return array

    def _constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
            self.graph.initializer.append(self.weights[name])
        return name

    def _insert(self, place: onnx.NodeProto, made: list[onnx.NodeProto], before: bool = False) -> None:
        at = next(i for i, node in enumerate(self.nodes) if node is place)
        self.nodes[at + (not before) : at + (not before)] = made


def _without(matrix: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Zeros in these columns."""
    made = matrix.copy()
    made[..., picked] = 0
    return made
