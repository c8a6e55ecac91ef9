"""
Recipes: small TOML files that say which passes run with which settings. `edgeformer/recipes` is their registry.

    title = "A third fewer heads and columns, no training"

    [[pass]]
    name = "prune.structured"     # module.function of edgeformer.passes
    keep = 0.7                    # its own parameters, by name

Where a setting is a range instead of a value, the recipe is open: a space that `edgeformer.search` looks through.

    keep = { low = 0.3, high = 1.0, step = 0.05 }
    hidden = { choice = [192, 256, 384] }
    use = { choice = [true, false] }     # whether the pass runs at all

What a pass takes besides settings (texts, labelled rows, the unchanged model as teacher, a folder) comes from the
`Kitchen`; a pass that wants what it does not have is refused by name.
"""

from __future__ import annotations

import inspect
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from . import data as rows_of
from .errors import BadInput
from .model import Model
from .passes import Pass
from .plan import ATTENTION
from .stages import Progress, quiet

__all__ = ["Kitchen", "Range", "Recipe", "Step", "closed", "cook", "dump", "load", "names", "ranges"]

_TOP = ("title", "attention", "budget", "precision", "pass")


@dataclass(frozen=True)
class Range:
    """An open setting: one of `choice`, or a number from low to high, in steps where given."""

    choice: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None


@dataclass(frozen=True)
class Step:
    """One pass and its settings, open ones included."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """
    Passes in order, and how the result is built. attention, precision: as for `edgeformer.build`; what a search found
    is dense, as it was measured, unless its recipe says "dsa". budget: of sparse attention; None leaves it to the
    caller.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    attention: str = "auto"
    budget: float | None = None
    precision: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kitchen:
    """What passes get besides settings. rows: with labels where the data has them; teacher: the unchanged model."""

    teacher: Model
    rows: rows_of.Rows
    read: Callable[[Model], rows_of.Rows]  # the same rows by another model's tokenizer
    texts: tuple[str | tuple[str, str], ...] = ()
    labels: tuple[float, ...] | None = None
    folder: Path | None = None
    progress: Progress = quiet


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.name[:-5] for p in files("edgeformer.recipes").iterdir() if p.name.endswith(".toml"))


def load(name: str | Path) -> Recipe:
    """A recipe of the package by name, or a file. Raises BadInput with the key, the rule and the value."""
    path = Path(name)
    if path.suffix != ".toml" and str(name) in names():
        return _read(str(name), (files("edgeformer.recipes") / f"{name}.toml").read_text("utf-8"))
    if not path.is_file():
        raise BadInput(f"no recipe {str(name)!r}; there are {', '.join(names())}, or give a .toml file")
    return _read(path.stem, path.read_text("utf-8"))


def dump(recipe: Recipe) -> str:
    """TOML that `load` reads back."""
    steps = [{"name": step.name, **{k: _written(v) for k, v in step.settings.items()}} for step in recipe.steps]
    body: dict[str, Any] = {"title": recipe.title, "attention": recipe.attention}
    body |= {} if recipe.budget is None else {"budget": recipe.budget}
    body |= {"precision": list(recipe.precision)} if recipe.precision else {}
    return tomli_w.dumps(body | {"pass": steps})


def ranges(recipe: Recipe) -> dict[str, Range]:
    """The open settings, "place.setting" -> range; empty for a recipe that can be cooked as it is."""
    return {
        f"{i}.{key}": v for i, s in enumerate(recipe.steps) for key, v in s.settings.items() if isinstance(v, Range)
    }


def closed(recipe: Recipe, chosen: Mapping[str, Any]) -> Recipe:
    """The same recipe with a value for each open setting, and without the passes whose `use` is false."""
    steps = []
    for i, step in enumerate(recipe.steps):
        settings = {k: chosen[f"{i}.{k}"] if isinstance(v, Range) else v for k, v in step.settings.items()}
        if settings.pop("use", True):
            steps.append(Step(step.name, settings))
    return replace(recipe, steps=tuple(steps))


def cook(recipe: Recipe, kitchen: Kitchen, model: Model) -> Model:
    """
    Runs the recipe's passes. Rows are read again where a pass cut the vocabulary: their tokens have other numbers then.
    Raises BadInput for an open setting, a setting that a pass does not have, or what it lacks.
    """
    if missing := ranges(recipe):
        raise BadInput(f"recipe {recipe.name}: {', '.join(missing)} are open; `search` chooses them")
    for step in recipe.steps:  # mistakes are found before anything runs
        _bound(recipe, step, kitchen)
    for step in recipe.steps:
        before = model.tokenizer
        kitchen.progress(step.name, 0, 1)
        model = _bound(recipe, step, kitchen)(model)
        kitchen.progress(step.name, 1, 1)
        if model.tokenizer is not before:
            kitchen = replace(kitchen, rows=kitchen.read(model))
    return model


# --- files ------------------------------------------------------------------------------------------------------------


def _read(name: str, text: str) -> Recipe:
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"recipe {name} is not TOML: {error}") from error
    if unknown := sorted(set(body) - set(_TOP)):
        raise BadInput(f"recipe {name}: unknown key {unknown[0]!r}; known: {', '.join(_TOP)}")
    steps = tuple(_step(name, table) for table in body.pop("pass", []))
    precision = body.pop("precision", ())
    if (attention := body.get("attention", "auto")) not in ATTENTION:
        raise BadInput(f"recipe {name}: attention {attention!r} must be one of {', '.join(ATTENTION)}")
    fields = {"title": "", **body, "precision": (precision,) if isinstance(precision, str) else tuple(precision)}
    return Recipe(name=name, steps=steps, **fields)


def _step(recipe: str, table: Mapping[str, Any]) -> Step:
    settings = dict(table)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name.count(".") != 1:
        raise BadInput(f'recipe {recipe}: each pass needs name = "module.function", got {name!r}')
    return Step(name, {key: _opened(recipe, f"{name} {key}", value) for key, value in settings.items()})


def _opened(recipe: str, key: str, value: Any) -> Any:
    """A table with `choice`, or with `low` and `high`, is a range; any other value stays."""
    if not isinstance(value, dict) or not {"choice", "low", "high"} & set(value):
        return value
    if set(value) == {"choice"} and value["choice"]:
        return Range(choice=tuple(value["choice"]))
    if {"low", "high"} <= set(value) <= {"low", "high", "step"} and value["low"] < value["high"]:
        return Range(low=value["low"], high=value["high"], step=value.get("step"))
    raise BadInput(f"recipe {recipe}: {key} must be {{choice = [...]}} or {{low = a, high = b, step = s}}, got {value}")


def _written(value: Any) -> Any:
    if not isinstance(value, Range):
        return value
    if value.choice:
        return {"choice": list(value.choice)}
    return {"low": value.low, "high": value.high} | ({} if value.step is None else {"step": value.step})


# --- passes -----------------------------------------------------------------------------------------------------------


def _bound(recipe: Recipe, step: Step, kitchen: Kitchen) -> Pass:
    make = _function(recipe, step.name)
    known = inspect.signature(make).parameters
    hints = typing.get_type_hints(make)
    arguments: dict[str, Any] = {}
    for key, value in step.settings.items():
        if key not in known:
            raise BadInput(f"recipe {recipe.name}: {step.name} has no setting {key!r}; it has {', '.join(known)}")
        arguments[key] = _record(hints[key], value) if isinstance(value, dict) else value
    for key in known:
        if key in _INGREDIENTS and key not in arguments:
            found = _INGREDIENTS[key](kitchen)
            if found is None and known[key].default is inspect.Parameter.empty:
                raise BadInput(f"recipe {recipe.name}: {step.name} needs {key}; give training data (train=...)")
            arguments |= {} if found is None else {key: found}
    try:
        made: Pass = make(**arguments)
    except TypeError as error:
        raise BadInput(f"recipe {recipe.name}: {step.name}: {error}") from error
    return made


_INGREDIENTS: dict[str, Callable[[Kitchen], Any]] = {
    "rows": lambda k: k.rows,
    "texts": lambda k: k.texts or None,
    "labels": lambda k: k.labels,
    "teacher": lambda k: k.teacher,
    "folder": lambda k: k.folder,
    "progress": lambda k: k.progress,
}


def _function(recipe: Recipe, name: str) -> Callable[..., Pass]:
    module, _, function = name.partition(".")
    try:
        found = getattr(import_module(f"edgeformer.passes.{module}"), function, None)
    except ImportError:
        found = None
    if module.startswith("_") or function.startswith("_") or not inspect.isfunction(found):
        raise BadInput(f"recipe {recipe.name}: there is no pass {name!r} in edgeformer.passes")
    made: Callable[..., Pass] = found
    return made


def _record(kind: Any, value: Mapping[str, Any]) -> Any:
    """A table as the record that the parameter takes: `losses`, `recipe`, `augment`."""
    options = [kind, *typing.get_args(kind)]
    record: Any = next((x for x in options if is_dataclass(x)), None)
    if record is None:
        return value
    try:
        return record(**value)
    except TypeError as error:
        raise BadInput(f"{value} does not describe a {getattr(record, '__name__', record)}: {error}") from error
