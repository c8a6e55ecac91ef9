"""
Distillation: a student learns to answer as its teacher does, on texts that need no labels.

    build(model, target, passes=[student.layers(3), distil.distil(model, texts, recipe=Recipe(epochs=3))])

What a student may learn from: the teacher's answer (response), its last hidden states through a projection (feature),
how its tokens relate to each other (relation, on the values of the last attention layer), how it arranges a batch
(batch), and labels (hard). The teacher answers once, and only the texts that training comes to: its outputs are kept in
a folder, from which an interrupted run goes on.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..errors import BadInput
from ..model import Model
from ..stages import Progress, quiet
from ..train import Recipe, fit, read, used, write
from . import Pass
from .student import layer_stack

Tensor = torch.Tensor
Text = str | tuple[str, str]  # one, or a pair that the model compares

SHARD = 4096  # rows of teacher outputs a file
TEACHER_BATCH = 64
RELATION_HEADS = 8
_VALUES = ("self.value", "attention.v_lin", "attn.v", "v_proj", "v")  # a layer's projection to values, by family


@dataclass(frozen=True)
class Losses:
    """Weights of what is learned from; 0 leaves it out. Each is of order 1, so that weights compare."""

    response: float = 1.0
    hard: float = 0.0  # labels; rows without one take no part
    feature: float = 0.0
    relation: float = 0.0
    batch: float = 0.0
    temperature: float = 2.0  # of both distributions in response

    def __post_init__(self) -> None:
        weights = (self.response, self.hard, self.feature, self.relation, self.batch)
        if min(weights) < 0 or not any(weights) or self.temperature <= 0:
            raise BadInput(f"losses {weights} must not be below 0 nor all 0, temperature {self.temperature} above 0")

    @property
    def deep(self) -> tuple[str, ...]:
        """What is read from inside the models, a vector a token."""
        hidden = ("hidden",) if self.feature or self.batch else ()
        return hidden + (("values",) if self.relation else ())


@dataclass(frozen=True)
class Augment:
    """Texts made from the given ones, which the teacher answers: each as many times, changed word by word."""

    copies: int = 0
    mask: float = 0.1  # words replaced by the mask token
    swap: float = 0.1  # words replaced by a word of another text
    cut: float = 0.25  # texts cut to a run of their words
    join: float = 0.25  # texts followed by another one: longer than what was given
    seed: int = 0


def distil(
    teacher: Model,
    texts: Sequence[Text],
    *,
    labels: Sequence[float] | None = None,
    losses: Losses = Losses(),
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    augment: Augment = Augment(),
    length: int = 128,
    dropout: float = 0.0,
    embeddings: bool = True,
    folder: str | Path | None = None,
    progress: Progress = quiet,
) -> Pass:
    """
    `labels`: one a text, for `losses.hard`. `length`: longest text in tokens. `dropout`: in the student as it learns;
    a teacher that answers every row leaves little to overfit. `embeddings`: words learn too; a student that has its
    teacher's does better to keep them. `folder`: where the teacher's outputs and the checkpoint are kept; a second call
    with the same arguments goes on from there. Raises BadInput.
    """
    if losses.hard and labels is None:
        raise BadInput("losses.hard needs labels, one a text")
    if labels is not None and len(labels) != len(texts):
        raise BadInput(f"{len(labels)} labels for {len(texts)} texts; give one a text")

    def run(model: Model) -> Model:
        mask = str(getattr(teacher.tokenizer, "mask_token", None) or "")
        read_texts = [*texts, *augmented(texts, augment, mask)]
        rows = _encode(model, read_texts, length)
        theirs = _encode(teacher, read_texts, length)
        if losses.deep and any(len(a[0]) != len(b[0]) for a, b in zip(rows, theirs, strict=True)):
            raise BadInput("feature, relation and batch compare tokens; teacher and student cut texts differently")
        lengths = [len(row[0]) for row in rows]
        if model.output.shape[1:2] == (-1,) and len({*lengths}) > 1:
            raise BadInput(f"{model.name} answers every token; distillation learns one answer a text")
        picked = used(lengths, recipe)
        kept_in = Path(folder) if folder else None
        known = answers(teacher, [theirs[i] for i in picked], losses.deep, kept_in, recipe.bf16, progress)
        module = _learning(model.module, dropout)
        learner = _Learner(model, module, known, picked, _targets(labels, len(read_texts)), rows, losses)
        asked = (losses, dropout, model.task.kind, known.made_of, labels, *(() if embeddings else ("words fixed",)))
        made_of = _digest(repr(asked), rows)
        name = _digest(f"{made_of} {recipe} {_of(module)}", ())[:16]
        checkpoint = kept_in / "students" / f"{name}.safetensors" if kept_in else None
        with _tapped(module, losses.deep) as taken, _words(module, learn=embeddings):
            done = fit(
                learner.module,
                lengths,
                learner.loss(taken),
                recipe,
                checkpoint=checkpoint,
                made_of=made_of,
                what="distil",
                progress=progress,
            )
        facts = {
            "texts": len(texts),
            "augmented": len(read_texts) - len(texts),
            "teacher": teacher.name,
            "losses": {k: v for k, v in vars(losses).items() if v},
            "epochs": recipe.epochs,
            "steps": done.steps,
            "rate": recipe.rate,
            "batch": recipe.batch,
            "seed": recipe.seed,
            "loss": round(done.loss, 5),
        }
        return model.after("distil", module, facts=facts)

    return run


def _learning(module: torch.nn.Module, dropout: float) -> torch.nn.Module:
    made = copy.deepcopy(module)
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    return made


@contextmanager
def _words(module: torch.nn.Module, learn: bool) -> Iterator[None]:
    """Without `learn`, embeddings that could learn do not for a while."""
    words = [p for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()]
    held = [] if learn else [vectors for vectors in words if vectors.requires_grad]
    for vectors in held:
        vectors.requires_grad_(False)
    yield
    for vectors in held:
        vectors.requires_grad_()


# --- texts ------------------------------------------------------------------------------------------------------------


def augmented(texts: Sequence[Text], how: Augment, mask: str) -> list[str]:
    """
    `how.copies` changed texts for each text, seeded. Without a mask token words are left out instead. Raises BadInput
    for pairs: words changed in one of them say nothing about the other.
    """
    if not how.copies:
        return []
    if pair := next((text for text in texts if not isinstance(text, str)), None):
        raise BadInput(f"augment changes single texts, not pairs such as {pair}; leave copies at 0")
    random = np.random.default_rng(how.seed)
    split = [text.split() for text in texts if isinstance(text, str)]
    words = [word for text in split for word in text] or [""]
    made = []
    for _ in range(how.copies):
        for text in split:
            chosen = text
            if len(text) > 1 and random.random() < how.cut:
                first, last = np.sort(random.integers(0, len(text) + 1, 2))
                chosen = text[first : max(last, first + 1)]
            elif random.random() < how.join:
                chosen = [*text, *split[random.integers(len(split))]]
            draw = random.random(len(chosen))
            other = random.integers(len(words), size=len(chosen))
            changed = [
                mask if p < how.mask else words[n] if p < how.mask + how.swap else word
                for word, p, n in zip(chosen, draw, other, strict=True)
            ]
            made.append(" ".join(word for word in changed if word))
    return made


Encoded = tuple[np.ndarray, ...]  # the model's inputs in their order, [tokens] each


def _encode(model: Model, texts: Sequence[Text], length: int) -> list[Encoded]:
    if model.tokenizer is None:
        raise BadInput(f"{model.name} has no tokenizer; distillation reads texts")
    most = min(length, model.max_length)
    encoded: Any = model.tokenizer(list(texts), truncation=True, max_length=most, return_token_type_ids=True)
    columns = [[np.asarray(row, np.int32) for row in encoded[x.name]] for x in model.inputs]
    return list(zip(*columns, strict=True))


def _batch(rows: Sequence[Encoded], pads: Sequence[float]) -> tuple[Tensor, ...]:
    """Inputs of shape [rows, longest], padded on the right."""
    longest = max(len(row[0]) for row in rows)
    made = []
    for i, pad in enumerate(pads):
        full = np.full((len(rows), longest), pad, np.int64)
        for n, row in enumerate(rows):
            full[n, : len(row[i])] = row[i]
        made.append(torch.from_numpy(full))
    return tuple(made)


# --- the teacher ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What the teacher says: `output` [rows, classes]; tokens of all rows one after the other, row i from starts[i]."""

    made_of: str
    output: Tensor
    starts: np.ndarray
    tokens: dict[str, Tensor]  # "hidden", "values": [tokens of all rows, width] fp16


def answers(
    teacher: Model, rows: Sequence[Encoded], deep: tuple[str, ...], folder: Path | None, bf16: bool, progress: Progress
) -> Answers:
    """The teacher's outputs for every row, from `folder` where they are there already: a file for SHARD rows."""
    weights = _of(teacher.module)
    parts: list[dict[str, Tensor]] = []
    identities: list[str] = []
    for first in range(0, len(rows), SHARD):
        some = rows[first : first + SHARD]
        identities.append(_digest(f"{weights} {bf16} {deep}", some))
        path = folder / "teacher" / f"{identities[-1][:16]}.safetensors" if folder else None
        if path is not None and path.exists():
            parts.append(read(path, identities[-1])[0])
        else:
            parts.append(_ask(teacher, some, deep, bf16))
            if path is not None:
                write(path, parts[-1], {"made_of": identities[-1]})
        progress("teacher", first + len(some), len(rows))
    starts = np.cumsum([0, *(len(row[0]) for row in rows)])
    tokens = {name: torch.cat([part[name] for part in parts]) for name in deep}
    return Answers(" ".join(identities), torch.cat([part["output"] for part in parts]), starts, tokens)


def _ask(teacher: Model, rows: Sequence[Encoded], deep: tuple[str, ...], bf16: bool) -> dict[str, Tensor]:
    """Of similar length together; what comes back is in the order of `rows`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    outputs: list[Any] = [None] * len(rows)
    found: dict[str, list[Any]] = {name: [None] * len(rows) for name in deep}
    pads = [x.pad for x in teacher.inputs]
    with _tapped(teacher.module, deep) as taken, torch.inference_mode():
        for first in range(0, len(order), TEACHER_BATCH):
            picked = order[first : first + TEACHER_BATCH]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = teacher.module(*_batch([rows[i] for i in picked], pads)).float()
            for n, i in enumerate(picked):
                outputs[i] = output[n]
                for name in deep:
                    found[name][i] = taken[name][n, : len(rows[i][0])].half()
    return {"output": torch.stack(outputs), **{name: torch.cat(x) for name, x in found.items()}}


@contextmanager
def _tapped(module: torch.nn.Module, deep: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary at each forward: the last layer's hidden states and its values, [rows, tokens, width]."""
    taken: dict[str, Tensor] = {}
    if not deep:
        yield taken
        return
    last = layer_stack(module)[-1]
    values = next((m for n, m in last.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(_VALUES)), None)
    if "values" in deep and values is None:
        raise BadInput(f"relation: {type(last).__name__} has no projection named as one to values; leave relation at 0")

    def keep(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            taken[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [last.register_forward_hook(keep("hidden"))]
    if values is not None:
        handles.append(values.register_forward_hook(keep("values")))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


# --- the student ------------------------------------------------------------------------------------------------------


class _Learner:
    """The student, the projection that features need, and the loss over rows."""

    def __init__(
        self,
        model: Model,
        student: torch.nn.Module,
        known: Answers,
        answered: Sequence[int],
        targets: Tensor,
        rows: list[Encoded],
        losses: Losses,
    ) -> None:
        """answered: the rows that `known` has, in its order."""
        self.place = {row: place for place, row in enumerate(answered)}
        self.student, self.known, self.targets, self.rows = student, known, targets, rows
        self.losses, self.kind, self.pads = losses, model.task.kind, [x.pad for x in model.inputs]
        self.module = torch.nn.ModuleDict({"student": student})
        if losses.feature:
            ours, theirs = _width(student), known.tokens["hidden"].shape[-1]
            project = torch.nn.Linear(ours, theirs, bias=False)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                torch.nn.init.orthogonal_(project.weight)
            self.module["project"] = project

    def loss(self, taken: dict[str, Tensor]) -> Callable[[Sequence[int]], Tensor]:
        """`taken`: what the student's own forward leaves behind."""
        w = self.losses

        def of(picked: Sequence[int]) -> Tensor:
            rows, known = [self.rows[i] for i in picked], [self.place[i] for i in picked]
            output = self.student(*_batch(rows, self.pads)).float()
            total = torch.zeros(())
            if w.response:
                total = total + w.response * response(output, self.known.output[known], self.kind, w.temperature)
            if w.hard:
                total = total + w.hard * _hard(output, self.targets[picked], self.kind)
            if not w.deep:
                return total
            lengths = torch.tensor([len(row[0]) for row in rows])
            valid = torch.arange(int(lengths.max())) < lengths[:, None]
            theirs = {name: self._padded(name, known, valid) for name in w.deep}
            if w.feature:
                total = total + w.feature * feature(self.module["project"](taken["hidden"]), theirs["hidden"], valid)
            if w.relation:
                total = total + w.relation * relation(taken["values"], theirs["values"], valid)
            if w.batch:
                total = total + w.batch * arrangement(taken["hidden"], theirs["hidden"], valid)
            return total

        return of

    def _padded(self, name: str, places: Sequence[int], valid: Tensor) -> Tensor:
        flat, starts = self.known.tokens[name], self.known.starts
        full = torch.zeros(*valid.shape, flat.shape[-1])
        # Made fp32 before it is put together: under autocast no operator joins fp16.
        full[valid] = torch.cat([flat[starts[i] : starts[i + 1]].float() for i in places])
        return full


def response(got: Tensor, want: Tensor, kind: str, temperature: float) -> Tensor:
    """Classes: KL of the softened distributions, times temperature squared. Else squared distance, or 1 - cosine."""
    if kind == "regression":
        return functional.mse_loss(got, want)
    if kind == "embedding":
        return (1 - functional.cosine_similarity(got, want)).mean()
    soft = functional.log_softmax(want / temperature, -1)
    mine = functional.log_softmax(got / temperature, -1)
    return functional.kl_div(mine, soft, log_target=True, reduction="batchmean") * temperature**2


def feature(got: Tensor, want: Tensor, valid: Tensor) -> Tensor:
    """Mean squared distance over valid tokens, as a share of the teacher's own mean square. [rows, tokens, width]"""
    got, want = got.float()[valid], want[valid]
    return (got - want).pow(2).mean() / want.pow(2).mean()


def relation(got: Tensor, want: Tensor, valid: Tensor) -> Tensor:
    """KL of how tokens attend to each other by scaled dot products of their values (MiniLM); widths may differ."""
    heads = next(n for n in range(RELATION_HEADS, 0, -1) if got.shape[-1] % n == want.shape[-1] % n == 0)
    mine, theirs = (_relations(x.float(), valid, heads) for x in (got, want))
    gap = (theirs.exp() * (theirs - mine)).masked_fill(~valid[:, None, None, :], 0.0).sum(-1)
    return gap.masked_select(valid[:, None, :].expand_as(gap)).mean()


def _relations(x: Tensor, valid: Tensor, heads: int) -> Tensor:
    """[rows, tokens, width] -> log distributions [rows, heads, tokens, tokens]"""
    split = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    z: Tensor = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return z.masked_fill(~valid[:, None, None, :], -1e4).log_softmax(-1)


def arrangement(got: Tensor, want: Tensor, valid: Tensor) -> Tensor:
    """Squared distance of the cosines between all rows of the batch, by the means of their tokens."""
    weight = valid[..., None].float()
    means = [(x.float() * weight).sum(1) / weight.sum(1) for x in (got, want)]
    mine, theirs = (x @ x.T for x in (functional.normalize(m, dim=-1) for m in means))
    return (mine - theirs).pow(2).mean()


def _hard(output: Tensor, target: Tensor, kind: str) -> Tensor:
    known = target.isfinite()
    if not known.any():
        return output.sum() * 0.0
    if kind == "classification":
        return functional.cross_entropy(output[known], target[known].long())
    return functional.mse_loss(output[known, 0], target[known])


def _targets(labels: Sequence[float] | None, count: int) -> Tensor:
    """NaN where a row has no label."""
    full = torch.full((count,), torch.nan)
    if labels is not None:
        full[: len(labels)] = torch.tensor(list(labels), dtype=torch.float32)
    return full


def _width(module: torch.nn.Module) -> int:
    owner: Any = next(m for m in module.modules() if hasattr(m, "config"))
    return int(owner.config.hidden_size)


# --- names of what is kept --------------------------------------------------------------------------------------------


def _of(module: torch.nn.Module) -> str:
    """Its weights, in twelve digits."""
    digest = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        digest.update(name.encode() + repr(tuple(x.shape)).encode() + x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _digest(what: str, rows: Sequence[Encoded]) -> str:
    digest = hashlib.sha256(what.encode())
    for row in rows:
        for x in row:
            digest.update(x.tobytes() + b"|")
    return digest.hexdigest()
