"""Pruning by structure: what is cut is what the graph says, and the model computes what masking would give."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import calibration, data, device, model as models, structure  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import prune  # noqa: E402

HOST = device.load("host")
ENCODERS = tuple(name for name in families.NAMES if name != "llama")


def load(family: str) -> models.Model:
    return models.load(families.tiny(family), lengths=None if family == "vit" else (8, 16))


def rows(model: models.Model) -> data.Rows:
    return data.load(model, None, None)


def inputs(model: models.Model, length: int = 12) -> tuple[Any, ...]:
    return next(calibration.batches(model, rows(model), 4)).inputs


@pytest.mark.parametrize("family", ENCODERS)
def test_every_head_and_column_is_found(family: str) -> None:
    found = structure.groups(load(family))
    assert [(g.kind, g.layer, g.units) for g in found] == [
        (kind, layer, units) for layer in (0, 1) for kind, units in (("heads", 4), ("columns", 64))
    ]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("kept", [(1, 3), ()], ids=["half", "none"])
def test_cutting_is_masking(family: str, kept: tuple[int, ...]) -> None:
    model = load(family)
    masked, cut = copy.deepcopy(model.module), copy.deepcopy(model.module)
    for group in structure.groups(model):
        index = torch.tensor([u for u in range(group.units) if u % 4 in kept], dtype=torch.long)
        gone = torch.tensor([u for u in range(group.units) if u % 4 not in kept])
        with torch.no_grad():
            masked.get_submodule(group.out).weight[:, structure.channels(group, gone)] = 0
        structure.cut(cut, group, index)
    given = inputs(model)
    with torch.no_grad():
        assert (cut(*given) - masked(*given)).abs().max() < 1e-5
        assert (masked(*given) - model.module(*given)).abs().max() > 1e-3
    lost = sum(p.numel() for p in model.module.parameters()) - sum(p.numel() for p in cut.parameters())
    assert lost > (0.99 if not kept else 0.49) * 2 * (4 * 32 * 32 + (3 if family == "modernbert" else 2) * 32 * 64)


@pytest.mark.parametrize("family", ENCODERS)
def test_structured_keeps_its_budget_and_its_input(family: str) -> None:
    model = load(family)
    before = copy.deepcopy(model.module.state_dict())
    made = prune.structured(rows(model), keep=0.5, grain=16)(model)
    assert all(x.requires_grad for x in made.module.parameters()), "distillation trains what is left"
    facts = made.history[-1].facts
    assert made.history[-1].name == "prune.structured" and facts["method"] == "obs"
    assert 0.3 < facts["cost_kept"] <= 0.5
    assert all(kept % 16 == 0 for name, kept in facts["kept"].items() if name.endswith("columns"))
    found = structure.groups(model)
    for group in found:
        if kept := facts["kept"][group.name]:
            assert made.module.get_submodule(group.out).in_features == kept * group.width
    assert facts["parameters"] == sum(p.numel() for p in made.module.parameters()) < facts["parameters_before"]
    assert torch.isfinite(made.module(*inputs(made))).all()
    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())


@pytest.mark.parametrize("method", prune.METHODS)
def test_all_kept_changes_nothing_and_units_that_do_nothing_go_first(method: str) -> None:
    model = load("bert")
    given = inputs(model)
    assert torch.equal(prune.structured(rows(model), keep=1, method=method)(model).module(*given), model.module(*given))
    idle = {}
    for group in structure.groups(model):
        dead = torch.arange(group.units)[1::2]
        idle[group.name] = set(dead.tolist())
        with torch.no_grad():
            model.module.get_submodule(group.out).weight[:, structure.channels(group, dead)] = 0
            for name in group.into:
                model.module.get_submodule(name).weight[structure.rows(group, dead)] *= 1e-3
    dense = model.module(*given)
    made = prune.structured(rows(model), keep=0.5, method=method, grain=1, fit=False)(model)
    assert (made.module(*given) - dense).abs().max() < 1e-5


def test_the_fit_brings_back_what_others_can_stand_in_for() -> None:
    model = load("bert")
    with torch.no_grad():  # every odd column repeats the one before it, so nothing need be lost
        for group in structure.groups(model):
            if group.kind == structure.COLUMNS:
                into = model.module.get_submodule(group.into[0])
                into.weight[1::2], into.bias[1::2] = into.weight[::2], into.bias[::2]
    only_columns = prune.tabulated({"heads": {0: 0.0, 4: 0.0}, "columns": {0: 0.0, 64: 1.0}})
    given = inputs(model)
    dense = model.module(*given)

    def distance(method: str, fit: bool) -> float:
        made = prune.structured(rows(model), keep=0.5, method=method, cost=only_columns, grain=1, fit=fit)(model)
        return float((made.module(*given) - dense).norm() / dense.norm())

    assert distance("obs", True) < 0.05
    assert distance("magnitude", False) > 4 * distance("obs", True)


def test_heads_are_saved_where_they_buy_time() -> None:
    groups = structure.groups(load("bert"))
    paths = [prune.Path((g.units, g.units // 2, 0), (0.0, 1.0, 9.0), tuple(range(g.units))) for g in groups]
    dear_heads = prune.tabulated({"heads": {0: 0.0, 4: 10.0}, "columns": {0: 0.0, 64: 1.0}})
    assert prune.allocate(groups, paths, dear_heads, 0.6) == [2, 64, 2, 64]
    dear_columns = prune.tabulated({"heads": {0: 0.0, 4: 1.0}, "columns": {0: 0.0, 64: 10.0}})
    assert prune.allocate(groups, paths, dear_columns, 0.6) == [4, 32, 4, 32]
    on_device = prune.modelled(HOST, 32, 16)
    assert on_device(groups[0], 4) > on_device(groups[0], 2) > on_device(groups[0], 0) == pytest.approx(0, abs=1e-2)
    with pytest.raises(BadInput, match="raise it"):
        prune.allocate(groups, [p._replace(left=p.left[:1], damage=(0.0,)) for p in paths], dear_heads, 0.5)


def test_labels_serve_where_there_are_some() -> None:
    model = load("roberta")
    plain = rows(model)
    labelled = replace(plain, labels=np.arange(len(plain.rows), dtype=np.float32) % 3)
    assert not prune.structured(plain)(model).history[-1].facts["labelled"]
    assert prune.structured(labelled)(model).history[-1].facts["labelled"]


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(BadInput, match="keep 0 must be above 0"):
        prune.structured([], keep=0)
    with pytest.raises(BadInput, match="method 'best' must be one of obs"):
        prune.structured([], method="best")
    shared = load("llama")
    with pytest.raises(BadInput, match="attention with shared keys"):
        prune.structured(rows(shared))(shared)
    flat = models.load(torch.nn.Linear(4, 4), example=(torch.zeros(1, 4),))
    with pytest.raises(BadInput, match="no attention and no feed-forward block"):
        prune.structured(rows(flat))(flat)


def test_sparse_attention_fits_afterwards() -> None:
    from transformers import BertConfig, BertModel

    from edgeformer.attention import swap
    from edgeformer.passes import sparsify

    torch.manual_seed(0)
    config = BertConfig(**{**families.TEXT, "hidden_size": 64, "max_position_embeddings": 128})
    model = models.load(BertModel(config), lengths=(128,))
    found = rows(model)
    made = prune.structured(found, keep=0.5, uniform_heads=True)(model)
    assert len({n for name, n in made.history[-1].facts["kept"].items() if name.endswith("heads")}) == 1
    sparse = sparsify.dsa(found.rows, block=32, dense_below=0)(made)
    heads = made.history[-1].facts["kept"]["0.heads"]
    assert [layer.heads for layer in swap.layers(sparse.module)] == [heads, heads]
    assert torch.isfinite(sparse.module(*sparse.example(128))).all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "format"), [("bert", "onnx"), ("bert", "litert"), ("modernbert", "onnx")])
def test_a_pruned_model_exports(family: str, format: str, tmp_path: Path) -> None:
    from edgeformer.plan import exports
    from edgeformer_agent import runners

    pytest.importorskip({"onnx": "onnxruntime", "litert": "litert_torch"}[format])

    model = load(family)
    made = prune.structured(rows(model), keep=0.4, grain=16)(model)
    row = rows(made).rows[3]
    with torch.no_grad():
        want = made.module(*(torch.from_numpy(row[x.name][None]) for x in made.inputs))[0].numpy()
    (program,) = exports([format], "fp32")[0].programs(made)
    (tmp_path / program.entry).write_bytes(program.files[program.entry])
    got = runners.load(format).load(str(tmp_path / program.entry), program, 1)(row)
    assert np.abs(got - want).max() < 1e-4
