"""Every encoder family goes through the whole build, unmodified, in both formats, and is held against fp32 PyTorch."""

from pathlib import Path

import families
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("litert_torch")

import edgeformer as ef  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("family", families.NAMES)
def test_builds_for_the_pi_in_both_formats(family: str, tmp_path: Path, config_home: Path) -> None:
    bundle = ef.build(
        families.tiny(family), "raspberry-pi-4", precision=("fp32", "int8"),
        lengths=None if family == "vit" else (16, 48), out=tmp_path, name=f"tiny-{family}", gate=0.9,
    )  # fmt: skip
    bundle.verify()
    checked = {entry.name: entry.checked for entry in bundle.manifest.programs}
    assert set(checked) == {"onnx-fp32", "litert-fp32", "onnx-int8", "litert-int8"}
    for name, found in checked.items():
        assert found.rows == 32
        if name.endswith("fp32"):
            assert found.mean > 0.99999 and found.max_abs < 1e-4, name
