"""Recipes: what comes with the package is sound, open settings are closed, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import families
import pytest

from edgeformer import data, model as models, recipe
from edgeformer.errors import BadInput
from edgeformer.recipe import Kitchen, Range, Recipe, Step


@pytest.fixture(scope="module")
def kitchen() -> Kitchen:
    model = models.load(families.tiny("roberta"), lengths=(16,), tokenizer=families.tokenizer())
    texts = tuple(f"w{i} w{i + 1} w{i + 2}" for i in range(3, 20))

    def read(reader: models.Model) -> data.Rows:
        return data.load(reader, list(texts), None)

    return Kitchen(model, read(model), read, texts)


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_of_the_package_is_sound(name: str, kitchen: Kitchen) -> None:
    found = recipe.load(name)
    chosen = {key: r.choice[0] if r.choice else r.low for key, r in recipe.ranges(found).items()}
    ready = recipe.closed(found, chosen)
    assert found.title and not recipe.ranges(ready)
    assert [callable(recipe._bound(ready, step, kitchen)) for step in ready.steps] == [True] * len(ready.steps)
    assert name.startswith("search") == bool(recipe.ranges(found))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    steps = (Step("prune.structured", {"keep": Range(low=0.3, high=1.0, step=0.05), "method": Range(choice=("obs",))}),)
    made = Recipe("mine", "a space", steps, "dsa", 0.25, ("int8",))
    (tmp_path / "mine.toml").write_text(recipe.dump(made))
    assert recipe.load(tmp_path / "mine.toml") == made


def test_a_pass_that_is_not_used_is_left_out() -> None:
    made = Recipe("x", "", (Step("prune.structured", {"use": Range(choice=(True, False)), "keep": 0.5}),))
    assert recipe.closed(made, {"0.use": False}).steps == ()
    assert recipe.closed(made, {"0.use": True}).steps == (Step("prune.structured", {"keep": 0.5}),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[pass]]\nname = 'prune'", "module.function"),
        ("[[pass]]\nname = 'prune.nothing'", "there is no pass 'prune.nothing'"),
        ("[[pass]]\nname = 'prune.structured'\nkept = 0.5", "no setting 'kept'; it has rows, keep"),
        ("[[pass]]\nname = 'prune.structured'\nkeep = { low = 1.0, high = 0.5 }", "must be {choice"),
        ("[[pass]]\nname = 'prune.structured'\nkeep = { choice = [0.5] }", "are open"),
        ("[[pass]]\nname = 'distil.distil'\nlosses = { respond = 1.0 }", "does not describe a Losses"),
        ("[[pass]]\nname = 'prune._apply'", "there is no pass"),
        ("speed = 1", "unknown key 'speed'"),
        ("attention = 'sparse'", "must be one of auto, dense, dsa"),
        ("title = ", "is not TOML"),
    ],
)
def test_a_mistake_is_named(text: str, words: str, tmp_path: Path, kitchen: Kitchen) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(BadInput, match=r"recipe bad|does not describe") as error:
        recipe.cook(recipe.load(tmp_path / "bad.toml"), kitchen, kitchen.teacher)
    assert words in str(error.value)


def test_what_a_pass_lacks_is_named(kitchen: Kitchen) -> None:
    made = Recipe("x", "", (Step("student.vocabulary", {}),))
    with pytest.raises(BadInput, match="needs texts; give training data"):
        recipe.cook(made, Kitchen(kitchen.teacher, kitchen.rows, kitchen.read), kitchen.teacher)


def test_an_unknown_recipe() -> None:
    with pytest.raises(BadInput, match="no recipe 'faster'; there are balanced, careful, fast"):
        recipe.load("faster")


def test_a_cut_vocabulary_gives_the_next_pass_new_numbers(kitchen: Kitchen) -> None:
    steps = (Step("student.vocabulary", {}), Step("prune.structured", {"keep": 0.6, "grain": 8}))
    made = recipe.cook(Recipe("x", "", steps), kitchen, kitchen.teacher)
    assert [step.name for step in made.history[-2:]] == ["student.vocabulary", "prune.structured"]
    assert made.tokenizer is not kitchen.teacher.tokenizer and len(made.tokenizer) < len(kitchen.teacher.tokenizer)
