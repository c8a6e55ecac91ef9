"""The stored fine-tuned MiniLM on all of SST-2's development set. Skips where the data is not beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeformer as ef

SHARED = Path(__file__).parents[2] / "shared"
MODEL, DATA = SHARED / "models" / "minilm-sst2", SHARED / "data" / "sst2" / "dev.tsv"


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODEL.is_dir() and DATA.is_file()), reason="no ../shared/models/minilm-sst2 and ../shared/data/sst2"
)
def test_sst2_int8_keeps_its_accuracy(tmp_path: Path, config_home: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = ef.build(MODEL, "raspberry-pi-4", data=DATA, task="sst2", formats=["onnx"], out=tmp_path)
    (entry,) = bundle.manifest.programs
    assert entry.checked.rows == 872 and entry.checked.metric == "accuracy"
    assert entry.checked.reference == pytest.approx(0.8865, abs=5e-5)
    assert entry.checked.value is not None and entry.checked.value >= 0.99 * 0.8865
    assert entry.size_bytes <= 24e6
