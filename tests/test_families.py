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


@pytest.mark.slow
@pytest.mark.parametrize("family", ("bert", "modernbert", "vit"))  # a table of positions, windows, convolutions
def test_executorch_runs_it(family: str, tmp_path: Path, config_home: Path) -> None:
    """The program of a phone, opened by its runtime here; fp32 of one, because both precisions lower the same graph."""
    pytest.importorskip("executorch")
    bundle = ef.build(
        families.tiny(family), "host", formats=["executorch"],
        precision=("fp32", "int8") if family == "bert" else "int8",
        lengths=None if family == "vit" else (16, 48), out=tmp_path, name=f"tiny-{family}", gate=0.9,
    )  # fmt: skip
    for entry in bundle.manifest.programs:
        assert entry.format == "executorch" and entry.checked.rows == 32 and not entry.libraries
        if entry.precision == "fp32":
            assert entry.checked.mean > 0.99999 and entry.checked.max_abs < 1e-4
        else:
            assert entry.checked.mean > 0.99 and entry.work[-1].int8_ops > entry.work[-1].flops
