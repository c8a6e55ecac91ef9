"""A search: the same trials if interrupted or not, real programs decide, and a refusal shows what is near."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import families
import pytest
from rich.console import Console

pytest.importorskip("optuna")
pytest.importorskip("onnxruntime")

import edgeformer as ef
from edgeformer import budget as searching, frontier, model as models
from edgeformer.budget import Limits, Outcome, Proxy, search
from edgeformer.errors import BadInput, BudgetMissed, MissingExtra
from edgeformer.recipe import Range, Recipe, Step

SPACE = Recipe("tiny", "", (Step("prune.structured", {"keep": Range(low=0.3, high=1.0, step=0.1), "grain": 8}),))
TEXTS = tuple(f"w{i} w{(3 * i) % 190 + 3} w{(7 * i) % 190 + 3}" for i in range(3, 35))


def tiny() -> models.Model:
    return models.load(families.tiny("roberta"), lengths=(16,), tokenizer=families.tokenizer(), name="tiny")


def found(folder: Path, limits: Limits, trials: int = 6) -> Outcome:
    return search(
        tiny(), "host", limits, data=TEXTS, space=SPACE, trials=trials, finalists=2, format="onnx", folder=folder
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return found(tmp_path_factory.mktemp("search"), Limits(max_drop=0.9))


@pytest.mark.slow
def test_the_best_is_a_program_that_was_run(outcome: Outcome) -> None:
    real = [p for p in outcome.points if p.real]
    assert len(outcome.points) == 6 and 1 <= len(real) <= 2 and outcome.best in real
    best = outcome.best
    assert best and best.real and best.real.program == "onnx-int8" and best.real.drop <= 0.9
    assert best.real.latency_ms < outcome.baseline.latency_ms and best.real.size_mb < outcome.baseline.size_mb
    assert outcome.recipe.steps[0].settings["keep"] == best.settings["0.keep"]
    console = Console(width=140, record=True)
    console.print(frontier.table(outcome))
    shown, page = console.export_text(), frontier.page(outcome)
    assert "unchanged" in shown and " best " in shown and "<td>best</td>" in page and "interleaved" in page
    assert json.loads(outcome.to_json())["points"][0]["proxy"]["latency_ms"] > 0


@pytest.mark.slow
def test_what_nothing_meets_is_refused_with_the_nearest(outcome: Outcome, tmp_path: Path) -> None:
    missed = dataclasses.replace(outcome, limits=Limits(max_size_mb=0.0001), best=None)
    with pytest.raises(BudgetMissed, match=r"meets 0.0001 MB at most; nearest:\ntrial \d+: .* keep 0\.\d"):
        _ = missed.recipe


@pytest.mark.slow
def test_a_search_goes_on_and_ends_as_it_would_have(outcome: Outcome, tmp_path: Path) -> None:
    found(tmp_path, outcome.limits, trials=2)
    again = found(tmp_path, outcome.limits)
    plain = [(p.trial, p.settings, p.proxy) for p in again.points]
    assert plain == [(p.trial, p.settings, p.proxy) for p in outcome.points]
    assert again.best and outcome.best and again.best.settings == outcome.best.settings


@pytest.mark.slow
def test_a_killed_search_goes_on(outcome: Outcome, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests'); import test_search as t;"
        "t.found(pathlib.Path(sys.argv[1]), t.Limits(max_drop=0.9))"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], env=dict(os.environ),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = tmp_path / "trials.log"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") > 12) and time.monotonic() < deadline:
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    again = found(tmp_path, outcome.limits)
    assert {json.dumps(dict(p.settings)) for p in again.points} <= {
        json.dumps({"0.keep": round(0.3 + 0.1 * i, 6)}) for i in range(8)
    }
    assert again.best and again.best.real


@pytest.mark.slow
def test_a_setting_that_fails_is_not_chosen(tmp_path: Path) -> None:
    steps = (Step("student.layers", {"keep": Range(choice=(1, 9))}),)
    made = search(
        tiny(), "host", Limits(), data=TEXTS, space=Recipe("x", "", steps), trials=4, format="onnx", folder=tmp_path
    )
    assert made.points and all(p.settings["0.keep"] == 1 for p in made.points)


def test_finalists_are_those_that_nothing_beats() -> None:
    make = [(1.0, 9.0, 0.0), (2.0, 2.0, 0.0), (3.0, 3.0, 0.0), (0.5, 0.5, 0.5)]
    points = [searching.Point(i, {"k": i}, Proxy(*x)) for i, x in enumerate(make)]
    chosen = searching._finalists(points, Limits(max_drop=0.1), 3)
    assert [p.trial for p in chosen] == [0, 1, 3]


@pytest.mark.parametrize("limits", [{"max_size_mb": 0}, {"max_latency_ms": -1}, {"max_drop": -0.1}])
def test_limits_that_cannot_be(limits: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="must be above 0"):
        Limits(**limits)


def test_a_closed_recipe_has_nothing_to_search(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to search"):
        search(tiny(), "host", Limits(), data=TEXTS, space="fast", format="onnx", folder=tmp_path)


@pytest.mark.slow
def test_build_meets_limits_or_says_why_not(tmp_path: Path, config_home: Path) -> None:
    wanted = {"data": TEXTS, "recipe": SPACE, "trials": 4, "formats": ["onnx"], "out": tmp_path}
    bundle = ef.build(tiny(), "host", limits=Limits(max_drop=0.9), **wanted)  # type: ignore[call-overload]
    bundle.verify()
    told = next(step.facts for step in bundle.manifest.history if step.name == "recipe")
    assert told["max_drop"] == 0.9 and told["drop"] <= 0.9 and told["passes"] == ["prune.structured"]
    with pytest.raises(BudgetMissed, match="nearest"):
        ef.build(tiny(), "host", limits=Limits(max_size_mb=1e-6), overwrite=True, **wanted)  # type: ignore[call-overload]
    assert ef.open_bundle(bundle.path).digest == bundle.digest
    with pytest.raises(BadInput, match="limits go with one target"):
        ef.build(tiny(), ["host", "raspberry-pi-4"], limits=Limits(max_drop=0.9))  # type: ignore[call-overload]


def test_a_search_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(searching, "optuna", None)
    with pytest.raises(MissingExtra, match=r"optuna is not installed. Run: pip install 'edgeformer\[search\]'"):
        search(tiny(), "host", Limits(), data=TEXTS, space=SPACE, folder=tmp_path)
    assert not list(tmp_path.iterdir())
