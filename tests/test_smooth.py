"""Smoothing: the same outputs, smaller outliers, and programs with ranges that are known before they run."""

from __future__ import annotations

from collections import Counter

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import calibration, check, data, formats, model as models, rounding  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import smooth  # noqa: E402
from edgeformer.workshop import described  # noqa: E402

# Where factors of the two layers went. bert: the first LayerNorms feed residuals too.
MOVED = {
    "bert": {"product": 7, "values": 2},
    "vit": {"norm": 4, "values": 2, "product": 3},
    "modernbert": {"norm": 3, "values": 2, "product": 3},
}


def load(family: str) -> models.Model:
    return models.load(families.tiny(family), name="tiny", lengths=None if family == "vit" else (16,))


@pytest.mark.parametrize("family", MOVED)
def test_outputs_stay_and_outliers_shrink(family: str) -> None:
    model = load(family)
    rows = data.load(model, None, None)
    made = smooth.linears(rows)(model)
    assert made.history[-1].facts["moved"] == MOVED[family]
    batches = list(calibration.batches(model, rows, 64))
    before, after = (smooth._seen(m.module, batches) for m in (model, made))
    for batch in batches:
        with torch.no_grad():
            wanted, got = model.module(*batch.inputs), made.module(*batch.inputs)
        assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.abs().max()))
    assert all(made.ranges[name][0] <= 0 < made.ranges[name][1] for name in after)

    def spread(seen: dict[str, smooth._Range]) -> float:
        """How far the greatest channel stands above the middle one, over layers."""
        peaks = [torch.maximum(-s.low, s.high) for s in seen.values()]
        return float(np.median([float(p.max() / p.median()) for p in peaks]))

    assert spread(after) < spread(before)


def test_static_ranges_are_written_and_run() -> None:
    onnx = pytest.importorskip("onnx")
    model = load("bert")
    rows = data.load(model, None, None)
    with pytest.raises(BadInput, match=r"add the pass smooth\.linears"):
        rounding.chosen(model, "int8-static")
    made = smooth.linears(rows)(model)
    int8, program = formats.load("onnx").export(made, ["int8", "int8-static"])
    kinds = Counter(n.op_type for n in onnx.load_from_string(program.files[program.entry]).graph.node)
    assert kinds["DynamicQuantizeLinear"] == kinds["MatMulInteger"] == 0
    assert kinds["QuantizeLinear"] == 2 * 4, "one for each tensor that linear layers read"
    assert program.work[0].int8_ops == int8.work[0].int8_ops > 0
    assert program.work[0].weight_bytes == int8.work[0].weight_bytes
    wanted = np.stack(check.reference(model, rows.rows[:8], lambda _n: None))
    got = np.stack(check.run(program, described(program), rows.rows[:8], lambda _n: None))
    assert 1e-4 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.03


def test_a_layer_kept_finer_keeps_its_name_through_smoothing() -> None:
    query = "module.encoder.layer.0.attention.self.query"
    model = load("bert").after("test", facts={}, precisions={query: "fp32"})
    made = smooth.linears(data.load(model, None, None))(model)
    assert made.precisions == {f"{query}.1": "fp32"} and rounding.chosen(made, "int8").finer
    with pytest.raises(BadInput, match="strength 2 must be from 0 to 1"):
        smooth.linears([], strength=2)
