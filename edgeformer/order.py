"""From what was ordered to the model that is built: a recipe cooked as it is, or the one that a search finds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from edgeformer_agent import wire

from . import data as rows_of
from .budget import Limits, Real, drop, kitchen, search
from .errors import BadInput, BudgetMissed
from .model import Model
from .plan import Plan
from .recipe import Recipe, cook, ranges
from .stages import Progress


@dataclass(frozen=True)
class Order:
    """recipe: open where `limits` are to be met by search. folder: where a search keeps its trials."""

    recipe: Recipe
    limits: Limits | None
    train: str | Path | None
    data: rows_of.Data
    task: str | None
    trials: int
    folder: Path
    report: Progress


def served(
    order: Order, model: Model, teacher: Model, plan: Plan, attention: str, budget: float
) -> tuple[Model, str, float]:
    """The optimized model, and the attention and budget of its recipe. Raises BudgetMissed, BadInput."""
    recipe, found = order.recipe, None
    if order.limits is not None and ranges(recipe):
        export = plan.exports[0]
        outcome = search(
            model, plan.device.name, order.limits, data=order.data, task=order.task, train=order.train, space=recipe,
            trials=order.trials, format=export.name, precision=export.precisions[0], folder=order.folder,
            progress=order.report,
        )  # fmt: skip
        recipe = outcome.recipe
        if recipe.attention == "auto":  # the search measured dense programs
            recipe = dataclasses.replace(recipe, attention="dense")
        found = outcome.best.real if outcome.best else None
    elif order.limits is not None:
        raise BadInput(f"recipe {recipe.name} has no open setting to meet limits with; see edgeformer.recipe")
    model = cook(recipe, kitchen(teacher, order.data, order.train, order.task, order.folder, order.report), model)
    chosen = attention if attention != "auto" else recipe.attention
    return _told(model, recipe, order.limits, found), chosen, budget if recipe.budget is None else recipe.budget


def hold(limits: Limits, entry: wire.Entry) -> None:
    """The program that is shipped must meet what the search's did. Raises BudgetMissed."""
    found = (entry.predicted.metrics.latency_ms or 0.0, entry.size_bytes / 2**20, drop(entry.checked))
    if not limits.met(*found):
        words = "{:.4g} ms (modelled), {:.3g} MB, {:.3%} lost".format(*found)
        raise BudgetMissed(f"{entry.name} misses {limits.words()}: {words}; nothing was packaged")


def _told(model: Model, recipe: Recipe, limits: Limits | None, found: Real | None) -> Model:
    """A line of the history: which recipe, and what the search had measured when it chose it."""
    facts: dict[str, object] = {"recipe": recipe.name, "passes": [step.name for step in recipe.steps]}
    if limits is not None and found is not None:
        facts |= {name: value for name, value in dataclasses.asdict(limits).items() if value is not None}
        facts |= {"latency_ms_modelled": round(found.latency_ms, 4), "size_mb": round(found.size_mb, 3)}
        facts |= {"drop": round(found.drop, 5), "speedup_here": round(found.here_speedup, 2)}
    return dataclasses.replace(model, history=(*model.history, wire.Step("recipe", facts)))
