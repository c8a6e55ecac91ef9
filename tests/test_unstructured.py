"""Zeros among the weights: as many as asked for, where the pattern allows them, with less error than by magnitude."""

import zlib
from typing import Any

import families
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import calibration, data, model as models, structure  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import unstructured  # noqa: E402

ENCODERS = tuple(name for name in families.NAMES if name != "llama")


def load(family: str) -> models.Model:
    return models.load(families.tiny(family), lengths=None if family == "vit" else (8, 16))


def linears(model: models.Model) -> list[Any]:
    return [model.module.get_submodule(n).weight for g in structure.groups(model) for n in (*g.into, g.out)]


def error(model: models.Model, made: models.Model) -> float:
    rows = data.load(model, None, None)
    with torch.no_grad():
        pairs = [(made.module(*b.inputs), model.module(*b.inputs)) for b in calibration.batches(model, rows, 32)]
    return float(sum((a - b).pow(2).sum() for a, b in pairs))


@pytest.mark.parametrize("family", ENCODERS)
def test_two_of_four_stay(family: str) -> None:
    model = load(family)
    made = unstructured.weights(data.load(model, None, None), pattern=(2, 4))(model)
    for weight in linears(made):
        assert ((weight.view(len(weight), -1, 4) != 0).sum(-1) == 2).all()
    facts = made.history[-1].facts
    assert facts["share"] == 0.5 and facts["pattern"] == "2:4"
    assert not any((weight == 0).any() for weight in linears(model)), "the model given is untouched"


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_second_order_loses_less_than_magnitude(pattern: tuple[int, int] | None) -> None:
    model = load("bert")
    rows = data.load(model, None, None)
    obs, plain = (
        unstructured.weights(rows, share=0.5, pattern=pattern, method=method)(model) for method in ("obs", "magnitude")
    )
    assert error(model, obs) < error(model, plain)
    assert obs.history[-1].facts["share"] == plain.history[-1].facts["share"] == 0.5


def test_zeros_compress_and_none_changes_nothing() -> None:
    model = load("bert")
    rows = data.load(model, None, None)
    given = model.example(8)
    same = unstructured.weights(rows, share=0)(model)
    assert torch.equal(same.module(*given), model.module(*given))
    sizes = [
        len(zlib.compress(b"".join(w.detach().numpy().tobytes() for w in linears(m)), 9))
        for m in (model, unstructured.weights(rows, share=0.8)(model))
    ]
    assert sizes[1] < 0.4 * sizes[0]


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(BadInput, match="share 1 must be at least 0 and below 1"):
        unstructured.weights([], share=1)
    with pytest.raises(BadInput, match=r"pattern \(4, 4\) must be"):
        unstructured.weights([], pattern=(4, 4))
    with pytest.raises(BadInput, match="multiple of 5"):
        unstructured.weights([], pattern=(2, 5), method="magnitude")(load("bert"))
