"""The parity matrix: what a cell holds, that a failing format hides no other, and that a bad layer is named."""

from __future__ import annotations

import json

import families
import numpy as np
import pytest
import sparse_models
import torch
from rich.console import Console

import edgeformer.agreement as matrix_of
from edgeformer import formats as registry, matrix, model as models
from edgeformer.agreement import Cell, parity
from edgeformer.errors import ExportError


@pytest.fixture(scope="module")
def bert() -> models.Model:
    return models.load(families.tiny("bert"), lengths=(16, 64), tokenizer=families.tokenizer())


@pytest.mark.slow
def test_a_program_is_compared_whole_and_layer_by_layer(bert: models.Model) -> None:
    found = parity(bert, formats=["onnx"], precision=["fp32", "int8"])
    fp32, int8 = found.cells
    assert found.whole and found.budget is None and found.layer_names == ("embeddings", "layer 0", "layer 1")
    assert fp32.fidelity and fp32.fidelity.mean > 0.999999 and min(fp32.layers) > 0.99999 and fp32.departs is None
    assert int8.fidelity and 0.98 < int8.fidelity.mean < fp32.fidelity.mean and max(int8.layers) < min(fp32.layers)
    assert len(int8.layers) == 3 and 0 < int8.size_bytes < fp32.size_bytes and fp32.native is None
    body = json.loads(found.to_json())
    assert body["schema"] == "edgeformer.parity/3" and body["cells"][0]["fidelity"]["measure"] == "cosine"


@pytest.mark.slow
def test_one_format_that_fails_is_a_cell_that_says_why(bert: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_model: models.Model, _precisions: object) -> object:
        raise ExportError("litert: no operator for it")

    monkeypatch.setattr(registry.load("litert"), "export", refuse)
    found = parity(bert, formats=["litert", "onnx"], layers=False)
    assert [cell.error for cell in found.cells] == ["litert: no operator for it", None] and not found.whole
    console = Console(width=120, record=True)
    console.print(matrix.table(found))
    for shown in (console.export_text(), matrix.page(found)):
        assert "no operator for it" in shown and "onnx" in shown


@pytest.mark.slow
def test_the_first_layer_that_departs_is_named(bert: models.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = matrix_of.check.run

    def noisy(program: object, entry: object, rows: object, progress: object) -> tuple[np.ndarray, ...]:
        outputs = whole(program, entry, rows, progress)  # type: ignore[arg-type]
        for output in outputs:
            if output.ndim == 2:  # the probe: spoil everything after the embeddings
                output[:, 32:] += np.random.default_rng(0).normal(size=output[:, 32:].shape) * 9
        return outputs

    monkeypatch.setattr(matrix_of.check, "run", noisy)
    found = parity(bert, formats=["onnx"], precision="fp32")
    assert found.cells[0].departs == 1 and "layer 0" in matrix.page(found)


@pytest.mark.parametrize("family", families.NAMES)
def test_every_family_shows_its_layers(family: str) -> None:
    model = models.load(families.tiny(family), lengths=None)
    probe, names = matrix_of.probed(model)
    with torch.no_grad():
        states = probe.module(*probe.example(16 if model.lengths else 0))
        last = model.module(*model.example(16 if model.lengths else 0))
    width = model.module.module.config.hidden_size
    assert (
        names == ("embeddings", "layer 0", "layer 1") and states.shape[-1] == 3 * width and torch.isfinite(last).all()
    )


def test_a_difference_has_students_interval_over_paired_rows() -> None:
    x = np.array([0.1, -0.2, 0.4, 0.0, 0.3])
    found = matrix_of.paired(x)
    assert found.mean == pytest.approx(0.12) and found.rows == 5
    assert found.half == pytest.approx(2.7764 * x.std(ddof=1) / 5**0.5, rel=0.01)  # the quantile of a printed table
    assert matrix_of.paired(x[:4]).half is None
    made = Cell("onnx", "int8", difference=found)
    few = matrix_of.Matrix("tiny", 5, "texts", 0.5, (), (made,))
    said = str(matrix.table(few).caption)
    assert "onnx-int8 to that: +0.1200 ± 0.29" in said and "5 rows: single blocks" in said


def test_a_cell_without_layers_departs_nowhere() -> None:
    assert Cell("onnx", "fp32").departs is None
    assert Cell("onnx", "fp32", layers=(1.0, float("nan"))).departs == 1


@pytest.mark.slow
def test_the_operators_library_is_proven_by_its_own_count() -> None:
    found = parity(sparse_models.model(lengths=(32, 70)), formats=["onnx", "litert"], precision="fp32", layers=False)
    assert found.whole and len(found.cells) == 2
    for cell in found.cells:
        assert cell.native and cell.native.calls_per_run == sparse_models.LAYERS == len(cell.native.kept)
        assert all(0 < kept <= 1 for kept in cell.native.kept) and cell.native.kernel_set in matrix.page(found)
        assert cell.same and cell.with_library and min(cell.same.mean, cell.with_library.mean) > 0.9999
