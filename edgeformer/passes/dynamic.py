"""
Work that depends on the input: tokens that nobody attends to leave between layers, and rows that are sure early skip
the layers that remain.

    build(model, target, formats=["onnx"], passes=[dynamic.tokens(texts, keep=0.6, after=1)])
    build(model, target, formats=["onnx"], passes=[dynamic.early_exit(texts, after=2)])

`tokens`: the attention mass that a token receives in layer `after` (mean over heads and valid queries) is compared with
a threshold; the batch goes on with the most that any of its rows keeps, the first token always among them. At the end
a token that left gets the state with which it left, so that heads and poolings of any kind work on.
`early_exit`: a linear reading of the states after layer `after`, fitted in closed form to the model's own logits; where
the surest class of every row is above a threshold, the layers that remain are skipped.

Both become standard operators in ONNX (TopK and GatherElements; If) and leave every other shape free. Formats with
static shapes cannot hold them. Shapes of arguments tell what is a state, a mask or a position: no model is named here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree

from .. import calibration, data, structure
from ..errors import BadInput
from ..model import Model
from . import Pass

NEVER_DROPS, NEVER_EXITS = -1.0, 2.0  # below every attention mass; above every probability
MOST_ROWS = 512
RIDGE = 0.01

Tensor = torch.Tensor


class Saved(NamedTuple):
    """What one row did not compute."""

    tokens: int
    layers_run: float  # of the model's layers, each weighted by the share of the row's tokens that it saw
    layers: int


def tokens(rows: calibration.Rows, *, keep: float = 0.6, after: int = 1, threshold: float | None = None) -> Pass:
    """
    After layer `after` (from 0) tokens below a threshold leave: the one with which the rows keep the share `keep` on
    average, or `threshold`, relative to a mass spread evenly. Raises BadInput.
    """
    if not 0 < keep <= 1:
        raise BadInput(f"keep {keep} must be above 0 and at most 1: the share of tokens that go on")

    def run(model: Model) -> Model:
        module, state, stack = _prepared(model, after)
        watched = module.module.get_submodule(_attention_group(model, after).into[0].rpartition(".")[0])
        watched.register_forward_pre_hook(_Ask(), with_kwargs=True)
        watched.register_forward_hook(_Watch(state))
        for number, layer in enumerate(stack[after + 1 :]):
            layer.register_forward_pre_hook(_Subset(state, first=number == 0), with_kwargs=True)
        stack[-1].register_forward_hook(_Restore(state))
        batches = list(calibration.batches(model, rows, MOST_ROWS))
        state.threshold = _quantile(module, batches, 1 - keep) if threshold is None else threshold
        kept = [state.share for b in batches if _run(module, b) is not None]
        facts = {"after": after, "threshold": state.threshold, "tokens_kept": round(float(np.mean(kept)), 4)}
        return model.after("dynamic.tokens", module, facts=facts)

    return run


def early_exit(
    rows: calibration.Rows, *, after: int = 2, agreement: float = 0.99, threshold: float | None = None
) -> Pass:
    """
    After layer `after` (from 0) a batch is done where every row's surest class is above a threshold: the least with
    which the rows that leave have the class of the whole model in the share `agreement` of half of `rows`, which the
    fit did not see; or `threshold`. For classifications. Raises BadInput.
    """
    if not 0 < agreement <= 1:
        raise BadInput(f"agreement {agreement} must be above 0 and at most 1")

    def run(model: Model) -> Model:
        if model.task.kind != "classification":
            raise BadInput(f"{model.name} is no classification, so nothing says how sure a row is; use dynamic.tokens")
        module, state, stack = _prepared(model, after)
        stack[after].register_forward_hook(_Decide(module))
        for i in range(after + 1, len(stack)):
            stack[i] = _Skippable(stack[i], state)
        seen = [_read(module, b) for b in calibration.batches(model, rows, MOST_ROWS)]
        states, wanted = (torch.cat(parts) for parts in zip(*seen, strict=True))
        reading = _ridge(states[::2], wanted[::2])
        module.reading = torch.nn.Linear(reading.shape[1], reading.shape[0], bias=False).requires_grad_(False)
        module.reading.weight.copy_(reading)
        found = _sure_enough(states[1::2] @ reading.T, wanted[1::2], agreement)
        state.threshold = found if threshold is None else threshold
        left = (states[1::2] @ reading.T).softmax(-1).amax(-1) > state.threshold
        facts = {"after": after, "threshold": state.threshold, "rows_leaving": round(float(left.float().mean()), 4)}
        return model.after("dynamic.early_exit", module, facts=facts)

    return run


def saved(model: Model, rows: calibration.Rows) -> tuple[Saved, ...]:
    """What each row alone would not compute, in the order of the rows. Raises BadInput for a model without a pass."""
    if not isinstance(model.module, _Dynamic):
        raise BadInput(f"{model.name} has no dynamic pass in its history: every row computes everything")
    found = rows if isinstance(rows, data.Rows) else data.load(model, list(rows), None)
    state, made = model.module.state, []
    for row in found.rows:
        _run(
            model.module,
            calibration.Batch(tuple(torch.from_numpy(row[x.name][None]) for x in model.inputs), None, None),
        )
        left = state.layers - state.after - 1
        share = 0.0 if state.exited else state.share
        made.append(Saved(state.tokens, round(state.after + 1 + share * left, 4), state.layers))
    return tuple(made)


# --- what travels with the module -------------------------------------------------------------------------------------


class _State:
    """
    Shared by the hooks of one module during one call. Tensors of a call are gone at its end: exporters trace with
    stand-ins that must not stay.
    """

    def __init__(self, after: int, layers: int) -> None:
        self.after, self.layers, self.threshold = after, layers, 0.0
        self.tokens, self.share, self.exited = 0, 1.0, False  # of the last call outside an export
        self.boxed = False  # whether layers return a tuple
        self.record: list[Tensor] | None = None  # while a threshold is looked for
        self.clear()

    def clear(self) -> None:
        self.valid: Tensor | None = None  # [B, N]
        self.mass: Tensor | None = None  # [B, N], 1 where attention is spread evenly
        self.index: Tensor | None = None  # [B, k] of the tokens that go on, ascending
        self.full: Tensor | None = None  # [B, N, C] states where tokens left
        self.sure: Tensor | None = None  # scalar bool
        self.logits: Tensor | None = None


class _Dynamic(torch.nn.Module):
    """The module and the state of a call: notes which tokens are padding, answers early where all rows are sure."""

    def __init__(self, module: torch.nn.Module, mask: int, state: _State) -> None:
        super().__init__()
        self.module, self.mask, self.state = module, mask, state
        self.reading: Any = None

    def forward(self, *tensors: Tensor) -> Tensor:
        state = self.state
        state.valid = tensors[self.mask].bool() if self.mask >= 0 else None
        output: Tensor = self.module(*tensors)
        if state.sure is not None and state.logits is not None:
            output = torch.where(state.sure, state.logits, output)
        if not torch.compiler.is_exporting():
            state.exited = bool(state.sure) if state.sure is not None else False
        state.clear()
        return output


class _Ask:
    """Attention modules that give their weights only when asked are asked."""

    def __call__(self, module: torch.nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        asked = "output_attentions" in inspect.signature(module.forward).parameters
        return args, options | ({"output_attentions": True} if asked else {})


class _Watch:
    """Takes the attention mass from what an attention module returns."""

    def __init__(self, state: _State) -> None:
        self.state = state

    def __call__(self, module: torch.nn.Module, _args: Any, output: Any) -> None:
        weights = next((x for x in output if isinstance(x, Tensor) and x.ndim == 4), None)
        if weights is None:
            raise BadInput(f"{type(module).__name__} gives no attention weights; use dynamic.tokens on dense attention")
        mass, valid = weights.mean(1), self.state.valid
        mass = mass.sum(1) if valid is None else (mass * valid[:, :, None]).sum(1)
        self.state.mass = mass
        if self.state.record is not None:
            self.state.record.append(calibration.tokens(mass[..., None], valid).flatten())


class _Subset:
    """Pre-hook of the layers behind: the arguments of the tokens that go on. The first of them decides which."""

    def __init__(self, state: _State, first: bool) -> None:
        self.state, self.first = state, first

    def __call__(self, _module: torch.nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden, *rest = args
        if self.first:
            self.state.full, self.state.index = hidden, self._index()
            hidden = _gathered(hidden, self.state.index)
        index = self.state.index
        return (hidden, *(_gathered(x, index) for x in rest)), {k: _gathered(x, index) for k, x in options.items()}

    def _index(self) -> Tensor:
        state, mass = self.state, self.state.mass
        assert mass is not None
        stays = mass > state.threshold
        if state.valid is not None:
            stays = stays & state.valid
            mass = mass.masked_fill(~state.valid, -2.0)
        first = torch.arange(mass.shape[1], device=mass.device) == 0
        most: Any = (stays | first).sum(1).max().item()  # a symbol in an export
        if torch.compiler.is_exporting():
            torch._check(most >= 1)  # type: ignore[no-untyped-call]
            torch._check(most <= mass.shape[1])  # type: ignore[no-untyped-call]
        else:
            state.tokens, state.share = mass.shape[1] - int(most), int(most) / mass.shape[1]
        chosen = mass.masked_fill(first, torch.finfo(mass.dtype).max).topk(most, dim=1).indices
        return chosen.sort(dim=1).values


class _Restore:
    """Hook of the last layer: tokens that left come back with the state they left with."""

    def __init__(self, state: _State) -> None:
        self.state = state

    def __call__(self, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        full, index = self.state.full, self.state.index
        assert full is not None and index is not None
        full = full.scatter(1, index[:, :, None].expand(-1, -1, full.shape[2]), hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full


class _Decide:
    """Hook of the layer after which a batch may be done."""

    def __init__(self, owner: _Dynamic) -> None:
        self.state, self.owner = owner.state, [owner]  # in a list: no second way to the owner's parameters

    def __call__(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        state = self.state
        state.boxed = isinstance(output, tuple)
        hidden = output[0] if state.boxed else output
        valid = torch.ones(hidden.shape[:2]) if state.valid is None else state.valid.to(hidden.dtype)
        mean = (hidden * valid[:, :, None]).sum(1) / valid.sum(1, keepdim=True)
        states = torch.cat([hidden[:, 0], mean, torch.ones_like(mean[:, :1])], 1)
        if state.record is not None:
            state.record.append(states)
        if (reading := self.owner[0].reading) is not None:
            state.logits = reading(states)
            state.sure = (state.logits.softmax(-1).amax(-1) > state.threshold).all()


class _Skippable(torch.nn.Module):
    """A layer that is not run where the batch is done: If in an exported program."""

    def __init__(self, layer: torch.nn.Module, state: _State) -> None:
        super().__init__()
        self.layer, self.state = layer, state

    def __getattr__(self, name: str) -> Any:
        """What a model asks its layers for, such as a kind of attention, the layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **options: Any) -> Any:
        state = self.state
        if state.sure is None or (not torch.compiler.is_exporting() and not bool(state.sure)):
            return self.layer(*args, **options)
        if not torch.compiler.is_exporting():
            return (args[0],) if state.boxed else args[0]
        leaves, spec = pytree.tree_flatten((args, options))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def skip(*tensors: Tensor) -> Tensor:
            return tensors[0].clone()

        def run(*tensors: Tensor) -> Tensor:
            whole = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                whole[i] = tensor
            given, named = pytree.tree_unflatten(whole, spec)
            output = self.layer(*given, **named)
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            return hidden

        hidden = torch.cond(state.sure, skip, run, tuple(leaves[i] for i in places))
        return (hidden,) if state.boxed else hidden


def _gathered(x: Any, index: Tensor | None) -> Any:
    """
    The chosen tokens of one argument: states and positions [B, N, C], masks and biases [B, H, N, N] or [B, H, 1, N],
    whose first axes may be 1; tuples of them; anything else as it is.
    """
    assert index is not None
    if isinstance(x, tuple):
        return tuple(_gathered(part, index) for part in x)
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        return x
    batch, count = index.shape
    if x.ndim == 3:
        return x.expand(batch, -1, -1).gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
    x = x.expand(batch, -1, -1, -1)
    x = x.gather(3, index[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
    if isinstance(x.shape[2], int) and x.shape[2] == 1:
        return x
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, count))


# --- putting them there -----------------------------------------------------------------------------------------------


def _prepared(model: Model, after: int) -> tuple[_Dynamic, _State, Any]:
    """A copy with a state, and its list of layers."""
    if isinstance(model.module, _Dynamic):
        raise BadInput(f"{model.name} has a dynamic pass already; a model takes one")
    module = copy.deepcopy(model.module)
    heads = _attention_group(model, after)
    stack = next(m for name, m in structure.stacks(module) if heads.out.startswith(f"{name}."))
    if not 0 <= after < len(stack) - 1:
        raise BadInput(f"after={after}: {model.name} has {len(stack)} layers, from 0; one at least must come after it")
    state = _State(after, len(stack))
    names = [x.name for x in model.inputs]
    mask = names.index("attention_mask") if "attention_mask" in names else -1
    return _Dynamic(module, mask, state).eval(), state, stack


def _attention_group(model: Model, after: int) -> structure.Group:
    found = [g for g in structure.groups(model) if g.kind == structure.HEADS]
    return next((g for g in found if g.layer == after), found[0])


def _run(module: _Dynamic, batch: calibration.Batch) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(*batch.inputs)
    return output


def _quantile(module: _Dynamic, batches: Sequence[calibration.Batch], share: float) -> float:
    """The mass under which that share of the tokens of all rows lies."""
    masses: list[Tensor] = []
    module.state.threshold, module.state.record = NEVER_DROPS, masses
    for batch in batches:
        _run(module, batch)
    module.state.record = None
    return float(np.quantile(torch.cat(masses).numpy(), share)) if share > 0 else NEVER_DROPS


def _read(module: _Dynamic, batch: calibration.Batch) -> tuple[Tensor, Tensor]:
    """What the reading would read [B, 2 C + 1], and the logits of the whole model."""
    states: list[Tensor] = []
    module.state.record = states
    logits = _run(module, batch)
    module.state.record = None
    return states[0], logits


def _ridge(states: Tensor, wanted: Tensor) -> Tensor:
    """[classes, 2 C + 1], in closed form."""
    x, y = states.double(), wanted.double()
    moments = x.T @ x
    damped = moments + RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=x.dtype)
    solved: Tensor = torch.linalg.solve(damped, x.T @ y)
    return solved.T.float()


def _sure_enough(logits: Tensor, wanted: Tensor, agreement: float) -> float:
    """The least probability above which rows agree with `wanted` in that share; never, where there is none."""
    sure, classes = logits.softmax(-1).max(-1)
    order = sure.argsort(descending=True)
    right = (classes == wanted.argmax(-1))[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = (right >= agreement).nonzero()
    return float(sure[order][int(enough.max())]) - 1e-6 if len(enough) else NEVER_EXITS
