"""
LongTech-KEP: which group owns a design document of up to 4,096 tokens, dense against sparse attention.

The encoder is frozen; a logistic regression on the dense vectors of the training documents reads every variant's
vectors. A table of this size takes an hour of CPU time: vectors are kept in a folder as they come, and a second call
goes on from there.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from edgeformer.attention import patterns
from edgeformer.compare import wilson

SAVE_EVERY = 8  # documents
FOLDS = 5
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the L2 penalty, per training row
RESAMPLES = 2000

Entry = dict[str, Any]
Embed = Callable[[list[Any], patterns.Pattern], torch.Tensor]  # tokenized rows, attention -> unit vectors


class Embedded(NamedTuple):
    vectors: torch.Tensor  # [n, hidden]
    read: torch.Tensor  # [n] blocks
    candidates: torch.Tensor  # [n]
    cpu_s: float

    def kept(self, of: torch.Tensor | slice = slice(None)) -> float:
        """Fraction of the candidates of some documents, all by default."""
        return float(self.read[of].sum() / self.candidates[of].sum())


@dataclass(frozen=True)
class Store:
    """Vectors of a variant, on disk as they come. `about`: what they depend on besides rows and name."""

    folder: Path
    about: str
    embed: Embed

    def vectors(self, name: str, rows: Sequence[Any], make: Callable[[], patterns.Pattern]) -> Embedded:
        path = self._path(name, rows)
        found = load_file(path) if path.exists() else {}
        done = len(found.get("vectors", ()))
        pattern = make() if done < len(rows) else None
        while done < len(rows) and pattern is not None:
            part = [self._one(row, pattern) for row in rows[done : done + SAVE_EVERY]]
            new = {key: torch.cat([x[key] for x in part]) for key in part[0]}
            found = {key: torch.cat([found[key], value]) if found else value for key, value in new.items()}
            done = len(found["vectors"])
            work = path.with_suffix(".part")
            save_file(found, work)
            work.replace(path)
            print(f"  {name}: {done}/{len(rows)}, {float(found['cpu_s'].sum()):.0f} CPU s", flush=True)
        return Embedded(found["vectors"], found["read"], found["candidates"], float(found["cpu_s"].sum()))

    def _one(self, row: Any, pattern: patterns.Pattern) -> dict[str, torch.Tensor]:
        read, candidates, began = pattern.tally.read, pattern.tally.candidates, time.process_time()
        vectors = self.embed([row], pattern)
        counts = (pattern.tally.read - read, pattern.tally.candidates - candidates, time.process_time() - began)
        return {"vectors": vectors} | {
            key: torch.tensor([n]).double() for key, n in zip(("read", "candidates", "cpu_s"), counts, strict=True)
        }

    def _path(self, name: str, rows: Sequence[Any]) -> Path:
        digest = hashlib.sha256(f"{self.about} {name}".encode())
        for row in rows:
            digest.update(row["input_ids"].numpy().tobytes())
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{digest.hexdigest()[:12]}.safetensors"


# --- the head ---------------------------------------------------------------------------------------------------------


def head(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], Entry]:
    """A classifier of frozen vectors and how it was chosen: the penalty by cross-validation on these rows only."""
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % FOLDS

    def validated(strength: float) -> float:
        right = 0
        for out in range(FOLDS):
            predict = _logistic(vectors[fold != out], labels[fold != out], strength)
            right += int((predict(vectors[fold == out]) == labels[fold == out]).sum())
        return right / len(labels)

    scores = {strength: validated(strength) for strength in STRENGTHS}
    best = max(scores, key=lambda s: scores[s])
    facts = {"head": "logistic regression on dense vectors", "penalty": best, "cross_validated": round(scores[best], 4)}
    return _logistic(vectors, labels, best), facts


def _logistic(x: torch.Tensor, y: torch.Tensor, strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    center, spread = x.mean(0), x.std(0)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(weights.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (x - center) / spread @ weights + bias
        found = torch.nn.functional.cross_entropy(logits, y) + strength * weights.square().sum() / 2
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)
    with torch.no_grad():
        matrix, offset = weights.detach(), bias.detach()
    return lambda given: ((given - center) / spread @ matrix + offset).argmax(-1)


# --- what a variant is worth ------------------------------------------------------------------------------------------


def judged(found: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> Entry:
    """Accuracy and agreement with dense (Wilson), macro-F1 (bootstrap): each with its 95 % interval."""
    count = len(labels)
    right, same = int((found == labels).sum()), int((found == dense).sum())
    lost = int(((dense == labels) & (found != labels)).sum())
    gained = int(((dense != labels) & (found == labels)).sum())
    return {
        "accuracy": right / count,
        "accuracy_95": _rounded(wilson(right / count, count)),
        "macro_f1": macro_f1(found.numpy(), labels.numpy()),
        "macro_f1_95": _rounded(_bootstrap(found.numpy(), labels.numpy())),
        "agreement": f"{same}/{count}",
        "agreement_95": _rounded(wilson(same / count, count)),
        "right_only_dense": lost,
        "right_only_here": gained,
    }


def macro_f1(found: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """The mean of F1 over the classes that occur among the labels."""
    scores = []
    for label in np.unique(labels):
        hits = int(((found == label) & (labels == label)).sum())
        scores.append(2 * hits / (int((found == label).sum()) + int((labels == label).sum())))
    return float(np.mean(scores))


def _bootstrap(found: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[float, float]:
    random = np.random.default_rng(0)
    rows = random.integers(0, len(labels), (RESAMPLES, len(labels)))
    low, high = np.percentile([macro_f1(found[i], labels[i]) for i in rows], [2.5, 97.5])
    return float(low), float(high)


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(x, 4) for x in interval]
