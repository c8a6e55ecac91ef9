"""
Every family in every format, unmodified: each program is opened by its own runner and held against PyTorch, dense and
with sparse attention. The heads are spread over the families, so each is built in every format too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import families
import pytest

torch = pytest.importorskip("torch")

from edgeformer import formats  # noqa: E402
from edgeformer.errors import MissingExtra  # noqa: E402

if TYPE_CHECKING:
    from edgeformer.agreement import Cell

NATIVE = ("executorch", "litert", "onnx")  # our operator's library runs in them here
SPARSE = {  # every format in one family, every family in one format
    "bert": ("coreml", "onnx", "tensorrt"),
    "distilbert": ("onnx",),
    "roberta": ("coreml",),
    "electra": ("coreml",),
    "mpnet": ("coreml", "executorch", "litert", "onnx"),  # with a position bias
    "modernbert": ("litert", "onnx"),  # padding behind its window sees nothing
    "vit": ("coreml", "onnx"),  # no length, and 101 tokens are no whole blocks
    "llama": ("coreml", "onnx"),  # causal
}
GLOBAL = {"modernbert": 1}  # its other layer sees a window, and stays dense


@pytest.fixture(scope="module", autouse=True)
def all_formats() -> None:
    for name in formats.names():
        try:
            formats.load(name)
        except MissingExtra as error:
            pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("family", families.NAMES)
def test_every_format_agrees_with_torch(family: str) -> None:
    cells = families.dense(family)
    assert {cell.format for cell in cells if cell.precision == "fp32"} == set(formats.names())
    for cell in cells:
        found, name = cell.fidelity, f"{cell.format}-{cell.precision}"
        assert found and cell.error is None, f"{name}: {cell.error}"
        if cell.precision == "fp32":
            assert found.mean > 0.99999 and found.max_abs < 1e-4, name
        else:  # random weights leave close calls: a next token or a label in 32 may turn
            assert found.mean > 0.96 and 0 < found.max_abs < 0.5, name


@pytest.mark.slow
@pytest.mark.parametrize("family", SPARSE)
def test_sparse_attention_agrees_with_torch(family: str) -> None:
    cells = families.sparse(family, SPARSE[family])
    assert [cell.format for cell in cells] == list(SPARSE[family])
    layers = GLOBAL.get(family, 2)
    for cell in cells:
        assert cell.same and cell.error is None, f"{cell.format}: {cell.error}"
        assert cell.same.mean > 0.99999 and cell.same.max_abs < 1e-4, cell
        _ran_sparse(cell, layers)


def _ran_sparse(cell: Cell, layers: int) -> None:
    if cell.format == "coreml":
        (account,) = cell.sparse_layers.values()
        assert account == {"sparse": layers, "layers": layers}
    elif cell.format in NATIVE:
        assert cell.native and cell.native.calls_per_run == layers and cell.with_library
        assert cell.with_library.mean > 0.99999 and cell.with_library.max_abs < 1e-4, cell
        assert any(kept < 1 for kept in cell.native.kept)
