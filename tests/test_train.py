"""The training loop: what a step is, what a stop costs (nothing), what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeformer.errors import BadInput
from edgeformer.train import POOL, Fitted, Recipe, _schedule, batches, fit, used

Tensor = torch.Tensor
ROWS, TOKENS = 60, 6
RECIPE = Recipe(epochs=3, batch=8, rate=1e-2, bf16=False)


class Net(torch.nn.Module):
    """Words to a number, with dropout: a step depends on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.drop, self.head = torch.nn.Embedding(20, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.drop(self.words(ids).mean(1)))[:, 0]
        return found


def problem() -> tuple[Net, Callable[[Sequence[int]], Tensor], list[int]]:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 20, (ROWS, TOKENS)))
    want = (ids % 2).float().mean(1)
    net = Net()
    return net, lambda rows: (net(ids[rows]) - want[rows]).pow(2).mean(), [TOKENS] * ROWS


def trained(recipe: Recipe = RECIPE, **options: object) -> tuple[dict[str, Tensor], Fitted]:
    net, loss, lengths = problem()
    done = fit(net, lengths, loss, recipe, **options)  # type: ignore[arg-type]
    assert not net.training
    return net.state_dict(), done


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_repeats_itself_bit_for_bit() -> None:
    net, loss, lengths = problem()
    with torch.no_grad():
        start = float(loss(range(ROWS)))
    state = torch.random.get_rng_state()
    done = fit(net, lengths, loss, replace(RECIPE, epochs=20))
    drawn = torch.rand(3)
    with torch.no_grad():
        assert float(loss(range(ROWS))) < start / 5
    assert (done.steps, done.resumed_at) == (20 * 8, 0)
    torch.random.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(3))  # the caller's random numbers are the caller's
    assert same(trained()[0], trained()[0])
    assert not same(trained()[0], trained(replace(RECIPE, seed=1))[0])


@pytest.mark.parametrize("epochs", [0.4, 1.0, 1.5])
def test_the_rows_that_are_used_are_known_before(epochs: float) -> None:
    net, loss, lengths = problem()
    seen: set[int] = set()

    def watched(rows: Sequence[int]) -> Tensor:
        seen.update(rows)
        return loss(rows)

    recipe = replace(RECIPE, epochs=epochs)
    fit(net, lengths, watched, recipe)
    assert used(lengths, recipe) == sorted(seen) and (len(seen) < ROWS) == (epochs < 1)


def test_bf16_is_another_arithmetic() -> None:
    assert not same(trained()[0], trained(replace(RECIPE, bf16=True))[0])


def killed_at(step: int) -> Callable[[str, int, int], None]:
    def progress(_what: str, done: int, _total: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, _ = trained()
    step = int(np.random.default_rng().integers(2, 24))
    path = tmp_path / "fit.safetensors"
    code = f"""
from pathlib import Path
import test_train as t
t.trained(checkpoint=Path({str(path)!r}), save_every_s=0.0, progress=t.killed_at({step}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, done = trained(checkpoint=path)
    assert done.resumed_at == step, step
    assert same(resumed, whole), step
    again, done = trained(checkpoint=path)  # finished: nothing is left to do
    assert done.resumed_at == done.steps and same(again, whole)


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    whole, _ = trained(checkpoint=path)
    path.with_name(f".{path.name}.part").write_bytes(path.read_bytes()[:100])  # killed while it wrote the next one
    resumed, _ = trained(checkpoint=path)
    assert same(resumed, whole)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"not what edgeformer wrote.*delete it"):
        trained(checkpoint=path)


@pytest.mark.parametrize("change", ["recipe", "made_of"])
def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "fit.safetensors"
    trained(checkpoint=path)
    with pytest.raises(BadInput, match="other rows, weights or settings"):
        if change == "recipe":
            trained(replace(RECIPE, rate=2e-2), checkpoint=path)
        else:
            trained(checkpoint=path, made_of="other texts")


def test_a_batch_in_parts_is_the_same_step() -> None:
    recipe = replace(RECIPE, epochs=1)
    seen: list[int] = []
    net, loss, lengths = problem()
    net.drop.p = 0.0  # each part draws its own
    fit(net, lengths, loss, recipe)
    other, loss, lengths = problem()
    other.drop.p = 0.0
    fit(other, lengths, lambda rows: (seen.append(len(rows)), loss(rows))[1], replace(recipe, accumulate=3))
    assert max(seen) == 3 and sum(seen) == ROWS
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_weights() -> None:
    import transformers
    from families import TEXT

    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 100, (8, 6)))
    counts, found = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        bert = transformers.BertModel(transformers.BertConfig(**TEXT))  # with dropout
        calls: list[int] = []
        bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        recipe = Recipe(epochs=2, batch=4, bf16=False, recompute=recompute)
        fit(bert, [6] * 8, lambda rows, b=bert: b(ids[rows]).last_hidden_state.pow(2).mean(), recipe)
        counts.append(len(calls))
        found.append(bert.state_dict())
    assert counts == [4, 8]  # the forward of a layer ran again in every backward pass
    assert same(*found)


def test_rows_of_similar_length_share_a_batch() -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(random.geometric(0.08, 5000) + 2, 64)
    made = batches(lengths.tolist(), 32, seed=0, epoch=0)
    assert sorted(i for rows in made for i in rows) == list(range(5000))
    assert all(len(rows) <= 32 for rows in made) and len(made) <= 5000 / 32 + 5000 / (32 * POOL) + 2

    def waste(groups: list[list[int]]) -> float:
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in groups)
        return 1 - int(lengths.sum()) / padded

    unsorted = [list(range(i, min(i + 32, 5000))) for i in range(0, 5000, 32)]
    assert waste(made) < 0.06 < 0.5 < waste(unsorted)
    assert made == batches(lengths.tolist(), 32, seed=0, epoch=0) != batches(lengths.tolist(), 32, seed=0, epoch=1)


def test_the_rate_rises_and_falls() -> None:
    rates = [_schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates.index(1.0) in (9, 10)
    assert rates[-1] == pytest.approx(1 / 90) and rates == [*sorted(rates[:11]), *sorted(rates[11:], reverse=True)]
    assert _schedule(0, 1, 0.06) == 1.0


def test_what_cannot_be_trained_is_named() -> None:
    net, loss, lengths = problem()
    with pytest.raises(BadInput, match=r"step 1 is nan; lower the rate"):
        fit(net, lengths, lambda rows: loss(rows) * torch.nan, RECIPE)
    with pytest.raises(BadInput, match="no rows"):
        fit(net, [], loss, RECIPE)
    with pytest.raises(BadInput, match="recompute needs a transformers model inside Net"):
        fit(net, lengths, loss, replace(RECIPE, recompute=True))
    with pytest.raises(BadInput, match="nothing to train"):
        fit(net.requires_grad_(False), lengths, loss, RECIPE)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch": 0}, {"rate": -1.0}, {"warmup": 1.0}, {"batch": 2, "accumulate": 3}]
)
def test_a_recipe_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="recipe: "):
        Recipe(**wrong)  # type: ignore[arg-type]
